"""What stays of an image's tokens, and what is merged into it."""

from __future__ import annotations

from typing import NamedTuple

import torch


class Choice(NamedTuple):
    """``tokens`` [K] int64: those that stay, ascending. Where others merge into some of them, ``targets`` [c] int64: their
    places in ``tokens``, and ``joins`` [N] int32: of each token the target that it merges into, as an index of
    ``targets``, or -1."""

    tokens: torch.Tensor
    targets: torch.Tensor | None = None
    joins: torch.Tensor | None = None

    def apply(self, features: torch.Tensor) -> torch.Tensor:
        """[K, hidden] of features [N, hidden]; a target is itself plus the mean of the tokens that join it."""
        kept = features[self.tokens]
        if self.targets is None:
            return kept
        # A product, not index_add: the same bits each time.
        members = (self.joins == torch.arange(len(self.targets), device=features.device)[:, None]).float()
        mean = members @ features.float() / members.sum(1, keepdim=True).clamp(min=1)
        kept[self.targets] = (kept[self.targets].float() + mean).to(features.dtype)
        return kept
