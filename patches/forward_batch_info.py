"""Tell the attention backend what the scheduler knows of the forward that follows."""

from __future__ import annotations

from sglang_rotatek.attention.backend import RotateKBackend


def init_new(original, cls, batch, model_runner, **kwargs):
    forward_batch = original(cls, batch, model_runner, **kwargs)
    backend = getattr(model_runner, "attn_backend", None)
    if isinstance(backend, RotateKBackend):
        tree = batch.tree_cache
        rewritten = tree.take_rewritten([req.kv.req_pool_idx for req in batch.reqs or ()])
        if forward_batch.forward_mode.is_extend():
            if backend.pruner is not None:
                backend.pruner.expect(batch)
            backend.expect(tree.prefill_layout(batch.reqs, batch.prefix_lens, batch.extend_lens))
        else:
            backend.expect(None, rewritten)
    return forward_batch
