"""Time the choice of tokens (pruning), on one GPU.

    PYTHONPATH=. python scripts/bench/bench_selection.py        # -> scripts/results/selection.csv

Features are those of a page: 40 % of the tokens are nearly alike. ``gpu_us``: of a choice when
launches are queued; ``wall_us``: until it is there, on an idle GPU, the CPU's launches included.
Qwen2.5-VL-7B: 1,225 tokens of 3,584 channels, 4,900 patches with 16 heads of 80 channels in the
tower. LLaVA-NeXT-8B: the groups of a 672 x 672 picture, 2,928 tokens of 4,096 channels, and a class
token that has 16 heads of 64 channels in 5 crops.
"""

from __future__ import annotations

import argparse
import csv
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import median

import torch
from bench_kernels import event_times
from kernel_records import machine_line

from sglang_rotatek.kernels.received import attention_received
from sglang_rotatek.pruning import visionzip
from sglang_rotatek.pruning.selectors import kept_tokens, select

KEEP = 0.35
# Name -> (channels, groups of tokens).
PICTURES = {
    "qwen2.5-vl-7b": (3584, (1225,)),
    "llava-next-8b": (4096, (576, 576, 576, 576, 576)),
    "llava-next-8b in one group": (4096, (2928,)),
}
COLUMNS = ("model", "pruner", "tokens", "kept", "gpu_us", "wall_us")


def page(tokens: int, channels: int) -> torch.Tensor:
    generator = torch.Generator("cuda").manual_seed(0)
    x = torch.randn(tokens, channels, generator=generator, device="cuda", dtype=torch.bfloat16)
    blank = torch.rand(tokens, generator=generator, device="cuda") < 0.4
    x[blank] = x[0] + 0.01 * x[blank]
    return x


def times(work: Callable[[], object]) -> tuple[float, float]:
    work()
    walls = []
    for _ in range(20):
        torch.cuda.synchronize()
        start = time.perf_counter()
        work()
        torch.cuda.synchronize()
        walls.append((time.perf_counter() - start) * 1e6)
    return median(event_times(work, 20)), median(walls)


def cases() -> list[tuple[str, str, int, int, Callable[[], object]]]:
    found = []
    for model, (channels, sizes) in PICTURES.items():
        groups, first = [], 0
        for size in sizes:
            groups.append((first, first + size, kept_tokens(size, KEEP)))
            first += size
        x = page(first, channels)
        kept = sum(k for *_, k in groups)
        found += [
            (model, pruner, first, kept, partial(select, pruner, x, groups))
            for pruner in ("divprune", "residual", "uniform")
        ]
    qkv = torch.randn(4900, 3, 16, 80, device="cuda", dtype=torch.bfloat16)
    q, k, _ = qkv.unbind(1)

    def of_tower(receive: Callable) -> visionzip.Choice:
        received = receive(q, k).view(1225, 4).sum(1)
        metric = k.float().sum(1).view(1225, 4, -1).sum(1)
        return visionzip.select(kept_tokens(1225, KEEP), received, metric)

    kept = kept_tokens(1225, KEEP)
    found.append(("qwen2.5-vl-7b", "visionzip", 1225, kept, lambda: of_tower(attention_received)))
    torch_way = partial(of_tower, visionzip.attention_received)
    found.append(("qwen2.5-vl-7b", "visionzip, plain torch", 1225, kept, torch_way))
    found.append(
        (
            "qwen2.5-vl-7b",
            "visionzip, attention alone",
            1225,
            kept,
            lambda: attention_received(q, k),
        )
    )
    keys = torch.randn(5, 577, 16, 64, device="cuda", dtype=torch.bfloat16)

    def of_class_token() -> list[visionzip.Choice]:
        of = keys.float()
        weights = torch.einsum("thd,tphd->thp", of[:, 0] / 8, of).softmax(-1).sum(1)[:, 1:]
        metric = of.sum(2)[:, 1:]
        return [
            visionzip.select(kept_tokens(576, KEEP), *one)
            for one in zip(weights, metric, strict=True)
        ]

    found.append(("llava-next-8b", "visionzip", 2880, 5 * kept_tokens(576, KEEP), of_class_token))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    default = Path(__file__).resolve().parents[1] / "results" / "selection.csv"
    parser.add_argument("--output", type=Path, default=default, help="(default %(default)s)")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("bench_selection.py measures a GPU and found none")
    with options.output.open("w", newline="") as file:
        file.write(machine_line() + "\n")
        writer = csv.writer(file)
        writer.writerow(COLUMNS)
        for *cells, work in cases():
            row = (*cells, *(f"{microseconds:.1f}" for microseconds in times(work)))
            writer.writerow(row)
            print(*row, sep="  ")


if __name__ == "__main__":
    main()
