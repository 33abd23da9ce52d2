"""Variants of kernels over visual rows of one format."""

from __future__ import annotations

import functools
import math
from typing import NamedTuple

import torch

from .pools import LayerPools
from .row_format import STEP_BYTES


class Form(NamedTuple):
    """What variants for formats of visual rows differ in. ``head_steps``: bytes a head; ``unit``:
    bytes that all strides of visual rows are multiples of, ``z_unit`` and ``v_unit`` in elements.
    Triton takes a stride that is no multiple of 16 for an odd one, and would load rows byte by
    byte."""

    key_bits: int = 16
    value_bits: int = 16
    head_steps: int = 0
    z_unit: int = 1
    v_unit: int = 1
    unit: int = 1


PLAIN = Form()


def form_of(pools: LayerPools) -> Form:
    if not pools.is_coded:
        return PLAIN
    head_steps = 0 if pools.steps is None else pools.steps.shape[-1]
    return _form(
        pools.key_bits,
        pools.value_bits,
        head_steps,
        pools.strides,
        pools.z.dtype,
        pools.v_visual.dtype,
    )


@functools.cache
def _form(
    key_bits: int,
    value_bits: int,
    head_steps: int,
    strides: tuple[int, ...],
    z_dtype: torch.dtype,
    v_dtype: torch.dtype,
) -> Form:
    itemsizes = z_dtype.itemsize, v_dtype.itemsize
    _, _, z, v_visual, *_, residual, steps = strides
    unit = math.gcd(16, z * itemsizes[0], v_visual * itemsizes[1], residual, steps)
    if unit < STEP_BYTES:
        raise ValueError(
            f"visual rows must be multiples of {STEP_BYTES} bytes apart, got strides that {unit} "
            "divides"
        )
    z_unit, v_unit = (unit // size for size in itemsizes)
    return Form(key_bits, value_bits, head_steps, z_unit, v_unit, unit)
