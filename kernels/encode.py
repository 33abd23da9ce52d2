"""Encode the Keys of segments whose principal components compress.py has fitted (coded.encode_keys, coded.quantise).

A pass finds the largest coordinate of each tile, a second one takes steps from those of all tiles of its segment and
writes the rows. Nothing is added up by atomics, so equal Keys give equal bits.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .quantise import _codes, _rounded, _signs, _step_and_zero, _words

SUMS = tl.constexpr(4)  # of a tile, a power of two: energy of the centred Keys, of their heads, error of the codes
MOST_CODE = tl.constexpr(127.0)


@triton.jit
def _coordinates(
    k, mean, key_map, row, inside, basis, fitted, head, stride_k, stride_mean,
    D: tl.constexpr, DP: tl.constexpr, R: tl.constexpr, RP: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Centred Keys [ROWS, DP] fp32, their eigenvectors [DP, RP] and coordinates [ROWS, RP]; 0 outside."""
    channel, column = tl.arange(0, DP), tl.arange(0, RP)
    is_key = inside[:, None] & (channel < D)[None, :]
    key = tl.load(k + row.to(tl.int64)[:, None] * stride_k + head * D + channel[None, :], mask=is_key, other=0.0)
    centre = tl.load(mean + basis * stride_mean + head * D + channel, mask=channel < D, other=0.0)
    vectors = tl.load(
        key_map + fitted * D * R + channel[:, None] * R + column[None, :],
        mask=(channel < D)[:, None] & (column < R)[None, :],
        other=0.0,
    )
    centred = tl.where(is_key, key.to(tl.float32) - centre[None, :], 0.0)
    return centred, vectors, tl.dot(centred, vectors, input_precision=PRECISION)


