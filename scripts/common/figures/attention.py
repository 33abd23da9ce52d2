"""kernels.png: speed of decode attention."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from matplotlib import pyplot

from .style import ROTATEK, STOCK, WIDTH, Storage, legend, save, storages


def draw(machine: str, rows: Sequence[dict], path: Path) -> None:
    """Decode speed-up over FA3 in bf16 by batch: a row a model; panels of the most text without
    images, and of the smallest and the largest image. Dotted: what RotateK's bytes would allow.
    SystemExit if no row of RotateK is beside one of FA3."""
    rows = [row for row in rows if row["op"] == "decode"]
    peers = {case(row): row for row in rows if (row["kernel"], row["storage"]) == ("fa3", "bf16")}
    own = [row for row in rows if row["kernel"] == "rotatek" and case(row) in peers]
    if not own:
        raise SystemExit("no decode row of RotateK beside FA3's; run without --plot first")
    fp8 = [row for row in rows if (row["kernel"], row["storage"]) == ("fa3", "fp8")]
    look = storages(row["storage"] for row in [*fp8, *own])
    models = list(dict.fromkeys(row["model"] for row in own))
    contexts = chosen_contexts(own)
    figure, axes = pyplot.subplots(
        len(models), len(contexts), figsize=(WIDTH, 2.2 * len(models) + 0.7),
        sharey=True, sharex=True, squeeze=False, layout="constrained",
    )  # fmt: skip
    panels = [(model, *context) for model in models for context in contexts]
    for axis, panel in zip(axes.flat, panels, strict=True):
        axis.axhline(1, color=STOCK.colour)
        for name, storage in look.items():
            line = [
                row
                for row in [*fp8, *own]
                if case(row)[:3] == panel and row["storage"] == name and case(row) in peers
            ]
            line.sort(key=lambda row: int(row["batch"]))
            batches = [int(row["batch"]) for row in line]
            faster, fewer = (
                [float(peers[case(row)][column]) / float(row[column]) for row in line]
                for column in ("microseconds", "bytes")
            )
            axis.plot(batches, faster, "o-", color=storage.colour)
            if storage is ROTATEK and int(panel[1]):
                axis.plot(batches, fewer, ":", color=storage.colour)
                axis.annotate(
                    "if only bytes counted", (batches[0], fewer[0]), xytext=(0, -11),
                    textcoords="offset points", fontsize=8, color=storage.colour,
                )  # fmt: skip
        axis.set_xscale("log", base=2)
        batches = sorted({int(row["batch"]) for row in own})
        axis.set_xticks(batches, labels=map(str, batches))
        axis.minorticks_off()
    for axis, (visual, text) in zip(axes[0], contexts, strict=True):
        axis.set_title(name_of(int(visual), int(text)))
    for line, model in zip(axes, models, strict=True):
        line[0].set_ylabel(f"{model}\ntimes FA3 in bf16")
    figure.supxlabel("requests in the decode batch", fontsize=9)
    axes[0, 0].set_ylim(0, 1.03 * axes[0, 0].get_ylim()[1])
    title = f"Speed of decode attention, {machine.lstrip('# ').split(',')[0]}"
    legend(figure, title, [Storage("FA3, bf16", STOCK.colour), *map(with_kernel, look.values())])
    save(figure, path)


def name_of(visual: int, text: int) -> str:
    return f"{visual:,} image + {text:,} text" if visual else f"{text:,} text, no image"


def case(row: dict) -> tuple[str, ...]:
    return tuple(row[name] for name in ("model", "visual_tokens", "text_tokens", "batch"))


def with_kernel(storage: Storage) -> Storage:
    return Storage(storage.name.replace("stock", "FA3"), storage.colour)


def chosen_contexts(rows: Sequence[dict]) -> list[tuple[str, str]]:
    """Image and text tokens of at most three contexts."""
    contexts = sorted({case(row)[1:3] for row in rows}, key=lambda each: tuple(map(int, each)))
    text = [context for context in contexts if not int(context[0])]
    images = [context for context in contexts if int(context[0])]
    return list(dict.fromkeys([*text[-1:], *images[:1], *images[-1:]]))
