"""Time RotateK's kernels beside SGLang's own attention kernels, on one GPU, in one run.

    PYTHONPATH=. python scripts/bench_kernels.py                       # everything -> scripts/results/kernels.csv
    PYTHONPATH=. python scripts/bench_kernels.py --only decode --quick
    PYTHONPATH=. python scripts/bench_kernels.py --plot                # kernels.png from kernels.csv; needs no GPU

Peers hold the same context at full width, bf16, page size 1: FA3 (fa3), FlashInfer (flashinfer) and SGLang's Triton
kernels (sglang_triton), each called as its SGLang backend calls it. A kernel that cannot be loaded is named with
the reason and has no rows. The output that is timed is compared with kernels/reference.py; a mismatch is an error.
A run replaces kernels.csv, also with --only.

Times are of CUDA-graph replays: one graph launches the kernel on several layers' buffers, as many
as keep the L2 cache from serving them, and its time is divided by their number. Plans (of peers
too) are made before; RotateK's of a decode step is op=plan, and op=partition rebuilds the partition
of all requests, as a prefill does. ``bytes``: K or z and V rows once and bases once, in the
kernel's own format; q, outputs and slot ids are not counted. ``fraction_of_read_bandwidth`` is
against a plain sum on the same card. For extend, ``visual_tokens`` and ``text_tokens`` are the
prefix; for decode_mixed, means of the requests. For compress, ``batch`` counts images of
``visual_tokens``, times are of one layer (a launch takes several), values are not in it, and
torch_eigh is basis/pca.py (covariance and eigh), without the projection.
"""

from __future__ import annotations

import argparse
import csv
import datetime
import importlib.metadata
import shlex
import statistics
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from bench_batches import (
    DEVICE,
    HEAD_DIM,
    MODELS,
    SM_SCALE,
    Batch,
    Request,
    compare,
    compress_bytes,
    decode_cases,
    extend_cases,
    image_keys,
    mixed_requests,
    plan_cases,
    read_bytes,
)
from bench_peers import FA3, FlashInfer, Launch, SGLangTriton
from tqdm import tqdm

from sglang_rotatek.basis import pca
from sglang_rotatek.kernels import compress, decode, expand, extend, reference
from sglang_rotatek.kernels.own_chunk import own_chunk_attention
from sglang_rotatek.kernels.partition import Partition
from sglang_rotatek.kernels.reference import LayerPools

ROTATING_BYTES = 512 << 20  # read by one graph in all: several times the L2 cache
MIN_SETS, MAX_SETS = 4, 256
REPLAYS = 10  # per sample
MIN_ENERGY = 0.98  # of what eigh's basis captures: below, the subspace iteration has not converged

OPS = ("decode", "decode_mixed", "plan", "partition", "extend", "compress")
COLUMNS = (
    "op", "model", "batch", "visual_tokens", "text_tokens", "new_tokens", "rank", "kernel", "sets",
    "microseconds", "microseconds_p20", "microseconds_p80", "microseconds_all_layers", "bytes", "terabytes_per_second",
    "fraction_of_read_bandwidth", "speedup_over_fastest_peer", "energy_over_eigh",
)  # fmt: skip


