"""Attention of query tiles over a plan's slots in both pools; decode.py and extend.py launch it.

The formulas are those of reference.py. Scores and softmax are fp32 in base 2; products take the pool's dtype.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from .launch import Launch
from .plan import ITEM, Plan
from .reference import LayerPools

# Triton 3.6 miscompiles Hopper's tile products (64 rows and more) over narrower rows than this. Whether 3.8 still does
# nobody measured, so every version gets the pad.
MIN_TILE_PRODUCT_CHANNELS = 64
MERGE_REQUESTS = 1024  # that the merge looks at together for the one a token belongs to
LOWEST = tl.constexpr(-1e38)
# On the right of tensors: on the left, Triton 3.8's interpreter takes the product for a constant.
LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit
def _dot(a, b):
    # fp32 pools are for tests and must be exact; half precision takes the tensor cores.
    if a.dtype == tl.float32:
        return tl.dot(a, b, input_precision="ieee")
    else:
        return tl.dot(a, b)


@triton.jit
def _block(
    acc, top, total, q, bias, keys, values, row, at, end, row_end, key_stride, value_stride, scale, cap,
    K: tl.constexpr, KP: tl.constexpr, V: tl.constexpr, VP: tl.constexpr,
    BLOCK: tl.constexpr, MASKED: tl.constexpr, CAUSAL: tl.constexpr, CAPPED: tl.constexpr,
):  # fmt: skip
    """One step of the online softmax: BLOCK slots from ``at`` on, in pool ``row`` [BLOCK]; with CAUSAL a query row sees
    those below its ``row_end``."""
    index = at + tl.arange(0, BLOCK)
    channel, v_channel = tl.arange(0, KP), tl.arange(0, VP)
    inside = index < end
    row = row.to(tl.int64)
    key_at = keys + row[:, None] * key_stride + channel[None, :]
    value_at = values + row[:, None] * value_stride + v_channel[None, :]
    # A padding slot may hold NaN, and 0 * NaN poisons: masked loads read 0 instead.
    if MASKED:
        key = tl.load(key_at, mask=inside[:, None] & (channel < K)[None, :], other=0.0)
    elif K != KP:
        key = tl.load(key_at, mask=(channel < K)[None, :], other=0.0)
    else:
        key = tl.load(key_at)
    score = (_dot(q, tl.trans(key)) + bias[:, None]) * scale
    if CAPPED:
        # tanh by exp2: 1 - 2 / (1 + e^2x)
        score = cap * (1 - 2 / (1 + tl.exp2(score * (2 * LOG2_E) / cap)))
    score *= LOG2_E
    if CAUSAL:
        score = tl.where(inside[None, :] & (index[None, :] < row_end[:, None]), score, float("-inf"))
    elif MASKED:
        score = tl.where(inside[None, :], score, float("-inf"))
    new_top = tl.maximum(top, tl.max(score, 1))
    reference = new_top
    if CAUSAL:  # a row may see nothing yet
        reference = tl.maximum(new_top, LOWEST)
    weight = tl.exp2(score - reference[:, None])
    shrink = tl.exp2(top - reference)
    if MASKED:
        value = tl.load(value_at, mask=inside[:, None] & (v_channel < V)[None, :], other=0.0)
    elif V != VP:
        value = tl.load(value_at, mask=(v_channel < V)[None, :], other=0.0)
    else:
        value = tl.load(value_at)
    acc = acc * shrink[:, None] + _dot(weight.to(value.dtype), value)
    return acc, new_top, total * shrink + tl.sum(weight, 1)


@triton.jit
def _run(
    acc, top, total, q, bias, keys, values, rows, begin, end, key_stride, value_stride, scale, cap,
    K: tl.constexpr, KP: tl.constexpr, V: tl.constexpr, VP: tl.constexpr, BLOCK: tl.constexpr, CAPPED: tl.constexpr,
    AHEAD: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """All slots [begin, end) of one kind and, if visual, one basis. Whole blocks need no masks.

    With AHEAD their rows are loaded a step ahead, so that Keys and Values need not wait for them."""
    whole = begin + (end - begin) // BLOCK * BLOCK
    each = tl.arange(0, BLOCK)
    if AHEAD:
        row = tl.load(rows + begin + each, mask=begin + each < end, other=0)
    for at in tl.range(begin, whole, BLOCK, num_stages=STAGES):
        if AHEAD:
            next_row = tl.load(rows + at + BLOCK + each, mask=at + BLOCK + each < end, other=0)
        else:
            row = tl.load(rows + at + each)
        acc, top, total = _block(
            acc, top, total, q, bias, keys, values, row, at, end, top, key_stride, value_stride, scale, cap,
            K, KP, V, VP, BLOCK, False, False, CAPPED,
        )  # fmt: skip
        if AHEAD:
            row = next_row
    if whole < end:
        if not AHEAD:
            row = tl.load(rows + whole + each, mask=whole + each < end, other=0)
        acc, top, total = _block(
            acc, top, total, q, bias, keys, values, row, whole, end, top, key_stride, value_stride, scale, cap,
            K, KP, V, VP, BLOCK, True, False, CAPPED,
        )  # fmt: skip
    return acc, top, total


@triton.jit
def _rotate(
    query, basis, exists, head, query_map, mean, stride_map, stride_mean,
    D: tl.constexpr, DP: tl.constexpr, R: tl.constexpr, RP: tl.constexpr,
):  # fmt: skip
    """Queries rotated to a basis, and their scores of its mean."""
    basis = basis.to(tl.int64)
    channel, narrow = tl.arange(0, DP), tl.arange(0, RP)
    rotation = tl.load(
        query_map + basis * stride_map + head * D * R + channel[:, None] * R + narrow[None, :],
        mask=exists & (channel < D)[:, None] & (narrow < R)[None, :],
        other=0.0,
    )
    centre = tl.load(mean + basis * stride_mean + head * D + channel, mask=exists & (channel < D), other=0.0)
    return _dot(query, rotation).to(query.dtype), tl.sum(query.to(tl.float32) * centre[None, :], 1)


@triton.jit(do_not_specialize=["stride_lse", "stride_lse_head", "stride_slots", "stride_runs"])
def _attend(
    q, out, own_lse, q_indptr, partial_out, partial_lse,
    k_text, v_text, z, v_visual, query_map, mean,
    slots, runs, items, num_items,
    scale, cap, stride_lse, stride_lse_head, stride_slots, stride_runs, stride_q, stride_out,
    stride_k, stride_vt, stride_z, stride_vv, stride_map, stride_mean,
    H: tl.constexpr, G: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, R: tl.constexpr, RP: tl.constexpr,
    V: tl.constexpr, VP: tl.constexpr, TILE: tl.constexpr, BLOCK: tl.constexpr,
    CAPPED: tl.constexpr, HAS_OWN: tl.constexpr, CAUSAL: tl.constexpr, ONE_TOKEN: tl.constexpr,
    OVERLAP: tl.constexpr, AHEAD: tl.constexpr, STAGES: tl.constexpr, VISUAL_STAGES: tl.constexpr,
):  # fmt: skip
    """One program an item and KV head; neighbours read the heads of the same slots. With CAUSAL the request's new tokens
    are the last of its text slots."""
    if OVERLAP:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    head = tl.program_id(0) % H
    item = tl.program_id(0) // H
    # The whole item at once: a chain of dependent loads would be most of a short program's time.
    items += item * ITEM
    request, tile = tl.load(items), tl.load(items + 1)
    text_begin, text_end = tl.load(items + 2), tl.load(items + 3)
    begin, end = tl.load(items + 4), tl.load(items + 5)
    partial, num_runs = tl.load(items + 6), tl.load(items + 7)
    run_end, basis = tl.load(items + 8), tl.load(items + 9)
    req_pool_index = tl.load(items + 10).to(tl.int64)
    visual_start, first_run = tl.load(items + 11), tl.load(items + 12)
    if CAUSAL:
        num_text = tl.load(items + 13)
    if item >= tl.load(num_items):
        return
    if ONE_TOKEN:
        first_token = request
        new_tokens = 1
    else:
        first_token = tl.load(q_indptr + request)
        new_tokens = tl.load(q_indptr + request + 1) - first_token
    num_rows = new_tokens * G
    text_rows = slots + req_pool_index * stride_slots
    visual_rows = text_rows + visual_start
    runs += req_pool_index * stride_runs + 2 * first_run

    tile_row = tile * TILE + tl.arange(0, TILE)
    is_row = tile_row < num_rows
    token = (first_token + tile_row // G).to(tl.int64)
    q_head = head * G + tile_row % G
    channel, v_channel = tl.arange(0, DP), tl.arange(0, VP)
    is_value = is_row[:, None] & (v_channel < V)[None, :]
    query = tl.load(
        q + token[:, None] * stride_q + (q_head * D)[:, None] + channel[None, :],
        mask=is_row[:, None] & (channel < D)[None, :],
        other=0.0,
    )
    if AHEAD:  # before the text, so that its loads wait together with the others
        rotated, bias = _rotate(query, basis, num_runs > 0, head, query_map, mean, stride_map, stride_mean, D, DP, R, RP)
    acc = tl.zeros([TILE, VP], dtype=tl.float32)
    top = tl.full([TILE], float("-inf"), dtype=tl.float32)
    total = tl.zeros([TILE], dtype=tl.float32)
    no_bias = tl.zeros([TILE], dtype=tl.float32)

    cached_end = text_end
    if CAUSAL:
        first_new = num_text - new_tokens
        cached_end = tl.minimum(text_end, tl.maximum(first_new, text_begin))
    acc, top, total = _run(
        acc, top, total, query, no_bias, k_text + head * D, v_text + head * V, text_rows,
        text_begin, cached_end, stride_k, stride_vt, scale, cap, D, DP, V, VP, BLOCK, CAPPED, AHEAD,
        STAGES,
    )  # fmt: skip
    if CAUSAL:
        row_end = first_new + tile_row // G + 1
        for at in range(cached_end, text_end, BLOCK):
            each = at + tl.arange(0, BLOCK)
            row = tl.load(text_rows + each, mask=each < text_end, other=0)
            acc, top, total = _block(
                acc, top, total, query, no_bias, k_text + head * D, v_text + head * V, row, at, text_end, row_end,
                stride_k, stride_vt, scale, cap, D, DP, V, VP, BLOCK, True, True, CAPPED,
            )  # fmt: skip

    for run in range(num_runs):
        if not AHEAD:
            rotated, bias = _rotate(query, basis, True, head, query_map, mean, stride_map, stride_mean, D, DP, R, RP)
        acc, top, total = _run(
            acc, top, total, rotated, bias, z + head * R, v_visual + head * V, visual_rows, begin,
            run_end, stride_z, stride_vv, scale, cap, R, RP, V, VP, BLOCK, CAPPED, AHEAD,
            VISUAL_STAGES,
        )  # fmt: skip
        begin = run_end
        if run + 1 < num_runs:
            run_end = tl.minimum(tl.load(runs + 2 * run + 2), end)
            basis = tl.load(runs + 2 * run + 3)
            if AHEAD:
                rotated, bias = _rotate(query, basis, True, head, query_map, mean, stride_map, stride_mean, D, DP, R, RP)

    # Alignment or causality can leave a row of a split without slots: it weighs nothing.
    lse = tl.where(total > 0, top + tl.log2(total), float("-inf"))
    acc = acc / tl.where(total > 0, total, 1.0)[:, None]
    if partial < 0:
        out_at = out + token[:, None] * stride_out + (q_head * V)[:, None] + v_channel[None, :]
        if HAS_OWN:
            own = tl.load(own_lse + token * stride_lse + q_head * stride_lse_head, mask=is_row, other=0.0) * LOG2_E
            share = 1 / (1 + tl.exp2(own - lse))
            value = tl.load(out_at, mask=is_value, other=0.0).to(tl.float32)
            acc = share[:, None] * acc + (1 - share)[:, None] * value
        tl.store(out_at, acc.to(out.dtype.element_ty), mask=is_value)
    else:
        row = (partial.to(tl.int64) * H + head) * TILE + tl.arange(0, TILE)
        tl.store(partial_out + row[:, None] * V + v_channel[None, :], acc, mask=is_value)
        tl.store(partial_lse + row, lse, mask=is_row)


@triton.jit(do_not_specialize=["num_requests", "stride_lse", "stride_lse_head"])
def _merge(
    out, own_lse, q_indptr, partial_out, partial_lse, num_splits, partial_start, num_requests,
    stride_out, stride_lse, stride_lse_head,
    H: tl.constexpr, G: tl.constexpr, V: tl.constexpr, VP: tl.constexpr, TILE: tl.constexpr,
    ONE_TOKEN: tl.constexpr, REQUESTS: tl.constexpr, SPLITS: tl.constexpr, HAS_OWN: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """One program a token and query head: the splits of its tile in one softmax."""
    token, q_head = tl.program_id(0), tl.program_id(1)
    if ONE_TOKEN:
        request = token
    else:
        request = 0
        for at in range(0, num_requests, REQUESTS):
            each = at + tl.arange(0, REQUESTS)
            ends = tl.load(q_indptr + 1 + each, mask=each < num_requests, other=2147483647)
            request += tl.sum((ends <= token).to(tl.int32))
    splits = tl.load(num_splits + request)
    # Also where there is nothing to merge: whatever follows this kernel must not begin before the attention has ended.
    if OVERLAP:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    if splits == 1:
        return
    v_channel = tl.arange(0, VP)
    out_at = out + token.to(tl.int64) * stride_out + q_head * V + v_channel
    tile_row = (token - tl.load(q_indptr + request)) * G + q_head % G
    first = tl.load(partial_start + request) + tile_row // TILE * splits
    each = tl.arange(0, SPLITS)
    if HAS_OWN:
        top = tl.load(own_lse + token * stride_lse + q_head * stride_lse_head) * LOG2_E
        acc = tl.load(out_at, mask=v_channel < V, other=0.0).to(tl.float32)
        total = 1.0
    else:
        top = float("-inf")
        acc = tl.zeros([VP], dtype=tl.float32)
        total = 0.0
    for at in range(0, splits, SPLITS):
        inside = at + each < splits
        row = ((first + at + each).to(tl.int64) * H + q_head // G) * TILE + tile_row % TILE
        lse = tl.load(partial_lse + row, mask=inside, other=float("-inf"))
        value = tl.load(
            partial_out + row[:, None] * V + v_channel[None, :],
            mask=inside[:, None] & (v_channel < V)[None, :],
            other=0.0,
        )
        new_top = tl.maximum(top, tl.max(lse))
        reference = tl.where(new_top > float("-inf"), new_top, 0.0)
        weight = tl.exp2(lse - reference)
        shrink = tl.exp2(top - reference)
        acc = acc * shrink + tl.sum(value * weight[:, None], 0)
        total = total * shrink + tl.sum(weight)
        top = new_top
    tl.store(out_at, (acc / total).to(out.dtype.element_ty), mask=v_channel < V)


@functools.cache
def has_overlap(device: torch.device) -> bool:
    """Whether the GPU can start a kernel before its predecessor ends (programmatic dependent launch: Hopper on)."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device)[0] >= 9


