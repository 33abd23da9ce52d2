"""Visual slots and bases, with the reference counts that tie them together. CPU only."""

from __future__ import annotations

import numpy as np

from .layout import PoolLayout
from .slabs import Slabs

NO_BASIS = -1


class VisualSlots:
    """Gives segments whole slabs and a basis each.

    Slab and basis live as long as a slot of the segment. A live slot is *locked* while a running request or a locked
    tree node holds it, else it is evictable; a slab or basis is evictable when none of its slots is locked. Where slots
    of a segment are passed, they are in the order that ``alloc`` gave them.
    """

    def __init__(self, layout: PoolLayout, slabs: Slabs) -> None:
        self.layout = layout
        self._slabs = slabs
        self.clear()

    def clear(self) -> None:
        layout = self.layout
        self._is_live = np.zeros(layout.all_visual_rows, dtype=bool)
        # Of each slab: its basis, its live and its locked slots.
        self._basis = np.full(1 + layout.num_slabs, NO_BASIS, dtype=np.int64)
        self._live = np.zeros(1 + layout.num_slabs, dtype=np.int64)
        self._locked = np.zeros(1 + layout.num_slabs, dtype=np.int64)
        self._free_bases = list(range(layout.num_bases - 1, -1, -1))
        self._live_of_basis = np.zeros(layout.num_bases, dtype=np.int64)
        self._locked_of_basis = np.zeros(layout.num_bases, dtype=np.int64)
        self.used = 0
        self.used_slabs = 0
        self.evictable_slabs = 0

    @property
    def free_slabs(self) -> int:
        return min(self._slabs.free, self.layout.max_visual_slabs - self.used_slabs)

    @property
    def evictable(self) -> int:
        """Slots."""
        return int((self._live_of_basis - self._locked_of_basis).sum())

    @property
    def free_bases(self) -> int:
        return len(self._free_bases)

    @property
    def evictable_bases(self) -> int:
        return int(((self._live_of_basis > 0) & (self._locked_of_basis == 0)).sum())

    def alloc(self, num_tokens: int) -> tuple[np.ndarray, int] | None:
        """Locked slots [num_tokens] and a fresh basis for one segment, or None when slabs or bases are short."""
        count = self.layout.slabs_of(num_tokens)
        if count > self.free_slabs or not self._free_bases:
            return None
        rows = self.layout.visual_rows
        slabs, basis = self._slabs.take(count), self._free_bases.pop()
        slots = (slabs[:, None] * rows + np.arange(rows)).ravel()[:num_tokens]
        self._is_live[slots] = True
        self._basis[slabs] = basis
        self._live[slabs] = self._locked[slabs] = rows
        self._live[slabs[-1]] = self._locked[slabs[-1]] = num_tokens - (count - 1) * rows
        self._live_of_basis[basis] = self._locked_of_basis[basis] = num_tokens
        self.used += num_tokens
        self.used_slabs += count
        return slots + self.layout.first_visual_slot, basis

    def release(self, slots: np.ndarray, *, locked: bool) -> None:
        """Return slots of one segment that were ``locked`` or not. Raises RuntimeError on a slot that is not live."""
        if not len(slots):
            return
        self._check_live(slots)
        slabs, counts = self._by_slab(slots)
        basis = self._basis[slabs[0]]
        self.evictable_slabs -= self._count_evictable(slabs)
        self._is_live[slots - self.layout.first_visual_slot] = False
        self._live[slabs] -= counts
        self._live_of_basis[basis] -= len(slots)
        if locked:
            self._locked[slabs] -= counts
            self._locked_of_basis[basis] -= len(slots)
        self.evictable_slabs += self._count_evictable(slabs)
        empty = slabs[self._live[slabs] == 0]
        self._basis[empty] = NO_BASIS
        self._slabs.give(empty)
        self.used -= len(slots)
        self.used_slabs -= len(empty)
        if not self._live_of_basis[basis]:
            self._free_bases.append(int(basis))

    def lock(self, slots: np.ndarray) -> None:
        """Lock slots of one segment. Raises RuntimeError on a slot that is not live."""
        self._change_locks(slots, 1)

    def unlock(self, slots: np.ndarray) -> None:
        """As ``lock``."""
        self._change_locks(slots, -1)

    def _change_locks(self, slots: np.ndarray, sign: int) -> None:
        if not len(slots):
            return
        self._check_live(slots[:1])  # not all: locks move along whole paths of the tree at every turn
        slabs, counts = self._by_slab(slots)
        self.evictable_slabs -= self._count_evictable(slabs)
        self._locked[slabs] += sign * counts
        self._locked_of_basis[self._basis[slabs[0]]] += sign * len(slots)
        self.evictable_slabs += self._count_evictable(slabs)

    def bases_of(self, slots: np.ndarray) -> np.ndarray:
        """The basis [n] of each live slot. Raises RuntimeError on a slot that is not live."""
        self._check_live(slots)
        return self._basis[(slots - self.layout.first_visual_slot) // self.layout.visual_rows]

    def used_slab_ids(self) -> np.ndarray:
        return np.flatnonzero(self._live)

    def check_integrity(self) -> None:
        """Raise AssertionError when slots, slabs, bases and counts disagree."""
        layout = self.layout
        live = self._is_live.reshape(-1, layout.visual_rows).sum(1)
        assert (live == self._live).all(), "live counts of slabs are off"
        assert ((0 <= self._locked) & (self._locked <= self._live)).all(), "locked counts of slabs are off"
        assert ((self._basis == NO_BASIS) == (live == 0)).all(), "a slab and its basis do not live and die together"
        assert (self.used, self.used_slabs) == (live.sum(), (live > 0).sum()), "counts of used slots or slabs are off"
        assert self.evictable_slabs == self._count_evictable(np.arange(len(live))), "evictable slabs are miscounted"
        assert self.used_slabs <= layout.max_visual_slabs, "images hold more slabs than they may"
        for name, of_slab, of_basis in (
            ("live", self._live, self._live_of_basis),
            ("locked", self._locked, self._locked_of_basis),
        ):
            counted = np.bincount(self._basis[live > 0], weights=of_slab[live > 0], minlength=layout.num_bases)
            assert (counted == of_basis).all(), f"{name} counts of bases are off"
        expected_free = np.flatnonzero(self._live_of_basis == 0).tolist()
        assert sorted(self._free_bases) == expected_free, "basis free list and live counts disagree"

    def _check_live(self, slots: np.ndarray) -> None:
        is_live = self._is_live[slots - self.layout.first_visual_slot]
        if not is_live.all():
            dead = slots[~is_live][:4].tolist()
            raise RuntimeError(f"visual slots {dead} are used after they were freed; this is a bug in RotateK")

    def _by_slab(self, slots: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Slabs of ``slots``, and how many of them each holds."""
        slab = (slots - self.layout.first_visual_slot) // self.layout.visual_rows
        starts = np.flatnonzero(np.diff(slab, prepend=-1))
        return slab[starts], np.diff(starts, append=len(slots))

    def _count_evictable(self, slabs: np.ndarray) -> int:
        return int(((self._live[slabs] > 0) & (self._locked[slabs] == 0)).sum())
