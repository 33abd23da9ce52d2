"""DivPrune (arXiv 2503.02175) in plain torch: the specification of divprune.py, to the bit."""

from __future__ import annotations

from collections.abc import Sequence

import torch

# (first token, end token, how many of them are picked); ascending, disjoint.
Groups = Sequence[tuple[int, int, int]]


def dot_products(features: torch.Tensor, groups: Groups) -> torch.Tensor:
    """Of the tokens of each group with one another: fp32 [N, width], column = place in the group;
    what is behind a group is not written. width: the longest group's length, rounded up to 32. Half
    precision takes the tensor cores, which sum in fp32."""
    previous = 0
    for first, end, k in groups:
        if not previous <= first < end <= len(features) or not 0 < k <= end - first:
            raise ValueError(
                f"groups must be ascending (first, end, k) within {len(features)} tokens with 1 <= "
                f"k <= end - first, got {(first, end, k)} after token {previous}; a group of which "
                "nothing is picked must be left out"
            )
        previous = end
    width = -(-max(end - first for first, end, _ in groups) // 32) * 32
    products = torch.empty(len(features), width, dtype=torch.float32, device=features.device)
    options = {}
    if features.is_cuda and features.dtype != torch.float32:
        options["out_dtype"] = torch.float32
    else:
        features = features.float()
    for first, end, _ in groups:
        tokens = features[first:end]
        torch.mm(tokens, tokens.T, out=products[first:end, : end - first], **options)
    return products


def inverse_lengths(features: torch.Tensor) -> torch.Tensor:
    """[N] fp32; of a zero vector it is finite, so that its cosines are 0."""
    return (
        torch.linalg.vector_norm(features, dim=1, dtype=torch.float32).clamp_min(1e-12).reciprocal()
    )


def divprune(features: torch.Tensor, groups: Groups) -> torch.Tensor:
    """Max-min distances (DivPrune, arXiv 2503.02175) in each group: first the token whose nearest
    neighbour is farthest, then each time the one farthest from those that were picked; ties to the
    lower index. Distance: 1 - cosine, at least 0, and 0 where it is NaN.

    features [N, hidden] fp32, bf16 or fp16. Returns rows of ``features`` [sum of k] int64: each
    group's, ascending.
    """
    products, scale = dot_products(features, groups), inverse_lengths(features)
    return torch.cat(
        [
            first + _max_min(products[first:end, : end - first], scale[first:end], k)
            for first, end, k in groups
        ]
    )


def _max_min(products: torch.Tensor, scale: torch.Tensor, k: int) -> torch.Tensor:
    distance = 1 - products * scale[:, None] * scale
    distance = torch.where(distance > 0, distance, 0.0)
    picked = [distance.clone().fill_diagonal_(float("inf")).amin(1).argmax()]
    distance.fill_diagonal_(float("-inf"))  # no token twice, as blank paper would have it
    least = distance[picked[0]]
    while len(picked) < k:
        picked.append(least.argmax())
        least = torch.minimum(least, distance[picked[-1]])
    return torch.stack(picked).sort().values