@functools.cache
def has_large_shared_memory(device: torch.device) -> bool:
    """A100, Hopper and B200 do; many others give a program some 100 KiB, enough for two stages."""
    if device.type != "cuda":
        return True
    return torch.cuda.get_device_properties(device).shared_memory_per_block_optin >= 144 << 10


class Config(NamedTuple):
    """``block``: slots of one step. ``num_stages``, ``visual_stages``: of the loops over text and over rotated rows.
    ``ahead``: load slot rows and the first basis early, which takes registers."""

    block: int
    num_warps: int
    num_stages: int
    visual_stages: int
    ahead: bool = True


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

    ``own_lse`` [n, Hq] fp32, natural: then ``out`` holds attention over other keys with that log-sum-exp, and the
    result is attention over both. ``q_indptr`` [num_requests + 1] int32 splits the n tokens; ``one_token``: each
    request has one. ``causal``: they are also the last text slots of their requests in the plan, and see no later one.
    """
    num_kv_heads, head_dim = pools.k_text.shape[1:]
    lse = plan.no_lse if own_lse is None else own_lse
    partition = plan.partition
    strides = (
        q.stride(0), out.stride(0), pools.k_text.stride(0), pools.v_text.stride(0), pools.z.stride(0),
        pools.v_visual.stride(0), pools.query_map.stride(0), pools.mean.stride(0),
    )  # fmt: skip
    launch_attend, launch_merge = _launches(
        num_kv_heads, q.shape[1] // num_kv_heads, head_dim, pools.z.shape[-1], pools.v_text.shape[-1], plan.tile_rows,
        config, logit_cap > 0, own_lse is not None, one_token, causal, (q.dtype, pools.z.dtype), strides, q.device,
    )  # fmt: skip
    launch_attend(
        (plan.max_items(num_tiles) * num_kv_heads, 1, 1),
        q, out, lse, q_indptr, *plan.partials, *pools[:6], partition.slots, partition.runs,
        plan.items, plan.num_items, sm_scale, logit_cap, *lse.stride(), partition.slots.stride(0),
        partition.runs.stride(0), *strides,
    )  # fmt: skip
    if plan.splits:
        launch_merge(
            (q.shape[0], q.shape[1], 1),
            out, lse, q_indptr, *plan.partials, plan.num_splits, plan.partial_start, num_requests,
            out.stride(0), *lse.stride(),
        )  # fmt: skip


@functools.cache
def _launches(
    num_kv_heads, group, head_dim, rank, v_head_dim, tile_rows, config, is_capped, has_own, one_token, causal, dtypes,
    strides, device,
) -> tuple[Launch, Launch]:
    """``_attend`` and ``_merge`` for one kind of call; what is not used here tells compiled variants apart."""
    power = triton.next_power_of_2
    padded_rank = power(rank)
    if tile_rows >= 64:
        padded_rank = max(padded_rank, MIN_TILE_PRODUCT_CHANNELS)
    if not has_large_shared_memory(device):
        config = config._replace(num_stages=2, visual_stages=2)
    overlap = has_overlap(device)
    options = {"launch_pdl": True} if overlap else {}
    attend_constants = dict(
        H=num_kv_heads, G=group, D=head_dim, DP=power(head_dim), R=rank, RP=padded_rank, V=v_head_dim,
        VP=power(v_head_dim), TILE=tile_rows, BLOCK=config.block, CAPPED=is_capped, HAS_OWN=has_own,
        CAUSAL=causal, ONE_TOKEN=one_token, OVERLAP=overlap, AHEAD=config.ahead,
        STAGES=config.num_stages, VISUAL_STAGES=config.visual_stages,
    )  # fmt: skip
    merge_constants = dict(
        H=num_kv_heads, G=group, V=v_head_dim, VP=power(v_head_dim), TILE=tile_rows, ONE_TOKEN=one_token,
        REQUESTS=MERGE_REQUESTS, SPLITS=16, HAS_OWN=has_own, OVERLAP=overlap,
    )  # fmt: skip
    return (
        Launch(_attend, 3, attend_constants, num_warps=config.num_warps, num_stages=config.num_stages, **options),
        Launch(_merge, 2, merge_constants, num_warps=2, **options),
    )
