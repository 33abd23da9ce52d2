"""Blocks of visual rows with codes in the online softmax: ``_block`` and ``_run`` of blocks.py for
rows of any format.

Values are accumulated in parts of the channels, which words have. ``zero`` and ``second_zero``
[TILE] add up what their offset and zero points are off by in either half of the parts; they are
taken from all channels at the end.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .blocks import _as, _load, _of_query, _of_token, _scores, _weighted, _weights
from .quantise import _offset, _steps_and_zeros, _unpacked


@triton.jit
def _coded_block(
    acc, acc1, acc2, acc3, zero, second_zero, top, total,
    q, bias, turned, turned1, turned2, turned3, turned_sum, second_sum,
    z, residual, values, steps, row, at, end, stride_z, stride_residual, stride_value, stride_steps,
    scale, cap,
    R: tl.constexpr, RP: tl.constexpr, W: tl.constexpr, WP: tl.constexpr, V: tl.constexpr,
    VP: tl.constexpr, KEY_BITS: tl.constexpr, VALUE_BITS: tl.constexpr, VALUE_STEPS: tl.constexpr,
    ASM: tl.constexpr, BLOCK: tl.constexpr, MASKED: tl.constexpr, CAPPED: tl.constexpr,
    SWAPPED: tl.constexpr,
):  # fmt: skip
    """``_block`` over visual rows of any format. ``q``: rotated. ``turned`` ...: a quarter of the
    turned query's channels each, and the sums of either half."""
    index = at + tl.arange(0, BLOCK)
    inside = index < end
    row = row.to(tl.int64)
    channel, word, v_channel = tl.arange(0, RP), tl.arange(0, WP), tl.arange(0, VP)
    head = _as(_load(z, row, stride_z, inside, channel, R, RP, MASKED, SWAPPED), q.dtype)
    score = _scores(q, head, SWAPPED) + _of_query(bias, SWAPPED)
    if KEY_BITS < 16:
        offset = _offset(KEY_BITS, q.dtype)
        packed = _load(residual, row, stride_residual, inside, word, W, WP, MASKED, SWAPPED)
        step, point, second_step, second_point = _steps_and_zeros(
            steps + row * stride_steps, inside, KEY_BITS, MASKED
        )
        half = _scores(turned, _unpacked(packed, 0, KEY_BITS, q.dtype, ASM), SWAPPED)
        half += _scores(turned1, _unpacked(packed, 1, KEY_BITS, q.dtype, ASM), SWAPPED)
        score += half * _of_token(step, SWAPPED)
        score -= _of_query(turned_sum, SWAPPED) * _of_token(step * (point + offset), SWAPPED)
        half = _scores(turned2, _unpacked(packed, 2, KEY_BITS, q.dtype, ASM), SWAPPED)
        half += _scores(turned3, _unpacked(packed, 3, KEY_BITS, q.dtype, ASM), SWAPPED)
        score += half * _of_token(second_step, SWAPPED)
        score -= _of_query(second_sum, SWAPPED) * _of_token(
            second_step * (second_point + offset), SWAPPED
        )
    weight, shrink, top = _weights(
        score, top, index, end, top, scale, cap, MASKED, False, CAPPED, SWAPPED
    )
    shrinks = _of_query(shrink, SWAPPED)
    value = _load(values, row, stride_value, inside, v_channel, V, VP, MASKED, SWAPPED)
    acc *= shrinks
    if VALUE_BITS >= 8:
        acc += _weighted(weight.to(q.dtype), _as(value, q.dtype), SWAPPED)
    else:
        offset = _offset(VALUE_BITS, q.dtype)
        step, point, second_step, second_point = _steps_and_zeros(
            steps + row * stride_steps + VALUE_STEPS, inside, VALUE_BITS, MASKED
        )
        first = (weight * _of_token(step, SWAPPED)).to(q.dtype)
        second = (weight * _of_token(second_step, SWAPPED)).to(q.dtype)
        acc += _weighted(first, _unpacked(value, 0, VALUE_BITS, q.dtype, ASM), SWAPPED)
        acc1 = acc1 * shrinks + _weighted(
            first, _unpacked(value, 1, VALUE_BITS, q.dtype, ASM), SWAPPED
        )
        acc2 = acc2 * shrinks + _weighted(
            second, _unpacked(value, 2, VALUE_BITS, q.dtype, ASM), SWAPPED
        )
        acc3 = acc3 * shrinks + _weighted(
            second, _unpacked(value, 3, VALUE_BITS, q.dtype, ASM), SWAPPED
        )
        # Of the rounded weights, so that the offset goes without a rest.
        off = first.to(tl.float32) * _of_token(point + offset, SWAPPED)
        second_off = second.to(tl.float32) * _of_token(second_point + offset, SWAPPED)
        zero = zero * shrink + tl.sum(off, 0 if SWAPPED else 1)
        second_zero = second_zero * shrink + tl.sum(second_off, 0 if SWAPPED else 1)
    total = total * shrink + tl.sum(weight, 0 if SWAPPED else 1)
    return acc, acc1, acc2, acc3, zero, second_zero, top, total


@triton.jit
def _coded_run(
    acc, acc1, acc2, acc3, zero, second_zero, top, total,
    q, bias, turned, turned1, turned2, turned3, turned_sum, second_sum,
    z, residual, values, steps, rows, begin, end, stride_z, stride_residual, stride_value,
    stride_steps, scale, cap,
    R: tl.constexpr, RP: tl.constexpr, W: tl.constexpr, WP: tl.constexpr, V: tl.constexpr,
    VP: tl.constexpr, KEY_BITS: tl.constexpr, VALUE_BITS: tl.constexpr, VALUE_STEPS: tl.constexpr,
    ASM: tl.constexpr, BLOCK: tl.constexpr, CAPPED: tl.constexpr, SWAPPED: tl.constexpr,
    AHEAD: tl.constexpr, STAGES: tl.constexpr,
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
            z, residual, values, steps, row, at, end, stride_z, stride_residual, stride_value,
            stride_steps, scale, cap, R, RP, W, WP, V, VP, KEY_BITS, VALUE_BITS, VALUE_STEPS, ASM,
            BLOCK, False, CAPPED, SWAPPED,
        )  # fmt: skip
        if AHEAD:
            row = next_row
    if whole < end:
        if not AHEAD:
            row = tl.load(rows + whole + each, mask=whole + each < end, other=0)
        acc, acc1, acc2, acc3, zero, second_zero, top, total = _coded_block(
            acc, acc1, acc2, acc3, zero, second_zero, top, total,
            q, bias, turned, turned1, turned2, turned3, turned_sum, second_sum,
            z, residual, values, steps, row, whole, end, stride_z, stride_residual, stride_value,
            stride_steps, scale, cap, R, RP, W, WP, V, VP, KEY_BITS, VALUE_BITS, VALUE_STEPS, ASM,
            BLOCK, True, CAPPED, SWAPPED,
        )  # fmt: skip
    return acc, acc1, acc2, acc3, zero, second_zero, top, total
