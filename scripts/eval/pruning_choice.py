"""Which tokens of an image each selector keeps, for the evaluation.

divprune, residual, uniform   the server's (sglang_rotatek/pruning/selectors.py)
visionzip   the server's, with the attention of the Hugging Face tower
random      RANDOM_SEEDS times, "random 0" and so on
oracle      squares with ink first, which only the one who drew the picture knows: a ceiling
smaller     all tokens of a picture scaled down until it has so few
"""

from __future__ import annotations

import re

import numpy as np
import torch
from fidelity_models import Checkpoint
from PIL import Image
from pruned_prompts import Chat, make_chat
from tasks import Picture
from tasks.canvas import CHARACTERS, TOKEN
from visionzip_scores import TowerScores

from sglang_rotatek.pruning import visionzip
from sglang_rotatek.pruning.selectors import SELECTORS, uniform

RANDOM_SEEDS = 5
SCALES = 200  # that a smaller picture may have

# Tokens kept [K] int64, ascending, and their embeddings [K, hidden].
Choice = tuple[torch.Tensor, torch.Tensor]


class Chooser:
    """Choices of one chat; what several budgets have in common is computed once."""

    def __init__(
        self, checkpoint: Checkpoint, picture: Picture, chat: Chat, tower: TowerScores | None
    ) -> None:
        self._checkpoint, self._picture, self._chat = checkpoint, picture, chat
        self._features = chat.image_embeds
        self._ink = chat.tokens.with_ink(ink_of(picture.image))
        self._scores = tower.of(chat.inputs) if tower else None
        self._chosen: dict[tuple[str, tuple[int, ...]], Choice] = {}
        self._smaller: dict[tuple[int, int], Chat] = {}

    def choose(self, selector: str, quotas: tuple[int, ...]) -> Choice:
        """``quotas`` tokens of each part of the image, and what always stays."""
        key = selector, quotas
        if key not in self._chosen:
            tokens = self._chat.tokens
            chosen = [
                self._of_part(selector, part, k)
                for part, k in zip(tokens.parts, quotas, strict=True)
            ]
            chosen.append((tokens.fixed, self._features[tokens.fixed]))
            kept, features = (torch.cat(each) for each in zip(*chosen, strict=True))
            order = kept.argsort()
            self._chosen[key] = kept[order], features[order]
        return self._chosen[key]

    def _of_part(self, selector: str, part: torch.Tensor, k: int) -> Choice:
        features = self._features[part]
        if selector == "visionzip":
            chosen = visionzip.select(k, *(scores[part] for scores in self._scores))
            return part[chosen.tokens], chosen.apply(features)
        if selector == "oracle":
            picked = ink_first(self._ink[part], k)
        elif selector.startswith("random"):
            seed = int(selector.split()[1]) + RANDOM_SEEDS * self._picture.seed
            picked = (
                torch.randperm(len(part), generator=torch.Generator().manual_seed(seed))[:k]
                .sort()
                .values
            )
        else:
            picked = SELECTORS[selector](features, k)
        picked = picked.to(part.device)
        return part[picked], features[picked]

    def smaller(self, most: int) -> Chat | None:
        """The chat about the largest smaller picture with at most ``most`` tokens; None where the
        processor makes none."""
        width, height = self._picture.image.size
        for scale in range(SCALES, 0, -1):
            size = max(1, width * scale // SCALES), max(1, height * scale // SCALES)
            try:
                (count,) = self._checkpoint.processor._get_num_multimodal_tokens([size[::-1]])[
                    "num_image_tokens"
                ]
            except ValueError:  # too thin for the processor
                return None
            if count <= most:
                if size not in self._smaller:
                    image = self._picture.image.resize(size, Image.Resampling.LANCZOS)
                    self._smaller[size] = make_chat(self._checkpoint, self._picture, image)
                return self._smaller[size]
        return None


def ink_of(image: Image.Image) -> torch.Tensor:
    """[rows, columns] bool: squares of TOKEN px that are not of one colour."""
    pixels = np.asarray(image)
    squares = pixels.reshape(pixels.shape[0] // TOKEN, TOKEN, pixels.shape[1] // TOKEN, TOKEN, 3)
    return torch.from_numpy((squares.max((1, 3)) != squares.min((1, 3))).any(-1))


def ink_first(ink: torch.Tensor, k: int) -> torch.Tensor:
    """``k`` tokens of ink [n] bool: those with ink, then the others; evenly spaced where not all
    fit."""
    inked, blank = ink.nonzero()[:, 0], (~ink).nonzero()[:, 0]
    if k <= len(inked):
        return inked[uniform(inked, k)]
    return torch.cat((inked, blank[uniform(blank, k - len(inked))])).sort().values


def answer_squares(picture: Picture, answer: str) -> torch.Tensor | None:
    """[rows, columns] bool: squares under the characters of an answer that is written in the
    picture, in one piece or in several; None where a piece is nowhere or in more than one place."""
    lines = ["".join(CHARACTERS[index] for index in row) for row in picture.glyphs]
    found = np.zeros(picture.glyphs.shape, bool)
    for piece in re.split(r"\n|, ", answer):
        places = places_of(lines, piece)
        if not places:
            places = [
                place for word in piece.split() for place in (places_of(lines, word) or [None])
            ]
            if len(places) != len(piece.split()) or None in places:
                return None
        elif len(places) > 1:
            return None
        for row, start, end in places:
            found[row, start:end] = True
    return torch.from_numpy(found.reshape(len(lines), -1, 2).any(-1))


def places_of(lines: list[str], piece: str) -> list[tuple[int, int, int]]:
    """Row, first and end column wherever ``piece`` stands between spaces."""
    pattern = re.compile(rf"(?<!\S){re.escape(piece)}(?!\S)")
    return [
        (row, match.start(), match.end())
        for row, line in enumerate(lines)
        for match in pattern.finditer(line)
    ]


def recalls(
    chat: Chat, kept: torch.Tensor, squares: list[torch.Tensor | None]
) -> list[float | None]:
    """Of each answer the share of its squares whose tokens are among ``kept``."""
    shape = next((one.shape for one in squares if one is not None), None)
    if shape is None:
        return [None] * len(squares)
    share = chat.tokens.share_of_squares(kept, tuple(shape)).cpu()
    return [None if one is None else float(share[one].mean()) for one in squares]
