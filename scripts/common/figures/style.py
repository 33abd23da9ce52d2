"""The look of all figures, and one name and colour for each way to store a token."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

WIDTH = 7.0  # inches: a README shows a figure 700 pixels wide, where a point is 1.4 pixels
DPI = 200
DARK, SOFT = "#222222", "#6B7280"
OTHER = "#B9BEC5"  # ways that a figure shows beside those that matter

pyplot.rcParams.update(
    {
        "axes.edgecolor": SOFT,
        "axes.grid": True,
        "axes.grid.axis": "y",
        "axes.labelcolor": DARK,
        "axes.labelsize": 9,
        "axes.spines.right": False,
        "axes.spines.top": False,
        "axes.titlesize": 9.5,
        "axes.titleweight": "bold",
        "figure.titlesize": 10.5,
        "figure.titleweight": "bold",
        "font.size": 9,
        "grid.color": "#E5E7EB",
        "legend.fontsize": 9,
        "legend.frameon": False,
        "lines.linewidth": 1.8,
        "lines.markersize": 5,
        "text.color": DARK,
        "xtick.color": SOFT,
        "xtick.labelsize": 8.5,
        "ytick.color": SOFT,
        "ytick.labelsize": 8.5,
    }
)


@dataclass(frozen=True)
class Storage:
    """A way to store tokens, as figures name it."""

    name: str
    colour: str


STOCK = Storage("stock, bf16", "#5B6470")
FP8 = Storage("stock, FP8", "#E69F00")
ROTATEK = Storage("RotateK", "#0072B2")
ROTATEK_FP8 = Storage("RotateK, text in FP8", "#56B4E9")
ROTATEK_2BIT = Storage("RotateK, 2 bits", "#009E73")
PAPER = Storage("paper's rows, rank 32", "#CC79A7")

# By what servers, kernels' rows and arms of fidelity.py and eval_pruning.py are called.
STORAGES = {
    "stock": STOCK, "bf16": STOCK, "full": STOCK,
    "stock-fp8": FP8, "fp8": FP8, "fp8/fp8": FP8,
    "rotatek": ROTATEK, "k4v4": ROTATEK, "16+z4/z4": ROTATEK,
    "rotatek-fp8": ROTATEK_FP8, "k4v4-fp8": ROTATEK_FP8,
    "k2v2": ROTATEK_2BIT, "16+z2/z2": ROTATEK_2BIT,
    "rotatek-paper": PAPER, "r32": PAPER, "rank32": PAPER,
}  # fmt: skip
SPARE = ("#D55E00", "#8C6BB1", "#A6761D", "#1B9E77")  # of ways that have no colour of their own


def storages(names: Iterable[str]) -> dict[str, Storage]:
    """Of each name, in order. Names without an entry keep their own and get spare colours."""
    found: dict[str, Storage] = {}
    for name in names:
        if name not in found:
            spare = Storage(name, SPARE[sum(each not in STORAGES for each in found) % len(SPARE)])
            found[name] = STORAGES.get(name, spare)
    return found


def legend(figure: Figure, title: str, entries: Iterable[Storage], **options) -> None:
    """Title and names above all panels; ``figure`` has the constrained layout. ``options``: of the
    lines."""
    handles = [
        Line2D([], [], color=each.colour, marker="o", label=each.name, **options)
        for each in dict.fromkeys(entries)
    ]
    figure.legend(
        handles=handles,
        title=title,
        title_fontproperties={"size": 10.5, "weight": "bold"},
        loc="outside upper center",
        ncols=min(4, len(handles)),
    )


def save(figure: Figure, path: Path) -> None:
    """The same bytes for the same figure: no date, no version."""
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=DPI, facecolor="white", metadata={"Software": None})
    pyplot.close(figure)
