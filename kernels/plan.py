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

from .partition import Partition
from .plan_kernel import ITEM, UNBOUNDED, _schedule
from .pools import LayerPools
from .turn import TurnedQueries
from .upload import upload

COST_UNIT = 4  # bytes; rows are multiples of it
MIN_SPLIT_TOKENS = 64  # text tokens; shorter splits cost more in merging than they gain
# So many times as many items for a batch of unlike requests: short items fill the gaps that long
# ones leave.
UNEVEN = 2


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
