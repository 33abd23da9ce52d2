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
    stays = torch.ones(len(input_ids), dtype=torch.bool)
    gone = 0
    for item in sorted((item for item in mm_inputs.mm_items if item.offsets), key=lambda item: item.offsets[0]):
        start, last = item.offsets[0]
        num_tokens = last - start + 1
        kept = kept_tokens(num_tokens, keep)
        if is_prunable(item) and kept < num_tokens:
            stays[start + kept : last + 1] = False
            item.offsets = [(start - gone, start - gone + kept - 1)]
            gone += num_tokens - kept
            item.model_specific_data |= {KEPT: kept, PRUNER: pruner}
            if item.hash is not None:  # else set_pad_value makes it, of these facts too
                item.set_hash(picture_key(item.hash, {KEPT: kept, PRUNER: pruner}))
        else:
            item.offsets = [(first - gone, last - gone) for first, last in item.offsets]
    if not gone:
        return input_ids
    columns = stays.nonzero()[:, 0]
    shorter = [input_ids[i] for i in columns.tolist()]
    if mm_inputs.input_ids is not None:
        mm_inputs.input_ids = shorter
    if mm_inputs.padded_input_ids is not None:
        mm_inputs.padded_input_ids = mm_inputs.build_padded_input_ids(shorter, mm_inputs.mm_items)
    if mm_inputs.mrope_positions is not None:
        mm_inputs.mrope_positions = mm_inputs.mrope_positions[:, columns]
        mm_inputs.mrope_position_delta = mm_inputs.mrope_position_delta + gone
    return shorter


def is_prunable(item: Any) -> bool:
    """One picture in one run, with its features and its grid."""
    grid = item.model_specific_data.get("image_grid_thw")
    return item.is_image() and len(item.offsets) == 1 and item.precomputed_embeddings is None and grid is not None
