"""Which images of a prompt take visual rows."""

from __future__ import annotations

from collections.abc import Container, Sequence
from typing import TYPE_CHECKING
from weakref import WeakKeyDictionary

from ..config import RotateKConfig
from ..stats import INEXACT, NO_SLABS, NOT_SMALLER, TOO_MANY_SEGMENTS, TOO_SHORT
from .layout import PoolLayout
from .segments import (
    ImageRun,
    Placement,
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
