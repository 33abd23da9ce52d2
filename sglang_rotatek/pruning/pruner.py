"""The scheduler process: the tower's tokens that stay, and their positions (shrink.py has what
comes before)."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from functools import partial
from typing import Any, NamedTuple

import torch
from sglang.srt.distributed import attention_tensor_model_parallel_all_reduce, get_tp_group

from ..config import RotateKConfig
from ..kernels.upload import upload
from ..stats import Stats
from . import visionzip
from .choice import Choice, union
from .class_token import ClassTokenAttention
from .layouts import GridLayout, Layout, layout_of
from .selectors import SELECTORS, select
from .shrink import KEPT, PRUNER, WHOLE

# Of choices that are remembered. The host's cache of embeddings, whose entries are a hundred times
# as large, forgets before.
MOST_CHOICE_BYTES = 64 << 20


class PrunedRun(NamedTuple):
    """Where a forward computes tokens of a pruned image: rows [row, row + end - begin) of the batch
    are its kept tokens [begin, end). ``base``: M-RoPE position of the image's first token."""

    item: Any
    row: int
    begin: int
    end: int
    base: int


class Pruner:
    """``hidden_size``: of the language model; Qwen3-VL's tower puts what later layers add behind
    it, which the choice does not look at. ``broadcast``, of a tensor of a choice: makes all ranks
    choose as the first does. ``attention``: of the tower, for the pruner visionzip."""

    def __init__(
        self,
        layout: Layout,
        hidden_size: int,
        broadcast: Callable[[torch.Tensor], torch.Tensor],
        stats: Stats,
        attention: visionzip.AttentionRecorder | None = None,
    ) -> None:
        self._layout = layout
        self._hidden_size = hidden_size
        self._broadcast = broadcast
        self._stats = stats
        self._attention = attention
        self._choices: OrderedDict[int, Choice] = OrderedDict()
        self._choice_bytes = 0
        self._runs: Sequence[PrunedRun] = ()

    def features(
        self, original: Callable[[list], torch.Tensor], items: list
    ) -> torch.Tensor | list[torch.Tensor]:
        """``get_image_feature`` of the model, of the kept tokens alone where an item was shrunk."""
        if not any(KEPT in item.model_specific_data for item in items):
            return original(items)
        with self._attention.recording() if self._attention is not None else nullcontext():
            found = original(items)
            lens = [self._layout.num_tokens(item) or 0 for item in items]
            if sum(lens) != len(found):
                raise RuntimeError(
                    f"the tower gave {len(found)} tokens for images of {lens}; pruning cannot tell "
                    "them apart"
                )
            return [self._kept(items, index, each) for index, each in enumerate(found.split(lens))]

    def _kept(self, items: list, index: int, features: torch.Tensor) -> torch.Tensor:
        item = items[index]
        if KEPT not in item.model_specific_data:
            return features
        choice = self._choices.get(item.hash)
        if choice is None:
            choice = self._choose(items, index, features)
            choice = Choice(*(self._broadcast(each) for each in choice if each is not None))
            self._choices[item.hash] = choice
            self._choice_bytes += choice.nbytes
            self._stats.tokens_pruned += len(features) - len(choice.tokens)
            while self._choice_bytes > MOST_CHOICE_BYTES and len(self._choices) > 1:
                self._choice_bytes -= self._choices.popitem(last=False)[1].nbytes
        return choice.apply(features)

    def _choose(self, items: list, index: int, features: torch.Tensor) -> Choice:
        kept_of_groups, pruner = (items[index].model_specific_data[name] for name in (KEPT, PRUNER))
        stays = torch.ones(len(features), dtype=torch.bool)
        candidates, groups, first = [], [], 0
        for (tokens, _), kept in zip(
            self._layout.groups(items[index]), kept_of_groups, strict=True
        ):
            if kept < len(tokens):
                stays[tokens] = False
                candidates.append(tokens)
                groups.append((first, first + len(tokens), kept))
                first += len(tokens)
        stays = upload(stays.nonzero()[:, 0].numpy(), features.device)
        tokens = upload(torch.cat(candidates).numpy(), features.device)
        if pruner in SELECTORS:
            chosen = tokens[select(pruner, features[tokens, : self._hidden_size], groups)]
            return Choice(torch.cat((stays, chosen)).sort().values)
        assert self._attention is not None, "visionzip chooses by it"
        received, metric = self._attention.scores(items, index)
        of_groups = [(tokens[first:end], kept) for first, end, kept in groups]
        choices = [
            (each, visionzip.select(kept, received[each], metric[each])) for each, kept in of_groups
        ]
        return union(stays, choices, len(features))

    def expect(self, batch: Any) -> None:
        """What the prefill ``batch`` computes of images."""
        runs, row = [], 0
        for mm_inputs, prefix, length in zip(
            batch.multimodal_inputs, batch.prefix_lens, batch.extend_lens, strict=True
        ):
            for item in mm_inputs.mm_items if mm_inputs is not None else ():
                if item is None or not item.offsets:
                    continue
                (start, last), reason = item.offsets[0], item.model_specific_data.get(WHOLE)
                begin, end = max(start, prefix), min(last + 1, prefix + length)
                if begin >= end:
                    continue
                if reason is not None and begin == start:
                    self._stats.not_pruned(reason, sum(b + 1 - a for a, b in item.offsets))
                # Its embedding may be cached, and then the tower does not run.
                if item.hash in self._choices:
                    self._choices.move_to_end(item.hash)
                if KEPT in item.model_specific_data and self._layout.mrope_ids is not None:
                    base = int(mm_inputs.mrope_positions[0, start])
                    runs.append(
                        PrunedRun(item, row + begin - prefix, begin - start, end - start, base)
                    )
            row += length
        self._runs = runs

    def bind(self, positions: torch.Tensor) -> None:
        """Write the original M-RoPE ids of kept tokens to ``positions`` [3, n], in place: the model
        reads it after the tower has run."""
        runs, self._runs = self._runs, ()
        mrope_ids = self._layout.mrope_ids
        if mrope_ids is None:
            return
        for item, row, begin, end, base in runs:
            choice = self._choices[item.hash].tokens[begin:end]
            positions[:, row : row + end - begin] = base + mrope_ids(item, choice)


def install_pruner(
    model: Any, model_config: Any, config: RotateKConfig, stats: Stats
) -> Pruner | None:
    """Around the tower and before the language model of a server's ``model``; None where nothing is
    pruned. ``model_config``: the host's ModelConfig of it."""
    if config.keep_tokens == 1:
        return None
    layout = layout_of(model_config.hf_config)
    attention: visionzip.AttentionRecorder | None
    if not config.prunes_by_attention:
        attention = None
    elif isinstance(layout, GridLayout):
        attention = visionzip.TowerAttention(
            model.visual, attention_tensor_model_parallel_all_reduce
        )
    else:
        attention = ClassTokenAttention(model.vision_tower, layout)
    broadcast = partial(get_tp_group().broadcast, src=0)
    pruner = Pruner(layout, model_config.hidden_size, broadcast, stats, attention)
    model.get_image_feature = partial(pruner.features, model.get_image_feature)
    if layout.mrope_ids is None:
        return pruner

    def bind(module: torch.nn.Module, arguments: tuple, keywords: dict) -> None:
        pruner.bind(keywords["positions"])

    model.model.register_forward_pre_hook(bind, with_kwargs=True)
    return pruner
