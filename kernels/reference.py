"""The specification of every RotateK kernel, in plain torch (method.md's formulas,
arXiv 2605.19218; coded rows: coded.py).

Names: H KV heads, G query heads per KV head, D head_dim, Dv v_head_dim, r rank. For a query q and a
token t:

    text token:    score = sm_scale * (q . k_t)
    visual token:  score = sm_scale * ((P_q^T q) . z_t + q . mean + coded.residual_scores),
                   P_q, mean of the token's basis

Both kinds share one softmax. All arithmetic is fp32; results return in the query's dtype.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ..basis import Basis
from . import coded
from .coded import FP8, Codes
from .pools import LayerPools


def slot_scores(q: torch.Tensor, slots: torch.Tensor, pools: LayerPools) -> torch.Tensor:
    """Unscaled scores of every query against every slot.

    q [m, H, G, D] fp32, slots [n] int -> [m, H, G, n] fp32.
    """
    slots = slots.long()
    first_visual_slot = len(pools.k_text)
    is_visual = slots >= first_visual_slot
    scores = q.new_empty(*q.shape[:3], len(slots))
    text_keys = pools.k_text[slots[~is_visual]].float() * pools.k_scale
    scores[..., ~is_visual] = torch.einsum("mhgd,nhd->mhgn", q, text_keys)
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
    if pools.residual is not None:
        residual = Codes(pools.residual[rows], pools.visual.residual_steps[rows])
        scores[..., is_visual] += coded.residual_scores(q, residual, pools.key_bits)
    return scores


def slot_values(slots: torch.Tensor, pools: LayerPools) -> torch.Tensor:
    """slots [n] int -> values [n, H, Dv] fp32."""
    slots = slots.long()
    first_visual_slot = len(pools.k_text)
    is_visual = slots >= first_visual_slot
    values = torch.empty(len(slots), *pools.v_text.shape[1:], device=slots.device)
    values[~is_visual] = pools.v_text[slots[~is_visual]].float() * pools.v_scale
    rows = slots[is_visual] - first_visual_slot
    stored: torch.Tensor | Codes = pools.v_visual[rows]
    if pools.value_bits < 8:
        stored = Codes(pools.v_visual[rows], pools.visual.value_steps[rows])
    values[is_visual] = coded.decode_values(stored, pools.value_bits)
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

    q [bs, Hq, D], kv_indptr bs + 1 offsets into kv_indices [total] -> [bs, Hq, Dv] in q's dtype. A
    request without slots gets zeros.
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
    """Attention of a chunk: causal over its own exact keys, and over the prefix in both pools; one
    softmax.

    q [n, Hq, D], k [n, H, D], v [n, H, Dv] hold the requests one after another, split by
    ``extend_indptr``; ``kv_indptr`` splits kv_indices, the slots of each prefix. -> [n, Hq, Dv] in
    q's dtype.
    """
    return _attend(q, k, v, pools, extend_indptr, kv_indptr, kv_indices, sm_scale, logit_cap)


def expand(slots: torch.Tensor, pools: LayerPools) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys [n, H, D] and values [n, H, Dv] fp32 at full width of the tokens in ``slots`` [n]: P_q z
    + mean of a visual one, and its residual."""
    slots, first_visual_slot = slots.long(), len(pools.k_text)
    is_visual = slots >= first_visual_slot
    keys = torch.empty(len(slots), *pools.k_text.shape[1:], device=slots.device)
    keys[~is_visual] = pools.k_text[slots[~is_visual]].float() * pools.k_scale
    rows = slots[is_visual] - first_visual_slot
    bases = pools.slot_to_basis[rows].long()
    rotated = torch.einsum("nhr,nhdr->nhd", pools.z[rows].float(), pools.query_map[bases].float())
    if pools.residual is not None:
        residual = coded.dequantise(
            Codes(pools.residual[rows], pools.visual.residual_steps[rows]), pools.key_bits
        )
        rotated += residual @ coded.hadamard(residual.shape[-1], residual.device)
    keys[is_visual] = rotated + pools.mean[bases]
    return keys, slot_values(slots, pools)


