"""From records of turns to numbers, CSV rows and a figure; used by bench_server.py, no server
needed.

The CSV has one row per server, scenario, number of chats and turn; later runs append. Lines that
start with # are comments: machine, versions, date, command, and what each server said of its pools.
Where a measurement occurs twice, the last counts.
"""

from __future__ import annotations

import csv
import math
import os
import platform
import re
import shlex
import statistics
import subprocess
import sys
from collections.abc import Sequence
from datetime import datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import numpy as np
from bench_multiturn import TurnRecord, percentile

COLUMNS = (
    "model", "server", "attention_backend", "kv_stock_tokens", "kv_gb", "scenario", "chats",
    "concurrency", "turn", "turns", "errors", "seconds", "turns_per_s", "output_tokens_per_s",
    "ttft_p50_s", "ttft_p90_s", "prefill_s", "prompt_tokens", "cached_tokens",
    "decode_tokens_per_s", "decode_tokens_per_s_log", "window_s", "kept_chats",
)  # fmt: skip
IDENTITY = ("model", "server", "scenario", "chats", "concurrency", "turn")
DECODE_LINE = re.compile(
    r"Decode batch.*?#running-req: (\d+),.*?gen throughput \(token/s\): ([\d.]+)"
)
PREFILL_SECONDS = re.compile(
    r"^sglang:per_stage_req_latency_seconds_(sum|count)"
    r'\{[^}]*stage="prefill_forward"[^}]*\} (\S+)$',
    re.MULTILINE,
)


def decode_rate(records: Sequence[TurnRecord], earliest: float = 0.0) -> tuple[float | None, float]:
    """Tokens per second of all streams together while every one of them decodes, and the seconds of
    that window.

    The window runs from the last stream's first token, or ``earliest`` (on the clock of start_s),
    to the first stream's last token. Between two arrivals a stream's count is taken to grow evenly,
    since the server sends several tokens at once. (None, 0.0) without a window.
    """
    streams = []
    for record in records:
        if record.error or not record.token_times:
            return None, 0.0
        seconds, counts = zip(*record.token_times, strict=True)
        streams.append((np.asarray(seconds) + record.start_s, counts))
    start = max(earliest, *(seconds[0] for seconds, _ in streams))
    end = min(seconds[-1] for seconds, _ in streams)
    if end <= start:
        return None, 0.0
    tokens = sum(
        float(np.diff(np.interp((start, end), seconds, counts))[0]) for seconds, counts in streams
    )
    return tokens / (end - start), end - start


def logged_decode_rate(log: str, chats: int) -> float | None:
    """Median of the server's own figures for steps with ``chats`` requests.

    Without the first, which counts from the last line before: it can hold an idle server or a
    prefill.
    """
    rates = [float(rate) for running, rate in DECODE_LINE.findall(log) if int(running) == chats][1:]
    return statistics.median(rates) if rates else None


def prefill_counters(metrics: str) -> tuple[float, float]:
    """Seconds and requests of the server's prefill stage so far, from the text of /metrics."""
    totals = {"sum": 0.0, "count": 0.0}
    for kind, value in PREFILL_SECONDS.findall(metrics):
        totals[kind] += float(value)
    return totals["sum"], totals["count"]


def is_kept(record: TurnRecord, previous: TurnRecord) -> bool:
    """Whether the whole prompt of the chat's turn before was still in the cache."""
    if record.error or not previous.prompt_tokens:
        return False
    return (record.cached_tokens or 0) >= previous.prompt_tokens


def round_metrics(records: Sequence[TurnRecord], seconds: float) -> dict:
    """Columns of one round of turns that took ``seconds``. Medians over the turns that did not
    fail."""
    done = [record for record in records if record.error is None]
    ttft = [record.ttft_s for record in done]
    columns = {
        "turns": len(records),
        "errors": len(records) - len(done),
        "seconds": seconds,
        "turns_per_s": len(done) / seconds,
        "output_tokens_per_s": sum(record.completion_tokens for record in done) / seconds,
        "ttft_p50_s": percentile(ttft, 0.5),
        "ttft_p90_s": percentile(ttft, 0.9),
    }
    if done:
        columns["prompt_tokens"] = statistics.median(record.prompt_tokens for record in done)
        columns["cached_tokens"] = statistics.median(record.cached_tokens or 0 for record in done)
    return columns


def stock_capacity(kv_tokens: int, turn: TurnRecord, pruned: int = 0) -> int:
    """Chats that stock can hold when each is as long as ``turn`` with its answer, and ``pruned``
    tokens that its prompt has lost."""
    return max(1, kv_tokens // (turn.prompt_tokens + turn.completion_tokens + pruned))


def output_of(*command: str) -> str:
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, cwd=Path(__file__).parent, check=True
        )
        return done.stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def machine_lines() -> list[str]:
    """Comments for the CSV: date, machine, versions and the command that runs."""
    versions = []
    for package in ("sglang", "torch", "triton", "transformers", "flashinfer-python"):
        try:
            versions.append(f"{package} {version(package)}")
        except PackageNotFoundError:
            versions.append(f"{package} unknown")
    gpu = output_of(
        "nvidia-smi", "--query-gpu=name,driver_version,memory.total", "--format=csv,noheader"
    ).replace("\n", "; ")
    return [
        f"{datetime.now():%Y-%m-%d %H:%M}, GPU {gpu}, {os.cpu_count()} CPUs, Python "
        f"{platform.python_version()}, {', '.join(versions)}, commit "
        f"{output_of('git', 'describe', '--always', '--dirty')}",
        f"command: {shlex.join(['python', *sys.argv])}",
    ]


