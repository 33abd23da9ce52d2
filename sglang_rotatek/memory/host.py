"""Copies of slabs in host memory, and the transfers that make them and bring them back."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch

from .copy_slabs import copy_slabs


@dataclass
class TransferStats:
    """Of transfers that are done, since the start. Seconds are those of the copies."""

    written_bytes: int = 0
    write_seconds: float = 0.0
    loaded_bytes: int = 0
    load_seconds: float = 0.0

    def add(self, num_bytes: int, seconds: float, *, is_load: bool) -> None:
        if is_load:
            self.loaded_bytes += num_bytes
            self.load_seconds += seconds
        else:
            self.written_bytes += num_bytes
            self.write_seconds += seconds


class HostMemory:
    """``slabs`` [layers, 1 + num_slabs, words], as the device's ``slabs``; the ids 1 ... num_slabs
    may be used.

    What the scheduler calls returns at once, and counts as done: whoever reads or writes the slabs
    later comes later on the device. So no decision waits for a transfer, and tensor-parallel ranks
    agree without talking. Here transfers are plain copies, of a server on the CPU.
    """

    # That forwards are launched on, on a GPU.
    forward_stream: torch.cuda.Stream | None = None

    def __init__(self, device_slabs: torch.Tensor, num_slabs: int) -> None:
        layers, _, words = device_slabs.shape
        self._device_slabs, self.num_slabs = device_slabs, num_slabs
        self.slabs = self._allocate((layers, 1 + num_slabs, words), device_slabs.dtype)
        self.stats = TransferStats()

    def _allocate(self, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype)

    def bytes_of(self, num_slabs: int) -> int:
        return num_slabs * self.slabs[:, 0].nbytes

    def write(self, device_slabs: np.ndarray, host_slabs: np.ndarray) -> None:
        """Copy slabs, each once, to the host in all layers, after the forwards launched so far. [n]
        int64 both."""
        self._copy_now(self._device_slabs, self.slabs, device_slabs, host_slabs, is_load=False)

    def load(self, host_slabs: np.ndarray, device_slabs: np.ndarray) -> None:
        """Copy slabs to the device, after the forwards launched so far. [n] int64 both; device
        slabs each once. The forward that is launched next must be the consumer (``start_loading``),
        whatever it computes."""
        self._copy_now(self.slabs, self._device_slabs, host_slabs, device_slabs, is_load=True)

    def start_loading(self) -> int:
        """No more is to be loaded for the next forward. What it passes to ``set_consumer``, -1 for
        nothing."""
        return -1

    def before_reuse(self, device_slabs: np.ndarray) -> None:
        """Forwards launched from now on may write to these slabs."""

    def set_consumer(self, index: int) -> None:
        """What ``start_loading`` returned for the forward that is launched next."""

    def wait_until(self, layer: int) -> None:
        """In a forward: what follows on its stream finds the loaded slabs of a layer, counted from
        this rank's first."""

    def settle(self) -> None:
        """Count the transfers that are done."""

    def release(self) -> None:
        """Of a server that ends."""

    def _copy_now(
        self,
        source: torch.Tensor,
        target: torch.Tensor,
        read: np.ndarray,
        written: np.ndarray,
        *,
        is_load: bool,
    ) -> None:
        start = time.perf_counter()
        target[:, written] = source[:, read]
        self.stats.add(self.bytes_of(len(read)), time.perf_counter() - start, is_load=is_load)


class Transfer(NamedTuple):
    """One on its way: events of its start and end."""

    number: int
    start: torch.cuda.Event
    end: torch.cuda.Event
    num_bytes: int
    is_load: bool


