"""LLaVA-NeXT: the whole picture, then its tiles' rows, each with a newline behind it."""

from __future__ import annotations

from typing import Any

import torch
from transformers import LlavaNextConfig

from ..models.llava_next import has_class_token, num_image_tokens, tile_grid, unpadded_grid
from .layouts import Group


class TileLayout:
    """A choice is made in the whole picture and in each tile, among the patches that hold picture and not padding. CLIP's
    class token and every newline stay. A tile keeps its share however few of its patches hold picture: they are as large
    as those of its neighbours; the whole picture sees to it that enough is left."""

    mrope_ids = None

    def __init__(self, config: LlavaNextConfig) -> None:
        self._config = config

    def num_tokens(self, item: Any) -> int | None:
        size = item.model_specific_data.get("image_sizes")
        return None if size is None else num_image_tokens(self._config, tuple(size))

    def groups(self, item: Any) -> list[Group]:
        size = tuple(item.image_sizes)
        (_, tile_columns), (rows, columns) = tile_grid(self._config, size), unpadded_grid(self._config, size)
        side = self._config.vision_config.image_size // self._config.vision_config.patch_size
        first = int(has_class_token(self._config))
        whole = torch.arange(first, first + side * side)
        row, column = torch.arange(len(rows))[:, None], torch.arange(len(columns))
        tokens = first + side * side + row * (len(columns) + 1) + column
        tile = (rows.start + row) // side * tile_columns + (columns.start + column) // side
        return [Group(whole), *(Group(tokens[tile == each], least=1) for each in tile.unique())]
