"""The paper that the task families draw on: a grid of character cells, and a record of what lies
where."""

from __future__ import annotations

import functools
import random
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw, ImageFont

# Two characters side by side fill one 28 x 28 px visual token of either backbone.
CELL_WIDTH, CELL_HEIGHT = 14, 28
TOKEN = 28
SIZES = ((672, 672), (1008, 672), (672, 1008), (1008, 1008))
CHARACTERS = " abcdefghijklmnopqrstuvwxyz0123456789.,:-+$%#/"
FONT_SIZES = (17, 18, 19, 20)
PAPERS = ((255, 255, 255), (252, 248, 236), (240, 246, 250), (244, 244, 240), (248, 240, 244))
INKS = ((0, 0, 0), (20, 20, 60), (50, 20, 10), (10, 50, 30), (60, 10, 50))
MARGIN = 3  # px by which glyphs may reach out of their cell
WORDS = (
    "acorn amber anchor apple arrow atlas autumn badge bakery basket beacon berry birch blanket "
    "bottle branch brick bridge bronze brush bucket butter button cabin cable camel candle canvas "
    "carbon carpet castle cedar cellar chalk cherry circle clay cliff clock clover cobalt coffee "
    "copper coral cotton cousin cradle crayon cricket crystal curtain daisy desert diary dinner "
    "dolphin dragon drum eagle earth echo elbow ember engine evening fabric falcon feather fern "
    "fiddle field flame flint flour forest fossil fox garden garlic ginger glacier glove gold "
    "grain grape gravel guitar hammer harbor hazel helmet herb hill honey horse humble igloo "
    "indigo iron island ivory ivy jacket jade jelly jewel jungle kettle kitten knight ladder "
    "lagoon lake lantern laurel lemon lentil linen lizard lotus magnet maple marble meadow melon "
    "mint mirror moss mountain needle nickel noodle oak oasis ocean olive onion opal orbit orchid "
    "oyster paddle palm panda paper parcel pebble pencil pepper piano pigeon pillow pine planet "
    "plum pocket pony poppy potato prism puzzle quartz quilt rabbit radio raven ribbon rice river "
    "robin rocket rose ruby saddle salmon sand scarf shadow shell silk silver sketch snow spice "
    "spoon spruce squash stable star stone storm sugar summer sunset table tea temple thunder "
    "tiger timber tomato tower tulip tunnel turtle umber valley vanilla velvet violet violin wagon "
    "walnut water whale wheat willow window winter wolf wool yarn yellow zebra zinc"
).split()


@dataclass(frozen=True)
class Question:
    """`kind` names what the question asks for, within its family; `answer` is the one exact
    answer."""

    text: str
    answer: str
    kind: str


@functools.cache
def glyph(character: str, size: int) -> Image.Image:
    """The character in the middle of its cell, with a margin at both sides, as a mask."""
    mask = Image.new("L", (CELL_WIDTH + 2 * MARGIN, CELL_HEIGHT))
    font = ImageFont.load_default(size)
    ImageDraw.Draw(mask).text(
        (CELL_WIDTH / 2 + MARGIN, 21), character, fill=255, font=font, anchor="ms"
    )
    return mask


class Canvas:
    """An RGB picture of `size` (width, height) px.

    `glyphs` [height / 28, width / 14] uint8 holds the index in CHARACTERS of every character,
    `things` [height / 28, width / 28] uint8 what else has its centre in a token (0: nothing): dense
    targets for training.
    """

    def __init__(self, size: tuple[int, int], rng: random.Random) -> None:
        self.width, self.height = size
        self.columns, self.rows = self.width // CELL_WIDTH, self.height // CELL_HEIGHT
        self.image = Image.new("RGB", size, rng.choice(PAPERS))
        self.draw = ImageDraw.Draw(self.image)
        self.glyphs = np.zeros((self.rows, self.columns), np.uint8)
        self.things = np.zeros((self.rows, self.width // TOKEN), np.uint8)
        self.ink = rng.choice(INKS)
        self._font_size = rng.choice(FONT_SIZES)
        self._shift = (rng.randint(-2, 2) - MARGIN, rng.randint(-2, 2))

    def text(
        self, column: int, row: int, text: str, ink: tuple[int, int, int] | None = None
    ) -> None:
        """Write `text` from a cell on. ValueError if it leaves the picture or covers other text."""
        cells = self.glyphs[row, column : column + len(text)]
        if column < 0 or len(cells) < len(text) or cells.any():
            raise ValueError(
                f"no room for {text!r} at column {column}, row {row} of a {self.width} px picture"
            )
        for offset, character in enumerate(text):
            cells[offset] = CHARACTERS.index(character)
            if character != " ":
                x = (column + offset) * CELL_WIDTH + self._shift[0]
                y = row * CELL_HEIGHT + self._shift[1]
                self.image.paste(ink or self.ink, (x, y), glyph(character, self._font_size))

    def rule(self, column: int, row: int, columns: int) -> None:
        """A thin line under a row of cells."""
        y = (row + 1) * CELL_HEIGHT - 2
        self.draw.line((column * CELL_WIDTH, y, (column + columns) * CELL_WIDTH, y), fill=self.ink)


def ask(rng: random.Random, candidates: list[Question], count: int) -> list[Question]:
    """`count` of the candidates (fewer if there are not so many), every kind as likely as any
    other."""
    by_kind: dict[str, list[Question]] = {}
    for question in rng.sample(candidates, len(candidates)):
        by_kind.setdefault(question.kind, []).append(question)
    chosen: list[Question] = []
    while by_kind and len(chosen) < count:
        kind = rng.choice(sorted(by_kind))
        chosen.append(by_kind[kind].pop())
        if not by_kind[kind]:
            del by_kind[kind]
    return chosen
