"""Plan of one forward's attention over the pools: which slots of a request are text and which are visual, and how
the work is cut into equal programs. Made on the device, so that CUDA graphs replay it with other lengths.

A *tile* is ``tile_rows`` query rows (token, query head of the group) of one request that share a KV head. An *item*
is a tile and a *split*: a share of the request's slots, counted in units of 16 stored channels, since a visual slot is
cheaper to read than a text slot. So items cost about the same, whatever mix of requests a batch holds.
"""

from __future__ import annotations

import numpy as np
import torch
import triton
import triton.language as tl

from .reference import LayerPools
from .upload import upload

COST_UNIT = 16  # channels; ranks and head dims are multiples of it
MIN_SPLIT_TOKENS = 64  # full-width tokens; shorter splits cost more in merging than they gain
UNEVEN = 2  # times as many items for a batch of unlike requests: short items fill the gaps that long ones leave
ITEM = tl.constexpr(16)  # columns of ``items``: 10 are in use, 16 keep a row within a cache line
UNBOUNDED = tl.constexpr(1 << 30)  # a split size that no request reaches, with room for sums in int32


@triton.jit
def _smaller(a, b):
    return tl.minimum(a, b)


# Values that differ between batches are not specialised on: a variant would compile for seconds, while serving.
@triton.jit(do_not_specialize=["stride_rows"])
def _partition(
    req_to_token,
    req_pool_indices,
    kv_lens,
    slot_to_basis,
    rows,
    run_ends,
    num_text,
    num_slots,
    first_visual,
    stride_req,
    stride_rows,
    BLOCK: tl.constexpr,
):
    """One program a request. ``rows``: its text slots, then its rows in the visual pool, both in order; for each of the
    latter, ``run_ends`` is the index in ``rows`` where the slots of its basis end."""
    request = tl.program_id(0)
    n = tl.load(kv_lens + request).to(tl.int32)
    source = req_to_token + tl.load(req_pool_indices + request).to(tl.int64) * stride_req
    rows += request.to(tl.int64) * stride_rows
    run_ends += request.to(tl.int64) * stride_rows
    offsets = tl.arange(0, BLOCK)

    text = 0
    for at in range(0, n, BLOCK):
        slot = tl.load(source + at + offsets, mask=at + offsets < n, other=first_visual)
        text += tl.sum((slot < first_visual).to(tl.int32))
    tl.store(num_text + request, text)
    tl.store(num_slots + request, n)

    # Backwards, so that a run's end is known when its slots are written.
    text_left, visual_left, next_end = text, n, n
    for done in range(0, n, BLOCK):
        position = (tl.cdiv(n, BLOCK) - 1) * BLOCK - done + offsets
        in_row = position < n
        slot = tl.load(source + position, mask=in_row, other=0)
        following = tl.load(source + position + 1, mask=position + 1 < n, other=0)
        is_visual = in_row & (slot >= first_visual)
        is_text = in_row & (slot < first_visual)
        basis = tl.load(slot_to_basis + slot - first_visual, mask=is_visual, other=-1)
        next_basis = tl.load(slot_to_basis + following - first_visual, mask=following >= first_visual, other=-1)
        text_left -= tl.sum(is_text.to(tl.int32))
        visual_left -= tl.sum(is_visual.to(tl.int32))
        text_at = text_left + tl.cumsum(is_text.to(tl.int32)) - 1
        visual_at = visual_left + tl.cumsum(is_visual.to(tl.int32)) - 1
        tl.store(rows + text_at, slot, mask=is_text)
        tl.store(rows + visual_at, slot - first_visual, mask=is_visual)
        end = tl.where(is_visual & (basis != next_basis), visual_at + 1, n)
        end = tl.minimum(tl.associative_scan(end, 0, _smaller, reverse=True), next_end)
        tl.store(run_ends + visual_at, end, mask=is_visual)
        next_end = tl.min(end)


