"""Which requests fit: a text budget and a visual budget behind the host's single number."""

from __future__ import annotations

from sglang.srt.managers.schedule_policy import AddReqResult, PrefillAdder

from .allocator import RotateKAllocator
from .config import RotateKConfig
from .radix_cache import request_state
from .segments import ImageRun, Placement, image_runs, max_segments
from .stats import BASIS_POOL_FULL, TOO_SHORT, VISUAL_POOL_FULL

UNBOUNDED = 1 << 40


def place_images(
    runs: list[ImageRun],
    start: int,
    config: RotateKConfig,
    *,
    visual_budget: int,
    basis_budget: int,
    chunk_tokens: int | None,
) -> Placement:
    """Decide which image runs take visual slots for the tokens from ``start`` on.

    An image stays at full width when it is short, or when the visual pool cannot take it: always correct, only
    larger. The decision is per image, so how the prefill is cut changes no token's pool.
    """
    placement = Placement([])
    for run in runs:
        tokens = run.end - max(run.start, start)
        if tokens <= 0:
            continue
        bases = max_segments(run, start, chunk_tokens, config.segment_tokens)
        if len(run) < config.min_image_tokens:
            placement.full_width.append((TOO_SHORT, tokens))
        elif tokens > visual_budget:
            placement.full_width.append((VISUAL_POOL_FULL, tokens))
        elif bases > basis_budget:
            placement.full_width.append((BASIS_POOL_FULL, tokens))
        else:
            placement.rotated.append(run)
            visual_budget -= tokens
            basis_budget -= bases
    return placement


class RotateKPrefillAdder(PrefillAdder):
    """Budgets count text slots; a request's visual tokens are credited, and charged to the visual budget.

    The class takes the host's place in every server, so each method returns to the host's at once when the
    allocator is not RotateK's.
    """

    def __init__(self, *args, **kwargs) -> None:
        super().__init__(*args, **kwargs)
        self._allocator = self.token_to_kv_pool_allocator
        self._rotatek = isinstance(self._allocator, RotateKAllocator)
        self._credit = 0
        self._visual_offset = 0
        self._basis_offset = 0
        self._placement = Placement([])
        self._chunk_tokens = self.rem_chunk_tokens

    @property
    def _text_tokens(self) -> int:
        """Text slots that are free or can be freed, those promised to this round's requests included."""
        return self._allocator.text_available_size() + self.tree_cache.text_evictable_size()

    @property
    def rem_total_tokens(self):
        if not self._rotatek:
            return super().rem_total_tokens
        return self._text_tokens + self._credit - self.rem_total_token_offset

    @property
    def cur_rem_tokens(self):
        if not self._rotatek:
            return super().cur_rem_tokens
        return self._text_tokens + self._credit - self.cur_rem_token_offset

    def add_one_req(self, req, has_chunked_req: bool, truncation_align_size: int | None):
        if not self._rotatek:
            return super().add_one_req(req, has_chunked_req, truncation_align_size)
        start, end = len(req.prefix_indices), len(req.full_untruncated_fill_ids)
        visual, config = self._allocator.visual, self._allocator.config
        chunk_tokens = self._cut_into(end - start)
        with self._lock_node(req.last_node):  # its own prefix is not there to be evicted
            visual_budget = visual.free + visual.evictable - self._visual_offset
            basis_budget = visual.free_bases + visual.evictable_bases - self._basis_offset
        if visual_budget < 0 or basis_budget < 0:
            return AddReqResult.OTHER  # its prefix is what an earlier request of this round was promised
        placement = place_images(
            image_runs(req.full_untruncated_fill_ids),
            start,
            config,
            visual_budget=visual_budget,
            basis_budget=basis_budget,
            chunk_tokens=chunk_tokens,
        )
        self._placement, self._credit = placement, placement.rotated_tokens(start, end)
        result = super().add_one_req(req, has_chunked_req, truncation_align_size)
        self._credit = 0
        if self.can_run_list and self.can_run_list[-1] is req:
            self._charge_visual(placement, start, end, chunk_tokens)
            self._count(placement)
            request_state(req).placement = placement
        elif result == AddReqResult.NO_TOKEN and self._is_alone() and start:
            # The cached prefix of this very request holds more text slots or bases than a cold run would take,
            # and nothing else will give any back. Drop it; the next round admits the request cold.
            self._allocator.stats.prefixes_dropped += 1
            layout = self._allocator.layout
            self.tree_cache.make_room(text=layout.text_slots, visual=layout.visual_slots, bases=layout.num_bases)
            return AddReqResult.OTHER
        return result

    def add_chunked_req(self, req):
        if not self._rotatek:
            return super().add_chunked_req(req)
        start, end = len(req.prefix_indices), len(req.full_untruncated_fill_ids)
        placement = request_state(req).placement
        self._charge_visual(placement, start, end, self._cut_into(end - start))
        limit = placement.longest_extend(start, self.rem_chunk_tokens, self._text_tokens)
        if limit <= 0:
            self.rem_chunk_tokens = 0  # parked: no other request may start a chunk; decode goes on and frees text
            request_state(req).is_stranded = self._is_alone()
            return req
        withheld = self.rem_chunk_tokens - limit
        self.rem_chunk_tokens = limit
        # Only ``limit`` bounds the chunk: the host's reserve for running requests would cut an image into more
        # segments than it was given bases for.
        self._placement, self._credit = placement, UNBOUNDED
        result = super().add_chunked_req(req)
        self._credit = 0
        self.rem_chunk_tokens += withheld
        return result

    def _update_prefill_budget(self, *args, **kwargs) -> None:
        super()._update_prefill_budget(*args, **kwargs)
        if self._rotatek:
            extend = self.can_run_list[-1].extend_range
            tokens = self._placement.rotated_tokens(extend.start, extend.end)
            self.rem_total_token_offset -= tokens
            self.cur_rem_token_offset -= tokens
            self._credit = 0

    def _charge_visual(self, placement: Placement, start: int, end: int, chunk_tokens: int | None) -> None:
        self._visual_offset += placement.rotated_tokens(start, end)
        self._basis_offset += placement.max_segments(start, chunk_tokens, self._allocator.config.segment_tokens)

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
