"""ThinK (arXiv 2407.21018): keep whole channels, those with the largest mean(q^2) * mean(k^2). A
baseline."""

from __future__ import annotations

import torch

from . import Basis


def fit(keys: torch.Tensor, window_queries: torch.Tensor, rank: int) -> Basis:
    """Unit vectors of the ``rank`` highest-scoring channels per KV head; the original has no mean
    term.

    keys [n, H, D], window_queries [w, Hq, D] with Hq a multiple of H.
    """
    num_kv_heads, head_dim = keys.shape[1:]
    queries = window_queries.float().view(len(window_queries), num_kv_heads, -1, head_dim)
    score = queries.square().mean(dim=(0, 2)) * keys.float().square().mean(dim=0)  # [H, D]
    channels = score.topk(rank, dim=-1).indices.sort(dim=-1).values
    # [H, D, r]
    selection = torch.nn.functional.one_hot(channels, head_dim).transpose(1, 2).float().contiguous()
    return Basis(selection, selection, torch.zeros(num_kv_heads, head_dim, device=keys.device))
