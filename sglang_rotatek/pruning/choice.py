"""What stays of an image's tokens, and what is merged into it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch


class Choice(NamedTuple):
    """``tokens`` [K] int64: those that stay, ascending. Where others merge into some of them,
    ``targets`` [c] int64: their places in ``tokens``, and ``joins`` [N] int32: of each token the
    target that it merges into, as an index of ``targets``, or -1."""

    tokens: torch.Tensor
    targets: torch.Tensor | None = None
    joins: torch.Tensor | None = None

    @property
    def nbytes(self) -> int:
        return sum(each.nbytes for each in self if each is not None)

    def apply(self, features: torch.Tensor) -> torch.Tensor:
        """[K, hidden] of features [N, hidden]; a target is itself plus the mean of the tokens that
        join it."""
        kept = features[self.tokens]
        if self.targets is None or self.joins is None:
            return kept
        # A product, not index_add: the same bits each time.
        members = (
            self.joins == torch.arange(len(self.targets), device=features.device)[:, None]
        ).float()
        mean = members @ features.float() / members.sum(1, keepdim=True).clamp(min=1)
        kept[self.targets] = (kept[self.targets].float() + mean).to(features.dtype)
        return kept


def union(
    always: torch.Tensor, groups: Sequence[tuple[torch.Tensor, Choice]], num_tokens: int
) -> Choice:
    """One choice among ``num_tokens``: ``always`` [m] int64, and what was chosen, with targets, in
    disjoint groups of them, each with its tokens [n] int64."""
    tokens = (
        torch.cat((always, *(members[choice.tokens] for members, choice in groups))).sort().values
    )
    joins = torch.full((num_tokens,), -1, dtype=torch.int32, device=tokens.device)
    targets, first = [], 0
    for members, choice in groups:
        assert choice.targets is not None and choice.joins is not None
        joins[members] = torch.where(choice.joins < 0, choice.joins, choice.joins + first)
        targets.append(members[choice.tokens[choice.targets]])
        first += len(choice.targets)
    return Choice(tokens, torch.searchsorted(tokens, torch.cat(targets)), joins)
