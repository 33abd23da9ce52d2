"""Compression of a prefill's images on a GPU: their full-width Keys wait in a workspace until a
group of layers is compressed at once (kernels/compress.py)."""

from __future__ import annotations

from collections import deque
from typing import NamedTuple

import torch

from ..basis import paper
from ..kernels import compress, reference
from ..kernels.pools import LayerPools
from ..kernels.store import store
from ..memory.prefill import PrefillLayout
from .backend import RotateKBackend


class Images(NamedTuple):
    """The segments of one forward, and the Keys of a group of its layers.

    slots [n] int32 of the n visual tokens; rows [tokens] int64: which of them a token of the batch
    is; windows: the query rows that each segment's basis may look at; keys [group, n, H, D]; errors
    [L, S, H, 2] fp32 of coded Keys, all layers.
    """

    segments: compress.Segments
    slots: torch.Tensor
    rows: torch.Tensor
    windows: list[slice]
    keys: torch.Tensor
    weights: list[torch.Tensor]
    errors: torch.Tensor | None
    prefill: PrefillLayout


class Errors(NamedTuple):
    """Of a prefill's segments, on their way to the CPU: [S, 2], there after ``copied``."""

    of_segments: torch.Tensor
    copied: torch.cuda.Event
    prefill: PrefillLayout


class ImageCompressor:
    """``keys``, ``scratch``: what a forward works in (compress.py). Forwards follow each other on
    one stream, so they share it."""

    def __init__(self, backend: RotateKBackend) -> None:
        self._backend = backend
        self._pool = pool = backend.token_to_kv_pool
        device = backend.device
        self._start_vectors = compress.start_vectors(pool.head_dim, backend.rows.rank, device)
        num_keys = compress.WORKSPACE_BYTES // pool.row_dtype.itemsize
        self.keys = torch.empty(num_keys, dtype=pool.row_dtype, device=device)
        self.scratch = torch.empty(compress.SCRATCH_BYTES // 4, dtype=torch.float32, device=device)
        self._timers: deque[tuple[torch.cuda.Event, torch.cuda.Event]] = deque()
        self._errors: deque[Errors] = deque()

    def warm_up(self, keys: torch.Tensor) -> None:
        """Compress ``keys`` [1, 1, H, D] into the first visual row, which nobody reads yet."""
        if self._backend.basis == "think":
            return
        pool, num_heads = self._pool, keys.shape[2]
        weights = errors = None
        if self._backend.basis == "paper":
            weights = torch.ones_like(keys, dtype=torch.float32)
        if self._backend.rows.has_residual:
            errors = keys.new_empty(1, 1, num_heads, 2, dtype=torch.float32)
        first = pool.layout.first_visual_slot
        compress.compress(
            keys,
            torch.tensor([first], dtype=torch.int32, device=keys.device),
            compress.Segments.upload([(0, 1, 0)], keys.device),
            pool.compressed(slice(0, 1)),
            self._start_vectors,
            weights,
            self.scratch,
            errors,
        )

    def prepare(self, prefill: PrefillLayout, out_cache_loc: torch.Tensor) -> Images:
        """What ``store_layer`` needs for the forward that is about to run, whose slots it binds to
        their bases: here, on the forward stream, never when they are allocated."""
        pool = self._pool
        bounds, end = [], 0
        for segment in prefill.segments:
            bounds.append((end, end + len(segment.slots), segment.basis))
            end += len(segment.slots)
        slots = self._backend.bind([(each.slots, each.basis) for each in prefill.segments])
        layer_bytes = end * pool.head_num * pool.head_dim * pool.row_dtype.itemsize
        group = compress.layers_at_once(pool.layer_num, layer_bytes)
        errors = None
        if self._backend.rows.has_residual:
            size = pool.layer_num, len(bounds), pool.head_num, 2
            errors = torch.empty(size, dtype=torch.float32, device=self._backend.device)
        return Images(
            compress.Segments.upload(bounds, self._backend.device),
            slots,
            (out_cache_loc >= pool.layout.first_visual_slot).cumsum(0) - 1,
            [slice(*segment.window) for segment in prefill.segments],
            self.key_workspace(group, end),
            [],
            errors,
            prefill,
        )

    def key_workspace(self, num_layers: int, num_tokens: int) -> torch.Tensor:
        """[num_layers, num_tokens, H, D], of what is allocated unless one layer alone is larger."""
        pool = self._pool
        size = num_layers * num_tokens * pool.head_num * pool.head_dim
        keys = self.keys if size <= len(self.keys) else self.keys.new_empty(size)
        return keys[:size].view(num_layers, num_tokens, pool.head_num, pool.head_dim)

    def store_layer(
        self,
        images: Images,
        index: int,
        pools: LayerPools,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        out_cache_loc: torch.Tensor,
    ) -> None:
        """Store a layer; at the end of a group, or of the model, compress the group's Keys."""
        pool = self._pool
        group = len(images.keys)
        at = index % group
        store(k, v, out_cache_loc, pools, images.keys[at], images.rows)
        if self._backend.basis == "paper":
            windows = [paper.channel_weights(q[window], pool.head_num) for window in images.windows]
            images.weights.append(torch.stack(windows))
        elif self._backend.basis == "think":
            self._select_channels(images, index, pools, q)
            return
        if at + 1 < group and index + 1 < pool.layer_num:
            return
        timer = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        timer[0].record()
        compress.compress(
            images.keys[: at + 1],
            images.slots,
            images.segments,
            pool.compressed(slice(index - at, index + 1)),
            self._start_vectors,
            torch.stack(images.weights) if images.weights else None,
            self.scratch,
            None if images.errors is None else images.errors[index - at : index + 1],
        )
        timer[1].record()
        images.weights.clear()
        self._count_time(timer)
        if images.errors is not None and index + 1 == pool.layer_num:
            self._send_errors(images.errors, images.prefill)

    def _select_channels(
        self, images: Images, index: int, pools: LayerPools, q: torch.Tensor
    ) -> None:
        """The baseline `think`, in plain torch."""
        for (first, end, basis), window in zip(
            images.segments.bounds.tolist(), images.windows, strict=True
        ):
            keys = images.keys[index % len(images.keys), first:end]
            fitted = self._backend.fit(keys, q[window], self._backend.rows.rank)
            reference.store_keys(
                pools, images.slots[first:end] - len(pools.k_text), basis, fitted, keys
            )

    def _send_errors(self, errors: torch.Tensor, prefill: PrefillLayout) -> None:
        """``errors``: as Images has them."""
        means = self._backend.over_ranks(errors.mean((0, 2)))
        of_segments = torch.empty(means.shape, dtype=means.dtype, pin_memory=True)
        of_segments.copy_(means, non_blocking=True)
        copied = torch.cuda.Event()
        copied.record()
        self._errors.append(Errors(of_segments, copied, prefill))
        self.settle_errors(wait=False)

    def settle_errors(self, *, wait: bool = True) -> None:
        """Count the errors that have come, or ``wait`` for all: a limit must act at the same
        request on all ranks."""
        while self._errors and (wait or self._errors[0].copied.query()):
            errors = self._errors.popleft()
            errors.copied.synchronize()
            self._backend.count_errors(errors.of_segments, errors.prefill.segments)

    def _count_time(self, timer: tuple[torch.cuda.Event, torch.cuda.Event]) -> None:
        """Add up the GPU time of compressions that are done, without waiting for any."""
        self._timers.append(timer)
        while self._timers and self._timers[0][1].query():
            start, end = self._timers.popleft()
            self._backend.stats.compress_seconds += start.elapsed_time(end) / 1000
