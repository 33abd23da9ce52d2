"""fidelity.png: bytes of an image token against the error of answers."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

from matplotlib import pyplot
from matplotlib.patheffects import withStroke

from .style import FP8, OTHER, ROTATEK, SOFT, STORAGES, WIDTH, save

LEAST = 1e-6  # KL that is drawn; stock in bf16 has none and lies on the axis
NAMED = {  # arm: text, its place from the point in points, and which of its sides lies there
    "full": ("stock,\nbf16", (4, 7), "right", "bottom"),
    "fp8/fp8": (FP8.name, (-3, 6), "left", "bottom"),
    "16+z4/z4": (ROTATEK.name, (0, -7), "center", "top"),
    "rank32": ("paper's\nrank 32", (5, -2), "left", "top"),
}


def draw(documents: Sequence[dict], path: Path) -> None:
    """What fidelity.py wrote, a panel each. All other ways are named where one panel has room."""
    figure, axes = pyplot.subplots(
        1, len(documents), figsize=(WIDTH, 3.6), squeeze=False, sharey=True, layout="constrained"
    )
    for axis, document in zip(axes[0], documents, strict=True):
        draw_panel(axis, document, names_all=len(documents) == 1)
    ticks = [10.0**exponent for exponent in range(-5, 1)]
    axes[0][0].set_yticks([LEAST, *ticks], ["0", *(f"$10^{{{math.log10(t):.0f}}}$" for t in ticks)])
    axes[0][0].minorticks_off()
    axes[0][0].set_ylabel("error of answers (KL of a token)")
    figure.suptitle("How few bytes, and how far answers move: lower left is better")
    figure.supxlabel("bytes of a token and KV head; grey: other ways to store it", fontsize=9)
    save(figure, path)


def draw_panel(axis, document: dict, names_all: bool) -> None:
    arms = document["arms"]
    whole = next(iter(arms.values()))["bytes"]
    axis.set(yscale="log", xlim=(0, 1.12 * whole), ylim=(LEAST, 2))
    axis.set_title(document["model"], fontsize=8.5, weight="normal")
    axis.set_xticks([0, whole // 4, whole // 2, 3 * whole // 4, whole])
    for name, arm in arms.items():
        point = arm["bytes"], max(arm["kl_per_token"], LEAST)
        if name not in NAMED:
            axis.plot(*point, "o", color=OTHER, markersize=4, zorder=4)
            if names_all:
                axis.annotate(
                    name, point, xytext=(5, -2), textcoords="offset points", fontsize=7, color=SOFT
                )
            continue
        storage = STORAGES[name]
        error = arm["kl_standard_error"] or 0
        low = point[1] - max(point[1] - error, LEAST)
        axis.errorbar(*point, [[low], [error]], color=storage.colour, elinewidth=1, zorder=4)
        axis.plot(*point, "o", color=storage.colour, markersize=9, zorder=5, clip_on=False)
        text, offset, side, edge = NAMED[name]
        label = axis.annotate(
            text, point, xytext=offset, textcoords="offset points", ha=side, va=edge,
            color=storage.colour, weight="bold", fontsize=8.5, zorder=3,
        )  # fmt: skip
        label.set_path_effects([withStroke(linewidth=2.5, foreground="white")])
        label.set_in_layout(False)
