"""Visual slots and bases, with the reference counts that tie them together. CPU only."""

from __future__ import annotations

import numpy as np

from .layout import PoolLayout
from .slabs import Slabs

NO_BASIS = -1


class VisualSlots:
    """Gives segments whole slabs, one of them for their basis.

    They live as long as a slot of the segment, a slab of rows as long as a slot in it. A live slot is *locked* while a
    running request or a locked tree node holds it, else it is evictable; a slab is evictable when none of its slots,
    or of the slots that use its basis, is locked. Where slots of a segment are passed, they are in the order that
    ``alloc`` gave them.
    """

    def __init__(self, layout: PoolLayout, slabs: Slabs) -> None:
        self.layout = layout
        self._slabs = slabs
        self.clear()

    def clear(self) -> None:
        self._is_live = np.zeros(self.layout.all_visual_rows, dtype=bool)

        def of_slabs(value: int = 0) -> np.ndarray:
            return np.full(1 + self.layout.num_slabs, value, dtype=np.int64)

        # Of each slab of rows: its basis, its live and its locked slots. Of each slab of a basis: those that use it.
        self._basis = of_slabs(NO_BASIS)
        self._live, self._locked = of_slabs(), of_slabs()
        self._live_of_basis, self._locked_of_basis = of_slabs(), of_slabs()
        self.used = 0
        self.used_slabs = 0
        self.evictable_slabs = 0
        self.evictable = 0
        self.bases = 0

    @property
    def free_slabs(self) -> int:
        return min(self._slabs.free, self.layout.max_visual_slabs - self.used_slabs)

    def alloc(self, num_tokens: int) -> tuple[np.ndarray, int] | None:
        """Locked slots [num_tokens] and the basis of a segment, or None when slabs are short."""
        count = self.layout.slabs_of(num_tokens)
        if count > self.free_slabs:
            return None
        rows = self.layout.visual_rows
        taken = self._slabs.take(count)
        basis, slabs = taken[0], taken[1:]
        slots = (slabs[:, None] * rows + np.arange(rows)).ravel()[:num_tokens]
        self._is_live[slots] = True
        self._basis[slabs] = basis
        self._live[slabs] = self._locked[slabs] = rows
        self._live[slabs[-1]] = self._locked[slabs[-1]] = num_tokens - (len(slabs) - 1) * rows
        self._live_of_basis[basis] = self._locked_of_basis[basis] = num_tokens
        self.used += num_tokens
        self.used_slabs += count
        self.bases += 1
        return slots + self.layout.first_visual_slot, int(basis)

    def release(self, slots: np.ndarray, *, locked: bool) -> None:
        """Return slots of one segment that were ``locked`` or not. Raises RuntimeError on a slot that is not live."""
        if not len(slots):
            return
        self._check_live(slots)
        slabs, counts = self._by_slab(slots)
        basis = self._basis[slabs[0]]
        self.evictable_slabs -= self._count_evictable(slabs, basis)
        self._is_live[slots - self.layout.first_visual_slot] = False
        self._live[slabs] -= counts
        self._live_of_basis[basis] -= len(slots)
        if locked:
            self._locked[slabs] -= counts
            self._locked_of_basis[basis] -= len(slots)
        else:
            self.evictable -= len(slots)
        self.evictable_slabs += self._count_evictable(slabs, basis)
        empty = slabs[self._live[slabs] == 0]
        self._basis[empty] = NO_BASIS
        if not self._live_of_basis[basis]:
            empty = np.append(empty, basis)
            self.bases -= 1
        self._slabs.give(empty)
        self.used -= len(slots)
        self.used_slabs -= len(empty)

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
        basis = self._basis[slabs[0]]
        self.evictable_slabs -= self._count_evictable(slabs, basis)
        self._locked[slabs] += sign * counts
        self._locked_of_basis[basis] += sign * len(slots)
        self.evictable -= sign * len(slots)
        self.evictable_slabs += self._count_evictable(slabs, basis)

    def bases_of(self, slots: np.ndarray) -> np.ndarray:
        """The basis [n] of each live slot. Raises RuntimeError on a slot that is not live."""
        self._check_live(slots)
        return self._basis[(slots - self.layout.first_visual_slot) // self.layout.visual_rows]

    def used_slab_ids(self) -> np.ndarray:
        return np.flatnonzero(self._live + self._live_of_basis)

    def check_integrity(self) -> None:
        """Raise AssertionError when slots, slabs, bases and counts disagree."""
        layout = self.layout
        live = self._is_live.reshape(-1, layout.visual_rows).sum(1)
        is_basis = self._live_of_basis > 0
        assert (live == self._live).all(), "live counts of slabs are off"
        assert ((0 <= self._locked) & (self._locked <= self._live)).all(), "locked counts of slabs are off"
        assert ((self._basis == NO_BASIS) == (live == 0)).all(), "a slab and its basis do not live and die together"
        assert not (is_basis & (live > 0)).any(), "a slab holds rows and a basis"
        used_slabs = (live > 0).sum() + is_basis.sum()
        assert (self.used, self.used_slabs, self.bases) == (live.sum(), used_slabs, is_basis.sum()), "counts of use are off"
        assert self.evictable == (self._live - self._locked).sum(), "evictable slots are miscounted"
        unlocked = ((live > 0) & (self._locked == 0)).sum() + (is_basis & (self._locked_of_basis == 0)).sum()
        assert self.evictable_slabs == unlocked, "evictable slabs are miscounted"
        assert self.used_slabs <= layout.max_visual_slabs, "images hold more slabs than they may"
        for name, of_slab, of_basis in (
            ("live", self._live, self._live_of_basis),
            ("locked", self._locked, self._locked_of_basis),
        ):
            counted = np.bincount(self._basis[live > 0], weights=of_slab[live > 0], minlength=len(of_basis))
            assert (counted == of_basis).all(), f"{name} counts of bases are off"

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

    def _count_evictable(self, slabs: np.ndarray, basis: int) -> int:
        """Of the slabs of one segment."""
        of_rows = ((self._live[slabs] > 0) & (self._locked[slabs] == 0)).sum()
        return int(of_rows) + bool(self._live_of_basis[basis] > 0 and self._locked_of_basis[basis] == 0)
