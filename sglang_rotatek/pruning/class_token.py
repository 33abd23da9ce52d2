"""VisionZip for LLaVA-NeXT: what the class token of CLIP attends to, in the whole picture and in
each tile."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from ..kernels.upload import upload
from .visionzip import AttentionRecorder

if TYPE_CHECKING:
    from .tiles import TileLayout  # with the host's text models


class ClassTokenAttention(AttentionRecorder):
    """What tokens receive from the class token and their metric, read from the next to last layer
    of ``tower``, a CLIPVisionModel, which each rank has whole."""

    def __init__(self, tower: Any, layout: TileLayout) -> None:
        super().__init__()
        self._layout = layout
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

    def scores(self, items: list, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        # Those of newlines, which are in no group, mean nothing.
        first = sum(len(item.feature) for item in items[:index])
        tiles = slice(first, first + len(items[index].feature))
        # [tiles, 1 + patches, heads, d]
        keys = self._keys[tiles].unflatten(-1, (-1, self._head_dim)).float()
        queries = self._queries[tiles].unflatten(-1, (-1, self._head_dim)).float()
        weights = torch.einsum("thd,tphd->thp", queries * self._scale, keys).softmax(-1)
        places = upload(self._layout.places(items[index]).numpy(), keys.device)
        return weights.sum(1).flatten()[places], keys.sum(2).flatten(0, 1)[places]
