"""Charts: bars, a line or a pie, with a label and a printed value for every item."""

from __future__ import annotations

import random

from .canvas import CELL_HEIGHT, CELL_WIDTH, WORDS, Canvas, Question

COLORS = (
    (214, 69, 65), (65, 131, 215), (38, 166, 91), (244, 179, 80), (155, 89, 182), (46, 196, 182),
    (231, 126, 160), (127, 140, 141), (139, 94, 60), (120, 190, 60),
)  # fmt: skip
LABELS = [word for word in WORDS if len(word) <= 5]
AXIS_PITCH = 9  # cells: the longest label, a space, two digits and a gap


def draw_horizontal_bars(canvas: Canvas, rng: random.Random, items: list[tuple[str, int]]) -> None:
    top, pitch = rng.randint(3, 5), rng.choice((2, 2, 1) if len(items) > 8 else (2,))
    start = 8 * CELL_WIDTH
    color = rng.choice(COLORS)
    longest = canvas.columns - 14
    for index, (label, number) in enumerate(items):
        row = top + index * pitch
        canvas.text(1, row, label)
        cells = max(1, round(longest * number / 100))
        y = row * CELL_HEIGHT
        canvas.draw.rectangle((start, y + 5, start + cells * CELL_WIDTH - 4, y + 23), fill=color)
        canvas.text(8 + cells, row, str(number))


def draw_axis(
    canvas: Canvas, rng: random.Random, items: list[tuple[str, int]]
) -> tuple[int, list[tuple[int, int]]]:
    """Write every label with its value under an axis; the axis' y and the point (x, y) of each
    value, px."""
    pitch = min(11, (canvas.columns - 1) // len(items))
    axis_row = rng.randint(canvas.rows - 8, canvas.rows - 5)
    left = rng.randint(0, canvas.columns - pitch * len(items))
    canvas.rule(left, axis_row, pitch * len(items))
    axis = (axis_row + 1) * CELL_HEIGHT - 2
    height = (axis_row - 4) * CELL_HEIGHT
    points = []
    for index, (label, number) in enumerate(items):
        column = left + index * pitch
        canvas.text(column, axis_row + 1, f"{label} {number}")
        points.append(((column + 3) * CELL_WIDTH, axis - round(height * number / 100)))
    return axis, points


def draw_vertical_bars(canvas: Canvas, rng: random.Random, items: list[tuple[str, int]]) -> None:
    color = rng.choice(COLORS)
    axis, points = draw_axis(canvas, rng, items)
    for x, y in points:
        canvas.draw.rectangle((x - 20, y, x + 20, axis), fill=color)


def draw_line(canvas: Canvas, rng: random.Random, items: list[tuple[str, int]]) -> None:
    color = rng.choice(COLORS)
    _, points = draw_axis(canvas, rng, items)
    canvas.draw.line(points, fill=color, width=3)
    for x, y in points:
        canvas.draw.ellipse((x - 5, y - 5, x + 5, y + 5), fill=color)


def draw_pie(canvas: Canvas, rng: random.Random, items: list[tuple[str, int]]) -> None:
    """A disc at one side, the legend with the values at the other."""
    radius = rng.randint(100, 140)
    legend_left = rng.random() < 0.5
    x = (canvas.width // 2 + 160) if legend_left else 160
    y = rng.randint(radius + 90, canvas.height - radius - 40)
    column = 2 if legend_left else canvas.columns // 2 + 2
    top = rng.randint(3, 6)
    total, angle = sum(number for _, number in items), 0.0
    for index, ((label, number), color) in enumerate(
        zip(items, rng.sample(COLORS, len(COLORS)), strict=False)
    ):
        share = 360 * number / total
        canvas.draw.pieslice(
            (x - radius, y - radius, x + radius, y + radius), angle, angle + share, fill=color
        )
        angle += share
        row = top + 2 * index
        canvas.draw.rectangle(
            (
                column * CELL_WIDTH,
                row * CELL_HEIGHT + 4,
                column * CELL_WIDTH + 20,
                row * CELL_HEIGHT + 24,
            ),
            fill=color,
        )
        canvas.text(column + 2, row, f"{label} {number}")


def numbers(rng: random.Random, count: int) -> list[int]:
    """Different values from 2 to 99; the largest and the smallest stand clear of the others by 3
    and more."""
    while True:
        drawn = rng.sample(range(2, 100), count)
        ordered = sorted(drawn)
        if count < 3 or (ordered[1] - ordered[0] >= 3 and ordered[-1] - ordered[-2] >= 3):
            return drawn


def draw(canvas: Canvas, rng: random.Random, level: float) -> list[Question]:
    """Draw one chart; `level` in 0..1 scales the number of items (8 at most)."""
    draw_items = rng.choice((draw_horizontal_bars, draw_vertical_bars, draw_line, draw_pie))
    count = rng.randint(2 + round(level), 3 + round(5 * level))
    if draw_items in (draw_vertical_bars, draw_line):
        count = min(count, (canvas.columns - 1) // AXIS_PITCH)
    items = list(zip(rng.sample(LABELS, count), numbers(rng, count), strict=True))
    canvas.text(
        rng.randint(1, 12), 1, rng.choice(("sales", "stock", "votes", "rain", "visits", "grams"))
    )
    draw_items(canvas, rng, items)

    ordered = sorted(items, key=lambda item: item[1])
    questions = [
        Question("Which item is the largest?", ordered[-1][0], "largest"),
        Question("Which item is the smallest?", ordered[0][0], "smallest"),
        Question(
            "List all items with their values.",
            ", ".join(f"{label} {number}" for label, number in items),
            "list",
        ),
    ]
    for label, number in items:
        questions.append(Question(f"What is the value of {label}?", str(number), "value"))
    for _ in range(2):
        low, high = sorted(rng.sample(range(count), 2), key=lambda index: items[index][1])
        (small, less), (big, more) = items[low], items[high]
        questions.append(
            Question(
                f"How much more is {big} than {small}?",
                f"{more} - {less} = {more - less}",
                "difference",
            )
        )
    return questions
