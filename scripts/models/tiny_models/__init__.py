"""Tiny vision-language models with random weights, one module a family;
scripts/models/make_tiny_model.py is the command."""
