"""The prefix and the new tokens of a prefill side by side at full width, for a stock attention
kernel (reference.expand).

A visual token's Key becomes P_q z + mean, and its residual turned back where it has one: its
product with a query is the score that the narrow row gives. The tokens of a request keep the
partition's order, text before images: all of a prefix is seen by all new tokens, so its order is
free.
"""

from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl

from . import coded
from .blocks import _dot
from .forms import Form, form_of
from .launch import Launch
from .partition import Partition
from .pools import LayerPools
from .quantise import _steps_and_zeros, _words, hadamard_block

PARTS = tl.constexpr(coded.PARTS)
NO_BASIS = tl.constexpr(2**31 - 1)
BLOCK = 32  # tokens that one program writes, of one KV head
# New tokens a request from which on expanding its prefix is faster than attending over the rows.
# Measured on an H100 behind 1 and 8 prefixes of 3,136 tokens.
FROM_TOKENS, CODED_FROM_TOKENS = 64, 18


def is_faster(extend_lens: list[int], prefix_lens: list[int], is_coded: bool) -> bool:
    """Whether to expand for ``extend_lens`` new tokens: rows are read, and codes taken apart, again
    for every few."""
    tokens = CODED_FROM_TOKENS if is_coded else FROM_TOKENS
    work = sum(n * prefix for n, prefix in zip(extend_lens, prefix_lens, strict=True))
    return work >= tokens * sum(prefix_lens)


