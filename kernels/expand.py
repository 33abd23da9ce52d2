"""The prefix and the new tokens of a prefill side by side at full width, for a stock attention kernel (reference.expand).

A visual token's Key becomes P_q z + mean, and its residual turned back where it has one: its product with a query is the
score that the narrow row gives. The tokens of a request keep the partition's order, text before images: all of a prefix
is seen by all new tokens, so its order is free.
"""

from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl

from .attend import _form
from .blocks import _dot
from .coded import PARTS
from .launch import Launch
from .partition import Partition
from .quantise import _signs, _steps_and_zeros, _words, hadamard_block
from .reference import LayerPools

BLOCK = 64  # tokens that one program writes, of one KV head
# New tokens a request from which on expanding its prefix is faster than attending over the rows. Measured on an H100 at 1
# and at 8 requests, for which it differs: about half way.
FROM_TOKENS, CODED_FROM_TOKENS = 160, 80


def is_faster(extend_lens: list[int], prefix_lens: list[int], is_coded: bool) -> bool:
    """Whether to expand for ``extend_lens`` new tokens: rows are read, and codes taken apart, again for every few."""
    tokens = CODED_FROM_TOKENS if is_coded else FROM_TOKENS
    return sum(n * prefix for n, prefix in zip(extend_lens, prefix_lens)) >= tokens * sum(prefix_lens)


