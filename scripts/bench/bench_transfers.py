"""Time the transfers of the host-memory tier, and decode beside them, on one GPU.

    PYTHONPATH=. python scripts/bench/bench_transfers.py        # -> scripts/results/transfers.csv

Slabs are those of a LLaVA-NeXT-8B server with coded rows; a transfer moves the slabs of ``images``
pictures of 2,928 tokens in all layers. ``slabs``: those of a picture lie together in both memories,
as where little was evicted, or are scattered.

- op=copy: each way to do it, with GPU times (events on an idle GPU) and ``submit_us``, what the CPU
  takes to launch it. ``pinned_copy`` is one copy of as many contiguous bytes, the rate that the
  link gives; ``fraction_of_pinned_copy`` is against it.
- op=decode: a step of 8 decoder layers (matrix products of their weights and RotateK's attention,
  in a CUDA graph) for ``batch`` chats, alone and while transfers follow each other on a stream of
  their own; ``decode_rate`` is against the step alone.
"""

from __future__ import annotations

import argparse
import csv
import ctypes
import functools
import itertools
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

import numpy as np
import torch
from bench_batches import DEVICE, DTYPE, MODELS, Batch, Request, Storage
from bench_kernels import RotateKKernels, event_times
from kernel_records import machine_line
from tqdm import tqdm

from sglang_rotatek.memory.copy_slabs import copy_slabs
from sglang_rotatek.memory.host import PinnedHostMemory
from sglang_rotatek.memory.layout import KVShape, PoolLayout

MODEL, STORAGE = "llava-next-8b", Storage.parse("k4v4")
IMAGE_TOKENS = 2928
NUM_SLABS = 1500  # of each memory
LAYERS_OF_STEP = 8
# Of an 8B Llama: input and output channels of a layer's matrices.
MATRICES = ((4096, 6144), (4096, 4096), (4096, 28672), (14336, 4096))
# Slabs of an image one behind the other, as in fresh memory, or anywhere, the worst case.
LIES = TOGETHER, SCATTERED = "together", "scattered"
HOST_TO_DEVICE, DEVICE_TO_HOST = "host_to_device", "device_to_host"
COLUMNS = (
    "op", "way", "direction", "images", "slabs", "batch", "bytes", "microseconds", "submit_us",
    "gigabytes_per_second", "fraction_of_pinned_copy", "decode_us", "decode_rate",
)  # fmt: skip
SAMPLES = 11


class Memories:
    """Slabs of both, and the ids of ``images`` pictures in each."""

    def __init__(self) -> None:
        model = MODELS[MODEL]
        shape = KVShape(model.num_layers, model.num_kv_heads, 128, 128, STORAGE.rows, 2, 2)
        layout = PoolLayout(NUM_SLABS, NUM_SLABS, shape.text_rows, shape.visual_rows)
        self.slabs_of_image = layout.slabs_of(IMAGE_TOKENS)
        words = shape.slab_bytes // model.num_layers // 8
        self.device = torch.zeros(
            model.num_layers, 1 + NUM_SLABS, words, dtype=torch.int64, device=DEVICE
        )
        self.pinned = PinnedHostMemory(self.device, NUM_SLABS)
        self.host = self.pinned.slabs
        self.host.random_()
        self._draws = np.random.default_rng(0)

    def draw(self, images: int, lie: str) -> np.ndarray:
        """Slabs that are read and written, [2, n] int64: LIES."""
        if lie == SCATTERED:
            count = images * self.slabs_of_image
            return np.stack([1 + self._draws.permutation(NUM_SLABS)[:count] for _ in range(2)])
        places = NUM_SLABS // self.slabs_of_image
        firsts = [self._draws.permutation(places)[:images] * self.slabs_of_image for _ in range(2)]
        slabs = 1 + np.stack(firsts)[..., None] + np.arange(self.slabs_of_image)
        return slabs.reshape(2, -1)

    def ends(self, direction: str) -> tuple[torch.Tensor, torch.Tensor]:
        is_load = direction == HOST_TO_DEVICE
        return (self.host, self.device) if is_load else (self.device, self.host)


