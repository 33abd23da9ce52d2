"""Draw the README's figure of the KV memory:  python scripts/bench/plot_figure.py

Writes scripts/results/slabs.png. It draws the layout; it holds no measured number.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.patches import Rectangle

OUT = Path(__file__).resolve().parents[1] / "results"
TEXT, VISUAL, VALUE, BASIS, PAD = "#4C78A8", "#E4572E", "#B8B8B8", "#F2B134", "#E8E8E8"
TEXT_SOFT, VISUAL_SOFT = "#D6E3F0", "#FADCD3"
DARK = "#222222"
CHANNEL = 2.7 / 128  # drawn width of one channel
ROW, GAP = 0.21, 0.05


def box(
    ax,
    x,
    y,
    width,
    height,
    color,
    label="",
    *,
    size=10,
    text_color=DARK,
    weight="normal",
    edge="white",
):
    ax.add_patch(Rectangle((x, y), width, height, facecolor=color, edgecolor=edge, linewidth=1.0))
    if label:
        ax.text(
            x + width / 2,
            y + height / 2,
            label,
            ha="center",
            va="center",
            fontsize=size,
            color=text_color,
            weight=weight,
        )


def memory(ax) -> None:
    """Row 1: the slabs of a layer."""
    y, width, height = 6.35, 0.63, 0.5
    ax.text(
        0,
        y + 0.72,
        "The KV memory of a layer: equal slabs that text and images take and give back",
        fontsize=12,
        weight="bold",
        color=DARK,
    )
    for i, kind in enumerate("PTTBVVVVTBVVVTFBVVF"):
        color, label = {
            "P": (PAD, "pad"),
            "T": (TEXT_SOFT, "text"),
            "V": (VISUAL_SOFT, "image"),
            "B": (BASIS, "basis"),
            "F": ("white", "free"),
        }[kind]
        box(ax, i * width, y, width, height, color, label, size=9, edge=DARK)


def slab(ax, x, title, key_label, key_channels, key_color, rows) -> None:
    """Row 2: a quarter of the rows of one slab, per KV head."""
    top = 5.45
    ax.text(x, top + 0.1, title, fontsize=11, weight="bold", color=key_color)
    for i in range(rows):
        y = top - (i + 1) * (ROW + GAP)
        first = i == 0
        key_width, value_width = key_channels * CHANNEL, 128 * CHANNEL
        box(
            ax,
            x,
            y,
            key_width,
            ROW,
            key_color,
            key_label if first else "",
            size=9,
            text_color="white",
            weight="bold",
        )
        box(ax, x + key_width + 0.04, y, value_width, ROW, VALUE, "V[128]" if first else "", size=9)


def basis(ax) -> None:
    """The side state of one segment."""
    x, top = 9.6, 5.45
    ax.text(
        x, top + 0.1, "Basis slab: one per segment", fontsize=11, weight="bold", color="#9A6A00"
    )
    y = top - ROW - GAP
    box(ax, x, y - 1.14, 32 * CHANNEL, 1.14 + ROW, BASIS, "P_q\n128\n× 32", size=8.5)
    box(ax, x + 0.95, y, 1.4, ROW, BASIS, "mean[128]", size=9)
    ax.text(
        x + 0.95,
        y - 0.18,
        "shared by all\nimage tokens of\nthe segment;\nfound through\nslot_to_basis[slot]",
        va="top",
        fontsize=9,
        color=DARK,
    )


def formula(ax) -> None:
    """Row 3: prefill stores, decode reads."""
    ax.text(0, 2.42, "Prefill stores", fontsize=12, weight="bold", color=DARK)
    ax.text(0, 1.98, "text token:", fontsize=11, color=TEXT, weight="bold")
    ax.text(1.6, 1.98, "K and V as they are", fontsize=11, color=DARK)
    ax.text(0, 1.58, "image token:", fontsize=11, color=VISUAL, weight="bold")
    ax.text(1.6, 1.58, r"$z = P_k^{\top}\,(k - \mathrm{mean})$ and V", fontsize=12, color=DARK)
    ax.text(
        6.1,
        2.42,
        "Decode scores (times sm_scale), then one softmax over both",
        fontsize=12,
        weight="bold",
        color=DARK,
    )
    ax.text(6.1, 1.98, "text token:", fontsize=11, color=TEXT, weight="bold")
    ax.text(7.7, 1.98, r"$q \cdot k$", fontsize=12, color=DARK)
    ax.text(6.1, 1.58, "image token:", fontsize=11, color=VISUAL, weight="bold")
    ax.text(
        7.7, 1.58, r"$(P_q^{\top} q) \cdot z \;+\; q \cdot \mathrm{mean}$", fontsize=12, color=DARK
    )
    ax.text(
        0, 1.0,
        "Drawn for head_dim 128 and rank 32, per layer and KV head. Keys are never rebuilt to full "
        "width. Bar lengths are to scale in channels, except mean; a quarter of a slab's rows is "
        "drawn.",
        fontsize=9, color="#555555",
    )  # fmt: skip


def main() -> None:
    argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    ).parse_args()
    fig, ax = plt.subplots(figsize=(12.6, 6.8))
    ax.set_xlim(-0.15, 12.2)
    ax.set_ylim(0.8, 7.45)
    ax.axis("off")
    memory(ax)
    slab(ax, 0, "Text slab: 20 rows of 256 numbers", "K[128]", 128, TEXT, rows=5)
    slab(ax, 5.75, "Image slab: 32 rows of 160", "z[32]", 32, VISUAL, rows=8)
    basis(ax)
    formula(ax)
    OUT.mkdir(exist_ok=True)
    path = OUT / "slabs.png"
    fig.savefig(
        path,
        dpi=110,
        bbox_inches="tight",
        pad_inches=0.12,
        facecolor="white",
        metadata={"Software": None},
    )
    print(f"wrote {path.relative_to(OUT.parent.parent)} ({path.stat().st_size // 1024} KiB)")


if __name__ == "__main__":
    main()
