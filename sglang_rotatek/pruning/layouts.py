"""How the tokens of a picture lie in a prompt, model by model: what pruning chooses among, and
where what stays belongs."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import torch

from ..models import LLAVA_NEXT
from .selectors import LEAST_TOKENS

if TYPE_CHECKING:
    from .tiles import TileLayout

MOST_IN_GROUP = 4096  # divprune holds the distances of all pairs


class Group(NamedTuple):
    """Tokens of a picture among which one choice is made. ``tokens`` [n] int64, ascending, of the
    picture's [0, N); ``least``: as ``kept_tokens`` has it."""

    tokens: torch.Tensor
    least: int = LEAST_TOKENS


class Layout(Protocol):
    """Of a model's pictures, told from an ``item`` (the host's MultimodalDataItem): the tokenizer
    and the scheduler process find the same, before the tower has run.

    mrope_ids: (item, tokens [n] int64) -> [3, n], M-RoPE ids counted from the picture's first. None
        for a model with 1-D positions, which count what stays.
    """

    @property
    def mrope_ids(self) -> Callable[[Any, torch.Tensor], torch.Tensor] | None: ...

    def num_tokens(self, item: Any) -> int | None:
        """N of the picture, or pictures, when nothing is pruned; None where the item does not
        tell."""

    def is_one_picture(self, item: Any) -> bool:
        """Whether it is one, of patches and not of ready embeddings, as far as the item tells."""

    def groups(self, item: Any) -> list[Group]:
        """Disjoint. A token of no group always stays."""


class GridLayout:
    """Qwen2-VL and those after it: one grid, row after row. ``merge_size``: patches that make a
    token, along a side."""

    def __init__(self, merge_size: int) -> None:
        self._merge_size = merge_size

    def num_tokens(self, item: Any) -> int | None:
        grid = item.model_specific_data.get("image_grid_thw")
        return None if grid is None else int(grid.prod(-1).sum()) // self._merge_size**2

    def is_one_picture(self, item: Any) -> bool:
        grid = item.model_specific_data.get("image_grid_thw")
        shape = getattr(item.feature, "shape", None)
        return grid is None or (len(grid) == 1 and (shape is None or shape[0] == int(grid.prod())))

    def groups(self, item: Any) -> list[Group]:
        num_tokens = self.num_tokens(item)
        assert num_tokens is not None, "the picture of a choice has a grid"
        tokens = torch.arange(num_tokens)
        return [Group(band) for band in tokens.chunk(-(-len(tokens) // MOST_IN_GROUP))]

    def mrope_ids(self, item: Any, tokens: torch.Tensor) -> torch.Tensor:
        width = int(item.image_grid_thw.flatten()[-1]) // self._merge_size
        return torch.stack((torch.zeros_like(tokens), tokens // width, tokens % width))


def layout_of(config: Any) -> GridLayout | TileLayout:
    """``config``: Hugging Face configuration of a model of ``RotateKConfig.PRUNABLE``."""
    if config.architectures[0] == LLAVA_NEXT:
        from .tiles import TileLayout  # with the host's text models

        return TileLayout(config)
    return GridLayout(config.vision_config.spatial_merge_size)
