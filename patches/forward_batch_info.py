"""Hand the layout of a prefill to the attention backend, which takes it in the forward that follows."""

from __future__ import annotations

from sglang_rotatek.attention.backend import RotateKBackend


def init_new(original, cls, batch, model_runner, **kwargs):
    forward_batch = original(cls, batch, model_runner, **kwargs)
    backend = getattr(model_runner, "attn_backend", None)
    if isinstance(backend, RotateKBackend):
        layout = None
        if forward_batch.forward_mode.is_extend():
            layout = batch.tree_cache.prefill_layout(batch.reqs, batch.prefix_lens, batch.extend_lens)
        backend.set_plan(layout)
    return forward_batch
