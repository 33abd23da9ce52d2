"""Copy slabs between the device and pinned host memory by the GPU's copy engines: a call a layer
for slabs wherever they lie (cudaMemcpyBatchAsync).

A kernel that writes to host memory stalls the SMs that it shares with a decode step, which then
takes 3 to 10 times as long; scripts/bench/bench_transfers.py compares the ways.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

SOURCE_ORDER_STREAM = 1  # cudaMemcpySrcAccessOrderStream: sources are read in stream order
LEAST_CUDA = (12, 8)


class _Attributes(ctypes.Structure):
    """cudaMemcpyAttributes, without hints of location."""

    _fields_ = (
        ("source_order", ctypes.c_int),
        ("hints", ctypes.c_int * 4),
        ("flags", ctypes.c_uint),
    )


def copy_slabs(
    source: torch.Tensor,
    target: torch.Tensor,
    read: np.ndarray,
    written: np.ndarray,
    after_layer: Callable[[int], None] = lambda layer: None,
) -> None:
    """target[:, written] = source[:, read], on the current stream, which must not be the default
    one; ``after_layer`` is called when a layer's copies are submitted.

    source [layers, S, words] and target [layers, T, words] of one dtype, slabs contiguous; each on
    the device or in pinned host memory. read and written [n]; no target may be there twice.
    """
    layers, _, words = source.shape
    if target.shape[-1] != words or target.dtype != source.dtype or len(target) != layers:
        raise ValueError(
            f"slabs of one size and number of layers are copied, got {source.shape} and "
            f"{target.shape}"
        )
    if not len(read):
        return
    read, written, lengths = _runs(read, written)
    sources, targets = _addresses(source, read), _addresses(target, written)
    sizes = (lengths * (words * source.itemsize)).astype(np.uint64)
    attributes, first_copy = _Attributes(SOURCE_ORDER_STREAM), ctypes.c_size_t(0)
    options = ctypes.byref(attributes), ctypes.byref(first_copy), ctypes.c_size_t(1)
    stream = ctypes.c_void_p(torch.cuda.current_stream().cuda_stream)
    copy, count = _batch_copy(), ctypes.c_size_t(len(sizes))
    for layer in range(layers):
        arrays = (ctypes.c_void_p(x.ctypes.data) for x in (targets[layer], sources[layer], sizes))
        if status := copy(*arrays, count, *options, stream):
            raise RuntimeError(
                f"cudaMemcpyBatchAsync of {len(sizes)} copies failed: CUDA error {status}"
            )
        after_layer(layer)


def _runs(read: np.ndarray, written: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """First slabs and lengths of what follows each other in both memories: submitting a copy takes
    the CPU 1 us, which for slabs one by one is longer than the copies take."""
    order = np.argsort(read)
    read, written = read[order], written[order]
    is_first = np.ones(len(read), dtype=bool)
    is_first[1:] = (np.diff(read) != 1) | (np.diff(written) != 1)
    starts = np.flatnonzero(is_first)
    return read[starts], written[starts], np.diff(starts, append=len(read))


def _addresses(slabs: torch.Tensor, ids: np.ndarray) -> np.ndarray:
    """[layers, n] uint64, of slabs [layers, S, words]."""
    of_layer, of_slab = (stride * slabs.itemsize for stride in slabs.stride()[:2])
    layers = np.arange(len(slabs), dtype=np.int64)[:, None] * of_layer
    return (slabs.data_ptr() + layers + ids.astype(np.int64) * of_slab).astype(np.uint64)


@functools.cache
def _batch_copy() -> Callable[..., int]:
    """cudaMemcpyBatchAsync of the runtime that torch has loaded, as CUDA 13 declares it."""
    version = tuple(map(int, (torch.version.cuda or "0.0").split(".")))
    if version < LEAST_CUDA:
        raise RuntimeError(
            f"RotateK's --enable-hierarchical-cache needs CUDA {LEAST_CUDA[0]}.{LEAST_CUDA[1]} or "
            f"newer, got torch for CUDA {torch.version.cuda}"
        )
    call = ctypes.CDLL(f"libcudart.so.{version[0]}").cudaMemcpyBatchAsync
    if version >= (13, 0):
        return call

    def with_index_of_failure(*arguments: Any) -> int:  # CUDA 12 has one argument more
        *others, stream = arguments
        return call(*others, ctypes.byref(ctypes.c_size_t()), stream)

    return with_index_of_failure
