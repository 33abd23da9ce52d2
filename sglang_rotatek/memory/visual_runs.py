"""Which positions of a token row lie in visual slots: kept on the CPU, so that freeing reads nothing from the device."""

from __future__ import annotations

import numpy as np


class VisualRuns:
    """Sorted, disjoint runs (start position, visual slot ids [n] int64) of one request row or one tree node.

    The slots of a run are of one segment.
    """

    def __init__(self, runs: list[tuple[int, np.ndarray]] | None = None) -> None:
        self.runs = runs or []

    def __len__(self) -> int:
        """Number of visual tokens."""
        return sum(len(slots) for _, slots in self.runs)

    def append(self, start: int, slots: np.ndarray) -> None:
        if self.runs and start < self.runs[-1][0] + len(self.runs[-1][1]):
            raise ValueError(f"visual run at {start} overlaps the run before it at {self.runs[-1][0]}")
        self.runs.append((start, slots))

    def within(self, start: int, end: int) -> list[tuple[int, np.ndarray]]:
        """The parts of the runs inside [start, end)."""
        parts = []
        for at, slots in self.runs:
            low, high = max(start, at), min(end, at + len(slots))
            if low < high:
                parts.append((low, slots[low - at : high - at]))
        return parts

    def slice(self, start: int, end: int) -> VisualRuns:
        """The runs inside [start, end), with positions counted from ``start``."""
        return VisualRuns([(at - start, slots) for at, slots in self.within(start, end)])

    def drop_before(self, position: int) -> None:
        """Forget everything before ``position``: those slots have another owner now."""
        if self.runs:
            self.runs = self.within(position, self.runs[-1][0] + len(self.runs[-1][1]))

    def slots(self) -> np.ndarray:
        """All slot ids [n] int64."""
        return np.concatenate([slots for _, slots in self.runs]) if self.runs else np.empty(0, np.int64)
