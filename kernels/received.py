"""What each token of a picture receives of the attention of a vision tower's layer, with no matrix
of weights in memory: one pass for what the softmax of each query divides by, one for the sums of
the columns."""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl

BLOCK_QUERIES, BLOCK_KEYS = 128, 64
NUM_WARPS, NUM_STAGES = 8, 3


@triton.jit
def _rows(x, stride_token, token, num_tokens, channel, D: tl.constexpr):
    """Rows of one head; 0 behind the last token or channel."""
    mask = (token < num_tokens)[:, None] & (channel < D)[None, :]
    return tl.load(x + token[:, None] * stride_token + channel[None, :], mask=mask, other=0.0)


@triton.jit
def _log_sums(
    q, k, log_sums, num_tokens, stride_q, stride_k, head_q, head_k, scale,
    D: tl.constexpr, DP: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """A block of queries of a head: log2 of the sum of their weights, log_sums [H, T]."""
    head, channel = tl.program_id(1), tl.arange(0, DP)
    token = tl.program_id(0) * BLOCK_Q + tl.arange(0, BLOCK_Q)
    queries = _rows(q + head * head_q, stride_q, token, num_tokens, channel, D)
    top = tl.full([BLOCK_Q], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_Q], tl.float32)
    for first in range(0, num_tokens, BLOCK_K):
        of_key = first + tl.arange(0, BLOCK_K)
        keys = _rows(k + head * head_k, stride_k, of_key, num_tokens, channel, D)
        scores = tl.dot(queries, keys.T, input_precision="ieee") * scale
        scores = tl.where((of_key < num_tokens)[None, :], scores, float("-inf"))
        new_top = tl.maximum(top, tl.max(scores, 1))
        total = total * tl.exp2(top - new_top) + tl.sum(tl.exp2(scores - new_top[:, None]), 1)
        top = new_top
    tl.store(log_sums + head * num_tokens + token, top + tl.log2(total), mask=token < num_tokens)


@triton.jit
def _received(
    q, k, log_sums, received, num_tokens, stride_q, stride_k, head_q, head_k, scale,
    D: tl.constexpr, DP: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """A block of keys of a head: what they receive of all queries, received [H, T]."""
    head, channel = tl.program_id(1), tl.arange(0, DP)
    token = tl.program_id(0) * BLOCK_K + tl.arange(0, BLOCK_K)
    keys = _rows(k + head * head_k, stride_k, token, num_tokens, channel, D)
    total = tl.zeros([BLOCK_K], tl.float32)
    for first in range(0, num_tokens, BLOCK_Q):
        of_query = first + tl.arange(0, BLOCK_Q)
        queries = _rows(q + head * head_q, stride_q, of_query, num_tokens, channel, D)
        log_sum = tl.load(
            log_sums + head * num_tokens + of_query, mask=of_query < num_tokens, other=float("inf")
        )
        scores = tl.dot(queries, keys.T, input_precision="ieee") * scale
        total += tl.sum(tl.exp2(scores - log_sum[:, None]), 0)
    tl.store(received + head * num_tokens + token, total, mask=token < num_tokens)


def attention_received(q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
    """pruning.visionzip.attention_received: [T] fp32, of q and k [T, H, d]. Scratch: 8 bytes a
    token and head. The order of the sums is fixed."""
    q, k = (x if x.stride(2) == 1 else x.contiguous() for x in (q, k))
    num_tokens, num_heads, head_dim = q.shape
    log_sums, received = torch.empty(2, num_heads, num_tokens, device=q.device)
    sizes = num_tokens, q.stride(0), k.stride(0), q.stride(1), k.stride(1)
    scale = head_dim**-0.5 / math.log(2)
    constants = dict(
        D=head_dim, DP=triton.next_power_of_2(head_dim), BLOCK_Q=BLOCK_QUERIES, BLOCK_K=BLOCK_KEYS,
        num_warps=NUM_WARPS, num_stages=NUM_STAGES,
    )  # fmt: skip
    blocks = triton.cdiv(num_tokens, BLOCK_QUERIES), num_heads
    _log_sums[blocks](q, k, log_sums, *sizes, scale, **constants)
    blocks = triton.cdiv(num_tokens, BLOCK_KEYS), num_heads
    _received[blocks](q, k, log_sums, received, *sizes, scale, **constants)
    return received.sum(0)