@triton.jit(do_not_specialize=["bounds", "tiles", "first_segment", "num_segments"])
def _extents(
    k, bounds, tiles, key_map, mean, extents, first_segment, num_segments,
    stride_k, stride_layer, stride_mean, stride_mean_layer,
    H: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, R: tl.constexpr, RP: tl.constexpr, ROWS: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """The largest coordinate along each direction [RP] of a tile, one head and layer."""
    tile, head, layer = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    segment = tl.load(tiles + 2 * tile)
    row = tl.load(tiles + 2 * tile + 1) + tl.arange(0, ROWS)
    inside = row < tl.load(bounds + 3 * segment + 1)
    basis = tl.load(bounds + 3 * segment + 2).to(tl.int64)
    fitted = (layer * num_segments + segment - first_segment) * H + head
    _, _, coordinates = _coordinates(
        k + layer * stride_layer, mean + layer * stride_mean_layer, key_map, row, inside, basis, fitted, head,
        stride_k, stride_mean, D, DP, R, RP, PRECISION,
    )  # fmt: skip
    at = (layer * tl.num_programs(0) + tile) * H + head
    tl.store(extents + at * RP + tl.arange(0, RP), tl.max(tl.abs(coordinates), 0))


@triton.jit
def _best_steps(x, is_channel, BITS: tl.constexpr, SHARES: tl.constexpr):
    """Bytes of step and zero point, both in fp32, and squared error, [ROWS, 2], of the halves of the channels x
    [ROWS, 2, C]."""
    low, high = tl.minimum(tl.min(x, 2), 0.0), tl.maximum(tl.max(x, 2), 0.0)
    step_code, zero_code, step, zero = _step_and_zero(low, high, 1.0, BITS)
    error = _error(x, is_channel, step, zero, BITS)
    for i in range(1, len(SHARES)):
        share = 1.0
        for j in tl.static_range(1, len(SHARES)):
            share = tl.where(i == j, SHARES[j], share)
        new_step_code, new_zero_code, new_step, new_zero = _step_and_zero(low, high, share, BITS)
        new_error = _error(x, is_channel, new_step, new_zero, BITS)
        is_better = new_error < error
        step_code, zero_code = tl.where(is_better, new_step_code, step_code), tl.where(is_better, new_zero_code, zero_code)
        step, zero = tl.where(is_better, new_step, step), tl.where(is_better, new_zero, zero)
        error = tl.where(is_better, new_error, error)
    return step_code, zero_code, step, zero, error


@triton.jit
def _error(x, is_channel, step, zero, BITS: tl.constexpr):
    step, zero = step[:, :, None], zero[:, :, None]
    off = step * (_codes(x, step, zero, BITS) - zero) - x
    return tl.sum(tl.where(is_channel, off * off, 0.0), 2)


@triton.jit
def _turned(residual, D: tl.constexpr, DP: tl.constexpr, PART: tl.constexpr, PART_PADDED: tl.constexpr,
            TURN: tl.constexpr):  # fmt: skip
    """The residual [ROWS, DP] turned by Hadamard blocks of TURN, in four parts of PART channels [ROWS, 4 * PART_PADDED].
    Signs are exact in fp16, and two numbers of fp16 have the residual's 22 leading bits."""
    channel, to = tl.arange(0, DP), tl.arange(0, 4 * PART_PADDED)
    word = to % PART_PADDED
    signs = _signs(channel[:, None], (to // PART_PADDED * PART + word)[None, :], TURN)
    signs = tl.where((channel < D)[:, None] & (word < PART)[None, :], signs, 0.0).to(tl.float16)
    leading = residual.to(tl.float16)
    rest = (residual - leading.to(tl.float32)).to(tl.float16)
    return (tl.dot(leading, signs) + tl.dot(rest, signs)) * TURN**-0.5


@triton.jit(do_not_specialize=["slots", "bounds", "tiles", "first_visual", "first_segment", "num_segments"])
def _encode(
    k, slots, bounds, tiles, key_map, mean, extents, query_map, z, residual, steps, sums,
    first_visual, first_segment, num_segments,
    stride_k, stride_layer, stride_mean, stride_mean_layer, stride_map, stride_map_layer,
    stride_z, stride_z_layer, stride_residual, stride_residual_layer, stride_steps, stride_steps_layer,
    H: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, R: tl.constexpr, RP: tl.constexpr, ROWS: tl.constexpr,
    PRECISION: tl.constexpr, BITS: tl.constexpr, PART: tl.constexpr, PART_PADDED: tl.constexpr, TURN: tl.constexpr,
    SHARES: tl.constexpr, HEAD_STEPS: tl.constexpr, SUMMED: tl.constexpr,
):  # fmt: skip
    """The visual rows of a tile's Keys, one head and layer; the first tile of a segment writes its query map."""
    tile, head, layer = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    channel, column = tl.arange(0, DP), tl.arange(0, RP)
    segment, start = tl.load(tiles + 2 * tile), tl.load(tiles + 2 * tile + 1)
    first, end = tl.load(bounds + 3 * segment), tl.load(bounds + 3 * segment + 1)
    basis = tl.load(bounds + 3 * segment + 2).to(tl.int64)
    row = start + tl.arange(0, ROWS)
    inside = row < end
    fitted = (layer * num_segments + segment - first_segment) * H + head
    centred, vectors, coordinates = _coordinates(
        k + layer * stride_layer, mean + layer * stride_mean_layer, key_map, row, inside, basis, fitted, head,
        stride_k, stride_mean, D, DP, R, RP, PRECISION,
    )  # fmt: skip
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
    back = back.to(tl.float32)
    exact = tl.div_rn(coordinates, tl.broadcast_to(sigma[None, :], coordinates.shape))
    code = tl.minimum(tl.maximum(_rounded(exact), -MOST_CODE), MOST_CODE)
    slot = tl.load(slots + row, mask=inside, other=first_visual).to(tl.int64) - first_visual
    z += layer * stride_z_layer + head * R
    tl.store(
        z + slot[:, None] * stride_z + column[None, :], code.to(tl.int8), mask=inside[:, None] & (column < R)[None, :]
    )
    left = centred - tl.dot(code, tl.trans(back), input_precision=PRECISION)

    word = tl.arange(0, PART_PADDED)
    turned = tl.reshape(_turned(left, D, DP, PART, PART_PADDED, TURN), [ROWS, 2, 2 * PART_PADDED])
    is_channel = (tl.arange(0, 2 * PART_PADDED) % PART_PADDED < PART)[None, None, :] & inside[:, None, None]
    step_code, zero_code, step, zero, error = _best_steps(turned, is_channel, BITS, SHARES)
    codes = _codes(turned, step[:, :, None], zero[:, :, None], BITS).to(tl.int32)
    codes = tl.reshape(codes, [ROWS, 4, PART_PADDED]) << (BITS * tl.arange(0, 4))[None, :, None]
    packed = tl.sum(codes, 1)
    words, stride_words = _words(residual + layer * stride_residual_layer, stride_residual, BITS)
    words += head * PART
    is_word = inside[:, None] & (word < PART)[None, :]
    tl.store(words + slot[:, None] * stride_words + word[None, :], packed.to(words.dtype.element_ty), mask=is_word)
    steps += layer * stride_steps_layer + head * HEAD_STEPS
    steps_at = steps + slot[:, None] * stride_steps + 2 * tl.arange(0, 2)[None, :]
    tl.store(steps_at, step_code.to(tl.uint8), mask=inside[:, None])
    tl.store(steps_at + 1, zero_code.to(tl.uint8), mask=inside[:, None])
    if SUMMED:
        sums += ((layer * tl.num_programs(0) + tile) * H + head) * SUMS
        tl.store(sums, tl.sum(tl.sum(centred * centred, 1)))
        tl.store(sums + 1, tl.sum(tl.sum(exact * exact, 0) * tl.sum(back * back, 0)))
        tl.store(sums + 2, tl.sum(tl.sum(error, 1)))


@triton.jit(do_not_specialize=["tiles", "first_segment", "num_tiles"])
def _add_errors(
    tiles, sums, errors, first_segment, num_tiles, stride_layer, stride_segment,
    H: tl.constexpr, TILES: tl.constexpr,
):  # fmt: skip
    """reference.key_errors of a segment, head and layer, from the sums of its tiles."""
    segment, head, layer = first_segment + tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
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