@triton.jit(
    do_not_specialize=["req_pool_indices", "prefix_lens", "kv_indptr", "q_indptr", "k_new", "v_new"]
)
def _expand(
    k_out, v_out, k_new, v_new, req_pool_indices, prefix_lens, kv_indptr, q_indptr,
    slots, num_visual, prefix_visual, slot_to_basis, k_text, v_text, z, v_visual, query_map, mean,
    residual, steps, signs, k_scale, v_scale, width, stride_out_k, stride_out_v, stride_k, stride_v,
    stride_kt, stride_vt, stride_z, stride_vv, stride_map, stride_mean, stride_residual,
    stride_steps,
    D: tl.constexpr, DP: tl.constexpr, R: tl.constexpr, RP: tl.constexpr, V: tl.constexpr,
    VP: tl.constexpr, KEY_BITS: tl.constexpr, VALUE_BITS: tl.constexpr, HEAD_STEPS: tl.constexpr,
    TURN: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One program a block of tokens, KV head and request, and one more for its Values."""
    head, request = tl.program_id(1) // 2, tl.program_id(2)
    out = tl.load(kv_indptr + request).to(tl.int64)
    length = tl.load(kv_indptr + request + 1) - out
    token = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    if tl.program_id(0) * BLOCK >= length:
        return
    index = tl.load(req_pool_indices + request).to(tl.int64)
    prefix = tl.load(prefix_lens + request).to(tl.int32)
    text = prefix - tl.load(prefix_visual + index)
    visual_start = width - tl.load(num_visual + index)
    new_row = (tl.load(q_indptr + request) + token - prefix).to(tl.int64)
    is_text, is_visual = token < text, (token >= text) & (token < prefix)
    is_new = (token >= prefix) & (token < length)
    place = tl.where(is_text, token, visual_start + token - text)
    slot = tl.load(slots + index * width + place, mask=token < prefix, other=0).to(tl.int64)
    has_text, has_visual = tl.max(is_text.to(tl.int32)) > 0, tl.max(is_visual.to(tl.int32)) > 0
    has_new = tl.max(is_new.to(tl.int32)) > 0
    row = out + token
    if KEY_BITS < 16 or VALUE_BITS < 8:
        steps_at = (steps + head * HEAD_STEPS).to(tl.pointer_type(tl.int32)) + slot * (
            stride_steps // 4
        )

    if tl.program_id(1) % 2:
        v_out += head * V
        if has_text:
            _copy(
                v_out,
                row,
                stride_out_v,
                v_text + head * V,
                slot,
                stride_vt,
                is_text,
                v_scale,
                V,
                VP,
            )
        if has_new:
            _copy(v_out, row, stride_out_v, v_new + head * V, new_row, stride_v, is_new, 1.0, V, VP)
        if has_visual:
            if VALUE_BITS >= 8:
                _copy(
                    v_out,
                    row,
                    stride_out_v,
                    v_visual + head * V,
                    slot,
                    stride_vv,
                    is_visual,
                    1.0,
                    V,
                    VP,
                )
            else:
                steps_at += HEAD_STEPS // 4 - 1
                value = _of_codes(
                    v_visual, slot, stride_vv, head, steps_at, is_visual, V, VP, VALUE_BITS
                )
                _put(v_out, row, stride_out_v, value, is_visual, V, VP)
    else:
        k_out += head * D
        if has_text:
            _copy(
                k_out,
                row,
                stride_out_k,
                k_text + head * D,
                slot,
                stride_kt,
                is_text,
                k_scale,
                D,
                DP,
            )
        if has_new:
            _copy(k_out, row, stride_out_k, k_new + head * D, new_row, stride_k, is_new, 1.0, D, DP)
        if has_visual:
            channel, narrow = tl.arange(0, DP), tl.arange(0, RP)
            at = z + slot[:, None] * stride_z + head * R + narrow[None, :]
            rotated = tl.load(at, mask=is_visual[:, None] & (narrow < R)[None, :], other=0.0)
            basis = tl.load(slot_to_basis + slot, mask=is_visual, other=NO_BASIS)
            if KEY_BITS < 16:
                turned = _of_codes(
                    residual, slot, stride_residual, head, steps_at, is_visual, D, DP, KEY_BITS
                )
                at = signs + channel[:, None] * D + channel[None, :]
                sign = tl.load(at, mask=(channel < D)[:, None] & (channel < D)[None, :], other=0.0)
                turned_back = _dot(turned.to(sign.dtype), sign) * TURN**-0.5
            # Nearly always one basis; at the border of two images each.
            current = tl.min(basis)
            while current < NO_BASIS:
                of_basis = current.to(tl.int64)
                map_at = (
                    query_map
                    + of_basis * stride_map
                    + head * D * R
                    + channel[None, :] * R
                    + narrow[:, None]
                )
                back = tl.load(
                    map_at, mask=(narrow < R)[:, None] & (channel < D)[None, :], other=0.0
                )
                centre = tl.load(
                    mean + of_basis * stride_mean + head * D + channel, mask=channel < D, other=0.0
                )
                key = _dot(rotated.to(back.dtype), back) + centre[None, :]
                if KEY_BITS < 16:
                    key += turned_back
                _put(k_out, row, stride_out_k, key, basis == current, D, DP)
                basis = tl.where(basis == current, NO_BASIS, basis)
                current = tl.min(basis)


@triton.jit
def _put(out, row, stride, x, inside, N: tl.constexpr, NP: tl.constexpr):
    """x [BLOCK, NP] to N channels of the rows [BLOCK] of ``out``."""
    channel = tl.arange(0, NP)
    at = out + row[:, None] * stride + channel[None, :]
    tl.store(at, x.to(out.dtype.element_ty), mask=inside[:, None] & (channel < N)[None, :])


@triton.jit
def _copy(
    out,
    row,
    stride_out,
    source,
    source_row,
    stride,
    inside,
    scale,
    N: tl.constexpr,
    NP: tl.constexpr,
):
    """N channels of rows as they are; FP8 times its scale."""
    channel = tl.arange(0, NP)
    at = source + source_row[:, None] * stride + channel[None, :]
    x = tl.load(at, mask=inside[:, None] & (channel < N)[None, :], other=0.0)
    if x.dtype.is_fp8():
        x = x.to(tl.float32) * scale
    _put(out, row, stride_out, x, inside, N, NP)


@triton.jit
def _of_codes(
    packed,
    slot,
    stride,
    head,
    steps_at,
    inside,
    N: tl.constexpr,
    NP: tl.constexpr,
    BITS: tl.constexpr,
):
    """What the codes of rows stand for, fp32 [BLOCK, NP] (coded.of_codes)."""
    PART: tl.constexpr = N // PARTS
    channel = tl.arange(0, NP)
    words, stride_words = _words(packed, stride, BITS)
    at = words + slot[:, None] * stride_words + head * PART + (channel % PART)[None, :]
    word = tl.load(at, mask=inside[:, None] & (channel < N)[None, :], other=0)
    code = (word.to(tl.int32) >> (channel // PART * BITS)[None, :]) & (2**BITS - 1)
    step, zero, second_step, second_zero = _steps_and_zeros(steps_at, inside, BITS, True)
    is_first = (channel < N // 2)[None, :]
    zero = tl.where(is_first, zero[:, None], second_zero[:, None])
    return (code.to(tl.float32) - zero) * tl.where(is_first, step[:, None], second_step[:, None])


def expand(
    pools: LayerPools,
    partition: Partition,
    req_pool_indices: torch.Tensor,
    prefix_lens: torch.Tensor,
    q_indptr: torch.Tensor,
    kv_indptr: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    k_out: torch.Tensor,
    v_out: torch.Tensor,
    max_len: int,
) -> None:
    """Write prefix and new tokens of each request to k_out [*, H, D] and v_out [*, H, Dv] from
    kv_indptr[i] on.

    ``partition``: rebuilt with ``prefix_lens`` [bs] int. q_indptr and kv_indptr [bs + 1] int32
    split the new tokens k [n, H, D] and v [n, H, Dv], and the prefixes with them; ``max_len``: no
    request has more of both. No host sync.
    """
    num_requests, num_kv_heads, head_dim = len(req_pool_indices), *k.shape[1:]
    rank, v_head_dim = pools.z.shape[-1], v.shape[-1]
    if not num_requests or not max_len:
        return
    # Where there are no codes, any tensor: it is never read.
    residual, steps = (pools.z if x is None else x for x in (pools.residual, pools.steps))
    signs = (
        pools.query_map
        if pools.residual is None
        else coded.sign_matrix(head_dim, pools.query_map.dtype, k.device)
    )
    *of_rows, _, stride_residual, stride_steps = pools.strides
    strides = (
        *(x.stride(0) for x in (k_out, v_out, k, v)),
        *of_rows,
        stride_residual,
        stride_steps,
    )
    dtypes = tuple(
        x.dtype for x in (k, req_pool_indices, prefix_lens, pools.k_text, pools.z, pools.v_visual)
    )
    launch = _launch(
        num_kv_heads, head_dim, v_head_dim, rank, form_of(pools), dtypes, strides, k.device
    )
    launch(
        (-(-max_len // BLOCK), 2 * num_kv_heads, num_requests),
        k_out, v_out, k, v, req_pool_indices, prefix_lens, kv_indptr, q_indptr,
        partition.slots, partition.num_visual, partition.prefix_visual, pools.slot_to_basis,
        pools.k_text, pools.v_text, pools.z, pools.v_visual, pools.query_map, pools.mean, residual,
        steps, signs, float(pools.k_scale), float(pools.v_scale), partition.width, *strides,
    )  # fmt: skip


@functools.cache
def _launch(
    num_kv_heads: int,
    head_dim: int,
    v_head_dim: int,
    rank: int,
    form: Form,
    dtypes: tuple[torch.dtype, ...],
    strides: tuple[int, ...],
    device: torch.device,
) -> Launch:
    """What is not used here tells compiled variants apart."""
    power = triton.next_power_of_2
    constants = dict(
        D=head_dim, DP=power(head_dim), R=rank, RP=max(16, power(rank)), V=v_head_dim,
        VP=power(v_head_dim), KEY_BITS=form.key_bits, VALUE_BITS=form.value_bits,
        HEAD_STEPS=form.head_steps, TURN=hadamard_block(head_dim) if form.key_bits < 16 else 0,
        BLOCK=BLOCK,
    )  # fmt: skip
    return Launch(_expand, 4, constants, num_warps=4)
