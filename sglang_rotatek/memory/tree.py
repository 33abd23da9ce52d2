"""The radix cache: the tree of slabs (slab_tree.py), and the rows of running requests, which become
its nodes'."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

import numpy as np
import torch
from sglang.srt.mem_cache.base_prefix_cache import MatchPrefixParams, MatchResult
from sglang.srt.mem_cache.radix_cache import RadixKey, TreeNode

from ..basis import QUERY_WINDOW
from ..stats import NO_SLABS
from .allocator import RotateKAllocator
from .prefill import PrefillLayout, Segment
from .requests import RequestRows
from .rows import Span, use_of
from .segments import PAD_PERIOD, Placement
from .slab_tree import Held, SlabTree

if TYPE_CHECKING:
    from sglang.srt.managers.schedule_batch import Req
    from sglang.srt.mem_cache.cache_init_params import CacheInitParams

    from .tier import HostTier


class RotateKRadixCache(SlabTree):
    """``requests``: what running requests hold. ``tier``: see TieredRadixCache, else None."""

    token_to_kv_pool_allocator: RotateKAllocator
    tier: HostTier | None = None

    def __init__(self, params: CacheInitParams) -> None:
        allocator: RotateKAllocator = params.token_to_kv_pool_allocator
        self.stats = allocator.stats
        self.inexact, self.tells_images = allocator.inexact, allocator.config.max_error is not None
        num_requests = len(params.req_to_token_pool.req_to_token)
        self.requests = RequestRows(allocator.layout, allocator.slabs, num_requests)
        # Of requests that are admitted and have no row yet.
        self._placements: WeakKeyDictionary[Req, Placement] = WeakKeyDictionary()
        # Requests whose slots in req_to_token were replaced since a forward looked at them
        # (kernels/partition.py).
        self.rewritten: set[int] = set()
        # Segments that a load has brought (TieredRadixCache), [(slots, basis), ...], and that no
        # forward has bound yet.
        self._unbound: list[tuple[np.ndarray, int]] = []
        self._checked_state: tuple[int, ...] | None = None
        super().__init__(params, allocator.slabs)
        allocator.tree_cache = self

    def reset(self) -> None:
        super().reset()
        self.requests.clear()
        self._placements.clear()
        self.rewritten.clear()
        self._unbound.clear()

    # --- requests take rows -----------------------------------------------------------------------

    def place(self, req: Req, placement: Placement) -> None:
        """Where the images of an admitted request go; until it ends."""
        self._placements[req] = placement

    def placement_of(self, req: Req) -> Placement:
        if req.kv.holds_kv:
            return self.requests.placement(req.kv.req_pool_idx)
        return self._placements[req]

    def begin(self, req: Req) -> None:
        """An admitted request has got a row of the host's table; the tree locks its prefix for
        it."""
        held, open_slab = req.last_node.held, None
        if held.open_row is not None:
            open_slab = int(held.spans[-1].slabs[-1]), held.open_row
            held.open_row = None
        placement = self._placements.pop(req, None) or Placement([], self.layout)
        self.requests.begin(req.kv.req_pool_idx, placement, open_slab)

    def take_for_prefill(self, reqs: list[Req]) -> np.ndarray:
        """Slots [n] int64 for the tokens that the batch computes: [prefix_len, extend_end) of each
        request, all begun.

        Admission made sure that slabs are there or can be evicted. A segment that finds none stays
        at full width, and is counted.
        """
        slabs, of_images = 0, 0
        for req in reqs:
            tokens, images = self.placement_of(req).visual(req.prefix_len, req.extend_end)
            text = req.extend_end - req.prefix_len - tokens
            slabs += images + self.requests.slabs_for_text(req.kv.req_pool_idx, text)
            of_images += images
        self.make_room(slabs, of_images=of_images)
        taken = []
        for req in reqs:
            index, at, spans = req.kv.req_pool_idx, req.prefix_len, []
            for low, high in self.requests.placement(index).segments(at, req.extend_end):
                if self.layout.slabs_of(high - low) > min(
                    self.slabs.free, self.slabs.allowed_for_images
                ):
                    self.stats.full_width(NO_SLABS, high - low)
                    continue
                if at < low:
                    spans.append(self._take_text(index, at, low - at))
                spans.append(self.requests.take_segment(index, low, high - low))
                at = high
            if at < req.extend_end:
                spans.append(self._take_text(index, at, req.extend_end - at))
            self.slabs.hold(use_of(spans, self.layout))
            taken += spans
        return np.concatenate([span.slots(self.layout) for span in taken])

    def _take_text(self, index: int, start: int, num_tokens: int) -> Span:
        # Enough are free, unless a segment stayed at full width.
        self.make_room(self.requests.slabs_for_text(index, num_tokens))
        return self.requests.take_text(index, start, num_tokens)

    def prefill_layout(
        self, reqs: list[Req], prefix_lens: list[int], extend_lens: list[int]
    ) -> PrefillLayout:
        """Of the extend batch that has just got its slots."""
        layout = PrefillLayout(sum(extend_lens), loaded=self._unbound)
        self._unbound = []
        first = 0
        for req, start, length in zip(reqs, prefix_lens, extend_lens, strict=True):
            window = first + max(0, length - QUERY_WINDOW), first + length
            for span in self.requests.spans(req.kv.req_pool_idx):
                if not span.is_text and start <= span.start < start + length:
                    slots = span.slots(self.layout)
                    ids = (
                        req.full_untruncated_fill_ids[span.start : span.start + PAD_PERIOD]
                        if self.tells_images
                        else ()
                    )
                    layout.segments.append(
                        Segment(first + span.start - start, slots, span.basis, window, tuple(ids))
                    )
            first += length
        return layout

    def take_rewritten(self, indices: Sequence[int]) -> list[int]:
        """Those of the requests whose slots were replaced since they were asked for the last
        time."""
        found = [index for index in indices if index in self.rewritten] if self.rewritten else []
        self.rewritten.difference_update(found)
        return found

    def take_for_decode(self, indices: np.ndarray, positions: list[int]) -> np.ndarray:
        """Slots [n] int64 of the next token of each request."""
        self.make_room(self.requests.slabs_for_decode(indices))
        return self.requests.take_one_each(indices, positions)

    # --- requests hand rows over, or give them back -----------------------------------------------

    def checkpoint(self, req: Req, *, up_to: int) -> None:
        """The host's, with records: the tree gets the tokens [0, up_to) of a request, and the
        request reads the tree's from now on.

        - [0, cache_protected_len) has been the tree's since the last time.
        - [cache_protected_len, found): others have computed it meanwhile. Theirs stays.
        - [found, up_to) becomes a node's.
        """
        index, kv, priority = req.kv.req_pool_idx, req.kv, req.priority or 0
        token_ids = req.full_untruncated_fill_ids[:up_to]
        key = RadixKey(token_ids, req.extra_key, cache_salt=req.cache_salt)
        self.drop_inexact(key, self.inexact)  # in favour of what the request has at full width
        row = self.req_to_token_pool.req_to_token[index, : len(key)]
        values = row.to(dtype=torch.int64, copy=True)
        found, node = self._insert_helper(
            self.root_node, key, values, priority, kv.cache_inserted_len
        )
        kv.cache_inserted_len = max(kv.cache_inserted_len, len(key))
        self.requests.release(index, kv.cache_protected_len, found)
        if found < len(key):
            spans, use = self.requests.hand_over(index, found, len(key))
            node.held = Held([span.moved(-found) for span in spans], use)
        prompt_tokens = len(req.origin_input_ids)
        if 0 < prompt_tokens < len(key):
            # Only cuts a node there, so that eviction can drop an answer without its prompt. What
            # ends at the end of the key stays ``node``.
            prompt = RadixKey(token_ids[:prompt_tokens], req.extra_key, cache_salt=req.cache_salt)
            self._insert_helper(
                self.root_node, prompt, values[:prompt_tokens], priority + 1, prompt_tokens
            )
        if found > kv.cache_protected_len:
            own = slice(kv.cache_protected_len, found)
            self.req_to_token_pool.write((index, own), self.path_device_indices(node)[own])
            self.rewritten.add(index)
        kv.cache_protected_len = len(key)
        self.unlock(req.lock)
        req.lock = self.lock(node)
        req.last_node = node

    def free_kv_row(self, kv: Any, ranges: list[tuple[int, int]]) -> None:
        for start, end in ranges:
            self.requests.release(kv.req_pool_idx, start, end)

    def on_release(self, req: Req, *, checkpointed: bool) -> None:
        self.rewritten.discard(req.kv.req_pool_idx)
        open_slab, held = self.requests.end(req.kv.req_pool_idx), req.last_node.held
        if open_slab is None or not held.spans:
            return
        last = held.spans[-1]
        next_row = last.next_row(self.layout)
        if last.is_text and (int(last.slabs[-1]), next_row) == open_slab:
            held.open_row = next_row

    # --- lookup -----------------------------------------------------------------------------------

    def match_prefix(self, params: MatchPrefixParams) -> MatchResult:
        """The host's, up to the first image that is stored narrow and known to be inexact."""
        return self.match_exact(params.key, self.inexact)

    # --- checks -----------------------------------------------------------------------------------

    def check_integrity_once(self) -> None:
        """``check_integrity`` of an idle server, skipped while nothing changed since the last
        one."""
        state = (
            TreeNode.counter,
            self.slabs.text_tokens,
            self.slabs.visual_tokens,
            self.slabs.free,
        )
        if state != self._checked_state:
            self.check_integrity()
            self._checked_state = state
            self.stats.integrity_checks += 1

    def check_integrity(self, *, idle: bool = True) -> None:
        """AssertionError unless the records of tree and requests explain every count, and tell the
        slots of the tree. ``idle``: no request holds rows."""
        held, locked = self.check_nodes(idle=idle)
        of_requests = [
            use_of(self.requests.spans(index), self.layout) for index in self.requests.indices()
        ]
        assert not (idle and of_requests), "a request holds rows while the server is idle"
        self.slabs.check_integrity(held + of_requests, locked + of_requests)
