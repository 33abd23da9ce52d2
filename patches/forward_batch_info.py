"""Hand the plan of a schedule batch to the attention backend, which takes it in the forward that follows."""

from __future__ import annotations

from sglang_rotatek.attention.backend import RotateKBackend


def init_new(original, cls, batch, model_runner, **kwargs):
    forward_batch = original(cls, batch, model_runner, **kwargs)
    backend = getattr(model_runner, "attn_backend", None)
    if isinstance(backend, RotateKBackend):
        # A batch keeps its object, and the plan on it, when it goes on to decode.
        is_extend = forward_batch.forward_mode.is_extend()
        backend.set_plan(getattr(batch, "rotatek_plan", None) if is_extend else None)
    return forward_batch
