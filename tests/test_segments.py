from array import array
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sglang_rotatek.memory.layout import PoolLayout
from sglang_rotatek.memory.segments import (
    FIRST_PAD_ID,
    VIDEO_PIECE_TOKENS,
    ImageRun,
    Placement,
    cut_segments,
    cut_videos,
    image_runs,
    match_offsets,
    max_cuts,
    max_cuts_of_all,
)

CAT, DOG = FIRST_PAD_ID, FIRST_PAD_ID + 7
CAT_CYCLE = [FIRST_PAD_ID + i for i in (11, 12, 13, 14)]
DOG_CYCLE = [FIRST_PAD_ID + i for i in (21, 22, 21, 23)]
LAYOUT = PoolLayout(100, 100, text_rows=5, visual_rows=8)

spans = st.lists(st.tuples(st.sampled_from([1, 2, CAT, DOG]), st.integers(4, 20)), max_size=8)
short_spans = st.lists(st.tuples(st.sampled_from([1, 2, CAT, DOG]), st.integers(1, 6)), max_size=8)
segment_lengths = st.none() | st.integers(1, 40)


@st.composite
def placements(draw):
    """Disjoint rotated runs in order, with gaps of 0 or more text tokens."""
    runs, position = [], 0
    for _ in range(draw(st.integers(0, 4))):
        start = position + draw(st.integers(0, 12))
        position = start + draw(st.integers(1, 12))
        runs.append(ImageRun(start, position))
    return Placement(runs, LAYOUT)


@st.composite
def chunked_runs(draw):
    """A run, the first computed position, the chunk length, and the chunks [(start, end), ...] to
    the run's end."""
    run_start = draw(st.integers(0, 30))
    run = ImageRun(run_start, run_start + draw(st.integers(1, 120)))
    start = draw(st.integers(0, run.end - 1))
    chunk_tokens = draw(st.integers(1, 60))
    bounds = [start, start + draw(st.integers(1, chunk_tokens))]
    while bounds[-1] < run.end:
        bounds.append(bounds[-1] + chunk_tokens)
    return run, start, chunk_tokens, list(pairwise(bounds))


def text_tokens(placement, start, end):
    rotated = {position for run in placement.rotated for position in range(run.start, run.end)}
    return sum(position not in rotated for position in range(start, end))


@pytest.mark.parametrize(
    "kind", [list, lambda ids: array("q", ids), np.array], ids=["list", "array", "numpy"]
)
def test_runs_are_found_in_every_form_of_token_ids(kind):
    assert image_runs(kind([5, CAT, CAT, CAT, 6, DOG])) == [ImageRun(1, 4), ImageRun(5, 6)]


def pads(cycle: list[int], length: int) -> list[int]:
    """The ids of an image of ``length`` tokens, as the host repeats them."""
    return (cycle * length)[:length]


@pytest.mark.parametrize(
    ("cat", "dog"), [([CAT], [DOG]), (CAT_CYCLE, DOG_CYCLE), (CAT_CYCLE, [DOG])]
)
def test_adjacent_images_are_two_runs(cat, dog):
    ids = pads(cat, 5) + pads(dog, 9) + pads(cat, 6)
    assert image_runs(ids) == [ImageRun(0, 5), ImageRun(5, 14), ImageRun(14, 20)]


@given(
    st.lists(
        st.tuples(st.sampled_from([[1], [CAT], [DOG], CAT_CYCLE, DOG_CYCLE]), st.integers(4, 40)),
        max_size=8,
    )
)
def test_images_of_a_period_and_more_are_found_one_by_one(spans):
    ids, expected, before = [], [], None
    for cycle, length in spans:
        if cycle != [1] and cycle != before:
            expected.append(ImageRun(len(ids), len(ids) + length))
            before = cycle
            ids += pads(cycle, length)
        else:  # text, also between two equal pictures
            before = None
            ids += [1] * length
    assert image_runs(ids) == expected


@given(st.integers(4, 60), st.integers(0, 55))
def test_a_slice_that_begins_inside_an_image_has_the_rest_of_its_run(length, start):
    ids = [*pads(CAT_CYCLE, length)[start:], 1]
    assert image_runs(ids) == ([ImageRun(0, length - start)] if length > start else [])


def test_equal_images_that_touch_are_one_run():
    assert image_runs(pads(CAT_CYCLE, 8) * 2) == [ImageRun(0, 16)]


