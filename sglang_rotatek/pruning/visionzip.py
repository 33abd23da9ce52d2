"""VisionZip (arXiv 2412.04467): the tokens that receive most of the tower's attention stay, and the
others are merged.

The tower of Qwen2-VL and Qwen2.5-VL has no class token: attention received is summed over all
patches of the picture. CLIP has one (class_token.py).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from ..kernels import received as kernel
from ..kernels.upload import upload
from .choice import Choice

TOKENS_PER_TARGET = 20
MOST_WEIGHTS = 2**25  # attention weights computed at a time, over all heads: 128 MiB in fp32


def attention_received(
    q: torch.Tensor, k: torch.Tensor, most_weights: int = MOST_WEIGHTS
) -> torch.Tensor:
    """[T] fp32: sum over queries and heads of softmax(q k^T / sqrt(d)), of q and k [T, H, d]; in
    blocks of queries."""
    num_patches, num_heads, head_dim = k.shape
    block = max(1, most_weights // (num_heads * num_patches))
    keys = k.permute(1, 2, 0)  # [H, d, T]
    received = torch.zeros(num_patches, device=k.device)
    for queries in (q * head_dim**-0.5).transpose(0, 1).split(block, dim=1):  # [H, block, d]
        received += (queries @ keys).softmax(-1, dtype=torch.float32).sum((0, 1))
    return received


def select(k: int, received: torch.Tensor, metric: torch.Tensor) -> Choice:
    """``k`` >= 2 of N tokens in raster order, of received [N] and metric [N, d], fp32; ties to the
    lower index.

    Dominant ones are those that receive most. Contextual ones, N // 20 but one at least and one
    less than ``k`` at most, are evenly spaced among the rest, and each other token of the rest
    joins the one of largest cosine in ``metric``.
    """
    n = len(received)
    num_contextual = min(max(1, n // TOKENS_PER_TARGET), k - 1)
    order = received.sort(descending=True, stable=True).indices
    dominant, rest = order[: k - num_contextual], order[k - num_contextual :].sort().values
    contextual = rest[
        torch.arange(num_contextual, device=rest.device) * len(rest) // num_contextual
    ]
    unit = torch.nn.functional.normalize(metric, dim=-1)
    joins = torch.full((n,), -1, dtype=torch.int32, device=rest.device)
    joins[rest] = (unit[rest] @ unit[contextual].T).argmax(1).int()
    joins[contextual] = -1
    tokens = torch.cat((dominant, contextual)).sort().values
    return Choice(tokens, torch.searchsorted(tokens, contextual), joins)


class AttentionRecorder(ABC):
    """What a layer of a tower attends with, held while pictures pass and are asked for:
    ``_queries``, ``_keys``."""

    def __init__(self) -> None:
        self._is_recording = False
        self._queries = self._keys = torch.empty(0)

    @contextmanager
    def recording(self) -> Iterator[None]:
        """While pictures pass the tower and are asked for."""
        self._is_recording = True
        try:
            yield
        finally:
            self._is_recording = False
            self._queries = self._keys = torch.empty(0)

    @abstractmethod
    def scores(self, items: list, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        """received [N] and metric [N, d], fp32 and in the order of the prompt, of a picture of the
        batch ``items``."""


class TowerAttention(AttentionRecorder):
    """What tokens receive and their metric, read from a Qwen tower: of the last block that attends
    to whole pictures.

    ``visual``: the host's tower, whose attention is wrapped. ``all_reduce``: sums fp32 over the
    ranks that share its heads.
    """

    def __init__(self, visual: Any, all_reduce: Callable[[torch.Tensor], torch.Tensor]) -> None:
        super().__init__()
        self._visual = visual
        self._all_reduce = all_reduce
        blocks = visual.blocks
        backend = blocks[
            max(getattr(visual, "fullatt_block_indexes", range(len(blocks))))
        ].attn.qkv_backend
        self._attend, backend.forward = backend.forward, self._record

    def _record(self, q: torch.Tensor, k: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        if self._is_recording:
            self._queries, self._keys = q, k
        return self._attend(q=q, k=k, **kwargs)

    def scores(self, items: list, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        patches = self._visual.spatial_merge_size**2  # of a token
        grid = items[index].image_grid_thw
        start = sum(int(item.image_grid_thw.prod()) for item in items[:index])
        n = int(grid.prod()) // patches
        q, k = (x[start : start + n * patches] for x in (self._queries, self._keys))
        if len(k) != n * patches:
            raise RuntimeError(
                f"visionzip saw the vision tower attend to {len(self._keys)} patches, but those of "
                f"a picture are {start} to {start + n * patches}; prune with another "
                "--rotatek-token-pruner"
            )
        received = (
            (kernel.attention_received if q.is_cuda else attention_received)(q, k)
            .view(n, patches)
            .sum(1, keepdim=True)
        )
        metric = k.float().sum(1).view(n, patches, -1).sum(1)
        # Sums over heads and patches choose as means do.
        sums = self._all_reduce(torch.cat((received, metric), 1))
        if hasattr(self._visual, "get_window_index"):
            raster, _ = self._visual.get_window_index(grid)
            sums = sums[upload(raster.argsort().cpu().numpy(), sums.device)]
        return sums[:, 0], sums[:, 1:]
