"""Free list of slabs, from which text and images draw. CPU only."""

from __future__ import annotations

import numpy as np

from .layout import PoolLayout


class Slabs:
    def __init__(self, layout: PoolLayout) -> None:
        self.layout = layout
        self.clear()

    def clear(self) -> None:
        # A stack in an array; the lowest ids go first.
        self._stack = np.arange(self.layout.num_slabs, 0, -1, dtype=np.int64)
        self.free = self.layout.num_slabs

    def take(self, count: int) -> np.ndarray:
        """``count`` slab ids, at most ``free``."""
        assert count <= self.free, f"{count} slabs wanted, {self.free} free"
        self.free -= count
        return self._stack[self.free : self.free + count][::-1].copy()

    def give(self, slabs: np.ndarray) -> None:
        self._stack[self.free : self.free + len(slabs)] = slabs[::-1]
        self.free += len(slabs)

    def free_ids(self) -> np.ndarray:
        return self._stack[: self.free]
