"""What reader_questions.yaml tells lmms-eval to call."""

from __future__ import annotations

import sys
from pathlib import Path

from datasets import Dataset
from PIL import Image

# lmms-eval imports this file by its path.
sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "common"))

from tasks import make_picture


def questions(pictures: Dataset) -> Dataset:
    """Rows of (family, seed) -> rows of (family, seed, question, answer); those of a picture stay
    together."""
    return Dataset.from_list(
        [
            {**row, "question": question.text, "answer": question.answer}
            for row in pictures
            for question in make_picture(row["family"], row["seed"]).questions
        ]
    )


def images(row: dict) -> list[Image.Image]:
    return [make_picture(row["family"], row["seed"]).image]


def score(row: dict, answers: list[str]) -> dict[str, float]:
    """1 when the only answer is the truth, up to blanks at both ends, as in eval_vlm.py."""
    [answer] = answers
    return {"exact_match": float(answer.strip() == row["answer"].strip())}