@triton.jit(do_not_specialize=["req_pool_indices", "prefix_lens", "kv_indptr", "q_indptr", "k_new", "v_new"])
def _expand(
    k_out, v_out, k_new, v_new, req_pool_indices, prefix_lens, kv_indptr, q_indptr,
    slots, num_visual, prefix_visual, slot_to_basis, k_text, v_text, z, v_visual, query_map, mean, residual, steps,
    k_scale, v_scale, width, stride_out_k, stride_out_v, stride_k, stride_v, stride_kt, stride_vt, stride_z, stride_vv,
    stride_map, stride_mean, stride_residual, stride_steps,
    D: tl.constexpr, DP: tl.constexpr, R: tl.constexpr, RP: tl.constexpr, V: tl.constexpr, VP: tl.constexpr,
    W: tl.constexpr, WP: tl.constexpr, PART: tl.constexpr, PART_PADDED: tl.constexpr, KEY_BITS: tl.constexpr,
    VALUE_BITS: tl.constexpr, HEAD_STEPS: tl.constexpr, TURN: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One program a block of tokens, KV head and request."""
    head, request = tl.program_id(1), tl.program_id(2)
    out = tl.load(kv_indptr + request).to(tl.int64)
    length = tl.load(kv_indptr + request + 1) - out
    token = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    if tl.program_id(0) * BLOCK >= length:
        return
    index = tl.load(req_pool_indices + request).to(tl.int64)
    prefix = tl.load(prefix_lens + request).to(tl.int32)
    text = prefix - tl.load(prefix_visual + index)
    visual_start = width - tl.load(num_visual + index)
    is_text, is_visual = token < text, (token >= text) & (token < prefix)
    is_new = (token >= prefix) & (token < length)
    place = tl.where(is_text, token, visual_start + token - text)
    slot = tl.load(slots + index * width + place, mask=token < prefix, other=0).to(tl.int64)
    channel, v_channel = tl.arange(0, DP), tl.arange(0, VP)
    is_key, is_value = (channel < D)[None, :], (v_channel < V)[None, :]
    k_at = k_out + (out + token)[:, None] * stride_out_k + head * D + channel[None, :]
    v_at = v_out + (out + token)[:, None] * stride_out_v + head * V + v_channel[None, :]

    if tl.max(is_text.to(tl.int32)) > 0:
        at = k_text + slot[:, None] * stride_kt + head * D + channel[None, :]
        text_key = _scaled(tl.load(at, mask=is_text[:, None] & is_key, other=0.0), k_scale)
        tl.store(k_at, text_key.to(k_out.dtype.element_ty), mask=is_text[:, None] & is_key)
        at = v_text + slot[:, None] * stride_vt + head * V + v_channel[None, :]
        text_value = _scaled(tl.load(at, mask=is_text[:, None] & is_value, other=0.0), v_scale)
        tl.store(v_at, text_value.to(v_out.dtype.element_ty), mask=is_text[:, None] & is_value)
    if tl.max(is_new.to(tl.int32)) > 0:
        row = (tl.load(q_indptr + request) + token - prefix).to(tl.int64)
        at = k_new + row[:, None] * stride_k + head * D + channel[None, :]
        tl.store(k_at, tl.load(at, mask=is_new[:, None] & is_key, other=0.0), mask=is_new[:, None] & is_key)
        at = v_new + row[:, None] * stride_v + head * V + v_channel[None, :]
        tl.store(v_at, tl.load(at, mask=is_new[:, None] & is_value, other=0.0), mask=is_new[:, None] & is_value)
    if tl.max(is_visual.to(tl.int32)) > 0:
        narrow = tl.arange(0, RP)
        if KEY_BITS < 16 or VALUE_BITS < 8:
            steps_at = (steps + head * HEAD_STEPS).to(tl.pointer_type(tl.int32)) + slot * (stride_steps // 4)
        if VALUE_BITS >= 8:
            at = v_visual + slot[:, None] * stride_vv + head * V + v_channel[None, :]
            value = tl.load(at, mask=is_visual[:, None] & is_value, other=0.0)
            tl.store(v_at, value.to(v_out.dtype.element_ty), mask=is_visual[:, None] & is_value)
        else:
            word = tl.arange(0, PART_PADDED)
            is_word = is_visual[:, None] & (word < PART)[None, :]
            words, stride_words = _words(v_visual, stride_vv, VALUE_BITS)
            at = words + slot[:, None] * stride_words + head * PART + word[None, :]
            packed = tl.load(at, mask=is_word, other=0)
            part_at = v_out + (out + token)[:, None] * stride_out_v + head * V + word[None, :]
            step, zero, second_step, second_zero = _steps_and_zeros(
                steps_at + HEAD_STEPS // 4 - 1, is_visual, VALUE_BITS, True
            )
            for part in tl.static_range(4):
                if part == 2:
                    step, zero = second_step, second_zero
                code = ((packed >> (part * VALUE_BITS)) & (2**VALUE_BITS - 1)).to(tl.float32)
                value = step[:, None] * (code - zero[:, None])
                tl.store(part_at + part * PART, value.to(v_out.dtype.element_ty), mask=is_word)
        if KEY_BITS < 16:
            word = tl.arange(0, WP)
            words, stride_words = _words(residual, stride_residual, KEY_BITS)
            at = words + slot[:, None] * stride_words + head * W + word[None, :]
            packed = tl.load(at, mask=is_visual[:, None] & (word < W)[None, :], other=0)
            step, zero, second_step, second_zero = _steps_and_zeros(steps_at, is_visual, KEY_BITS, True)
            turned_back = tl.zeros([BLOCK, DP], tl.float32)
            for part in tl.static_range(4):
                if part == 2:
                    step, zero = second_step, second_zero
                # Codes and signs are exact in half precision.
                signs = _signs((word + part * W)[:, None], channel[None, :], TURN)
                signs = tl.where((word < W)[:, None] & (channel < D)[None, :], signs, 0.0)
                code = ((packed >> (part * KEY_BITS)) & (2**KEY_BITS - 1)).to(query_map.dtype.element_ty)
                on_codes = _dot(code, signs.to(code.dtype)) - zero[:, None] * tl.sum(signs, 0)[None, :]
                turned_back += (step * TURN**-0.5)[:, None] * on_codes
        at = z + slot[:, None] * stride_z + head * R + narrow[None, :]
        rotated = tl.load(at, mask=is_visual[:, None] & (narrow < R)[None, :], other=0.0)
        basis = tl.load(slot_to_basis + slot, mask=is_visual, other=2147483647)
        # Nearly always one basis; at the border of two images each.
        current = tl.min(basis)
        while current < 2147483647:
            of_basis = current.to(tl.int64)
            map_at = query_map + of_basis * stride_map + head * D * R + channel[None, :] * R + narrow[:, None]
            back = tl.load(map_at, mask=(narrow < R)[:, None] & is_key, other=0.0)
            centre = tl.load(mean + of_basis * stride_mean + head * D + channel, mask=channel < D, other=0.0)
            key = _dot(rotated.to(back.dtype), back) + centre[None, :]
            if KEY_BITS < 16:
                key += turned_back
            tl.store(k_at, key.to(k_out.dtype.element_ty), mask=(basis == current)[:, None] & is_key)
            basis = tl.where(basis == current, 2147483647, basis)
            current = tl.min(basis)


@triton.jit
def _scaled(x, scale):
    """Text rows at full width: FP8 times its scale."""
    if x.dtype.is_fp8():
        return x.to(tl.float32) * scale
    else:
        return x


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
    """Write prefix and new tokens of each request to k_out [*, H, D] and v_out [*, H, Dv] from kv_indptr[i] on.

    ``partition``: rebuilt with ``prefix_lens`` [bs] int. q_indptr and kv_indptr [bs + 1] int32 split the new tokens k
    [n, H, D] and v [n, H, Dv], and the prefixes with them; ``max_len``: no request has more of both. No host sync.
    """
    num_requests, num_kv_heads, head_dim = len(req_pool_indices), *k.shape[1:]
    rank, v_head_dim = pools.z.shape[-1], v.shape[-1]
    if not num_requests or not max_len:
        return
    residual, steps = (pools.z if x is None else x for x in (pools.residual, pools.steps))  # else never read
    strides = tuple(
        x.stride(0)
        for x in (
            k_out, v_out, k, v, pools.k_text, pools.v_text, pools.z, pools.v_visual, pools.query_map, pools.mean, residual,
            steps,
        )
    )  # fmt: skip
    dtypes = tuple(x.dtype for x in (k, req_pool_indices, prefix_lens, pools.k_text, pools.z, pools.v_visual))
    launch = _launch(num_kv_heads, head_dim, v_head_dim, rank, _form(pools), dtypes, strides, k.device)
    launch(
        (triton.cdiv(max_len, BLOCK), num_kv_heads, num_requests),
        k_out, v_out, k, v, req_pool_indices, prefix_lens, kv_indptr, q_indptr,
        partition.slots, partition.num_visual, partition.prefix_visual, pools.slot_to_basis,
        pools.k_text, pools.v_text, pools.z, pools.v_visual, pools.query_map, pools.mean, residual, steps,
        float(pools.k_scale), float(pools.v_scale), partition.width, *strides,
    )  # fmt: skip


@functools.cache
def _launch(num_kv_heads, head_dim, v_head_dim, rank, form, dtypes, strides, device) -> Launch:
    """What is not used here tells compiled variants apart."""
    power, part, words = triton.next_power_of_2, v_head_dim // PARTS, head_dim // PARTS
    constants = dict(
        D=head_dim, DP=power(head_dim), R=rank, RP=max(16, power(rank)), V=v_head_dim, VP=power(v_head_dim),
        W=words, WP=max(16, power(words)), PART=part, PART_PADDED=power(part),
        KEY_BITS=form.key_bits, VALUE_BITS=form.value_bits, HEAD_STEPS=form.head_steps,
        TURN=hadamard_block(head_dim) if form.key_bits < 16 else 0, BLOCK=BLOCK,
    )  # fmt: skip
    return Launch(_expand, 4, constants, num_warps=8 if form.key_bits < 16 else 4)
