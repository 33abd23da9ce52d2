"""Which images of a prompt take visual rows, and what those take."""

from __future__ import annotations

from collections.abc import Container, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING
from weakref import WeakKeyDictionary

from ..config import RotateKConfig
from ..stats import INEXACT, NO_SLABS, NOT_SMALLER, TOO_MANY_SEGMENTS, TOO_SHORT
from .layout import PoolLayout
from .segments import (
    ImageRun,
    cut_segments,
    cut_videos,
    image_runs,
    mark_inexact,
    max_cuts,
    max_cuts_of_all,
)

if TYPE_CHECKING:
    from sglang.srt.managers.schedule_batch import Req

# Of each request its ids and image runs: it may wait for many rounds.
_runs: WeakKeyDictionary[Req, tuple[Sequence[int], list[ImageRun]]] = WeakKeyDictionary()
UNBOUNDED = 1 << 40


def prompt_runs(req: Req, inexact: Container[int] = ()) -> list[ImageRun]:
    """The image runs of a host request, found once for its ids, which the host replaces when it
    aborts it. A video that the host marks as one range (Qwen2-VL, Qwen2.5-VL) is cut into pieces of
    frame groups; other models have text between the groups. ``inexact``: pad ids of images that are
    to stay at full width, as they are known when the request comes: then its memory is checked."""
    token_ids, runs = _runs.get(req, (None, []))
    if token_ids is not req.origin_input_ids:
        items = req.multimodal_inputs.mm_items if req.multimodal_inputs is not None else []
        videos = [
            (*item.offsets[0], int(item.video_grid_thw[0][0]))
            for item in items
            if item.is_video()
            and len(item.offsets or ()) == 1
            and "video_grid_thw" in item.model_specific_data
        ]
        runs = cut_videos(image_runs(req.origin_input_ids), videos)
        runs = mark_inexact(runs, req.origin_input_ids, inexact)
        _runs[req] = req.origin_input_ids, runs
    return runs


def place_images(
    runs: list[ImageRun],
    start: int,
    config: RotateKConfig,
    *,
    slab_budget: int,
    chunk_tokens: int | None,
    layout: PoolLayout,
    segment_budget: int = UNBOUNDED,
) -> Placement:
    """Decide which image runs take visual rows for the tokens from ``start`` on, prefilled in
    chunks of ``chunk_tokens``.

    An image stays at full width when that is no larger, or when images would hold more than
    ``slab_budget`` slabs, or make more than ``segment_budget`` segments: always correct. The
    decision is made once for an image; cut by chunks, a piece of it may still be smaller at full
    width.
    """
    placement = Placement(
        [], layout, config.segment_tokens, only_smaller=config.min_image_tokens is None
    )
    cuts_left = max_cuts_of_all(runs, start, chunk_tokens)
    for run in runs:
        tokens = run.end - max(run.start, start)
        if tokens <= 0:
            continue
        cuts = min(max_cuts(run, start, chunk_tokens), cuts_left)
        slabs, segments = placement.uncut(run, start)
        slabs, segments = slabs + 2 * cuts, segments + cuts
        pieces = cut_segments(run, start, run.end, config.segment_tokens)
        if run.is_inexact:
            placement.full_width.append((INEXACT, tokens))
        elif config.min_image_tokens is not None and len(run) < config.min_image_tokens:
            placement.full_width.append((TOO_SHORT, tokens))
        elif placement.only_smaller and not any(
            layout.is_smaller_narrow(high - low) for low, high in pieces
        ):
            placement.full_width.append((NOT_SMALLER, tokens))
        elif segments > segment_budget:
            placement.full_width.append((TOO_MANY_SEGMENTS, tokens))
        elif slabs > slab_budget:
            placement.full_width.append((NO_SLABS, tokens))
        else:
            placement.rotated.append(run)
            slab_budget -= slabs
            segment_budget -= segments
            cuts_left -= cuts
    return placement


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
