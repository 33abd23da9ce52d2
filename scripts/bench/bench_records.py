"""From records of turns to numbers, CSV rows and a figure; used by bench_server.py, no server
needed.

The CSV has one row per server, scenario, number of chats and turn; later runs append. Lines that
start with # are comments: machine, versions, date, command, and what each server said of its pools.
Where a measurement occurs twice, the last counts.
"""

from __future__ import annotations

import csv
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


def prefill_seconds(before: tuple[float, float], after: tuple[float, float]) -> float | None:
    """Of a request between two ``prefill_counters``, mean; None where there was none."""
    seconds, requests = (b - a for a, b in zip(before, after, strict=True))
    return seconds / requests if requests else None


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


def rows_with_populations(path: Path) -> list[dict]:
    """Rows of a CSV and of the runs of single populations beside it (server-population-4x.csv),
    which replace its own."""
    rows = {
        tuple(row[name] for name in IDENTITY): row
        for file in (path, *sorted(path.parent.glob(f"{path.stem}-population-*.csv")))
        for row in read_rows(file)
    }
    return list(rows.values())


def plot(rows: Sequence[dict], path: Path) -> list[Path]:
    """The figures of those scenarios that were run: bars in ``path``, and beside it the population
    that returns. What was drawn."""
    from figures import serving

    population = path.with_name(f"{path.stem}-population{path.suffix}")
    drawn = {
        path: serving.draw_bars(rows, path),
        population: serving.draw_population(rows, population),
    }
    return [file for file, is_drawn in drawn.items() if is_drawn]
