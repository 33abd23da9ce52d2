"""A Triton driver for a named NVIDIA GPU that is not there: kernels compile for it, and launches
are recorded."""

from __future__ import annotations

from types import SimpleNamespace
from typing import NamedTuple

import pytest
from triton.backends.compiler import GPUTarget
from triton.runtime import driver


class Loaded(NamedTuple):
    """A compiled kernel, as it is loaded before its first launch. ``shared_bytes``: of one
    program."""

    name: str
    cubin: bytes
    shared_bytes: int


class GpulessDriver:
    """``arch``: 90 is sm_90. Refuses no kernel for the shared memory it takes; that is for the test
    to look at."""

    def __init__(self, arch: int) -> None:
        self.arch = arch
        self.loaded: dict[bytes, Loaded] = {}
        self.launches: list[tuple] = []  # arguments of the launcher of a compiled kernel
        self.utils = SimpleNamespace(
            load_binary=self._load,
            unload_module=lambda module: None,
            get_device_properties=lambda device: {"max_shared_mem": 1 << 30},
        )

    def install(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(driver, "_active", self)

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.arch, 32)

    def get_current_device(self) -> int:
        return self.arch  # Triton keeps compiled kernels per device

    def get_current_stream(self, device: int) -> int:
        return 0

    def launcher_cls(self, src, metadata):
        return lambda *arguments: self.launches.append(arguments)

    def _load(self, name: str, cubin: bytes, shared_bytes: int, device: int) -> tuple:
        self.loaded[cubin] = Loaded(name, cubin, shared_bytes)
        function, registers, spills, max_threads = f"function {name}", 0, 0, 1024
        return None, function, registers, spills, max_threads
