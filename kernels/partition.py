"""The slots of every request by kind, kept on the device from step to step, so that planning a
decode step looks at no slot but the new one (reference.partition).

Of the request in row ``r`` of req_to_token, with n tokens of which v are visual:

    slots[r]    [0, n - v)            its text slots, in order
                [width - v, width)    its rows in the visual pool, in order
    runs[r]     [0, num_runs[r])      (end, basis) of neighbours in the request that share a basis,
                                      in order; ends count visual rows of the request from 1

A prefill rebuilds the rows of its requests; a decode step appends one text slot to each (plan.py,
in the kernel that cuts the work). What was rebuilt or appended before and lies behind a request's
end is never read.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

# A run of fewer tokens costs more memory for its basis than it saves. Chunks and half matches of
# the prefix cache make some that are shorter all the same, for which there are the spare ones.
MIN_RUN_TOKENS = 64
SPARE_RUNS = 64
BLOCK = 1024  # tokens that one program counts and places
COUNTS = tl.constexpr(3)  # of a block: text slots, runs that end in it, visual slots of the prefix


def max_runs(width: int) -> int:
    """Runs that the table of one request holds. Who gives out visual slots must not exceed it: the
    rows of further runs would be left out of attention."""
    return width // MIN_RUN_TOKENS + SPARE_RUNS


def partition_bytes(num_requests: int, width: int) -> int:
    """What ``Partition`` allocates for req_to_token [num_requests, width]."""
    words = width + 2 * max_runs(width) + COUNTS.value * triton.cdiv(width, BLOCK)
    return 4 * num_requests * (words + 3)


@triton.jit
def _kinds(source, slot_to_basis, position, n, first_visual):
    """Of the tokens at ``position`` [BLOCK]: slot, whether it is text, whether visual, basis,
    whether its run ends."""
    slot = tl.load(source + position, mask=position < n, other=0)
    following = tl.load(source + position + 1, mask=position + 1 < n, other=0)
    is_text = (position < n) & (slot < first_visual)
    is_visual = (position < n) & (slot >= first_visual)
    basis = tl.load(slot_to_basis + slot - first_visual, mask=is_visual, other=-1)
    next_basis = tl.load(
        slot_to_basis + following - first_visual, mask=following >= first_visual, other=-1
    )
    return slot, is_text, is_visual, basis, is_visual & (basis != next_basis)


@triton.jit(do_not_specialize=["req_pool_indices", "kv_lens", "prefix_lens"])
def _count(
    req_to_token, req_pool_indices, kv_lens, prefix_lens, slot_to_basis, counts, first_visual,
    num_blocks, stride_req,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """One program a block of tokens and request: counts [*, COUNTS, num_blocks] of blocks that have
    tokens."""
    block, request = tl.program_id(0), tl.program_id(1)
    n = tl.load(kv_lens + request).to(tl.int32)
    if block * BLOCK >= n:
        return
    req_pool_index = tl.load(req_pool_indices + request).to(tl.int64)
    prefix_len = tl.load(prefix_lens + request).to(tl.int32)
    position = block * BLOCK + tl.arange(0, BLOCK)
    source = req_to_token + req_pool_index * stride_req
    _, is_text, is_visual, _, ends_run = _kinds(source, slot_to_basis, position, n, first_visual)
    counts += req_pool_index * COUNTS * num_blocks + block
    tl.store(counts, tl.sum(is_text.to(tl.int32)))
    tl.store(counts + num_blocks, tl.sum(ends_run.to(tl.int32)))
    tl.store(counts + 2 * num_blocks, tl.sum((is_visual & (position < prefix_len)).to(tl.int32)))


@triton.jit(do_not_specialize=["req_pool_indices", "kv_lens"])
def _place(
    req_to_token, req_pool_indices, kv_lens, slot_to_basis, counts,
    slots, runs, num_visual, num_runs, prefix_visual,
    first_visual, width, max_runs, num_blocks, stride_req,
    BLOCK: tl.constexpr, BLOCKS: tl.constexpr,
):  # fmt: skip
    """One program a block of tokens and request, which ``counts`` tells what lies before it."""
    block, request = tl.program_id(0), tl.program_id(1)
    n = tl.load(kv_lens + request).to(tl.int32)
    if block * BLOCK >= tl.maximum(n, 1):  # the first one writes the totals of an empty request too
        return
    req_pool_index = tl.load(req_pool_indices + request).to(tl.int64)
    each = tl.arange(0, BLOCKS)
    counts += req_pool_index * COUNTS * num_blocks + each
    text = tl.load(counts, mask=each * BLOCK < n, other=0)
    ends = tl.load(counts + num_blocks, mask=each * BLOCK < n, other=0)
    visual = n - tl.sum(text)
    if block == 0:
        prefix = tl.load(counts + 2 * num_blocks, mask=each * BLOCK < n, other=0)
        tl.store(num_visual + req_pool_index, visual)
        tl.store(num_runs + req_pool_index, tl.minimum(tl.sum(ends), max_runs))
        tl.store(prefix_visual + req_pool_index, tl.sum(prefix))

    position = block * BLOCK + tl.arange(0, BLOCK)
    source = req_to_token + req_pool_index * stride_req
    slot, is_text, is_visual, basis, ends_run = _kinds(
        source, slot_to_basis, position, n, first_visual
    )
    text_before = tl.sum(tl.where(each < block, text, 0))
    text_at = text_before + tl.cumsum(is_text.to(tl.int32)) - 1
    visual_at = block * BLOCK - text_before + tl.cumsum(is_visual.to(tl.int32)) - 1
    run_at = tl.sum(tl.where(each < block, ends, 0)) + tl.cumsum(ends_run.to(tl.int32)) - 1
    slots += req_pool_index * width
    tl.store(slots + text_at, slot, mask=is_text)
    tl.store(slots + width - visual + visual_at, slot - first_visual, mask=is_visual)
    run = runs + (req_pool_index * max_runs + run_at) * 2
    tl.store(run, visual_at + 1, mask=ends_run & (run_at < max_runs))
    tl.store(run + 1, basis, mask=ends_run & (run_at < max_runs))


class Partition:
    """For req_to_token [num_requests, width]; everything int32, and zero at first: the padding
    slot.

    slots [num_requests, width], runs [num_requests, max_runs, 2], num_visual and num_runs
    [num_requests] as above; prefix_visual [num_requests]: visual slots among the first
    ``prefix_lens`` tokens of the last rebuild, which are the first ones in ``slots``.
    """

    def __init__(self, num_requests: int, width: int, device: torch.device | str) -> None:
        def ints(*size: int) -> torch.Tensor:
            return torch.zeros(size, dtype=torch.int32, device=device)

        self.num_requests, self.width = num_requests, width
        self.slots = ints(num_requests, width)
        self.runs = ints(num_requests, max_runs(width), 2)
        self.num_visual, self.num_runs, self.prefix_visual = (ints(num_requests) for _ in range(3))
        self._counts = ints(num_requests, COUNTS.value, triton.cdiv(width, BLOCK))

    def rebuild(
        self,
        req_to_token: torch.Tensor,
        req_pool_indices: torch.Tensor,
        kv_lens: torch.Tensor,
        slot_to_basis: torch.Tensor,
        first_visual: int,
        *,
        prefix_lens: torch.Tensor | None = None,
        max_len: int | None = None,
    ) -> None:
        """Of requests whose slots are ``req_to_token[req_pool_indices[i], : kv_lens[i]]``. No host
        sync.

        req_to_token [num_requests, width] int32; req_pool_indices, kv_lens and prefix_lens [bs]
        int, prefix_lens at most kv_lens, which they are by default; slot_to_basis [visual_rows]
        int32; ``max_len``: no kv_len is larger.
        """
        if not len(req_pool_indices):
            return
        if req_to_token.shape != self.slots.shape:
            raise ValueError(
                f"the partition is of req_to_token {self.slots.shape}, got {req_to_token.shape}"
            )
        prefix_lens = kv_lens if prefix_lens is None else prefix_lens
        num_blocks = self._counts.shape[-1]
        grid = (
            max(1, triton.cdiv(self.width if max_len is None else max_len, BLOCK)),
            len(req_pool_indices),
        )
        _count[grid](
            req_to_token, req_pool_indices, kv_lens, prefix_lens, slot_to_basis, self._counts,
            first_visual,
            num_blocks, req_to_token.stride(0), BLOCK=BLOCK, num_warps=4,
        )  # fmt: skip
        _place[grid](
            req_to_token, req_pool_indices, kv_lens, slot_to_basis, self._counts, self.slots,
            self.runs,
            self.num_visual, self.num_runs, self.prefix_visual, first_visual, self.width,
            self.runs.shape[1],
            num_blocks, req_to_token.stride(0),
            BLOCK=BLOCK, BLOCKS=triton.next_power_of_2(num_blocks), num_warps=4,
        )  # fmt: skip
