"""From token ids to image runs, and from image runs to the segments that share a basis.

A prompt marks the tokens of an image with pad ids above any vocabulary, made from a hash of its
pixels: a cycle of four ids, or one id repeated (LLaVA in its original layout). An *image run* is
the positions of one image. A *segment* is the part of an image run that one forward computes, cut
further on a grid of ``segment_tokens`` that starts with the image. A video is several image runs,
its frame groups or short sequences of them: M-RoPE turns Keys with time, so a basis for all of a
video would have to hold many directions.
"""

from __future__ import annotations

from array import array
from collections.abc import Container, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise

import numpy as np

from .layout import PoolLayout

FIRST_PAD_ID = 1_000_000  # sglang.srt.managers.schedule_batch.MM_PAD_SHIFT_VALUE
PAD_PERIOD = 4  # ids of the longest cycle that the host repeats over an image
# A piece of a video has at least this many tokens: a basis costs as much memory as some 60 tokens
# save. More would cost fidelity: Keys of the trained reader at M-RoPE base 1e6, two positions a
# group of 256 tokens, lose 0.1, 0.3, 0.6 and 1.3 % of their energy at rank 32 with a basis for 1,
# 2, 4 and 8 groups.
VIDEO_PIECE_TOKENS = 256


@dataclass(frozen=True)
class ImageRun:
    """Positions [start, end) of one image in a prompt. ``is_inexact``: its narrow rows are known to
    be too far from exact (--rotatek-max-error)."""

    start: int
    end: int
    is_inexact: bool = field(default=False, compare=False)

    def __len__(self) -> int:
        return self.end - self.start


def image_runs(token_ids: Sequence[int]) -> list[ImageRun]:
    """The image runs of a prompt, in order. ``token_ids``: array('q'), list or int64 array.

    Within a range of pad ids an image begins where the id differs from the one a period before.
    Images without text between them are taken for one when they are equal, or shorter than a
    period: either is harmless.
    """
    if isinstance(token_ids, array) and token_ids.itemsize == 8:
        ids = np.frombuffer(token_ids, dtype=np.int64)  # no copy
    else:
        ids = np.asarray(token_ids, dtype=np.int64)
    is_pad = ids >= FIRST_PAD_ID
    if not is_pad.any():
        return []
    edges = np.flatnonzero(np.diff(is_pad, prepend=False, append=False))
    changes = PAD_PERIOD + np.flatnonzero(
        (ids[PAD_PERIOD:] != ids[:-PAD_PERIOD]) & is_pad[PAD_PERIOD:] & is_pad[:-PAD_PERIOD]
    )
    runs = []
    for start, end in edges.reshape(-1, 2).tolist():
        for change in changes[
            np.searchsorted(changes, start) : np.searchsorted(changes, end)
        ].tolist():
            # The rest of the new image's first period differs as well.
            if change - start >= PAD_PERIOD:
                runs.append(ImageRun(start, change))
                start = change
        runs.append(ImageRun(start, end))
    return runs


