"""The kernel of plan.py: cuts a forward's attention into items of about equal cost. Columns of
``items``: see Plan."""

from __future__ import annotations

import triton
import triton.language as tl

ITEM = tl.constexpr(16)  # columns of ``items``: 14 are in use, 16 keep one within a cache line
# A split size that no request reaches, with room for sums in int32.
UNBOUNDED = tl.constexpr(1 << 30)


# Values that differ between batches are not specialised on: a variant would compile for seconds,
# while serving.
@triton.jit(do_not_specialize=["req_pool_indices", "kv_lens", "num_requests", "wanted_items"])
def _schedule(
    req_to_token,
    req_pool_indices,
    kv_lens,
    slots,
    runs,
    num_visual,
    num_runs,
    attended_visual,
    num_tiles,
    num_splits,
    partial_start,
    items,
    num_items,
    num_requests,
    wanted_items,
    min_split,
    width,
    stride_req,
    stride_runs,
    TEXT_COST: tl.constexpr,
    VISUAL_COST: tl.constexpr,
    ALIGN: tl.constexpr,
    UNEVEN: tl.constexpr,
    APPEND: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One program: cut every request into equal splits of about the same cost everywhere, and
    describe each item.

    Inner bounds of splits are multiples of ALIGN slots of their kind: whole blocks for the
    attention kernel. With APPEND the last token of each request is new, and text: its slot goes
    into ``slots``.
    """
    request = tl.arange(0, BLOCK)
    is_real = request < num_requests
    req_pool_index = tl.load(req_pool_indices + request, mask=is_real, other=0)
    kv_len = tl.load(kv_lens + request, mask=is_real, other=0).to(tl.int32)
    tiles = tl.load(num_tiles + request, mask=is_real, other=0)
    visual_start = width - tl.load(num_visual + req_pool_index, mask=is_real, other=0)
    visual = tl.minimum(tl.load(attended_visual + req_pool_index, mask=is_real, other=0), kv_len)
    text = kv_len - visual
    if APPEND:
        # The place follows from the lengths, no counter: a step that is planned twice, and padding,
        # do no harm.
        of_request = req_pool_index.to(tl.int64)
        is_new = is_real & (text > 0)
        slot = tl.load(req_to_token + of_request * stride_req + kv_len - 1, mask=is_new, other=0)
        tl.store(slots + of_request * width + text - 1, slot, mask=is_new)
    cost = text * TEXT_COST + visual * VISUAL_COST
    total = tl.sum(tiles.to(tl.int64) * cost)
    if tl.max(cost) * tl.sum(tiles).to(tl.int64) > total + total // 2:
        wanted_items *= UNEVEN
    size = tl.minimum(tl.maximum(tl.cdiv(total, wanted_items), min_split), UNBOUNDED).to(tl.int32)
    # A request a quarter larger than a split stays whole: two halves would cost more than they
    # balance. One without slots has an item too, which writes zeros.
    splits = tl.maximum(tl.cdiv(cost - size // 4, size), 1)
    own_size = tl.cdiv(cost, splits)
    count = tiles * splits
    start = tl.cumsum(count) - count
    partials = tl.where(splits > 1, count, 0)
    first_partial = tl.cumsum(partials) - partials
    all_items = tl.sum(count)
    tl.store(num_items, all_items)
    tl.store(num_splits + request, splits, mask=is_real)
    tl.store(partial_start + request, first_partial, mask=is_real)
    for i in range(tl.max(count)):
        is_item = i < count
        split = i % splits
        low, high = split * own_size, (split + 1) * own_size
        text_low = tl.minimum(tl.cdiv(low, TEXT_COST * ALIGN) * ALIGN, text)
        text_high = tl.minimum(tl.cdiv(high, TEXT_COST * ALIGN) * ALIGN, text)
        low, high = tl.maximum(low - text * TEXT_COST, 0), tl.maximum(high - text * TEXT_COST, 0)
        visual_low = tl.minimum(tl.cdiv(low, VISUAL_COST * ALIGN) * ALIGN, visual)
        visual_high = tl.minimum(tl.cdiv(high, VISUAL_COST * ALIGN) * ALIGN, visual)
        item = items + (start + i) * ITEM
        tl.store(item, request, mask=is_item)
        tl.store(item + 1, i // splits, mask=is_item)
        tl.store(item + 2, text_low, mask=is_item)
        tl.store(item + 3, text_high, mask=is_item)
        tl.store(item + 4, visual_low, mask=is_item)
        tl.store(item + 5, visual_high, mask=is_item)
        tl.store(item + 6, tl.where(splits > 1, first_partial + i, -1), mask=is_item)
        tl.store(item + 10, req_pool_index.to(tl.int32), mask=is_item)
        tl.store(item + 11, visual_start, mask=is_item)
        tl.store(item + 13, text, mask=is_item)

    # The runs of each item, which every layer's attention would else look for. Other threads stored
    # what is read here.
    tl.debug_barrier()
    for first in range(0, all_items, BLOCK):
        is_item = first + tl.arange(0, BLOCK) < all_items
        item = items + (first + tl.arange(0, BLOCK)) * ITEM
        begin = tl.load(item + 4, mask=is_item, other=0)
        end = tl.load(item + 5, mask=is_item, other=0)
        of_request = tl.load(item + 10, mask=is_item, other=0).to(tl.int64)
        ends = runs + of_request * stride_runs
        in_table = tl.load(num_runs + of_request, mask=begin < end, other=0)
        # By bisection, the first run that ends behind ``begin``, and the first that ends at ``end``
        # or behind.
        first_run, first_high = tl.zeros_like(in_table), in_table
        last_run, last_high = tl.zeros_like(in_table), in_table
        while tl.max(tl.maximum(first_high - first_run, last_high - last_run)) > 0:
            middle = (first_run + first_high) // 2
            is_open = first_run < first_high
            is_before = tl.load(ends + 2 * middle, mask=is_open, other=UNBOUNDED) <= begin
            first_run = tl.where(is_before, middle + 1, first_run)
            first_high = tl.where(is_before, first_high, middle)
            middle = (last_run + last_high) // 2
            is_open = last_run < last_high
            is_before = tl.load(ends + 2 * middle, mask=is_open, other=UNBOUNDED) < end
            last_run = tl.where(is_before, middle + 1, last_run)
            last_high = tl.where(is_before, last_high, middle)
        exists = first_run < in_table
        own_runs = tl.maximum(tl.minimum(last_run, in_table - 1) - first_run + 1, 0)
        tl.store(item + 7, own_runs, mask=is_item)
        run_end = tl.load(ends + 2 * first_run, mask=exists, other=0)
        tl.store(item + 8, tl.minimum(run_end, end), mask=is_item)
        tl.store(item + 9, tl.load(ends + 2 * first_run + 1, mask=exists, other=0), mask=is_item)
        tl.store(item + 12, first_run, mask=is_item)
