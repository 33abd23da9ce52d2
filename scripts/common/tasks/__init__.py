"""Endless, seeded picture questions in three families; each family is one module.

    picture = make_picture("charts", seed=7)
    picture.image, picture.questions[0].text, picture.questions[0].answer

The same arguments give the same picture and questions. Seeds from HELD_OUT_SEED on are for
evaluation alone.
"""

from __future__ import annotations

import random
from dataclasses import dataclass

import numpy as np
from PIL import Image

from . import charts, documents, scenes
from .canvas import SIZES, Canvas, Question, ask

FAMILIES = {"documents": documents, "charts": charts, "scenes": scenes}
# Values of Canvas.things.
NUM_THINGS = 1 + len(scenes.SHAPES) * len(scenes.COLORS) * 3
HELD_OUT_SEED = 10**9
# Most pictures are square: a picture of 1008 x 1008 px is 2.25 times the tokens of one of 672 x
# 672.
SIZE_WEIGHTS = (6, 1, 1, 1)


@dataclass(frozen=True)
class Picture:
    """A picture, questions about it, and the dense targets of Canvas."""

    family: str
    seed: int
    image: Image.Image
    questions: list[Question]
    glyphs: np.ndarray
    things: np.ndarray


def make_picture(
    family: str,
    seed: int,
    size: tuple[int, int] | None = None,
    questions: int = 3,
    level: float = 1.0,
) -> Picture:
    """The picture of `seed`, `size` (width, height) px, one of SIZES (default: drawn from the
    seed).

    `level` in 0..1 makes easier pictures, for the start of a training. ValueError for an unknown
    family or size.
    """
    if family not in FAMILIES:
        raise ValueError(f"family is {family!r}, expected one of {', '.join(FAMILIES)}")
    rng = random.Random(f"{family} {seed}")
    drawn_size = rng.choices(SIZES, SIZE_WEIGHTS)[0]
    size = size or drawn_size
    if size not in SIZES:
        raise ValueError(f"size is {size}, expected one of {', '.join(map(str, SIZES))}")
    canvas = Canvas(size, rng)
    candidates = FAMILIES[family].draw(canvas, rng, level)
    return Picture(
        family, seed, canvas.image, ask(rng, candidates, questions), canvas.glyphs, canvas.things
    )
