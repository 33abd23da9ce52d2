"""The one CPU record of memory: which rows hold the tokens of a request or of a tree node, and who
holds each slab.

A record is a list of `Span`: tokens whose rows follow each other through slabs of one kind.
Everything follows it: what is freed, split, shared, locked and counted. Slot ids are made from it;
nothing is ever read back from the device.

Who owns the row of a token at position p of a request (kv: the host's record of it):

    [0, kv.cache_protected_len)                      the tree; the request holds a lock on the path
    [kv.cache_protected_len, kv.kv_allocated_len)    the request (requests.py)
    rows of its open slab behind the last token      the request; when it ends in a leaf with the
                                                     slab, that leaf, for the next turn; else
                                                     nobody, until the slab is empty

A row is *live* while a token is in it and *locked* while a running request or a locked node holds
that token. A slab goes back when no row of it is live, and is *evictable* when it has live rows and
none is locked. The slab of a basis counts the tokens of its segment as its rows: one arithmetic for
text, images and bases.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from .layout import PoolLayout

TEXT = -1


@dataclass(frozen=True, slots=True)
class Span:
    """Tokens [start, start + length) in the rows that follow each other through ``slabs`` [m]
    int64, from row ``first`` of slabs[0] on. ``basis``: the slab of the segment's basis, or
    TEXT."""

    start: int
    length: int
    first: int
    slabs: np.ndarray
    basis: int = TEXT

    @property
    def end(self) -> int:
        return self.start + self.length

    @property
    def is_text(self) -> bool:
        return self.basis == TEXT

    def rows_of_a_slab(self, layout: PoolLayout) -> int:
        return layout.text_rows if self.is_text else layout.visual_rows

    def cut(self, start: int, end: int, layout: PoolLayout) -> Span:
        """The tokens [start, end), which must be some of the span's."""
        rows = self.rows_of_a_slab(layout)
        first = self.first + start - self.start
        low, high = first // rows, -(-(first + end - start) // rows)
        return Span(start, end - start, first - low * rows, self.slabs[low:high], self.basis)

    def next_row(self, layout: PoolLayout) -> int:
        """The row of the last slab behind the last token."""
        return self.first + self.length - (len(self.slabs) - 1) * self.rows_of_a_slab(layout)

    def moved(self, by: int) -> Span:
        return replace(self, start=self.start + by)

    def slots(self, layout: PoolLayout) -> np.ndarray:
        """Slot ids [length] int64."""
        rows = self.rows_of_a_slab(layout)
        ids = (self.slabs[:, None] * rows + np.arange(rows)).ravel()[
            self.first : self.first + self.length
        ]
        return ids if self.is_text else ids + layout.first_visual_slot

    def counts(self, layout: PoolLayout) -> np.ndarray:
        """How many of the tokens each of ``slabs`` holds [m] int64."""
        rows = self.rows_of_a_slab(layout)
        counts = np.full(len(self.slabs), rows, dtype=np.int64)
        counts[0] -= self.first
        counts[-1] -= rows - self.next_row(layout)
        return counts


def cut_spans(spans: Iterable[Span], start: int, end: int, layout: PoolLayout) -> list[Span]:
    """What of the spans lies in [start, end)."""
    return [
        span if start <= span.start and span.end <= end
        else span.cut(max(start, span.start), min(end, span.end), layout)
        for span in spans
        if max(start, span.start) < min(end, span.end)
    ]  # fmt: skip


@dataclass(frozen=True, slots=True)
class Use:
    """What spans take: ``slabs`` [m] int64, each once, those of bases included; the rows of each
    that they hold (``counts`` [m] int64); and their tokens."""

    slabs: np.ndarray
    counts: np.ndarray
    text_tokens: int
    visual_tokens: int


def use_of(spans: list[Span], layout: PoolLayout) -> Use:
    if not spans:
        return Use(np.empty(0, np.int64), np.empty(0, np.int64), 0, 0)
    images = [span for span in spans if not span.is_text]
    slabs: list[Any] = [span.slabs for span in spans] + [[span.basis] for span in images]
    counts: list[Any] = [span.counts(layout) for span in spans] + [[span.length] for span in images]
    each, count = (
        np.concatenate(parts) if len(parts) > 1 else parts[0] for parts in (slabs, counts)
    )
    if len(spans) > 1:  # text before and behind an image may share a slab
        each, of_each = np.unique(each, return_inverse=True)
        count = np.bincount(of_each, weights=count).astype(np.int64)
    visual_tokens = sum(span.length for span in images)
    return Use(each, count, sum(span.length for span in spans) - visual_tokens, visual_tokens)


