"""Give a batch its rows: by request, the only way to know whose slab a token goes to."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from sglang.srt.mem_cache import allocation as host
from sglang.srt.utils.common import is_pin_memory_available

from sglang_rotatek.kernels.upload import upload
from sglang_rotatek.memory.tree import RotateKRadixCache

if TYPE_CHECKING:
    from sglang.srt.managers.schedule_batch import ScheduleBatch


def alloc_for_extend(
    original: Callable, batch: ScheduleBatch
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The host's, with the tree's rows in place of as many tokens of a free list."""
    tree = batch.tree_cache
    if not isinstance(tree, RotateKRadixCache):
        return original(batch)
    reqs, table = batch.reqs, batch.req_to_token_pool
    prefixes = [host._prefix_kv_indices(batch, req) for req in reqs]
    new = [req for req in reqs if not req.kv.holds_kv]
    indices = host.alloc_req_slots(table, reqs, tree)
    for req in new:
        tree.begin(req)
    out_cache_loc = upload(tree.take_for_prefill(reqs), batch.device)

    def on_device(numbers: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
        cpu = torch.tensor(
            numbers, dtype=torch.int64, pin_memory=is_pin_memory_available(batch.device)
        )
        return cpu.to(batch.device, non_blocking=True), cpu

    (indices_device, indices_cpu), (prefix_device, prefix_cpu), (extend_device, extend_cpu) = (
        on_device(numbers) for numbers in (indices, batch.prefix_lens, batch.extend_lens)
    )
    host.write_cache_indices(
        out_cache_loc, indices_device, indices_cpu, prefix_device, prefix_cpu, batch.seq_lens,
        batch.seq_lens_cpu, extend_device, extend_cpu, prefixes, table,
    )  # fmt: skip
    for req, seq_len in zip(reqs, batch.seq_lens_cpu.tolist(), strict=True):
        req.kv.kv_allocated_len = req.kv.kv_committed_len = seq_len
    return out_cache_loc, indices_device, indices_cpu


def alloc_for_decode(batch: ScheduleBatch, token_per_req: int) -> torch.Tensor:
    """For the host's registry of such functions: one text row for each request."""
    assert token_per_req == 1, (
        f"{token_per_req} tokens a step are for speculative decoding, which RotateK refuses"
    )
    slots = batch.tree_cache.take_for_decode(
        batch.req_pool_indices_cpu.numpy(), [req.kv.kv_allocated_len for req in batch.reqs]
    )
    out_cache_loc = upload(slots, batch.device)
    batch.req_to_token_pool.write(
        (batch.req_pool_indices, batch.seq_lens.clone()), out_cache_loc.to(torch.int32)
    )
    for req in batch.reqs:
        req.kv.kv_allocated_len += 1
        req.kv.kv_committed_len += 1
    return out_cache_loc
