"""Copies of slabs in host memory: what transfers bring and when, on the CPU, over streams in any
order, and on a GPU."""

from __future__ import annotations

import ctypes
import random
from contextlib import nullcontext
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from streams import Streams

from sglang_rotatek.memory import copy_slabs as module
from sglang_rotatek.memory.copy_slabs import copy_slabs
from sglang_rotatek.memory.host import HostMemory, PinnedHostMemory

LAYERS, DEVICE_SLABS, HOST_SLABS, WORDS = 3, 6, 5, 4


def ids(*slabs: int) -> np.ndarray:
    return np.array(slabs, dtype=np.int64)


class InOrder:
    """Stands for torch.cuda where everything runs at once."""

    def current_stream(self) -> None:
        return None

    def stream(self, stream: None):
        return nullcontext()

    def launch(self, work) -> None:
        work()

    def run(self, choose) -> None:
        pass


class Server:
    """A scheduler that knows the contract: before a forward writes to slabs that it took anew it
    says so, and the forward behind a load is its consumer. ``seen``: what forwards read.
    ``overlaps``: it launches them on a stream of theirs."""

    def __init__(
        self, cuda, memory: HostMemory, slabs: torch.Tensor, *, overlaps: bool = False
    ) -> None:
        self.cuda, self.memory, self.slabs = cuda, memory, slabs
        self.seen: list[list[int]] = []
        self.stream = cuda.current_stream()
        if overlaps:
            self.stream = memory.forward_stream = cuda.Stream()

    def forward(
        self, *, fill: np.ndarray = ids(), value: int = 0, read: np.ndarray = ids()
    ) -> None:
        """Each layer writes ``value`` to the slabs ``fill`` and reads the first word of others."""
        self.memory.before_reuse(fill)
        self.memory.set_consumer(self.memory.start_loading())
        with self.cuda.stream(self.stream):
            for layer in range(LAYERS):
                self.memory.wait_until(layer)
                self.cuda.launch(lambda layer=layer: self._compute(layer, fill, value, read))

    def _compute(self, layer: int, fill: np.ndarray, value: int, read: np.ndarray) -> None:
        self.seen.append(self.slabs[layer, read, 0].tolist())
        self.slabs[layer, fill] = 10 * value + layer


def servers(monkeypatch, *, overlaps: bool = True) -> tuple[Server, Server]:
    """One where all runs at once, and one over streams."""
    monkeypatch.setattr(PinnedHostMemory, "_allocate", HostMemory._allocate)
    slabs = [torch.zeros(LAYERS, 1 + DEVICE_SLABS, WORDS, dtype=torch.int64) for _ in range(2)]
    cuda = Streams()

    def copy(source, target, read, written, after_layer=lambda layer: None) -> None:
        for layer in range(LAYERS):
            cuda.launch(
                lambda layer=layer: target[layer].index_copy_(
                    0, torch.from_numpy(written), source[layer, read]
                )
            )
            after_layer(layer)

    pinned = PinnedHostMemory(slabs[1], HOST_SLABS, cuda=cuda, copy=copy)
    plain = HostMemory(slabs[0], HOST_SLABS)
    for memory in (plain, pinned):
        memory.slabs.zero_()
    return Server(InOrder(), plain, slabs[0]), Server(cuda, pinned, slabs[1], overlaps=overlaps)


def some(slabs: int) -> st.SearchStrategy[np.ndarray]:
    return st.lists(st.integers(1, slabs), min_size=1, max_size=2, unique=True).map(
        lambda found: ids(*found)
    )


PAIRS = st.tuples(some(DEVICE_SLABS), some(HOST_SLABS)).filter(
    lambda pair: len(pair[0]) == len(pair[1])
)
STEPS = st.lists(
    st.one_of(
        st.tuples(st.just("fill"), some(DEVICE_SLABS)),
        st.tuples(st.just("read"), some(DEVICE_SLABS)),
        st.tuples(st.just("write"), PAIRS),
        st.tuples(st.just("load"), PAIRS),
        st.tuples(st.just("load and write"), PAIRS),
    ),
    max_size=12,
)


