"""Decode attention over both pools: one new token a request (reference.decode)."""

from __future__ import annotations

import torch

from .attend import attend
from .plan import Plan
from .reference import LayerPools

BLOCK = 32
ITEMS_PER_SM = 4  # programs that fill one multiprocessor, all KV heads together
# (warps, pipeline stages), measured on an H200: programs that outnumber the places for them read best when small.
FEW, MANY = (2, 5), (1, 2)
MANY_PROGRAMS = 1024


def make_plan(
    max_requests: int, max_slots: int, num_heads: int, pools: LayerPools, device: torch.device | str, num_sms: int = 132
) -> Plan:
    """A plan for decode batches of at most ``max_requests`` requests with ``max_slots`` slots each."""
    num_kv_heads, head_dim = pools.k_text.shape[1:]
    group = num_heads // num_kv_heads
    return Plan(
        max_requests,
        max_slots,
        head_dim=head_dim,
        v_head_dim=pools.v_text.shape[-1],
        rank=pools.z.shape[-1],
        tile_rows=max(16, 1 << (group - 1).bit_length()),
        align=BLOCK,
        wanted_items=max(1, num_sms * ITEMS_PER_SM // num_kv_heads),
        device=device,
    )


def decode(
    q: torch.Tensor,
    pools: LayerPools,
    plan: Plan,
    q_indptr: torch.Tensor,
    sm_scale: float,
    logit_cap: float = 0.0,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """Attention of q [bs, Hq, D] over the slots of ``plan`` -> [bs, Hq, Dv] in q's dtype; zeros for no slots.

    ``q_indptr`` [bs + 1] int32 is 0, 1, 2, ...; kept by the caller, since nothing may be made in a CUDA graph.
    """
    if out is None:
        out = q.new_empty(*q.shape[:2], pools.v_text.shape[-1])
    num_warps, num_stages = MANY if len(q) * pools.k_text.shape[1] >= MANY_PROGRAMS else FEW
    attend(
        q, q_indptr, len(q), pools, plan, out, None, sm_scale, logit_cap,
        one_token=True, num_tiles=len(q), num_warps=num_warps, num_stages=num_stages,
    )  # fmt: skip
    return out
