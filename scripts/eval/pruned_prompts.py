"""A picture's chat with fewer image tokens, read by a language model as a server with pruning would
have it read.

The kept tokens are prefilled with what comes before them, their Keys and Values are replaced by
what a format of rows reads back, and the questions with their true answers follow: protocol B of
fidelity.py.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from fidelity_arms import Arm
from fidelity_models import Checkpoint, Span
from image_tokens import NEWLINE, ImageTokens, grid_tokens, tiled_tokens
from PIL import Image
from tasks import Picture
from transformers import DynamicCache


@dataclass(frozen=True)
class Chat:
    """A whole chat about one picture. ``embeds`` [S, hidden]; ``positions`` [3 or 1, S]; ``ids``
    [S]; ``image``: where its picture is, ``answers``: where the tokens of each answer are.
    ``inputs`` of the model."""

    embeds: torch.Tensor
    positions: torch.Tensor
    ids: torch.Tensor
    image: Span
    answers: list[Span]
    tokens: ImageTokens
    inputs: dict

    @property
    def image_embeds(self) -> torch.Tensor:
        return self.embeds[slice(*self.image)]


def make_chat(checkpoint: Checkpoint, picture: Picture, image: Image.Image | None = None) -> Chat:
    """``image``: shown instead of the picture's own."""
    shown = picture if image is None else replace(picture, image=image)
    inputs, answers = checkpoint.render(shown)
    embeds, positions = checkpoint.embed(inputs)
    ids = inputs["input_ids"][0]
    tokens = image_tokens(checkpoint, inputs).to(checkpoint.device)
    return Chat(embeds, positions, ids, checkpoint.picture_span(ids), answers, tokens, inputs)


def image_tokens(checkpoint: Checkpoint, inputs: dict) -> ImageTokens:
    if checkpoint.has_mrope:
        _, rows, columns = inputs["image_grid_thw"][0].tolist()
        merge = checkpoint.model.config.vision_config.spatial_merge_size
        return grid_tokens(rows // merge, columns // merge)
    patch_of, patches = llava_patches(checkpoint, inputs)
    return tiled_tokens(torch.where(patch_of == NEWLINE, NEWLINE, patch_of // patches))


def llava_patches(checkpoint: Checkpoint, inputs: dict) -> tuple[torch.Tensor, int]:
    """Of each image token its patch [N] int64, numbered over all tiles, or NEWLINE; and the patches
    of a tile. The model's own packing says so."""
    vision = checkpoint.model.config.vision_config
    side = vision.image_size // vision.patch_size
    tiles = inputs["pixel_values"].shape[1]
    numbers = torch.arange(tiles * side * side, dtype=torch.float64).view(tiles, side * side, 1)
    newline = torch.full((1,), float(NEWLINE), dtype=torch.float64)
    (packed,), _ = checkpoint.model.model.pack_image_features(
        [numbers], inputs["image_sizes"].cpu(), "default", newline
    )
    return packed[:, 0].long(), side * side


def kept_positions(
    positions: torch.Tensor, image: Span, kept: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Position ids up to the picture's end, [P, B, start + K], and behind it, [P, B, rest], where
    the tokens ``kept`` [B, K] of the picture stay. With three axes all keep those that they have in
    the whole prompt, else they are consecutive."""
    start, end = image
    batch, count = kept.shape
    behind = positions.shape[1] - end
    if len(positions) == 1:
        ids = torch.arange(start + count + behind, device=positions.device).expand(1, batch, -1)
        return ids[:, :, : start + count], ids[:, :, start + count :]
    before, after = (
        part[:, None].expand(-1, batch, -1) for part in (positions[:, :start], positions[:, end:])
    )
    return torch.cat((before, positions[:, start:end][:, kept]), 2), after


def read_answers(
    checkpoint: Checkpoint,
    chat: Chat,
    kept: torch.Tensor,
    features: torch.Tensor,
    rows: Arm | None = None,
) -> list[torch.Tensor]:
    """Logits [B, tokens, vocabulary] of each answer, of a batch of choices: tokens ``kept`` [B, K],
    of embeddings ``features`` [B, K, hidden]. ``rows``: how the picture's Keys and Values are
    stored, None for exact ones."""
    start, end = chat.image
    batch = len(kept)
    first, behind = kept_positions(chat.positions, chat.image, kept)
    cache = DynamicCache()
    forward(
        checkpoint,
        torch.cat((chat.embeds[:start].expand(batch, -1, -1), features), 1),
        first,
        cache,
    )
    if rows is not None:
        store(cache, start, rows)
    hidden = forward(checkpoint, chat.embeds[end:].expand(batch, -1, -1), behind, cache)
    return [
        checkpoint.model.lm_head(hidden[:, low - 1 - end : high - 1 - end]).float()
        for low, high in chat.answers
    ]


def forward(
    checkpoint: Checkpoint, embeds: torch.Tensor, positions: torch.Tensor, cache: DynamicCache
) -> torch.Tensor:
    position_ids = positions if len(positions) > 1 else positions[0]
    output = checkpoint.text_model(
        inputs_embeds=embeds, position_ids=position_ids, past_key_values=cache, use_cache=True
    )
    return output.last_hidden_state


def store(cache: DynamicCache, start: int, rows: Arm) -> None:
    """Replace Keys and Values from ``start`` on by what ``rows`` reads back. Every layer, row of
    the batch and head is a segment of its own, so that one call does all."""
    for name, code in (("keys", lambda x: rows.key(x, x)), ("values", rows.value)):
        # [L, B, H, K, D]
        whole = torch.stack([getattr(layer, name)[:, :, start:] for layer in cache.layers])
        of_token = whole.flatten(0, 2).transpose(0, 1).float()  # [K, L B H, D]
        read_back = code(of_token).transpose(0, 1).view(whole.shape)
        for layer, of_layer in zip(cache.layers, read_back, strict=True):
            getattr(layer, name)[:, :, start:] = of_layer


def is_right(chat: Chat, logits: list[torch.Tensor]) -> torch.Tensor:
    """[B, answers] bool: whether each token of an answer is the arg-max."""
    truth = [chat.ids[low:high] for low, high in chat.answers]
    return torch.stack(
        [(one.argmax(-1) == ids).all(-1) for one, ids in zip(logits, truth, strict=True)], 1
    )
