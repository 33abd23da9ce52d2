"""Where the tokens of an image lie in its picture, and which of them compete to stay when it is
pruned.

Of a Qwen2.5-VL image all tokens are one grid. A LLaVA-NeXT image has the whole picture scaled down
to a tile, then the lines of all tiles beside each other, a newline after each: there every tile
chooses among its own tokens, as the tower saw it alone, and newlines stay. Tokens are numbered in
prompt order.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F

NEWLINE = -1


@dataclass(frozen=True)
class ImageTokens:
    """int64. ``parts``: tokens [n] of each part that chooses for itself; ``fixed`` [m]: those that
    always stay; ``grid`` [H, W]: the token at each place of the picture; ``overview``: that of the
    scaled-down picture, where there is one."""

    parts: list[torch.Tensor]
    fixed: torch.Tensor
    grid: torch.Tensor
    overview: torch.Tensor | None = None

    @property
    def num_tokens(self) -> int:
        return sum(map(len, self.parts)) + len(self.fixed)

    def quotas(self, most: int) -> tuple[int, ...] | None:
        """Tokens that stay of each part, the largest common share of which at most ``most`` stay in
        all; None where one of each is too many. The least that the server keeps of an image is left
        out: it is no budget."""
        low, high = 0.0, 1.0
        if sum(self.of_share(low)) + len(self.fixed) > most:
            return None
        if self.num_tokens <= most:
            return self.of_share(1.0)
        for _ in range(30):
            middle = (low + high) / 2
            if sum(self.of_share(middle)) + len(self.fixed) <= most:
                low = middle
            else:
                high = middle
        return self.of_share(low)

    def of_share(self, share: float) -> tuple[int, ...]:
        """Tokens that stay of each part, at least one."""
        return tuple(max(1, int(share * len(part) + 0.5)) for part in self.parts)

    def share_of_squares(self, kept: torch.Tensor, shape: tuple[int, int]) -> torch.Tensor:
        """[rows, columns] fp32: of each square of a picture cut into ``shape``, the share whose
        tokens are in ``kept``."""
        stays = torch.zeros(self.num_tokens, device=kept.device)
        stays[kept] = 1
        return F.adaptive_avg_pool2d(stays[self.grid][None], shape)[0]

    def with_ink(self, ink: torch.Tensor) -> torch.Tensor:
        """[N] bool: tokens that see a square of ``ink`` [rows, columns] bool."""
        found = torch.zeros(self.num_tokens, dtype=torch.bool, device=self.grid.device)
        for places in (self.grid, self.overview):
            if places is not None:
                found[places] = (
                    F.adaptive_max_pool2d(ink.float().to(places.device)[None], places.shape)[0] > 0
                )
        return found

    def to(self, device: torch.device | str) -> ImageTokens:
        overview = None if self.overview is None else self.overview.to(device)
        return ImageTokens(
            [part.to(device) for part in self.parts],
            self.fixed.to(device),
            self.grid.to(device),
            overview,
        )


def grid_tokens(rows: int, columns: int) -> ImageTokens:
    """One grid, as of Qwen2.5-VL."""
    tokens = torch.arange(rows * columns)
    return ImageTokens([tokens], tokens[:0], tokens.view(rows, columns))


def tiled_tokens(tile_of: torch.Tensor) -> ImageTokens:
    """As of LLaVA-NeXT. ``tile_of`` [N] int64: of each token its tile, 0 for the scaled-down
    picture, or NEWLINE."""
    is_newline = tile_of == NEWLINE
    parts = [(tile_of == tile).nonzero()[:, 0] for tile in range(int(tile_of.max()) + 1)]
    overview = parts[0]
    side = int(len(overview) ** 0.5)
    line = int(is_newline.nonzero()[0]) - len(overview)
    grid = torch.arange(len(overview), len(tile_of)).view(-1, line + 1)[:, :-1]
    return ImageTokens(
        [part for part in parts if len(part)],
        is_newline.nonzero()[:, 0],
        grid,
        overview.view(side, side),
    )
