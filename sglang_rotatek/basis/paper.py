"""The basis of the RotateK paper (arXiv 2605.19218): PCA weighted by what the last queries look at.

It depends on the question that was in the prompt when the image was compressed; later turns inherit
it.
"""

from __future__ import annotations

import torch

from . import Basis

WEIGHT_FLOOR = 1e-3  # of the median channel weight
RIDGE = 1e-4  # of the mean diagonal
STEPS = 5


def fit(keys: torch.Tensor, window_queries: torch.Tensor, rank: int) -> Basis:
    """Top-``rank`` eigenvectors V of W C W with W = diag(w); w_d is the L2 norm over the window of
    the group-mean query. V comes from 5 steps of shifted Cholesky-QR subspace iteration, seed 0,
    and is applied orthonormally to unscaled keys, as in the paper. key_map = query_map = V.

    keys [n, H, D], window_queries [w, Hq, D] with Hq a multiple of H.
    """
    num_kv_heads, head_dim = keys.shape[1:]
    keys = keys.float().transpose(0, 1)
    mean = keys.mean(dim=1)
    centred = keys - mean[:, None]
    covariance = centred.transpose(1, 2) @ centred  # [H, D, D]

    weight = channel_weights(window_queries, num_kv_heads)
    matrix = weight[:, :, None] * covariance * weight[:, None, :]
    ridge = RIDGE * matrix.diagonal(dim1=1, dim2=2).mean(-1)
    matrix = matrix + ridge.clamp_min(torch.finfo(torch.float32).tiny)[:, None, None] * torch.eye(
        head_dim, device=keys.device
    )
    vectors = _subspace_iteration(matrix, rank)
    return Basis(vectors, vectors, mean)


def channel_weights(window_queries: torch.Tensor, num_kv_heads: int) -> torch.Tensor:
    """diag(W) [H, D] fp32 of window_queries [w, Hq, D]."""
    queries = (
        window_queries.float()
        .view(len(window_queries), num_kv_heads, -1, window_queries.shape[-1])
        .mean(dim=2)
    )
    weight = queries.norm(dim=0)
    return weight.clamp_min(WEIGHT_FLOOR * weight.median(dim=-1, keepdim=True).values)


def _subspace_iteration(matrix: torch.Tensor, rank: int) -> torch.Tensor:
    """Orthonormal [H, D, rank] close to the top eigenvectors of the symmetric positive ``matrix``
    [H, D, D]."""
    generator = torch.Generator().manual_seed(0)
    start = torch.randn(matrix.shape[-1], rank, generator=generator).to(matrix.device)
    vectors = _cholesky_qr(start.expand(len(matrix), -1, -1))
    for _ in range(STEPS):
        vectors = _cholesky_qr(matrix @ vectors)
    return vectors.contiguous()


def _cholesky_qr(vectors: torch.Tensor) -> torch.Tensor:
    """Orthonormal columns by a shifted Cholesky-QR, done twice since one pass leaves the shift's
    error."""
    vectors = vectors / vectors.norm(dim=1, keepdim=True).clamp_min(1e-30)
    eye = torch.eye(vectors.shape[-1], device=vectors.device)
    for shift in (1e-5, 1e-7, 0.0):
        gram = vectors.transpose(1, 2) @ vectors
        factor, failed = torch.linalg.cholesky_ex(gram + shift * eye)
        factor = torch.where(failed[:, None, None] > 0, eye, factor)
        vectors = torch.linalg.solve_triangular(
            factor, vectors.transpose(1, 2), upper=False
        ).transpose(1, 2)
    return vectors
