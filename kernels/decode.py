"""Decode attention over both pools: one new token a request (reference.decode)."""

from __future__ import annotations

import torch

from .attend import Config, attend
from .plan import Plan
from .reference import LayerPools

MAX_ITEMS_PER_SM = 4  # programs that fill one multiprocessor, all KV heads together


def config(num_requests: int, num_kv_heads: int) -> tuple[Config, int]:
    """And the items per multiprocessor. Measured on an H200: the more programs there are, the smaller each should be."""
    programs = num_requests * num_kv_heads
    if programs >= 1024:
        return Config(block=32, num_warps=1, num_stages=2, visual_stages=2, ahead=False), 4
    if programs >= 512:
        return Config(block=64, num_warps=2, num_stages=2, visual_stages=3), 3
    return Config(block=128, num_warps=4, num_stages=2, visual_stages=3), 2


def make_plan(
    max_requests: int, max_slots: int, num_heads: int, pools: LayerPools, device: torch.device | str, num_sms: int = 132
) -> Plan:
    """A plan for decode batches of at most ``max_requests`` requests with ``max_slots`` slots each."""
    num_kv_heads = pools.k_text.shape[1]
    group = num_heads // num_kv_heads
    return Plan(
        max_requests,
        max_slots,
        pools,
        tile_rows=max(16, 1 << (group - 1).bit_length()),
        wanted_items=max(1, num_sms * MAX_ITEMS_PER_SM // num_kv_heads),
        device=device,
    )


def update_plan(
    plan: Plan,
    req_to_token: torch.Tensor,
    req_pool_indices: torch.Tensor,
    kv_lens: torch.Tensor,
    pools: LayerPools,
) -> None:
    """Plan a step for requests whose slots are ``req_to_token[req_pool_indices[i], : kv_lens[i]]``. No host sync."""
    chosen, items_per_sm = config(len(req_pool_indices), pools.k_text.shape[1])
    plan.update(
        req_to_token, req_pool_indices, kv_lens, pools,
        align=chosen.block, wanted_share=items_per_sm / MAX_ITEMS_PER_SM,
    )  # fmt: skip


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
    attend(
        q, q_indptr, len(q), pools, plan, out, None, sm_scale, logit_cap,
        one_token=True, num_tiles=len(q), config=config(len(q), pools.k_text.shape[1])[0],
    )  # fmt: skip
    return out
