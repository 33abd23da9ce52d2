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
    """Decode speed-up over FA3 in bf16 by batch, a panel per model and context; dashed: what the
    bytes allow."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    machine, rows = read_csv(csv_path)
    rows = [row for row in rows if row["op"] == "decode"]

    def case(row: dict) -> tuple:
        return tuple(row[name] for name in ("model", "visual_tokens", "text_tokens", "batch"))

    peers = {case(row): row for row in rows if (row["kernel"], row["storage"]) == ("fa3", "bf16")}
    fp8 = [row for row in rows if (row["kernel"], row["storage"]) == ("fa3", "fp8")]
    ours = [row for row in rows if row["kernel"] == "rotatek"] + fp8
    ours = [row for row in ours if case(row) in peers]
    if len(ours) == len(fp8):
        raise SystemExit(
            f"{csv_path} holds no decode row of RotateK beside FA3's; run without --plot first"
        )
    models = list(dict.fromkeys(row["model"] for row in ours))
    contexts = sorted(
        {case(row)[1:3] for row in ours}, key=lambda context: tuple(map(int, context))
    )
    size = (3.4 * len(contexts) + 0.6, 2.9 * len(models) + 0.6)
    figure, axes = plt.subplots(
        len(models), len(contexts), figsize=size, sharey=True, squeeze=False, layout="constrained"
    )
    for ax, panel in zip(
        axes.flat, [(model, *context) for model in models for context in contexts], strict=False
    ):
        for storage, color in zip(
            dict.fromkeys(row["storage"] for row in ours),
            ("C3", "C0", "C2", "C1", "C4", "C5"),
            strict=False,
        ):
            line = [row for row in ours if case(row)[:3] == panel and row["storage"] == storage]
            line.sort(key=lambda row: int(row["batch"]))
            batches = [int(row["batch"]) for row in line]
            faster, fewer = (
                [float(peers[case(row)][name]) / float(row[name]) for row in line]
                for name in ("microseconds", "bytes")
            )
            ax.plot(
                batches, faster, "o-", color=color, label="FA3 FP8" if storage == "fp8" else storage
            )
            ax.plot(batches, fewer, "--", color=color, lw=1)
        ax.axhline(1, color="0.6", lw=1)
        ax.set_xscale("log", base=2)
        batches = sorted({int(row["batch"]) for row in ours})
        ax.set_xticks(batches, labels=map(str, batches))
        ax.set_title(f"{panel[0]}\n{panel[1]} visual + {panel[2]} text tokens", fontsize=9)
    axes[0, 0].legend(fontsize=8)
    figure.supxlabel("requests in the decode batch")
    figure.supylabel("speed-up over FA3 in bf16")
    figure.suptitle(
        f"Decode attention; dashed: byte floor. {machine.lstrip('# ').split(',')[0]}", fontsize=10
    )
    figure.savefig(png_path, dpi=110, metadata={"Software": None})
    plt.close(figure)


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
