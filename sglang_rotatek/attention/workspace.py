"""Device memory of the GPU backend beside the KV pool, from what is known before the pool is
sized."""

from __future__ import annotations

from ..kernels import compress, decode, extend
from ..kernels.partition import partition_bytes
from ..kernels.plan import Partials, max_partials, plan_bytes
from ..kernels.turn import TurnedQueries
from ..memory.layout import KVShape

EXPANDED_BYTES = 256 << 20


def expanded_tokens(
    num_kv_heads: int, head_dim: int, v_head_dim: int, itemsize: int, num_requests: int, width: int
) -> int:
    """Tokens that a prefill may hold at full width (expand.py): EXPANDED_BYTES of them, or all
    that there can be."""
    return min(
        EXPANDED_BYTES // (num_kv_heads * (head_dim + v_head_dim) * itemsize), num_requests * width
    )


def partial_rows(num_heads: int, num_kv_heads: int, is_coded: bool, num_sms: int) -> int:
    """Rows of partial results that hold a decode step's as well as a prefill's."""
    tiles = (
        (decode.wanted_items(num_kv_heads, num_sms), decode.tile_rows(num_heads, num_kv_heads)),
        (extend.wanted_items(num_kv_heads, is_coded, num_sms), extend.tiling(is_coded).rows),
    )
    return num_kv_heads * max(max_partials(items) * rows for items, rows in tiles)


def workspace_bytes(
    shape: KVShape,
    *,
    num_requests: int,
    width: int,
    num_heads: int,
    max_extend_tokens: int,
    num_sms: int = 132,
) -> int:
    """Bytes that the backend takes beside the KV pool: nearly all at start, the rest at most once a
    prefill.

    ``shape``, ``num_heads`` (query heads): of one rank. req_to_token is [num_requests, width].
    ``max_extend_tokens``: of one prefill; in those that are longer, the Keys of more image tokens
    take more. FlashInfer's own workspace, where a GPU needs it, is not in it
    (own_chunk.workspace_bytes), nor are activations.
    """
    heads, dim, is_coded = shape.num_kv_heads, shape.head_dim, shape.rows.is_coded
    tiles = (
        -(-max_extend_tokens * (num_heads // heads) // extend.tiling(is_coded).rows) + num_requests
    )
    plans = plan_bytes(num_requests, num_requests, decode.wanted_items(heads, num_sms))
    plans += plan_bytes(num_requests, tiles, extend.wanted_items(heads, is_coded, num_sms))
    indptrs = 2 * 4 * (num_requests + 1)
    turned = 0
    # Those of a decode step; a prefill's are activations, as large as its queries.
    if shape.rows.has_residual:
        turned = TurnedQueries.bytes(num_requests * num_heads, dim, shape.dtype_bytes)
    token = heads, dim, shape.v_head_dim, shape.dtype_bytes
    expanded = (
        expanded_tokens(*token, num_requests, width)
        * heads
        * (dim + shape.v_head_dim)
        * shape.dtype_bytes
    )
    return (
        partition_bytes(num_requests, width)
        + expanded
        + plans
        + indptrs
        + turned
        + Partials.bytes(partial_rows(num_heads, heads, is_coded, num_sms), shape.v_head_dim)
        + compress.key_bytes(max_extend_tokens, heads, dim, shape.dtype_bytes)
        + compress.scratch_bytes(
            max_extend_tokens,
            heads,
            dim,
            shape.rows.rank,
            shape.dtype_bytes,
            is_coded=shape.rows.has_residual,
        )
    )
