"""Free list of visual slots and bases, with the reference counts that tie them together. CPU only."""

from __future__ import annotations

import numpy as np

from .layout import PoolLayout

NO_BASIS = -1


class VisualSlots:
    """Owns the visual slots and the bases.

    A basis lives as long as a slot that uses it. A live slot is *locked* while a running request or a locked
    tree node holds it, else it is evictable; a basis is evictable when none of its slots is locked.
    """

    def __init__(self, layout: PoolLayout) -> None:
        self.layout = layout
        self.clear()

    def clear(self) -> None:
        layout = self.layout
        # A stack in an array; the lowest ids go first.
        self._stack = np.arange(layout.total_slots, layout.text_slots, -1, dtype=np.int64)
        self._num_free = layout.visual_slots
        self._free_bases = list(range(layout.num_bases - 1, -1, -1))
        self._basis_of_slot = np.full(layout.visual_slots, NO_BASIS, dtype=np.int32)
        self._live = np.zeros(layout.num_bases, dtype=np.int64)
        self._locked = np.zeros(layout.num_bases, dtype=np.int64)

    @property
    def free(self) -> int:
        return self._num_free

    @property
    def evictable(self) -> int:
        return int((self._live - self._locked).sum())

    @property
    def free_bases(self) -> int:
        return len(self._free_bases)

    @property
    def evictable_bases(self) -> int:
        return int(((self._live > 0) & (self._locked == 0)).sum())

    def alloc(self, num_tokens: int) -> tuple[np.ndarray, int] | None:
        """Locked slots [num_tokens] and a fresh basis for one segment, or None when either is short."""
        if num_tokens > self.free or not self._free_bases:
            return None
        self._num_free -= num_tokens
        slots = self._stack[self._num_free : self._num_free + num_tokens][::-1].copy()
        basis = self._free_bases.pop()
        self._basis_of_slot[self._index(slots)] = basis
        self._live[basis] = self._locked[basis] = num_tokens
        return slots, basis

    def release(self, slots: np.ndarray, *, locked: bool) -> None:
        """Return slots that were ``locked`` or not. Raises RuntimeError on a slot that is not live."""
        bases = self.bases_of(slots)
        counts = np.bincount(bases, minlength=self.layout.num_bases)
        self._live -= counts
        if locked:
            self._locked -= counts
        self._basis_of_slot[self._index(slots)] = NO_BASIS
        self._stack[self._num_free : self._num_free + len(slots)] = slots[::-1]
        self._num_free += len(slots)
        touched = np.unique(bases)
        self._free_bases.extend(touched[self._live[touched] == 0].tolist())

    def lock(self, slots: np.ndarray) -> None:
        """``slots`` of one segment. Looks at the first alone: locks move along whole paths of the tree at every turn."""
        self._locked[self.bases_of(slots[:1])] += len(slots)

    def unlock(self, slots: np.ndarray) -> None:
        """As ``lock``."""
        self._locked[self.bases_of(slots[:1])] -= len(slots)

    def bases_of(self, slots: np.ndarray) -> np.ndarray:
        """The basis [n] int32 of each live slot. Raises RuntimeError on a slot that is not live."""
        bases = self._basis_of_slot[self._index(slots)]
        if (bases == NO_BASIS).any():
            dead = slots[bases == NO_BASIS][:4].tolist()
            raise RuntimeError(f"visual slots {dead} are used after they were freed; this is a bug in RotateK")
        return bases

    def free_slot_ids(self) -> np.ndarray:
        return self._stack[: self._num_free]

    def check_integrity(self) -> None:
        """Raise AssertionError when slots, bases and counts disagree."""
        free = self._index(self.free_slot_ids())
        assert len(np.unique(free)) == len(free), "a visual slot is twice in the free list"
        assert (self._basis_of_slot[free] == NO_BASIS).all(), "a free visual slot still has a basis"
        used = self._basis_of_slot[self._basis_of_slot != NO_BASIS]
        assert len(used) + len(free) == self.layout.visual_slots, "a visual slot is neither free nor has a basis"
        counted = np.bincount(used, minlength=self.layout.num_bases)
        assert (counted == self._live).all(), "live counts of bases are off"
        assert ((0 <= self._locked) & (self._locked <= self._live)).all(), "locked counts of bases are off"
        expected_free = set(np.flatnonzero(self._live == 0).tolist())
        assert sorted(self._free_bases) == sorted(expected_free), "basis free list and live counts disagree"

    def _index(self, slots: np.ndarray) -> np.ndarray:
        return slots - self.layout.first_visual_slot
