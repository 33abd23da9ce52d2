"""Draw the figure of the KV memory:  python scripts/bench/plot_figure.py

Writes scripts/results/slabs.png. It draws the layout; it holds no measured number.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "common"))

from figures.style import DARK, ROTATEK, SOFT, STOCK, WIDTH, save
from matplotlib import pyplot
from matplotlib.patches import Rectangle

OUT = Path(__file__).resolve().parents[1] / "results" / "slabs.png"
TEXT, IMAGE, VALUE, BASIS, PAD = STOCK.colour, ROTATEK.colour, "#C9CDD3", "#F2B134", "#EEEEEE"
TEXT_SOFT, IMAGE_SOFT, LEFT = "#D3D8DF", "#CBE3F3", "#3F93C7"
BYTE = 3.1 / 512  # drawn width
ROW, GAP = 0.15, 0.045


def box(ax, x, y, width, height, colour, label="", *, size=8.5, label_colour=DARK, edge="white"):
    ax.add_patch(Rectangle((x, y), width, height, facecolor=colour, edgecolor=edge, linewidth=0.8))
    ax.text(
        x + width / 2, y + height / 2, label,
        ha="center", va="center_baseline", fontsize=size, color=label_colour,
    )  # fmt: skip


def memory(ax) -> None:
    """Row 1: the slabs of a layer."""
    y, width, height = 3.92, 0.4565, 0.34
    ax.text(
        0, y + 0.45, "KV memory of a layer: equal slabs, taken by text or images", weight="bold"
    )
    kinds = {
        "P": (PAD, "pad"),
        "T": (TEXT_SOFT, "text"),
        "V": (IMAGE_SOFT, "image"),
        "B": (BASIS, "basis"),
        "F": ("white", "free"),
    }
    for i, kind in enumerate("PTTBVVVTBVVTFBV"):
        box(ax, i * width, y, width, height, *kinds[kind], size=8, edge=SOFT)


def rows(ax, x, title, colour, parts, count) -> None:
    """Row 2: a quarter of the rows of one slab, of one KV head. ``parts``: (bytes, colour,
    label) of a row."""
    top = 3.3
    ax.text(x, top + 0.08, title, weight="bold", color=colour)
    for i in range(count):
        left, y = x, top - (i + 1) * (ROW + GAP)
        for number_of_bytes, part_colour, label in parts:
            width = number_of_bytes * BYTE
            label_colour = DARK if part_colour == VALUE else "white"
            shown = label if i == 0 else ""
            box(ax, left, y, width, ROW, part_colour, shown, size=7.5, label_colour=label_colour)
            left += width


def legend_of_rows(ax) -> None:
    """What an image row and a basis hold."""
    x, y = 4.72, 3.06
    lines = (
        (IMAGE, "z: 16 PCA coordinates, 8 bits"),
        (LEFT, "e: what they leave, 128 × 4 bits"),
        (VALUE, "v: the Value, 128 × 4 bits"),
        (BASIS, "basis slab, one a segment:"),
    )
    for i, (colour, text) in enumerate(lines):
        box(ax, x, y - 0.27 * i - 0.02, 0.14, 0.14, colour)
        ax.text(x + 0.22, y - 0.27 * i, text, fontsize=8.5)
    ax.text(x + 0.22, y - 0.27 * 4, "P [128, 16] and mean [128]", fontsize=8.5)


def formula(ax) -> None:
    """Row 3: what decode does with both kinds."""
    ax.text(0, 1.5, "Decode scores, for one softmax over both:", weight="bold")
    image_score = r"$P^{\top}\!q \cdot z \;+\; Hq \cdot e \;+\; q \cdot \mathrm{mean}$"
    for y, name, score, colour in (
        (1.18, "text", r"$q \cdot k$", TEXT),
        (0.86, "image", image_score, IMAGE),
    ):
        ax.text(0, y, name, color=colour, weight="bold")
        ax.text(0.62, y, score, color=colour, fontsize=11)
    ax.text(0, 0.55, "H: Hadamard. No Key is rebuilt to full width.", fontsize=8, color=SOFT)


def draw(path: Path) -> None:
    figure, ax = pyplot.subplots(figsize=(WIDTH, 4.3))
    ax.set(xlim=(-0.02, 6.98), ylim=(-0.15, 4.5))
    ax.axis("off")
    figure.subplots_adjust(0.01, 0.01, 0.99, 0.99)
    memory(ax)
    key_and_value = ((256, TEXT, "K"), (256, VALUE, "V"))
    rows(ax, 0, "Text slab: 19 rows of 512 bytes", TEXT, key_and_value, 5)
    coded = ((16, IMAGE, ""), (68, LEFT, "e"), (68, VALUE, "v"))
    rows(ax, 3.45, "Image slab: 64 rows of 152 bytes", IMAGE, coded, 16)
    legend_of_rows(ax)
    formula(ax)
    ax.text(
        0, -0.08,
        "Of one KV head with 128 channels, bf16, by default; rows to scale, a quarter of a slab.",
        fontsize=8, color=SOFT,
    )  # fmt: skip
    save(figure, path)


def main() -> None:
    argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    ).parse_args()
    draw(OUT)
    print(f"wrote {OUT}")


if __name__ == "__main__":
    main()
