"""VisionZip for LLaVA-NeXT: what the class token of CLIP attends to, in the whole picture and in each tile."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from .tiles import TileLayout  # with the host's text models


class ClassTokenAttention:
    """What tokens receive from the class token and their metric, read from the next to last layer of ``tower``, a
    CLIPVisionModel, which each rank has whole."""

    def __init__(self, tower: Any, layout: TileLayout) -> None:
        self._layout = layout
        self._is_recording = False
        self._queries = self._keys = torch.empty(0)
        attention = tower.encoder.layers[-2].self_attn
        self._head_dim, self._scale = attention.head_dim, attention.scale
        attention.q_proj.register_forward_hook(self._record_queries)
        attention.k_proj.register_forward_hook(self._record_keys)

    def _record_queries(self, module: Any, arguments: tuple, queries: torch.Tensor) -> None:
        if self._is_recording:
            self._queries = queries[:, 0]

    def _record_keys(self, module: Any, arguments: tuple, keys: torch.Tensor) -> None:
        if self._is_recording:
            self._keys = keys

    @contextmanager
    def recording(self) -> Iterator[None]:
        """While pictures pass the tower and are asked for."""
        self._is_recording = True
        try:
            yield
        finally:
            self._is_recording = False
            self._queries = self._keys = torch.empty(0)

    def scores(self, items: list, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        """received [N] and metric [N, d], fp32 and in the order of the prompt, of a picture of the batch ``items``; those of
        newlines, which are in no group, mean nothing."""
        first = sum(len(item.feature) for item in items[:index])
        tiles = slice(first, first + len(items[index].feature))
        keys = self._keys[tiles].unflatten(-1, (-1, self._head_dim)).float()  # [tiles, 1 + patches, heads, d]
        queries = self._queries[tiles].unflatten(-1, (-1, self._head_dim)).float()
        weights = torch.einsum("thd,tphd->thp", queries * self._scale, keys).softmax(-1)
        places = self._layout.places(items[index]).to(keys.device)
        return weights.sum(1).flatten()[places], keys.sum(2).flatten(0, 1)[places]
