"""The launch past Triton's look at arguments gives a compiled kernel what Triton itself gives it,
without a GPU."""

import logging
import os
from types import SimpleNamespace

import pytest
import torch
import triton
import triton.language as tl
from gpuless import GpulessDriver

from sglang_rotatek.kernels import launch
from sglang_rotatek.kernels.launch import Launch

pytestmark = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") == "1", reason="the interpreter launches nothing"
)
GRID, CONSTANTS = (3, 2, 1), {"SCALE": 2, "BLOCK": 16}


@triton.jit(do_not_specialize=["n"])
def _scale(x, out, n, stride, SCALE: tl.constexpr, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(out + at * stride, tl.load(x + at, mask=at < n) * SCALE, mask=at < n)


class CountedKernel:
    """``_scale``, and how often its public launch was used."""

    def __init__(self):
        self.public_launches = 0

    def __getitem__(self, grid):
        self.public_launches += 1
        return _scale[grid]


@pytest.fixture
def gpu(monkeypatch):
    gpu = GpulessDriver(90)
    gpu.install(monkeypatch)
    stream = SimpleNamespace(cuda_stream=gpu.get_current_stream(gpu.arch))
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: stream)
    return gpu


def arguments(seed):
    x = torch.full((64,), float(seed))
    return x, torch.empty_like(x), 40 + seed, 1


def without_launch_metadata(arguments):
    # For profilers; Launch gives none.
    return arguments[:6] + arguments[7:]


def test_the_second_launch_gives_a_compiled_kernel_what_triton_gives_it(gpu):
    kernel, (first, second) = CountedKernel(), (arguments(seed) for seed in (1, 2))
    run = Launch(kernel, 2, CONSTANTS)
    run(GRID, *first)
    run(GRID, *second)
    assert kernel.public_launches == 1
    _scale[GRID](*second, **CONSTANTS)
    _, ours, tritons = gpu.launches
    assert ours[6] is None and len(gpu.loaded) == 1
    assert len(ours) == len(tritons)
    for got, expected in zip(
        without_launch_metadata(ours), without_launch_metadata(tritons), strict=True
    ):
        assert got is expected or got == expected
    # Not by chance equal: these arguments differ from each other, and from the first launch's.
    assert ours[:4] == (*GRID, 0) and ours[-6:] == (*second, *CONSTANTS.values())


def test_an_unaligned_tensor_takes_the_public_launch(gpu):
    kernel, (x, out, n, stride) = CountedKernel(), arguments(1)
    run = Launch(kernel, 2, CONSTANTS)
    run(GRID, x, out, n, stride)
    run(GRID, x[1:], out, n, stride)
    run(GRID, x, out, n, stride)
    assert kernel.public_launches == 2 and len(gpu.launches) == 3


def test_another_triton_takes_the_public_launch_always_and_says_so_once(gpu, monkeypatch, caplog):
    monkeypatch.setattr(triton, "__version__", "4.0.1")
    launch.is_known.cache_clear()
    kernel = CountedKernel()
    with caplog.at_level(logging.WARNING):
        Launch(kernel, 2, CONSTANTS)
        run = Launch(kernel, 2, CONSTANTS)
    for seed in (1, 2, 3):
        run(GRID, *arguments(seed))
    assert kernel.public_launches == 3
    assert [call[-4] for call in gpu.launches] == [41, 42, 43]
    (record,) = caplog.records
    assert "4.0.1" in record.getMessage() and "3.8" in record.getMessage()


@pytest.mark.parametrize("version", ["3.6.0", "3.8.0", "3.8.2+git1234", triton.__version__])
def test_known_versions(version):
    assert launch.is_known(version)


@pytest.mark.parametrize("version", ["3.5.1", "3.7.0", "3.80.0", "4.6.0"])
def test_versions_whose_source_nobody_read_are_not_known(version):
    assert not launch.is_known(version)
