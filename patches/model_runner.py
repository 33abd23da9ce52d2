"""Hand the plan to the backend: the runner copies the forward batch, and the copy loses it."""

from __future__ import annotations


def forward_raw(original, model_runner, forward_batch, *args, **kwargs):
    plan = getattr(forward_batch, "rotatek_plan", None)
    if plan is not None:
        model_runner.attn_backend.set_plan(plan)
    return original(model_runner, forward_batch, *args, **kwargs)
