"""Encode the Keys of segments whose principal components compress.py has fitted (coded.encode_keys,
coded.quantise).

A pass finds the largest coordinate of each tile, a second one takes steps from those of all tiles
of its segment and writes the rows. Nothing is added up by atomics, so equal Keys give equal bits.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .quantise import STEP_ROUND, STEP_SHIFT, STEP_UNIT, _rounded, _step_of, _words

# Of a tile, a power of two: energy of the centred Keys, of their heads, error of the codes.
SUMS = tl.constexpr(4)
MOST_CODE = tl.constexpr(127.0)


@triton.jit
def _centred_keys(
    k, mean, key_map, row, inside, basis, fitted, head, stride_k, stride_mean,
    D: tl.constexpr, DP: tl.constexpr, R: tl.constexpr, RP: tl.constexpr,
):  # fmt: skip
    """Keys less their mean [ROWS, DP] fp32, 0 outside, and the eigenvectors [DP, RP]."""
    channel, column = tl.arange(0, DP), tl.arange(0, RP)
    is_key = inside[:, None] & (channel < D)[None, :]
    key = tl.load(
        k + row.to(tl.int64)[:, None] * stride_k + head * D + channel[None, :],
        mask=is_key,
        other=0.0,
    )
    centre = tl.load(mean + basis * stride_mean + head * D + channel, mask=channel < D, other=0.0)
    vectors = tl.load(
        key_map + fitted * D * R + channel[:, None] * R + column[None, :],
        mask=(channel < D)[:, None] & (column < R)[None, :],
        other=0.0,
    )
    return tl.where(is_key, key.to(tl.float32) - centre[None, :], 0.0), vectors


@triton.jit(do_not_specialize=["bounds", "tiles", "first_segment", "num_segments"])
def _extents(
    k, bounds, tiles, key_map, mean, extents, coordinates, first_segment, num_segments,
    stride_k, stride_layer, stride_mean, stride_mean_layer,
    H: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, R: tl.constexpr, RP: tl.constexpr,
    ROWS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The coordinates [ROWS, RP] of a tile, one head and layer, and the largest along each
    direction [RP]."""
    tile, head, layer = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    segment = tl.load(tiles + 2 * tile)
    row = tl.load(tiles + 2 * tile + 1) + tl.arange(0, ROWS)
    inside = row < tl.load(bounds + 3 * segment + 1)
    basis = tl.load(bounds + 3 * segment + 2).to(tl.int64)
    fitted = (layer * num_segments + segment - first_segment) * H + head
    centred, vectors = _centred_keys(
        k + layer * stride_layer, mean + layer * stride_mean_layer, key_map, row, inside, basis,
        fitted, head, stride_k, stride_mean, D, DP, R, RP,
    )  # fmt: skip
    found = tl.dot(centred, vectors, input_precision=PRECISION)
    at, column = (layer * tl.num_programs(0) + tile) * H + head, tl.arange(0, RP)
    tl.store(coordinates + (at * ROWS + tl.arange(0, ROWS))[:, None] * RP + column[None, :], found)
    tl.store(extents + at * RP + column, tl.max(tl.abs(found), 0))


@triton.jit
def _step_and_zero(low, high, share, BITS: tl.constexpr):
    """coded.quantise's, but for roundings of fp32: bytes of step and zero point, int32, the step,
    its inverse and the zero point, all of the shape of ``low``. A division costs ten
    multiplications."""
    MOST: tl.constexpr = 2.0**BITS - 1
    UNIT: tl.constexpr = 2.0 ** (8 - BITS)
    wanted = (high - low) * (share / (MOST * STEP_UNIT))
    bits = wanted.to(tl.float16).to(tl.int16, bitcast=True).to(tl.int32)
    step_code = tl.minimum(tl.maximum((bits + STEP_ROUND) >> STEP_SHIFT, 1), 255)
    step = _step_of(step_code)
    inverse = 1 / step
    zero = _rounded((MOST / 2 - (low + high) * 0.5 * inverse) * UNIT)
    zero = tl.minimum(tl.maximum(zero, 0.0), 255.0)
    return step_code, zero.to(tl.int32), step, inverse, zero * (1 / UNIT)


@triton.jit
def _codes(x, inverse, zero, BITS: tl.constexpr):
    """fp32 codes of x [ROWS, 2, C], and how far x lies from them, in steps."""
    exact = x * inverse[:, :, None] + zero[:, :, None]
    codes = _rounded(tl.minimum(tl.maximum(exact, 0.0), 2.0**BITS - 1))
    return codes, codes - exact


@triton.jit
def _error(off, step, is_channel, MASKED: tl.constexpr):
    if MASKED:
        off = tl.where(is_channel, off, 0.0)
    return tl.sum(off * off, 2) * step * step


