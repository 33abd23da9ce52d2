"""Tiny vision-language models with random weights, one module a family;
scripts/models/make_tiny_model.py is the command."""

import json
from pathlib import Path


def write_json(path: Path, content: dict) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n")
