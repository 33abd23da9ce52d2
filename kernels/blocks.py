"""Blocks of slots in the online softmax, which attend_kernel.py loops over.

Values are accumulated in parts of the channels: four where visual rows hold Value codes, which
words have (coded_blocks.py), else one. A part is V channels wide, padded to VP.

With SWAPPED everything is transposed: scores are [BLOCK, TILE] and accumulators [V, TILE], and
queries come as [channels, TILE]. Products take 16 rows on the left and 8 columns on the right: the
few queries of a decode step are padded half as far there, which saves as much of the products, of
the softmax and of the registers.
"""

from __future__ import annotations

import triton
import triton.language as tl

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
def _of_query(x, SWAPPED: tl.constexpr):
    """What [TILE] queries have, along tokens or channels."""
    return x[None, :] if SWAPPED else x[:, None]


@triton.jit
def _of_token(x, SWAPPED: tl.constexpr):
    """What [BLOCK] tokens have, or channels, along the queries."""
    return x[:, None] if SWAPPED else x[None, :]


@triton.jit
def _scores(q, keys, SWAPPED: tl.constexpr):
    if SWAPPED:
        return _dot(tl.trans(keys), q)
    else:
        return _dot(q, tl.trans(keys))


@triton.jit
def _weighted(weight, values, SWAPPED: tl.constexpr):
    if SWAPPED:
        return _dot(values, weight)
    else:
        return _dot(weight, values)


@triton.jit
def _load(
    pool,
    row,
    stride,
    inside,
    channel,
    N: tl.constexpr,
    NP: tl.constexpr,
    MASKED: tl.constexpr,
    SWAPPED: tl.constexpr,
):
    """N channels, padded to NP, of pool rows; with SWAPPED [NP, BLOCK], which is how Triton makes
    copies of them asynchronous there. A padding slot may hold NaN, and 0 * NaN poisons: masked
    loads read 0 instead."""
    at = pool + _of_query(row * stride, SWAPPED) + _of_token(channel, SWAPPED)
    inside, is_channel = _of_query(inside, SWAPPED), _of_token(channel < N, SWAPPED)
    if MASKED:
        return tl.load(at, mask=inside & is_channel, other=0.0)
    elif N != NP:
        return tl.load(at, mask=is_channel, other=0.0)
    else:
        return tl.load(at)


@triton.jit
def _as(x, dtype: tl.constexpr):
    """FP8, or 8-bit integers, in ``dtype``; other rows as they are."""
    if x.dtype.is_fp8() or x.dtype.is_int():
        return x.to(dtype)
    else:
        return x


@triton.jit
def _weights(
    score, top, index, end, row_end, scale, cap,
    MASKED: tl.constexpr, CAUSAL: tl.constexpr, CAPPED: tl.constexpr, SWAPPED: tl.constexpr,
):  # fmt: skip
    """Weights of the scores [TILE, BLOCK], what shrinks earlier sums, and the largest score yet."""
    if CAPPED:
        # tanh by exp2: 1 - 2 / (1 + e^2x)
        score = cap * (1 - 2 / (1 + tl.exp2(score * (scale * 2 * LOG2_E / cap))))
        score *= LOG2_E
    else:
        score *= scale * LOG2_E
    inside = index < end
    if CAUSAL:
        is_seen = _of_token(index, SWAPPED) < _of_query(row_end, SWAPPED)
        score = tl.where(_of_token(inside, SWAPPED) & is_seen, score, float("-inf"))
    elif MASKED:
        score = tl.where(_of_token(inside, SWAPPED), score, float("-inf"))
    new_top = tl.maximum(top, tl.max(score, 0 if SWAPPED else 1))
    reference = new_top
    if CAUSAL:  # a row may see nothing yet
        reference = tl.maximum(new_top, LOWEST)
    return tl.exp2(score - _of_query(reference, SWAPPED)), tl.exp2(top - reference), new_top


