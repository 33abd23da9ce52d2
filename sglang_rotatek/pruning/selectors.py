"""Which tokens stay of a group (layouts.py). Each selector takes features [N, hidden] and K and
returns K distinct indices [K] int64, ascending: of the features alone, deterministic, ties to the
lower index."""

from __future__ import annotations

from collections.abc import Callable

import torch

from ..kernels import divprune as kernel
from ..kernels import pruning_reference
from ..kernels.pruning_reference import Groups
from ..kernels.upload import upload

LEAST_TOKENS = 64  # kept of a picture
RESIDUAL_RANK = 8
STEPS = 12  # of subspace iteration


def kept_tokens(num_tokens: int, keep: float, least: int = LEAST_TOKENS) -> int:
    """How many of a group stay: a function of their number alone, which is known before the tower
    runs. Less than twice ``least`` stay whole."""
    if num_tokens < 2 * least:
        return num_tokens
    return max(least, int(keep * num_tokens + 0.5))


def uniform(features: torch.Tensor, k: int) -> torch.Tensor:
    """Evenly spaced in raster order; a baseline."""
    n = len(features)
    return torch.arange(k, device=features.device) * n // k


def divprune(features: torch.Tensor, k: int) -> torch.Tensor:
    """Max-min distances (DivPrune): pruning_reference.divprune."""
    return divprune_groups(features, [(0, len(features), k)])


def divprune_groups(features: torch.Tensor, groups: Groups) -> torch.Tensor:
    """``divprune`` in each of several images or tiles, (first row, end row, k) in ascending order:
    on a GPU in the time of the one that takes longest. Returns rows of ``features`` [sum of k],
    those of the first group first."""
    return (kernel if features.is_cuda else pruning_reference).divprune(features, groups)


def residual(features: torch.Tensor, k: int) -> torch.Tensor:
    """Those that a basis of RESIDUAL_RANK principal components of the image's tokens explains worst
    (LRCP's score, without its merging). No host sync: subspace iteration, orthonormal by Cholesky
    factors, which fp64 keeps exact enough."""
    centred = features.float() - features.float().mean(0)
    centred /= centred.norm().clamp_min(1e-30)
    # Below what fp32 resolves of the largest component; blank paper has none at all.
    shift = 1e-14 * torch.eye(RESIDUAL_RANK, dtype=torch.float64, device=features.device)
    start = torch.randn(len(features), RESIDUAL_RANK, generator=torch.Generator().manual_seed(0))
    explained = upload(start.numpy(), features.device)
    for _ in range(STEPS):
        span = (centred.T @ explained).double()
        factor = torch.linalg.cholesky_ex(torch.addmm(shift, span.T, span)).L
        basis = torch.linalg.solve_triangular(factor.T, span, upper=True, left=False)
        explained = centred @ basis.float()
    score = centred.square().sum(1) - explained.square().sum(1)
    return torch.sort(score, descending=True, stable=True).indices[:k].sort().values


SELECTORS: dict[str, Callable[[torch.Tensor, int], torch.Tensor]] = {
    "divprune": divprune,
    "residual": residual,
    "uniform": uniform,
}


def select(pruner: str, features: torch.Tensor, groups: Groups) -> torch.Tensor:
    """Rows of features [n, hidden] that stay of each group (first row, end row, K), one group after
    the other: [sum of K] int64."""
    if pruner == "divprune":
        return divprune_groups(features, groups)
    return torch.cat(
        [first + SELECTORS[pruner](features[first:end], k) for first, end, k in groups]
    )
