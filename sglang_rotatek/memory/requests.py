"""What running requests hold, by the host's row of each in ``req_to_token``, and where their next
tokens go."""

from __future__ import annotations

import numpy as np

from .layout import PoolLayout
from .rows import Slabs, Span, Use, cut_spans, use_of
from .segments import Placement


class RequestRows:
    """Gives requests their rows. The text of a request fills its own slabs, one after the other:
    the *open slab* is the one that its next text token goes to.

    A decode step changes nothing but two arrays: the length of a record's last span follows from
    them, and is written down when somebody asks for the record (``settle``). ``index`` is always
    the host's req_pool_idx.
    """

    def __init__(self, layout: PoolLayout, slabs: Slabs, num_requests: int) -> None:
        self.layout = layout
        self.slabs = slabs
        self._num_requests = num_requests
        self.clear()

    def clear(self) -> None:
        self._spans: dict[int, list[Span]] = {}
        self._placements: dict[int, Placement] = {}
        self._open_slab = np.zeros(self._num_requests, dtype=np.int64)  # 0: none
        # The first row of it that is not filled.
        self._open_row = np.zeros(self._num_requests, dtype=np.int64)
        # Whether the last span ends there: then it grows with it.
        self._grows = np.zeros(self._num_requests, dtype=bool)

    # --- records ----------------------------------------------------------------------------------

    def spans(self, index: int) -> list[Span]:
        """What the request holds itself, in order. Not to be changed."""
        self._settle(index)
        return self._spans.get(index, [])

    def indices(self) -> list[int]:
        return list(self._spans)

    def placement(self, index: int) -> Placement:
        return self._placements[index]

    def begin(self, index: int, placement: Placement, open_slab: tuple[int, int] | None) -> None:
        """A request has got its row. ``open_slab``: slab and row from where on it may go on with
        text."""
        self._spans[index] = []
        self._placements[index] = placement
        self._set_open(index, open_slab)
        self._grows[index] = False

    def end(self, index: int) -> tuple[int, int] | None:
        """The request holds nothing any more; its open slab, and the first row in it that is not
        filled."""
        left = self._spans.pop(index)
        assert not left, f"request row {index} is given back while it holds the tokens of {left}"
        del self._placements[index]
        slab, row = int(self._open_slab[index]), int(self._open_row[index])
        self._set_open(index, None)
        return (slab, row) if slab and row < self.layout.text_rows else None

    def _settle(self, index: int) -> None:
        if self._grows[index]:
            spans = self._spans[index]
            last = spans[-1]
            length = (
                (len(last.slabs) - 1) * self.layout.text_rows
                + int(self._open_row[index])
                - last.first
            )
            spans[-1] = Span(last.start, length, last.first, last.slabs)

    def _set_open(self, index: int, open_slab: tuple[int, int] | None) -> None:
        self._open_slab[index], self._open_row[index] = open_slab or (0, 0)

    # --- taking -----------------------------------------------------------------------------------

    def open_rows(self, index: int) -> int:
        """Text rows that the request can fill before it takes a slab."""
        return self.layout.text_rows - int(self._open_row[index]) if self._open_slab[index] else 0

    def slabs_for_text(self, index: int, num_tokens: int) -> int:
        """Slabs that the next ``num_tokens`` text tokens take."""
        return max(0, -(-(num_tokens - self.open_rows(index)) // self.layout.text_rows))

    def slabs_for_decode(self, indices: np.ndarray) -> int:
        """Slabs that one more text token of each request takes."""
        is_full = (self._open_slab[indices] == 0) | (
            self._open_row[indices] == self.layout.text_rows
        )
        return int(is_full.sum())

    def take_text(self, index: int, start: int, num_tokens: int) -> Span:
        """Rows for the text tokens of a request from position ``start`` on. The caller tells the
        slabs (``Slabs.hold``)."""
        rows = self.layout.text_rows
        self._settle(index)
        new = self.slabs.take(self.slabs_for_text(index, num_tokens), Slabs.TEXT)
        slab, first = int(self._open_slab[index]), int(self._open_row[index])
        if slab and first < rows:
            span = Span(start, num_tokens, first, np.concatenate(([slab], new)))
        else:
            span = Span(start, num_tokens, 0, new)
        self._set_open(index, (int(span.slabs[-1]), span.next_row(self.layout)))
        spans = self._spans[index]
        if self._grows[index]:
            last = spans[-1]
            spans[-1] = Span(
                last.start, last.length + num_tokens, last.first, np.concatenate((last.slabs, new))
            )
        else:
            spans.append(span)
            self._grows[index] = True
        return span

    def take_segment(self, index: int, start: int, num_tokens: int) -> Span:
        """Rows and a basis for the segment of a request from position ``start`` on. As
        ``take_text``."""
        self._settle(index)
        basis = int(self.slabs.take(1, Slabs.BASIS)[0])
        span = Span(
            start,
            num_tokens,
            0,
            self.slabs.take(self.layout.slabs_of(num_tokens) - 1, Slabs.IMAGE),
            basis,
        )
        self._spans[index].append(span)
        self._grows[index] = False
        return span

    def take_one_each(self, indices: np.ndarray, positions: list[int]) -> np.ndarray:
        """The slots [n] int64 of one more text token of each request, at ``positions``. Cost: a few
        array operations for all, and Python for the requests that begin a slab."""
        rows = self.layout.text_rows
        goes_on = self._grows[indices] & (self._open_row[indices] < rows)
        growing = indices[goes_on]
        self._open_row[growing] += 1
        self.slabs.hold_one_each(self._open_slab[growing])
        others = np.flatnonzero(~goes_on).tolist()
        if others:
            new = [self.take_text(int(indices[i]), positions[i], 1) for i in others]
            self.slabs.hold(use_of(new, self.layout))
        return self._open_slab[indices] * rows + self._open_row[indices] - 1

    # --- giving -----------------------------------------------------------------------------------

    def release(self, index: int, start: int, end: int) -> None:
        """The tokens at positions [start, end) are gone."""
        gone = self._remove(index, start, end)
        if not gone:
            return
        empty = self.slabs.release(use_of(gone, self.layout), locked=True)
        if self._open_slab[index] in empty:
            self._set_open(index, None)
        elif gone[-1].is_text and gone[-1].slabs[-1] == self._open_slab[index]:
            last = gone[-1]
            if last.next_row(self.layout) == self._open_row[index]:
                # The last rows that it filled, as of a token computed behind the end of an answer:
                # they are next again. They lie in the span's only slab: of several, the last would
                # be empty now.
                self._open_row[index] = last.first

    def hand_over(self, index: int, start: int, end: int) -> tuple[list[Span], Use]:
        """What holds the positions [start, end), which belong to a node from now on: live, and
        locked by nobody."""
        spans = self._remove(index, start, end)
        use = use_of(spans, self.layout)
        self.slabs.unlock(use)
        return spans, use

    def _remove(self, index: int, start: int, end: int) -> list[Span]:
        self._settle(index)
        spans, layout = self._spans.get(index, []), self.layout
        gone = cut_spans(spans, start, end, layout)
        if gone:
            last = spans[-1]
            left = cut_spans(spans, 0, start, layout) + cut_spans(spans, end, last.end, layout)
            self._spans[index] = left
            # What is left of the last span grows on when its end was not touched.
            self._grows[index] &= end < last.end
        return gone