def append_rows(path: Path, comments: Sequence[str], rows: Sequence[dict]) -> None:
    """Append to ``path``; the header comes before the first row."""
    is_new = not path.exists() or not any(
        not line.startswith("#") for line in path.read_text().splitlines()
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", newline="") as file:
        file.writelines(f"# {line}\n" for comment in comments for line in comment.splitlines())
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        if is_new and rows:
            writer.writeheader()
        for row in rows:
            writer.writerow(
                {
                    key: f"{value:.6g}" if isinstance(value, float) else value
                    for key, value in row.items()
                }
            )


def read_rows(path: Path) -> list[dict]:
    """Rows by identity, the last of each, in the order of first appearance. Numbers are floats,
    empty cells None."""
    rows: dict[tuple, dict] = {}
    for row in csv.DictReader(
        line for line in path.read_text().splitlines() if not line.startswith("#")
    ):
        rows[tuple(row[name] for name in IDENTITY)] = {
            key: number(value) for key, value in row.items()
        }
    return list(rows.values())


def number(cell: str) -> float | str | None:
    try:
        return float(cell)
    except ValueError:
        return cell or None


# (title, scenario, column, what tells the bars of a server apart, rows to draw)
PANELS = (
    ("decode, tokens/s, all chats decoding", "decode", "decode_tokens_per_s", "chats", None),
    ("time to first token, turn 1, s (median)", "ttft", "ttft_p50_s", "concurrency", "1"),
    (
        "time to first token, turn 2 and later, s (median)",
        "ttft",
        "ttft_p50_s",
        "concurrency",
        "2+",
    ),
    ("chats kept in the cache", "capacity", "kept_chats", "chats", "kept"),
    ("returning chats, turns/s", "capacity", "turns_per_s", "chats", "2"),
    ("population that returns in order, turns/s", "population", "turns_per_s", "chats", "order"),
    (
        "population that returns by a Zipf law, turns/s",
        "population",
        "turns_per_s",
        "chats",
        "zipf",
    ),
)


def plot(rows: Sequence[dict], path: Path) -> None:
    """Bars of every server: a row of panels per model, of the scenarios that were run."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    models = list(dict.fromkeys(row["model"] for row in rows))
    panels = [panel for panel in PANELS if any(row["scenario"] == panel[1] for row in rows)]
    figure, axes = plt.subplots(
        len(models), len(panels), figsize=(4 * len(panels), 3.2 * len(models)), squeeze=False
    )
    for model, line in zip(models, axes, strict=True):
        for ax, (title, scenario, column, apart, turn) in zip(line, panels, strict=True):
            ax.set_title(f"{model}\n{title}", fontsize=9)
            drawn = [
                row
                for row in rows
                if row["model"] == model and row["scenario"] == scenario and row[column] is not None
                and (turn is None or turn_name(row["turn"]) == turn)
            ]  # fmt: skip
            (draw_curves if scenario == "population" else draw_bars)(ax, drawn, column, apart)
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110, facecolor="white", metadata={"Software": None})
    plt.close(figure)


def turn_name(turn: float | str) -> str:
    return f"{turn:g}" if isinstance(turn, float) else turn


def draw_curves(ax, rows: Sequence[dict], column: str, apart: str) -> None:
    for server in dict.fromkeys(row["server"] for row in rows):
        points = sorted((row[apart], row[column]) for row in rows if row["server"] == server)
        ax.plot(*zip(*points, strict=True), marker="o", markersize=3, label=server)
    ax.set_xlabel(apart, fontsize=8)
    ax.tick_params(labelsize=8)
    if rows:
        ax.set_ylim(bottom=0)
        ax.legend(fontsize=7)


def draw_bars(ax, rows: Sequence[dict], column: str, apart: str) -> None:
    servers = list(dict.fromkeys(row["server"] for row in rows))
    groups = sorted({row[apart] for row in rows})
    width = 0.8 / max(1, len(servers))
    for index, server in enumerate(servers):
        of_server = {row[apart]: row[column] for row in rows if row["server"] == server}
        values = [of_server.get(group, math.nan) for group in groups]
        places = [place + (index - (len(servers) - 1) / 2) * width for place in range(len(groups))]
        bars = ax.bar(places, values, width, label=server)
        ax.bar_label(
            bars, fmt=lambda value: f"{value:,.0f}" if value >= 100 else f"{value:.3g}", fontsize=7
        )
    ax.margins(y=0.25)  # room for the legend
    ax.set_xticks(range(len(groups)), [f"{apart} {group:g}" for group in groups], fontsize=8)
    ax.tick_params(axis="y", labelsize=8)
    if servers:
        ax.legend(fontsize=7)
