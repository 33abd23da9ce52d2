"""The tokenizer process: a prompt gets as many placeholders as tokens of its images stay."""

from __future__ import annotations

from typing import Any

import torch

from ..requests.picture_key import picture_key
from ..stats import IN_PIECES, OTHER_LENGTH, PRECOMPUTED, TOO_SMALL, VIDEO
from .layouts import Layout
from .selectors import kept_tokens

# In the data of each item of a server that prunes, one of the two:
KEPT = "rotatek_kept_tokens"  # how many stay, a list with a number for each of the layout's groups
WHOLE = "rotatek_not_pruned"  # why all do
PRUNER = "rotatek_token_pruner"


def shrink(
    mm_inputs: Any, input_ids: list[int], layout: Layout, keep: float, pruner: str
) -> list[int]:
    """Drop the placeholders of tokens that will not stay, and their columns of the positions;
    returns the prompt.

    mm_inputs: the host's MultimodalProcessorOutput, changed in place. An image keeps its first K
    columns for the time being: which tokens stay is known in the tower, and ``Pruner.bind`` writes
    their positions then. Text keeps its M-RoPE positions, and the delta makes up for what decoding
    would count short.
    """
    stays = torch.ones(len(input_ids), dtype=torch.bool)
    gone = 0
    for item in sorted(
        (item for item in mm_inputs.mm_items if item.offsets), key=lambda item: item.offsets[0]
    ):
        start, last = item.offsets[0]
        reason = why_whole(item, layout)
        if reason is None:
            groups = layout.groups(item)
            kept = [kept_tokens(len(tokens), keep, least) for tokens, least in groups]
            dropped = sum(len(tokens) for tokens, _ in groups) - sum(kept)
            reason = None if dropped else TOO_SMALL
        if reason is not None:
            item.model_specific_data[WHOLE] = reason
            item.offsets = [(first - gone, last - gone) for first, last in item.offsets]
            continue
        stays[last + 1 - dropped : last + 1] = False
        item.offsets = [(start - gone, last - gone - dropped)]
        gone += dropped
        item.model_specific_data |= {KEPT: kept, PRUNER: pruner}
        if item.hash is not None:  # else set_pad_value makes it, of these facts too
            item.set_hash(picture_key(item.hash, {KEPT: kept, PRUNER: pruner}))
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


def why_whole(item: Any, layout: Layout) -> str | None:
    """None for one picture in one run, with its features and its size."""
    if not item.is_image():
        return VIDEO
    if item.precomputed_embeddings is not None:
        return PRECOMPUTED
    if len(item.offsets) != 1 or not layout.is_one_picture(item):
        return IN_PIECES
    start, last = item.offsets[0]
    return None if layout.num_tokens(item) == last - start + 1 else OTHER_LENGTH
