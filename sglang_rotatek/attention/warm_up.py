"""Compile the kernels of a prefill, which the first image would else wait for."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from ..kernels import expand, extend
from ..kernels.store import store

if TYPE_CHECKING:
    from .gpu import RotateKGPUBackend


def warm_up(backend: RotateKGPUBackend) -> None:
    """Launch each kernel once. The pools are still empty: what this writes, to the padding row, one
    visual row and one basis, nobody reads."""
    pool, device = backend.token_to_kv_pool, backend.device
    row = torch.zeros(1, backend.num_heads, pool.head_dim, dtype=pool.row_dtype, device=device)
    values = row.new_zeros(1, pool.head_num, pool.v_head_dim)
    keys = row.new_zeros(1, 1, pool.head_num, pool.head_dim)
    index = torch.zeros(1, dtype=torch.int64, device=device)
    first = pool.layout.first_visual_slot
    store(keys[0], values, index + first, backend.pools[0], keys[0], index)
    backend.compressor.warm_up(keys)
    one = torch.ones(1, dtype=torch.int32, device=device)
    backend.rebuild(index, one, one, max_len=1)  # padding, which stays as it is
    for num_tokens in (1, extend.many_tokens(backend.num_heads, backend.pools[0], backend.num_sms)):
        _extend(backend, row.expand(num_tokens, -1, -1).contiguous(), index, one)
    backend.rebuild(index, 2 * one, one, max_len=2)
    new = values.new_zeros(1, pool.head_num, pool.head_dim)
    q_indptr, kv_indptr = (torch.tensor([0, n], dtype=torch.int32, device=device) for n in (1, 2))
    widened = backend.expanded_keys[:2], backend.expanded_values[:2]
    expand.expand(
        backend.pools[0], backend.partition, index, one, q_indptr, kv_indptr, new, values,
        *widened, 2,
    )  # fmt: skip


def _extend(
    backend: RotateKGPUBackend, queries: torch.Tensor, index: torch.Tensor, one: torch.Tensor
) -> None:
    """Attend from ``queries`` [n, Hq, D] of one request to one cached token."""
    pools, num_tokens = backend.pools[0], len(queries)
    out = queries.new_empty(*queries.shape[:2], backend.token_to_kv_pool.v_head_dim)
    lse = torch.zeros(queries.shape[:2], device=queries.device)
    q_indptr = torch.tensor([0, num_tokens], dtype=torch.int32, device=queries.device)
    plan = backend.extend_plan([num_tokens])
    extend.update_plan(plan, index, one)
    extend.extend(queries, out, lse, pools, plan, q_indptr, 1.0)
    if num_tokens == 1:
        extend.extend_stored(queries, pools, plan, q_indptr, 1.0)
