"""Blocks of slots in the online softmax, which attend.py's programs loop over.

Values are accumulated in parts of the channels, 8 bits / bits of the visual rows' Value codes: as many as share a byte,
else one. A part is V channels wide, padded to VP. With codes, ``zero`` and ``second_zero`` [TILE] add up what their
offset and zero points are off by in either half of the parts; they are taken from all channels at the end.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .quantise import _offset, _steps_and_zeros, _unpacked

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
def _load(at, inside, channel, N: tl.constexpr, NP: tl.constexpr, MASKED: tl.constexpr):
    """Rows of N channels, padded to NP. A padding slot may hold NaN, and 0 * NaN poisons: masked loads read 0 instead."""
    if MASKED:
        return tl.load(at, mask=inside[:, None] & (channel < N)[None, :], other=0.0)
    elif N != NP:
        return tl.load(at, mask=(channel < N)[None, :], other=0.0)
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
    score, top, index, end, row_end, scale, cap, MASKED: tl.constexpr, CAUSAL: tl.constexpr, CAPPED: tl.constexpr
):
    """Weights of the scores [TILE, BLOCK], what shrinks earlier sums, and the largest score yet."""
    score *= scale
    if CAPPED:
        # tanh by exp2: 1 - 2 / (1 + e^2x)
        score = cap * (1 - 2 / (1 + tl.exp2(score * (2 * LOG2_E) / cap)))
    score *= LOG2_E
    inside = index < end
    if CAUSAL:
        score = tl.where(inside[None, :] & (index[None, :] < row_end[:, None]), score, float("-inf"))
    elif MASKED:
        score = tl.where(inside[None, :], score, float("-inf"))
    new_top = tl.maximum(top, tl.max(score, 1))
    reference = new_top
    if CAUSAL:  # a row may see nothing yet
        reference = tl.maximum(new_top, LOWEST)
    return tl.exp2(score - reference[:, None]), tl.exp2(top - reference), new_top


@triton.jit
def _block(
    acc, acc1, acc2, acc3, top, total, q, bias, keys, values, row, at, end, row_end, key_stride, value_stride, scale, cap,
    K: tl.constexpr, KP: tl.constexpr, V: tl.constexpr, VP: tl.constexpr, PARTS: tl.constexpr,
    BLOCK: tl.constexpr, MASKED: tl.constexpr, CAUSAL: tl.constexpr, CAPPED: tl.constexpr,
):  # fmt: skip
    """One step of the online softmax: BLOCK slots from ``at`` on, in pool ``row`` [BLOCK]; with CAUSAL a query row sees
    those below its ``row_end``. Keys and Values as they are, or in FP8."""
    index = at + tl.arange(0, BLOCK)
    channel, v_channel = tl.arange(0, KP), tl.arange(0, VP)
    inside = index < end
    row = row.to(tl.int64)
    key_at = keys + row[:, None] * key_stride + channel[None, :]
    value_at = values + row[:, None] * value_stride + v_channel[None, :]
    key = _as(_load(key_at, inside, channel, K, KP, MASKED), q.dtype)
    score = _dot(q, tl.trans(key)) + bias[:, None]
    weight, shrink, top = _weights(score, top, index, end, row_end, scale, cap, MASKED, CAUSAL, CAPPED)
    value = _as(_load(value_at, inside, v_channel, V, VP, MASKED), q.dtype)
    acc = acc * shrink[:, None] + _dot(weight.to(value.dtype), value)
    if PARTS > 1:
        value = _as(_load(value_at + V, inside, v_channel, V, VP, MASKED), q.dtype)
        acc1 = acc1 * shrink[:, None] + _dot(weight.to(value.dtype), value)
    if PARTS > 2:
        value = _as(_load(value_at + 2 * V, inside, v_channel, V, VP, MASKED), q.dtype)
        acc2 = acc2 * shrink[:, None] + _dot(weight.to(value.dtype), value)
        value = _as(_load(value_at + 3 * V, inside, v_channel, V, VP, MASKED), q.dtype)
        acc3 = acc3 * shrink[:, None] + _dot(weight.to(value.dtype), value)
    return acc, acc1, acc2, acc3, top, total * shrink + tl.sum(weight, 1)


@triton.jit
def _run(
    acc, acc1, acc2, acc3, top, total, q, bias, keys, values, rows, begin, end, key_stride, value_stride, scale, cap,
    K: tl.constexpr, KP: tl.constexpr, V: tl.constexpr, VP: tl.constexpr, PARTS: tl.constexpr, BLOCK: tl.constexpr,
    CAPPED: tl.constexpr, AHEAD: tl.constexpr, STAGES: tl.constexpr,
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
        acc, acc1, acc2, acc3, top, total = _block(
            acc, acc1, acc2, acc3, top, total, q, bias, keys, values, row, at, end, top, key_stride, value_stride,
            scale, cap, K, KP, V, VP, PARTS, BLOCK, False, False, CAPPED,
        )  # fmt: skip
        if AHEAD:
            row = next_row
    if whole < end:
        if not AHEAD:
            row = tl.load(rows + whole + each, mask=whole + each < end, other=0)
        acc, acc1, acc2, acc3, top, total = _block(
            acc, acc1, acc2, acc3, top, total, q, bias, keys, values, row, whole, end, top, key_stride, value_stride,
            scale, cap, K, KP, V, VP, PARTS, BLOCK, True, False, CAPPED,
        )  # fmt: skip
    return acc, acc1, acc2, acc3, top, total


@triton.jit
def _coded_block(
    acc, acc1, acc2, acc3, zero, second_zero, top, total,
    q, bias, turned, turned1, turned2, turned3, turned_sum, second_sum,
    z, residual, values, steps, row, at, end, stride_z, stride_residual, stride_value, stride_steps, scale, cap,
    R: tl.constexpr, RP: tl.constexpr, W: tl.constexpr, WP: tl.constexpr, V: tl.constexpr, VP: tl.constexpr,
    KEY_BITS: tl.constexpr, VALUE_BITS: tl.constexpr, VALUE_STEPS: tl.constexpr,
    BLOCK: tl.constexpr, MASKED: tl.constexpr, CAPPED: tl.constexpr,
):  # fmt: skip
    """``_block`` over visual rows of any format. ``q``: rotated. ``turned`` ...: the turned query's channels in the first
    bits of residual bytes, in the next, ..., and the sums of either half."""
    index = at + tl.arange(0, BLOCK)
    inside = index < end
    row = row.to(tl.int64)
    channel, byte, v_channel = tl.arange(0, RP), tl.arange(0, WP), tl.arange(0, VP)
    head = _as(_load(z + row[:, None] * stride_z + channel[None, :], inside, channel, R, RP, MASKED), q.dtype)
    score = _dot(q, tl.trans(head)) + bias[:, None]
    if KEY_BITS < 16:
        offset = _offset(KEY_BITS, q.dtype)
        packed = _load(residual + row[:, None] * stride_residual + byte[None, :], inside, byte, W, WP, MASKED)
        step, point, second_step, second_point = _steps_and_zeros(steps + row * stride_steps, inside, KEY_BITS, MASKED)
        half = _dot(turned, tl.trans(_unpacked(packed, 0, KEY_BITS, q.dtype)))
        if KEY_BITS == 2:
            half += _dot(turned1, tl.trans(_unpacked(packed, 2, KEY_BITS, q.dtype)))
        score += half * step[None, :] - turned_sum[:, None] * (step * (point + offset))[None, :]
        if KEY_BITS == 4:
            half = _dot(turned1, tl.trans(_unpacked(packed, 4, KEY_BITS, q.dtype)))
        else:
            half = _dot(turned2, tl.trans(_unpacked(packed, 4, KEY_BITS, q.dtype)))
            half += _dot(turned3, tl.trans(_unpacked(packed, 6, KEY_BITS, q.dtype)))
        score += half * second_step[None, :] - second_sum[:, None] * (second_step * (second_point + offset))[None, :]
    weight, shrink, top = _weights(score, top, index, end, top, scale, cap, MASKED, False, CAPPED)
    value_at = values + row[:, None] * stride_value + v_channel[None, :]
    value = _load(value_at, inside, v_channel, V, VP, MASKED)
    acc *= shrink[:, None]
    if VALUE_BITS >= 8:
        acc += _dot(weight.to(q.dtype), _as(value, q.dtype))
    else:
        offset = _offset(VALUE_BITS, q.dtype)
        step, point, second_step, second_point = _steps_and_zeros(
            steps + row * stride_steps + VALUE_STEPS, inside, VALUE_BITS, MASKED
        )
        acc1 *= shrink[:, None]
        first = (weight * step[None, :]).to(q.dtype)
        acc += _dot(first, _unpacked(value, 0, VALUE_BITS, q.dtype))
        second = (weight * second_step[None, :]).to(q.dtype)
        if VALUE_BITS == 4:
            acc1 += _dot(second, _unpacked(value, 4, VALUE_BITS, q.dtype))
        else:
            acc1 += _dot(first, _unpacked(value, 2, VALUE_BITS, q.dtype))
            acc2 = acc2 * shrink[:, None] + _dot(second, _unpacked(value, 4, VALUE_BITS, q.dtype))
            acc3 = acc3 * shrink[:, None] + _dot(second, _unpacked(value, 6, VALUE_BITS, q.dtype))
        # Of the rounded weights, so that the offset goes without a rest.
        zero = zero * shrink + tl.sum(first.to(tl.float32) * (point + offset)[None, :], 1)
        second_zero = second_zero * shrink + tl.sum(second.to(tl.float32) * (second_point + offset)[None, :], 1)
    return acc, acc1, acc2, acc3, zero, second_zero, top, total * shrink + tl.sum(weight, 1)


@triton.jit
def _coded_run(
    acc, acc1, acc2, acc3, zero, second_zero, top, total,
    q, bias, turned, turned1, turned2, turned3, turned_sum, second_sum,
    z, residual, values, steps, rows, begin, end, stride_z, stride_residual, stride_value, stride_steps, scale, cap,
    R: tl.constexpr, RP: tl.constexpr, W: tl.constexpr, WP: tl.constexpr, V: tl.constexpr, VP: tl.constexpr,
    KEY_BITS: tl.constexpr, VALUE_BITS: tl.constexpr, VALUE_STEPS: tl.constexpr,
    BLOCK: tl.constexpr, CAPPED: tl.constexpr, AHEAD: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """``_run`` over visual rows of any format."""
    whole = begin + (end - begin) // BLOCK * BLOCK
    each = tl.arange(0, BLOCK)
    if AHEAD:
        row = tl.load(rows + begin + each, mask=begin + each < end, other=0)
    for at in tl.range(begin, whole, BLOCK, num_stages=STAGES):
        if AHEAD:
            next_row = tl.load(rows + at + BLOCK + each, mask=at + BLOCK + each < end, other=0)
        else:
            row = tl.load(rows + at + each)
        acc, acc1, acc2, acc3, zero, second_zero, top, total = _coded_block(
            acc, acc1, acc2, acc3, zero, second_zero, top, total,
            q, bias, turned, turned1, turned2, turned3, turned_sum, second_sum,
            z, residual, values, steps, row, at, end, stride_z, stride_residual, stride_value, stride_steps, scale, cap,
            R, RP, W, WP, V, VP, KEY_BITS, VALUE_BITS, VALUE_STEPS, BLOCK, False, CAPPED,
        )  # fmt: skip
        if AHEAD:
            row = next_row
    if whole < end:
        if not AHEAD:
            row = tl.load(rows + whole + each, mask=whole + each < end, other=0)
        acc, acc1, acc2, acc3, zero, second_zero, top, total = _coded_block(
            acc, acc1, acc2, acc3, zero, second_zero, top, total,
            q, bias, turned, turned1, turned2, turned3, turned_sum, second_sum,
            z, residual, values, steps, row, whole, end, stride_z, stride_residual, stride_value, stride_steps, scale,
            cap, R, RP, W, WP, V, VP, KEY_BITS, VALUE_BITS, VALUE_STEPS, BLOCK, True, CAPPED,
        )  # fmt: skip
    return acc, acc1, acc2, acc3, zero, second_zero, top, total


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
