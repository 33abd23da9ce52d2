"""Which requests fit, when an image token takes less memory than the host believes."""

from __future__ import annotations

import logging
from http import HTTPStatus
from typing import TYPE_CHECKING, Any

from sglang.srt.managers.schedule_batch import FINISH_ABORT
from sglang.srt.managers.schedule_policy import AddReqResult, PrefillAdder
from sglang.srt.mem_cache.common import match_kv_cache

from ..kernels.partition import max_runs
from ..stats import NO_SLABS
from .placement import UNBOUNDED, place_images, prompt_runs
from .segments import Placement
from .tier import Price

if TYPE_CHECKING:
    from sglang.srt.managers.schedule_batch import Req
    from sglang.srt.managers.scheduler import Scheduler

logger = logging.getLogger(__name__)


class RotateKPrefillAdder(PrefillAdder):
    """Counts an image as the slabs that it takes. It frees nothing: whatever an admitted batch
    needs is evicted when the batch takes its rows."""

    rem_chunk_tokens: Any  # int, or None where the host cuts no prefill

    def __init__(self, *args: Any, scheduler: Scheduler, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._scheduler = scheduler
        self._layout = self.token_to_kv_pool_allocator.layout
        self._slabs = self.token_to_kv_pool_allocator.slabs
        self._config = self.token_to_kv_pool_allocator.config
        self._stats = self.token_to_kv_pool_allocator.stats
        self._promised = 0  # slabs of the images of this round
        self._placement = Placement([], self._layout)  # of the request that is being admitted
        self._chunk_tokens = self.rem_chunk_tokens
        # That the device's table of a request holds (kernels/partition.py).
        self._most_segments = max_runs(self.tree_cache.req_to_token_pool.req_to_token.shape[1])

    @property
    def _allowed_for_images(self) -> int:
        """Slabs that images may take, cached ones evicted, and that are promised to nobody."""
        return self._slabs.allowed_for_images + self._slabs.evictable_of_images - self._promised

    def _place(self, req: Req) -> tuple[Placement, int]:
        """Where the images of a request go, and the slabs that they take at most."""
        placement, slabs = self._place_within(req, self._slabs.allowed_for_images - self._promised)
        if (
            any(reason == NO_SLABS for reason, _ in placement.full_width)
            and self._slabs.evictable_of_images
        ):
            with self._lock_node(req.last_node):  # its own prefix is not there to be evicted
                placement, slabs = self._place_within(req, self._allowed_for_images)
        return placement, slabs

    def _place_within(self, req: Req, slab_budget: int) -> tuple[Placement, int]:
        start, end = req.prefix_len + req.host_hit_length, len(req.full_untruncated_fill_ids)
        chunk_tokens, load = self._cut_into(end - start), self._price_of_load(req)
        placement = place_images(
            prompt_runs(req),
            start,
            self._config,
            slab_budget=slab_budget - load.of_images,
            chunk_tokens=chunk_tokens,
            layout=self._layout,
            segment_budget=self._most_segments
            - self.tree_cache.segments_of(req.last_node)
            - load.segments,
        )
        return placement, placement.max_slabs(start, chunk_tokens)

    def _price_of_load(self, req: Req) -> Price:
        """Of what the host's memory has of the request."""
        if not req.host_hit_length:
            return Price()
        return self.tree_cache.tier.price(req.best_match_node, req.prefix_len)

    def _compute_instead(self, req: Req) -> None:
        """Do without what the host's memory has of the request."""
        req.host_hit_length = req.host_loaded_length = 0

    def _credit(self, req: Req, placement: Placement, slabs: int) -> int:
        """What the host's count of its tokens, all text, is above what it takes: its images and
        what is loaded less, and the rest of its last slab of text more."""
        start = req.prefix_len + req.host_hit_length
        tokens = (
            placement.rotated_tokens(start, len(req.full_untruncated_fill_ids))
            + req.host_hit_length
        )
        return tokens - (slabs + self._price_of_load(req).slabs + 1) * self._layout.text_rows

    def add_one_req(
        self, req: Req, has_chunked_req: bool, truncation_align_size: int | None
    ) -> AddReqResult:
        if self._promised > self._slabs.allowed_for_images:
            with self._lock_node(req.last_node):
                if self._allowed_for_images < 0:
                    # Its prefix is what an earlier request of this round was promised.
                    return AddReqResult.OTHER
        is_declined = False
        if req.host_hit_length:
            can_load = self._can_load(req)
            if can_load is None:
                return AddReqResult.NO_TOKEN
            if not can_load:
                is_declined = True
                self._compute_instead(req)
        result, placement, slabs = self._try(req, has_chunked_req, truncation_align_size)
        if result == AddReqResult.NO_TOKEN and req.host_hit_length and self._is_alone():
            is_declined = True
            self._compute_instead(req)
            result, placement, slabs = self._try(req, has_chunked_req, truncation_align_size)
        if self.can_run_list and self.can_run_list[-1] is req:
            self._admit(req, placement, slabs)
            self._stats.loads_declined += is_declined
        elif result == AddReqResult.NO_TOKEN and self._is_alone():
            self._drop_prefix(req)
        return result

    def _can_load(self, req: Req) -> bool | None:
        """Whether there is room for what the host's memory has of the request; None where running
        requests hold slabs that they will give back."""
        price = self._price_of_load(req)
        segments = self.tree_cache.segments_of(req.last_node) + price.segments
        with self._lock_node(req.last_node):
            missing = price.of_images - self._allowed_for_images
        is_momentary = 0 < missing and price.of_images <= self._layout.max_visual_slabs
        if is_momentary and not self._is_alone():
            return None
        return missing <= 0 and segments <= self._most_segments

    def _admit(self, req: Req, placement: Placement, slabs: int) -> None:
        self._promised += slabs
        self._stats.images_compressed += len(placement.rotated)
        for reason, tokens in placement.full_width:
            self._stats.full_width(reason, tokens)
        self.tree_cache.place(req, placement)

    def _drop_prefix(self, req: Req) -> None:
        """Of a request that is alone and finds no room. Nothing else will give memory back, and its
        own cached prefix, which it keeps from being evicted, may hold more than a cold run would
        take. The next round admits it with less of it."""
        if req.prefix_len and not req.last_node.lock_ref:
            self._stats.prefixes_dropped += 1
            self.tree_cache.drop_branch(req.last_node)

    def _try(
        self, req: Req, has_chunked_req: bool, truncation_align_size: int | None
    ) -> tuple[AddReqResult, Placement, int]:
        """The host's ``add_one_req``, with where the images go and the slabs that they take at
        most."""
        placement, slabs = self._place(req)
        self._placement, self.memory_budget.credit = placement, self._credit(req, placement, slabs)
        result = super().add_one_req(req, has_chunked_req, truncation_align_size)
        self.memory_budget.credit = 0
        return result, placement, slabs

    def preempt_to_schedule(self, req: Req) -> bool:
        # The host asks before it has looked the request up in this round: what an earlier one found
        # may be evicted.
        req.refresh_fill_ids()
        ids = req.full_untruncated_fill_ids
        if req.positional_embed_overrides is None:
            match_kv_cache(
                req, self.tree_cache, ids, max_prefix_len=req._compute_max_prefix_len(len(ids))
            )
        else:  # as the host does: never shared
            match_kv_cache(req, self.tree_cache, ids[:0])
        placement, slabs = self._place(req)
        self.memory_budget.credit = self._credit(req, placement, slabs)
        try:
            return super().preempt_to_schedule(req)
        finally:
            self.memory_budget.credit = 0

    def add_chunked_req(self, req: Req) -> Req | None:
        start, end = req.prefix_len, len(req.full_untruncated_fill_ids)
        placement = self.tree_cache.placement_of(req)
        slabs = placement.max_slabs(start, self._cut_into(end - start))
        limit = self._longest_chunk(req, placement, min(self.rem_chunk_tokens, end - start))
        if limit <= 0 and self._is_alone():
            # Nobody else will give images room, so the rest of them does without.
            for run in placement.rotated:
                if run.end > start:
                    self._stats.full_width(NO_SLABS, run.end - max(run.start, start))
            placement.rotated.clear()
            limit = self._longest_chunk(req, placement, min(self.rem_chunk_tokens, end - start))
        self._promised += slabs
        if limit <= 0:
            # Parked: no other request may start a chunk; decode goes on and frees memory.
            self.rem_chunk_tokens = 0
            if self._is_alone():
                self._abort_stranded(req)
            return req
        withheld = self.rem_chunk_tokens - limit
        self.rem_chunk_tokens = limit
        # Only ``limit`` bounds the chunk: the host's reserve for running requests would cut an
        # image into more segments than it was given slabs for.
        self._placement, self.memory_budget.credit = placement, UNBOUNDED
        result = super().add_chunked_req(req)
        self.memory_budget.credit = 0
        self.rem_chunk_tokens += withheld
        return result

    def _longest_chunk(self, req: Req, placement: Placement, limit: int) -> int:
        """The most tokens, up to ``limit``, of a chunk for which there is memory."""
        return placement.longest_extend(
            req.prefix_len,
            limit,
            slabs=self._slabs.reachable,
            slabs_of_images=self._allowed_for_images,
            open_rows=self.tree_cache.requests.open_rows(req.kv.req_pool_idx),
        )

    def _update_prefill_budget(self, *args: Any, **kwargs: Any) -> None:
        """What the host reserved for the batch's part of the request is for text."""
        super()._update_prefill_budget(*args, **kwargs)
        req = self.can_run_list[-1]
        tokens, slabs = self._placement.visual(req.prefix_len, req.extend_end)
        self.memory_budget.refund(tokens - (slabs + 1) * self._layout.text_rows)
        self.memory_budget.credit = 0

    def _abort_stranded(self, req: Req) -> None:
        """End a prefill that can never go on, which the host would wait for for ever: a prompt that
        fills the memory almost alone, and that another request has computed with images at full
        width. The host acts on the marker at its next step."""
        if self._scheduler._pending_chunked_abort_req is not None:
            return
        self._stats.requests_stranded += 1
        message = (
            f"RotateK: request {req.rid} is alone and finds no KV memory for the rest of its "
            "prompt."
        )
        logger.error("%s It is aborted.", message)
        req.discard_output_reason = FINISH_ABORT(
            f"{message} Shorten the prompt, or start the server with more KV memory.",
            HTTPStatus.SERVICE_UNAVAILABLE,
        )
        self._scheduler._pending_chunked_abort_req = req

    def _cut_into(self, num_tokens: int) -> int | None:
        """The chunk size when ``num_tokens`` do not fit into this round's chunk, else None."""
        return (
            self._chunk_tokens
            if self._chunk_tokens and num_tokens > self.rem_chunk_tokens
            else None
        )

    def _is_alone(self) -> bool:
        return not self.can_run_list and (
            self.running_batch is None or self.running_batch.is_empty()
        )