@functools.cache
def runtime() -> ctypes.CDLL:
    return ctypes.CDLL("libcudart.so.13" if torch.version.cuda.startswith("13") else "libcudart.so")


def check(status: int) -> None:
    if status:
        raise RuntimeError(f"CUDA error {status}")


def memcpy_2d(memories: Memories, direction: str, slabs: np.ndarray) -> Callable[[], None]:
    """A strided copy a slab, of all layers."""
    source, target = memories.ends(direction)
    size = source.shape[-1] * 8

    def launch() -> None:
        stream = ctypes.c_void_p(torch.cuda.current_stream().cuda_stream)
        for read, written in slabs.T.tolist():
            status = runtime().cudaMemcpy2DAsync(
                ctypes.c_void_p(target.data_ptr() + written * size),
                ctypes.c_size_t(target.stride(0) * 8),
                ctypes.c_void_p(source.data_ptr() + read * size),
                ctypes.c_size_t(source.stride(0) * 8),
                ctypes.c_size_t(size),
                ctypes.c_size_t(len(source)),
                4,  # cudaMemcpyDefault
                stream,
            )
            check(status)

    return launch


def by_copy_engines(memories: Memories, direction: str, slabs: np.ndarray) -> Callable[[], None]:
    """As the tier does it: cudaMemcpyBatchAsync, a call a layer."""
    source, target = memories.ends(direction)
    return lambda: copy_slabs(source, target, *slabs)


def pinned_copy(memories: Memories, direction: str, slabs: np.ndarray) -> Callable[[], None]:
    source, target = memories.ends(direction)
    words = slabs.shape[1] * source.shape[0] * source.shape[-1]
    source, target = (x.flatten()[:words] for x in (source, target))
    return lambda: target.copy_(source, non_blocking=True)


WAYS = {
    "pinned_copy": pinned_copy,
    "copy_slabs": by_copy_engines,
    "memcpy_2d_a_slab": memcpy_2d,
}