class RotateKKernels:
    """Every call into this project's kernels."""

    name = "rotatek"
    missing = (ImportError,)

    def __init__(self, rank: int) -> None:
        self.rank = rank

    def pools(self, batch: Batch) -> list[LayerPools]:
        return batch.rotated_pools(self.rank)

    def plan(self, batch: Batch) -> Launch:
        update = self._decode_plan(batch)[1]
        return lambda i: update()

    def partition(self, batch: Batch) -> Launch:
        _, rebuild = self._partition(batch)
        return lambda i: rebuild()

    def _partition(self, batch: Batch, prefix_lens: torch.Tensor | None = None):
        pools = self.pools(batch)[0]
        partition = Partition(*batch.req_to_token.shape, DEVICE)
        rebuild = partial(
            partition.rebuild, batch.req_to_token, batch.requests, batch.seq_lens,
            pools.slot_to_basis, len(pools.k_text), prefix_lens=prefix_lens, max_len=batch.max_len,
        )  # fmt: skip
        rebuild()
        return partition, rebuild

    def _decode_plan(self, batch: Batch):
        partition, pools = self._partition(batch)[0], self.pools(batch)[0]
        plan = decode.make_plan(partition, batch.size, batch.model.num_qo_heads, pools)
        update = partial(
            decode.update_plan, plan, batch.requests, batch.seq_lens, batch.req_to_token
        )
        update()
        return plan, update

    def decode(self, batch: Batch) -> Launch:
        pools, plan = self.pools(batch), self._decode_plan(batch)[0]
        return lambda i: decode.decode(batch.q[i], pools[i], plan, batch.qo_indptr, SM_SCALE)

    def extend(self, batch: Batch) -> Launch:
        pools, model, lens = self.pools(batch), batch.model, [batch.new_tokens] * batch.size
        if sum(lens) < extend.many_tokens(model.num_qo_heads, pools[0]):
            plan = extend.make_plan(self._partition(batch)[0], lens, model.num_qo_heads, pools[0])
            extend.update_plan(plan, batch.requests, batch.seq_lens)
            return lambda i: extend.extend_stored(batch.q[i], pools[i], plan, batch.qo_indptr, SM_SCALE)
        own = own_chunk_attention(DEVICE)
        own.plan(batch.qo_indptr, lens, (model.num_qo_heads, model.num_kv_heads, HEAD_DIM, HEAD_DIM), torch.bfloat16)
        plan = None
        if batch.max_len > batch.new_tokens:
            partition = self._partition(batch, batch.prefix_lens)[0]
            plan = extend.make_plan(partition, lens, model.num_qo_heads, pools[0])
            extend.update_plan(plan, batch.requests, batch.prefix_lens)

        def launch(i: int) -> torch.Tensor:
            out, lse = own.run(batch.q[i], batch.k_new[i], batch.v_new[i], SM_SCALE, 0.0)
            if plan is None:
                return out
            return extend.extend(batch.q[i], out, lse, pools[i], plan, batch.qo_indptr, SM_SCALE)

        return launch

    def compress(self, batch: Batch, keys: torch.Tensor, group: int) -> Launch:
        """keys [layers, n, H, D]: the images of ``batch`` one after another, image i being basis i. A launch does
        ``group`` layers."""
        pools, indptr = batch.stacked_pools(self.rank), batch.kv_indptr.tolist()
        bounds = [(start, end, basis) for basis, (start, end) in enumerate(zip(indptr, indptr[1:]))]
        segments = compress.Segments.upload(bounds, DEVICE)
        start = compress.start_vectors(HEAD_DIM, self.rank, DEVICE)

        def launch(i: int) -> None:
            layers = slice(i * group, (i + 1) * group)
            written = pools._replace(**{name: getattr(pools, name)[layers] for name in ("z", "query_map", "mean")})
            compress.compress(keys[layers], batch.kv_indices, segments, written, start)

        return launch


class RotateKExpanded(RotateKKernels):
    """Extend in another way: prefix and chunk side by side at full width, then FA3 over both."""

    name = "rotatek_expanded"
    missing = (ImportError, OSError, RuntimeError)

    def extend(self, batch: Batch) -> Launch:
        from sgl_kernel.flash_attn import flash_attn_varlen_func

        pools, lens = self.pools(batch), batch.seq_lens.tolist()
        partition = self._partition(batch, batch.prefix_lens)[0]
        kv_indptr = torch.tensor([0, *lens], dtype=torch.int32, device=DEVICE).cumsum(0, dtype=torch.int32)
        heads = batch.model.num_kv_heads
        keys, values = (torch.empty(sum(lens), heads, HEAD_DIM, dtype=torch.bfloat16, device=DEVICE) for _ in range(2))

        def launch(i: int) -> torch.Tensor:
            expand.expand(
                pools[i], partition, batch.requests, batch.prefix_lens, batch.qo_indptr, kv_indptr, batch.k_new[i],
                batch.v_new[i], keys, values, max(lens),
            )  # fmt: skip
            return flash_attn_varlen_func(
                batch.q[i], keys, values, batch.qo_indptr, kv_indptr, batch.new_tokens, max(lens),
                softmax_scale=SM_SCALE, causal=True,
            )  # fmt: skip

        return launch


