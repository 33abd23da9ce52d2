"""Compress the Keys of all segments and heads of several layers: moments, basis, and rotated Keys
(reference.compress) or coded ones (encode.py).

Three to five launches for as much as the scratch holds, no host sync. The eigenvectors come from
subspace iteration on the covariance, a fixed number of steps with modified Gram-Schmidt between
them, so equal Keys give equal bits. One basis is a chain of some hundred dependent steps on one
multiprocessor, whence several layers at a time: a layer alone would leave the GPU idle.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import accumulate
from typing import NamedTuple

import numpy as np
import torch
import triton

from . import coded
from .device import has_large_shared_memory
from .encode import SUMS, _add_errors, _encode, _extents
from .fit import _fit, _moments, _project
from .pools import CompressedPools
from .quantise import hadamard_block
from .upload import upload

MOMENT_ROWS = 512  # Keys summed by one program
PROJECT_ROWS = 64


class Segments(NamedTuple):
    """The segments of one extend batch, on the device. Row = index of a Key in the workspace.
    bounds [S, 3] int32: first row, end row, basis; ``parts`` [S + 1] int32: where its tiles of
    MOMENT_ROWS start; tiles [T, 2] int32: segment, first row of a tile; project_tiles the same in
    tiles of PROJECT_ROWS; ``lens``: Keys of each, on the CPU.
    """

    bounds: torch.Tensor
    parts: torch.Tensor
    tiles: torch.Tensor
    project_tiles: torch.Tensor
    lens: list[int]

    @classmethod
    def upload(cls, segments: list[tuple[int, int, int]], device: torch.device | str) -> Segments:
        """From (first row, end row, basis) of each segment, without waiting for the device."""

        def cut(rows: int) -> list[tuple[int, int]]:
            return [
                (i, row)
                for i, (first, end, _) in enumerate(segments)
                for row in range(first, end, rows)
            ]

        tiles, project_tiles = cut(MOMENT_ROWS), cut(PROJECT_ROWS)
        lens = [end - first for first, end, _ in segments]
        parts = [0, *accumulate(triton.cdiv(n, MOMENT_ROWS) for n in lens)]
        tables = [np.ravel(x).astype(np.int32) for x in (segments, parts, tiles, project_tiles)]
        flat = upload(np.concatenate(tables), device)
        bounds, starts, a, b = flat.split([len(x) for x in tables])
        return cls(bounds.view(-1, 3), starts, a.view(-1, 2), b.view(-1, 2), lens)


STEPS, CODED_STEPS = 8, 6  # what the head of a coded row lacks, its residual has
# Full-width Keys of images wait in a workspace until a group of layers is compressed at once.
WORKSPACE_BYTES = 96 << 20
# Moments and bases on their way: many short segments in many layers are done in groups that fit.
# Images of some thousand tokens take half of it for a whole workspace.
SCRATCH_BYTES = 96 << 20
# Of the iteration's products: 160 KiB of shared memory at head_dim 128, or 80 KiB and slower, as
# exact.
PRECISION, SMALL_PRECISION = "tf32x3", "ieee"


def layers_at_once(num_layers: int, layer_bytes: int) -> int:
    """How many layers to compress together when their Keys take ``layer_bytes`` each."""
    most = min(num_layers, max(1, WORKSPACE_BYTES // layer_bytes))
    return triton.cdiv(num_layers, triton.cdiv(num_layers, most))  # groups of about the same size


def start_vectors(head_dim: int, rank: int, device: torch.device | str) -> torch.Tensor:
    """What subspace iteration starts from: [head_dim, rank] fp32, normal, the same always."""
    return torch.randn(head_dim, rank, generator=torch.Generator().manual_seed(0)).to(device)


def _part_bytes(num_kv_heads: int, head_dim: int) -> int:
    """Scratch of MOMENT_ROWS Keys of a segment, in one layer."""
    padded = triton.next_power_of_2(head_dim)
    return 4 * num_kv_heads * (padded + 1) * padded


def _basis_bytes(num_kv_heads: int, head_dim: int, rank: int, itemsize: int) -> int:
    """Scratch of a segment in one layer beside its parts; whole fp32 words, as ranks are even."""
    return num_kv_heads * head_dim * rank * itemsize


def _tile_bytes(num_kv_heads: int, rank: int) -> int:
    """Scratch of PROJECT_ROWS Keys of a segment in one layer, where rows are coded."""
    return 4 * num_kv_heads * ((PROJECT_ROWS + 1) * _padded_rank(rank) + SUMS.value)


def _padded_rank(rank: int) -> int:
    """What products on the GPU take."""
    return max(16, triton.next_power_of_2(rank))


def key_bytes(num_tokens: int, num_kv_heads: int, head_dim: int, itemsize: int) -> int:
    """Bound of the workspace for the Keys of at most ``num_tokens`` image tokens: WORKSPACE_BYTES,
    unless one layer takes more."""
    return max(WORKSPACE_BYTES, num_tokens * num_kv_heads * head_dim * itemsize)


def scratch_bytes(
    num_tokens: int, num_kv_heads: int, head_dim: int, rank: int, itemsize: int, *, is_coded: bool
) -> int:
    """Bound of the scratch of segments with at most ``num_tokens`` Keys each: SCRATCH_BYTES, unless
    one of them in one layer takes more. Keys are coded, or of ``itemsize`` bytes a channel."""
    longest = triton.cdiv(num_tokens, MOMENT_ROWS) * _part_bytes(num_kv_heads, head_dim)
    longest += _basis_bytes(num_kv_heads, head_dim, rank, 4 if is_coded else itemsize)
    if is_coded:
        longest += triton.cdiv(num_tokens, PROJECT_ROWS) * _tile_bytes(num_kv_heads, rank)
    return max(SCRATCH_BYTES, longest)


def _groups(sizes: list[int], num_layers: int) -> Iterator[tuple[slice, slice]]:
    """Segments and layers to do at once, when segments take ``sizes`` bytes of scratch a layer."""
    layers_at_once = min(num_layers, max(1, SCRATCH_BYTES // max(sizes)))
    most = SCRATCH_BYTES // layers_at_once
    first = 0
    while first < len(sizes):
        end, taken = first, 0
        while end == first or (end < len(sizes) and taken + sizes[end] <= most):
            taken += sizes[end]
            end += 1
        for layer in range(0, num_layers, layers_at_once):
            yield slice(first, end), slice(layer, min(layer + layers_at_once, num_layers))
        first = end


def compress(
    k: torch.Tensor,
    slots: torch.Tensor,
    segments: Segments,
    pools: CompressedPools,
    start: torch.Tensor,
    weights: torch.Tensor | None = None,
    scratch: torch.Tensor | None = None,
    errors: torch.Tensor | None = None,
) -> None:
    """Fit a basis to each segment's Keys and write bases, means and rotated Keys to the pools,
    which are coded where the pools have a residual; Values are store's.

    k [L, n, H, D]: the Keys of all segments in L layers; slots [n] int, the visual slots of the n
    rows; ``start`` from ``start_vectors``; ``weights`` [L, S, H, D] fp32 scale the channels of the
    covariance (the basis `paper`).
    ``errors`` [L, S, H, 2] fp32: receives reference.key_errors of coded rows.
    ``scratch`` [*] fp32 is allocated where it is missing, or too small for one segment in one
    layer.
    """
    num_layers, _, num_kv_heads, head_dim = k.shape
    rank, is_coded = pools.z.shape[-1], pools.residual is not None
    part = _part_bytes(num_kv_heads, head_dim)
    basis = _basis_bytes(num_kv_heads, head_dim, rank, 4 if is_coded else pools.z.dtype.itemsize)
    tile = _tile_bytes(num_kv_heads, rank) if is_coded else 0
    sizes = [
        triton.cdiv(n, MOMENT_ROWS) * part + basis + triton.cdiv(n, PROJECT_ROWS) * tile
        for n in segments.lens
    ]
    for group, layers in _groups(sizes, num_layers):
        written = CompressedPools._make(
            x[layers] if isinstance(x, torch.Tensor) else x for x in pools
        )
        own_weights, own_errors = (None if x is None else x[layers] for x in (weights, errors))
        scratch = _compress(
            k[layers], slots, segments, group, written, start, own_weights, scratch, own_errors
        )


def _compress(
    k: torch.Tensor,
    slots: torch.Tensor,
    segments: Segments,
    group: slice,
    pools: CompressedPools,
    start: torch.Tensor,
    weights: torch.Tensor | None,
    scratch: torch.Tensor | None,
    errors: torch.Tensor | None,
) -> torch.Tensor:
    """``compress`` of the segments ``group``. Returns the scratch, for the next group."""
    num_layers, _, num_kv_heads, head_dim = k.shape
    z, query_map, mean, first_visual_slot = pools[:4]
    rank, is_coded = z.shape[-1], pools.residual is not None
    map_dtype = torch.float32 if is_coded else z.dtype
    sizes = dict(H=num_kv_heads, D=head_dim, DP=triton.next_power_of_2(head_dim))
    ranks = dict(R=rank, RP=_padded_rank(rank))
    first_part, num_parts = _tiles(segments.lens, group, MOMENT_ROWS)
    first_tile, num_tiles = _tiles(segments.lens, group, PROJECT_ROWS)
    tiles = segments.tiles[first_part : first_part + num_parts]
    project_tiles = segments.project_tiles[first_tile : first_tile + num_tiles]
    num_segments, all_segments = group.stop - group.start, len(segments.lens)

    of_tile = [ranks["RP"], PROJECT_ROWS * ranks["RP"], SUMS.value] if is_coded else []
    words = [num_parts * sizes["DP"] * n for n in (sizes["DP"], 1)]
    words.append(num_segments * head_dim * rank * map_dtype.itemsize // 4)
    words += [num_tiles * n for n in of_tile]
    scratch, parts = _split(scratch, [num_layers * num_kv_heads * n for n in words], k.device)
    covariance, shifted_sum, key_map, *of_codes = parts
    key_map = key_map.view(map_dtype)
    _moments[(num_parts, num_kv_heads, num_layers)](
        k, segments.bounds, tiles, covariance, shifted_sum, *_strides(k),
        **sizes, ROWS=MOMENT_ROWS, BLOCK=64, num_warps=4,
    )  # fmt: skip
    _fit[(num_segments, num_kv_heads, num_layers)](
        k, segments.bounds, segments.parts, covariance, shifted_sum,
        start if weights is None else weights, start, query_map, mean, key_map, group.start,
        all_segments, first_part, num_parts, *_strides(k, query_map, mean),
        **sizes, **ranks, WEIGHTED=weights is not None, STEPS=CODED_STEPS if is_coded else STEPS,
        PRECISION=_precision(k.device), CODED=is_coded, num_warps=8,
    )  # fmt: skip
    if is_coded:
        _encode_keys(
            k, slots, segments.bounds, project_tiles, group, pools, key_map, of_codes, errors,
            sizes | ranks,
        )  # fmt: skip
    else:
        _project[num_tiles, num_kv_heads, num_layers](
            k, slots, segments.bounds, project_tiles, key_map, mean, z, first_visual_slot,
            group.start, num_segments, *_strides(k, mean, z),
            **sizes, **ranks, ROWS=PROJECT_ROWS, num_warps=4,
        )  # fmt: skip
    return scratch


def _split(
    scratch: torch.Tensor | None, words: list[int], device: torch.device
) -> tuple[torch.Tensor, tuple[torch.Tensor, ...]]:
    """``scratch``, or a larger one, and parts of it of so many ``words``."""
    if scratch is None or len(scratch) < sum(words):
        scratch = torch.empty(sum(words), dtype=torch.float32, device=device)
    return scratch, scratch[: sum(words)].split(words)


def _encode_keys(
    k: torch.Tensor,
    slots: torch.Tensor,
    bounds: torch.Tensor,
    tiles: torch.Tensor,
    group: slice,
    pools: CompressedPools,
    key_map: torch.Tensor,
    parts: list[torch.Tensor],
    errors: torch.Tensor | None,
    constants: dict[str, int],
) -> None:
    """Coded rows of ``tiles``, and their ``errors``, when bases and means are there. ``parts``: of
    the scratch."""
    num_layers, _, num_kv_heads, head_dim = k.shape
    z, query_map, mean, first_visual_slot, residual, steps = pools
    assert residual is not None and steps is not None
    extents, coordinates, sums = parts
    num_segments, grid = group.stop - group.start, (len(tiles), num_kv_heads, num_layers)
    product_dtype = torch.float32 if k.dtype == torch.float32 else torch.float16
    signs = coded.sign_matrix(head_dim, product_dtype, k.device)
    part, bits = head_dim // coded.PARTS, 8 * residual.shape[-1] // head_dim
    _extents[grid](
        k, bounds, tiles, key_map, mean, extents, coordinates, group.start, num_segments,
        *_strides(k, mean), **constants, ROWS=PROJECT_ROWS, PRECISION=_precision(k.device),
        num_warps=4,
    )  # fmt: skip
    _encode[grid](
        k, slots, bounds, tiles, key_map, mean, extents, coordinates, signs, query_map, z, residual,
        steps, sums, first_visual_slot, group.start, num_segments,
        *_strides(k, mean, query_map, z, residual, steps),
        **constants, ROWS=PROJECT_ROWS, BITS=bits, PART=part,
        PART_PADDED=max(16, triton.next_power_of_2(part)), TURN=hadamard_block(head_dim),
        SHARES=coded.RANGES[bits], HEAD_STEPS=steps.shape[-1], SUMMED=errors is not None,
        num_warps=4,
    )  # fmt: skip
    if errors is not None:
        _add_errors[(num_segments, num_kv_heads, num_layers)](
            tiles, sums, errors, group.start, len(tiles), errors.stride(0), errors.stride(1),
            H=num_kv_heads, TILES=256, num_warps=4,
        )  # fmt: skip


def _strides(*tensors: torch.Tensor) -> list[int]:
    """Of a row and of a layer of each [L, n, ...]."""
    return [x.stride(i) for x in tensors for i in (1, 0)]


def _precision(device: torch.device) -> str:
    return PRECISION if has_large_shared_memory(device) else SMALL_PRECISION


def _tiles(lens: list[int], group: slice, rows: int) -> tuple[int, int]:
    """First tile of ``rows`` Keys of the segments ``group``, and how many they have."""
    before, own = lens[: group.start], lens[group]
    return sum(triton.cdiv(n, rows) for n in before), sum(triton.cdiv(n, rows) for n in own)
