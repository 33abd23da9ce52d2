"""Which tokens of an image stay. Each selector takes features [N, hidden] and K and returns K distinct indices [K] int64,
ascending: of the image alone, deterministic, ties to the lower index."""

from __future__ import annotations

from collections.abc import Callable

import torch

from ..kernels import divprune as kernel
from ..kernels import reference
from ..kernels.reference import Groups

LEAST_TOKENS = 64  # kept of an image; one of less than twice as many stays whole
RESIDUAL_RANK = 8
STEPS = 12  # of subspace iteration


def kept_tokens(num_tokens: int, keep: float) -> int:
    """How many of an image's tokens stay: a function of their number alone, which is known before the tower runs."""
    if num_tokens < 2 * LEAST_TOKENS:
        return num_tokens
    return max(LEAST_TOKENS, int(keep * num_tokens + 0.5))


def uniform(features: torch.Tensor, k: int) -> torch.Tensor:
    """Evenly spaced in raster order; a baseline."""
    n = len(features)
    return torch.arange(k, device=features.device) * n // k


def divprune(features: torch.Tensor, k: int) -> torch.Tensor:
    """Max-min distances (DivPrune): reference.divprune."""
    return divprune_groups(features, [(0, len(features), k)])


def divprune_groups(features: torch.Tensor, groups: Groups) -> torch.Tensor:
    """``divprune`` in each of several images or tiles, (first row, end row, k) in ascending order: on a GPU in the time of
    the one that takes longest. Returns rows of ``features`` [sum of k], those of the first group first."""
    select = kernel.divprune if features.is_cuda else reference.divprune
    return select(features, groups)


def residual(features: torch.Tensor, k: int) -> torch.Tensor:
    """Those that a basis of RESIDUAL_RANK principal components of the image's tokens explains worst (LRCP's score, without
    its merging)."""
    centred = features.float() - features.float().mean(0)
    gram = centred @ centred.T
    rank = min(RESIDUAL_RANK, len(features))
    start = torch.randn(len(features), rank, generator=torch.Generator().manual_seed(0)).to(gram)
    basis = torch.linalg.qr(start).Q
    for _ in range(STEPS):
        basis = torch.linalg.qr(gram @ basis).Q
    values, vectors = torch.linalg.eigh(basis.T @ gram @ basis)
    explained = (basis @ vectors).square() @ values  # of a token: sum of lambda_j u_ij^2
    return torch.sort(gram.diagonal() - explained, descending=True, stable=True).indices[:k].sort().values


SELECTORS: dict[str, Callable[[torch.Tensor, int], torch.Tensor]] = {
    "divprune": divprune,
    "residual": residual,
    "uniform": uniform,
}
