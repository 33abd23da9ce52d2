"""Moments of the Keys of segments, a basis of each by subspace iteration, and rotated Keys: the
kernels that compress.py launches for rows of every format."""

from __future__ import annotations

import triton
import triton.language as tl

from .blocks import _dot


@triton.jit(do_not_specialize=["bounds", "tiles"])
def _moments(
    k, bounds, tiles, covariance, shifted_sum, stride_k, stride_layer,
    H: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Sums of x and x x^T over a tile, x = key - first key of the segment: large means cancel
    before they are squared."""
    tile, head = tl.program_id(0), tl.program_id(1)
    k += tl.program_id(2).to(tl.int64) * stride_layer
    segment = tl.load(tiles + 2 * tile)
    row = tl.load(tiles + 2 * tile + 1)
    first, end = tl.load(bounds + 3 * segment), tl.load(bounds + 3 * segment + 1)
    channel = tl.arange(0, DP)
    keys = k + head * D + channel[None, :]
    shift = tl.load(
        k + first.to(tl.int64) * stride_k + head * D + channel, mask=channel < D, other=0.0
    ).to(tl.float32)
    total = tl.zeros([DP], dtype=tl.float32)
    product = tl.zeros([DP, DP], dtype=tl.float32)
    for at in range(row, tl.minimum(row + ROWS, end), BLOCK):
        each = at + tl.arange(0, BLOCK)
        inside = (each < end)[:, None] & (channel < D)[None, :]
        key = tl.load(keys + each.to(tl.int64)[:, None] * stride_k, mask=inside, other=0.0)
        x = tl.where(inside, key.to(tl.float32) - shift[None, :], 0.0)
        total += tl.sum(x, 0)
        x = x.to(key.dtype)
        product += _dot(tl.trans(x), x)
    at = (tl.program_id(2) * tl.num_programs(0) + tile).to(tl.int64) * H + head
    tl.store(shifted_sum + at * DP + channel, total)
    tl.store(covariance + at * DP * DP + channel[:, None] * DP + channel[None, :], product)


@triton.jit
def _gram_schmidt(y, ROWS: tl.constexpr):
    """Orthonormal rows of y [RP, DP] by modified Gram-Schmidt, two at a time; rows from ROWS on are
    0 and stay so.

    Vectors lie in rows and every sum keeps its dimension, so that inner products stay within a
    warp. They are scaled to length 1 first and last only.
    """
    row = tl.arange(0, y.shape[0])[:, None]
    y *= tl.rsqrt(tl.maximum(tl.sum(y * y, 1, keep_dims=True), 1e-30))
    for j in range(0, ROWS, 2):
        a = tl.sum(tl.where(row == j, y, 0.0), 0, keep_dims=True)
        b = tl.sum(tl.where(row == j + 1, y, 0.0), 0, keep_dims=True)
        length = tl.maximum(tl.sum(a * a, 1, keep_dims=True), 1e-30)
        b -= a * (tl.sum(a * b, 1, keep_dims=True) / length)
        along_a = tl.sum(y * a, 1, keep_dims=True) / length
        along_b = tl.sum(y * b, 1, keep_dims=True) / tl.maximum(
            tl.sum(b * b, 1, keep_dims=True), 1e-30
        )
        y -= tl.where(row > j, along_a, 0.0) * a + tl.where(row > j + 1, along_b, 0.0) * b
    return y * tl.rsqrt(tl.maximum(tl.sum(y * y, 1, keep_dims=True), 1e-30))


BATCH = ["bounds", "parts", "first_segment", "all_segments", "first_part", "num_parts"]


@triton.jit(do_not_specialize=BATCH)
def _fit(
    k, bounds, parts, covariance, shifted_sum, weights, start, query_map, mean, key_map,
    first_segment, all_segments, first_part, num_parts,
    stride_k, stride_layer, stride_map, stride_map_layer, stride_mean, stride_mean_layer,
    H: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, R: tl.constexpr, RP: tl.constexpr,
    WEIGHTED: tl.constexpr, STEPS: tl.constexpr, PRECISION: tl.constexpr, CODED: tl.constexpr,
):  # fmt: skip
    """One program a segment, head and layer: C from its parts, then the top R eigenvectors of C or
    of W C W. With CODED query maps have steps in them, which are not known yet."""
    index, head, layer = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    segment = first_segment + index
    fitted = (layer * tl.num_programs(0) + index) * H + head
    k += layer * stride_layer
    channel, column = tl.arange(0, DP), tl.arange(0, RP)
    first, end = tl.load(bounds + 3 * segment), tl.load(bounds + 3 * segment + 1)
    basis = tl.load(bounds + 3 * segment + 2).to(tl.int64)
    query_map += layer * stride_map_layer + basis * stride_map + head * D * R
    mean += layer * stride_mean_layer + basis * stride_mean + head * D
    total = tl.zeros([DP], dtype=tl.float32)
    matrix = tl.zeros([DP, DP], dtype=tl.float32)
    square = channel[:, None] * DP + channel[None, :]
    for part in range(tl.load(parts + segment), tl.load(parts + segment + 1)):
        at = (layer * num_parts + part - first_part) * H + head
        total += tl.load(shifted_sum + at * DP + channel)
        matrix += tl.load(covariance + at * DP * DP + square)
    n = (end - first).to(tl.float32)
    matrix -= total[:, None] * total[None, :] / n
    shift = tl.load(
        k + first.to(tl.int64) * stride_k + head * D + channel, mask=channel < D, other=0.0
    ).to(tl.float32)
    tl.store(mean + channel, shift + total / n, mask=channel < D)
    if WEIGHTED:
        weighted = (layer * all_segments + segment) * H + head
        weight = tl.load(weights + weighted * D + channel, mask=channel < D, other=0.0)
        matrix *= weight[:, None] * weight[None, :]
    # Equal scale for all heads. The floor keeps fp32 Gram-Schmidt sound where C has a lower rank
    # than the basis; it changes no eigenvector.
    scale = tl.sum(tl.sum(tl.where(channel[:, None] == channel[None, :], matrix, 0.0), 1))
    matrix = matrix * (D / tl.maximum(scale, 1e-30)) + tl.where(
        channel[:, None] == channel[None, :], 1e-4, 0.0
    )

    # Subspace iteration on rows: y C = (C y^T)^T.
    at = channel[None, :] * R + column[:, None]
    inside = (column < R)[:, None] & (channel < D)[None, :]
    y = tl.load(start + at, mask=inside, other=0.0)
    for _ in range(STEPS):
        y = _gram_schmidt(tl.dot(y, matrix, input_precision=PRECISION), R)
    # Of a steep spectrum one pass leaves rows that are not orthogonal to fp32.
    y = _gram_schmidt(y, R)
    if not CODED:
        tl.store(query_map + at, y.to(query_map.dtype.element_ty), mask=inside)
    tl.store(key_map + fitted * D * R + at, y.to(key_map.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["slots", "bounds", "tiles", "first_segment", "num_segments"])
def _project(
    k, slots, bounds, tiles, key_map, mean, z, first_visual, first_segment, num_segments,
    stride_k, stride_layer, stride_mean, stride_mean_layer, stride_z, stride_z_layer,
    H: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, R: tl.constexpr, RP: tl.constexpr,
    ROWS: tl.constexpr,
):  # fmt: skip
    """z = (k - mean) key_map for ROWS Keys of a segment, one head and layer."""
    tile, head, layer = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    k += layer * stride_layer
    z += layer * stride_z_layer
    segment = tl.load(tiles + 2 * tile)
    row = tl.load(tiles + 2 * tile + 1) + tl.arange(0, ROWS)
    inside = row < tl.load(bounds + 3 * segment + 1)
    basis = tl.load(bounds + 3 * segment + 2).to(tl.int64)
    mean += layer * stride_mean_layer + basis * stride_mean + head * D
    channel, column = tl.arange(0, DP), tl.arange(0, RP)
    key = tl.load(
        k + row.to(tl.int64)[:, None] * stride_k + head * D + channel[None, :],
        mask=inside[:, None] & (channel < D)[None, :],
        other=0.0,
    )
    centre = tl.load(mean + channel, mask=channel < D, other=0.0)
    rotation = tl.load(
        key_map
        + ((layer * num_segments + segment - first_segment) * H + head) * D * R
        + channel[:, None] * R
        + column[None, :],
        mask=(channel < D)[:, None] & (column < R)[None, :],
        other=0.0,
    )
    centred = (key.to(tl.float32) - centre[None, :]).to(key_map.dtype.element_ty)
    rotated = _dot(centred, rotation)
    slot = tl.load(slots + row, mask=inside, other=first_visual).to(tl.int64) - first_visual
    tl.store(
        z + slot[:, None] * stride_z + head * R + column[None, :],
        rotated.to(z.dtype.element_ty),
        mask=inside[:, None] & (column < R)[None, :],
    )