@given(STEPS, st.randoms(use_true_random=False), st.booleans())
@settings(max_examples=400, deadline=None)
def test_in_whatever_order_streams_go_on_all_read_what_they_would_read_if_nothing_waited(
    steps, order, overlaps
):
    with pytest.MonkeyPatch.context() as patch:
        both = servers(patch, overlaps=overlaps)
    for server in both:
        for number, (kind, slabs) in enumerate(steps):
            if kind == "fill":
                server.forward(fill=slabs, value=number)
            elif kind == "read":
                server.forward(read=slabs)
            elif kind == "write":
                server.memory.write(*slabs)
            else:
                device_slabs, host_slabs = slabs
                server.memory.before_reuse(device_slabs)
                server.memory.load(host_slabs, device_slabs)
                if kind == "load and write":  # as an eviction in the same round does
                    server.memory.write(
                        ids(*set(range(1, 7)).difference(device_slabs))[:1], host_slabs[:1]
                    )
                server.forward(read=device_slabs)
        server.cuda.run(order.randrange)
    plain, pinned = both
    assert pinned.seen == plain.seen
    assert (pinned.memory.slabs == plain.memory.slabs).all()


def test_the_first_layer_of_a_loaded_prefix_does_not_wait_for_the_last(monkeypatch):
    _, server = servers(monkeypatch)
    server.memory.write(ids(1), ids(1))
    server.memory.load(ids(1), ids(2))
    server.forward(read=ids(2))
    transfers, forward = server.memory._stream.work, server.stream.work
    while len(server.seen) < 1:
        for work in (server.cuda.current.work, forward, transfers):
            if work and work[0][0]():
                work.popleft()[1]()
                break
    assert len(transfers) > 0


def test_loads_of_a_batch_arrive_together_layer_by_layer(monkeypatch):
    _, server = servers(monkeypatch)
    server.memory.load(ids(1), ids(1))
    server.memory.load(ids(2), ids(2))
    assert server.memory.start_loading() == 1
    assert server.memory.start_loading() == -1


def test_transfers_are_counted_when_they_are_done(monkeypatch):
    plain, pinned = servers(monkeypatch)
    for server in (plain, pinned):
        server.memory.write(ids(1, 2), ids(1, 2))
        server.memory.load(ids(2), ids(3))
        server.forward()
        server.memory.settle()
    assert pinned.memory.stats.written_bytes == 0
    pinned.cuda.run(lambda count: 0)
    pinned.memory.settle()
    slab_bytes = LAYERS * WORDS * 8
    for server in (plain, pinned):
        stats = server.memory.stats
        assert (stats.written_bytes, stats.loaded_bytes) == (2 * slab_bytes, slab_bytes)
        assert stats.write_seconds > 0 and stats.load_seconds > 0


class Runtime:
    """Of CUDA, where the host's memory stands for the device's."""

    status = 0

    def __call__(self, targets, sources, sizes, count, attributes, first, num_attributes, stream):
        arrays = [
            np.ctypeslib.as_array((ctypes.c_uint64 * count.value).from_address(pointer.value))
            for pointer in (targets, sources, sizes)
        ]
        for target, source, size in zip(*map(np.ndarray.tolist, arrays), strict=True):
            ctypes.memmove(target, source, size)
        assert stream.value == 7 and num_attributes.value == 1
        return self.status


@pytest.fixture
def copy_on_this_device(monkeypatch) -> str:
    """``copy_slabs`` copies from and to it."""
    if torch.cuda.is_available():
        yield "cuda"
        return
    monkeypatch.setattr(module, "_batch_copy", Runtime)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: SimpleNamespace(cuda_stream=7))
    yield "cpu"


def run_copy(*arguments) -> None:
    if not torch.cuda.is_available():
        copy_slabs(*arguments)
        return
    torch.cuda.synchronize()
    with torch.cuda.stream(torch.cuda.Stream()):
        copy_slabs(*arguments)
    torch.cuda.synchronize()


