"""Documents: a form, a receipt or a table of words and digits, with a numbered note beneath."""

from __future__ import annotations

import random

from .canvas import WORDS, Canvas, Question

FIELDS = (
    "account agent amount author branch buyer carrier city client code color company contact "
    "country course customer date deposit desk doctor driver due email file flight floor gate "
    "grade group guest house invoice item key level license limit manager model name number office "
    "order owner page phone plan plate port price printer product project rate region room route "
    "school score seat section seller sender serial service shift shop size state station status "
    "store street student supplier tax team term ticket title track unit vendor visit ward weight "
    "zone"
).split()


def code(rng: random.Random) -> str:
    """Letters and digits that no language model could guess."""
    return (
        "".join(rng.choice("abcdefghknprstuvxz") for _ in range(rng.randint(1, 2)))
        + "-"
        + str(rng.randint(100, 9999))
    )


def value(rng: random.Random) -> str:
    kind = rng.randrange(4)
    if kind == 0:
        return code(rng)
    if kind == 1:
        return str(rng.randint(2, 99999))
    if kind == 2:
        return f"{rng.randint(1, 28):02d}.{rng.randint(1, 12):02d}.{rng.randint(1950, 2049)}"
    return " ".join(rng.sample(WORDS, rng.randint(1, 2)))


def price(rng: random.Random) -> str:
    return f"{rng.randint(0, 99)}.{rng.randint(0, 99):02d}"


def draw_form(
    canvas: Canvas, rng: random.Random, row: int, count: int
) -> tuple[int, list[Question]]:
    columns = 2 if canvas.columns > 48 or rng.random() < 0.3 else 1
    labels = rng.sample(FIELDS, count * columns)
    questions = []
    width = canvas.columns // columns
    spacing = rng.choice((1, 1, 2)) if count <= 6 else 1
    for index, label in enumerate(labels):
        text = value(rng)
        while len(label) + 2 + len(text) > width - 3:
            text = value(rng)
        canvas.text(
            1 + (index % columns) * width, row + index // columns * spacing, f"{label}: {text}"
        )
        questions.append(Question(f"What is the {label}?", text, "field"))
        questions.append(Question(f"Read the line of the {label}.", f"{label}: {text}", "line"))
    return row + count * spacing, questions


def draw_receipt(
    canvas: Canvas, rng: random.Random, row: int, count: int
) -> tuple[int, list[Question]]:
    left = rng.randint(1, 12)
    right = left + rng.randint(22, 30)
    questions = []
    for index, item in enumerate(rng.sample(WORDS, count)):
        quantity, cost = str(rng.randint(1, 99)), price(rng)
        canvas.text(left, row + index, f"{item} {quantity}")
        canvas.text(right - len(cost), row + index, cost)
        questions.append(Question(f"What does the {item} cost?", cost, "price"))
        questions.append(Question(f"How many {item} are on the receipt?", quantity, "quantity"))
        questions.append(
            Question(f"Read the line of the {item}.", f"{item} {quantity} {cost}", "line")
        )
    total = price(rng)
    canvas.rule(left, row + count - 1, right - left)
    canvas.text(left + 3, row + count, "total")
    canvas.text(right - len(total), row + count, total)
    questions.append(Question("What is the total?", total, "total"))
    return row + count + 1, questions


def draw_table(
    canvas: Canvas, rng: random.Random, row: int, count: int
) -> tuple[int, list[Question]]:
    names = [word for word in WORDS if len(word) <= 7]
    columns = rng.randint(2, 3)
    picked = rng.sample(names, columns + count)
    heads, rows = picked[:columns], picked[columns:]
    pitch, left = 10, rng.randint(1, 8)
    questions = [Question("Read the heads of the columns.", ", ".join(heads), "heads")]
    for at, head in enumerate(heads, 1):
        canvas.text(left + pitch * at, row, head)
    canvas.rule(left, row, pitch * (columns + 1))
    for index, name in enumerate(rows):
        canvas.text(left, row + 1 + index, name)
        cells = [
            rng.choice((str(rng.randint(2, 9999)), code(rng), rng.choice(names))) for _ in heads
        ]
        for at, cell in enumerate(cells, 1):
            canvas.text(left + pitch * at, row + 1 + index, cell)
        questions.append(Question(f"What is the first entry of {name}?", cells[0], "first entry"))
        questions.append(Question(f"Read the row of {name}.", ", ".join(cells), "row"))
    return row + 1 + count, questions


def draw_note(canvas: Canvas, rng: random.Random, row: int, count: int) -> list[Question]:
    """Numbered lines; their numbers are part of the answer, as they are of the note."""
    left = rng.randint(1, 4)
    canvas.text(left, row, "note")
    lines = []
    for number in range(1, count + 1):
        words: list[str] = []
        while sum(map(len, words)) + len(words) < rng.randint(8, 18):
            words.append(rng.choice(WORDS) if rng.random() < 0.8 else str(rng.randint(10, 999)))
        lines.append(" ".join([str(number), *words]))
        canvas.text(left, row + number, lines[-1])
    questions = [Question("Transcribe the note.", "\n".join(lines), "note")]
    return questions + [
        Question(f"Read line {line[0]} of the note.", line[2:], "note line") for line in lines
    ]


def draw(canvas: Canvas, rng: random.Random, level: float) -> list[Question]:
    """Draw one document; `level` in 0..1 scales how much is on it."""
    title = rng.choice(("form", "list", "report", "memo", "sheet"))
    canvas.text(rng.randint(1, 12), 1, f"{title} #{rng.randint(100, 999)}")
    most = canvas.rows - 14
    count = rng.randint(min(3, 1 + round(3 * level)), max(2, round(most * level)))
    row, questions = rng.choice((draw_form, draw_receipt, draw_table))(
        canvas, rng, rng.randint(3, 5), count
    )
    room = canvas.rows - row - 3
    if room >= 2:
        note_lines = rng.randint(1, max(1, min(room, round(4 * level))))
        questions += draw_note(canvas, rng, row + rng.randint(1, room - note_lines + 1), note_lines)
    return questions
