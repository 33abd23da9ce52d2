"""Carry the plan from the schedule batch to the forward batch."""

from __future__ import annotations


def init_new(original, cls, batch, model_runner, **kwargs):
    forward_batch = original(cls, batch, model_runner, **kwargs)
    plan = getattr(batch, "rotatek_plan", None)
    # A batch keeps its object, and the plan on it, when it goes on to decode.
    if plan is not None and forward_batch.forward_mode.is_extend():
        forward_batch.rotatek_plan = plan
    return forward_batch
