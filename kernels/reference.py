"""The specification of every RotateK kernel, in plain torch (method.md's formulas, arXiv 2605.19218).

Names: H KV heads, G query heads per KV head, D head_dim, Dv v_head_dim, r rank. For a query q and a token t:

    text token:    score = sm_scale * (q . k_t)
    visual token:  score = sm_scale * ((P_q^T q) . z_t + q . mean),   P_q and mean of the token's basis

Both kinds share one softmax. All arithmetic is fp32; results return in the query's dtype.
"""

from __future__ import annotations

from typing import NamedTuple

import torch


class LayerPools(NamedTuple):
    """One layer's view of the pools. Slot s is visual when s >= len(k_text) (= first_visual_slot), and then lies in
    row s - len(k_text) of the visual pool. Rows and bases may be strided; all but their first dimension is contiguous. The
    pools and the bases may be views of one memory, each part of which is one of them at a time.

    k_text [first_visual_slot, H, D] · v_text [first_visual_slot, H, Dv] · z [visual_rows, H, r] ·
    v_visual [visual_rows, H, Dv] · query_map [bases, H, D, r] · mean [bases, H, D] fp32 · slot_to_basis [visual_rows] int32
    """

    k_text: torch.Tensor
    v_text: torch.Tensor
    z: torch.Tensor
    v_visual: torch.Tensor
    query_map: torch.Tensor
    mean: torch.Tensor
    slot_to_basis: torch.Tensor


class CompressedPools(NamedTuple):
    """What compression writes, for L layers: z [L, visual_rows, H, r], query_map [L, bases, H, D, r], mean
    [L, bases, H, D] fp32; row 0 of z is slot ``first_visual_slot``."""

    z: torch.Tensor
    query_map: torch.Tensor
    mean: torch.Tensor
    first_visual_slot: int


def split_rows(memory: torch.Tensor, num_heads: int, key_channels: int, value_channels: int) -> tuple[torch.Tensor, ...]:
    """``memory`` [layers, n] as rows of a Key and a Value: views [layers, rows, H, key or value channels]."""
    keys, values = num_heads * key_channels, num_heads * value_channels
    rows = memory.view(len(memory), -1, keys + values)
    return rows[..., :keys].unflatten(-1, (num_heads, -1)), rows[..., keys:].unflatten(-1, (num_heads, -1))


def slot_scores(q: torch.Tensor, slots: torch.Tensor, pools: LayerPools) -> torch.Tensor:
    """Unscaled scores of every query against every slot.

    q [m, H, G, D] fp32, slots [n] int -> [m, H, G, n] fp32.
    """
    slots = slots.long()
    first_visual_slot = len(pools.k_text)
    is_visual = slots >= first_visual_slot
    scores = q.new_empty(*q.shape[:3], len(slots))
    scores[..., ~is_visual] = torch.einsum("mhgd,nhd->mhgn", q, pools.k_text[slots[~is_visual]].float())
    rows = slots[is_visual] - first_visual_slot
    bases, of_row = pools.slot_to_basis[rows].unique(return_inverse=True)
    columns = is_visual.nonzero().squeeze(1)
    for i, basis in enumerate(bases.tolist()):
        here = of_row == i
        rotated = torch.einsum("mhgd,hdr->mhgr", q, pools.query_map[basis].float())
        bias = torch.einsum("mhgd,hd->mhg", q, pools.mean[basis])
        scores[..., columns[here]] = (
            torch.einsum("mhgr,nhr->mhgn", rotated, pools.z[rows[here]].float()) + bias[..., None]
        )
    return scores


def slot_values(slots: torch.Tensor, pools: LayerPools) -> torch.Tensor:
    """slots [n] int -> values [n, H, Dv]."""
    slots = slots.long()
    first_visual_slot = len(pools.k_text)
    is_visual = slots >= first_visual_slot
    values = pools.v_text.new_empty(len(slots), *pools.v_text.shape[1:])
    values[~is_visual] = pools.v_text[slots[~is_visual]]
    values[is_visual] = pools.v_visual[slots[is_visual] - first_visual_slot]
    return values


def decode(
    q: torch.Tensor,
    pools: LayerPools,
    kv_indptr: list[int],
    kv_indices: torch.Tensor,
    sm_scale: float,
    logit_cap: float = 0.0,
) -> torch.Tensor:
    """Attention of one new token per request over all slots of the request.

    q [bs, Hq, D], kv_indptr bs + 1 offsets into kv_indices [total] -> [bs, Hq, Dv] in q's dtype. A request
    without slots gets zeros.
    """
    extend_indptr = list(range(len(kv_indptr)))
    return _attend(q, None, None, pools, extend_indptr, kv_indptr, kv_indices, sm_scale, logit_cap)


def extend(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    pools: LayerPools,
    extend_indptr: list[int],
    kv_indptr: list[int],
    kv_indices: torch.Tensor,
    sm_scale: float,
    logit_cap: float = 0.0,
) -> torch.Tensor:
    """Attention of a chunk: causal over its own exact keys, and over the prefix in both pools; one softmax.

    q [n, Hq, D], k [n, H, D], v [n, H, Dv] hold the requests one after another, split by ``extend_indptr``;
    ``kv_indptr`` splits kv_indices, the slots of each prefix. -> [n, Hq, Dv] in q's dtype.
    """
    return _attend(q, k, v, pools, extend_indptr, kv_indptr, kv_indices, sm_scale, logit_cap)


