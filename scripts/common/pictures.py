"""Test pictures drawn from a seed, so that a benchmark or a demo needs no image files."""

import base64
import io
import random

from PIL import Image, ImageDraw, ImageFont

COLOURS = (
    "crimson",
    "seagreen",
    "royalblue",
    "gold",
    "darkorange",
    "purple",
    "teal",
    "black",
    "white",
    "hotpink",
)
WORDS = (
    "north",
    "harbour",
    "total",
    "exit",
    "garden",
    "42",
    "open",
    "station",
    "sum",
    "river",
    "7.5 km",
    "menu",
)


def picture(seed: int | str, size: tuple[int, int]) -> Image.Image:
    """An RGB image of `size` (width, height) pixels with shapes and words; the same for the same
    arguments."""
    draws = random.Random(f"picture {seed}")
    width, height = size
    background, *palette = draws.sample(COLOURS, len(COLOURS))
    image = Image.new("RGB", size, background)
    canvas = ImageDraw.Draw(image)
    for _ in range(10):
        left, top = draws.uniform(0, 0.8) * width, draws.uniform(0, 0.8) * height
        box = (
            left,
            top,
            left + draws.uniform(0.1, 0.4) * width,
            top + draws.uniform(0.1, 0.4) * height,
        )
        shape = draws.choice((canvas.rectangle, canvas.ellipse, canvas.line))
        shape(box, fill=draws.choice(palette), width=max(1, width // 60))
    for _ in range(3):
        font = ImageFont.load_default(size=max(8, int(height * draws.uniform(0.06, 0.14))))
        corner = (draws.uniform(0, 0.7) * width, draws.uniform(0, 0.85) * height)
        canvas.text(corner, draws.choice(WORDS), fill=draws.choice(palette), font=font)
    return image


def flat_picture(seed: int | str, size: tuple[int, int]) -> Image.Image:
    """Like `picture`, of rectangles alone: a few milliseconds and kilobytes."""
    draws = random.Random(f"flat picture {seed}")
    width, height = size
    image = Image.new("RGB", size, draws.choice(COLOURS))
    canvas = ImageDraw.Draw(image)
    for _ in range(12):
        left, top = draws.randrange(width), draws.randrange(height)
        box = (left, top, left + draws.randrange(width), top + draws.randrange(height))
        canvas.rectangle(box, fill=tuple(draws.randrange(256) for _ in range(3)))
    return image


def data_url(image: Image.Image, compress_level: int = 6) -> str:
    """`image` as a PNG data URL, the form in which /v1/chat/completions takes pictures."""
    buffer = io.BytesIO()
    image.save(buffer, "PNG", compress_level=compress_level)
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()