@pytest.mark.parametrize(
    ("runs", "offsets", "match"),
    [
        ([(1, 9), (12, 20)], [(12, 19), (1, 8)], True),
        ([(1, 20)], [(1, 8), (9, 19)], True),  # pictures that touch and are equal
        ([(1, 9)], [(1, 8), (12, 19)], False),
        ([(1, 5), (5, 9)], [(1, 8)], False),
        ([(2, 9)], [(1, 8)], False),
        ([(1, 9), (12, 20)], [(1, 8)], False),
        ([], [(1, 8)], False),
    ],
)
def test_runs_are_held_against_the_hosts_offsets(runs, offsets, match):
    assert match_offsets([ImageRun(*run) for run in runs], offsets) is match


@pytest.mark.parametrize(
    "groups, group_tokens, pieces",
    [
        pytest.param(4, 300, [300] * 4, id="a large frame group alone"),
        pytest.param(6, 121, [363, 363], id="small ones joined"),
        pytest.param(7, 121, [363, 484], id="the rest joined to a piece, not left short"),
        pytest.param(3, 20, [60], id="a short video whole"),
        pytest.param(1, 5000, [5000], id="one frame group whole"),
    ],
)
def test_a_video_is_cut_into_whole_frame_groups_with_tokens_enough_for_a_basis(
    groups, group_tokens, pieces
):
    picture, video = ImageRun(2, 900), ImageRun(1000, 1000 + groups * group_tokens)
    first, *cut = cut_videos([picture, video], [(video.start, video.end - 1, groups)])
    assert first == picture
    assert [len(piece) for piece in cut] == pieces
    assert [piece.start for piece in cut] == [video.start, *(piece.end for piece in cut[:-1])]


@given(st.integers(1, 400), st.integers(1, 2000))
def test_only_a_video_shorter_than_a_piece_has_a_short_piece(groups, group_tokens):
    video = ImageRun(7, 7 + groups * group_tokens)
    pieces = cut_videos([video], [(video.start, video.end - 1, groups)])
    assert sum(map(len, pieces)) == len(video)
    assert all(len(piece) % group_tokens == 0 for piece in pieces)
    assert min(map(len, pieces)) >= min(VIDEO_PIECE_TOKENS, len(video))


def test_a_run_that_is_not_just_the_video_stays_whole():
    run = ImageRun(0, 5000)
    # Two videos that image_runs took for one.
    assert cut_videos([run], [(0, 1999, 4), (2000, 4999, 6)]) == [run]
    assert cut_videos([run], []) == [run]
    # Nonsense of a client.
    assert cut_videos([run], [(0, 4999, 0)]) == cut_videos([run], [(0, 4999, 7)]) == [run]


def test_a_picture_shown_twice_is_two_runs():
    assert image_runs([CAT, CAT, 9, CAT]) == [ImageRun(0, 2), ImageRun(3, 4)]


def test_text_and_nothing_have_no_runs():
    assert image_runs([1, 2, FIRST_PAD_ID - 1]) == []
    assert image_runs([]) == []


def pad_positions(ids: list[int]) -> list[int]:
    return [position for position, token in enumerate(ids) if token >= FIRST_PAD_ID]


@given(short_spans)
def test_runs_of_images_shorter_than_a_period_cover_the_pad_ids_all_the_same(spans):
    ids = [token for token, length in spans for _ in range(length)]
    covered = [position for run in image_runs(ids) for position in range(run.start, run.end)]
    assert covered == pad_positions(ids)


@given(spans)
def test_runs_cover_exactly_the_pad_ids(spans):
    ids = [token for token, length in spans for _ in range(length)]
    runs = image_runs(ids)
    covered = [position for run in runs for position in range(run.start, run.end)]
    assert covered == pad_positions(ids)
    assert all(len(set(ids[run.start : run.end])) == 1 for run in runs)
    assert all(a.end < b.start or ids[a.start] != ids[b.start] for a, b in pairwise(runs))


def test_a_run_outside_the_computed_positions_has_no_segments():
    assert cut_segments(ImageRun(10, 20), 0, 10, None) == []
    assert cut_segments(ImageRun(10, 20), 20, 30, 4) == []


def test_segments_lie_on_a_grid_that_starts_with_the_image():
    assert cut_segments(ImageRun(10, 30), 0, 99, 8) == [(10, 18), (18, 26), (26, 30)]
    assert cut_segments(ImageRun(10, 30), 13, 27, 8) == [(13, 18), (18, 26), (26, 27)]
    assert cut_segments(ImageRun(10, 30), 18, 26, 8) == [(18, 26)]