class PinnedHostMemory(HostMemory):
    """On a GPU: pinned memory, and transfers on a stream of their own, one after the other. So none
    finds a host slab half written or read, whatever the scheduler has done with it since. Against
    forwards, which the host launches on ``forward_stream`` or, without its overlapped schedule, on
    the stream that is current for all calls here:

    - a transfer waits for the forwards launched before it, which write what it reads or read what
      it overwrites;
    - a forward that takes over a slab from which a write still reads waits for it
      (``before_reuse``);
    - the forward behind a load waits for it layer by layer (``wait_until``).
    """

    forward_stream: torch.cuda.Stream

    def __init__(
        self,
        device_slabs: torch.Tensor,
        num_slabs: int,
        *,
        cuda: Any = torch.cuda,
        copy: Callable[..., None] = copy_slabs,
    ) -> None:
        super().__init__(device_slabs, num_slabs)
        self._cuda, self._copy = cuda, copy
        self._stream = cuda.Stream()
        self.forward_stream = cuda.current_stream()  # until the host sets its own
        self._in_flight: deque[Transfer] = deque()
        self._num_transfers = 0
        # Device slab -> its last write to the host.
        self._read_by = np.zeros(device_slabs.shape[1], dtype=np.int64)
        self._to_load: list[tuple[np.ndarray, np.ndarray]] = []
        self._arrivals: list = []  # of the last load, an event a layer
        self._is_load_pending = False  # it has no consumer yet
        self._is_consumer = False
        with cuda.stream(self._stream):  # fails now where it can't work; slab 0 is nobody's
            copy(device_slabs, self.slabs, np.zeros(1, np.int64), np.zeros(1, np.int64))

    def _allocate(self, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        """Registered, not made by torch's pinned allocator, which rounds up to a power of two."""
        slabs = torch.empty(shape, dtype=dtype)
        if status := int(torch.cuda.cudart().cudaHostRegister(slabs.data_ptr(), slabs.nbytes, 0)):
            raise RuntimeError(
                f"RotateK could not pin {slabs.nbytes / 1e9:.1f} GB of host memory (CUDA error "
                f"{status}); lower --hicache-size or --hicache-ratio, or raise the limit of locked "
                "memory."
            )
        return slabs

    def write(self, device_slabs: np.ndarray, host_slabs: np.ndarray) -> None:
        self._submit_loads()  # from slabs that may be overwritten now
        with self._transfer(len(device_slabs), is_load=False):
            self._copy(self._device_slabs, self.slabs, device_slabs, host_slabs)
        self._read_by[device_slabs] = self._num_transfers

    def load(self, host_slabs: np.ndarray, device_slabs: np.ndarray) -> None:
        self._to_load.append((host_slabs, device_slabs))

    def start_loading(self) -> int:
        self._submit_loads()
        is_pending, self._is_load_pending = self._is_load_pending, False
        return self._num_transfers if is_pending else -1

    def _submit_loads(self) -> None:
        """All together, layer by layer, so that the first layers of all arrive first."""
        if not self._to_load:
            return
        host_slabs, device_slabs = (
            np.concatenate(slabs) for slabs in zip(*self._to_load, strict=True)
        )
        self._to_load.clear()
        self._arrivals, self._is_load_pending = [], True
        with self._transfer(len(host_slabs), is_load=True):
            self._copy(
                self.slabs, self._device_slabs, host_slabs, device_slabs, self._record_arrival
            )

    def _record_arrival(self, layer: int) -> None:
        self._arrivals.append(self._cuda.Event())
        self._arrivals[-1].record()

    def before_reuse(self, device_slabs: np.ndarray) -> None:
        last = int(self._read_by[device_slabs].max(initial=0))
        for transfer in self._in_flight:
            if transfer.number == last:
                for stream in self._forward_streams():
                    stream.wait_event(transfer.end)

    def set_consumer(self, index: int) -> None:
        self._is_consumer = index >= 0

    def wait_until(self, layer: int) -> None:
        # Graphs may be captured again behind a consumer; they wait for no load.
        if self._is_consumer and not self._cuda.is_current_stream_capturing():
            self._cuda.current_stream().wait_event(self._arrivals[layer])

    def settle(self) -> None:
        while self._in_flight and self._in_flight[0].end.query():
            done = self._in_flight.popleft()
            self.stats.add(
                done.num_bytes, done.start.elapsed_time(done.end) / 1000, is_load=done.is_load
            )

    def release(self) -> None:
        """Unpinned by the kernel, when the process is gone, it takes tens of seconds."""
        self._stream.synchronize()
        self._cuda.cudart().cudaHostUnregister(self.slabs.data_ptr())

    def _forward_streams(self) -> tuple[torch.cuda.Stream, ...]:
        return self._cuda.current_stream(), self.forward_stream

    @contextmanager
    def _transfer(self, num_slabs: int, *, is_load: bool) -> Iterator[None]:
        """What is launched inside is the next transfer."""
        self._num_transfers += 1
        start, end = (self._cuda.Event(enable_timing=True) for _ in range(2))
        for stream in self._forward_streams():
            self._stream.wait_stream(stream)
        with self._cuda.stream(self._stream):
            start.record()
            yield
            end.record()
        self._in_flight.append(
            Transfer(self._num_transfers, start, end, self.bytes_of(num_slabs), is_load)
        )
