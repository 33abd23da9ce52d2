"""Rows of kernels.csv: writing, reading, summing up and drawing them."""

from __future__ import annotations

import csv
import datetime
import importlib.metadata
import shlex
import subprocess
import sys
from pathlib import Path

import torch

COLUMNS = (
    "op", "model", "batch", "visual_tokens", "text_tokens", "new_tokens", "kernel", "storage",
    "sets", "microseconds", "microseconds_p20", "microseconds_p80", "microseconds_all_layers",
    "bytes", "terabytes_per_second", "fraction_of_read_bandwidth", "speedup_over_fastest_peer",
    "speedup_over_fa3", "speedup_over_fa3_fp8", "energy_over_eigh", "error_over_eigh",
)  # fmt: skip


def with_speedup(rows: list[dict]) -> list[dict]:
    """Rows of one case; RotateK's get their speed-up over the fastest peer that was measured, and
    over FA3 in bf16 and FP8."""
    peers = {
        (row["kernel"], row["storage"]): row["microseconds"] for row in rows if not is_own(row)
    }
    against = {
        "speedup_over_fa3": peers.get(("fa3", "bf16")),
        "speedup_over_fa3_fp8": peers.get(("fa3", "fp8")),
    }
    against["speedup_over_fastest_peer"] = min(peers.values(), default=None)
    for row in filter(is_own, rows):
        row |= {name: peer / row["microseconds"] for name, peer in against.items() if peer}
    return rows


def is_own(row: dict) -> bool:
    return row["kernel"].startswith("rotatek")


def machine_line() -> str:
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader", "--id=0"]
    try:
        driver = subprocess.run(query, capture_output=True, text=True).stdout.strip() or "unknown"
    except FileNotFoundError:
        driver = "unknown"
    versions = []
    for package in ("torch", "triton", "sglang", "flashinfer-python", "sglang-kernel"):
        try:
            versions.append(f"{package} {importlib.metadata.version(package)}")
        except importlib.metadata.PackageNotFoundError:
            versions.append(f"no {package}")
    program = Path(sys.argv[0]).resolve()
    root = Path(__file__).resolve().parents[2]
    name = program.relative_to(root) if program.is_relative_to(root) else program.name
    command = shlex.join(["python", str(name), *sys.argv[1:]])
    machine = f"{torch.cuda.get_device_name()}, driver {driver}"
    return f"# {machine}, {', '.join(versions)}, {datetime.date.today()}; {command}"


def write_csv(path: Path, machine: str, rows: list[dict]) -> None:
    """Cells that a row lacks stay empty."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        file.write(machine + "\n")
        writer = csv.DictWriter(file, COLUMNS, restval="")
        writer.writeheader()
        writer.writerows(
            {k: f"{v:.6g}" if isinstance(v, float) else v for k, v in row.items()} for row in rows
        )


def read_csv(path: Path) -> tuple[str, list[dict[str, str]]]:
    with path.open(newline="") as file:
        return file.readline().strip(), list(csv.DictReader(file))


def plot(csv_path: Path, png_path: Path) -> None:
    """Decode speed-up over FA3 in bf16 by batch; SystemExit without such rows."""
    from figures import attention

    attention.draw(*read_csv(csv_path), png_path)


def summary(rows: list[dict]) -> list[str]:
    """One line per context, kernel and storage: batch, microseconds and RotateK's speed-up over FA3
    in bf16 and FP8."""
    lines: dict[tuple, list[str]] = {}
    for row in rows:
        tokens = "+".join(
            str(row.get(name, 0)) for name in ("visual_tokens", "text_tokens", "new_tokens")
        )
        label = f"{row['kernel']} {row.get('storage', '')}".strip()
        speedups = [
            row[name] for name in ("speedup_over_fa3", "speedup_over_fa3_fp8") if row.get(name)
        ]
        cell = " ".join(
            [
                f"{row.get('batch', '')}: {row['microseconds']:.1f} us",
                *(f"{x:.2f}x" for x in speedups),
            ]
        )
        lines.setdefault((row["op"], row.get("model", ""), tokens, label), []).append(cell)
    widths = (12, 13, 13, 20)
    return [
        "  ".join(
            [*(f"{part:<{n}}" for part, n in zip(key, widths, strict=False)), " | ".join(cells)]
        )
        for key, cells in lines.items()
    ]