@given(chunked_runs(), segment_lengths)
def test_the_segments_of_all_chunks_partition_the_computed_part_of_the_run(chunked, segment_tokens):
    run, start, _, chunks = chunked
    segments = [s for chunk in chunks for s in cut_segments(run, *chunk, segment_tokens)]
    assert segments[0][0] == max(start, run.start)
    assert segments[-1][1] == run.end
    assert all(a[1] == b[0] for a, b in pairwise(segments))
    assert all(0 < end - begin <= (segment_tokens or len(run)) for begin, end in segments)


@given(chunked_runs(), segment_lengths)
def test_chunks_never_need_more_bases_than_is_counted(chunked, segment_tokens):
    run, start, chunk_tokens, chunks = chunked
    count = sum(len(cut_segments(run, *chunk, segment_tokens)) for chunk in chunks)
    placement = Placement([run], LAYOUT, segment_tokens)
    assert count <= placement.uncut(run, start)[1] + max_cuts(run, start, chunk_tokens)
    slabs = sum(
        1 - (-(high - low) // 8)
        for chunk in chunks
        for low, high in cut_segments(run, *chunk, segment_tokens)
    )
    assert slabs <= Placement([run], LAYOUT, segment_tokens).max_slabs(start, chunk_tokens)


@given(placements(), st.integers(0, 40), st.integers(1, 60), st.data())
def test_chunks_cut_all_runs_together_no_oftener_than_is_counted(
    placement, start, chunk_tokens, data
):
    """The first chunk as long as one likes."""
    end = max((run.end for run in placement.rotated), default=0)
    at, cuts, slabs = start + data.draw(st.integers(1, chunk_tokens)), 0, 0
    chunks = [(start, at)]
    while at < end:
        cuts += any(max(run.start, start) < at < run.end for run in placement.rotated)
        chunks.append((at, at + chunk_tokens))
        at += chunk_tokens
    slabs = sum(placement.visual(*chunk)[1] for chunk in chunks)
    assert cuts <= max_cuts_of_all(placement.rotated, start, chunk_tokens)
    assert slabs <= placement.max_slabs(start, chunk_tokens)


def test_many_images_are_not_each_charged_for_cuts_that_a_few_chunks_cannot_make():
    runs = [ImageRun(300 * i, 300 * i + 256) for i in range(100)]
    layout = PoolLayout(10_000, 10_000, text_rows=20, visual_rows=32)
    assert max_cuts_of_all(runs, 0, 8192) == 4
    assert Placement(runs, layout).max_slabs(0, 8192) == 100 * 9 + 4 * 2


def test_segments_without_chunking_are_exact():
    def segments(start, segment_tokens):
        return Placement([], LAYOUT, segment_tokens).uncut(ImageRun(10, 30), start)[1]

    assert (segments(0, None), segments(0, 8), segments(26, 8)) == (1, 3, 1)


def test_cached_images_need_no_slabs():
    assert Placement([ImageRun(0, 10), ImageRun(20, 30)], LAYOUT).max_slabs(10, None) == 1 + 2


@given(placements(), st.integers(0, 60), st.integers(0, 60))
def test_rotated_tokens_and_text_tokens_add_up(placement, start, length):
    end = start + length
    assert placement.rotated_tokens(start, end) == length - text_tokens(placement, start, end)


@given(
    placements(),
    st.integers(0, 60),
    st.integers(0, 60),
    st.integers(0, 20),
    st.integers(0, 12),
    st.integers(0, 4),
    segment_lengths,
    st.booleans(),
    st.sampled_from([(1, 1), (8, 5), (4, 3)]),
)
def test_longest_extend_is_the_longest_within_its_budgets(
    placement, start, limit, slabs, of_images, open_rows, segment_tokens, only_smaller, rows
):
    layout = PoolLayout(100, 100, text_rows=rows[1], visual_rows=rows[0])
    placement = Placement(placement.rotated, layout, segment_tokens, only_smaller)
    segments = placement.segments(start, start + limit)

    def fits(n: int) -> bool:
        """Whether the budgets hold n tokens that cut no segment."""
        whole = [(low, high) for low, high in segments if high <= start + n]
        if any(low < start + n < high for low, high in segments):
            return False
        taken = sum(1 - (-(high - low) // rows[0]) for low, high in whole)
        text = n - sum(high - low for low, high in whole) - open_rows
        return taken <= of_images and taken + max(0, -(-text // rows[1])) <= slabs

    longest = placement.longest_extend(
        start, limit, slabs=slabs, slabs_of_images=of_images, open_rows=open_rows
    )
    assert longest == max((n for n in range(limit + 1) if fits(n)), default=0)