@pytest.mark.parametrize("dtype", [torch.int64, torch.int16])
@pytest.mark.parametrize("words", [1, 100, 4096])
@pytest.mark.parametrize("num_slabs", [0, 1, 37])
def test_slabs_are_copied_from_wherever_they_lie(copy_on_this_device, num_slabs, words, dtype):
    generator = torch.Generator().manual_seed(words)
    source = torch.randint(1 << 15, (3, 50, words), generator=generator).to(dtype)
    target = torch.zeros(4, 40, words, dtype=dtype)[1:]  # layers may be a part
    read, written = (torch.randperm(n, generator=generator)[:num_slabs].numpy() for n in (50, 40))
    expected = target.clone()
    expected[:, written] = source[:, read]
    if copy_on_this_device == "cuda":
        target = target.pin_memory()
    run_copy(source.to(copy_on_this_device), target, read, written)
    assert (target == expected).all()
    back = torch.zeros_like(source, device=copy_on_this_device)
    run_copy(target, back, written, read)
    left = torch.zeros_like(source)
    left[:, read] = source[:, read]
    assert (back.cpu() == left).all()


def test_slabs_that_follow_each_other_are_copied_together(monkeypatch, copy_on_this_device):
    counts, order, copy = [], [], module._batch_copy()
    monkeypatch.setattr(
        module, "_batch_copy", lambda: lambda *args: counts.append(args[3].value) or copy(*args)
    )
    source, target = torch.arange(2 * 12 * 4).view(2, 12, 4), torch.zeros(2, 20, 4).long()
    read, written = ids(7, 3, 4, 5, 8, 1, 10), ids(2, 11, 12, 13, 3, 14, 1)
    expected = target.clone()
    expected[:, written] = source[:, read]
    if copy_on_this_device == "cuda":
        target = target.pin_memory()
    run_copy(source.to(copy_on_this_device), target, read, written, order.append)
    assert (target == expected).all()
    assert counts == [4, 4] and order == [0, 1]


def test_slabs_of_other_sizes_are_not_copied():
    with pytest.raises(ValueError, match="slabs of one size"):
        copy_slabs(torch.zeros(2, 3, 8), torch.zeros(2, 3, 16), ids(1), ids(1))


def test_what_cuda_refuses_is_an_error(monkeypatch, copy_on_this_device):
    if copy_on_this_device == "cuda":
        pytest.skip("a GPU that copies refuses nothing")
    monkeypatch.setattr(Runtime, "status", 1)
    with pytest.raises(RuntimeError, match="of 1 copies failed: CUDA error 1"):
        copy_slabs(torch.zeros(2, 3, 8), torch.zeros(2, 3, 8), ids(1, 2), ids(1, 2))


def test_older_cuda_is_refused_by_name(monkeypatch):
    module._batch_copy.cache_clear()
    monkeypatch.setattr(torch.version, "cuda", "12.6")
    with pytest.raises(RuntimeError, match=r"needs CUDA 12\.8 or newer, got torch for CUDA 12\.6"):
        module._batch_copy()


@pytest.mark.gpu
def test_transfers_between_pinned_memory_and_a_gpu_under_forwards():
    generator = torch.Generator().manual_seed(0)
    layers, device_count, host_count, words = 4, 300, 500, 9728
    expected = torch.randint(1 << 60, (layers, 1 + device_count, words), generator=generator)
    slabs = expected.cuda()
    memory = PinnedHostMemory(slabs, host_count)
    memory.forward_stream = forward = torch.cuda.Stream()
    order = random.Random(0)
    written, host_slabs, loaded = (
        ids(*order.sample(range(1, n), 60)) for n in (150, host_count, 150)
    )
    forward.wait_stream(torch.cuda.current_stream())
    memory.write(written, host_slabs)
    memory.before_reuse(written)
    with torch.cuda.stream(forward):
        slabs[:, torch.from_numpy(written).cuda()] = 0
    loaded += 150
    memory.load(host_slabs, loaded)
    memory.set_consumer(memory.start_loading())
    read = []
    with torch.cuda.stream(forward):
        where = torch.from_numpy(loaded).cuda()
        for layer in range(layers):
            memory.wait_until(layer)
            read.append(slabs[layer, where])
    torch.cuda.synchronize()
    for layer in range(layers):
        assert (read[layer].cpu() == expected[layer, written]).all()
    assert (memory.slabs[:, host_slabs] == expected[:, written]).all()
    memory.settle()
    assert memory.stats.written_bytes == memory.stats.loaded_bytes == 60 * layers * words * 8
    memory.release()