class Timing(NamedTuple):
    """Microseconds of one launch."""

    p20: float
    median: float
    p80: float


def spread(microseconds: list[float]) -> Timing:
    ordered = sorted(microseconds)
    return Timing(ordered[len(ordered) // 5], statistics.median(ordered), ordered[-1 - len(ordered) // 5])


def measure(launch: Launch, sets: int, samples: int, check: Callable[[int, torch.Tensor], None] | None = None) -> Timing:
    """Capture ``sets`` launches in one graph, check what a replay gives, and time replays of it."""
    launch(0)  # compiles, which a capture must not
    torch.cuda.synchronize()
    graph, outputs = torch.cuda.CUDAGraph(), {}
    with torch.cuda.graph(graph):
        for i in range(sets):
            out = launch(i)
            if i in (0, sets - 1):
                outputs[i] = out
    graph.replay()
    for i, out in outputs.items() if check else ():
        check(i, out)

    def replay() -> None:
        for _ in range(REPLAYS):
            graph.replay()

    replay()  # warm-up
    return spread([us / REPLAYS / sets for us in event_times(replay, samples)])


def event_times(work: Callable[[], object], samples: int) -> list[float]:
    """Microseconds of each of ``samples`` calls, queued one behind the other so that the GPU does not idle."""
    events = [torch.cuda.Event(enable_timing=True) for _ in range(samples + 1)]
    events[0].record()
    for event in events[1:]:
        work()
        event.record()
    torch.cuda.synchronize()
    return [1000 * start.elapsed_time(end) for start, end in zip(events, events[1:])]


class Bench:
    """Runs the cases of ``options`` and writes each as soon as it is measured."""

    def __init__(self, options: argparse.Namespace, add_rows: Callable[[list[dict]], None]) -> None:
        self.options, self.add_rows = options, add_rows
        self.samples = 5 if options.quick else 15
        self.read_bandwidth = 0.0
        self.kernels = [FA3(), FlashInfer(), SGLangTriton(), *map(RotateKKernels, options.ranks)]

    def row(self, op: str, kernel: str, timing: Timing, num_bytes: int = 0, **cells) -> dict:
        row = {"op": op, "kernel": kernel, **cells, "microseconds": timing.median}
        row |= {"microseconds_p20": timing.p20, "microseconds_p80": timing.p80}
        if num_bytes:
            row |= {"bytes": num_bytes, "terabytes_per_second": num_bytes / timing.median / 1e6}
            if self.read_bandwidth:
                row["fraction_of_read_bandwidth"] = row["terabytes_per_second"] / self.read_bandwidth
        return row

    def bandwidth(self) -> None:
        source = torch.randn(1 << 30, device=DEVICE)  # 4 GiB
        target = torch.empty_like(source)
        for name, work, factor in (("torch_sum", source.sum, 1), ("torch_copy", lambda: target.copy_(source), 2)):
            event_times(work, 3)  # warm-up
            row = self.row("bandwidth", name, spread(event_times(work, self.samples)), factor * source.nbytes)
            self.read_bandwidth = self.read_bandwidth or row["terabytes_per_second"]
            self.add_rows([row])
            tqdm.write(f"{name}: {row['terabytes_per_second']:.2f} TB/s")

    def usable(self, op: str, kernels: list) -> list:
        """Those that are there, found by one small launch; the reason is printed for the others."""
        images, found = ((256,), 0) if op == "compress" else ((256,), 32), []
        batch = Batch(MODELS[self.options.models[0]], [Request(*images)] * 2, 1, 32 if op == "extend" else 0)
        for kernel in kernels:
            try:
                if op == "compress":
                    kernel.compress(batch, batch.k[:, batch.kv_indices], 1)(0)
                else:
                    getattr(kernel, op)(batch)(0)
                torch.cuda.synchronize()
                found.append(kernel)
            except kernel.missing as error:
                reason = next(iter(str(error).strip().splitlines()), "")
                tqdm.write(f"{op}: {kernel.name} is left out: {type(error).__name__}: {reason}")
        return found

    def sets(self, num_bytes: int) -> int:
        return min(MAX_SETS, max(MIN_SETS, -(-ROTATING_BYTES // num_bytes)))

    def attention(self, op: str, cases: list[tuple[list[Request], int]]) -> None:
        method = "extend" if op == "extend" else "decode"
        expanded = map(RotateKExpanded, self.options.ranks) if op == "extend" else ()
        kernels = self.usable(method, [*self.kernels, *expanded])
        for model_name, (requests, new_tokens) in self.progress(op, cases):
            model = MODELS[model_name]
            sets = self.sets(read_bytes(model, requests, min(self.options.ranks), new_tokens))
            batch, rows = Batch(model, requests, sets, new_tokens), []
            for kernel in kernels:
                check = partial(batch.check, f"{op} {model_name} {kernel.name} rank {kernel.rank}", kernel.pools(batch))
                timing = measure(getattr(kernel, method)(batch), sets, self.samples, check)
                num_bytes = read_bytes(model, requests, kernel.rank, new_tokens)
                cells = {"rank": kernel.rank, "sets": sets, **context_cells(model_name, requests, new_tokens)}
                rows.append(self.row(op, kernel.name, timing, num_bytes, **cells))
            self.add_rows(with_speedup(rows))

    def plan(self, op: str) -> None:
        kernels = self.usable(op, [RotateKKernels(min(self.options.ranks))])
        for model_name, requests in self.progress(op, plan_cases(self.options.quick)):
            batch = Batch(MODELS[model_name], requests, 1)
            for kernel in kernels:
                timing = measure(getattr(kernel, op)(batch), 8, self.samples)
                self.add_rows(
                    [self.row(op, kernel.name, timing, **context_cells(model_name, requests))]
                )

    def compress(self) -> None:
        kernels = self.usable("compress", list(map(RotateKKernels, self.options.ranks)))
        cases = [(1, 1225)] if self.options.quick else [(n, tokens) for n in (1, 4) for tokens in (576, 1225, 2880)]
        for model_name, (images, tokens) in self.progress("compress", cases):
            model, requests = MODELS[model_name], [Request((tokens,), 0)] * images
            layers = model.num_layers
            batch, keys = Batch(model, requests, layers), image_keys(layers, images * tokens, model.num_kv_heads)
            group = compress.layers_at_once(layers, keys[0].nbytes)
            cells = {"model": model_name, "batch": images, "visual_tokens": tokens, "sets": layers}
            for kernel in kernels:
                energies: list[float] = []
                pools = kernel.pools(batch)

                def check(i: int, _) -> None:
                    energies.append(compressed_energy(batch, pools[i * group], keys[i * group]))

                launches = -(-layers // group)
                timing = measure(kernel.compress(batch, keys, group), launches, self.samples, check)
                timing = Timing(*(microseconds * launches / layers for microseconds in timing))
                num_bytes = compress_bytes(model, images, tokens, kernel.rank)
                row = self.row("compress", kernel.name, timing, num_bytes, rank=kernel.rank, **cells)
                row["energy_over_eigh"] = min(energies)
                self.add_rows([row | {"microseconds_all_layers": timing.median * layers}])
            if (images, tokens) == cases[0]:
                fit = partial(pca.fit, keys[0], batch.q[0], min(self.options.ranks))
                fit()
                row = self.row("compress", "torch_eigh", spread(event_times(fit, 5)), **(cells | {"sets": 1}))
                self.add_rows([row | {"microseconds_all_layers": row["microseconds"] * model.num_layers}])

    def progress(self, op: str, cases: list):
        """Pairs of model name and case."""
        return tqdm([(model, case) for model in self.options.models for case in cases], desc=op)

    def run(self) -> None:
        self.bandwidth()
        for op in self.options.only:
            if op == "decode":
                self.attention(op, [(requests, 0) for requests in decode_cases(self.options.quick)])
            elif op == "decode_mixed":
                self.attention(op, [(mixed_requests(), 0)])
            elif op in ("plan", "partition"):
                self.plan(op)
            elif op == "extend":
                self.attention(op, extend_cases(self.options.quick))
            else:
                getattr(self, op)()


def compressed_energy(batch: Batch, pools: LayerPools, keys: torch.Tensor) -> float:
    """Check what ``compress`` stored in ``pools``. Returns the energy that its bases capture, over that of eigh's
    bases of the same rank: the lowest over images and heads."""
    lowest, first_visual_slot = 1e9, len(pools.k_text)
    for basis, (start, end) in enumerate(zip(batch.kv_indptr.tolist(), batch.kv_indptr[1:].tolist())):
        rows, own = batch.kv_indices[start:end] - first_visual_slot, keys[start:end]
        query_map, mean = pools.query_map[basis].float(), own.float().mean(0)
        compare("compress: mean", pools.mean[basis], mean, 1e-3)
        compare("compress: z", pools.z[rows].flatten(1), reference.compress(own, query_map, mean).flatten(1))
        gram = query_map.mT @ query_map
        compare("compress: basis not orthonormal", gram, torch.eye(gram.shape[-1], device=gram.device).expand_as(gram), 5e-2)
        best = pca.fit(own, own[:0], query_map.shape[-1]).query_map
        ours, eigh = (
            reference.compress(own, columns, mean).square().sum((0, 2)) for columns in (torch.linalg.qr(query_map).Q, best)
        )
        lowest = min(lowest, (ours / eigh).min().item())
    if lowest < MIN_ENERGY:
        raise ValueError(f"compress: a basis captures {lowest:.3f} of the energy of eigh's, allowed {MIN_ENERGY}")
    return lowest


def context_cells(model_name: str, requests: list[Request], new_tokens: int = 0) -> dict:
    visual, text = (round(statistics.mean(lens)) for lens in zip(*((sum(r.images), r.text) for r in requests)))
    cells = {"model": model_name, "batch": len(requests), "visual_tokens": visual, "text_tokens": text}
    return cells | ({"new_tokens": new_tokens} if new_tokens else {})


def with_speedup(rows: list[dict]) -> list[dict]:
    """Rows of one case; RotateK's get their speed-up over the fastest peer that was measured."""
    peers = [row["microseconds"] for row in rows if not row["kernel"].startswith("rotatek")]
    for row in rows:
        if peers and row["kernel"].startswith("rotatek"):
            row["speedup_over_fastest_peer"] = min(peers) / row["microseconds"]
    return rows


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
    command = shlex.join(["python", "scripts/bench_kernels.py", *sys.argv[1:]])
    return f"# {torch.cuda.get_device_name()}, driver {driver}, {', '.join(versions)}, {datetime.date.today()}; {command}"


def write_csv(path: Path, machine: str, rows: list[dict]) -> None:
    """Cells that a row lacks stay empty."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        file.write(machine + "\n")
        writer = csv.DictWriter(file, COLUMNS, restval="")
        writer.writeheader()
        writer.writerows({k: f"{v:.6g}" if isinstance(v, float) else v for k, v in row.items()} for row in rows)


def read_csv(path: Path) -> tuple[str, list[dict[str, str]]]:
    with path.open(newline="") as file:
        return file.readline().strip(), list(csv.DictReader(file))


def plot(csv_path: Path, png_path: Path) -> None:
    """Decode speed-up over the fastest peer by batch, a panel per model and context; dashed: what the bytes allow."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    machine, rows = read_csv(csv_path)
    rows = [row for row in rows if row["op"] == "decode"]
    case = lambda row: tuple(row[name] for name in ("model", "visual_tokens", "text_tokens", "batch"))
    peer_bytes = {case(row): float(row["bytes"]) for row in rows if not row["kernel"].startswith("rotatek")}
    ours = [row for row in rows if row["speedup_over_fastest_peer"] and row["kernel"] == "rotatek"]
    if not ours:
        raise SystemExit(f"{csv_path} holds no decode row of RotateK beside a peer's; run without --plot first")
    models = list(dict.fromkeys(row["model"] for row in ours))
    contexts = sorted({case(row)[1:3] for row in ours}, key=lambda context: tuple(map(int, context)))
    size = (3.4 * len(contexts) + 0.6, 2.9 * len(models) + 0.6)
    figure, axes = plt.subplots(len(models), len(contexts), figsize=size, sharey=True, squeeze=False, layout="constrained")
    for ax, panel in zip(axes.flat, [(model, *context) for model in models for context in contexts]):
        for rank, color in zip(sorted({row["rank"] for row in ours}, key=int), ("C3", "C0", "C2", "C1")):
            line = sorted((row for row in ours if case(row)[:3] == panel and row["rank"] == rank), key=lambda r: int(r["batch"]))
            batches = [int(row["batch"]) for row in line]
            ax.plot(batches, [float(r["speedup_over_fastest_peer"]) for r in line], "o-", color=color, label=f"rank {rank}")
            ax.plot(batches, [peer_bytes[case(r)] / float(r["bytes"]) for r in line], "--", color=color, lw=1)
        ax.axhline(1, color="0.6", lw=1)
        ax.set_xscale("log", base=2)
        batches = sorted({int(row["batch"]) for row in ours})
        ax.set_xticks(batches, labels=map(str, batches))
        ax.set_title(f"{panel[0]}\n{panel[1]} visual + {panel[2]} text tokens", fontsize=9)
    axes[0, 0].legend(fontsize=8)
    figure.supxlabel("requests in the decode batch")
    figure.supylabel("speed-up over the fastest peer")
    figure.suptitle(f"Decode attention; dashed: byte floor. {machine.lstrip('# ').split(',')[0]}", fontsize=10)
    figure.savefig(png_path, dpi=110, metadata={"Software": None})
    plt.close(figure)


def summary(rows: list[dict]) -> list[str]:
    """One line per context and kernel: batch, microseconds and RotateK's speed-up. Peers only where RotateK is missing."""
    lines: dict[tuple, list[str]] = {}
    ranked = {row["op"] for row in rows if row["kernel"] == "rotatek"}
    for row in rows:
        if row["kernel"] != "rotatek" and row["op"] in ranked - {"compress"}:
            continue
        tokens = "+".join(str(row.get(name, 0)) for name in ("visual_tokens", "text_tokens", "new_tokens"))
        label = f"{row['kernel']} r{row['rank']}" if row.get("rank") else row["kernel"]
        speedup = row.get("speedup_over_fastest_peer")
        cell = f"{row.get('batch', '')}: {row['microseconds']:.1f} us" + (f" {speedup:.2f}x" if speedup else "")
        lines.setdefault((row["op"], row.get("model", ""), tokens, label), []).append(cell)
    widths = (12, 13, 13, 13)
    return ["  ".join([*(f"{part:<{n}}" for part, n in zip(key, widths)), " | ".join(cells)]) for key, cells in lines.items()]


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    def choices(allowed, kind: str):
        def parse(text: str) -> list[str]:
            names = text.split(",")
            if unknown := [name for name in names if name not in allowed]:
                raise argparse.ArgumentTypeError(f"no {kind} {', '.join(unknown)}; known: {', '.join(allowed)}")
            return names

        return parse

    def ranks(text: str) -> list[int]:
        return [int(rank) for rank in choices([str(rank) for rank in range(16, HEAD_DIM, 16)], "rank")(text)]

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    default_output = Path(__file__).resolve().parent / "results"
    parser.add_argument("--output", type=Path, default=default_output, help="folder of kernels.csv (default scripts/results)")
    parser.add_argument("--plot", action="store_true", help="only draw kernels.png from the kernels.csv that is there")
    parser.add_argument("--only", type=choices(OPS, "operation"), default=list(OPS), help=f"some of {','.join(OPS)}")
    parser.add_argument("--models", type=choices(MODELS, "model"), default=list(MODELS), help=f"some of {','.join(MODELS)}")
    parser.add_argument("--ranks", type=ranks, default=[32, 64], help="ranks of RotateK (default 32,64)")
    parser.add_argument("--quick", action="store_true", help="a few shapes and samples")
    return parser.parse_args(argv)


def main() -> None:
    options = parse_arguments()
    csv_path = options.output / "kernels.csv"
    if options.plot:
        plot(csv_path, options.output / "kernels.png")
        return
    if not torch.cuda.is_available():
        raise SystemExit("bench_kernels.py measures a GPU and found none; --plot alone needs none")
    machine, rows = machine_line(), []

    def add_rows(more: list[dict]) -> None:
        rows.extend(more)
        write_csv(csv_path, machine, rows)  # a run that is cut short keeps what it measured

    torch.manual_seed(0)
    Bench(options, add_rows).run()
    print(machine, *summary(rows), sep="\n")


if __name__ == "__main__":
    main()
