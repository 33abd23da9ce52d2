"""Principal components of the segment's Keys. Sees no query, so a cached image serves every later
question."""

from __future__ import annotations

import torch

from . import Basis

MOST_CODE = 127


def fit(keys: torch.Tensor, window_queries: torch.Tensor, rank: int) -> Basis:
    """Top-``rank`` eigenvectors V of C = sum (k - mean)(k - mean)^T per head; key_map = query_map =
    V.

    keys [n, H, D] any float dtype; ``window_queries`` is not used. Arithmetic in fp32.
    """
    keys = keys.float().transpose(0, 1)  # [H, n, D]
    mean = keys.mean(dim=1)
    centred = keys - mean[:, None]
    _, vectors = torch.linalg.eigh(centred.transpose(1, 2) @ centred)  # ascending eigenvalues
    vectors = vectors[:, :, -rank:].flip(-1).contiguous()
    return Basis(vectors, vectors, mean)


def fit_coded(keys: torch.Tensor, window_queries: torch.Tensor, rank: int) -> Basis:
    """``fit`` for a head of 8-bit codes (kernels/coded.py): key_map = V / sigma and query_map = V
    sigma, with the step sigma of each direction such that its largest coordinate has the code
    127."""
    vectors, _, mean = fit(keys, window_queries, rank)
    coordinates = torch.einsum("nhd,hdr->nhr", keys.float() - mean, vectors)
    steps = coordinates.abs().amax(0)[:, None] / MOST_CODE
    steps = torch.where(steps > 0, steps, 1.0)
    return Basis(vectors / steps, vectors * steps, mean)
