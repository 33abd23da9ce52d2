"""Time RotateK's kernels beside SGLang's own attention kernels, on one GPU, in one run.

    PYTHONPATH=. python scripts/bench/bench_kernels.py            # -> scripts/results/kernels.csv
    PYTHONPATH=. python scripts/bench/bench_kernels.py --only decode --quick
    PYTHONPATH=. python scripts/bench/bench_kernels.py --plot     # kernels.png of it, without a GPU

Peers hold the same context at full width, page size 1: FA3 (fa3) and FlashInfer (flashinfer) in
bf16 and in FP8, and SGLang's Triton kernels (sglang_triton) in bf16, each called as its SGLang
backend calls it. A kernel that cannot be loaded is named with the reason and has no rows. The
output that is timed is compared with kernels/reference.py; a mismatch is an error. A run replaces
kernels.csv, also with --only.

Times are of CUDA-graph replays: one graph launches the kernel on several layers' buffers, as many
as keep the L2 cache from serving them, and its time is divided by their number. Plans (of peers
too) are made before; RotateK's of a decode step is op=plan, and op=partition rebuilds the partition
of all requests, as a prefill does. ``bytes``: K or z and V rows once and bases once, in the
kernel's own ``storage`` (bench_batches.Storage); q, outputs and slot ids are not counted.
``fraction_of_read_bandwidth`` is against a plain sum on the same card. For extend,
``visual_tokens`` and ``text_tokens`` are the prefix; for decode_mixed, means of the requests. For
compress, ``batch`` counts images of ``visual_tokens``, times are of one layer (a launch takes
several), values are not in it, and torch_eigh is basis/pca.py (covariance and eigh), without the
projection.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Callable
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "common"))

from bench_batches import (
    DEVICE,
    HEAD_DIM,
    MODELS,
    SM_SCALE,
    TOLERANCE,
    Batch,
    Request,
    Storage,
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
from kernel_records import machine_line, plot, summary, with_speedup, write_csv
from tqdm import tqdm

from sglang_rotatek.basis import pca
from sglang_rotatek.kernels import coded, compress, decode, expand, extend, reference
from sglang_rotatek.kernels.own_chunk import Ragged, own_chunk_attention
from sglang_rotatek.kernels.partition import Partition
from sglang_rotatek.kernels.pools import LayerPools

ROTATING_BYTES = 512 << 20  # read by one graph in all: several times the L2 cache
MIN_SETS, MAX_SETS = 4, 256
PEERS = ("fa3", "flashinfer", "sglang_triton")
REPLAYS = 10  # per sample
MIN_ENERGY = 0.98  # of what eigh's basis captures: below, the subspace iteration has not converged
MAX_ERROR = 1.05  # of coded Keys with eigh's basis, as well

OPS = ("decode", "decode_mixed", "plan", "partition", "extend", "compress")


class RotateKKernels:
    """Every call into this project's kernels."""

    name = "rotatek"
    missing = (ImportError,)

    def __init__(self, storage: Storage) -> None:
        self.storage = storage
        # Stored tokens are compared with exact ones.
        self.tolerance = TOLERANCE if storage.text.itemsize == 2 else 0.1

    def pools(self, batch: Batch) -> list[LayerPools]:
        return batch.pools(self.storage)

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
            return lambda i: extend.extend_stored(
                batch.q[i], pools[i], plan, batch.qo_indptr, SM_SCALE
            )
        own = own_chunk_attention(DEVICE)
        chunk = Ragged(batch.qo_indptr, lens)
        own.plan(
            chunk,
            chunk,
            (model.num_qo_heads, model.num_kv_heads, HEAD_DIM, HEAD_DIM),
            torch.bfloat16,
        )
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
        """keys [layers, n, H, D]: the images of ``batch`` one after another, image i being basis i.
        A launch does ``group`` layers."""
        pools, indptr = batch.stacked_pools(self.storage), batch.kv_indptr.tolist()
        bounds = [(start, end, basis) for basis, (start, end) in enumerate(pairwise(indptr))]
        segments = compress.Segments.upload(bounds, DEVICE)
        start = compress.start_vectors(HEAD_DIM, self.storage.rows.rank, DEVICE)

        def launch(i: int) -> None:
            layers = slice(i * group, (i + 1) * group)
            written = pools._make(x[layers] if isinstance(x, torch.Tensor) else x for x in pools)
            compress.compress(keys[layers], batch.kv_indices, segments, written, start)

        return launch


