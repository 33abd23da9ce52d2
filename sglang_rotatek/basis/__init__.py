"""Bases: how the Keys of one segment are narrowed. One method a file, one interface."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch


class Basis(NamedTuple):
    """A fitted basis of one segment; fp32, on the device of the keys.

    key_map:   [H, D, r]  z = (k - mean) @ key_map
    query_map: [H, D, r]  score = (q @ query_map) . z + q . mean
    mean:      [H, D]
    """

    key_map: torch.Tensor
    query_map: torch.Tensor
    mean: torch.Tensor


# fit(keys [n, H, D], window_queries [w, Hq, D], rank) -> Basis
Fit = Callable[[torch.Tensor, torch.Tensor, int], Basis]

# Queries of the last tokens that a request computes in the forward; what `paper` and `think` look
# at.
QUERY_WINDOW = 32


def get_basis(name: str, is_coded: bool = False) -> Fit:
    """The ``fit`` function of a basis, for coded rows or the paper's. Raises KeyError for a name
    that they do not know."""
    from . import paper, pca, think

    if is_coded:
        return {"pca": pca.fit_coded}[name]
    return {"pca": pca.fit, "paper": paper.fit, "think": think.fit}[name]
