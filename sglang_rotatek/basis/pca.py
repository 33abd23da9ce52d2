"""Principal components of the segment's Keys. Sees no query, so a cached image serves every later question."""

from __future__ import annotations

import torch

from . import Basis


def fit(keys: torch.Tensor, window_queries: torch.Tensor, rank: int) -> Basis:
    """Top-``rank`` eigenvectors V of C = sum (k - mean)(k - mean)^T per head; key_map = query_map = V.

    keys [n, H, D] any float dtype; ``window_queries`` is not used. Arithmetic in fp32.
    """
    keys = keys.float().transpose(0, 1)  # [H, n, D]
    mean = keys.mean(dim=1)
    centred = keys - mean[:, None]
    _, vectors = torch.linalg.eigh(centred.transpose(1, 2) @ centred)  # ascending eigenvalues
    vectors = vectors[:, :, -rank:].flip(-1).contiguous()
    return Basis(vectors, vectors, mean)
