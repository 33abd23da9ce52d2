"""Attention of new tokens over the prefix in both pools, merged with attention over their own chunk
(reference.extend)."""

from __future__ import annotations

from typing import NamedTuple

import torch

from .attend import Config, attend
from .partition import Partition
from .plan import Partials, Plan
from .pools import LayerPools


class Tiling(NamedTuple):
    """Query rows of a tile, programs that fill one multiprocessor, and what each is launched
    with."""

    rows: int
    items_per_sm: int
    config: Config


# Measured on an H200, and on an H100 for coded rows, whose codes products of 64 rows and more would
# take through shared memory.
TILING = Tiling(64, 2, Config(block=64, num_warps=4, num_stages=3, visual_stages=3))
CODED_TILING = Tiling(
    16, 4, Config(block=64, num_warps=2, num_stages=3, visual_stages=3, ahead=False)
)


def tiling(is_coded: bool) -> Tiling:
    return CODED_TILING if is_coded else TILING


def many_tokens(num_heads: int, pools: LayerPools, num_sms: int = 132) -> int:
    """From how many new tokens on a batch fills the GPU without splits."""
    num_kv_heads = pools.k_text.shape[1]
    items = wanted_items(num_kv_heads, pools.is_coded, num_sms)
    return -(-items * tiling(pools.is_coded).rows // (num_heads // num_kv_heads))


def wanted_items(num_kv_heads: int, is_coded: bool, num_sms: int) -> int:
    return max(1, num_sms * tiling(is_coded).items_per_sm // num_kv_heads)


def make_plan(
    partition: Partition,
    extend_lens: list[int],
    num_heads: int,
    pools: LayerPools,
    num_sms: int = 132,
    partials: Partials | None = None,
) -> Plan:
    """A plan for one extend batch of ``extend_lens`` new tokens a request, over the prefix that
    ``partition``'s rebuild is told of.

    Few queries are cut into splits, so that they fill the GPU.
    """
    num_kv_heads = pools.k_text.shape[1]
    group, rows = num_heads // num_kv_heads, tiling(pools.is_coded).rows
    is_few = sum(extend_lens) < many_tokens(num_heads, pools, num_sms)
    return Plan(
        partition,
        len(extend_lens),
        pools,
        tile_rows=rows,
        wanted_items=wanted_items(num_kv_heads, pools.is_coded, num_sms) if is_few else None,
        num_tiles=[-(-n * group // rows) for n in extend_lens],
        attends_prefix=True,
        partials=partials,
    )


def update_plan(plan: Plan, req_pool_indices: torch.Tensor, prefix_lens: torch.Tensor) -> None:
    """Plan over the ``prefix_lens`` of the rebuild, which for ``extend_stored`` count the new
    tokens. No host sync."""
    plan.update(req_pool_indices, prefix_lens, align=tiling(plan.is_coded).config.block)


def extend(
    q: torch.Tensor,
    own_out: torch.Tensor,
    own_lse: torch.Tensor,
    pools: LayerPools,
    plan: Plan,
    q_indptr: torch.Tensor,
    sm_scale: float,
    logit_cap: float = 0.0,
) -> torch.Tensor:
    """Merge attention over the prefixes of ``plan`` into ``own_out``, and return it.

    q [n, Hq, D]; own_out [n, Hq, Dv]: causal attention over the chunk itself, with its natural
    log-sum-exp own_lse [n, Hq] fp32; q_indptr [bs + 1] int32 splits the n tokens.
    """
    attend(
        q, q_indptr, len(q_indptr) - 1, pools, plan, own_out, own_lse, sm_scale, logit_cap,
        one_token=False, num_tiles=plan.max_tiles, config=tiling(plan.is_coded).config,
    )  # fmt: skip
    return own_out


def extend_stored(
    q: torch.Tensor,
    pools: LayerPools,
    plan: Plan,
    q_indptr: torch.Tensor,
    sm_scale: float,
    logit_cap: float = 0.0,
) -> torch.Tensor:
    """``extend`` for text alone, whose Keys and Values are stored already and are in the plan,
    after the prefix.

    One kernel less, for the few tokens of a next turn. q [n, Hq, D] -> [n, Hq, Dv].
    """
    out = q.new_empty(*q.shape[:2], pools.v_text.shape[-1])
    attend(
        q, q_indptr, len(q_indptr) - 1, pools, plan, out, None, sm_scale, logit_cap,
        one_token=False, causal=True, num_tiles=plan.max_tiles, config=tiling(plan.is_coded).config,
    )  # fmt: skip
    return out
