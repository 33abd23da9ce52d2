"""The kernel of attend.py: query tiles attend over a plan's slots in both pools.

The formulas are those of reference.py. Scores and softmax are fp32 in base 2; products take the
pool's dtype.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .blocks import LOG2_E, _block, _of_query, _of_token, _rotate, _run
from .coded_blocks import _coded_run
from .plan_kernel import ITEM


@triton.jit(do_not_specialize=["stride_lse", "stride_lse_head", "stride_slots", "stride_runs"])
def _attend(
    q, out, own_lse, q_indptr, partial_out, partial_lse,
    k_text, v_text, z, v_visual, query_map, mean, residual, steps, turned, turned_sums,
    slots, runs, items, num_items,
    scale, text_scale, v_scale, cap, stride_lse, stride_lse_head, stride_slots, stride_runs,
    stride_q, stride_out, stride_k, stride_vt, stride_z, stride_vv, stride_map, stride_mean,
    stride_residual, stride_steps,
    H: tl.constexpr, G: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, R: tl.constexpr,
    RP: tl.constexpr, W: tl.constexpr, WP: tl.constexpr, V: tl.constexpr, VP: tl.constexpr,
    PARTS: tl.constexpr, KEY_BITS: tl.constexpr, VALUE_BITS: tl.constexpr, HEAD_STEPS: tl.constexpr,
    ASM: tl.constexpr, Z_UNIT: tl.constexpr, V_UNIT: tl.constexpr, UNIT: tl.constexpr,
    TILE: tl.constexpr, BLOCK: tl.constexpr,
    CAPPED: tl.constexpr, HAS_OWN: tl.constexpr, CAUSAL: tl.constexpr, ONE_TOKEN: tl.constexpr,
    SWAPPED: tl.constexpr, OVERLAP: tl.constexpr, AHEAD: tl.constexpr, STAGES: tl.constexpr,
    VISUAL_STAGES: tl.constexpr,
):  # fmt: skip
    """One program an item and KV head; neighbours read the heads of the same slots. With CAUSAL the
    request's new tokens are the last of its text slots.

    W, WP: words of a visual row's residual. V, VP: channels of a part of the Values, and words of a
    visual row's. Strides of visual rows of other formats than 16 bits are in UNITs: what all of
    them are multiples of."""
    if OVERLAP:
        # With codes the predecessor is turn, whose programs have all waited for what came before
        # them: only what turn itself writes is not there yet.
        if KEY_BITS == 16:
            tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    head = tl.program_id(0) % H
    item = tl.program_id(0) // H
    # The whole item at once: a chain of dependent loads would be most of a short program's time.
    items += item * ITEM
    request, tile = tl.load(items), tl.load(items + 1)
    text_begin, text_end = tl.load(items + 2), tl.load(items + 3)
    begin, end = tl.load(items + 4), tl.load(items + 5)
    partial, num_runs = tl.load(items + 6), tl.load(items + 7)
    run_end, basis = tl.load(items + 8), tl.load(items + 9)
    req_pool_index = tl.load(items + 10).to(tl.int64)
    visual_start, first_run = tl.load(items + 11), tl.load(items + 12)
    if CAUSAL:
        num_text = tl.load(items + 13)
    if item >= tl.load(num_items):
        return
    if ONE_TOKEN:
        first_token = request
        new_tokens = 1
    else:
        first_token = tl.load(q_indptr + request)
        new_tokens = tl.load(q_indptr + request + 1) - first_token
    num_rows = new_tokens * G
    text_rows = slots + req_pool_index * stride_slots
    visual_rows = text_rows + visual_start
    runs += req_pool_index * stride_runs + 2 * first_run

    tile_row = tile * TILE + tl.arange(0, TILE)
    is_row = tile_row < num_rows
    token = (first_token + tile_row // G).to(tl.int64)
    q_head = head * G + tile_row % G
    channel = tl.arange(0, DP)
    query_at = q + _of_query(token * stride_q + q_head * D, SWAPPED) + _of_token(channel, SWAPPED)
    is_query = _of_query(is_row, SWAPPED) & _of_token(channel < D, SWAPPED)
    query = tl.load(query_at, mask=is_query, other=0.0)
    if AHEAD:  # before the text, so that its loads wait together with the others
        rotated, bias = _rotate(
            query, basis, num_runs > 0, head, query_map, mean, stride_map, stride_mean, D, DP, R,
            RP, SWAPPED,
        )  # fmt: skip
    acc = tl.zeros([VP, TILE] if SWAPPED else [TILE, VP], dtype=tl.float32)
    # Of what does not exist there is one number, which nothing reads.
    acc1 = acc if PARTS > 1 else tl.zeros([1, 1], dtype=tl.float32)
    acc2, acc3 = acc1, acc1
    top = tl.full([TILE], float("-inf"), dtype=tl.float32)
    total = tl.zeros([TILE], dtype=tl.float32)
    no_bias = tl.zeros([TILE], dtype=tl.float32)

    cached_end = text_end
    if CAUSAL:
        first_new = num_text - new_tokens
        cached_end = tl.minimum(text_end, tl.maximum(first_new, text_begin))
    acc, acc1, acc2, acc3, top, total = _run(
        acc, acc1, acc2, acc3, top, total, query, no_bias, k_text + head * D,
        v_text + head * (V * PARTS), text_rows, text_begin, cached_end, stride_k, stride_vt,
        text_scale, cap, D, DP, V, VP, PARTS, BLOCK, CAPPED, SWAPPED, AHEAD, STAGES,
    )  # fmt: skip
    if CAUSAL:
        row_end = first_new + tile_row // G + 1
        for at in range(cached_end, text_end, BLOCK):
            each = at + tl.arange(0, BLOCK)
            row = tl.load(text_rows + each, mask=each < text_end, other=0)
            acc, acc1, acc2, acc3, top, total = _block(
                acc, acc1, acc2, acc3, top, total, query, no_bias, k_text + head * D,
                v_text + head * (V * PARTS), row, at, text_end, row_end, stride_k, stride_vt,
                text_scale, cap, D, DP, V, VP, PARTS, BLOCK, True, True, CAPPED, SWAPPED,
            )  # fmt: skip
    if k_text.dtype.element_ty.is_fp8():
        acc *= v_scale
        acc1 *= v_scale
        acc2 *= v_scale
        acc3 *= v_scale

    if KEY_BITS < 16:
        if OVERLAP:
            tl.extra.cuda.gdc_wait()
        word = tl.arange(0, WP)
        turned_row = token * (H * G) + q_head
        is_turned = _of_query(is_row, SWAPPED) & _of_token(word < W, SWAPPED)
        turned_at = turned + _of_query(turned_row * D, SWAPPED) + _of_token(word, SWAPPED)
        turned0 = tl.load(turned_at, mask=is_turned, other=0.0)
        turned1 = tl.load(turned_at + W, mask=is_turned, other=0.0)
        turned2 = tl.load(turned_at + 2 * W, mask=is_turned, other=0.0)
        turned3 = tl.load(turned_at + 3 * W, mask=is_turned, other=0.0)
        turned_sum = tl.load(turned_sums + 2 * turned_row, mask=is_row, other=0.0)
        second_sum = tl.load(turned_sums + 2 * turned_row + 1, mask=is_row, other=0.0)
    else:
        turned0, turned1, turned2, turned3 = query, query, query, query
        turned_sum, second_sum = no_bias, no_bias
    zero, second_zero = no_bias, no_bias
    if KEY_BITS < 16 or VALUE_BITS < 8:
        steps = (steps + head * HEAD_STEPS).to(tl.pointer_type(tl.int32))
    WIDE: tl.constexpr = 2 if KEY_BITS == 4 else 1  # bytes of a word
    V_WIDE: tl.constexpr = 2 if VALUE_BITS == 4 else 1
    if KEY_BITS == 4:
        residual = residual.to(tl.pointer_type(tl.int16))
    if VALUE_BITS == 4:
        v_visual = v_visual.to(tl.pointer_type(tl.int16))

    for run in range(num_runs):
        if not AHEAD:
            rotated, bias = _rotate(
                query, basis, True, head, query_map, mean, stride_map, stride_mean, D, DP, R, RP,
                SWAPPED,
            )  # fmt: skip
        if KEY_BITS == 16 and VALUE_BITS == 16:
            acc, acc1, acc2, acc3, top, total = _run(
                acc, acc1, acc2, acc3, top, total, rotated, bias, z + head * R, v_visual + head * V,
                visual_rows, begin, run_end, stride_z, stride_vv, scale, cap, R, RP, V, VP, PARTS,
                BLOCK, CAPPED, SWAPPED, AHEAD, VISUAL_STAGES,
            )  # fmt: skip
        else:
            acc, acc1, acc2, acc3, zero, second_zero, top, total = _coded_run(
                acc, acc1, acc2, acc3, zero, second_zero, top, total,
                rotated, bias, turned0, turned1, turned2, turned3, turned_sum, second_sum,
                z + head * R, residual + head * W, v_visual + head * V, steps, visual_rows, begin,
                run_end, stride_z * Z_UNIT, stride_residual * (UNIT // WIDE),
                stride_vv * (V_UNIT // V_WIDE), stride_steps * (UNIT // 4), scale, cap, R, RP, W,
                WP, V, VP, KEY_BITS, VALUE_BITS, HEAD_STEPS // 4 - 1, ASM, BLOCK, CAPPED, SWAPPED,
                AHEAD, VISUAL_STAGES,
            )  # fmt: skip
        begin = run_end
        if run + 1 < num_runs:
            run_end = tl.minimum(tl.load(runs + 2 * run + 2), end)
            basis = tl.load(runs + 2 * run + 3)
            if KEY_BITS < 16:  # again, since the loop over codes has no registers to keep it in
                query = tl.load(query_at, mask=is_query, other=0.0)
            if AHEAD:
                rotated, bias = _rotate(
                    query, basis, True, head, query_map, mean, stride_map, stride_mean, D, DP, R,
                    RP, SWAPPED,
                )  # fmt: skip

    # Alignment or causality can leave a row of a split without slots: it weighs nothing.
    lse = tl.where(total > 0, top + tl.log2(total), float("-inf"))
    share = 1 / tl.where(total > 0, total, 1.0)
    own_share = no_bias
    if HAS_OWN:
        own = (
            tl.load(own_lse + token * stride_lse + q_head * stride_lse_head, mask=is_row, other=0.0)
            * LOG2_E
        )
        own_share = tl.where(partial < 0, 1 - 1 / (1 + tl.exp2(own - lse)), 0.0)
        share *= 1 - own_share
    out += token * stride_out + q_head * (V * PARTS)
    row = (partial.to(tl.int64) * H + head) * TILE + tl.arange(0, TILE)
    partial_out += row * (V * PARTS)
    if partial >= 0:
        tl.store(partial_lse + row, lse, mask=is_row)
    _finish(acc, zero, share, own_share, out, partial_out, partial, is_row, V, VP, HAS_OWN, SWAPPED)
    if PARTS == 4:
        _finish(
            acc1, zero, share, own_share, out + V, partial_out + V, partial, is_row, V, VP, HAS_OWN,
            SWAPPED,
        )  # fmt: skip
        _finish(
            acc2, second_zero, share, own_share, out + 2 * V, partial_out + 2 * V, partial, is_row,
            V, VP, HAS_OWN, SWAPPED,
        )  # fmt: skip
        _finish(
            acc3, second_zero, share, own_share, out + 3 * V, partial_out + 3 * V, partial, is_row,
            V, VP, HAS_OWN, SWAPPED,
        )  # fmt: skip


@triton.jit
def _finish(
    acc, zero, share, own_share, out, partial_out, partial, is_row,
    V: tl.constexpr, VP: tl.constexpr, HAS_OWN: tl.constexpr, SWAPPED: tl.constexpr,
):  # fmt: skip
    """Store a part of the channels: of the whole tile to ``out`` [TILE], of a split to
    ``partial_out`` [TILE]."""
    v_channel = tl.arange(0, VP)
    is_value = _of_query(is_row, SWAPPED) & _of_token(v_channel < V, SWAPPED)
    acc = (acc - _of_query(zero, SWAPPED)) * _of_query(share, SWAPPED)
    if partial < 0:
        out_at = _of_query(out, SWAPPED) + _of_token(v_channel, SWAPPED)
        if HAS_OWN:
            acc += _of_query(own_share, SWAPPED) * tl.load(out_at, mask=is_value, other=0.0).to(
                tl.float32
            )
        tl.store(out_at, acc.to(out.dtype.scalar.element_ty), mask=is_value)
    else:
        tl.store(
            _of_query(partial_out, SWAPPED) + _of_token(v_channel, SWAPPED), acc, mask=is_value
        )