class RotateKExpanded(RotateKKernels):
    """Extend in another way: prefix and chunk side by side at full width, then FA3 over both."""

    name = "rotatek_expanded"
    missing = (ImportError, OSError, RuntimeError)

    def __init__(self, storage: Storage) -> None:
        super().__init__(storage)
        self.tolerance *= 2  # expanded Keys and Values are rounded once more

    def extend(self, batch: Batch) -> Launch:
        from sgl_kernel.flash_attn import flash_attn_varlen_func

        pools, lens = self.pools(batch), batch.seq_lens.tolist()
        partition = self._partition(batch, batch.prefix_lens)[0]
        kv_indptr = torch.tensor([0, *lens], dtype=torch.int32, device=DEVICE).cumsum(
            0, dtype=torch.int32
        )
        heads = batch.model.num_kv_heads
        keys, values = (
            torch.empty(sum(lens), heads, HEAD_DIM, dtype=torch.bfloat16, device=DEVICE)
            for _ in range(2)
        )

        def launch(i: int) -> torch.Tensor:
            expand.expand(
                pools[i], partition, batch.requests, batch.prefix_lens, batch.qo_indptr, kv_indptr,
                batch.k_new[i], batch.v_new[i], keys, values, max(lens),
            )  # fmt: skip
            return flash_attn_varlen_func(
                batch.q[i], keys, values, batch.qo_indptr, kv_indptr, batch.new_tokens, max(lens),
                softmax_scale=SM_SCALE, causal=True, num_splits=0,
            )  # fmt: skip

        return launch


class Timing(NamedTuple):
    """Microseconds of one launch."""

    p20: float
    median: float
    p80: float


