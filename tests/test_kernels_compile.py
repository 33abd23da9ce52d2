"""Every kernel as a server launches it compiles for sm_80, sm_90 and sm_100, and fits shared memory
and registers.

Without a GPU, by the installed Triton: the wrappers run as in a server, over a driver that compiles
and launches nothing.
"""

import os
import re
import subprocess
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import pytest
import torch
import triton
from gpuless import GpulessDriver

from sglang_rotatek.kernels import (
    attend,
    compress,
    decode,
    divprune,
    expand,
    extend,
    store,
    turn,
)
from sglang_rotatek.kernels.coded import FP8
from sglang_rotatek.kernels.partition import Partition
from sglang_rotatek.kernels.pools import CompressedPools, LayerPools, VisualRows, split_rows
from sglang_rotatek.kernels.row_format import RowFormat

pytestmark = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") == "1", reason="the interpreter compiles nothing"
)

# Shared memory that one program may take.
SHARED_KIB = {80: 163, 89: 99, 90: 227, 100: 227, 120: 99}
BASES, LAYERS = 3, 2


class Shape(NamedTuple):
    num_kv_heads: int
    group: int
    head_dim: int
    rank: int
    dtype: torch.dtype = torch.bfloat16
    key_bits: int = 16
    value_bits: int = 16
    fp8_text: bool = False


LLAVA_NEXT_8B = Shape(8, 4, 128, 32)
QWEN2_5_VL_7B = Shape(4, 7, 128, 32)
CODED = Shape(8, 4, 128, 16, key_bits=4, value_bits=4)


