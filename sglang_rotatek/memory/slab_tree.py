"""A radix tree whose nodes hold rows of slabs (rows.py): records that follow every split, locks and
eviction by slabs."""

from __future__ import annotations

import heapq
import time
from array import array
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
from sglang.srt.mem_cache.base_prefix_cache import (
    DecLockRefParams,
    DecLockRefResult,
    EvictParams,
    EvictResult,
    IncLockRefResult,
    MatchPrefixParams,
    MatchResult,
)
from sglang.srt.mem_cache.radix_cache import RadixCache, RadixKey, TreeNode

from ..kernels.upload import upload
from .allocator import InexactImages
from .rows import Slabs, Span, Use, cut_spans, use_of

if TYPE_CHECKING:
    from sglang.srt.mem_cache.cache_init_params import CacheInitParams


@dataclass
class Held:
    """What a node holds: spans with positions counted from its start, and what they take.
    ``open_row``: the first row behind the last token that the request of the node took and did not
    fill, or None; the next turn of the chat may."""

    spans: list[Span] = field(default_factory=list)
    use: Use = field(
        default_factory=lambda: Use(np.empty(0, np.int64), np.empty(0, np.int64), 0, 0)
    )
    open_row: int | None = None


class SlabTree(RadixCache):
    """The host's tree, whose nodes carry ``held``. What a tree does not hold of ``slabs``, somebody
    else may."""

    def __init__(self, params: CacheInitParams, slabs: Slabs) -> None:
        self.layout, self.slabs = slabs.layout, slabs
        super().__init__(params)

    def reset(self) -> None:
        super().reset()
        self.root_node.held = Held()
        self.slabs.clear()

    @property
    def reachable_tokens(self) -> int:
        """Free and evictable slabs, as the text tokens that they could hold."""
        return self.slabs.reachable * self.layout.text_rows

    def segments_of(self, node: TreeNode) -> int:
        """Segments, or parts of some, on the path to ``node``."""
        return sum(not span.is_text for each in self._path(node) for span in each.held.spans)

    def _split_node(self, key: RadixKey, child: TreeNode, split_len: int) -> TreeNode:
        held, length = child.held, len(child.key)
        upper = super()._split_node(key, child, split_len)
        above = cut_spans(held.spans, 0, split_len, self.layout)
        below = [
            span.moved(-split_len) for span in cut_spans(held.spans, split_len, length, self.layout)
        ]
        upper.held = Held(above, use_of(above, self.layout))
        child.held = Held(below, use_of(below, self.layout), held.open_row)
        return upper

    def adopt(
        self, parent: TreeNode, key: RadixKey, spans: list[Span], priority: int = 0
    ) -> TreeNode:
        """A new node below ``parent`` for the tokens ``key``, in rows of ``spans``, positions
        counted from its start, that nobody holds yet."""
        use = use_of(spans, self.layout)
        self.slabs.hold(use)
        self.slabs.unlock(use)
        values = upload(np.concatenate([span.slots(self.layout) for span in spans]), self.device)
        _, node = self._insert_helper(parent, key, values, priority)
        node.held = Held(spans, use)
        return node

    def spans_behind(self, node: TreeNode, start: int) -> list[tuple[int, list[Span]]]:
        """Of each node on the path to ``node`` that ends behind position ``start``, the first one
        first: its end, and its spans from ``start`` on; positions counted from the root."""
        path = list(self._path(node))
        end, found = sum(len(each.key) for each in path), []
        for each in path:
            if end <= start:
                break
            first = end - len(each.key)
            spans = [span.moved(first) for span in each.held.spans]
            found.append((end, cut_spans(spans, start, end, self.layout)))
            end = first
        return found[::-1]

    # --- locks ------------------------------------------------------------------------------------

    def inc_lock_ref(self, node: TreeNode) -> IncLockRefResult:
        for each in self._path(node):
            if each.lock_ref == 0:
                self.slabs.lock(each.held.use)
        return super().inc_lock_ref(node)

    def dec_lock_ref(
        self, node: TreeNode, params: DecLockRefParams | None = None
    ) -> DecLockRefResult:
        for each in self._path(node):
            if each.lock_ref == 1:
                self.slabs.unlock(each.held.use)
        return super().dec_lock_ref(node, params)

    def _path(self, node: TreeNode) -> Iterator[TreeNode]:
        while node is not self.root_node:
            yield node
            node = node.parent

    def _key_to(self, node: TreeNode) -> RadixKey:
        """The tokens that lead to ``node``, which is not the root."""
        keys = [each.key for each in self._path(node)]
        token_ids = sum((key.raw_token_ids() for key in reversed(keys)), array("q"))
        return RadixKey(token_ids, node.key.extra_key, cache_salt=node.key.cache_salt)

    # --- lookup -----------------------------------------------------------------------------------

    def match_exact(self, key: RadixKey, inexact: InexactImages) -> MatchResult:
        """The longest match, up to the first image stored narrow of which a pad id is in
        ``inexact``."""
        result = super().match_prefix(MatchPrefixParams(key=key))
        if not len(inexact):
            return result
        node, end = self._first_inexact(result, inexact)
        return result if node is None else super().match_prefix(MatchPrefixParams(key=key[:end]))

    def drop_inexact(self, key: RadixKey, inexact: InexactImages) -> None:
        """Evict what of ``key`` begins with such an image, unless a request reads it."""
        if not len(inexact):
            return
        node, _ = self._first_inexact(super().match_prefix(MatchPrefixParams(key=key)), inexact)
        if node is not None and not node.lock_ref:
            self.drop_branch(node)

    def _first_inexact(
        self, result: MatchResult, inexact: InexactImages
    ) -> tuple[TreeNode | None, int]:
        """The first node on the path whose narrow rows are inexact, and how many tokens lead to
        that image."""
        found, start = (None, 0), result.device_prefix_len
        for node in self._path(result.last_device_node):
            start -= len(node.key)
            for span in node.held.spans:
                if not span.is_text and node.key.token_ids[span.start] in inexact:
                    found = node, start + span.start
                    break
        return found

    # --- eviction ---------------------------------------------------------------------------------

    def evict(self, params: EvictParams) -> EvictResult:
        """The host's call: free as many more slabs as hold ``params.num_tokens`` text tokens."""
        return self.make_room(self.slabs.free - (-params.num_tokens // self.layout.text_rows))

    def make_room(self, slabs: int, *, of_images: int = 0) -> EvictResult:
        """Evict leaves by the host's policy until that many slabs are free and images may take
        ``of_images`` of them, or nothing that helps is left."""
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
            self._before_eviction(leaf)
            self._evict_leaf(leaf)
            parent = leaf.parent
            if not parent.children and parent.lock_ref == 0:
                heapq.heappush(heap, (self.eviction_strategy.get_priority(parent), parent))
        self.update_eviction_metrics(num_evicted, start_time)
        return EvictResult(num_tokens_evicted=num_evicted)

    def _before_eviction(self, leaf: TreeNode) -> None:
        """For a tree that keeps elsewhere what it must evict."""

    def drop_branch(self, node: TreeNode) -> None:
        """Evict ``node``, which nobody may lock, with all that follows it, and what leads to it
        alone."""
        assert not node.lock_ref, "a branch that a request reads is not to be dropped"
        branch = [node] if node is not self.root_node else []
        for each in branch:
            branch.extend(each.children.values())
        for each in reversed(branch):
            self._evict_leaf(each)
        node = node.parent
        while (
            node is not None
            and node is not self.root_node
            and not node.children
            and not node.lock_ref
        ):
            self._evict_leaf(node)
            node = node.parent

    def _evict_leaf(self, leaf: TreeNode) -> None:
        self.slabs.release(leaf.held.use, locked=False)
        self._delete_leaf(leaf)
        self.kv_events.record_remove(leaf)

    def _gives_slabs(self, leaf: TreeNode, *, of_images: bool) -> bool:
        """Whether evicting from ``leaf`` upwards can free a slab, or one ``of_images``. Not where
        others lock rows of all its slabs."""
        for node in self._path(leaf):
            if node.lock_ref:
                return False
            use = node.held.use
            if (use.visual_tokens or not of_images) and self.slabs.are_evictable(use.slabs).any():
                return True
        return False

    # --- checks -----------------------------------------------------------------------------------

    def check_nodes(self, *, idle: bool = True) -> tuple[list[Use], list[Use]]:
        """AssertionError unless each node's record tells its slots, and no slot is in two nodes;
        else what all nodes hold, and what the locked ones do. ``idle``: nothing may be locked."""
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
        slots = np.concatenate(in_tree)
        assert len(np.unique(slots)) == len(slots), "a slot is in two nodes"
        assert self.evictable_leaves <= set(nodes), (
            "a leaf that is gone is still there to be evicted"
        )
        locked = [node for node in nodes if node.lock_ref]
        assert not (idle and locked), "a node stays locked while the server is idle"
        return [node.held.use for node in nodes], [node.held.use for node in locked]