@triton.jit(do_not_specialize=["num_requests", "wanted_items", "stride_rows"])
def _schedule(
    rows,
    run_ends,
    slot_to_basis,
    num_text,
    num_slots,
    num_tiles,
    num_splits,
    partial_start,
    items,
    num_items,
    num_requests,
    wanted_items,
    min_split,
    stride_rows,
    TEXT_COST: tl.constexpr,
    VISUAL_COST: tl.constexpr,
    ALIGN: tl.constexpr,
    UNEVEN: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One program: cut every request into equal splits of about the same cost everywhere, and describe each item.

    Inner bounds of splits are multiples of ALIGN slots of their kind: whole blocks for the attention kernel.
    """
    request = tl.arange(0, BLOCK)
    is_real = request < num_requests
    text = tl.load(num_text + request, mask=is_real, other=0)
    slots = tl.load(num_slots + request, mask=is_real, other=0)
    tiles = tl.load(num_tiles + request, mask=is_real, other=0)
    cost = text * TEXT_COST + (slots - text) * VISUAL_COST
    total = tl.sum(tiles.to(tl.int64) * cost)
    if tl.max(cost) * tl.sum(tiles).to(tl.int64) > total + total // 2:
        wanted_items *= UNEVEN
    size = tl.minimum(tl.maximum(tl.cdiv(total, wanted_items), min_split), UNBOUNDED).to(tl.int32)
    # A request a quarter larger than a split stays whole: two halves would cost more than they balance. One without
    # slots has an item too, which writes zeros.
    splits = tl.maximum(tl.cdiv(cost - size // 4, size), 1)
    own_size = tl.cdiv(cost, splits)
    count = tiles * splits
    start = tl.cumsum(count) - count
    partials = tl.where(splits > 1, count, 0)
    first_partial = tl.cumsum(partials) - partials
    all_items = tl.sum(count)
    tl.store(num_items, all_items)
    tl.store(num_splits + request, splits, mask=is_real)
    tl.store(partial_start + request, first_partial, mask=is_real)
    for i in range(0, tl.max(count)):
        is_item = i < count
        split = i % splits
        low, high = split * own_size, (split + 1) * own_size
        text_low = tl.minimum(tl.cdiv(low, TEXT_COST * ALIGN) * ALIGN, text)
        text_high = tl.minimum(tl.cdiv(high, TEXT_COST * ALIGN) * ALIGN, text)
        low, high = tl.maximum(low - text * TEXT_COST, 0), tl.maximum(high - text * TEXT_COST, 0)
        visual_low = tl.minimum(text + tl.cdiv(low, VISUAL_COST * ALIGN) * ALIGN, slots)
        visual_high = tl.minimum(text + tl.cdiv(high, VISUAL_COST * ALIGN) * ALIGN, slots)
        item = items + (start + i) * ITEM
        tl.store(item, request, mask=is_item)
        tl.store(item + 1, i // splits, mask=is_item)
        tl.store(item + 2, text_low, mask=is_item)
        tl.store(item + 3, text_high, mask=is_item)
        tl.store(item + 4, visual_low, mask=is_item)
        tl.store(item + 5, visual_high, mask=is_item)
        tl.store(item + 6, tl.where(splits > 1, first_partial + i, -1), mask=is_item)

    # The runs of each item, which every layer's attention would else find through a chain of dependent loads. Other
    # threads stored what is read here.
    tl.debug_barrier()
    for first in range(0, all_items, BLOCK):
        is_item = first + tl.arange(0, BLOCK) < all_items
        item = items + (first + tl.arange(0, BLOCK)) * ITEM
        row = tl.load(item, mask=is_item, other=0).to(tl.int64) * stride_rows
        begin, end = tl.load(item + 4, mask=is_item, other=0), tl.load(item + 5, mask=is_item, other=0)
        first_row = tl.load(rows + row + begin, mask=begin < end, other=0)
        tl.store(item + 9, tl.load(slot_to_basis + first_row, mask=begin < end, other=0), mask=is_item)
        run_end = tl.minimum(tl.load(run_ends + row + begin, mask=begin < end, other=UNBOUNDED), end)
        tl.store(item + 8, run_end, mask=is_item)
        num_runs = (begin < end).to(tl.int32)
        while tl.max((run_end < end).to(tl.int32)) > 0:
            num_runs += (run_end < end).to(tl.int32)
            run_end = tl.load(run_ends + row + run_end, mask=run_end < end, other=UNBOUNDED)
        tl.store(item + 7, num_runs, mask=is_item)


class Plan:
    """Device buffers of a plan, for up to ``max_requests`` requests of ``max_slots`` slots.

    text_cost, visual_cost: what reading one slot costs, in units of COST_UNIT channels.
    items [*, ITEM] int32: request, tile, first and end index of its text slots in ``rows``, the same of its visual ones,
    its row among the partial results, or -1 when it is all of its tile; then its number of runs, and the end index and
    the basis of the first.
    wanted_items: about this many items fill the GPU, per KV head; None never cuts a request into splits.
    tile_rows: query rows of a tile. num_tiles: tiles of each request, else one.
    """

    def __init__(
        self,
        max_requests: int,
        max_slots: int,
        pools: LayerPools,
        *,
        tile_rows: int,
        wanted_items: int | None,
        device: torch.device | str,
        num_tiles: list[int] | None = None,
    ) -> None:
        num_kv_heads, head_dim = pools.k_text.shape[1:]
        rank, v_head_dim = pools.z.shape[-1], pools.v_text.shape[-1]
        self.max_requests = max_requests
        self.tile_rows = tile_rows
        self.text_cost = (head_dim + v_head_dim) // COST_UNIT
        self.visual_cost = (rank + v_head_dim) // COST_UNIT
        self.splits = wanted_items is not None
        self.wanted_items = wanted_items or 0
        self.min_split = MIN_SPLIT_TOKENS * self.text_cost if self.splits else UNBOUNDED.value
        num_tiles = num_tiles or [1] * max_requests
        self.max_tiles = sum(num_tiles) or max_requests

        def ints(*size: int) -> torch.Tensor:
            return torch.zeros(size, dtype=torch.int32, device=device)

        self.rows = torch.empty(max_requests, max_slots, dtype=torch.int32, device=device)
        self.run_ends = torch.empty_like(self.rows)
        self.num_text, self.num_slots, self.num_splits = ints(max_requests), ints(max_requests), ints(max_requests)
        self.partial_start = ints(max_requests)
        self.num_tiles = upload(np.array(num_tiles, dtype=np.int32), device)
        self.items = ints(self.max_items(self.max_tiles), ITEM.value)
        self.num_items = ints(1)
        # One layer's results of items that are not all of their tile; layers follow each other on the stream.
        partial_rows = self.max_partials * num_kv_heads * tile_rows
        self.partial_out = torch.empty(partial_rows, v_head_dim, dtype=torch.float32, device=device)
        self.partial_lse = torch.empty(partial_rows, dtype=torch.float32, device=device)
        self.no_lse = torch.empty(0, 0, dtype=torch.float32, device=device)

    def max_items(self, num_tiles: int) -> int:
        """Bound of the items that ``num_tiles`` tiles can make: the splits of one tile overshoot by less than one."""
        return num_tiles + UNEVEN * self.wanted_items

    @property
    def max_partials(self) -> int:
        """Bound of the items that belong to requests of two splits and more."""
        return 2 * UNEVEN * self.wanted_items

    def update(
        self,
        req_to_token: torch.Tensor,
        req_pool_indices: torch.Tensor,
        kv_lens: torch.Tensor,
        pools: LayerPools,
        *,
        align: int,
        wanted_share: float = 1.0,
    ) -> None:
        """Plan for requests whose slots are ``req_to_token[req_pool_indices[i], : kv_lens[i]]``. No host sync.

        ``align``: slots that the attention kernel takes at a time; ``wanted_share`` of wanted_items is aimed at.
        req_to_token [*, *] int32, req_pool_indices and kv_lens [bs] int.
        """
        num_requests = len(req_pool_indices)
        if not num_requests:
            self.num_items.zero_()
            return
        _partition[(num_requests,)](
            req_to_token,
            req_pool_indices,
            kv_lens,
            pools.slot_to_basis,
            self.rows,
            self.run_ends,
            self.num_text,
            self.num_slots,
            len(pools.k_text),
            req_to_token.stride(0),
            self.rows.stride(0),
            BLOCK=1024,
            num_warps=4,
        )
        _schedule[(1,)](
            self.rows,
            self.run_ends,
            pools.slot_to_basis,
            self.num_text,
            self.num_slots,
            self.num_tiles,
            self.num_splits,
            self.partial_start,
            self.items,
            self.num_items,
            num_requests,
            max(1, int(self.wanted_items * wanted_share)),
            max(self.min_split, align * self.text_cost),
            self.rows.stride(0),
            TEXT_COST=self.text_cost,
            VISUAL_COST=self.visual_cost,
            ALIGN=align,
            UNEVEN=UNEVEN,
            BLOCK=max(256, triton.next_power_of_2(num_requests)),
            num_warps=4,
        )
