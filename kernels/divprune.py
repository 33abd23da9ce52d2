"""The tokens that max-min distances pick (pruning_reference.py), in several groups at a time.

A pick needs the one before, so that a group is one program: it keeps what each token is from those
picked, at least, in registers, and a step is one argmax and one row of distances, 0.5 to 1 us. Two
launches, a matrix product for each group and a few small operations; no host sync.
"""

from __future__ import annotations

import numpy as np
import torch
import triton
import triton.language as tl

from .pruning_reference import Groups, dot_products, inverse_lengths
from .upload import upload

WARP_TOKENS = 128  # that a warp of _pick keeps; measured on an H100
MAX_WARPS = 16
WORDS = tl.constexpr(4)  # of a group: first token, end token, picks, picks of the groups before


@triton.jit
def _distances(products, scale, groups, nearest, width, BLOCK: tl.constexpr):
    """One program a token of a group: its row of products [N, width] becomes distances, -inf from
    itself and from what is behind the group; nearest [N] receives the least of the others."""
    groups += tl.program_id(1) * WORDS
    first, end = tl.load(groups), tl.load(groups + 1)
    row, token = first + tl.program_id(0), first + tl.arange(0, BLOCK)
    if row >= end:
        return
    products += row.to(tl.int64) * width + tl.arange(0, BLOCK)
    is_column = tl.arange(0, BLOCK) < width
    others = tl.load(scale + token, mask=token < end, other=0.0)
    distance = 1 - tl.load(products, mask=is_column, other=0.0) * tl.load(scale + row) * others
    # NaN would make the order undefined, and a token could be picked twice.
    distance = tl.where(distance > 0, distance, 0.0)
    is_other = (token < end) & (token != row)
    tl.store(products, tl.where(is_other, distance, float("-inf")), mask=is_column)
    tl.store(nearest + row, tl.min(tl.where(is_other, distance, float("inf")), 0))


@triton.jit
def _pick(distances, nearest, groups, chosen, width, BLOCK: tl.constexpr):
    """One program a group. A picked token's row holds -inf for itself, which marks it as picked."""
    groups += tl.program_id(0) * WORDS
    first, end = tl.load(groups), tl.load(groups + 1)
    token = first + tl.arange(0, BLOCK)
    distances += first.to(tl.int64) * width + tl.arange(0, BLOCK)
    # Whole rows, which end at a multiple of 32: loads of 16 bytes.
    is_column = tl.arange(0, BLOCK) < width
    pick = tl.argmax(tl.load(nearest + token, mask=token < end, other=float("-inf")), 0)
    least = tl.load(distances + pick.to(tl.int64) * width, mask=is_column, other=float("-inf"))
    for _ in range(1, tl.load(groups + 2)):
        pick = tl.argmax(least, 0)
        row = tl.load(distances + pick.to(tl.int64) * width, mask=is_column, other=float("-inf"))
        least = tl.minimum(least, row)
    is_picked = (least == float("-inf")) & (token < end)
    place = tl.load(groups + 3) + tl.cumsum(is_picked.to(tl.int32)) - 1
    tl.store(chosen + place, token.to(tl.int64), mask=is_picked)


def divprune(features: torch.Tensor, groups: Groups) -> torch.Tensor:
    """pruning_reference.divprune, with the same picks to the bit. Scratch: 4 bytes for each token
    and token of the longest group."""
    products = dot_products(features, groups)
    words, total = [], 0
    for first, end, k in groups:
        words.append((first, end, k, total))
        total += k
    table = upload(np.array(words, dtype=np.int32), features.device)
    nearest = torch.empty(len(features), dtype=torch.float32, device=features.device)
    chosen = torch.empty(total, dtype=torch.int64, device=features.device)
    width = products.shape[1]
    block = triton.next_power_of_2(width)
    longest = max(end - first for first, end, _ in groups)
    num_warps = max(1, min(MAX_WARPS, block // WARP_TOKENS))
    # Without fused multiply-add, so that distances are the reference's.
    _distances[(longest, len(groups))](
        products, inverse_lengths(features), table, nearest, width,
        BLOCK=block, num_warps=num_warps, enable_fp_fusion=False,
    )  # fmt: skip
    _pick[(len(groups),)](products, nearest, table, chosen, width, BLOCK=block, num_warps=num_warps)
    return chosen
