"""The host's radix cache, with a record of visual slots on each node and eviction that knows the two pools."""

from __future__ import annotations

import heapq
import time
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
from sglang.srt.mem_cache.base_prefix_cache import EvictParams, EvictResult
from sglang.srt.mem_cache.radix_cache import RadixCache, TreeNode

from .allocator import RotateKAllocator
from .segments import Placement
from .visual_runs import VisualRuns


class RequestState:
    """What RotateK knows of a request before it has a row: where its images go."""

    def __init__(self) -> None:
        self.placement = Placement([])


def request_state(req) -> RequestState:
    """The state attached to a host request, made on first use."""
    if not hasattr(req, "rotatek"):
        req.rotatek = RequestState()
    return req.rotatek


class RotateKRadixCache(RadixCache):
    """Nodes carry ``visual``: a VisualRuns with positions counted from the node's start. ``runs_of(row)`` are the visual
    slots that the request of a row of the host's ``req_to_token`` owns itself."""

    token_to_kv_pool_allocator: RotateKAllocator

    def __init__(self, params) -> None:
        self._inserted = VisualRuns()
        self._runs: dict[int, VisualRuns] = {}
        self._checked_state: tuple[int, int, int] | None = None
        super().__init__(params)
        self.token_to_kv_pool_allocator.tree_cache = self

    def reset(self) -> None:
        super().reset()
        self.root_node.visual = VisualRuns()
        self._runs.clear()

    def runs_of(self, req_pool_idx: int) -> VisualRuns:
        return self._runs.setdefault(req_pool_idx, VisualRuns())

    # --- what is left -----------------------------------------------------------------------------------

    def text_evictable_size(self) -> int:
        return self.evictable_size() - self.token_to_kv_pool_allocator.visual.evictable

    def text_reachable_size(self) -> int:
        """Text slots that are free or can be freed; a slab counts as the text that it could hold."""
        allocator = self.token_to_kv_pool_allocator
        evictable = self.text_evictable_size() + allocator.visual.evictable_slabs * allocator.layout.text_rows
        return allocator.text_available_size() + evictable

    # --- requests hand their slots over ------------------------------------------------------------------

    def checkpoint(self, req, *, up_to: int) -> None:
        runs = self.runs_of(req.kv.req_pool_idx)
        with self._owning(runs):
            super().checkpoint(req, up_to=up_to)
        # From here on the request reads the tree's copy of its prefix, other requests' slots among them.
        runs.drop_before(req.kv.cache_protected_len)

    def free_kv_row(self, kv, ranges: list[tuple[int, int]]) -> None:
        with self.token_to_kv_pool_allocator.freeing(self.runs_of(kv.req_pool_idx), locked=True):
            super().free_kv_row(kv, ranges)

    def on_release(self, req, *, checkpointed: bool) -> None:
        self._runs.pop(req.kv.req_pool_idx, None)

    @contextmanager
    def _owning(self, runs: VisualRuns) -> Iterator[None]:
        self._inserted = runs
        try:
            with self.token_to_kv_pool_allocator.freeing(runs, locked=True):
                yield
        finally:
            self._inserted = VisualRuns()

    def _insert_helper(self, node, key, value, priority=0, inserted_len=0):
        prefix_len, last_node = super()._insert_helper(node, key, value, priority, inserted_len)
        if prefix_len < len(key):  # last_node is a new leaf, not yet locked
            last_node.visual = self._inserted.slice(prefix_len, len(key))
            for _, slots in last_node.visual.runs:
                self.token_to_kv_pool_allocator.visual.unlock(slots)
        return prefix_len, last_node

    def _split_node(self, key, child: TreeNode, split_len: int) -> TreeNode:
        length = len(child.key)
        upper = super()._split_node(key, child, split_len)
        upper.visual = child.visual.slice(0, split_len)
        child.visual = child.visual.slice(split_len, length)
        return upper

    # --- locks ------------------------------------------------------------------------------------------

    def inc_lock_ref(self, node: TreeNode):
        visual = self.token_to_kv_pool_allocator.visual
        for each in self._path(node):
            if each.lock_ref == 0:
                for _, slots in each.visual.runs:
                    visual.lock(slots)
        return super().inc_lock_ref(node)

    def dec_lock_ref(self, node: TreeNode, params=None):
        visual = self.token_to_kv_pool_allocator.visual
        for each in self._path(node):
            if each.lock_ref == 1:
                for _, slots in each.visual.runs:
                    visual.unlock(slots)
        return super().dec_lock_ref(node, params)

    def _path(self, node: TreeNode) -> Iterator[TreeNode]:
        while node is not self.root_node:
            yield node
            node = node.parent

    # --- eviction ---------------------------------------------------------------------------------------

    def evict(self, params: EvictParams) -> EvictResult:
        """The host's call: free ``params.num_tokens`` more text slots, the only kind that it can run short of."""
        return self.make_room(text=self.token_to_kv_pool_allocator.text_available_size() + params.num_tokens)

    def make_room(self, *, text: int = 0, visual_slabs: int = 0) -> EvictResult:
        """Evict leaves by the host's policy until that many text slots and slabs for images are free, or nothing that
        helps is left."""
        allocator = self.token_to_kv_pool_allocator
        visual = allocator.visual
        start_time = time.perf_counter()

        def text_short() -> bool:
            return allocator.text_available_size() < text

        def slabs_short() -> bool:
            """Short of slabs that evicted text can give, too."""
            if allocator.slabs.free < visual_slabs:
                allocator.take_back_text_slabs(visual_slabs - allocator.slabs.free)
            return allocator.slabs.free < visual_slabs

        def images_short() -> bool:
            return visual.free_slabs < visual_slabs

        if not (text_short() or slabs_short() or images_short()):
            return EvictResult()
        heap = [(self.eviction_strategy.get_priority(leaf), leaf) for leaf in self.evictable_leaves]
        heapq.heapify(heap)
        num_evicted = 0
        while heap:
            if not (text_short() or slabs_short()):
                if not images_short():
                    break
                if not self._leads_to_visual(heap[0][1]):
                    heapq.heappop(heap)
                    continue
            _, leaf = heapq.heappop(heap)
            num_evicted += len(leaf.key)
            with allocator.freeing(leaf.visual, locked=False):
                allocator.free_segment(leaf.value, start_pos=0)
            self._delete_leaf(leaf)
            parent = leaf.parent
            if not parent.children and parent.lock_ref == 0:
                heapq.heappush(heap, (self.eviction_strategy.get_priority(parent), parent))
            self.kv_events.record_remove(leaf)
        if slabs_short():
            allocator.take_back_text_slabs(1)  # as many as there are
        self.update_eviction_metrics(num_evicted, start_time)
        return EvictResult(num_tokens_evicted=num_evicted)

    def _leads_to_visual(self, leaf: TreeNode) -> bool:
        """Whether evicting upwards from ``leaf`` can free a visual slot: an image lies inside its prompt."""
        return any(node.visual.runs for node in self._path(leaf) if node.lock_ref == 0)

    # --- checks -----------------------------------------------------------------------------------------

    def check_integrity_once(self) -> None:
        """``check_integrity`` of an idle server, skipped while nothing changed since the last one."""
        allocator = self.token_to_kv_pool_allocator
        state = (TreeNode.counter, allocator.text_used, allocator.visual.used)
        if state != self._checked_state:
            self.check_integrity()
            self._checked_state = state
            allocator.stats.integrity_checks += 1

    def check_integrity(self, *, idle: bool = True) -> None:
        """Raise AssertionError when the records of tree and allocator disagree. ``idle``: no request holds slots."""
        allocator = self.token_to_kv_pool_allocator
        allocator.check_integrity()
        first_visual = allocator.layout.first_visual_slot
        in_tree, locked_visual, visual_in_tree = [], 0, 0
        stack = list(self.root_node.children.values())
        while stack:
            node = stack.pop()
            stack.extend(node.children.values())
            values = node.value.cpu().numpy()
            recorded = np.zeros(len(values), dtype=bool)
            for at, slots in node.visual.runs:
                assert (values[at : at + len(slots)] == slots).all(), "a node's visual record names other slots"
                recorded[at : at + len(slots)] = True
            assert ((values >= first_visual) == recorded).all(), "a node's visual record is incomplete"
            allocator.visual.bases_of(node.visual.slots())
            visual_in_tree += len(node.visual)
            locked_visual += len(node.visual) if node.lock_ref else 0
            in_tree.append(values)
        slots = np.concatenate(in_tree) if in_tree else np.empty(0, np.int64)
        assert len(np.unique(slots)) == len(slots), "a slot is in two nodes"
        assert not np.intersect1d(slots, allocator.free_pages.cpu().numpy()).size, "a slot is free and in the tree"
        assert visual_in_tree - locked_visual == allocator.visual.evictable, "evictable visual slots are miscounted"
        if idle:
            lost = allocator.text_used + allocator.visual.used - len(slots)
            assert not lost, f"{lost} slots have no owner while the server is idle"
            assert not locked_visual, "a node stays locked while the server is idle"