def expand(slots: torch.Tensor, pools: LayerPools) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys [n, H, D] and values [n, H, Dv] fp32 at full width of the tokens in ``slots`` [n]: P_q z + mean of a visual one."""
    slots, first_visual_slot = slots.long(), len(pools.k_text)
    is_visual = slots >= first_visual_slot
    keys = torch.empty(len(slots), *pools.k_text.shape[1:], device=slots.device)
    keys[~is_visual] = pools.k_text[slots[~is_visual]].float()
    rows = slots[is_visual] - first_visual_slot
    bases = pools.slot_to_basis[rows].long()
    rotated = torch.einsum("nhr,nhdr->nhd", pools.z[rows].float(), pools.query_map[bases].float())
    keys[is_visual] = rotated + pools.mean[bases]
    return keys, slot_values(slots, pools).float()


def _attend(q, k, v, pools, extend_indptr, kv_indptr, kv_indices, sm_scale, logit_cap):
    num_kv_heads, v_head_dim = pools.v_text.shape[1:]
    out = q.new_zeros(*q.shape[:2], v_head_dim)
    for i in range(len(kv_indptr) - 1):
        rows = slice(extend_indptr[i], extend_indptr[i + 1])
        slots = kv_indices[kv_indptr[i] : kv_indptr[i + 1]]
        queries = q[rows].float().unflatten(1, (num_kv_heads, -1))
        scores = slot_scores(queries, slots, pools)
        values = slot_values(slots, pools).float()
        if k is not None:
            own = torch.einsum("mhgd,nhd->mhgn", queries, k[rows].float())
            scores = torch.cat([scores, own], dim=-1)
            values = torch.cat([values, v[rows].float()])
        if not scores.shape[-1]:
            continue
        scores = scores * sm_scale
        if logit_cap > 0:
            scores = logit_cap * torch.tanh(scores / logit_cap)
        if k is not None:
            m = len(queries)
            future = torch.ones(m, m, dtype=torch.bool, device=q.device).triu(1)
            scores[..., len(slots) :].masked_fill_(future[:, None, None, :], float("-inf"))
        attended = torch.einsum("mhgn,nhd->mhgd", scores.softmax(-1), values)
        out[rows] = attended.flatten(1, 2).to(q.dtype)
    return out


def compress(keys: torch.Tensor, key_map: torch.Tensor, mean: torch.Tensor) -> torch.Tensor:
    """Rotated keys of one segment: z = (k - mean) @ key_map. keys [n, H, D] -> [n, H, r] fp32."""
    return torch.einsum("nhd,hdr->nhr", keys.float() - mean, key_map)


def partition(
    req_to_token: torch.Tensor,
    req_pool_indices: torch.Tensor,
    kv_lens: torch.Tensor,
    slot_to_basis: torch.Tensor,
    first_visual_slot: int,
) -> list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
    """What partition.Partition holds of each request, as (text slots [n], visual rows [v], runs [*,
    2]), all int32.

    The slots are in the request's order, those of visual tokens as rows of the visual pool. A run
    is neighbours in the request that share a basis: (index in ``visual rows`` after its last,
    basis).
    """
    parts = []
    for request, n in zip(req_pool_indices.tolist(), kv_lens.tolist()):
        slots = req_to_token[request, :n]
        is_visual = slots >= first_visual_slot
        visual_rows = slots[is_visual] - first_visual_slot
        basis = torch.full_like(slots, -1)
        basis[is_visual] = slot_to_basis[visual_rows.long()].to(slots.dtype)
        bases, lens = basis.unique_consecutive(return_counts=True)
        ends = lens[bases >= 0].cumsum(0).to(slots.dtype)
        parts.append(
            (slots[~is_visual], visual_rows, torch.stack([ends, bases[bases >= 0]], dim=1))
        )
    return parts


def store(
    k: torch.Tensor,
    v: torch.Tensor,
    slots: torch.Tensor,
    pools: LayerPools,
    workspace: torch.Tensor | None = None,
    workspace_rows: torch.Tensor | None = None,
) -> None:
    """Write k [n, H, D] and v [n, H, Dv] to ``slots`` [n], but visual Keys to ``workspace[workspace_rows]``, where they
    wait for compression."""
    slots = slots.long()
    first_visual_slot = len(pools.k_text)
    is_visual = slots >= first_visual_slot
    pools.k_text[slots[~is_visual]] = k[~is_visual].to(pools.k_text.dtype)
    pools.v_text[slots[~is_visual]] = v[~is_visual].to(pools.v_text.dtype)
    pools.v_visual[slots[is_visual] - first_visual_slot] = v[is_visual].to(pools.v_visual.dtype)
    if workspace is not None:
        workspace[workspace_rows[is_visual]] = k[is_visual].to(workspace.dtype)
