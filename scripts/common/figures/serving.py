"""server.png and server-population.png: what servers do at equal KV bytes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

from matplotlib import pyplot
from matplotlib.ticker import MaxNLocator

from .style import WIDTH, legend, save, storages

# (title, scenario, column, unit's factor, what tells the bars of a server apart, its name, turn)
BARS = (
    ("decode,\ntokens/s", "decode", "decode_tokens_per_s", 1, "chats", "chats", None),
    ("first token of turn 1,\nms (less is better)", "ttft", "ttft_p50_s", 1e3, "concurrency",
     "at a time", "1"),
    ("first token of later turns,\nms (less is better)", "ttft", "ttft_p50_s", 1e3, "concurrency",
     "at a time", "2+"),
    ("chats kept\nin the cache", "capacity", "kept_chats", 1, "chats", "chats", "kept"),
    ("returning chats,\nturns/s", "capacity", "turns_per_s", 1, "chats", "chats", "2"),
)  # fmt: skip
RETURNS = {
    "order": "all return in the same order\n(worst for an LRU cache)",
    "zipf": "return by a Zipf law\n(few chats most often)",
}


def turn_name(turn: float | str) -> str:
    return f"{turn:g}" if isinstance(turn, float) else turn


def draw_bars(rows: Sequence[dict], path: Path) -> bool:
    """A row of panels a model, of the scenarios that were run; False if none of them was."""
    panels = [panel for panel in BARS if any(is_of(row, panel) for row in rows)]
    rows = [row for row in rows if any(is_of(row, panel) for panel in panels)]
    if not rows:
        return False
    models = list(dict.fromkeys(row["model"] for row in rows))
    look = storages(row["server"] for row in rows)
    figure, axes = pyplot.subplots(
        len(models), len(panels), figsize=(max(WIDTH, 2.3 * len(panels)), 2.6 * len(models)),
        squeeze=False, layout="constrained",
    )  # fmt: skip
    for model, line in zip(models, axes, strict=True):
        for axis, panel in zip(line, panels, strict=True):
            title, _, column, factor, apart, unit, _ = panel
            drawn = [row for row in rows if row["model"] == model and is_of(row, panel)]
            groups = sorted({row[apart] for row in drawn})
            width = 0.86 / len(look)
            for index, (server, storage) in enumerate(look.items()):
                found = {row[apart]: row[column] for row in drawn if row["server"] == server}
                bars = axis.bar(
                    [place + (index - (len(look) - 1) / 2) * width for place in range(len(groups))],
                    [factor * found.get(group, math.nan) for group in groups],
                    0.92 * width,
                    color=storage.colour,
                )
                axis.bar_label(bars, fmt=short, fontsize=7.5, padding=1)
            axis.set_title(f"{model}\n{title}" if len(models) > 1 else title)
            axis.margins(y=0.1)
            axis.set_xticks(range(len(groups)), [f"{group:g} {unit}" for group in groups])
            axis.set_yticks([])
            axis.spines["left"].set_visible(False)
    legend(figure, title_of(models), look.values(), linestyle="none", markersize=8)
    save(figure, path)
    return True


def is_of(row: dict, panel: tuple) -> bool:
    _, scenario, column, _, _, _, turn = panel
    return (
        row["scenario"] == scenario
        and row[column] is not None
        and (turn is None or turn_name(row["turn"]) == turn)
    )


def title_of(models: Sequence[str], what: str = "servers") -> str:
    of_one = f"{models[0]}: " if len(models) == 1 else ""
    return f"{of_one}{what}, at equal bytes of KV memory"


def short(value: float) -> str:
    if math.isnan(value):
        return ""
    return f"{value:,.0f}" if value >= 10 else f"{value:.2g}"


def draw_population(rows: Sequence[dict], path: Path) -> bool:
    """Turns/s against the population, a row of panels a model; False if no population was run."""
    rows = [
        row for row in rows if row["scenario"] == "population" and row["turns_per_s"] is not None
    ]
    if not rows:
        return False
    models = list(dict.fromkeys(row["model"] for row in rows))
    look = storages(
        sorted({row["server"] for row in rows}, key=lambda name: ("rotatek" in name, name))
    )
    figure, axes = pyplot.subplots(
        len(models), len(RETURNS), figsize=(WIDTH, 2.9 * len(models)),
        squeeze=False, sharey="row", layout="constrained",
    )  # fmt: skip
    for model, line in zip(models, axes, strict=True):
        of_model = [row for row in rows if row["model"] == model]
        unit = stock_chats(of_model)
        for axis, (turn, title) in zip(line, RETURNS.items(), strict=True):
            for server, storage in look.items():
                points = sorted(
                    (row["chats"] / (unit or 1), row["turns_per_s"])
                    for row in of_model
                    if row["server"] == server and row["turn"] == turn
                )
                axis.plot(
                    *zip(*points, strict=True) if points else ((), ()), "o-", color=storage.colour
                )
            axis.set_title(f"{model}: {title}" if len(models) > 1 else title)
            axis.set_xlabel("chats, times what stock in bf16 holds" if unit else "chats")
            axis.xaxis.set_major_locator(MaxNLocator(integer=True))
        line[0].set_ylim(0, 1.1 * line[0].get_ylim()[1])
        line[0].set_ylabel("turns/s")
    legend(figure, title_of(models, "image chats that come back"), look.values())
    save(figure, path)
    return True


def stock_chats(rows: Sequence[dict]) -> int | None:
    """Chats that stock holds in bf16, each as long as a returning one with its answer; None where
    no row tells."""
    for row in rows:
        needed = ("kv_stock_tokens", "prompt_tokens", "output_tokens_per_s", "turns_per_s")
        if row["turn"] == "order" and all(row.get(name) for name in needed):
            answer = row["output_tokens_per_s"] / row["turns_per_s"]
            return int(row["kv_stock_tokens"] // (row["prompt_tokens"] + round(answer)))
    return None