def key_errors(
    keys: torch.Tensor, basis: Basis, slots: torch.Tensor, pools: LayerPools
) -> torch.Tensor:
    """[H, 2] of a segment: the energy that its basis leaves (coded.residual_energy), and the
    squared error of the Keys that ``slots`` hold, both as a share of the energy of the centred Keys
    [n, H, D]."""
    energy = (keys.float() - basis.mean).square().sum((0, 2))
    error = (expand(slots, pools)[0] - keys.float()).square().sum((0, 2))
    return torch.stack(
        [coded.residual_energy(keys, basis), error / torch.where(energy > 0, energy, 1.0)], dim=1
    )


def _attend(
    q: torch.Tensor,
    k: torch.Tensor | None,
    v: torch.Tensor | None,
    pools: LayerPools,
    extend_indptr: Sequence[int],
    kv_indptr: Sequence[int],
    kv_indices: torch.Tensor,
    sm_scale: float,
    logit_cap: float,
) -> torch.Tensor:
    num_kv_heads, v_head_dim = pools.v_text.shape[1:]
    out = q.new_zeros(*q.shape[:2], v_head_dim)
    for i in range(len(kv_indptr) - 1):
        rows = slice(extend_indptr[i], extend_indptr[i + 1])
        slots = kv_indices[kv_indptr[i] : kv_indptr[i + 1]]
        queries = q[rows].float().unflatten(1, (num_kv_heads, -1))
        scores = slot_scores(queries, slots, pools)
        values = slot_values(slots, pools)
        if k is not None and v is not None:
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
    """What partition.Partition holds of each request, as (text slots [n], visual rows [v],
    runs [*, 2]), all int32.

    The slots are in the request's order, those of visual tokens as rows of the visual pool. A run
    is neighbours in the request that share a basis: (index in ``visual rows`` after its last,
    basis).
    """
    parts = []
    for request, n in zip(req_pool_indices.tolist(), kv_lens.tolist(), strict=True):
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
    """Write k [n, H, D] and v [n, H, Dv] to ``slots`` [n], but visual Keys to
    ``workspace[workspace_rows]``, where they wait for compression."""
    slots = slots.long()
    first_visual_slot = len(pools.k_text)
    is_visual = slots >= first_visual_slot
    store_text(pools, slots[~is_visual], k[~is_visual], v[~is_visual])
    store_values(pools, slots[is_visual] - first_visual_slot, v[is_visual])
    if workspace is not None and workspace_rows is not None:
        workspace[workspace_rows[is_visual]] = k[is_visual].to(workspace.dtype)


def store_text(pools: LayerPools, slots: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> None:
    """Write k [n, H, D] and v [n, H, Dv] to text ``slots`` [n]."""
    for pool, x, scale in ((pools.k_text, k, pools.k_scale), (pools.v_text, v, pools.v_scale)):
        pool[slots] = coded.to_fp8(x.float() / scale) if pool.dtype == FP8 else x.to(pool.dtype)


def store_values(pools: LayerPools, rows: torch.Tensor, v: torch.Tensor) -> None:
    """Write v [n, H, Dv] to visual ``rows`` [n], in their format."""
    stored = coded.encode_values(v, pools.value_bits)
    if isinstance(stored, Codes):
        pools.visual.value_steps[rows] = stored.steps
        stored = stored.packed
    pools.v_visual[rows] = stored.to(pools.v_visual.dtype)


def store_keys(
    pools: LayerPools, rows: torch.Tensor, basis_id: int, basis: Basis, k: torch.Tensor
) -> None:
    """Write a segment's basis, and of its Keys k [n, H, D] what visual ``rows`` [n] hold of
    them."""
    pools.query_map[basis_id] = basis.query_map.to(pools.query_map.dtype)
    pools.mean[basis_id] = basis.mean
    if pools.residual is None:
        pools.z[rows] = compress(k, basis.key_map, basis.mean).to(pools.z.dtype)
        return
    stored = basis._replace(query_map=pools.query_map[basis_id].float())
    pools.z[rows], residual = coded.encode_keys(k, stored, pools.key_bits)
    pools.residual[rows] = residual.packed
    pools.visual.residual_steps[rows] = residual.steps