def spread(microseconds: list[float]) -> Timing:
    ordered = sorted(microseconds)
    return Timing(
        ordered[len(ordered) // 5], statistics.median(ordered), ordered[-1 - len(ordered) // 5]
    )


def measure(
    launch: Launch,
    sets: int,
    samples: int,
    check: Callable[[int, torch.Tensor], None] | None = None,
) -> Timing:
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
    """Microseconds of each of ``samples`` calls, queued one behind the other so that the GPU does
    not idle."""
    events = [torch.cuda.Event(enable_timing=True) for _ in range(samples + 1)]
    events[0].record()
    for event in events[1:]:
        work()
        event.record()
    torch.cuda.synchronize()
    return [1000 * start.elapsed_time(end) for start, end in pairwise(events)]


class Bench:
    """Runs the cases of ``options`` and writes each as soon as it is measured."""

    def __init__(self, options: argparse.Namespace, add_rows: Callable[[list[dict]], None]) -> None:
        self.options, self.add_rows = options, add_rows
        self.samples = 5 if options.quick else 15
        self.read_bandwidth = 0.0
        fp8 = Storage.parse("fp8")
        peers = [FA3(), FA3(fp8), FlashInfer(), FlashInfer(fp8), SGLangTriton()]
        self.kernels = [peer for peer in peers if peer.name not in options.without]
        self.kernels += map(RotateKKernels, options.storages)

    def row(self, op: str, kernel: str, timing: Timing, num_bytes: int = 0, **cells) -> dict:
        row = {"op": op, "kernel": kernel, **cells, "microseconds": timing.median}
        row |= {"microseconds_p20": timing.p20, "microseconds_p80": timing.p80}
        if num_bytes:
            row |= {"bytes": num_bytes, "terabytes_per_second": num_bytes / timing.median / 1e6}
            if self.read_bandwidth:
                row["fraction_of_read_bandwidth"] = (
                    row["terabytes_per_second"] / self.read_bandwidth
                )
        return row

    def bandwidth(self) -> None:
        source = torch.randn(1 << 30, device=DEVICE)  # 4 GiB
        target = torch.empty_like(source)
        for name, work, factor in (
            ("torch_sum", source.sum, 1),
            ("torch_copy", lambda: target.copy_(source), 2),
        ):
            event_times(work, 3)  # warm-up
            row = self.row(
                "bandwidth", name, spread(event_times(work, self.samples)), factor * source.nbytes
            )
            self.read_bandwidth = self.read_bandwidth or row["terabytes_per_second"]
            self.add_rows([row])
            tqdm.write(f"{name}: {row['terabytes_per_second']:.2f} TB/s")

    def usable(self, op: str, kernels: list) -> list:
        """Those that are there, found by one small launch; the reason is printed for the others."""
        images, found = ((256,), 0) if op == "compress" else ((256,), 32), []
        batch = Batch(
            MODELS[self.options.models[0]], [Request(*images)] * 2, 1, 32 if op == "extend" else 0
        )
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
                tqdm.write(
                    f"{op}: {kernel.name} {kernel.storage} is left out: {type(error).__name__}: "
                    f"{reason}"
                )
        return found

    def sets(self, num_bytes: int) -> int:
        return min(MAX_SETS, max(MIN_SETS, -(-ROTATING_BYTES // num_bytes)))

    def attention(self, op: str, cases: list[tuple[list[Request], int]]) -> None:
        method = "extend" if op == "extend" else "decode"
        expanded = map(RotateKExpanded, self.options.storages) if op == "extend" else ()
        kernels = self.usable(method, [*self.kernels, *expanded])
        for model_name, (requests, new_tokens) in self.progress(op, cases):
            model = MODELS[model_name]
            sets = self.sets(
                min(read_bytes(model, requests, kernel.storage, new_tokens) for kernel in kernels)
            )
            batch, rows = Batch(model, requests, sets, new_tokens), []
            for kernel in kernels:
                name = f"{op} {model_name} {kernel.name} {kernel.storage}"
                check = partial(
                    batch.check, name, batch.pools(kernel.storage), tolerance=kernel.tolerance
                )
                timing = measure(getattr(kernel, method)(batch), sets, self.samples, check)
                num_bytes = read_bytes(model, requests, kernel.storage, new_tokens)
                cells = {
                    "storage": str(kernel.storage),
                    "sets": sets,
                    **context_cells(model_name, requests, new_tokens),
                }
                rows.append(self.row(op, kernel.name, timing, num_bytes, **cells))
            self.add_rows(with_speedup(rows))

    def plan(self, op: str) -> None:
        kernels = self.usable(op, [RotateKKernels(self.options.storages[0])])
        for model_name, requests in self.progress(op, plan_cases(self.options.quick)):
            batch = Batch(MODELS[model_name], requests, 1)
            for kernel in kernels:
                timing = measure(getattr(kernel, op)(batch), 8, self.samples)
                self.add_rows(
                    [self.row(op, kernel.name, timing, **context_cells(model_name, requests))]
                )

    def compress(self) -> None:
        kernels = self.usable("compress", list(map(RotateKKernels, self.options.storages)))
        cases = (
            [(1, 1225)]
            if self.options.quick
            else [(n, tokens) for n in (1, 4) for tokens in (576, 1225, 2880)]
        )
        for model_name, (images, tokens) in self.progress("compress", cases):
            model, requests = MODELS[model_name], [Request((tokens,), 0)] * images
            layers = model.num_layers
            batch, keys = (
                Batch(model, requests, layers),
                image_keys(layers, images * tokens, model.num_kv_heads),
            )
            group = compress.layers_at_once(layers, keys[0].nbytes)
            cells = {"model": model_name, "batch": images, "visual_tokens": tokens, "sets": layers}
            for kernel in kernels:
                fidelities: list[float] = []
                pools, of = kernel.pools(batch), (compressed_energy, "energy_over_eigh", min)
                if kernel.storage.rows.has_residual:
                    of = coded_error, "error_over_eigh", max
                measured, column, worst = of

                def check(i: int, _) -> None:
                    fidelities.append(measured(batch, pools[i * group], keys[i * group]))

                launches = -(-layers // group)
                timing = measure(kernel.compress(batch, keys, group), launches, self.samples, check)
                timing = Timing(*(microseconds * launches / layers for microseconds in timing))
                num_bytes = compress_bytes(model, images, tokens, kernel.storage)
                row = self.row(
                    "compress", kernel.name, timing, num_bytes, storage=str(kernel.storage), **cells
                )
                row[column] = worst(fidelities)
                self.add_rows([row | {"microseconds_all_layers": timing.median * layers}])
            if (images, tokens) == cases[0]:
                fit = partial(pca.fit, keys[0], batch.q[0], self.options.storages[0].rows.rank)
                fit()
                row = self.row(
                    "compress", "torch_eigh", spread(event_times(fit, 5)), **(cells | {"sets": 1})
                )
                self.add_rows(
                    [row | {"microseconds_all_layers": row["microseconds"] * model.num_layers}]
                )

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
    """Check what ``compress`` stored in ``pools``. Returns the energy that its bases capture, over
    that of eigh's bases of the same rank: the lowest over images and heads."""
    lowest, first_visual_slot = 1e9, len(pools.k_text)
    for basis, (start, end) in enumerate(pairwise(batch.kv_indptr.tolist())):
        rows, own = batch.kv_indices[start:end] - first_visual_slot, keys[start:end]
        query_map, mean = pools.query_map[basis].float(), own.float().mean(0)
        compare("compress: mean", pools.mean[basis], mean, 1e-3)
        compare(
            "compress: z",
            pools.z[rows].flatten(1),
            reference.compress(own, query_map, mean).flatten(1),
        )
        gram = query_map.mT @ query_map
        compare(
            "compress: basis not orthonormal",
            gram,
            torch.eye(gram.shape[-1], device=gram.device).expand_as(gram),
            5e-2,
        )
        best = pca.fit(own, own[:0], query_map.shape[-1]).query_map
        ours, eigh = (
            reference.compress(own, columns, mean).square().sum((0, 2))
            for columns in (torch.linalg.qr(query_map).Q, best)
        )
        lowest = min(lowest, (ours / eigh).min().item())
    if lowest < MIN_ENERGY:
        raise ValueError(
            f"compress: a basis captures {lowest:.3f} of the energy of eigh's, allowed {MIN_ENERGY}"
        )
    return lowest


def coded_error(batch: Batch, pools: LayerPools, keys: torch.Tensor) -> float:
    """Squared error of the coded Keys that ``compress`` stored in ``pools``, over that of the
    reference with eigh's basis: the highest over images and heads."""
    highest = 0.0
    for start, end in pairwise(batch.kv_indptr.tolist()):
        own = keys[start:end].float()
        stored, _ = reference.expand(batch.kv_indices[start:end], pools)
        fitted = pca.fit_coded(own, own[:0], pools.z.shape[-1])
        fitted = fitted._replace(query_map=fitted.query_map.to(pools.query_map.dtype).float())
        best = coded.decode_keys(
            *coded.encode_keys(own, fitted, pools.key_bits), fitted, pools.key_bits
        )
        ours, eigh = ((x - own).square().sum((0, 2)) for x in (stored, best))
        highest = max(highest, (ours / eigh).max().item())
    if highest > MAX_ERROR:
        raise ValueError(
            f"compress: squared error {highest:.3f} of the reference's, allowed {MAX_ERROR}"
        )
    return highest


def context_cells(model_name: str, requests: list[Request], new_tokens: int = 0) -> dict:
    visual, text = (
        round(statistics.mean(lens))
        for lens in zip(*((sum(r.images), r.text) for r in requests), strict=True)
    )
    cells = {
        "model": model_name,
        "batch": len(requests),
        "visual_tokens": visual,
        "text_tokens": text,
    }
    return cells | ({"new_tokens": new_tokens} if new_tokens else {})


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    def choices(allowed, kind: str):
        def parse(text: str) -> list[str]:
            names = text.split(",")
            if unknown := [name for name in names if name not in allowed]:
                raise argparse.ArgumentTypeError(
                    f"no {kind} {', '.join(unknown)}; known: {', '.join(allowed)}"
                )
            return names

        return parse

    def storages(text: str) -> list[Storage]:
        try:
            found = [Storage.parse(name) for name in text.split(",")]
        except ValueError as error:
            raise argparse.ArgumentTypeError(f"{text}: {error}") from None
        if any(storage.rows is None for storage in found):
            raise argparse.ArgumentTypeError(
                "bf16 and fp8 are the peers', which are always measured"
            )
        return found

    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    default_output = Path(__file__).resolve().parents[1] / "results"
    parser.add_argument(
        "--output",
        type=Path,
        default=default_output,
        help="folder of kernels.csv (default scripts/results)",
    )
    parser.add_argument(
        "--plot",
        action="store_true",
        help="only draw kernels.png from the kernels.csv that is there",
    )
    parser.add_argument(
        "--only", type=choices(OPS, "operation"), default=list(OPS), help=f"some of {','.join(OPS)}"
    )
    parser.add_argument(
        "--models",
        type=choices(MODELS, "model"),
        default=list(MODELS),
        help=f"some of {','.join(MODELS)}",
    )
    default = [Storage.parse(name) for name in ("k4v4", "k4v4-fp8", "k2v4", "r32")]
    help = "how RotateK stores images: k4v4, k2v4-fp8, r64, ... (default k4v4,k4v4-fp8,k2v4,r32)"
    parser.add_argument("--storages", type=storages, default=default, help=help)
    parser.add_argument(
        "--without", type=choices(PEERS, "peer"), default=[], help=f"some of {','.join(PEERS)}"
    )
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
