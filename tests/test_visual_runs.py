import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sglang_rotatek.memory.visual_runs import VisualRuns


def run(start, *slots):
    return start, np.array(slots, dtype=np.int64)


def plain(runs):
    return [(start, slots.tolist()) for start, slots in runs]


def by_position(runs):
    return {start + i: slot for start, slots in runs for i, slot in enumerate(slots.tolist())}


@st.composite
def visual_runs(draw):
    runs, position, slot = VisualRuns(), 0, 100
    for _ in range(draw(st.integers(0, 4))):
        position += draw(st.integers(0, 5))
        length = draw(st.integers(1, 6))
        runs.append(position, np.arange(slot, slot + length))
        position, slot = position + length, slot + length
    return runs


def test_an_empty_row_has_no_slots():
    assert len(VisualRuns()) == 0
    assert VisualRuns().slots().tolist() == []
    assert VisualRuns().slots().dtype == np.int64
    assert VisualRuns().within(0, 100) == []


def test_two_rows_do_not_share_their_runs():
    first, second = VisualRuns(), VisualRuns()
    first.append(*run(0, 7))
    assert len(second) == 0


def test_runs_are_appended_in_order():
    runs = VisualRuns()
    runs.append(*run(4, 30, 31))
    runs.append(*run(6, 40))
    assert len(runs) == 3
    assert runs.slots().tolist() == [30, 31, 40]


def test_an_overlapping_run_is_refused():
    runs = VisualRuns([run(4, 30, 31)])
    with pytest.raises(ValueError, match="visual run at 5 overlaps the run before it at 4"):
        runs.append(*run(5, 40))


def test_within_cuts_runs_at_both_ends():
    runs = VisualRuns([run(2, 10, 11, 12), run(8, 20, 21)])
    assert plain(runs.within(3, 9)) == [(3, [11, 12]), (8, [20])]
    assert plain(runs.within(5, 8)) == []


def test_a_slice_counts_positions_from_its_start():
    runs = VisualRuns([run(2, 10, 11, 12), run(8, 20, 21)])
    assert plain(runs.slice(3, 9).runs) == [(0, [11, 12]), (5, [20])]


def test_dropped_positions_are_forgotten_and_the_rest_keeps_its_place():
    runs = VisualRuns([run(2, 10, 11, 12), run(8, 20, 21)])
    runs.drop_before(4)
    assert plain(runs.runs) == [(4, [12]), (8, [20, 21])]
    runs.drop_before(100)
    assert len(runs) == 0
    runs.drop_before(0)
    assert len(runs) == 0


@given(visual_runs(), st.integers(0, 50), st.integers(0, 50))
def test_within_equals_a_lookup_by_position(runs, start, end):
    expected = {position: slot for position, slot in by_position(runs.runs).items() if start <= position < end}
    assert by_position(runs.within(start, end)) == expected


@given(visual_runs(), st.integers(0, 50))
def test_a_split_row_joins_to_the_whole(runs, cut):
    head, tail = runs.slice(0, cut), runs.slice(cut, 100)
    assert len(head) + len(tail) == len(runs)
    assert np.concatenate([head.slots(), tail.slots()]).tolist() == runs.slots().tolist()
    joined = by_position(head.runs) | {cut + p: slot for p, slot in by_position(tail.runs).items()}
    assert joined == by_position(runs.runs)


@given(visual_runs(), st.integers(0, 50))
def test_drop_before_keeps_exactly_what_lies_behind(runs, position):
    expected = {p: slot for p, slot in by_position(runs.runs).items() if p >= position}
    runs.drop_before(position)
    assert by_position(runs.runs) == expected
