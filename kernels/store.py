"""Write new Keys and Values to their slots (reference.store)."""

from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl

from .coded import PARTS
from .device import has_overlap
from .launch import Launch
from .pools import LayerPools
from .quantise import _codes, _step_and_zero, _stored


@triton.jit(do_not_specialize=["slots", "workspace_rows", "first_visual", "k_scale", "v_scale"])
def _store(
    k, v, workspace, slots, workspace_rows, k_text, v_text, v_visual, value_steps, first_visual,
    k_scale, v_scale, stride_k, stride_v, stride_kt, stride_vt, stride_vv, stride_steps,
    KEYS: tl.constexpr, VALUES: tl.constexpr, BLOCK: tl.constexpr, HEADS: tl.constexpr,
    HEADS_PADDED: tl.constexpr, BITS: tl.constexpr, PART: tl.constexpr, PART_PADDED: tl.constexpr,
    HEAD_STEPS: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """One program a token. BITS: of a visual Value; PART: its words a head, where they are
    codes."""
    if OVERLAP:
        tl.extra.cuda.gdc_launch_dependents()
    token = tl.program_id(0).to(tl.int64)
    slot = tl.load(slots + token).to(tl.int64)
    channel = tl.arange(0, BLOCK)
    key = tl.load(k + token * stride_k + channel, mask=channel < KEYS)
    value_at = v + token * stride_v
    if slot < first_visual:
        value = tl.load(value_at + channel, mask=channel < VALUES)
        text_key, text_value = _text(key, k_scale, k_text), _text(value, v_scale, v_text)
        tl.store(k_text + slot * stride_kt + channel, text_key, mask=channel < KEYS)
        tl.store(v_text + slot * stride_vt + channel, text_value, mask=channel < VALUES)
    else:
        row = slot - first_visual
        key_at = workspace + tl.load(workspace_rows + token) * KEYS + channel
        tl.store(key_at, key.to(workspace.dtype.element_ty), mask=channel < KEYS)
        if BITS >= 8:
            value = tl.load(value_at + channel, mask=channel < VALUES)
            at = v_visual + row * stride_vv + channel
            tl.store(at, _stored(value, v_visual.dtype.element_ty), mask=channel < VALUES)
        else:
            _store_codes(
                value_at, v_visual + row * stride_vv, value_steps + row * stride_steps,
                HEADS, HEADS_PADDED, BITS, PART, PART_PADDED, HEAD_STEPS,
            )  # fmt: skip


@triton.jit
def _text(x, scale, pool):
    """x as text rows have it."""
    if pool.dtype.element_ty.is_fp8():
        x = tl.div_rn(x.to(tl.float32), tl.zeros_like(x).to(tl.float32) + scale)
    return _stored(x, pool.dtype.element_ty)


@triton.jit
def _store_codes(
    values, packed, steps,
    HEADS: tl.constexpr, HEADS_PADDED: tl.constexpr, BITS: tl.constexpr, PART: tl.constexpr,
    PART_PADDED: tl.constexpr, HEAD_STEPS: tl.constexpr,
):  # fmt: skip
    """coded.quantise of one token's Values. A part of a head is the channels in the same bits of
    its words."""
    head, word = tl.arange(0, HEADS_PADDED), tl.arange(0, PART_PADDED)
    is_head = head < HEADS
    inside = is_head[:, None] & (word < PART)[None, :]
    at = values + (head * 4 * PART)[:, None] + word[None, :]
    codes = tl.zeros([HEADS_PADDED, PART_PADDED], tl.int32)
    for half in tl.static_range(2):
        low, high = tl.zeros([HEADS_PADDED], tl.float32), tl.zeros([HEADS_PADDED], tl.float32)
        for part in tl.static_range(2 * half, 2 * half + 2):
            x = tl.load(at + part * PART, mask=inside, other=0.0).to(tl.float32)
            low, high = tl.minimum(low, tl.min(x, 1)), tl.maximum(high, tl.max(x, 1))
        step_code, zero_code, step, zero = _step_and_zero(low, high, 1.0, BITS)
        for part in tl.static_range(2 * half, 2 * half + 2):
            x = tl.load(at + part * PART, mask=inside, other=0.0).to(tl.float32)
            codes |= _codes(x, step[:, None], zero[:, None], BITS).to(tl.int32) << (part * BITS)
        tl.store(steps + head * HEAD_STEPS + 2 * half, step_code.to(tl.uint8), mask=is_head)
        tl.store(steps + head * HEAD_STEPS + 2 * half + 1, zero_code.to(tl.uint8), mask=is_head)
    if BITS == 4:
        packed = packed.to(tl.pointer_type(tl.int16))
    tl.store(
        packed + (head * PART)[:, None] + word[None, :],
        codes.to(packed.dtype.element_ty),
        mask=inside,
    )


def store(
    k: torch.Tensor,
    v: torch.Tensor,
    slots: torch.Tensor,
    pools: LayerPools,
    workspace: torch.Tensor | None = None,
    workspace_rows: torch.Tensor | None = None,
) -> None:
    """Write k [n, H, D] and v [n, H, Dv] to ``slots`` [n] int; the Keys of visual slots go to the
    workspace instead.

    workspace [visual tokens, H, D] contiguous, workspace_rows [n] int64: the row of each visual
    token. Both are needed only when there is a visual slot. Rows of k and v may be strided; their
    last two dimensions are contiguous. Values of visual slots are written in the format of their
    rows, and so are text rows: divided by the scales where in FP8.
    """
    if not len(slots):
        return
    if workspace is None or workspace_rows is None:
        workspace, workspace_rows = k, slots  # never used
    has_codes = pools.value_bits < 8
    value_steps = pools.visual.value_steps if has_codes else pools.v_visual  # else never used
    k_text, v_text, _, v_visual, *_, steps = pools.strides
    strides = (k.stride(0), v.stride(0), k_text, v_text, v_visual, steps)
    dtypes = (k.dtype, slots.dtype, workspace_rows.dtype, pools.k_text.dtype, pools.v_visual.dtype)
    head_steps = pools.steps.shape[-1] if has_codes and pools.steps is not None else 0
    launch = _launch(
        k.shape[1:], v.shape[1:], pools.value_bits, head_steps, dtypes, strides, k.device
    )
    launch(
        (len(slots), 1, 1),
        k, v, workspace, slots, workspace_rows, pools.k_text, pools.v_text, pools.v_visual,
        value_steps, len(pools.k_text), float(pools.k_scale), float(pools.v_scale), *strides,
    )  # fmt: skip


@functools.cache
def _launch(
    key_shape: torch.Size,
    value_shape: torch.Size,
    value_bits: int,
    head_steps: int,
    dtypes: tuple[torch.dtype, ...],
    strides: tuple[int, ...],
    device: torch.device,
) -> Launch:
    """What is not used here tells compiled variants apart."""
    power = triton.next_power_of_2
    keys, values, heads = key_shape.numel(), value_shape.numel(), value_shape[0]
    part = value_shape[1] // PARTS if value_bits < 8 else 1
    constants = dict(
        KEYS=keys, VALUES=values, BLOCK=power(max(keys, values)), HEADS=heads,
        HEADS_PADDED=power(heads), BITS=value_bits, PART=part, PART_PADDED=power(part),
        HEAD_STEPS=head_steps, OVERLAP=has_overlap(device),
    )  # fmt: skip
    return Launch(_store, 3, constants, num_warps=4)
