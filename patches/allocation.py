"""Give a prefill batch its visual slots before the host takes text slots for the rest."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from sglang_rotatek.memory.allocator import ExtendPlan, RotateKAllocator, Segment
from sglang_rotatek.basis import QUERY_WINDOW
from sglang_rotatek.memory.tree import RotateKRadixCache, request_state
from sglang_rotatek.stats import NO_SLABS

if TYPE_CHECKING:
    from sglang.srt.managers.schedule_batch import Req


def alloc_for_extend(original, batch):
    allocator = batch.token_to_kv_pool_allocator
    if not isinstance(allocator, RotateKAllocator):
        return original(batch)
    plan, owned = plan_extend(batch.reqs, batch.tree_cache, allocator)
    with allocator.planned(plan):
        result = original(batch)
    for req, position, slots in owned:  # now that each request has a row
        batch.tree_cache.runs_of(req.kv.req_pool_idx).append(position, slots)
    batch.rotatek_plan = plan
    return result


def plan_extend(
    reqs, tree_cache: RotateKRadixCache, allocator: RotateKAllocator
) -> tuple[ExtendPlan, list[tuple[Req, int, np.ndarray]]]:
    """Allocate visual slots and bases for the images that the batch computes; the plan, and which request owns which
    slots from which position on.

    Admission made sure that slabs are there or can be evicted; a segment for which they are not stays at full width,
    and is counted.
    """
    plan = ExtendPlan(sum(req.extend_len for req in reqs))
    wanted, owned = [], []
    row = 0
    for req in reqs:
        start, end = req.prefix_len, req.extend_end
        window = (row + max(0, end - start - QUERY_WINDOW), row + end - start)
        for low, high in request_state(req).placement.segments(start, end, allocator.config.segment_tokens):
            wanted.append((req, low, high - low, row + low - start, window))
        row += end - start
    if wanted:
        slabs = sum(allocator.layout.slabs_of(tokens) for _, _, tokens, _, _ in wanted)
        tree_cache.make_room(visual_slabs=slabs)
    for req, position, tokens, batch_row, window in wanted:
        allocated = allocator.visual.alloc(tokens)
        if allocated is None:
            allocator.stats.full_width(NO_SLABS, tokens)
            continue
        slots, basis = allocated
        owned.append((req, position, slots))
        plan.segments.append(Segment(batch_row, slots, basis, window))
    return plan, owned