def cut_videos(runs: list[ImageRun], videos: Sequence[tuple[int, int, int]]) -> list[ImageRun]:
    """``runs`` with those of ``videos`` cut into pieces of whole frame groups, as even as possible.

    ``videos``: (first, last, frame groups) of the host's videos whose groups follow each other
    without text between.
    """
    groups_of = {(first, last + 1): groups for first, last, groups in videos}
    pieces = []
    for run in runs:
        groups = groups_of.get((run.start, run.end), 1)
        if groups < 1 or len(run) % groups:
            groups = 1  # a client that processes videos itself may say anything
        group_tokens = len(run) // groups
        count = max(1, groups // -(-VIDEO_PIECE_TOKENS // group_tokens))
        cuts = [run.start + i * groups // count * group_tokens for i in range(count)] + [run.end]
        pieces += [ImageRun(start, end) for start, end in pairwise(cuts)]
    return pieces


def mark_inexact(
    runs: list[ImageRun], token_ids: Sequence[int], inexact: Container[int]
) -> list[ImageRun]:
    """``runs`` with those marked whose pad ids are among ``inexact``."""
    return [replace(run, is_inexact=token_ids[run.start] in inexact) for run in runs]


def match_offsets(runs: list[ImageRun], offsets: Sequence[tuple[int, int]]) -> bool:
    """Whether the runs found in a prompt are the host's ``offsets`` [(first, last), ...] of its
    pictures. Pictures that touch may share a run; else the host marks pictures in a way that
    ``image_runs`` does not know."""
    starts = np.array([run.start for run in runs], dtype=np.int64)
    firsts, lasts = np.array(sorted(offsets), dtype=np.int64).T
    held_by = np.searchsorted(starts, firsts, side="right") - 1
    if not len(starts) or held_by.min() < 0:
        return False
    ends = np.array([run.end for run in runs], dtype=np.int64)
    return bool((lasts < ends[held_by]).all()) and int((lasts - firsts + 1).sum()) == int(
        (ends - starts).sum()
    )


def cut_segments(
    run: ImageRun, start: int, end: int, segment_tokens: int | None
) -> list[tuple[int, int]]:
    """The segments [(start, end), ...] of ``run`` within the computed positions [start, end)."""
    start, end = max(start, run.start), min(end, run.end)
    if start >= end:
        return []
    if segment_tokens is None:
        return [(start, end)]
    first_cut = run.start + ((start - run.start) // segment_tokens + 1) * segment_tokens
    cuts = [start, *range(first_cut, end, segment_tokens), end]
    return list(pairwise(cuts))


def max_cuts(run: ImageRun, start: int, chunk_tokens: int | None) -> int:
    """How often a prefill in chunks of ``chunk_tokens`` can cut positions [start, run.end) of a run
    at most. The first chunk may be shorter than the rest, so a run of one chunk's length can be cut
    once."""
    return -(-(run.end - max(start, run.start)) // chunk_tokens) if chunk_tokens else 0


def max_cuts_of_all(runs: Sequence[ImageRun], start: int, chunk_tokens: int | None) -> int:
    """The same of all runs together: a prompt has no more chunks, however many images it has."""
    return (
        max((-(-(run.end - start) // chunk_tokens) for run in runs if run.end > start), default=0)
        if chunk_tokens
        else 0
    )


@dataclass
class Placement:
    """Where a request's images go. ``rotated`` runs take visual rows, cut on a grid of
    ``segment_tokens``; all else takes text rows, so do segments that would be no smaller narrow
    when ``only_smaller``.

    ``full_width`` names why the other images are not rotated: (reason, tokens), in order.
    """

    rotated: list[ImageRun]
    layout: PoolLayout
    segment_tokens: int | None = None
    only_smaller: bool = False
    full_width: list[tuple[str, int]] = field(default_factory=list)

    def segments(self, start: int, end: int) -> list[tuple[int, int]]:
        """The segments [(start, end), ...] of a forward that computes [start, end)."""
        return [
            (low, high)
            for run in self.rotated
            for low, high in cut_segments(run, start, end, self.segment_tokens)
            if not self.only_smaller or self.layout.is_smaller_narrow(high - low)
        ]

    def uncut(self, run: ImageRun, start: int) -> tuple[int, int]:
        """Slabs and segments of positions [start, run.end) when no chunk cuts them."""
        segments = len(cut_segments(run, start, run.end, self.segment_tokens))
        # Each further segment has a slab for its basis and begins a new slab of rows.
        return self.layout.slabs_of(run.end - max(run.start, start)) + 2 * (segments - 1), segments

    def max_slabs(self, start: int, chunk_tokens: int | None) -> int:
        """The most slabs that the images from ``start`` on can take, prefilled in chunks of
        ``chunk_tokens``."""
        runs = [run for run in self.rotated if run.end > start]
        cuts = sum(max_cuts(run, start, chunk_tokens) for run in runs)
        cuts = min(cuts, max_cuts_of_all(runs, start, chunk_tokens))
        return sum(self.uncut(run, start)[0] for run in runs) + 2 * cuts

    def visual(self, start: int, end: int) -> tuple[int, int]:
        """Tokens of the segments of a forward that computes [start, end), and the slabs that they
        take."""
        lengths = [high - low for low, high in self.segments(start, end)]
        return sum(lengths), sum(map(self.layout.slabs_of, lengths)) if lengths else 0

    def rotated_tokens(self, start: int, end: int) -> int:
        """Tokens of [start, end) that lie in rotated runs."""
        return sum(max(0, min(end, run.end) - max(start, run.start)) for run in self.rotated)

    def longest_extend(
        self, start: int, limit: int, *, slabs: int, slabs_of_images: int, open_rows: int
    ) -> int:
        """The most tokens n <= limit such that [start, start + n) takes at most ``slabs`` slabs,
        ``slabs_of_images`` of them for images, when text begins with ``open_rows`` rows of a slab
        it has. It cuts no image that ``limit`` does not cut."""
        position, end, taken, text = start, start + limit, 0, -open_rows
        for low, high in self.segments(start, end):
            then, text_then = taken + self.layout.slabs_of(high - low), text + low - position
            if (
                then > slabs_of_images
                or then + max(0, -(-text_then // self.layout.text_rows)) > slabs
            ):
                end = low
                break
            position, taken, text = high, then, text_then
        most_text = (slabs - taken) * self.layout.text_rows - text
        return position - start + max(0, min(end - position, most_text))
