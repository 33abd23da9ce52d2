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
    source: torch.Tensor, target: torch.Tensor, read: np.ndarray, written: np.ndarray
) -> None:
    """target[:, written] = source[:, read], on the current stream, which must not be the default
    one.

    source [layers, S, words] and target [layers, T, words] of one dtype, slabs contiguous; each on
    the device or in pinned host memory. read and written [n]; no target may be there twice.
    """
    layers, _, words = source.shape
    if target.shape[-1] != words or target.dtype != source.dtype or len(target) != layers:
        raise ValueError(
            f"slabs of one size and number of layers are copied, got {source.shape} and "
            f"{target.shape}"
        )
    if not (count := len(read)):
        return
    sizes = np.full(count, words * source.itemsize, dtype=np.uint64)
    attributes, first_copy = _Attributes(SOURCE_ORDER_STREAM), ctypes.c_size_t(0)
    stream = ctypes.c_void_p(torch.cuda.current_stream().cuda_stream)
    for layer in range(layers):
        addresses = _addresses(target[layer], written), _addresses(source[layer], read)
        targets, sources, lengths = (ctypes.c_void_p(x.ctypes.data) for x in (*addresses, sizes))
        status = _batch_copy()(
            *(targets, sources, lengths, ctypes.c_size_t(count)),
            *(ctypes.byref(attributes), ctypes.byref(first_copy), ctypes.c_size_t(1), stream),
        )
        if status:
            raise RuntimeError(f"cudaMemcpyBatchAsync of {count} slabs failed: CUDA error {status}")


def _addresses(slabs: torch.Tensor, ids: np.ndarray) -> np.ndarray:
    """[n] uint64, of slabs [S, words]."""
    size = slabs.stride(0) * slabs.itemsize
    return (slabs.data_ptr() + ids.astype(np.int64) * size).astype(np.uint64)


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
