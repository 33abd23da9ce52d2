"""Attention over both kinds of rows, and compression on prefill."""
