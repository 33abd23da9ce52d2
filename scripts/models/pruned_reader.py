"""A reader that sees a share of its visual tokens, as a server with pruning would give them: for
training.

The choice is made for all pictures of a batch at once, of the tokens that the tower gives.

    farthest   DivPrune, as sglang_rotatek/pruning/selectors.py has it for one picture
    random     any
"""

from __future__ import annotations

import functools

import torch
from image_tokens import ImageTokens
from vlm_models import Reader


class PrunedReader:
    """``share``: of the visual tokens; ``selector``: one of SELECTORS."""

    def __init__(self, reader: Reader, share: float, selector: str) -> None:
        self._reader, self.share, self.selector = reader, share, selector
        self._select = SELECTORS[selector]
        self.tokenizer, self.chat = reader.tokenizer, reader.chat

    def forward(
        self, pictures: torch.Tensor, ids: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """As Reader.forward."""
        reader, size = self._reader, (pictures.shape[2], pictures.shape[1])
        visual, squares = reader.visual_tokens(reader.normalised(pictures))
        kept = self.choose(visual.detach(), tokens_of(reader, size, visual.device))
        tables = (
            kept_table(table, kept, len(reader.prefix_ids), visual.shape[1], reader.keeps_positions)
            for table in reader.tables(size, ids.shape[1])
        )
        few = visual.gather(1, kept[..., None].expand(-1, -1, visual.shape[2]))
        return reader.decode(few, ids, *tables), squares

    def choose(self, visual: torch.Tensor, tokens: ImageTokens) -> torch.Tensor:
        """Tokens that stay [B, K] int64, ascending, of visual [B, N, hidden]."""
        quotas = tokens.of_share(self.share)
        kept = [
            part[self._select(visual[:, part], k)]
            for part, k in zip(tokens.parts, quotas, strict=True)
        ]
        return torch.cat((*kept, tokens.fixed.expand(len(visual), -1)), 1).sort(1).values


@functools.cache
def tokens_of(reader: Reader, size: tuple[int, int], device: torch.device) -> ImageTokens:
    return reader.image_tokens(size).to(device)


def kept_table(
    table: torch.Tensor, kept: torch.Tensor, start: int, num_visual: int, keeps_positions: bool
) -> torch.Tensor:
    """Rotary table of the prompts that are left, from that of the whole one [S, D]: [B, 1, S', D]
    if tokens keep their positions, else of consecutive ones [S', D]."""
    if not keeps_positions:
        return table[: len(table) - num_visual + kept.shape[1]]
    before, visual, behind = table.split((start, num_visual, len(table) - start - num_visual))
    before, behind = (part.expand(len(kept), -1, -1) for part in (before, behind))
    return torch.cat((before, visual[kept], behind), 1)[:, None]


def at_random(features: torch.Tensor, k: int) -> torch.Tensor:
    """[B, k] of features [B, n, hidden]."""
    return torch.rand(features.shape[:2], device=features.device).topk(k, 1).indices


def farthest(features: torch.Tensor, k: int) -> torch.Tensor:
    """[B, k] of features [B, n, hidden]: first the token whose nearest neighbour is farthest, then
    each time the one farthest from those that were picked, by 1 - cosine."""
    unit = torch.nn.functional.normalize(features.float(), dim=-1)
    distance = 1 - unit @ unit.mT
    nearest = distance.clone()
    nearest.diagonal(dim1=1, dim2=2).fill_(float("inf"))
    rows = torch.arange(len(features), device=features.device)
    picked = torch.empty(len(features), k, dtype=torch.int64, device=features.device)
    picked[:, 0] = last = nearest.amin(2).argmax(1)
    least = distance[rows, last]
    for number in range(1, k):
        least[rows, last] = float("-inf")  # no token twice
        picked[:, number] = last = least.argmax(1)
        least = torch.minimum(least, distance[rows, last])
    return picked


SELECTORS = {"farthest": farthest, "random": at_random}