@triton.jit
def _best_steps(x, is_channel, BITS: tl.constexpr, SHARES: tl.constexpr, MASKED: tl.constexpr):
    """Of the halves of the channels x [ROWS, 2, C]: bytes of step and zero point and squared error
    [ROWS, 2], and fp32 codes like x. MASKED: not all are channels."""
    low, high = tl.minimum(tl.min(x, 2), 0.0), tl.maximum(tl.max(x, 2), 0.0)
    step_code, zero_code, step, inverse, zero = _step_and_zero(low, high, 1.0, BITS)
    _, off = _codes(x, inverse, zero, BITS)
    error = _error(off, step, is_channel, MASKED)
    for i in range(1, len(SHARES)):
        share = 1.0
        for j in tl.static_range(1, len(SHARES)):
            share = tl.where(i == j, SHARES[j], share)
        new_step_code, new_zero_code, step, new_inverse, new_zero = _step_and_zero(
            low, high, share, BITS
        )
        _, off = _codes(x, new_inverse, new_zero, BITS)
        new_error = _error(off, step, is_channel, MASKED)
        is_better = new_error < error
        step_code = tl.where(is_better, new_step_code, step_code)
        zero_code = tl.where(is_better, new_zero_code, zero_code)
        inverse = tl.where(is_better, new_inverse, inverse)
        zero = tl.where(is_better, new_zero, zero)
        error = tl.where(is_better, new_error, error)
    codes, _ = _codes(x, inverse, zero, BITS)
    return step_code, zero_code, error, codes


