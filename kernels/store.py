"""Write new Keys and Values to their slots (reference.store)."""

from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl

from .attend import has_overlap
from .launch import Launch
from .reference import LayerPools


@triton.jit(do_not_specialize=["slots", "workspace_rows", "first_visual"])
def _store(
    k, v, workspace, slots, workspace_rows, k_text, v_text, v_visual, first_visual,
    stride_k, stride_v, stride_kt, stride_vt, stride_vv,
    KEYS: tl.constexpr, VALUES: tl.constexpr, BLOCK: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """One program a token."""
    if OVERLAP:
        tl.extra.cuda.gdc_launch_dependents()
    token = tl.program_id(0).to(tl.int64)
    slot = tl.load(slots + token).to(tl.int64)
    channel = tl.arange(0, BLOCK)
    if slot < first_visual:
        key_at = k_text + slot * stride_kt
        value_at = v_text + slot * stride_vt
    else:
        key_at = workspace + tl.load(workspace_rows + token) * KEYS
        value_at = v_visual + (slot - first_visual) * stride_vv
    key = tl.load(k + token * stride_k + channel, mask=channel < KEYS)
    tl.store(key_at + channel, key.to(k_text.dtype.element_ty), mask=channel < KEYS)
    value = tl.load(v + token * stride_v + channel, mask=channel < VALUES)
    tl.store(value_at + channel, value.to(v_text.dtype.element_ty), mask=channel < VALUES)


def store(
    k: torch.Tensor,
    v: torch.Tensor,
    slots: torch.Tensor,
    pools: LayerPools,
    workspace: torch.Tensor | None = None,
    workspace_rows: torch.Tensor | None = None,
) -> None:
    """Write k [n, H, D] and v [n, H, Dv] to ``slots`` [n] int; the Keys of visual slots go to the workspace instead.

    workspace [visual tokens, H, D] contiguous, workspace_rows [n] int64: the row of each visual token. Both are needed
    only when there is a visual slot. Rows of k and v may be strided; their last two dimensions are contiguous.
    """
    if not len(slots):
        return
    if workspace is None:
        workspace, workspace_rows = k, slots  # never used
    strides = (
        k.stride(0), v.stride(0), pools.k_text.stride(0), pools.v_text.stride(0), pools.v_visual.stride(0),
    )  # fmt: skip
    dtypes = (k.dtype, slots.dtype, workspace_rows.dtype)
    launch = _launch(k.shape[1] * k.shape[2], v.shape[1] * v.shape[2], dtypes, strides, k.device)
    launch(
        (len(slots), 1, 1),
        k, v, workspace, slots, workspace_rows, pools.k_text, pools.v_text, pools.v_visual, len(pools.k_text),
        *strides,
    )  # fmt: skip


@functools.cache
def _launch(keys: int, values: int, dtypes, strides, device: torch.device) -> Launch:
    """What is not used here tells compiled variants apart."""
    block = triton.next_power_of_2(max(keys, values))
    constants = dict(KEYS=keys, VALUES=values, BLOCK=block, OVERLAP=has_overlap(device))
    return Launch(_store, 3, constants, num_warps=4)
