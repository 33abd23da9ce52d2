"""Which requests fit, when an image token takes less memory than the host believes."""

from __future__ import annotations

import logging
from functools import partial
from http import HTTPStatus

from sglang.srt.managers.schedule_batch import FINISH_ABORT
from sglang.srt.managers.schedule_policy import CLIP_MAX_NEW_TOKENS, AddReqResult, PrefillAdder

from ..config import RotateKConfig
from .layout import PoolLayout
from .tree import request_state
from .segments import ImageRun, Placement, cut_videos, image_runs, max_slabs
from ..stats import NO_SLABS, TOO_SHORT

logger = logging.getLogger(__name__)
UNBOUNDED = 1 << 40


def prompt_runs(req, found: list[ImageRun] | None = None) -> list[ImageRun]:
    """The image runs of a host request; ``found``: those of its ids, if they are known. A video that the host marks as
    one range (Qwen2-VL, Qwen2.5-VL) is cut into pieces of frame groups; other models have text between the groups."""
    items = req.multimodal_inputs.mm_items if req.multimodal_inputs is not None else []
    videos = [
        (*item.offsets[0], int(item.video_grid_thw[0][0]))
        for item in items
        if item.is_video() and len(item.offsets or ()) == 1 and "video_grid_thw" in item.model_specific_data
    ]
    return cut_videos(image_runs(req.origin_input_ids) if found is None else found, videos)


def place_images(
    runs: list[ImageRun],
    start: int,
    config: RotateKConfig,
    *,
    slab_budget: int,
    chunk_tokens: int | None,
    layout: PoolLayout,
) -> Placement:
    """Decide which image runs take visual slots for the tokens from ``start`` on.

    An image stays at full width when it is short, or when there are too few slabs: always correct, only
    larger. The decision is per image, so how the prefill is cut changes no token's kind.
    """
    placement = Placement([])
    for run in runs:
        tokens = run.end - max(run.start, start)
        if tokens <= 0:
            continue
        slabs = max_slabs(run, start, chunk_tokens, config.segment_tokens, layout)
        if len(run) < config.min_image_tokens:
            placement.full_width.append((TOO_SHORT, tokens))
        elif slabs > slab_budget:
            placement.full_width.append((NO_SLABS, tokens))
        else:
            placement.rotated.append(run)
            slab_budget -= slabs
    return placement


