"""pruning.png: at equal bytes, fewer tokens beside narrower rows."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

from matplotlib import pyplot

from .style import OTHER, PAPER, ROTATEK, ROTATEK_2BIT, SOFT, STOCK, WIDTH, save

WHOLE = "1"  # the budget of all tokens at full width
FORMATS = (
    ("16+z2/z2", ROTATEK_2BIT),
    ("16+z4/z4", ROTATEK),
    ("rank32", PAPER),
    ("full", STOCK),
)
TOKENS = (
    ("full divprune", "divprune", STOCK.colour),
    ("full residual", "residual", OTHER),
    ("full visionzip", "visionzip", OTHER),
    ("full uniform", "uniform", OTHER),
    ("full random", "random", OTHER),
    ("full smaller", "smaller picture", OTHER),
    ("fastv1", "FastV", OTHER),
    ("pyramiddrop", "PyramidDrop", OTHER),
)
INSIDE = "fastv1", "pyramiddrop"


def draw(documents: Sequence[dict], path: Path, selector: str) -> None:
    """A row a document of pruning_report.py: ways to choose tokens, stored in bf16; and ways to
    store, with tokens chosen by ``selector`` where a budget needs it."""
    figure, axes = pyplot.subplots(
        len(documents), 2, figsize=(WIDTH, 2.8 * len(documents) + 0.3),
        squeeze=False, sharex="col", sharey=True, layout="constrained",
    )  # fmt: skip
    for row, document in zip(axes, documents, strict=True):
        ends = {}
        for arm, name, colour in TOKENS:
            if points := points_of(document, [arm]):
                draw_line(row[0], points, colour, ":" if arm in INSIDE else "-")
                ends[name] = (*points[-1][:2], colour)
        name_ends(row[0], ends)
        for form, storage in FORMATS:
            if points := points_of(document, [f"{form} {selector}", f"{form} all"]):
                draw_line(row[1], points, storage.colour, label=storage.name)
        row[1].legend(loc="lower right")
        for axis in row:
            whole = document["arms"]["full all"][WHOLE]["all"][0]
            axis.axhline(whole, color=SOFT, linewidth=0.9, linestyle=":")
            axis.set(ylim=(0, 108), xticks=[0.1, 0.2, 0.3, 0.4, 0.5, 0.6])
        row[0].set_xlim(0.1, 0.9)
        row[1].set_xlim(0.1, 0.68)
        row[0].set_ylabel(f"{document['model']}\nexact match, %")
    axes[0][0].set_title("fewer tokens in bf16\n(dotted: dropped inside the LLM)")
    axes[0][1].set_title(f"narrower rows, then fewer\n(chosen by {selector})")
    figure.supxlabel("bytes of an image, as a share of stock's in bf16", fontsize=9)
    save(figure, path)


def points_of(document: dict, arms: Sequence[str]) -> list[tuple[float, ...]]:
    """(share, exact match, its error) of budgets at which all pictures were read."""
    return sorted(
        {
            (cell["share"], cell["all"][0], cell["all"][1] or 0)
            for arm in arms
            for budget, cell in document["arms"].get(arm, {}).items()
            if budget != WHOLE and len(cell["asked"]) == document["pictures"]
        }
    )


def draw_line(axis, points: list[tuple[float, ...]], colour: str, style: str = "-", **options):
    shares, means, errors = zip(*points, strict=True)
    axis.errorbar(
        shares, means, errors, color=colour, marker="o", ms=3, linestyle=style, elinewidth=0.8,
        zorder=2 if colour == OTHER else 3, **options,
    )  # fmt: skip


def name_ends(axis, ends: dict[str, tuple[float, float, str]]) -> None:
    """Names at the right ends (share, exact match, colour) of lines, from the highest down and at a
    distance."""
    place = math.inf
    for name, (share, mean, colour) in sorted(ends.items(), key=lambda end: -end[1][1]):
        place = min(mean, place - 7)
        axis.text(
            share + 0.02, place, name, va="center", fontsize=8.5,
            color=SOFT if colour == OTHER else colour,
            weight="normal" if colour == OTHER else "bold",
        )  # fmt: skip
