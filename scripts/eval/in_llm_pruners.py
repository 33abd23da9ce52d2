"""FastV and PyramidDrop: pruners inside the language model, as dense baselines.

Both drop image tokens behind some layers by the attention that the question's last token pays them.
So the layers hold different tokens, and what they hold depends on the question: a cache that is
shared by questions cannot keep it.

    FastV        (arXiv 2403.06764) the layers from K on keep what layer K - 1 attends to most
    PyramidDrop  (arXiv 2410.17247) at a quarter, half and three quarters of the layers the same
                 share stays each time, by the next layer's attention; one-dimensional positions are
                 counted anew in each stage
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from fidelity_models import Checkpoint
from pruned_prompts import Chat


@dataclass(frozen=True)
class Stages:
    """``kept``: layer -> image tokens that it and those behind it have. Their scores are the
    attention of the layer before if ``looks_back``, else of the layer itself. ``renumbers``:
    one-dimensional positions count from 0 in every stage."""

    kept: dict[int, int]
    looks_back: bool
    renumbers: bool

    def bytes(self, num_layers: int, num_tokens: int) -> float:
        """Share of the KV bytes of an image of ``num_tokens``."""
        counts = [num_tokens]
        for layer in range(num_layers):
            counts.append(self.kept.get(layer, counts[-1]))
        return sum(counts[1:]) / num_layers / num_tokens


def fastv(layer: int, share: float, num_layers: int, num_tokens: int) -> Stages | None:
    """The most tokens within ``share`` of the bytes; None where the layers before ``layer`` alone
    take more."""
    count = int((share * num_layers - layer) * num_tokens / (num_layers - layer) + 1e-9)
    return (
        Stages({layer: min(count, num_tokens)}, looks_back=True, renumbers=False)
        if count >= 1
        else None
    )


def pyramid_drop(share: float, num_layers: int, num_tokens: int) -> Stages | None:
    """The stages of one ratio with the most tokens within ``share`` of the bytes; None where there
    are none."""
    layers = sorted({max(1, num_layers * quarter // 4) for quarter in (1, 2, 3)})

    def of_ratio(ratio: float) -> Stages:
        counts = [int(num_tokens * ratio**number + 1e-9) for number in range(1, len(layers) + 1)]
        return Stages(
            {layer: max(1, count) for layer, count in zip(layers, counts, strict=False)},
            looks_back=False,
            renumbers=True,
        )

    if of_ratio(1.0).bytes(num_layers, num_tokens) <= share:
        return of_ratio(1.0)
    low, high = 0.0, 1.0
    for _ in range(30):
        middle = (low + high) / 2
        if of_ratio(middle).bytes(num_layers, num_tokens) <= share:
            low = middle
        else:
            high = middle
    stages = of_ratio(low)
    return stages if stages.bytes(num_layers, num_tokens) <= share else None


def stages_of(name: str, budget: float, num_layers: int, num_tokens: int) -> Stages | None:
    """Of ``fastvK``, or ``pyramiddrop``."""
    if name == "pyramiddrop":
        return pyramid_drop(budget, num_layers, num_tokens)
    return fastv(int(name.removeprefix("fastv")), budget, num_layers, num_tokens)


@torch.inference_mode()
def read_with_stages(
    checkpoint: Checkpoint, chat: Chat, stages: Stages, judges: list[int]
) -> tuple[list[torch.Tensor], torch.Tensor]:
    """Logits [B, tokens, vocabulary] of each answer where row b of a batch chooses by the attention
    of token judges[b] of the chat, and the image tokens [B, K] that its last layers have. Keys and
    Values are exact."""
    start, end = chat.image
    batch = len(judges)
    hidden = chat.embeds.expand(batch, -1, -1)
    positions = chat.positions[:, None].expand(-1, batch, -1)
    kept = torch.arange(end - start, device=hidden.device).expand(batch, -1)
    rows = torch.tensor(judges, device=hidden.device)
    scores = torch.empty(0)
    for number, layer in enumerate(checkpoint.text_model.layers):
        if number in stages.kept:
            if not stages.looks_back:
                with attention_to_image(
                    checkpoint, rows - chat.embeds.shape[0], start, kept.shape[1]
                ) as seen:
                    run_layer(checkpoint, layer, hidden, positions)
                scores = seen[0]
            chosen = scores.topk(stages.kept[number], 1).indices.sort(1).values
            kept = kept.gather(1, chosen)
            hidden, positions = without_dropped(hidden, positions, start, scores.shape[1], chosen)
            if stages.renumbers and len(positions) == 1:
                positions = torch.arange(hidden.shape[1], device=hidden.device).expand_as(positions)
        with attention_to_image(
            checkpoint, rows - chat.embeds.shape[0], start, kept.shape[1]
        ) as seen:
            hidden = run_layer(checkpoint, layer, hidden, positions)
        scores = seen[0]
    hidden = checkpoint.text_model.norm(hidden)
    total = len(chat.ids)
    answers = [(low - 1 - total, high - 1 - total) for low, high in chat.answers]
    return [checkpoint.model.lm_head(hidden[:, low:high]).float() for low, high in answers], kept


def run_layer(
    checkpoint: Checkpoint, layer: torch.nn.Module, hidden: torch.Tensor, positions: torch.Tensor
) -> torch.Tensor:
    position_ids = positions if len(positions) > 1 else positions[0]
    return layer(hidden, position_embeddings=checkpoint.text_model.rotary_emb(hidden, position_ids))


def without_dropped(
    hidden: torch.Tensor, positions: torch.Tensor, start: int, num_image: int, chosen: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Of a sequence [B, S] whose image begins at ``start``: what is left when ``chosen`` [B, K] of
    it stay."""
    batch, length = hidden.shape[:2]
    before, behind = (
        torch.arange(*span, device=hidden.device).expand(batch, -1)
        for span in ((0, start), (start + num_image, length))
    )
    columns = torch.cat((before, start + chosen, behind), 1)
    return (
        hidden.gather(1, columns[..., None].expand(-1, -1, hidden.shape[2])),
        positions.gather(2, columns.expand(len(positions), -1, -1)),
    )


@contextmanager
def attention_to_image(
    checkpoint: Checkpoint, rows: torch.Tensor, start: int, num_image: int
) -> Iterator[list[torch.Tensor]]:
    """Collects [B, num_image] of each attention that runs: what the token rows[b] < 0, counted from
    the end, pays the image tokens, mean over heads."""
    seen: list[torch.Tensor] = []

    def attend(module: torch.nn.Module, query: torch.Tensor, key: torch.Tensor) -> None:
        batch, num_heads, length, _ = query.shape
        last = length + rows  # where the judge is
        q = query[torch.arange(batch, device=rows.device), :, last]  # [B, Hq, D]
        keys = key.repeat_interleave(num_heads // key.shape[1], 1)
        logits = torch.einsum("bhd,bhsd->bhs", q, keys).float() * module.scaling
        is_later = torch.arange(length, device=rows.device) > last[:, None]
        weights = logits.masked_fill(is_later[:, None], float("-inf")).softmax(-1)
        seen.append(weights[:, :, start : start + num_image].mean(1))

    checkpoint.on_attention = attend
    try:
        yield seen
    finally:
        checkpoint.on_attention = None
