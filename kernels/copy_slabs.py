"""Copy slabs between the device and pinned host memory (reference.copy_slabs): one launch for slabs
wherever they lie."""

from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl

from .launch import Launch

# Not measured yet. Programs: enough reads in flight to fill the link, few enough to leave a decode
# step its SMs.
PROGRAMS, BLOCK, NUM_WARPS = 32, 2048, 8


@triton.jit(do_not_specialize=["slabs", "num_slabs", "num_layers"])
def _copy_slabs(
    source, target, slabs, num_slabs, num_layers, stride_source, stride_target,
    WORDS: tl.constexpr, BLOCKS: tl.constexpr, BLOCK: tl.constexpr, PROGRAMS: tl.constexpr,
):  # fmt: skip
    """A block of a slab after the other, layer by layer."""
    for at in range(tl.program_id(0), num_layers * num_slabs * BLOCKS, PROGRAMS):
        block, slab = at % BLOCKS, at // BLOCKS % num_slabs
        layer = (at // BLOCKS // num_slabs).to(tl.int64)
        read = tl.load(slabs + slab).to(tl.int64)
        written = tl.load(slabs + num_slabs + slab).to(tl.int64)
        word = block * BLOCK + tl.arange(0, BLOCK)
        values = tl.load(source + layer * stride_source + read * WORDS + word, mask=word < WORDS)
        tl.store(target + layer * stride_target + written * WORDS + word, values, mask=word < WORDS)


def copy_slabs(source: torch.Tensor, target: torch.Tensor, slabs: torch.Tensor) -> None:
    """target[:, slabs[1]] = source[:, slabs[0]], on the current stream.

    source [layers, S, words] and target [layers, T, words] of one integer dtype, slabs contiguous;
    each on the device or in pinned host memory. slabs [2, n] int32 on the device; no target may be
    there twice.
    """
    words = source.shape[-1]
    if target.shape[-1] != words or target.dtype != source.dtype or len(source) != len(target):
        raise ValueError(
            f"slabs of one size and number of layers are copied, got {source.shape} and "
            f"{target.shape}"
        )
    num_slabs, strides = slabs.shape[1], (source.stride(0), target.stride(0))
    if num_slabs:
        launch = _launch(words, source.dtype, strides)
        launch((PROGRAMS, 1, 1), source, target, slabs, num_slabs, len(source), *strides)


@functools.cache
def _launch(words: int, dtype: torch.dtype, strides: tuple[int, int]) -> Launch:
    """What is not used here tells compiled variants apart."""
    block = min(BLOCK, triton.next_power_of_2(words))
    constants = dict(WORDS=words, BLOCKS=triton.cdiv(words, block), BLOCK=block, PROGRAMS=PROGRAMS)
    return Launch(_copy_slabs, 3, constants, num_warps=NUM_WARPS)