class Server:
    """The calls of the GPU backend, on small pools: a kernel's variant depends on sizes of rows,
    not on how many."""

    def __init__(self, shape: Shape) -> None:
        self.shape = shape
        heads, group, dim, rank, dtype, key_bits, value_bits, fp8_text = shape
        self.num_heads = heads * group
        form = RowFormat(rank, key_bits, value_bits)
        text_dtype = FP8 if fp8_text else dtype
        # So that visual rows fill the memory too.
        self.slots = (
            heads * form.row_bytes(dim, dim, dtype.itemsize) * (2 if key_bits == 16 else 16)
        )
        memory = torch.zeros(
            LAYERS, self.slots * heads * 2 * dim * text_dtype.itemsize, dtype=torch.uint8
        )
        k, v = split_rows(memory.view(text_dtype), heads, dim, dim)
        rows = VisualRows.view(memory, form, heads, dim, dim, dtype)
        query_map = torch.zeros(LAYERS, BASES, heads, dim, rank, dtype=dtype)
        mean = torch.zeros(LAYERS, BASES, heads, dim)
        slot_to_basis = torch.zeros(rows.z.shape[1], dtype=torch.int32)
        z, values, residual, steps = (x if x is None else x[0] for x in rows)
        self.pools = LayerPools(
            k[0], v[0], z, values, query_map[0], mean[0], slot_to_basis, residual, steps
        )
        self.compressed = CompressedPools(
            rows.z, query_map, mean, self.slots, rows.residual, rows.steps
        )
        self.req_to_token = torch.zeros(4, self.slots, dtype=torch.int32)
        self.partition = Partition(*self.req_to_token.shape, "cpu")

    def tokens(self, n: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        heads, _, dim, _, dtype, *_ = self.shape
        return tuple(torch.zeros(n, h, dim, dtype=dtype) for h in (self.num_heads, heads, heads))

    def q_indptr(self, lens: list[int]) -> torch.Tensor:
        return torch.tensor([0, *lens], dtype=torch.int32).cumsum(0, dtype=torch.int32)

    def requests(
        self, n: int, dtype: torch.dtype = torch.int32
    ) -> tuple[torch.Tensor, torch.Tensor]:
        return torch.zeros(n, dtype=torch.int64), torch.ones(n, dtype=dtype)

    def store(self) -> None:
        _, k, v = self.tokens(5)
        slots = torch.zeros(5, dtype=torch.int32)
        store.store(k, v, slots, self.pools)
        store.store(k, v, slots, self.pools, k, slots.long())

    def decode(self, num_requests: int = 1) -> None:
        plan = decode.make_plan(self.partition, num_requests, self.num_heads, self.pools)
        decode.update_plan(plan, *self.requests(num_requests, torch.int64), self.req_to_token)
        q, lens = self.tokens(num_requests)[0], self.q_indptr([1] * num_requests)
        decode.decode(q, self.pools, plan, lens, self.shape.head_dim**-0.5)

    def extend(self) -> None:
        """With splits; a prefill without them differs by one kernel less."""
        q, q_indptr = self.tokens(3)[0], self.q_indptr([3])
        self.partition.rebuild(
            self.req_to_token, *self.requests(1), self.pools.slot_to_basis, self.slots
        )
        plan = extend.make_plan(self.partition, [3], self.num_heads, self.pools)
        extend.update_plan(plan, *self.requests(1))
        # FlashAttention's log-sum-exp has its heads outermost.
        own_lse = torch.zeros(self.num_heads, 3).T
        extend.extend(
            q, torch.zeros_like(q), own_lse, self.pools, plan, q_indptr, self.shape.head_dim**-0.5
        )
        extend.extend_stored(q, self.pools, plan, q_indptr, self.shape.head_dim**-0.5)

    def expand(self) -> None:
        _, k, v = self.tokens(3)
        self.partition.rebuild(
            self.req_to_token, *self.requests(1), self.pools.slot_to_basis, self.slots
        )
        indptr = self.q_indptr([3]), self.q_indptr([4])
        outs = (torch.zeros(4, *x.shape[1:], dtype=x.dtype) for x in (k, v))
        expand.expand(self.pools, self.partition, *self.requests(1), *indptr, k, v, *outs, 4)

    def compress(self) -> None:
        heads, _, dim, rank, dtype, *_ = self.shape
        keys, slots = (
            torch.zeros(LAYERS, 5, heads, dim, dtype=dtype),
            torch.full((5,), self.slots, dtype=torch.int32),
        )
        segments = compress.Segments.upload([(0, 2, 0), (2, 5, 1)], "cpu")
        start = compress.start_vectors(dim, rank, "cpu")
        errors = torch.zeros(LAYERS, 2, heads, 2)
        for weights in (None, torch.ones(LAYERS, 2, heads, dim)):  # the bases `pca` and `paper`
            compress.compress(keys, slots, segments, self.compressed, start, weights, errors=errors)


# What a call compiles, and the most bytes of registers that a thread of each may spill: the
# attention's small programs and its tile products do, in what the sizes at the top of decode.py and
# extend.py were measured with.
PLAN = {"_schedule": 0}
CALLS = {
    "store": (Server.store, {"_store": 0}),
    "decode-1": (Server.decode, PLAN | {"_attend": 0, "_merge": 0}),
    "decode-512-programs": (
        lambda server: server.decode(-(-512 // server.shape.num_kv_heads)),
        PLAN | {"_attend": 64, "_merge": 0},
    ),
    "decode-1024-programs": (
        lambda server: server.decode(-(-1024 // server.shape.num_kv_heads)),
        PLAN | {"_attend": 512, "_merge": 0},
    ),
    "extend": (Server.extend, PLAN | {"_count": 0, "_place": 0, "_attend": 1280, "_merge": 16}),
    "expand": (Server.expand, {"_count": 0, "_place": 0, "_expand": 0}),
    "compress": (Server.compress, {"_moments": 64, "_fit": 0, "_project": 0}),
}
# Of coded rows, and of FP8 text; each with the variants above.
CODED_CALLS = {
    "store": (Server.store, {"_store": 0}),
    "decode-1": (Server.decode, PLAN | {"_turn": 0, "_attend": 32, "_merge": 0}),
    "decode-512-programs": (
        CALLS["decode-512-programs"][0],
        PLAN | {"_turn": 0, "_attend": 32, "_merge": 0},
    ),
    "decode-1024-programs": (
        CALLS["decode-1024-programs"][0],
        PLAN | {"_turn": 0, "_attend": 32, "_merge": 0},
    ),
    "extend": (
        Server.extend,
        PLAN | {"_count": 0, "_place": 0, "_turn": 0, "_attend": 1280, "_merge": 16},
    ),
    "expand": (Server.expand, {"_count": 0, "_place": 0, "_expand": 0}),
    "compress": (
        Server.compress,
        {"_moments": 64, "_fit": 0, "_extents": 0, "_encode": 128, "_add_errors": 0},
    ),
}
ODD = Shape(2, 3, 80, 32)
# One shape for every target, the others for one: of another, little but sizes of strides and of
# pads differs.
TARGETS = [
    (80, QWEN2_5_VL_7B),
    (90, QWEN2_5_VL_7B),
    (90, LLAVA_NEXT_8B),
    (90, ODD),
    (100, QWEN2_5_VL_7B),
    (90, CODED),
]
MORE_TARGETS = [
    *((arch, shape) for arch in (80, 100) for shape in (LLAVA_NEXT_8B, ODD)),
    (89, QWEN2_5_VL_7B),
    (120, LLAVA_NEXT_8B),
    (90, CODED._replace(fp8_text=True, num_kv_heads=4, group=7)),
    (90, CODED._replace(key_bits=2)),
    (90, CODED._replace(dtype=torch.float16, head_dim=64, value_bits=8)),
    (90, CODED._replace(num_kv_heads=1, head_dim=80, value_bits=2)),
    (90, CODED._replace(key_bits=2, value_bits=16, fp8_text=True)),
    (90, Shape(8, 4, 128, 32, value_bits=4, fp8_text=True)),
    (90, Shape(4, 1, 64, 16, torch.float16)),
    (90, Shape(1, 8, 64, 64)),
    (90, Shape(2, 4, 96, 48, torch.float16)),
    (90, Shape(1, 7, 128, 64, torch.float16)),
]


def target_id(target: tuple[int, Shape]) -> str:
    arch, (heads, group, dim, rank, dtype, key_bits, value_bits, fp8_text) = target
    name = (
        f"sm_{arch}-{heads * group}q-{heads}kv-d{dim}-r{rank}-{str(dtype).removeprefix('torch.')}"
    )
    if (key_bits, value_bits) != (16, 16):
        name += f"-k{key_bits}-v{value_bits}"
    return name + "-fp8-text" * fp8_text


def spilled_bytes(cubin: bytes, path: Path) -> int:
    """Of a thread: all its local memory, since the kernels keep no arrays there."""
    path.write_bytes(cubin)
    command = [triton.knobs.nvidia.cuobjdump.path, "-res-usage", path]
    text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    ((stack, local),) = re.findall(r"STACK:(\d+).*LOCAL:(\d+)", text)
    return int(stack) + int(local)


def assert_fits(gpu: GpulessDriver, most_spilled: dict[str, int], path: Path) -> None:
    assert {kernel.name for kernel in gpu.loaded.values()} == set(most_spilled)
    for kernel in gpu.loaded.values():
        assert kernel.shared_bytes <= SHARED_KIB[gpu.arch] << 10
        assert spilled_bytes(kernel.cubin, path) <= most_spilled[kernel.name], kernel.name


def check(
    call: str, target: tuple[int, Shape], monkeypatch: pytest.MonkeyPatch, path: Path
) -> None:
    arch, shape = target
    gpu = GpulessDriver(arch)
    gpu.install(monkeypatch)
    for module in (attend, store):
        monkeypatch.setattr(module, "has_overlap", lambda device: arch >= 90)
    monkeypatch.setattr(attend, "has_ptx", lambda device: True)
    turn._launch.cache_clear()
    expand._launch.cache_clear()
    for module in (attend, compress):
        monkeypatch.setattr(
            module, "has_large_shared_memory", lambda device: SHARED_KIB[arch] > 144
        )
    # A kernel's second launch in one call asks for the stream.
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: SimpleNamespace(cuda_stream=0))
    attend._launches.cache_clear()
    store._launch.cache_clear()
    run, most_spilled = (CALLS if shape.key_bits == 16 else CODED_CALLS)[call]
    run(Server(shape))
    assert_fits(gpu, most_spilled, path)


calls = pytest.mark.parametrize("call", CALLS)


@pytest.mark.parametrize("target", TARGETS, ids=target_id)
@calls
def test_kernels_compile(call, target, monkeypatch, tmp_path):
    check(call, target, monkeypatch, tmp_path / "kernel.cubin")


@pytest.mark.slow
@pytest.mark.parametrize("target", MORE_TARGETS, ids=target_id)
@calls
def test_kernels_compile_for_more_targets(call, target, monkeypatch, tmp_path):
    check(call, target, monkeypatch, tmp_path / "kernel.cubin")


@pytest.mark.parametrize("arch", [80, 90, 100])
@pytest.mark.parametrize("tokens", [576, 1225, 2928])
def test_divprune_compiles(tokens, arch, monkeypatch, tmp_path):
    gpu = GpulessDriver(arch)
    gpu.install(monkeypatch)
    divprune.divprune(torch.zeros(tokens, 16), [(0, tokens, tokens // 3)])
    assert_fits(gpu, {"_distances": 0, "_pick": 0}, tmp_path / "kernel.cubin")