class Slabs:
    """Every slab's kind, live and locked rows, and the stack of free ones. All counts are exact
    after each call."""

    # Kinds; an image's slabs are those of its rows and of its basis.
    FREE, TEXT, IMAGE, BASIS = range(4)

    def __init__(self, layout: PoolLayout) -> None:
        self.layout = layout
        # Told of slabs [n] that get a new owner.
        self.before_reuse: Callable[[np.ndarray], None] = lambda slabs: None
        self.clear()

    def clear(self) -> None:
        num_slabs = self.layout.num_slabs
        # A stack in an array; the lowest ids go first.
        self._stack = np.arange(num_slabs, 0, -1, dtype=np.int64)
        self.free = num_slabs
        self._kind = np.zeros(1 + num_slabs, dtype=np.int8)
        self._live = np.zeros(1 + num_slabs, dtype=np.int64)
        self._locked = np.zeros(1 + num_slabs, dtype=np.int64)
        self.of_text = self.of_images = self.bases = 0
        self.evictable = self.evictable_of_images = 0
        self.text_tokens = self.visual_tokens = 0

    # --- what is there ----------------------------------------------------------------------------

    @property
    def reachable(self) -> int:
        """Slabs that are free or can be freed."""
        return self.free + self.evictable

    @property
    def allowed_for_images(self) -> int:
        """How many more slabs images may take, free or not."""
        return self.layout.max_visual_slabs - self.of_images

    def kinds(self, slabs: np.ndarray) -> np.ndarray:
        """int8 [m]."""
        return self._kind[slabs]

    def live(self, slabs: np.ndarray) -> np.ndarray:
        """Rows of each that hold a token, int64 [m]."""
        return self._live[slabs]

    def are_evictable(self, slabs: np.ndarray) -> np.ndarray:
        """Bool [m]."""
        return (self._live[slabs] > 0) & (self._locked[slabs] == 0)

    # --- rows change hands ------------------------------------------------------------------------

    def take(self, count: int, kind: int) -> np.ndarray:
        """``count`` free slabs for a request [count] int64, or RuntimeError."""
        if count > self.free:
            raise RuntimeError(
                f"RotateK: {count} slabs are needed, {self.free} are free; this is a bug in RotateK"
            )
        self.free -= count
        slabs = self._stack[self.free : self.free + count][::-1].copy()
        self.before_reuse(slabs)
        self._kind[slabs] = kind
        self._count_kinds(slabs, 1)
        return slabs

    def give_back(self, slabs: np.ndarray) -> None:
        """Return slabs without a live row."""
        if not len(slabs):
            return
        self._count_kinds(slabs, -1)
        self._kind[slabs] = self.FREE
        self._stack[self.free : self.free + len(slabs)] = slabs[::-1]
        self.free += len(slabs)

    def hold(self, use: Use) -> None:
        """A running request has filled these rows."""
        self._count_evictable(use.slabs[self.are_evictable(use.slabs)], -1)
        self._live[use.slabs] += use.counts
        self._locked[use.slabs] += use.counts
        self._count_tokens(use, 1)

    def hold_one_each(self, slabs: np.ndarray) -> None:
        """Running requests have filled one more text row of each of ``slabs``, all different. None
        was evictable: each is the open slab of its request, new or locked by it."""
        self._live[slabs] += 1
        self._locked[slabs] += 1
        self.text_tokens += len(slabs)

    def release(self, use: Use, *, locked: bool) -> np.ndarray:
        """Rows that were ``locked`` or not are empty. Returns the slabs that are free by that."""
        slabs = use.slabs
        self._live[slabs] -= use.counts
        live = self._live[slabs]
        if live.min(initial=0) < 0:
            raise RuntimeError(
                "RotateK: rows are freed that hold no token; this is a bug in RotateK"
            )
        empty = slabs[live == 0]
        if locked:
            self._locked[slabs] -= use.counts
            self._count_evictable(slabs[(live > 0) & (self._locked[slabs] == 0)], 1)
        else:
            self._count_evictable(empty, -1)
        self._count_tokens(use, -1)
        self.give_back(empty)
        return empty

    def lock(self, use: Use) -> None:
        self._count_evictable(use.slabs[self._locked[use.slabs] == 0], -1)
        self._locked[use.slabs] += use.counts

    def unlock(self, use: Use) -> None:
        self._locked[use.slabs] -= use.counts
        self._count_evictable(use.slabs[self._locked[use.slabs] == 0], 1)

    def _count_kinds(self, slabs: np.ndarray, sign: int) -> None:
        _, text, images, bases = np.bincount(self._kind[slabs], minlength=4).tolist()
        self.of_text += sign * text
        self.of_images += sign * (images + bases)
        self.bases += sign * bases

    def _count_evictable(self, slabs: np.ndarray, sign: int) -> None:
        if len(slabs):
            self.evictable += sign * len(slabs)
            self.evictable_of_images += sign * int(
                np.count_nonzero(self._kind[slabs] >= self.IMAGE)
            )

    def _count_tokens(self, use: Use, sign: int) -> None:
        self.text_tokens += sign * use.text_tokens
        self.visual_tokens += sign * use.visual_tokens

    # --- checks -----------------------------------------------------------------------------------

    def check_integrity(self, held: list[Use], locked: list[Use]) -> None:
        """AssertionError unless ``held``, by all nodes and requests, with ``locked`` of it, explain
        every count."""
        live_rows, locked_rows = np.zeros_like(self._live), np.zeros_like(self._locked)
        for use in held:
            live_rows[use.slabs] += use.counts
        for use in locked:
            locked_rows[use.slabs] += use.counts
        assert (live_rows == self._live).all(), "live rows are miscounted"
        assert (locked_rows == self._locked).all(), "locked rows are miscounted"
        tokens = sum(use.text_tokens for use in held), sum(use.visual_tokens for use in held)
        assert tokens == (self.text_tokens, self.visual_tokens), "tokens are miscounted"
        free = self._stack[: self.free]
        owned = self._live > 0
        assert len(np.unique(free)) == self.free and not owned[free].any(), (
            "a free slab has an owner, or is free twice"
        )
        assert owned.sum() + self.free == self.layout.num_slabs, "a slab has no owner"
        assert ((self._kind > 0) == owned).all(), "a slab's kind is not what holds it"
        of_images = self._kind >= self.IMAGE
        counts = (self._kind == self.TEXT).sum(), of_images.sum(), (self._kind == self.BASIS).sum()
        assert counts == (self.of_text, self.of_images, self.bases), (
            "slabs of a kind are miscounted"
        )
        evictable = self.are_evictable(np.arange(1 + self.layout.num_slabs))
        can_go = evictable.sum(), (evictable & of_images).sum()
        assert can_go == (self.evictable, self.evictable_of_images), (
            "evictable slabs are miscounted"
        )
        assert self.of_images <= self.layout.max_visual_slabs, (
            "images hold more slabs than they may"
        )
