"""The prefix and the new tokens of a prefill side by side at full width, for a stock attention kernel (reference.expand).

A visual token's Key becomes P_q z + mean, whose product with a query is the score that the narrow row gives. The tokens of
a request keep the partition's order, text before images: all of a prefix is seen by all new tokens, so its order is free.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .blocks import _dot
from .partition import Partition
from .reference import LayerPools

BLOCK = 64  # tokens that one program writes, of one KV head


@triton.jit(do_not_specialize=["req_pool_indices", "prefix_lens", "kv_indptr", "q_indptr", "k_new", "v_new"])
def _expand(
    k_out, v_out, k_new, v_new, req_pool_indices, prefix_lens, kv_indptr, q_indptr,
    slots, num_visual, prefix_visual, slot_to_basis, k_text, v_text, z, v_visual, query_map, mean,
    width, stride_out_k, stride_out_v, stride_k, stride_v, stride_kt, stride_vt, stride_z, stride_vv, stride_map,
    stride_mean,
    D: tl.constexpr, DP: tl.constexpr, R: tl.constexpr, RP: tl.constexpr, V: tl.constexpr, VP: tl.constexpr,
    BLOCK: tl.constexpr,
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
        tl.store(k_at, tl.load(at, mask=is_text[:, None] & is_key, other=0.0), mask=is_text[:, None] & is_key)
        at = v_text + slot[:, None] * stride_vt + head * V + v_channel[None, :]
        tl.store(v_at, tl.load(at, mask=is_text[:, None] & is_value, other=0.0), mask=is_text[:, None] & is_value)
    if tl.max(is_new.to(tl.int32)) > 0:
        row = (tl.load(q_indptr + request) + token - prefix).to(tl.int64)
        at = k_new + row[:, None] * stride_k + head * D + channel[None, :]
        tl.store(k_at, tl.load(at, mask=is_new[:, None] & is_key, other=0.0), mask=is_new[:, None] & is_key)
        at = v_new + row[:, None] * stride_v + head * V + v_channel[None, :]
        tl.store(v_at, tl.load(at, mask=is_new[:, None] & is_value, other=0.0), mask=is_new[:, None] & is_value)
    if tl.max(is_visual.to(tl.int32)) > 0:
        narrow = tl.arange(0, RP)
        at = v_visual + slot[:, None] * stride_vv + head * V + v_channel[None, :]
        tl.store(v_at, tl.load(at, mask=is_visual[:, None] & is_value, other=0.0), mask=is_visual[:, None] & is_value)
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
            key = _dot(rotated, back) + centre[None, :]
            tl.store(k_at, key.to(k_out.dtype.element_ty), mask=(basis == current)[:, None] & is_key)
            basis = tl.where(basis == current, 2147483647, basis)
            current = tl.min(basis)


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
    power = triton.next_power_of_2
    _expand[(triton.cdiv(max_len, BLOCK), num_kv_heads, num_requests)](
        k_out, v_out, k, v, req_pool_indices, prefix_lens, kv_indptr, q_indptr,
        partition.slots, partition.num_visual, partition.prefix_visual, pools.slot_to_basis,
        pools.k_text, pools.v_text, pools.z, pools.v_visual, pools.query_map, pools.mean,
        partition.width, k_out.stride(0), v_out.stride(0), k.stride(0), v.stride(0), pools.k_text.stride(0),
        pools.v_text.stride(0), pools.z.stride(0), pools.v_visual.stride(0), pools.query_map.stride(0),
        pools.mean.stride(0),
        D=head_dim, DP=power(head_dim), R=rank, RP=power(rank), V=v_head_dim, VP=power(v_head_dim), BLOCK=BLOCK,
        num_warps=4,
    )  # fmt: skip