class Bench:
    def __init__(self, path: Path) -> None:
        self.path, self.rows, self.machine = path, [], machine_line()
        self.memories = Memories()
        self.stream = torch.cuda.Stream()

    def add(self, op: str, way: str, direction: str, **cells) -> None:
        self.rows.append({"op": op, "way": way, "direction": direction, **cells})
        tqdm.write(
            "  ".join(
                f"{v:.4g}" if isinstance(v, float) else f"{v}" for v in self.rows[-1].values()
            )
        )
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("w", newline="") as file:
            file.write(self.machine + "\n")
            writer = csv.DictWriter(file, COLUMNS, restval="")
            writer.writeheader()
            for row in self.rows:
                writer.writerow(
                    {k: f"{v:.6g}" if isinstance(v, float) else v for k, v in row.items()}
                )

    def bytes(self, images: int) -> int:
        return images * self.memories.slabs_of_image * self.memories.device[:, 0].nbytes

    def times(self, launch: Callable[[], None]) -> tuple[float, float]:
        """Microseconds on the GPU and on the CPU until it is launched, medians."""
        submits = []

        def work() -> None:
            start = time.perf_counter()
            launch()
            submits.append((time.perf_counter() - start) * 1e6)

        with torch.cuda.stream(self.stream):
            work()
            torch.cuda.synchronize()
            gpu = []
            for _ in range(SAMPLES):  # one at a time: a queue would hide what launches cost
                gpu += event_times(work, 1)
        return median(gpu), median(submits)

    def checked(self, way: str, direction: str, slabs: np.ndarray) -> Callable[[], None]:
        source, target = self.memories.ends(direction)
        launch = WAYS[way](self.memories, direction, slabs)
        if way != "pinned_copy":
            target.zero_()
            torch.cuda.synchronize()
            with torch.cuda.stream(self.stream):
                launch()
            torch.cuda.synchronize()
            read, written = (torch.from_numpy(ids) for ids in slabs)
            for layer in (0, len(source) - 1):
                found, expected = target[layer].cpu()[written], source[layer].cpu()[read]
                if not torch.equal(found, expected) or not expected.any():
                    raise ValueError(f"{way} {direction}: what arrived is not what was sent")
        return launch

    def copies(self) -> None:
        for direction in (HOST_TO_DEVICE, DEVICE_TO_HOST):
            for images, lie in itertools.product((1, 8), LIES):
                slabs, pinned = self.memories.draw(images, lie), None
                for way in WAYS:
                    gpu, submit = self.times(self.checked(way, direction, slabs))
                    pinned = pinned or gpu
                    rate = self.bytes(images) / gpu / 1e3
                    cells = {
                        "images": images,
                        "slabs": lie,
                        "bytes": self.bytes(images),
                        "microseconds": gpu,
                    }
                    cells |= {"submit_us": submit, "gigabytes_per_second": rate}
                    self.add("copy", way, direction, **cells, fraction_of_pinned_copy=pinned / gpu)

    def decode(self, batch_size: int) -> None:
        step = decode_step(batch_size)
        slabs = self.memories.draw(4, SCATTERED)
        for direction in (HOST_TO_DEVICE, DEVICE_TO_HOST):
            for way in ("copy_slabs", "memcpy_2d_a_slab"):
                launch = WAYS[way](self.memories, direction, slabs)
                alone = median([event_times(step, 1)[0] for _ in range(60)])
                beside, copied, seconds = self.beside(step, launch)
                self.add(
                    "decode", way, direction, images=4, slabs=SCATTERED, batch=batch_size,
                    bytes=self.bytes(4),
                    gigabytes_per_second=copied * self.bytes(4) / seconds / 1e9, microseconds=alone,
                    decode_us=beside, decode_rate=alone / beside,
                )  # fmt: skip

    def beside(
        self, step: Callable[[], None], transfer: Callable[[], None]
    ) -> tuple[float, int, float]:
        """Microseconds of a step while transfers follow each other, transfers and seconds."""
        torch.cuda.synchronize()
        start = time.perf_counter()
        ends = []
        times = []
        while time.perf_counter() - start < 0.6:
            if sum(not end.query() for end in ends[-3:]) < 2:
                with torch.cuda.stream(self.stream):
                    transfer()
                    ends.append(torch.cuda.Event())
                    ends[-1].record()
            times += event_times(step, 1)
        copied = sum(end.query() for end in ends)
        seconds = time.perf_counter() - start
        torch.cuda.synchronize()
        return median(times), copied, seconds


def decode_step(batch_size: int) -> Callable[[], None]:
    """A replay of LAYERS_OF_STEP decoder layers for chats of one picture and 256 text tokens."""
    batch = Batch(MODELS[MODEL], [Request((2880,), 256)] * batch_size, LAYERS_OF_STEP)
    attend = RotateKKernels(STORAGE).decode(batch)
    hidden = [torch.randn(batch_size, rows, dtype=DTYPE, device=DEVICE) for rows, _ in MATRICES]
    weights = [
        [torch.randn(shape, dtype=DTYPE, device=DEVICE) for shape in MATRICES]
        for _ in range(LAYERS_OF_STEP)
    ]

    def run() -> None:
        for layer in range(LAYERS_OF_STEP):
            hidden[0] @ weights[layer][0]
            attend(layer)
            for x, weight in zip(hidden[1:], weights[layer][1:], strict=True):
                x @ weight

    run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return graph.replay


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    default = Path(__file__).resolve().parents[1] / "results" / "transfers.csv"
    parser.add_argument("--output", type=Path, default=default, help="(default %(default)s)")
    parser.add_argument("--batches", type=int, nargs="*", default=[8, 32], help="of op=decode")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("bench_transfers.py measures a GPU and found none")
    bench = Bench(options.output)
    bench.copies()
    for batch_size in options.batches:
        bench.decode(batch_size)


if __name__ == "__main__":
    main()
