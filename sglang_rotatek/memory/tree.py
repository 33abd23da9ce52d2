"""The radix cache: the host's tree, with the record of rows (rows.py) on each node, and eviction by slabs."""

from __future__ import annotations

import heapq
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from weakref import WeakKeyDictionary

import numpy as np
import torch
from sglang.srt.mem_cache.base_prefix_cache import EvictParams, EvictResult, MatchPrefixParams, MatchResult
from sglang.srt.mem_cache.radix_cache import RadixCache, RadixKey, TreeNode

from ..basis import QUERY_WINDOW
from ..stats import NO_SLABS
from .allocator import RotateKAllocator
from .prefill import PrefillLayout, Segment
from .requests import RequestRows
from .rows import Span, Use, cut_spans, use_of
from .segments import PAD_PERIOD, Placement


@dataclass
class Held:
    """What a node holds: spans with positions counted from its start, and what they take. ``open_row``: the first row
    behind the last token that the request of the node took and did not fill, or None; the next turn of the chat may."""

    spans: list[Span] = field(default_factory=list)
    use: Use = field(default_factory=lambda: Use(np.empty(0, np.int64), np.empty(0, np.int64), 0, 0))
    open_row: int | None = None


class RotateKRadixCache(RadixCache):
    """``requests``: what running requests hold. Of the host's tree, nodes carry ``held``."""

    token_to_kv_pool_allocator: RotateKAllocator

    def __init__(self, params) -> None:
        allocator: RotateKAllocator = params.token_to_kv_pool_allocator
        self.layout, self.slabs, self.stats = allocator.layout, allocator.slabs, allocator.stats
        self.inexact, self.tells_images = allocator.inexact, allocator.config.max_error is not None
        num_requests = len(params.req_to_token_pool.req_to_token)
        self.requests = RequestRows(self.layout, self.slabs, num_requests)
        # Of requests that are admitted and have no row yet.
        self._placements: WeakKeyDictionary = WeakKeyDictionary()
        # Requests whose slots in req_to_token were replaced since a forward looked at them (kernels/partition.py).
        self.rewritten: set[int] = set()
        self._checked_state: tuple[int, ...] | None = None
        super().__init__(params)
        allocator.tree_cache = self

    def reset(self) -> None:
        super().reset()
        self.root_node.held = Held()
        self.requests.clear()
        self._placements.clear()
        self.rewritten.clear()
        self.slabs.clear()

    @property
    def reachable_tokens(self) -> int:
        """Free and evictable slabs, as the text tokens that they could hold."""
        return self.slabs.reachable * self.layout.text_rows

    # --- requests take rows -----------------------------------------------------------------------------

    def place(self, req, placement: Placement) -> None:
        """Where the images of an admitted request go; until it ends."""
        self._placements[req] = placement

    def segments_of(self, node: TreeNode) -> int:
        """Segments, or parts of some, on the path to ``node``."""
        return sum(not span.is_text for each in self._path(node) for span in each.held.spans)

    def placement_of(self, req) -> Placement:
        if req.kv.holds_kv:
            return self.requests.placement(req.kv.req_pool_idx)
        return self._placements[req]

    def begin(self, req) -> None:
        """An admitted request has got a row of the host's table; the tree locks its prefix for it."""
        held, open_slab = req.last_node.held, None
        if held.open_row is not None:
            open_slab = int(held.spans[-1].slabs[-1]), held.open_row
            held.open_row = None
        self.requests.begin(req.kv.req_pool_idx, self._placements.pop(req, Placement()), open_slab)

    def take_for_prefill(self, reqs: list) -> np.ndarray:
        """Slots [n] int64 for the tokens that the batch computes: [prefix_len, extend_end) of each request, all begun.

        Admission made sure that slabs are there or can be evicted. A segment that finds none stays at full width, and is
        counted.
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
                if self.layout.slabs_of(high - low) > min(self.slabs.free, self.slabs.allowed_for_images):
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

    def prefill_layout(self, reqs: list, prefix_lens: list[int], extend_lens: list[int]) -> PrefillLayout:
        """Of the extend batch that has just got its slots."""
        layout = PrefillLayout(sum(extend_lens))
        first = 0
        for req, start, length in zip(reqs, prefix_lens, extend_lens):
            window = first + max(0, length - QUERY_WINDOW), first + length
            for span in self.requests.spans(req.kv.req_pool_idx):
                if not span.is_text and start <= span.start < start + length:
                    slots = span.slots(self.layout)
                    ids = req.full_untruncated_fill_ids[span.start : span.start + PAD_PERIOD] if self.tells_images else ()
                    layout.segments.append(Segment(first + span.start - start, slots, span.basis, window, tuple(ids)))
            first += length
        return layout

    def take_rewritten(self, indices: Sequence[int]) -> list[int]:
        """Those of the requests whose slots were replaced since they were asked for the last time."""
        found = [index for index in indices if index in self.rewritten] if self.rewritten else []
        self.rewritten.difference_update(found)
        return found

    def take_for_decode(self, indices: np.ndarray, positions: list[int]) -> np.ndarray:
        """Slots [n] int64 of the next token of each request."""
        self.make_room(self.requests.slabs_for_decode(indices))
        return self.requests.take_one_each(indices, positions)

    # --- requests hand rows over, or give them back -----------------------------------------------------

    def checkpoint(self, req, *, up_to: int) -> None:
        """The host's, with records: the tree gets the tokens [0, up_to) of a request, and the request reads the tree's from now on."""
        index, kv, priority = req.kv.req_pool_idx, req.kv, req.priority or 0
        token_ids = req.full_untruncated_fill_ids[:up_to]
        key = RadixKey(token_ids, req.extra_key, cache_salt=req.cache_salt)
        if len(self.inexact):
            inexact, _ = self._first_inexact(super().match_prefix(MatchPrefixParams(key=key)))
            if inexact is not None and not inexact.lock_ref:
                self.drop_branch(inexact)  # in favour of what the request has at full width
        row = self.req_to_token_pool.req_to_token[index, : len(key)]
        values = row.to(dtype=torch.int64, copy=True)
        found, node = self._insert_helper(self.root_node, key, values, priority, kv.cache_inserted_len)
        kv.cache_inserted_len = max(kv.cache_inserted_len, len(key))
        # Others have computed [protected, found) meanwhile: theirs stay.
        self.requests.release(index, kv.cache_protected_len, found)
        if found < len(key):
            spans, use = self.requests.hand_over(index, found, len(key))
            node.held = Held([span.moved(-found) for span in spans], use)
        prompt_tokens = len(req.origin_input_ids)
        if 0 < prompt_tokens < len(key):
            # Only cuts a node there, so that eviction can drop an answer without its prompt. What ends at the end of the
            # key stays ``node``.
            prompt = RadixKey(token_ids[:prompt_tokens], req.extra_key, cache_salt=req.cache_salt)
            self._insert_helper(self.root_node, prompt, values[:prompt_tokens], priority + 1, prompt_tokens)
        if found > kv.cache_protected_len:
            own = slice(kv.cache_protected_len, found)
            self.req_to_token_pool.write((index, own), self.path_device_indices(node)[own])
            self.rewritten.add(index)
        kv.cache_protected_len = len(key)
        self.unlock(req.lock)
        req.lock = self.lock(node)
        req.last_node = node

    def free_kv_row(self, kv, ranges: list[tuple[int, int]]) -> None:
        for start, end in ranges:
            self.requests.release(kv.req_pool_idx, start, end)

    def on_release(self, req, *, checkpointed: bool) -> None:
        self.rewritten.discard(req.kv.req_pool_idx)
        open_slab, held = self.requests.end(req.kv.req_pool_idx), req.last_node.held
        if open_slab is None or not held.spans:
            return
        last = held.spans[-1]
        next_row = last.next_row(self.layout)
        if last.is_text and (int(last.slabs[-1]), next_row) == open_slab:
            held.open_row = next_row

    def _split_node(self, key, child: TreeNode, split_len: int) -> TreeNode:
        held, length = child.held, len(child.key)
        upper = super()._split_node(key, child, split_len)
        above = cut_spans(held.spans, 0, split_len, self.layout)
        below = [span.moved(-split_len) for span in cut_spans(held.spans, split_len, length, self.layout)]
        upper.held = Held(above, use_of(above, self.layout))
        child.held = Held(below, use_of(below, self.layout), held.open_row)
        return upper

    # --- locks ------------------------------------------------------------------------------------------

    def inc_lock_ref(self, node: TreeNode):
        for each in self._path(node):
            if each.lock_ref == 0:
                self.slabs.lock(each.held.use)
        return super().inc_lock_ref(node)

    def dec_lock_ref(self, node: TreeNode, params=None):
        for each in self._path(node):
            if each.lock_ref == 1:
                self.slabs.unlock(each.held.use)
        return super().dec_lock_ref(node, params)

    def _path(self, node: TreeNode) -> Iterator[TreeNode]:
        while node is not self.root_node:
            yield node
            node = node.parent

    # --- lookup -----------------------------------------------------------------------------------------

    def match_prefix(self, params: MatchPrefixParams) -> MatchResult:
        """The host's, up to the first image that is stored narrow and known to be inexact."""
        result = super().match_prefix(params)
        node, end = self._first_inexact(result)
        return result if node is None else super().match_prefix(replace(params, key=params.key[:end]))

    def _first_inexact(self, result: MatchResult) -> tuple[TreeNode | None, int]:
        """The first node on the path whose narrow rows are inexact, and how many tokens lead to that image."""
        found, start = (None, 0), result.device_prefix_len
        if not len(self.inexact):
            return found
        for node in self._path(result.last_device_node):
            start -= len(node.key)
            for span in node.held.spans:
                if not span.is_text and node.key.token_ids[span.start] in self.inexact:
                    found = node, start + span.start
                    break
        return found

    # --- eviction ---------------------------------------------------------------------------------------

    def evict(self, params: EvictParams) -> EvictResult:
        """The host's call: free as many more slabs as hold ``params.num_tokens`` text tokens."""
        return self.make_room(self.slabs.free - (-params.num_tokens // self.layout.text_rows))

    def make_room(self, slabs: int, *, of_images: int = 0) -> EvictResult:
        """Evict leaves by the host's policy until that many slabs are free and images may take ``of_images`` of them, or
        nothing that helps is left."""
        start_time = time.perf_counter()

        def is_short() -> bool:
            return self.slabs.free < slabs

        def are_images_short() -> bool:
            return self.slabs.allowed_for_images < of_images

        if not is_short() and not are_images_short():
            return EvictResult()
        heap = [(self.eviction_strategy.get_priority(leaf), leaf) for leaf in self.evictable_leaves]
        heapq.heapify(heap)
        num_evicted = 0
        while heap and (is_short() or are_images_short()):
            _, leaf = heapq.heappop(heap)
            if not self._gives_slabs(leaf, of_images=not is_short()):
                continue
            num_evicted += len(leaf.key)
            self._evict_leaf(leaf)
            parent = leaf.parent
            if not parent.children and parent.lock_ref == 0:
                heapq.heappush(heap, (self.eviction_strategy.get_priority(parent), parent))
        self.update_eviction_metrics(num_evicted, start_time)
        return EvictResult(num_tokens_evicted=num_evicted)

    def drop_branch(self, node: TreeNode) -> None:
        """Evict ``node``, which nobody may lock, with all that follows it, and what leads to it alone."""
        assert not node.lock_ref, "a branch that a request reads is not to be dropped"
        branch = [node] if node is not self.root_node else []
        for each in branch:
            branch.extend(each.children.values())
        for each in reversed(branch):
            self._evict_leaf(each)
        node = node.parent
        while node is not None and node is not self.root_node and not node.children and not node.lock_ref:
            self._evict_leaf(node)
            node = node.parent

    def _evict_leaf(self, leaf: TreeNode) -> None:
        self.slabs.release(leaf.held.use, locked=False)
        self._delete_leaf(leaf)
        self.kv_events.record_remove(leaf)

    def _gives_slabs(self, leaf: TreeNode, *, of_images: bool) -> bool:
        """Whether evicting from ``leaf`` upwards can free a slab, or one ``of_images``. Not where others lock rows of all
        its slabs."""
        for node in self._path(leaf):
            if node.lock_ref:
                return False
            use = node.held.use
            if (use.visual_tokens or not of_images) and self.slabs.are_evictable(use.slabs).any():
                return True
        return False

    # --- checks -----------------------------------------------------------------------------------------

    def check_integrity_once(self) -> None:
        """``check_integrity`` of an idle server, skipped while nothing changed since the last one."""
        state = (TreeNode.counter, self.slabs.text_tokens, self.slabs.visual_tokens, self.slabs.free)
        if state != self._checked_state:
            self.check_integrity()
            self._checked_state = state
            self.stats.integrity_checks += 1

    def check_integrity(self, *, idle: bool = True) -> None:
        """AssertionError unless the records of tree and requests explain every count, and tell the slots of the tree.
        ``idle``: no request holds rows."""
        nodes, stack = [], list(self.root_node.children.values())
        while stack:
            nodes.append(stack.pop())
            stack.extend(nodes[-1].children.values())
        in_tree = [np.empty(0, np.int64)]
        for node in nodes:
            at = 0
            for span in node.held.spans:
                assert span.start == at, "a node's record has a gap"
                in_tree.append(span.slots(self.layout))
                at = span.end
            assert at == len(node.key), "a node's record is not as long as its key"
            recorded = np.concatenate(in_tree[-len(node.held.spans) :])
            assert (node.value.cpu().numpy() == recorded).all(), "a node's record names other slots"
        in_tree = np.concatenate(in_tree)
        assert len(np.unique(in_tree)) == len(in_tree), "a slot is in two nodes"
        of_requests = [use_of(self.requests.spans(index), self.layout) for index in self.requests.indices()]
        assert not (idle and of_requests), "a request holds rows while the server is idle"
        assert self.evictable_leaves <= set(nodes), "a leaf that is gone is still there to be evicted"
        locked = [node for node in nodes if node.lock_ref]
        assert not (idle and locked), "a node stays locked while the server is idle"
        self.slabs.check_integrity(
            [node.held.use for node in nodes] + of_requests, [node.held.use for node in locked] + of_requests
        )
