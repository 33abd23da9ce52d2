"""Attention of query tiles over a plan's slots in both pools, for decode.py and extend.py."""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch
import triton

from .attend_kernel import _attend
from .coded import PARTS
from .device import has_large_shared_memory, has_overlap, has_ptx
from .forms import PLAIN, Form, form_of
from .launch import Launch
from .merge import _merge
from .plan import Plan
from .pools import LayerPools
from .turn import TurnedQueries, turn

# Triton 3.6 miscompiles Hopper's tile products (64 rows and more) over narrower rows than this.
# Whether 3.8 still does nobody measured, so every version gets the pad.
MIN_TILE_PRODUCT_CHANNELS = 64
MERGE_REQUESTS = 1024  # that the merge looks at together for the one a token belongs to


class Config(NamedTuple):
    """``block``: slots of one step. ``num_stages``, ``visual_stages``: of the loops over text and
    over rotated rows. ``ahead``: load slot rows and the first basis early, which takes registers.
    ``swapped``: tokens on the left of products (blocks.py). ``merge_splits``: that the merge takes
    at a time."""

    block: int
    num_warps: int
    num_stages: int
    visual_stages: int
    ahead: bool = True
    swapped: bool = False
    merge_splits: int = 16


def attend(
    q: torch.Tensor,
    q_indptr: torch.Tensor,
    num_requests: int,
    pools: LayerPools,
    plan: Plan,
    out: torch.Tensor,
    own_lse: torch.Tensor | None,
    sm_scale: float,
    logit_cap: float,
    *,
    one_token: bool,
    causal: bool = False,
    num_tiles: int,
    config: Config,
) -> None:
    """Attend from q [n, Hq, D] over the slots of ``plan`` into ``out`` [n, Hq, Dv].

    ``own_lse`` [n, Hq] fp32, natural: then ``out`` holds attention over other keys with that
    log-sum-exp, and the result is attention over both. ``q_indptr`` [num_requests + 1] int32 splits
    the n tokens; ``one_token``: each request has one. ``causal``: they are also the last text slots
    of their requests in the plan, and see no later one.
    """
    num_kv_heads, head_dim = pools.k_text.shape[1:]
    lse = plan.no_lse if own_lse is None else own_lse
    partition, form = plan.partition, form_of(pools)
    if pools.residual is None:
        turned = TurnedQueries(q, plan.no_lse)  # never read
    else:
        num_rows = q.shape[0] * q.shape[1]
        if plan.turned is None or len(plan.turned.sums) < num_rows:
            plan.turned = TurnedQueries.allocate(num_rows, head_dim, q.dtype, q.device)
        turned = plan.turned
        turn(q, turned, has_overlap(q.device))
    k_text, v_text, z, v_visual, query_map, mean, _, residual, steps = pools.strides
    strides = (
        q.stride(0), out.stride(0), k_text, v_text, z // form.z_unit, v_visual // form.v_unit,
        query_map, mean, residual // form.unit, steps // form.unit,
    )  # fmt: skip
    launch_attend, launch_merge = _launches(
        num_kv_heads, q.shape[1] // num_kv_heads, head_dim, pools.z.shape[-1],
        pools.v_text.shape[-1], plan.tile_rows, config, logit_cap > 0, own_lse is not None,
        one_token, causal, (q.dtype, pools.z.dtype, pools.k_text.dtype), strides, q.device, form,
    )  # fmt: skip
    # Where there are no codes, any tensor: it is never read.
    codes = (pools.z if x is None else x for x in (pools.residual, pools.steps))
    launch_attend(
        (plan.max_items(num_tiles) * num_kv_heads, 1, 1),
        q, out, lse, q_indptr, *plan.partials, *pools[:6], *codes, *turned,
        partition.slots, partition.runs, plan.items, plan.num_items, sm_scale,
        sm_scale * pools.k_scale, float(pools.v_scale), logit_cap, *lse.stride(),
        partition.slots.stride(0), partition.runs.stride(0), *strides,
    )  # fmt: skip
    if plan.splits:
        launch_merge(
            (q.shape[0], q.shape[1], 1),
            out, lse, q_indptr, *plan.partials, plan.num_splits, plan.partial_start, num_requests,
            out.stride(0), *lse.stride(),
        )  # fmt: skip


@functools.cache
def _launches(
    num_kv_heads: int,
    group: int,
    head_dim: int,
    rank: int,
    v_head_dim: int,
    tile_rows: int,
    config: Config,
    is_capped: bool,
    has_own: bool,
    one_token: bool,
    causal: bool,
    dtypes: tuple[torch.dtype, ...],
    strides: tuple[int, ...],
    device: torch.device,
    form: Form = PLAIN,
) -> tuple[Launch, Launch]:
    """``_attend`` and ``_merge`` for one kind of call; what is not used here tells compiled
    variants apart."""
    power = triton.next_power_of_2
    residual = head_dim // PARTS if form.key_bits < 16 else 1
    parts = PARTS if form.value_bits < 8 else 1
    padded_rank, padded_residual = power(rank), max(16, power(residual))
    padded_values = power(v_head_dim // parts)
    if tile_rows >= 64:
        padded_rank, padded_residual, padded_values = (
            max(x, MIN_TILE_PRODUCT_CHANNELS) for x in (padded_rank, padded_residual, padded_values)
        )
    if form != PLAIN:
        padded_rank = max(padded_rank, 16)
    if not has_large_shared_memory(device):
        config = config._replace(num_stages=2, visual_stages=2)
    overlap = has_overlap(device)
    options = {"launch_pdl": True} if overlap else {}
    attend_constants = dict(
        H=num_kv_heads, G=group, D=head_dim, DP=power(head_dim), R=rank, RP=padded_rank, W=residual,
        WP=padded_residual, V=v_head_dim // parts, VP=padded_values, PARTS=parts,
        KEY_BITS=form.key_bits, VALUE_BITS=form.value_bits, HEAD_STEPS=form.head_steps,
        ASM=has_ptx(device), Z_UNIT=form.z_unit, V_UNIT=form.v_unit, UNIT=form.unit, TILE=tile_rows,
        BLOCK=config.block, CAPPED=is_capped, HAS_OWN=has_own, CAUSAL=causal, ONE_TOKEN=one_token,
        SWAPPED=config.swapped, OVERLAP=overlap, AHEAD=config.ahead, STAGES=config.num_stages,
        VISUAL_STAGES=config.visual_stages,
    )  # fmt: skip
    merge_constants = dict(
        H=num_kv_heads, G=group, V=v_head_dim, VP=power(v_head_dim), TILE=tile_rows,
        ONE_TOKEN=one_token, REQUESTS=MERGE_REQUESTS, SPLITS=config.merge_splits, HAS_OWN=has_own,
        OVERLAP=overlap,
    )  # fmt: skip
    attend = Launch(
        _attend, 3, attend_constants, num_warps=config.num_warps, num_stages=config.num_stages,
        **options,
    )  # fmt: skip
    merge_warps = 4 if config.merge_splits > 16 else 2
    return attend, Launch(_merge, 2, merge_constants, num_warps=merge_warps, **options)
