"""Tell the attention backend what the scheduler knows of the forward that follows."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from sglang_rotatek.attention.backend import RotateKBackend

if TYPE_CHECKING:
    from sglang.srt.managers.schedule_batch import ScheduleBatch
    from sglang.srt.model_executor.forward_batch_info import ForwardBatch
    from sglang.srt.model_executor.model_runner import ModelRunner


def init_new(
    original: Callable[..., ForwardBatch],
    cls: type[ForwardBatch],
    batch: ScheduleBatch,
    model_runner: ModelRunner,
    **kwargs: Any,
) -> ForwardBatch:
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
