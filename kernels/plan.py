"""Plan of one forward's attention over the pools: how the slots of its requests, which partition.py
keeps by kind, are cut into equal programs. Made on the device, so that CUDA graphs replay it with
other lengths.

A *tile* is ``tile_rows`` query rows (token, query head of the group) of one request that share a KV
head. An *item* is a tile and a *split*: a share of the request's slots, counted in the bytes of
their rows, since a visual slot is cheaper to read than a text slot. So items cost about the same,
whatever mix of requests a batch holds.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
import triton
import triton.language as tl

from .partition import Partition
from .pools import LayerPools
from .turn import TurnedQueries
from .upload import upload

COST_UNIT = 4  # bytes; rows are multiples of it
MIN_SPLIT_TOKENS = 64  # text tokens; shorter splits cost more in merging than they gain
# So many times as many items for a batch of unlike requests: short items fill the gaps that long
# ones leave.
UNEVEN = 2
ITEM = tl.constexpr(16)  # columns of ``items``: 14 are in use, 16 keep one within a cache line
# A split size that no request reaches, with room for sums in int32.
UNBOUNDED = tl.constexpr(1 << 30)


# Values that differ between batches are not specialised on: a variant would compile for seconds,
# while serving.
@triton.jit(do_not_specialize=["req_pool_indices", "kv_lens", "num_requests", "wanted_items"])
def _schedule(
    req_to_token,
    req_pool_indices,
    kv_lens,
    slots,
    runs,
    num_visual,
    num_runs,
    attended_visual,
    num_tiles,
    num_splits,
    partial_start,
    items,
    num_items,
    num_requests,
    wanted_items,
    min_split,
    width,
    stride_req,
    stride_runs,
    TEXT_COST: tl.constexpr,
    VISUAL_COST: tl.constexpr,
    ALIGN: tl.constexpr,
    UNEVEN: tl.constexpr,
    APPEND: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One program: cut every request into equal splits of about the same cost everywhere, and
    describe each item.

    Inner bounds of splits are multiples of ALIGN slots of their kind: whole blocks for the
    attention kernel. With APPEND the last token of each request is new, and text: its slot goes
    into ``slots``.
    """
    request = tl.arange(0, BLOCK)
    is_real = request < num_requests
    req_pool_index = tl.load(req_pool_indices + request, mask=is_real, other=0)
    kv_len = tl.load(kv_lens + request, mask=is_real, other=0).to(tl.int32)
    tiles = tl.load(num_tiles + request, mask=is_real, other=0)
    visual_start = width - tl.load(num_visual + req_pool_index, mask=is_real, other=0)
    visual = tl.minimum(tl.load(attended_visual + req_pool_index, mask=is_real, other=0), kv_len)
    text = kv_len - visual
    if APPEND:
        # The place follows from the lengths, no counter: a step that is planned twice, and padding,
        # do no harm.
        of_request = req_pool_index.to(tl.int64)
        is_new = is_real & (text > 0)
        slot = tl.load(req_to_token + of_request * stride_req + kv_len - 1, mask=is_new, other=0)
        tl.store(slots + of_request * width + text - 1, slot, mask=is_new)
    cost = text * TEXT_COST + visual * VISUAL_COST
    total = tl.sum(tiles.to(tl.int64) * cost)
    if tl.max(cost) * tl.sum(tiles).to(tl.int64) > total + total // 2:
        wanted_items *= UNEVEN
    size = tl.minimum(tl.maximum(tl.cdiv(total, wanted_items), min_split), UNBOUNDED).to(tl.int32)
    # A request a quarter larger than a split stays whole: two halves would cost more than they
    # balance. One without slots has an item too, which writes zeros.
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
    for i in range(tl.max(count)):
        is_item = i < count
        split = i % splits
        low, high = split * own_size, (split + 1) * own_size
        text_low = tl.minimum(tl.cdiv(low, TEXT_COST * ALIGN) * ALIGN, text)
        text_high = tl.minimum(tl.cdiv(high, TEXT_COST * ALIGN) * ALIGN, text)
        low, high = tl.maximum(low - text * TEXT_COST, 0), tl.maximum(high - text * TEXT_COST, 0)
        visual_low = tl.minimum(tl.cdiv(low, VISUAL_COST * ALIGN) * ALIGN, visual)
        visual_high = tl.minimum(tl.cdiv(high, VISUAL_COST * ALIGN) * ALIGN, visual)
        item = items + (start + i) * ITEM
        tl.store(item, request, mask=is_item)
        tl.store(item + 1, i // splits, mask=is_item)
        tl.store(item + 2, text_low, mask=is_item)
        tl.store(item + 3, text_high, mask=is_item)
        tl.store(item + 4, visual_low, mask=is_item)
        tl.store(item + 5, visual_high, mask=is_item)
        tl.store(item + 6, tl.where(splits > 1, first_partial + i, -1), mask=is_item)
        tl.store(item + 10, req_pool_index.to(tl.int32), mask=is_item)
        tl.store(item + 11, visual_start, mask=is_item)
        tl.store(item + 13, text, mask=is_item)

    # The runs of each item, which every layer's attention would else look for. Other threads stored
    # what is read here.
    tl.debug_barrier()
    for first in range(0, all_items, BLOCK):
        is_item = first + tl.arange(0, BLOCK) < all_items
        item = items + (first + tl.arange(0, BLOCK)) * ITEM
        begin = tl.load(item + 4, mask=is_item, other=0)
        end = tl.load(item + 5, mask=is_item, other=0)
        of_request = tl.load(item + 10, mask=is_item, other=0).to(tl.int64)
        ends = runs + of_request * stride_runs
        in_table = tl.load(num_runs + of_request, mask=begin < end, other=0)
        # By bisection, the first run that ends behind ``begin``, and the first that ends at ``end``
        # or behind.
        first_run, first_high = tl.zeros_like(in_table), in_table
        last_run, last_high = tl.zeros_like(in_table), in_table
        while tl.max(tl.maximum(first_high - first_run, last_high - last_run)) > 0:
            middle = (first_run + first_high) // 2
            is_open = first_run < first_high
            is_before = tl.load(ends + 2 * middle, mask=is_open, other=UNBOUNDED) <= begin
            first_run = tl.where(is_before, middle + 1, first_run)
            first_high = tl.where(is_before, first_high, middle)
            middle = (last_run + last_high) // 2
            is_open = last_run < last_high
            is_before = tl.load(ends + 2 * middle, mask=is_open, other=UNBOUNDED) < end
            last_run = tl.where(is_before, middle + 1, last_run)
            last_high = tl.where(is_before, last_high, middle)
        exists = first_run < in_table
        own_runs = tl.maximum(tl.minimum(last_run, in_table - 1) - first_run + 1, 0)
        tl.store(item + 7, own_runs, mask=is_item)
        run_end = tl.load(ends + 2 * first_run, mask=exists, other=0)
        tl.store(item + 8, tl.minimum(run_end, end), mask=is_item)
        tl.store(item + 9, tl.load(ends + 2 * first_run + 1, mask=exists, other=0), mask=is_item)
        tl.store(item + 12, first_run, mask=is_item)


class Partials(NamedTuple):
    """One layer's results of items that are not all of their tile: out [n, Dv] and lse [n] fp32,
    where n is partials * KV heads * tile rows. Layers and steps follow each other on the stream, so
    plans of one backend share them."""

    out: torch.Tensor
    lse: torch.Tensor

    @classmethod
    def allocate(cls, num_rows: int, v_head_dim: int, device: torch.device | str) -> Partials:
        out = torch.empty(num_rows, v_head_dim, dtype=torch.float32, device=device)
        return cls(out, torch.empty(num_rows, dtype=torch.float32, device=device))

    @staticmethod
    def bytes(num_rows: int, v_head_dim: int) -> int:
        return num_rows * (v_head_dim + 1) * 4


def max_items(num_tiles: int, wanted_items: int) -> int:
    """Bound of the items that ``num_tiles`` tiles can make: the splits of one tile overshoot by
    less than one."""
    return num_tiles + UNEVEN * wanted_items


def max_partials(wanted_items: int) -> int:
    """Bound of the items that belong to requests of two splits and more."""
    return 2 * UNEVEN * wanted_items


def plan_bytes(max_requests: int, max_tiles: int, wanted_items: int) -> int:
    """What ``Plan`` allocates beside the partials."""
    return 4 * (3 * max_requests + ITEM.value * max_items(max_tiles, wanted_items) + 1)


def _row_bytes(*parts: torch.Tensor | None) -> int:
    """Of one head of a row."""
    return sum(x.shape[-1] * x.element_size() for x in parts if x is not None)


class Plan:
    """Device buffers of a plan, for up to ``max_requests`` requests of ``partition``.

    text_cost, visual_cost: what reading one slot costs, in units of COST_UNIT bytes a head.
    items [*, ITEM] int32, by column:
        0, 1    request, tile
        2, 3    first and end index of its text slots
        4, 5    first and end index of its visual rows
        6       its row among the partial results, or -1 when it is all of its tile
        7       its number of runs
        8, 9    end index, at most that of its rows, and basis of the first run
        10      req_pool_index of the request
        11      where the request's visual rows start in the partition's slots
        12      its first run in the partition's table
        13      text slots of the request
    wanted_items: about this many items fill the GPU, per KV head; None never cuts a request.
    tile_rows: query rows of a tile. num_tiles: tiles of each request, else one.
    attends_prefix: over no more than the prefix that the partition's last rebuild was told of.
    turned: for the turned queries of as many tokens as the plan is for, where CUDA graphs replay
    it; else the first call of the attention allocates them.
    partials: at least ``max_partials`` * KV heads * tile_rows; else the plan has its own.
    """

    def __init__(
        self,
        partition: Partition,
        max_requests: int,
        pools: LayerPools,
        *,
        tile_rows: int,
        wanted_items: int | None,
        num_tiles: list[int] | None = None,
        attends_prefix: bool = False,
        partials: Partials | None = None,
        turned: TurnedQueries | None = None,
    ) -> None:
        num_kv_heads = pools.k_text.shape[1]
        v_head_dim = pools.v_text.shape[-1]
        device = partition.slots.device
        self.partition = partition
        self.attended_visual = partition.prefix_visual if attends_prefix else partition.num_visual
        self.max_requests = max_requests
        self.num_kv_heads = num_kv_heads
        self.is_coded, self.text_itemsize = pools.is_coded, pools.k_text.itemsize
        self.tile_rows = tile_rows
        self.text_cost = _row_bytes(pools.k_text, pools.v_text) // COST_UNIT
        self.visual_cost = _row_bytes(*pools.visual) // COST_UNIT
        self.splits = wanted_items is not None
        self.wanted_items = wanted_items or 0
        self.min_split = MIN_SPLIT_TOKENS * self.text_cost if self.splits else UNBOUNDED.value
        num_tiles = num_tiles or [1] * max_requests
        self.max_tiles = sum(num_tiles) or max_requests

        def ints(*size: int) -> torch.Tensor:
            return torch.zeros(size, dtype=torch.int32, device=device)

        self.num_splits, self.partial_start = ints(max_requests), ints(max_requests)
        self.num_tiles = upload(np.array(num_tiles, dtype=np.int32), device)
        self.items = ints(max_items(self.max_tiles, self.wanted_items), ITEM.value)
        self.num_items = ints(1)
        partial_rows = self.max_partials * num_kv_heads * tile_rows
        if partials is None:
            partials = Partials.allocate(partial_rows, v_head_dim, device)
        elif len(partials.lse) < partial_rows:
            raise ValueError(
                f"a plan needs {partial_rows} rows of partial results, got {len(partials.lse)}"
            )
        self.partials, self.turned = partials, turned
        self.no_lse = torch.empty(0, 0, dtype=torch.float32, device=device)

    def max_items(self, num_tiles: int) -> int:
        return max_items(num_tiles, self.wanted_items)

    @property
    def max_partials(self) -> int:
        return max_partials(self.wanted_items)

    def update(
        self,
        req_pool_indices: torch.Tensor,
        kv_lens: torch.Tensor,
        *,
        align: int,
        wanted_share: float = 1.0,
        req_to_token: torch.Tensor | None = None,
    ) -> None:
        """Plan for the first ``kv_lens`` tokens of requests in the partition. No host sync.

        req_pool_indices and kv_lens [bs] int. ``req_to_token`` [*, width] int32: before that,
        append the slot ``req_to_token[req_pool_indices[i], kv_lens[i] - 1]`` of a text token to
        each request.
        ``align``: slots that the attention kernel takes at a time; ``wanted_share`` of wanted_items
        is aimed at.
        """
        num_requests, partition = len(req_pool_indices), self.partition
        if not num_requests:
            self.num_items.zero_()
            return
        if num_requests > self.max_requests:
            raise ValueError(
                f"the plan is for at most {self.max_requests} requests, got {num_requests}"
            )
        # Where nothing is appended, any table: it is never read.
        table = partition.slots if req_to_token is None else req_to_token
        _schedule[(1,)](
            table,
            req_pool_indices,
            kv_lens,
            partition.slots,
            partition.runs,
            partition.num_visual,
            partition.num_runs,
            self.attended_visual,
            self.num_tiles,
            self.num_splits,
            self.partial_start,
            self.items,
            self.num_items,
            num_requests,
            max(1, int(self.wanted_items * wanted_share)),
            max(self.min_split, align * self.text_cost),
            partition.width,
            table.stride(0),
            partition.runs.stride(0),
            TEXT_COST=self.text_cost,
            VISUAL_COST=self.visual_cost,
            ALIGN=align,
            UNEVEN=UNEVEN,
            APPEND=req_to_token is not None,
            BLOCK=max(256, triton.next_power_of_2(num_requests)),
            num_warps=4,
        )
