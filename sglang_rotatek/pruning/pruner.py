"""The scheduler process: the tower's tokens that stay, and their positions (shrink.py has what comes before)."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from functools import partial
from itertools import accumulate
from typing import Any, NamedTuple

import torch
from sglang.srt.distributed import attention_tensor_model_parallel_all_reduce, get_tp_group

from ..config import RotateKConfig
from ..stats import Stats
from . import visionzip
from .choice import Choice
from .selectors import SELECTORS
from .shrink import KEPT, PRUNER

MOST_CHOICES = 16384  # pictures whose choice is remembered; the host's cache of embeddings holds fewer


class PrunedRun(NamedTuple):
    """Where a forward computes tokens of a pruned image: rows [row, row + end - begin) of the batch are its kept tokens
    [begin, end). ``base``: M-RoPE position of the image's first token; ``width``: tokens of a row of its grid."""

    key: int
    row: int
    begin: int
    end: int
    base: int
    width: int


class Pruner:
    """``merge_size``: patches that make a token, along a side. ``broadcast``, of a tensor of a choice: makes all ranks
    choose as the first does. ``attention``: of the tower, for the pruner visionzip."""

    def __init__(
        self,
        merge_size: int,
        broadcast: Callable[[torch.Tensor], torch.Tensor],
        stats: Stats,
        attention: visionzip.TowerAttention | None = None,
    ) -> None:
        self._merge_size = merge_size
        self._broadcast = broadcast
        self._stats = stats
        self._attention = attention
        self._choices: OrderedDict[int, Choice] = OrderedDict()
        self._runs: Sequence[PrunedRun] = ()

    def features(self, original: Callable[[list], torch.Tensor], items: list) -> torch.Tensor | list[torch.Tensor]:
        """``get_image_feature`` of the model, of the kept tokens alone where an item was shrunk."""
        if not any(KEPT in item.model_specific_data for item in items):
            return original(items)
        with self._attention.recording() if self._attention is not None else nullcontext():
            found = original(items)
            lens = [int(item.image_grid_thw.prod(-1).sum()) // self._merge_size**2 for item in items]
            if sum(lens) != len(found):
                raise RuntimeError(f"the tower gave {len(found)} tokens for images of {lens}; pruning cannot tell them apart")
            starts = accumulate(lens, initial=0)
            return [self._kept(item, start, each) for item, start, each in zip(items, starts, found.split(lens))]

    def _kept(self, item: Any, start: int, features: torch.Tensor) -> torch.Tensor:
        kept = item.model_specific_data.get(KEPT)
        if kept is None:
            return features
        choice = self._choices.get(item.hash)
        if choice is None:
            choice = self._choices[item.hash] = self._choose(item, start, features)
            self._stats.tokens_pruned += len(features) - kept
            if len(self._choices) > MOST_CHOICES:
                self._choices.popitem(last=False)
        self._choices.move_to_end(item.hash)
        return choice.apply(features)

    def _choose(self, item: Any, start: int, features: torch.Tensor) -> Choice:
        kept, pruner = item.model_specific_data[KEPT], item.model_specific_data[PRUNER]
        if pruner in SELECTORS:
            choice = Choice(SELECTORS[pruner](features, kept))
        else:
            choice = visionzip.select(kept, *self._attention.scores(start, item.image_grid_thw))
        return Choice(*(self._broadcast(each) for each in choice if each is not None))

    def expect(self, batch: Any) -> None:
        """What the prefill ``batch`` computes of pruned images."""
        runs, row = [], 0
        for mm_inputs, prefix, length in zip(batch.multimodal_inputs, batch.prefix_lens, batch.extend_lens, strict=True):
            for item in mm_inputs.mm_items if mm_inputs is not None else ():
                if item is None or KEPT not in item.model_specific_data:
                    continue
                start, last = item.offsets[0]
                begin, end = max(start, prefix), min(last + 1, prefix + length)
                if begin < end:
                    base = int(mm_inputs.mrope_positions[0, start])
                    width = int(item.image_grid_thw.flatten()[-1]) // self._merge_size
                    runs.append(PrunedRun(item.hash, row + begin - prefix, begin - start, end - start, base, width))
            row += length
        self._runs = runs

    def bind(self, positions: torch.Tensor) -> None:
        """Write the original M-RoPE ids of kept tokens to ``positions`` [3, n], in place: the model reads it after the
        tower has run."""
        runs, self._runs = self._runs, ()
        for key, row, begin, end, base, width in runs:
            choice = self._choices[key].tokens[begin:end]
            rows = slice(row, row + end - begin)
            positions[0, rows] = base
            positions[1, rows] = base + choice // width
            positions[2, rows] = base + choice % width


def install_pruner(model: Any, config: RotateKConfig, stats: Stats) -> Pruner | None:
    """Around the tower and before the language model of a server's ``model``; None where nothing is pruned."""
    if config.keep_tokens == 1:
        return None
    attention = None
    if config.prunes_by_attention:
        attention = visionzip.TowerAttention(model.visual, attention_tensor_model_parallel_all_reduce)
    pruner = Pruner(model.visual.spatial_merge_size, partial(get_tp_group().broadcast, src=0), stats, attention)
    model.get_image_feature = partial(pruner.features, model.get_image_feature)

    def bind(module: torch.nn.Module, arguments: tuple, keywords: dict) -> None:
        pruner.bind(keywords["positions"])

    model.model.register_forward_pre_hook(bind, with_kwargs=True)
    return pruner
