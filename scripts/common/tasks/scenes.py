"""Scenes: colored shapes, some with a number beside them: count them, name them, say where they
are."""

from __future__ import annotations

import math
import random
from collections import Counter

from .canvas import TOKEN, Canvas, Question

COLORS = {
    "red": (214, 40, 40),
    "green": (30, 150, 60),
    "blue": (40, 80, 220),
    "orange": (250, 140, 20),
    "purple": (130, 50, 170),
    "black": (20, 20, 20),
    "pink": (250, 140, 190),
    "teal": (20, 160, 160),
}
SHAPES = ("circle", "square", "triangle", "star", "diamond", "cross")
CELL = 4  # tokens: the pitch of the places where shapes can be
# The floor of the left, center and right third.
FLOORS = ((250, 236, 224), (246, 246, 246), (224, 234, 250))


def polygon(
    corners: list[float], x: float, y: float, radii: list[float]
) -> list[tuple[float, float]]:
    """Corners at angles (degrees, 0 is up, clockwise) and distances from the middle."""
    return [
        (x + r * math.sin(math.radians(angle)), y - r * math.cos(math.radians(angle)))
        for angle, r in zip(corners, radii, strict=True)
    ]


def draw_shape(
    canvas: Canvas, shape: str, color: tuple[int, int, int], x: float, y: float, radius: float
) -> None:
    draw = canvas.draw
    if shape == "circle":
        draw.ellipse((x - radius, y - radius, x + radius, y + radius), fill=color)
    elif shape == "square":
        half = radius * 0.85
        draw.rectangle((x - half, y - half, x + half, y + half), fill=color)
    elif shape == "triangle":
        draw.polygon(polygon([0, 120, 240], x, y, [radius * 1.15] * 3), fill=color)
    elif shape == "diamond":
        draw.polygon(
            polygon([0, 90, 180, 270], x, y, [radius * 1.1, radius * 0.75] * 2), fill=color
        )
    elif shape == "star":
        draw.polygon(
            polygon([36 * i for i in range(10)], x, y, [radius * 1.15, radius * 0.5] * 5),
            fill=color,
        )
    else:
        arm = radius * 0.35
        draw.rectangle((x - radius, y - arm, x + radius, y + arm), fill=color)
        draw.rectangle((x - arm, y - radius, x + arm, y + radius), fill=color)


def place(column: int, row: int, columns: int, rows: int) -> tuple[str, str]:
    return ("top", "middle", "bottom")[3 * row // rows], ("left", "center", "right")[
        3 * column // columns
    ]


def draw(canvas: Canvas, rng: random.Random, level: float) -> list[Question]:
    """Draw one scene; `level` in 0..1 scales the number of shapes (9 at most)."""
    third = canvas.width // 3
    for at, floor in enumerate(FLOORS):
        canvas.draw.rectangle((at * third, 0, (at + 1) * third - 1, canvas.height), fill=floor)
    columns, rows = canvas.width // TOKEN // CELL, canvas.height // TOKEN // CELL
    count = rng.randint(2 + round(level), 3 + round(6 * level))
    places = rng.sample([(column, row) for column in range(columns) for row in range(rows)], count)
    # Few colours and shapes in one picture make similar distractors.
    colors = rng.sample(sorted(COLORS), rng.randint(2, 5))
    shapes = rng.sample(SHAPES, rng.randint(2, 4))
    numbered = rng.random() < 0.6
    things = []
    for number, (column, row) in enumerate(places, 1):
        color, shape = rng.choice(colors), rng.choice(shapes)
        token_column, token_row = column * CELL + 2, row * CELL + 2
        x = (token_column + 0.5) * TOKEN + rng.randint(-6, 6)
        y = (token_row + 0.5) * TOKEN + rng.randint(-6, 6)
        draw_shape(canvas, shape, COLORS[color], x, y, rng.randint(22, 34))
        kind = SHAPES.index(shape) * len(COLORS) + sorted(COLORS).index(color)
        canvas.things[token_row, token_column] = 1 + 3 * kind + 3 * column // columns
        if numbered:
            canvas.text(2 * (token_column - 2), token_row, str(number))
        things.append((color, shape, place(column, row, columns, rows)))

    questions = []
    for color in colors:
        found = sum(thing[0] == color for thing in things)
        questions.append(Question(f"How many {color} shapes are there?", str(found), "count color"))
    for shape in shapes:
        plural = "crosses" if shape == "cross" else f"{shape}s"
        found = sum(thing[1] == shape for thing in things)
        questions.append(Question(f"How many {plural} are there?", str(found), "count shape"))
    shape_counts = Counter(shape for _, shape, _ in things)
    kinds = Counter((color, shape) for color, shape, _ in things)
    for color, shape, where in things:
        if shape_counts[shape] == 1:
            questions.append(Question(f"What color is the {shape}?", color, "color"))
        if kinds[color, shape] == 1:
            height, side = where
            questions.append(Question(f"How high is the {color} {shape}?", height, "height"))
            questions.append(Question(f"On which side is the {color} {shape}?", side, "side"))
    if numbered:
        named = [f"{number} {color} {shape}" for number, (color, shape, _) in enumerate(things, 1)]
        questions.append(Question("List the numbered shapes in order.", ", ".join(named), "list"))
        questions += [Question(f"What is shape {name[0]}?", name[2:], "name") for name in named]
    return questions