@triton.jit
def _turned(
    residual, signs,
    D: tl.constexpr, DP: tl.constexpr, PART: tl.constexpr, PART_PADDED: tl.constexpr,
    TURN: tl.constexpr,
):  # fmt: skip
    """The residual [ROWS, DP] turned by Hadamard blocks of TURN, in four parts of PART channels
    [ROWS, 4 * PART_PADDED]. ``signs`` [D, D]: their signs, in fp16, whose 11 bits are many beside
    those of a code, or fp32."""
    channel, to = tl.arange(0, DP), tl.arange(0, 4 * PART_PADDED)
    word = to % PART_PADDED
    at = signs + channel[:, None] * D + (to // PART_PADDED * PART + word)[None, :]
    sign = tl.load(at, mask=(channel < D)[:, None] & (word < PART)[None, :], other=0.0)
    if sign.dtype == tl.float32:
        return tl.dot(residual, sign, input_precision="ieee") * TURN**-0.5
    else:
        return tl.dot(residual.to(sign.dtype), sign) * TURN**-0.5


@triton.jit(
    do_not_specialize=["slots", "bounds", "tiles", "first_visual", "first_segment", "num_segments"]
)
def _encode(
    k, slots, bounds, tiles, key_map, mean, extents, coordinates, signs, query_map, z, residual,
    steps, sums, first_visual, first_segment, num_segments,
    stride_k, stride_layer, stride_mean, stride_mean_layer, stride_map, stride_map_layer,
    stride_z, stride_z_layer, stride_residual, stride_residual_layer, stride_steps,
    stride_steps_layer,
    H: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, R: tl.constexpr, RP: tl.constexpr,
    ROWS: tl.constexpr, BITS: tl.constexpr, PART: tl.constexpr, PART_PADDED: tl.constexpr,
    TURN: tl.constexpr, SHARES: tl.constexpr, HEAD_STEPS: tl.constexpr, SUMMED: tl.constexpr,
):  # fmt: skip
    """The visual rows of a tile's Keys, one head and layer; the first tile of a segment writes its
    query map."""
    tile, head, layer = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    channel, column = tl.arange(0, DP), tl.arange(0, RP)
    segment, start = tl.load(tiles + 2 * tile), tl.load(tiles + 2 * tile + 1)
    first, end = tl.load(bounds + 3 * segment), tl.load(bounds + 3 * segment + 1)
    basis = tl.load(bounds + 3 * segment + 2).to(tl.int64)
    row = start + tl.arange(0, ROWS)
    inside = row < end
    fitted = (layer * num_segments + segment - first_segment) * H + head
    centred, vectors = _centred_keys(
        k + layer * stride_layer, mean + layer * stride_mean_layer, key_map, row, inside, basis,
        fitted, head, stride_k, stride_mean, D, DP, R, RP,
    )  # fmt: skip
    at = (layer * tl.num_programs(0) + tile) * H + head
    found = tl.load(coordinates + (at * ROWS + tl.arange(0, ROWS))[:, None] * RP + column[None, :])
    first_tile = tile - (start - first) // ROWS
    extent = tl.zeros([RP], tl.float32)
    for of_segment in range(first_tile, first_tile + tl.cdiv(end - first, ROWS)):
        at = (layer * tl.num_programs(0) + of_segment) * H + head
        extent = tl.maximum(extent, tl.load(extents + at * RP + column))
    sigma = tl.div_rn(extent, tl.zeros_like(extent) + MOST_CODE)
    sigma = tl.where(sigma > 0, sigma, 1.0)
    back = (vectors * sigma[None, :]).to(query_map.dtype.element_ty)
    map_at = query_map + layer * stride_map_layer + basis * stride_map + head * D * R
    if start == first:
        tl.store(
            map_at + channel[:, None] * R + column[None, :], back,
            mask=(channel < D)[:, None] & (column < R)[None, :],
        )  # fmt: skip
    exact = found * (1 / sigma)[None, :]
    code = tl.minimum(tl.maximum(_rounded(exact), -MOST_CODE), MOST_CODE)
    slot = tl.load(slots + row, mask=inside, other=first_visual).to(tl.int64) - first_visual
    z += layer * stride_z_layer + head * R
    tl.store(
        z + slot[:, None] * stride_z + column[None, :],
        code.to(tl.int8),
        mask=inside[:, None] & (column < R)[None, :],
    )
    # Codes and maps of half precision are exact in tf32. In half precision itself Triton 3.6
    # miscompiles the product: it is over few channels (attend.MIN_TILE_PRODUCT_CHANNELS).
    EXACT: tl.constexpr = "ieee" if back.dtype == tl.float32 else "tf32"
    back = back.to(tl.float32)
    left = centred - tl.dot(code, tl.trans(back), input_precision=EXACT)

    word = tl.arange(0, PART_PADDED)
    turned = tl.reshape(
        _turned(left, signs, D, DP, PART, PART_PADDED, TURN), [ROWS, 2, 2 * PART_PADDED]
    )
    is_channel = (tl.arange(0, 2 * PART_PADDED) % PART_PADDED < PART)[None, None, :]
    step_code, zero_code, error, codes = _best_steps(
        turned, is_channel, BITS, SHARES, PART != PART_PADDED
    )
    codes = (
        tl.reshape(codes.to(tl.int32), [ROWS, 4, PART_PADDED])
        << (BITS * tl.arange(0, 4))[None, :, None]
    )
    packed = tl.sum(codes, 1)
    words, stride_words = _words(residual + layer * stride_residual_layer, stride_residual, BITS)
    words += head * PART
    is_word = inside[:, None] & (word < PART)[None, :]
    tl.store(
        words + slot[:, None] * stride_words + word[None, :],
        packed.to(words.dtype.element_ty),
        mask=is_word,
    )
    steps += layer * stride_steps_layer + head * HEAD_STEPS
    steps_at = steps + slot[:, None] * stride_steps + 2 * tl.arange(0, 2)[None, :]
    tl.store(steps_at, step_code.to(tl.uint8), mask=inside[:, None])
    tl.store(steps_at + 1, zero_code.to(tl.uint8), mask=inside[:, None])
    if SUMMED:
        sums += ((layer * tl.num_programs(0) + tile) * H + head) * SUMS
        tl.store(sums, tl.sum(tl.sum(centred * centred, 1)))
        tl.store(sums + 1, tl.sum(tl.sum(exact * exact, 0) * tl.sum(back * back, 0)))
        tl.store(sums + 2, tl.sum(tl.sum(tl.where(inside[:, None], error, 0.0), 1)))


@triton.jit(do_not_specialize=["tiles", "first_segment", "num_tiles"])
def _add_errors(
    tiles, sums, errors, first_segment, num_tiles, stride_layer, stride_segment,
    H: tl.constexpr, TILES: tl.constexpr,
):  # fmt: skip
    """reference.key_errors of a segment, head and layer, from the sums of its tiles."""
    segment = first_segment + tl.program_id(0)
    head, layer = tl.program_id(1), tl.program_id(2).to(tl.int64)
    each = tl.arange(0, TILES)
    energy, of_heads, error = 0.0, 0.0, 0.0
    for at in range(0, num_tiles, TILES):
        is_own = tl.load(tiles + 2 * (at + each), mask=at + each < num_tiles, other=-1) == segment
        of_tile = sums + ((layer * num_tiles + at + each) * H + head) * SUMS
        energy += tl.sum(tl.load(of_tile, mask=is_own, other=0.0))
        of_heads += tl.sum(tl.load(of_tile + 1, mask=is_own, other=0.0))
        error += tl.sum(tl.load(of_tile + 2, mask=is_own, other=0.0))
    whole = tl.where(energy > 0, energy, 1.0)
    errors += layer * stride_layer + segment * stride_segment + 2 * head
    tl.store(errors, tl.maximum(energy - of_heads, 0.0) / whole)
    tl.store(errors + 1, error / whole)
