"""LLaVA-NeXT: the whole picture, then its tiles' rows, each with a newline behind it."""

from __future__ import annotations

from typing import Any

import torch
from transformers import LlavaNextConfig

from ..models.llava_next import has_class_token, num_image_tokens, tile_grid, unpadded_grid
from .layouts import Group

LEAST_OF_TILE = 2  # one that stays, and one into which others may merge


class TileLayout:
    """A choice is made in the whole picture and in each tile, among the patches that hold picture
    and not padding. CLIP's class token and every newline stay. A tile keeps its share however few
    of its patches hold picture: they are as large as those of its neighbours; the whole picture
    sees to it that enough is left."""

    mrope_ids = None

    def __init__(self, config: LlavaNextConfig) -> None:
        self._config = config
        self._side = config.vision_config.image_size // config.vision_config.patch_size
        self._first = int(has_class_token(config))  # patch of the whole picture

    def num_tokens(self, item: Any) -> int | None:
        size = item.model_specific_data.get("image_sizes")
        return None if size is None else num_image_tokens(self._config, tuple(size))

    def is_one_picture(self, item: Any) -> bool:
        return True

    def groups(self, item: Any) -> list[Group]:
        tokens, tiles, _ = self._patches_of_tiles(item)
        whole = torch.arange(self._first, self._first + self._side**2)
        return [
            Group(whole),
            *(Group(tokens[tiles == tile], LEAST_OF_TILE) for tile in tiles.unique()),
        ]

    def places(self, item: Any) -> torch.Tensor:
        """[N] int64: of each token the row in what the tower gives, [1 + tiles, 1 + patches]
        flattened; 0 of a newline."""
        tokens, tiles, patches = self._patches_of_tiles(item)
        whole = torch.arange(1 - self._first, 1 + self._side**2)
        num_tokens = num_image_tokens(self._config, tuple(item.image_sizes))
        places = torch.zeros(num_tokens, dtype=torch.int64)
        places[: len(whole)] = whole
        places[tokens] = (1 + tiles) * (1 + self._side**2) + 1 + patches
        return places

    def _patches_of_tiles(self, item: Any) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Of the grid over all tiles, its padding cut off [rows, columns]: tokens, tiles, and
        patches within the tiles."""
        size, side = tuple(item.image_sizes), self._side
        (_, tile_columns), (rows, columns) = (
            tile_grid(self._config, size),
            unpadded_grid(self._config, size),
        )
        row, column = torch.arange(len(rows))[:, None], torch.arange(len(columns))
        tokens = self._first + side**2 + row * (len(columns) + 1) + column
        row, column = row + rows.start, column + columns.start
        return (
            tokens,
            row // side * tile_columns + column // side,
            row % side * side + column % side,
        )
