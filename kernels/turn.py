"""Queries turned by Hadamard blocks, which residual codes are scored with: once a layer, not in
every program."""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from .launch import Launch
from .quantise import _signs, hadamard_block

ROWS = 16  # of a program


class TurnedQueries(NamedTuple):
    """rows [n, D] in the model's dtype, n = tokens * query heads: q H, and sums [n, 2] fp32 of
    either half of each."""

    rows: torch.Tensor
    sums: torch.Tensor

    @classmethod
    def allocate(
        cls, num_rows: int, head_dim: int, dtype: torch.dtype, device: torch.device | str
    ) -> TurnedQueries:
        rows = torch.empty(num_rows, head_dim, dtype=dtype, device=device)
        return cls(rows, torch.empty(num_rows, 2, dtype=torch.float32, device=device))

    @staticmethod
    def bytes(num_rows: int, head_dim: int, itemsize: int) -> int:
        return num_rows * (head_dim * itemsize + 8)


@triton.jit(do_not_specialize=["num_rows"])
def _turn(
    q, rows, sums, num_rows, stride_q,
    HEADS: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, HALF: tl.constexpr, TURN: tl.constexpr,
    ROWS: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """One program a half of the channels of some (token, query head)."""
    if OVERLAP:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    channel, half = tl.arange(0, DP), tl.program_id(1)
    to = half * (D // 2) + tl.arange(0, HALF)
    inside = (row < num_rows)[:, None] & (channel < D)[None, :]
    at = (row // HEADS).to(tl.int64) * stride_q + row % HEADS * D
    query = tl.load(q + at[:, None] + channel[None, :], mask=inside, other=0.0)
    signs = _signs(channel[:, None], to[None, :], TURN).to(query.dtype)
    if query.dtype == tl.float32:
        turned = tl.dot(query, signs, input_precision="ieee")
    else:
        turned = tl.dot(query, signs)
    turned = (turned * TURN**-0.5).to(query.dtype)
    row = row.to(tl.int64)
    inside = (row < num_rows)[:, None] & (tl.arange(0, HALF) < D // 2)[None, :]
    tl.store(rows + row[:, None] * D + to[None, :], turned, mask=inside)
    # Of what is stored: the sums take back what unpacked codes are off by.
    turned = tl.where(inside, turned.to(tl.float32), 0.0)
    tl.store(sums + 2 * row + half, tl.sum(turned, 1), mask=row < num_rows)


def turn(q: torch.Tensor, turned: TurnedQueries, overlap: bool) -> None:
    """Write q [n, Hq, D] times coded.hadamard to the first n * Hq rows of ``turned``. ``overlap``:
    device.has_overlap."""
    num_rows = q.shape[0] * q.shape[1]
    if not num_rows:
        return
    launch = _launch(q.shape[1], q.shape[2], q.stride(0), q.dtype, q.device, overlap)
    launch((-(-num_rows // ROWS), 2, 1), q, *turned, num_rows, q.stride(0))


@functools.cache
def _launch(
    num_heads: int,
    head_dim: int,
    stride: int,
    dtype: torch.dtype,
    device: torch.device,
    overlap: bool,
) -> Launch:
    """What is not used here tells compiled variants apart."""
    constants = dict(
        HEADS=num_heads, D=head_dim, DP=triton.next_power_of_2(head_dim),
        HALF=triton.next_power_of_2(head_dim // 2), TURN=hadamard_block(head_dim), ROWS=ROWS,
        OVERLAP=overlap,
    )  # fmt: skip
    return Launch(_turn, 3, constants, num_warps=4, **({"launch_pdl": True} if overlap else {}))