class RotateKPrefillAdder(PrefillAdder):
    """Counts an image as the slabs that it takes: as text in the host's budget (``RotateKPrefillBudget``), and in a budget
    of slabs besides."""

    def __init__(self, *args, scheduler, **kwargs) -> None:
        super().__init__(*args, **kwargs)
        self._scheduler = scheduler
        self._allocator = self.token_to_kv_pool_allocator
        self._promised_slabs = 0
        self._placement = Placement([])
        self._chunk_tokens = self.rem_chunk_tokens

    @property
    def _slabs(self) -> int:
        """Slabs for images that are free or can be freed, and promised to nobody."""
        visual = self._allocator.visual
        return visual.free_slabs + visual.evictable_slabs - self._promised_slabs

    @property
    def _most_slabs(self) -> int:
        """What ``_slabs`` would be if no text were there."""
        visual, layout = self._allocator.visual, self._allocator.layout
        return layout.max_visual_slabs - visual.used_slabs + visual.evictable_slabs - self._promised_slabs

    def add_one_req(self, req, has_chunked_req: bool, truncation_align_size: int | None):
        start, end = req.prefix_len, len(req.full_untruncated_fill_ids)
        layout, config = self._allocator.layout, self._allocator.config
        cut = self._cut_into(end - start), config.segment_tokens
        # The host asks for this much besides the prompt.
        answer = min(max(req.sampling_params.max_new_tokens - len(req.output_ids), 0), CLIP_MAX_NEW_TOKENS) + 1
        with self._lock_node(req.last_node):  # its own prefix is not there to be evicted
            place = partial(
                place_images,
                prompt_runs(req),
                start,
                config,
                chunk_tokens=cut[0],
                layout=layout,
            )
            wanted = place(slab_budget=self._most_slabs)
            wanted_slabs = wanted.max_slabs(start, *cut, layout)
            tokens = end - start - wanted.rotated_tokens(start, end) + wanted_slabs * layout.text_rows + answer
            has_chunk = self.rem_chunk_tokens is None or self.rem_chunk_tokens > 0
            if has_chunk and tokens < self.memory_budget.remaining_total:
                self._take_from_text(wanted_slabs)
            slab_budget = self._slabs
        if slab_budget < 0:
            return AddReqResult.OTHER  # its prefix is what an earlier request of this round was promised
        placement = place(slab_budget=slab_budget)
        slabs = placement.max_slabs(start, *cut, layout)
        self._placement = placement
        self.memory_budget.credit = placement.rotated_tokens(start, end) - slabs * layout.text_rows
        result = super().add_one_req(req, has_chunked_req, truncation_align_size)
        self.memory_budget.credit = 0
        if self.can_run_list and self.can_run_list[-1] is req:
            self._promised_slabs += slabs
            self._count(placement)
            request_state(req).placement = placement
        elif result == AddReqResult.NO_TOKEN and self._is_alone() and start:
            # The cached prefix of this very request holds more memory than a cold run would take, and nothing else
            # will give any back. Drop it; the next round admits the request cold.
            self._allocator.stats.prefixes_dropped += 1
            self.tree_cache.make_room(text=layout.text_slots, visual_slabs=layout.max_visual_slabs)
        return result

    def add_chunked_req(self, req):
        start, end = req.prefix_len, len(req.full_untruncated_fill_ids)
        layout, config = self._allocator.layout, self._allocator.config
        placement = request_state(req).placement
        cut = self._cut_into(end - start), config.segment_tokens
        limit = self._longest_chunk(placement, start, min(self.rem_chunk_tokens, end - start))
        self._promised_slabs += placement.max_slabs(start, *cut, layout)
        if limit <= 0:
            self.rem_chunk_tokens = 0  # parked: no other request may start a chunk; decode goes on and frees memory
            if self._is_alone():
                self._abort_stranded(req)
            return req
        withheld = self.rem_chunk_tokens - limit
        self.rem_chunk_tokens = limit
        # Only ``limit`` bounds the chunk: the host's reserve for running requests would cut an image into more
        # segments than it was given slabs for.
        self._placement, self.memory_budget.credit = placement, UNBOUNDED
        result = super().add_chunked_req(req)
        self.memory_budget.credit = 0
        self.rem_chunk_tokens += withheld
        return result

    def _update_prefill_budget(self, *args, **kwargs) -> None:
        super()._update_prefill_budget(*args, **kwargs)
        req, layout = self.can_run_list[-1], self._allocator.layout
        tokens = self._placement.rotated_tokens(req.prefix_len, req.extend_end)
        slabs = self._placement.slabs(req.prefix_len, req.extend_end, self._allocator.config.segment_tokens, layout)
        self.memory_budget.refund(tokens - slabs * layout.text_rows)
        self.memory_budget.credit = 0

    def _abort_stranded(self, req) -> None:
        """End a prefill that can never go on, which the host would wait for for ever. It takes a prompt that fills the
        memory almost alone, and text of its own in so many slabs that the rest of an image finds none; or another request
        that computed the same image at full width. The host acts on the marker at its next step."""
        if self._scheduler._pending_chunked_abort_req is not None:
            return
        self._allocator.stats.requests_stranded += 1
        message = f"RotateK: request {req.rid} is alone and finds no KV memory for the rest of its prompt."
        logger.error("%s It is aborted.", message)
        req.discard_output_reason = FINISH_ABORT(
            f"{message} Shorten the prompt, or start the server with more KV memory.", HTTPStatus.SERVICE_UNAVAILABLE
        )
        self._scheduler._pending_chunked_abort_req = req

    def _take_from_text(self, slabs: int) -> None:
        """When images and free slabs together cannot give ``slabs``, let cached text go for them."""
        if self._slabs < slabs <= self._most_slabs:
            self.tree_cache.make_room(visual_slabs=self._promised_slabs + slabs)

    def _longest_chunk(self, placement: Placement, start: int, limit: int) -> int:
        """The most tokens of a chunk for which there is memory. What is left of an image goes on at full width when
        there is memory for that, but not in slabs: text can use free rows between others, an image cannot."""
        layout, segment_tokens = self._allocator.layout, self._allocator.config.segment_tokens
        slabs = placement.slabs(start, start + limit, segment_tokens, layout)
        if slabs * layout.text_rows <= self.tree_cache.text_reachable_size():
            self._take_from_text(slabs)
        while True:
            length, text_left = placement.longest_extend(
                start,
                limit,
                self.tree_cache.text_reachable_size(),
                self._slabs,
                segment_tokens,
                layout,
            )
            position = start + length
            run = placement.run_at(position) if length < limit else None
            if run is None or run.end - position > text_left:
                return length
            placement.rotated.remove(run)
            self._allocator.stats.full_width(NO_SLABS, run.end - position)

    def _cut_into(self, num_tokens: int) -> int | None:
        """The chunk size when ``num_tokens`` do not fit into this round's chunk, else None."""
        return self._chunk_tokens if self._chunk_tokens and num_tokens > self.rem_chunk_tokens else None

    def _count(self, placement: Placement) -> None:
        stats = self._allocator.stats
        stats.images_compressed += len(placement.rotated)
        for reason, tokens in placement.full_width:
            stats.full_width(reason, tokens)

    def _is_alone(self) -> bool:
        return not self.can_run_list and (self.running_batch is None or self.running_batch.is_empty())
