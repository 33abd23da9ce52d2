"""Decode attention over both pools: one new token a request (reference.decode)."""

from __future__ import annotations

import torch

from .attend import Config, attend
from .partition import Partition
from .plan import Partials, Plan
from .pools import LayerPools
from .turn import TurnedQueries

MAX_ITEMS_PER_SM = 8  # programs that fill one multiprocessor, all KV heads together


def config(
    num_requests: int, num_kv_heads: int, is_coded: bool, text_itemsize: int = 2
) -> tuple[Config, int]:
    """And the items per multiprocessor. Measured on an H100: the more programs there are, the
    smaller each should be, and codes keep the few registers of small ones busy."""
    programs = num_requests * num_kv_heads
    if programs < 32:
        num_warps = 4 if programs < 8 else 2
        return Config(
            64, num_warps, num_stages=2, visual_stages=3, swapped=True, merge_splits=64
        ), 4
    if is_coded:
        if programs < 64:
            stages, items = (3, 3), 4
        elif programs < 512:
            stages, items = (2, 2), 6 if programs < 128 else 8
        elif programs >= 1024:
            stages, items = (2, 2), 4
        else:
            stages, items = ((2, 2), 8) if text_itemsize == 1 else ((2, 3), 4)
        return Config(32, 1, *stages, swapped=True), items
    if programs < 1024:
        return Config(block=64, num_warps=2, num_stages=2, visual_stages=3, swapped=True), 2
    return Config(
        block=64, num_warps=2, num_stages=2, visual_stages=2, ahead=False, swapped=True
    ), 4


def wanted_items(num_kv_heads: int, num_sms: int) -> int:
    return max(1, num_sms * MAX_ITEMS_PER_SM // num_kv_heads)


def tile_rows(num_heads: int, num_kv_heads: int) -> int:
    """The query heads of a KV head, padded to what products take as columns."""
    return max(8, 1 << (num_heads // num_kv_heads - 1).bit_length())


def make_plan(
    partition: Partition,
    max_requests: int,
    num_heads: int,
    pools: LayerPools,
    num_sms: int = 132,
    partials: Partials | None = None,
) -> Plan:
    """A plan for decode batches of at most ``max_requests`` requests of ``partition``."""
    num_kv_heads, head_dim = pools.k_text.shape[1:]
    turned = None
    if pools.residual is not None:
        rows, dtype = max_requests * num_heads, pools.query_map.dtype
        turned = TurnedQueries.allocate(rows, head_dim, dtype, pools.z.device)
    return Plan(
        partition,
        max_requests,
        pools,
        tile_rows=tile_rows(num_heads, num_kv_heads),
        wanted_items=wanted_items(num_kv_heads, num_sms),
        partials=partials,
        turned=turned,
    )


def update_plan(
    plan: Plan,
    req_pool_indices: torch.Tensor,
    seq_lens: torch.Tensor,
    req_to_token: torch.Tensor | None = None,
) -> None:
    """Plan a step over the first ``seq_lens`` tokens of each request. No host sync.

    ``req_to_token``: append the last of them to the partition before that, which does not know the
    new one yet.
    """
    chosen, items_per_sm = config(
        len(req_pool_indices), plan.num_kv_heads, plan.is_coded, plan.text_itemsize
    )
    plan.update(
        req_pool_indices, seq_lens, align=chosen.block,
        wanted_share=items_per_sm / MAX_ITEMS_PER_SM,
        req_to_token=req_to_token,
    )  # fmt: skip


def decode(
    q: torch.Tensor,
    pools: LayerPools,
    plan: Plan,
    q_indptr: torch.Tensor,
    sm_scale: float,
    logit_cap: float = 0.0,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """Attention of q [bs, Hq, D] over the slots of ``plan`` -> [bs, Hq, Dv] in q's dtype; zeros for
    no slots.

    ``q_indptr`` [bs + 1] int32 is 0, 1, 2, ...; kept by the caller, since nothing may be made in a
    CUDA graph.
    """
    if out is None:
        out = q.new_empty(*q.shape[:2], pools.v_text.shape[-1])
    attend(
        q, q_indptr, len(q), pools, plan, out, None, sm_scale, logit_cap,
        one_token=True, num_tiles=len(q),
        config=config(len(q), pools.k_text.shape[1], pools.is_coded, pools.k_text.itemsize)[0],
    )  # fmt: skip
    return out
