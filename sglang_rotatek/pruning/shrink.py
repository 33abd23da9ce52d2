"""The tokenizer process: a prompt gets as many placeholders as tokens of its images stay."""

from __future__ import annotations

from typing import Any

import torch

from ..requests.picture_key import picture_key
from .selectors import kept_tokens

KEPT = "rotatek_kept_tokens"  # in an item's data: how many stay; no other item is pruned
PRUNER = "rotatek_token_pruner"


def shrink(mm_inputs: Any, input_ids: list[int], keep: float, pruner: str) -> list[int]:
    """Drop the placeholders of tokens that will not stay, and their columns of the positions; returns the prompt.

    mm_inputs: the host's MultimodalProcessorOutput, changed in place. An image keeps its first K columns for the time
    being: which tokens stay is known in the tower, and ``Pruner.bind`` writes their positions then. Text keeps its
    positions, and the delta makes up for what decoding would count short.
    """
    cut: list[tuple[int, int]] = []  # columns [start, end) that go
    for item in sorted(mm_inputs.mm_items, key=lambda item: item.offsets[0] if item.offsets else (0, 0)):
        gone = sum(end - start for start, end in cut)
        if item.offsets is None:
            continue
        start, end = item.offsets[0]
        kept = kept_tokens(end - start + 1, keep)
        if is_prunable(item) and kept < end - start + 1:
            cut.append((start + kept, end + 1))
            item.offsets = [(start - gone, start - gone + kept - 1)]
            item.model_specific_data |= {KEPT: kept, PRUNER: pruner}
            if item.hash is not None:  # else set_pad_value makes it, of these facts too
                item.set_hash(picture_key(item.hash, {KEPT: kept, PRUNER: pruner}))
        else:
            item.offsets = [(first - gone, last - gone) for first, last in item.offsets]
    if not cut:
        return input_ids
    stays = torch.ones(len(input_ids), dtype=torch.bool)
    for start, end in cut:
        stays[start:end] = False
    columns = stays.nonzero()[:, 0]
    at = columns.tolist()
    shorter = [input_ids[i] for i in at]
    if mm_inputs.input_ids is not None:
        mm_inputs.input_ids = shorter
    if mm_inputs.padded_input_ids is not None:
        mm_inputs.padded_input_ids = mm_inputs.build_padded_input_ids(shorter, mm_inputs.mm_items)
    if mm_inputs.mrope_positions is not None:
        mm_inputs.mrope_positions = mm_inputs.mrope_positions[:, columns]
        mm_inputs.mrope_position_delta = mm_inputs.mrope_position_delta + len(input_ids) - len(shorter)
    return shorter


def is_prunable(item: Any) -> bool:
    """One picture in one run, with its features and its grid."""
    grid = item.model_specific_data.get("image_grid_thw")
    return item.is_image() and len(item.offsets) == 1 and item.precomputed_embeddings is None and grid is not None