@triton.jit
def _block(
    acc, acc1, acc2, acc3, top, total, q, bias, keys, values, row, at, end, row_end, key_stride,
    value_stride, scale, cap,
    K: tl.constexpr, KP: tl.constexpr, V: tl.constexpr, VP: tl.constexpr, PARTS: tl.constexpr,
    BLOCK: tl.constexpr, MASKED: tl.constexpr, CAUSAL: tl.constexpr, CAPPED: tl.constexpr,
    SWAPPED: tl.constexpr,
):  # fmt: skip
    """One step of the online softmax: BLOCK slots from ``at`` on, in pool ``row`` [BLOCK]; with
    CAUSAL a query row sees those below its ``row_end``. Keys and Values as they are, or in FP8."""
    index = at + tl.arange(0, BLOCK)
    channel, v_channel = tl.arange(0, KP), tl.arange(0, VP)
    inside = index < end
    row = row.to(tl.int64)
    key = _as(_load(keys, row, key_stride, inside, channel, K, KP, MASKED, SWAPPED), q.dtype)
    score = _scores(q, key, SWAPPED) + _of_query(bias, SWAPPED)
    weight, shrink, top = _weights(
        score, top, index, end, row_end, scale, cap, MASKED, CAUSAL, CAPPED, SWAPPED
    )
    shrinks, rounded = _of_query(shrink, SWAPPED), weight.to(q.dtype)
    value = _as(
        _load(values, row, value_stride, inside, v_channel, V, VP, MASKED, SWAPPED), q.dtype
    )
    acc = acc * shrinks + _weighted(rounded, value, SWAPPED)
    if PARTS == 4:
        value = _as(
            _load(values + V, row, value_stride, inside, v_channel, V, VP, MASKED, SWAPPED), q.dtype
        )
        acc1 = acc1 * shrinks + _weighted(rounded, value, SWAPPED)
        value = _as(
            _load(values + 2 * V, row, value_stride, inside, v_channel, V, VP, MASKED, SWAPPED),
            q.dtype,
        )
        acc2 = acc2 * shrinks + _weighted(rounded, value, SWAPPED)
        value = _as(
            _load(values + 3 * V, row, value_stride, inside, v_channel, V, VP, MASKED, SWAPPED),
            q.dtype,
        )
        acc3 = acc3 * shrinks + _weighted(rounded, value, SWAPPED)
    return acc, acc1, acc2, acc3, top, total * shrink + tl.sum(weight, 0 if SWAPPED else 1)


@triton.jit
def _run(
    acc, acc1, acc2, acc3, top, total, q, bias, keys, values, rows, begin, end, key_stride,
    value_stride, scale, cap,
    K: tl.constexpr, KP: tl.constexpr, V: tl.constexpr, VP: tl.constexpr, PARTS: tl.constexpr,
    BLOCK: tl.constexpr, CAPPED: tl.constexpr, SWAPPED: tl.constexpr, AHEAD: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    """All slots [begin, end) of one kind and, if visual, one basis. Whole blocks need no masks.

    With AHEAD their rows are loaded a step ahead, so that Keys and Values need not wait for
    them."""
    whole = begin + (end - begin) // BLOCK * BLOCK
    each = tl.arange(0, BLOCK)
    if AHEAD:
        row = tl.load(rows + begin + each, mask=begin + each < end, other=0)
    for at in tl.range(begin, whole, BLOCK, num_stages=STAGES):
        if AHEAD:
            next_row = tl.load(rows + at + BLOCK + each, mask=at + BLOCK + each < end, other=0)
        else:
            row = tl.load(rows + at + each)
        acc, acc1, acc2, acc3, top, total = _block(
            acc, acc1, acc2, acc3, top, total, q, bias, keys, values, row, at, end, top, key_stride,
            value_stride, scale, cap, K, KP, V, VP, PARTS, BLOCK, False, False, CAPPED, SWAPPED,
        )  # fmt: skip
        if AHEAD:
            row = next_row
    if whole < end:
        if not AHEAD:
            row = tl.load(rows + whole + each, mask=whole + each < end, other=0)
        acc, acc1, acc2, acc3, top, total = _block(
            acc, acc1, acc2, acc3, top, total, q, bias, keys, values, row, whole, end, top,
            key_stride, value_stride, scale, cap, K, KP, V, VP, PARTS, BLOCK, True, False, CAPPED,
            SWAPPED,
        )  # fmt: skip
    return acc, acc1, acc2, acc3, top, total


@triton.jit
def _rotate(
    query, basis, exists, head, query_map, mean, stride_map, stride_mean,
    D: tl.constexpr, DP: tl.constexpr, R: tl.constexpr, RP: tl.constexpr, SWAPPED: tl.constexpr,
):  # fmt: skip
    """Queries rotated to a basis, and their scores of its mean."""
    basis = basis.to(tl.int64)
    channel, narrow = tl.arange(0, DP), tl.arange(0, RP)
    rotation = tl.load(
        query_map + basis * stride_map + head * D * R + channel[:, None] * R + narrow[None, :],
        mask=exists & (channel < D)[:, None] & (narrow < R)[None, :],
        other=0.0,
    )
    centre = tl.load(
        mean + basis * stride_mean + head * D + channel, mask=exists & (channel < D), other=0.0
    )
    bias = tl.sum(query.to(tl.float32) * _of_token(centre, SWAPPED), 0 if SWAPPED else 1)
    if SWAPPED:
        return _dot(tl.trans(rotation), query).to(query.dtype), bias
    else:
        return _dot(query, rotation).to(query.dtype), bias
