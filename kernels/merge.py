"""The splits of a tile in one softmax: what attend.py launches behind the attention."""

from __future__ import annotations

import triton
import triton.language as tl

from .blocks import LOG2_E


@triton.jit(do_not_specialize=["num_requests", "stride_lse", "stride_lse_head"])
def _merge(
    out, own_lse, q_indptr, partial_out, partial_lse, num_splits, partial_start, num_requests,
    stride_out, stride_lse, stride_lse_head,
    H: tl.constexpr, G: tl.constexpr, V: tl.constexpr, VP: tl.constexpr, TILE: tl.constexpr,
    ONE_TOKEN: tl.constexpr, REQUESTS: tl.constexpr, SPLITS: tl.constexpr, HAS_OWN: tl.constexpr,
    OVERLAP: tl.constexpr,
):  # fmt: skip
    """One program a token and query head: the splits of its tile in one softmax."""
    token, q_head = tl.program_id(0), tl.program_id(1)
    if ONE_TOKEN:
        request = token
    else:
        request = 0
        for at in range(0, num_requests, REQUESTS):
            each = at + tl.arange(0, REQUESTS)
            ends = tl.load(q_indptr + 1 + each, mask=each < num_requests, other=2147483647)
            request += tl.sum((ends <= token).to(tl.int32))
    splits = tl.load(num_splits + request)
    # Also where there is nothing to merge: whatever follows this kernel must not begin before the
    # attention has ended.
    if OVERLAP:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    if splits == 1:
        return
    v_channel = tl.arange(0, VP)
    out_at = out + token.to(tl.int64) * stride_out + q_head * V + v_channel
    tile_row = (token - tl.load(q_indptr + request)) * G + q_head % G
    first = tl.load(partial_start + request) + tile_row // TILE * splits
    each = tl.arange(0, SPLITS)
    if HAS_OWN:
        top = tl.load(own_lse + token * stride_lse + q_head * stride_lse_head) * LOG2_E
        acc = tl.load(out_at, mask=v_channel < V, other=0.0).to(tl.float32)
        total = 1.0
    else:
        top = float("-inf")
        acc = tl.zeros([VP], dtype=tl.float32)
        total = 0.0
    for at in range(0, splits, SPLITS):
        inside = at + each < splits
        row = ((first + at + each).to(tl.int64) * H + q_head // G) * TILE + tile_row % TILE
        lse = tl.load(partial_lse + row, mask=inside, other=float("-inf"))
        value = tl.load(
            partial_out + row[:, None] * V + v_channel[None, :],
            mask=inside[:, None] & (v_channel < V)[None, :],
            other=0.0,
        )
        new_top = tl.maximum(top, tl.max(lse))
        reference = tl.where(new_top > float("-inf"), new_top, 0.0)
        weight = tl.exp2(lse - reference)
        shrink = tl.exp2(top - reference)
        acc = acc * shrink + tl.sum(value * weight[:, None], 0)
        total = total * shrink + tl.sum(weight)
        top = new_top
    tl.store(out_at, (acc / total).to(out.dtype.element_ty), mask=v_channel < V)
