"""Spans, slabs and the records of requests, without the host."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from sglang_rotatek.memory.layout import PoolLayout
from sglang_rotatek.memory.requests import RequestRows
from sglang_rotatek.memory.rows import TEXT, Slabs, Span, Use, cut_spans, use_of
from sglang_rotatek.memory.segments import Placement

LAYOUT = PoolLayout(num_slabs=40, max_visual_slabs=38, text_rows=20, visual_rows=32)


@st.composite
def spans(draw):
    """A span at position 5."""
    basis = draw(st.sampled_from([TEXT, 39]))
    rows = LAYOUT.text_rows if basis == TEXT else LAYOUT.visual_rows
    first = draw(st.integers(0, rows - 1)) if basis == TEXT else 0
    length = draw(st.integers(1, 150))
    slabs = np.arange(1, 1 - (-(first + length) // rows)) * 3 % 37
    return Span(5, length, first, slabs, basis)


@given(spans(), st.data())
def test_a_cut_span_names_the_slots_of_its_part(span, data):
    low = data.draw(st.integers(span.start, span.end - 1))
    high = data.draw(st.integers(low + 1, span.end))
    part = span.cut(low, high, LAYOUT)
    assert part.slots(LAYOUT).tolist() == span.slots(LAYOUT)[low - 5 : high - 5].tolist()
    assert (part.start, part.end, part.counts(LAYOUT).sum()) == (low, high, high - low)
    assert part.counts(LAYOUT).min() > 0


@given(spans())
def test_slots_lie_in_the_slabs_of_the_span(span):
    slots = span.slots(LAYOUT)
    assert len(np.unique(slots)) == span.length
    assert (slots >= LAYOUT.first_visual_slot).all() != span.is_text
    rows = LAYOUT.text_rows if span.is_text else LAYOUT.visual_rows
    slab_of = (slots - (0 if span.is_text else LAYOUT.first_visual_slot)) // rows
    assert dict(zip(*np.unique(slab_of, return_counts=True), strict=True)) == dict(
        zip(span.slabs, span.counts(LAYOUT), strict=True)
    )


@example(Span(5, 141, 0, np.arange(1, 9)), 145, 145)  # nothing, at the first row of a slab
@given(spans(), st.integers(0, 170), st.integers(0, 170))
def test_parts_of_a_record_take_what_the_whole_takes(span, low, high):
    low, high = sorted((low, high))
    parts = [cut_spans([span], *bounds, LAYOUT) for bounds in ((0, low), (low, high), (high, 1000))]
    taken = np.zeros(41, dtype=np.int64)
    for part in parts:
        use = use_of(part, LAYOUT)
        taken[use.slabs] += use.counts
    whole = use_of([span], LAYOUT)
    assert (
        taken[whole.slabs].tolist() == whole.counts.tolist() and taken.sum() == whole.counts.sum()
    )


def test_text_before_and_behind_an_image_counts_its_slab_once():
    text = [Span(0, 8, 0, np.array([4])), Span(40, 5, 8, np.array([4]))]
    use = use_of([text[0], Span(8, 32, 0, np.array([7]), basis=6), text[1]], LAYOUT)
    assert dict(zip(use.slabs, use.counts, strict=True)) == {4: 13, 6: 32, 7: 32}
    assert (use.text_tokens, use.visual_tokens) == (13, 32)


def test_rows_that_are_freed_twice_are_a_bug():
    slabs = Slabs(LAYOUT)
    use = Use(slabs.take(1, Slabs.TEXT), np.array([3]), 3, 0)
    slabs.hold(use)
    slabs.release(use, locked=True)
    with pytest.raises(RuntimeError, match="bug in RotateK"):
        slabs.release(use, locked=True)
    with pytest.raises(RuntimeError, match="41 slabs are needed, 40 are free"):
        slabs.take(41, Slabs.TEXT)


@pytest.fixture
def requests():
    requests = RequestRows(LAYOUT, Slabs(LAYOUT), num_requests=4)
    for index in (1, 2):
        requests.begin(index, Placement([], LAYOUT), None)
    return requests


def take_text(requests: RequestRows, index: int, start: int, tokens: int) -> list[int]:
    span = requests.take_text(index, start, tokens)
    requests.slabs.hold(use_of([span], LAYOUT))
    return span.slots(LAYOUT).tolist()


def test_decode_steps_of_many_requests_grow_each_record_in_its_slabs(requests):
    taken = {index: take_text(requests, index, 0, 18) for index in (1, 2)}
    for position in range(18, 45):
        slots = requests.take_one_each(np.array([2, 1]), [position, position])
        for index, slot in zip((2, 1), slots.tolist(), strict=True):
            taken[index].append(slot)
    for index in (1, 2):
        (span,) = requests.spans(index)
        assert (span.start, span.length) == (0, 45)
        assert span.slots(LAYOUT).tolist() == taken[index]
        assert len(span.slabs) == 3
    assert requests.slabs.text_tokens == 90
    assert not set(taken[1]) & set(taken[2])


def test_text_behind_an_image_goes_on_in_the_open_slab(requests):
    before = take_text(requests, 1, 0, 5)
    image = requests.take_segment(1, 5, 40)
    requests.slabs.hold(use_of([image], LAYOUT))
    assert requests.slabs_for_text(1, 15) == 0
    assert requests.slabs_for_decode(np.array([1, 2])) == 1
    behind = requests.take_one_each(np.array([1]), [45])
    assert behind.tolist() == [before[-1] + 1]
    assert [(span.start, span.length) for span in requests.spans(1)] == [(0, 5), (5, 40), (45, 1)]


def test_an_open_slab_is_dropped_with_its_last_row(requests):
    take_text(requests, 1, 0, 5)
    requests.release(1, 0, 5)
    assert (requests.open_rows(1), requests.slabs.free) == (0, 40)
    assert requests.end(1) is None


def test_rows_handed_over_leave_the_rest_of_the_slab_to_the_request(requests):
    slots = take_text(requests, 1, 0, 5)
    spans, use = requests.hand_over(1, 0, 5)
    assert [span.slots(LAYOUT).tolist() for span in spans] == [slots]
    requests.slabs.lock(use)
    assert take_text(requests, 1, 5, 1) == [slots[-1] + 1]
    requests.release(1, 5, 6)
    slab = int(spans[0].slabs[0])
    assert requests.end(1) == (slab, 5)


def test_a_row_that_still_holds_tokens_cannot_be_given_back(requests):
    take_text(requests, 1, 0, 5)
    with pytest.raises(AssertionError, match="request row 1 is given back while it holds"):
        requests.end(1)
