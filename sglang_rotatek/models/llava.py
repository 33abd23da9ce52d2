"""LLaVA in its original layout, which SGLang serves: what it takes to serve it in any dtype."""

from __future__ import annotations

import torch


def match_tower_dtype(model: torch.nn.Module) -> None:
    """Give the vision tower of a loaded model the dtype of the projector behind it. The host loads
    the tower of the original layout as float16 whatever --dtype says, and the first image in
    another dtype ends the server."""
    tower = getattr(model, "vision_tower", None)
    projector = getattr(model, "multi_modal_projector", None)
    if isinstance(tower, torch.nn.Module) and isinstance(projector, torch.nn.Module):
        tower.to(next(projector.parameters()).dtype)
