"""The host's scheduler without a model: real tree, tables and allocator on the CPU, its calls in
its order.

For tests, and for bench_scheduler.py, which runs the host's own classes in the same way.
"""

from __future__ import annotations

from array import array
from types import SimpleNamespace

import numpy as np
import torch
from sglang.srt.managers.schedule_batch import ReqKvInfo
from sglang.srt.mem_cache import allocation
from sglang.srt.mem_cache.allocator import TokenToKVPoolAllocator
from sglang.srt.mem_cache.base_prefix_cache import (
    InitLoadBackParams,
    MatchPrefixParams,
    MatchResult,
)
from sglang.srt.mem_cache.cache_init_params import CacheInitParams
from sglang.srt.mem_cache.common import checkpoint_kv_cache, release_kv_cache
from sglang.srt.mem_cache.memory_pool import ReqToTokenPool
from sglang.srt.mem_cache.radix_cache import RadixCache, RadixKey

from sglang_rotatek.config import RotateKConfig
from sglang_rotatek.memory.allocator import RotateKAllocator
from sglang_rotatek.memory.host import HostMemory
from sglang_rotatek.memory.layout import PoolLayout
from sglang_rotatek.memory.placement import place_images
from sglang_rotatek.memory.prefill import PrefillLayout
from sglang_rotatek.memory.rows import Span
from sglang_rotatek.memory.segments import FIRST_PAD_ID, image_runs, mark_inexact
from sglang_rotatek.memory.tier import HostTier
from sglang_rotatek.memory.tiered_tree import TieredRadixCache
from sglang_rotatek.memory.tree import RotateKRadixCache
from sglang_rotatek.patches.allocation import alloc_for_decode, alloc_for_extend

CONTEXT = 4096


def image(length: int, number: int = 0) -> list[int]:
    """Pads as the host's: a cycle of four ids of the picture."""
    return [FIRST_PAD_ID + 4 * number + position % 4 for position in range(length)]


class Request:
    """What the host's tree, allocator and adder read of a request, under its names."""

    skip_radix_cache_insert = False
    cache_salt = extra_key = None
    priority = 0
    finished_len = None
    count = 0

    def __init__(self, token_ids: list[int]) -> None:
        Request.count += 1
        self.rid = str(Request.count)
        self.origin_input_ids = array("q", token_ids)
        self.output_ids = array("q")
        self.kv = ReqKvInfo()
        self.prefix_len = self.extend_end = 0
        self.last_node = self.lock = None
        self.is_finished = False
        self.refresh_fill_ids()

    def refresh_fill_ids(self) -> None:
        self.full_untruncated_fill_ids = self.origin_input_ids + self.output_ids

    @property
    def extend_len(self) -> int:
        return self.extend_end - self.prefix_len

    def owned_kv_len(self) -> int:
        if self.finished_len is None:
            return self.kv.kv_committed_len
        return min(self.kv.kv_committed_len, len(self.origin_input_ids) + self.finished_len)

    def finished(self) -> bool:
        return self.is_finished

    @property
    def is_prefilled(self) -> bool:
        return self.kv.kv_committed_len >= len(self.full_untruncated_fill_ids)


class WaitingRequest(Request):
    """What the adder reads of a host request, besides the cache's part."""

    host_hit_length = host_loaded_length = swa_host_hit_length = auxiliary_swa_host_hit_length = 0
    storage_hit_length = storage_hit_start = 0
    host_hit_is_storage = retracted_stain = False
    cache_request_handle = discard_output_reason = to_finish = multimodal_inputs = None
    positional_embed_overrides = mamba_branching_seqlen = None

    def __init__(self, token_ids: list[int], max_new_tokens: int = 10) -> None:
        super().__init__(token_ids)
        self.sampling_params = SimpleNamespace(
            max_new_tokens=max_new_tokens, min_new_tokens=0, ignore_eos=False
        )

    def needs_host_load_back(self) -> bool:
        return self.host_hit_length > 0

    def _compute_max_prefix_len(self, input_len: int) -> int:
        return input_len - 1

    def materialized_host_hit_len(self) -> int:
        return min(self.host_hit_length, self.host_loaded_length)

    def fulfilled_storage_hit_len(self, prefix_len: int) -> int:
        return 0

    def set_finish_with_abort(self, message: str) -> None:
        self.to_finish = message

    def match(self, tree) -> WaitingRequest:
        """As init_next_round_input."""
        self.refresh_fill_ids()
        key = RadixKey(
            self.full_untruncated_fill_ids, limit=len(self.full_untruncated_fill_ids) - 1
        )
        match = tree.match_prefix(MatchPrefixParams(key=key))
        self.prefix_len, self.last_node = match.device_prefix_len, match.last_device_node
        self.host_hit_length, self.best_match_node = match.host_hit_length, match.best_match_node
        self.kv.cache_protected_len = self.prefix_len
        return self


def as_batch(reqs: list[Request], tree: RadixCache) -> SimpleNamespace:
    """What allocation reads of a ScheduleBatch: of a prefill [prefix_len, extend_end) of each
    request, or of a decode step behind kv_allocated_len."""
    indices = torch.tensor([req.kv.req_pool_idx or 0 for req in reqs])
    prefix_lens, extend_lens = [req.prefix_len for req in reqs], [req.extend_len for req in reqs]
    lengths = torch.tensor(
        [req.kv.kv_allocated_len if req.is_prefilled else req.extend_end for req in reqs]
    )
    return SimpleNamespace(
        reqs=reqs, tree_cache=tree, req_to_token_pool=tree.req_to_token_pool, device="cpu",
        token_to_kv_pool_allocator=tree.token_to_kv_pool_allocator,
        prefix_lens=prefix_lens, extend_lens=extend_lens, extend_num_tokens=sum(extend_lens),
        seq_lens=lengths, seq_lens_cpu=lengths, req_pool_indices=indices,
        req_pool_indices_cpu=indices, hisparse_coordinator=None,
        model_config=SimpleNamespace(is_encoder_decoder=False), is_dllm=lambda: False,
        maybe_evict_swa=lambda: None,
    )  # fmt: skip


class StockHost:
    """The scheduler's calls, in its order, on the host's own radix cache and allocator."""

    def __init__(self, num_tokens: int, num_requests: int = 16, context: int = CONTEXT) -> None:
        self._make_table(num_requests, context)
        self.allocator = TokenToKVPoolAllocator(
            num_tokens, torch.float32, "cpu", None, need_sort=False
        )
        self.tree = RadixCache(self._parameters())

    def _make_table(self, num_requests: int, context: int) -> None:
        self.table = ReqToTokenPool(num_requests, context, "cpu", enable_memory_saver=False)
        self.running: list[Request] = []

    def _parameters(self) -> CacheInitParams:
        return CacheInitParams(
            disable=False,
            req_to_token_pool=self.table,
            token_to_kv_pool_allocator=self.allocator,
            page_size=1,
        )

    def start(self, token_ids: list[int]) -> Request:
        """Match and lock, as init_next_round_input and the adder do."""
        req = Request(token_ids)
        key = RadixKey(req.origin_input_ids, limit=len(token_ids) - 1)
        match = self.tree.match_prefix(MatchPrefixParams(key=key))
        req.prefix_len, req.last_node = match.device_prefix_len, match.last_device_node
        req.lock = self.tree.lock(req.last_node)
        if match.host_hit_length:
            self.load_back(req, match)
        req.extend_end = req.kv.cache_protected_len = req.kv.kv_committed_len = req.prefix_len
        self.running.append(req)
        return req

    def alloc_for_extend(self, reqs: list[Request]) -> torch.Tensor:
        """Slots for [prefix_len, extend_end) of each request."""
        return alloc_for_extend(allocation.alloc_for_extend, as_batch(reqs, self.tree))[0]

    def alloc_for_decode(self, reqs: list[Request]) -> torch.Tensor:
        return allocation.alloc_for_decode_default(as_batch(reqs, self.tree), 1)

    def prefill_whole(self, req: Request) -> Request:
        req.extend_end = len(req.full_untruncated_fill_ids)
        self.alloc_for_extend([req])
        checkpoint_kv_cache(req, self.tree)
        req.output_ids.append(50)
        return req

    def decode_all(self, reqs: list[Request], token: int) -> bool:
        """One text token for each. False when there is no memory for it."""
        requirements = {"num_tokens": len(reqs), "tree_cache": self.tree, "requests": reqs}
        if not self.allocator.check_decode_capacity(**requirements):
            return False
        self.alloc_for_decode(reqs)
        for req in reqs:
            req.output_ids.append(token)
        return True

    def finish(self, req: Request, *, insert: bool = True) -> None:
        self.running.remove(req)
        if not req.kv.holds_kv:  # never prefilled: only its lock to give back
            self.tree.unlock(req.lock)
            return
        req.is_finished = True
        release_kv_cache(req, self.tree, checkpoint=insert)


class Host(StockHost):
    """The same on RotateK's. ``check`` holds every record against every other. With ``host_slabs``
    there is a tier of so many in host memory, by the host's ``write_policy``, and what the rows
    hold is checked, too."""

    def __init__(
        self, layout: PoolLayout, config: RotateKConfig, num_requests: int = 16,
        context: int = CONTEXT, host_slabs: int = 0, write_policy: str = "write_through",
    ) -> None:  # fmt: skip
        self.config = config
        self._make_table(num_requests, context)
        self.allocator = RotateKAllocator(layout, config, torch.float32, "cpu", kvcache=None)
        self.slabs = self.allocator.slabs
        self.contents = None
        if host_slabs:
            self.contents = Contents(layout)
            memory = HostMemory(self.contents.slabs, host_slabs)
            tier = HostTier(self._parameters(), self.slabs, memory, write_policy)
            self.tree = TieredRadixCache(self._parameters(), tier)
        else:
            self.tree = RotateKRadixCache(self._parameters())

    def load_back(self, req: Request, match: MatchResult) -> None:
        """As the adder does, where there is room."""
        price = self.tree.tier.price(match.best_match_node, req.prefix_len)
        allowed = self.slabs.allowed_for_images + self.slabs.evictable_of_images
        if price.slabs > self.slabs.reachable or price.of_images > allowed:
            return
        params = InitLoadBackParams(match.best_match_node, match.host_hit_length, req=req)
        loaded, req.last_node = self.tree.init_load_back(params)
        req.prefix_len += loaded
        self.tree.unlock(req.lock)
        req.lock = self.tree.lock(req.last_node)

    def start(self, token_ids: list[int]) -> Request:
        req = super().start(token_ids)
        self.tree.place(
            req,
            place_images(
                mark_inexact(image_runs(token_ids), token_ids, self.allocator.inexact),
                req.prefix_len,
                self.config,
                slab_budget=self.slabs.allowed_for_images + self.slabs.evictable_of_images,
                chunk_tokens=None,
                layout=self.allocator.layout,
            ),
        )
        return req

    def alloc_for_decode(self, reqs: list[Request]) -> torch.Tensor:
        slots = alloc_for_decode(as_batch(reqs, self.tree), 1)
        if self.contents is not None:
            self.contents.decode(reqs, slots.numpy())
        return slots

    def extend(self, reqs: list[Request]) -> tuple[PrefillLayout, np.ndarray]:
        """Where the tokens of an extend batch are, and their slots."""
        slots = self.alloc_for_extend(reqs).numpy()
        layout = self.tree.prefill_layout(
            reqs, [req.prefix_len for req in reqs], [req.extend_len for req in reqs]
        )
        assert len(slots) == layout.num_tokens
        if self.contents is not None:
            self.contents.extend(reqs, slots, layout)
        return layout, slots

    def prefill(self, chunks: list[tuple[Request, int]]) -> bool:
        """One extend batch: the next ``length`` tokens of each request. False, and no change, when
        it does not fit."""
        reqs = [req for req, _ in chunks]
        for req, length in chunks:
            req.extend_end = min(req.prefix_len + length, len(req.full_untruncated_fill_ids))
        layout, slabs, of_images = self.allocator.layout, 0, 0
        for req in reqs:
            tokens, images = self.tree.placement_of(req).visual(req.prefix_len, req.extend_end)
            text = req.extend_len - tokens
            open_rows = self.tree.requests.open_rows(req.kv.req_pool_idx) if req.kv.holds_kv else 0
            slabs, of_images = (
                slabs + images + max(0, -(-(text - open_rows) // layout.text_rows)),
                of_images + images,
            )
        if (
            slabs > self.slabs.reachable
            or of_images > self.slabs.allowed_for_images + self.slabs.evictable_of_images
        ):
            return False
        full_width = self.allocator.stats.segments_full_width.total()
        prefill, slots = self.extend(reqs)
        assert self.allocator.stats.segments_full_width.total() == full_width, (
            "what admission promised did not come true"
        )
        assert ((slots >= layout.first_visual_slot) == prefill.is_visual()).all()
        for req in reqs:
            checkpoint_kv_cache(req, self.tree)
            if req.is_prefilled:
                req.output_ids.append(50)
        return True

    def decode(self, req: Request, token: int) -> bool:
        """One text slot for the newest token. False when there is none."""
        return self.decode_all([req], token)

    def extend_all(self, *reqs: Request) -> PrefillLayout:
        for req in reqs:
            req.extend_end = len(req.full_untruncated_fill_ids)
        return self.extend(list(reqs))[0]

    def run(self, token_ids: list[int], *, chunk: int = CONTEXT) -> Request:
        req = self.start(token_ids)
        while not req.is_prefilled:
            assert self.prefill([(req, chunk)])
        return req

    def cache(self, token_ids: list[int], *, chunk: int = CONTEXT) -> None:
        self.finish(self.run(token_ids, chunk=chunk))

    def row(self, req: Request) -> np.ndarray:
        return (
            self.table.req_to_token[req.kv.req_pool_idx, : req.kv.kv_committed_len]
            .numpy()
            .astype(np.int64)
        )

    def used(self) -> tuple[int, int, int]:
        """Text tokens, visual tokens and bases that somebody holds."""
        return self.slabs.text_tokens, self.slabs.visual_tokens, self.slabs.bases

    def nodes(self) -> list:
        nodes = list(self.tree.root_node.children.values())
        for node in nodes:
            nodes.extend(node.children.values())
        return nodes

    def check(self) -> None:
        """Integrity, conservation of slots of both kinds, and the rows of all requests."""
        self.tree.check_integrity(idle=not self.running)
        first_visual = self.allocator.layout.first_visual_slot
        owned = [node.value.numpy() for node in self.nodes()]
        for req in self.running:
            if not req.kv.holds_kv:
                continue
            row, protected = self.row(req), req.kv.cache_protected_len
            path, node = [], req.last_node
            while node is not self.tree.root_node:
                path.append(node.value.numpy())
                node = node.parent
            in_tree = np.concatenate(path[::-1]) if path else np.empty(0, np.int64)
            assert row[:protected].tolist() == in_tree.tolist(), (
                "a row does not read the tree's copy"
            )
            is_visual = row >= first_visual
            placed = np.zeros(len(row), dtype=bool)
            for run in self.tree.placement_of(req).rotated:
                placed[run.start : run.end] = True
            assert not (is_visual & ~placed)[protected:].any(), (
                "a token took a visual row that was not placed there"
            )
            spans = self.tree.requests.spans(req.kv.req_pool_idx)
            recorded = [
                slot for span in spans for slot in span.slots(self.allocator.layout).tolist()
            ]
            assert recorded == row[protected:].tolist(), "a request's record names other slots"
            assert [span.start for span in spans] == [protected, *(span.end for span in spans)][
                : len(spans)
            ]
            owned.append(row[protected:])
        slots = np.concatenate(owned) if owned else np.empty(0, np.int64)
        text, visual, _ = self.used()
        assert len(np.unique(slots)) == len(slots), "a slot has two owners"
        assert (text, visual) == ((slots < first_visual).sum(), (slots >= first_visual).sum())
        assert self.allocator.available_size() + text + visual == self.allocator.size
        if self.contents is not None:
            self.check_contents()

    def check_contents(self) -> None:
        """Rows on the device and on the host hold what was computed for their tokens."""
        tier, contents = self.tree.tier, self.contents
        for tree, slabs in ((self.tree, contents.slabs), (tier.tree, tier.memory.slabs)):
            pending = [(child, 0, 0) for child in tree.root_node.children.values()]
            while pending:
                node, start, before = pending.pop()
                marks = contents.marks(node.key.raw_token_ids(), start, before)
                contents.check(slabs, node.held.spans, marks)
                children = (
                    (child, start + len(node.key), int(marks[-1]))
                    for child in node.children.values()
                )
                pending.extend(children)
        for req in self.running:
            if req.kv.holds_kv:
                row = self.row(req)
                assert (
                    contents.rows(contents.slabs, row)[0, :, 0]
                    == contents.marks_of(req)[: len(row)]
                ).all()
                contents.check_bound(row, self.allocator.layout)


class Contents:
    """What the device's slabs hold: in the first word of a token's row a mark that tells it and all
    tokens before it, and in the second, of a narrow row, what the slab of its basis begins with. A
    second layer has the same plus one."""

    def __init__(self, layout: PoolLayout) -> None:
        self.layout = layout
        words = 2 * layout.text_rows * layout.visual_rows
        self.slabs = torch.zeros(2, 1 + layout.num_slabs, words, dtype=torch.int64)
        self.slot_to_basis = np.zeros(layout.all_visual_rows, dtype=np.int64)
        self._num_segments = 0

    @staticmethod
    def marks(token_ids: array, start: int, before: int) -> np.ndarray:
        """Of tokens from position ``start`` on, ``before`` which the last mark is."""
        positions = np.arange(start, start + len(token_ids))
        return before + np.cumsum((np.array(token_ids, dtype=np.int64) + 1) * (2 * positions + 1))

    def marks_of(self, req: Request) -> np.ndarray:
        return self.marks(req.origin_input_ids + req.output_ids, 0, 0)

    def rows(self, slabs: torch.Tensor, slots: np.ndarray) -> np.ndarray:
        """The first two words of rows [layers, n, 2] of the device."""
        slab, word = self._at(slots)
        memory = slabs.numpy()
        return np.stack([memory[:, slab, word], memory[:, slab, word + 1]], axis=-1)

    def _at(self, slots: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        layout = self.layout
        is_text = slots < layout.first_visual_slot
        rows = np.where(is_text, layout.text_rows, layout.visual_rows)
        at = np.where(is_text, slots, slots - layout.first_visual_slot)
        return at // rows, at % rows * 2 * np.where(is_text, layout.visual_rows, layout.text_rows)

    def _fill(self, slots: np.ndarray, marks: np.ndarray) -> None:
        slab, word = self._at(slots)
        for layer, memory in enumerate(self.slabs.numpy()):
            memory[slab, word] = marks + layer

    def extend(self, reqs: list[Request], slots: np.ndarray, layout: PrefillLayout) -> None:
        """A forward."""
        first = self.layout.first_visual_slot
        for loaded, basis in layout.loaded:
            self.slot_to_basis[loaded - first] = basis
        marks = [self.marks_of(req)[req.prefix_len : req.extend_end] for req in reqs]
        self._fill(slots, np.concatenate(marks))
        for segment in layout.segments:
            self.slot_to_basis[segment.slots - first] = segment.basis
            self._num_segments += 1
            slab, word = self._at(segment.slots)
            for layer, memory in enumerate(self.slabs.numpy()):
                memory[slab, word + 1] = memory[segment.basis, 0] = self._num_segments + layer

    def decode(self, reqs: list[Request], slots: np.ndarray) -> None:
        self._fill(
            slots, np.array([self.marks_of(req)[req.kv.kv_allocated_len - 1] for req in reqs])
        )

    def check(self, slabs: torch.Tensor, spans: list[Span], marks: np.ndarray) -> None:
        """AssertionError unless spans of ``slabs`` hold the marks, and narrow rows what their bases
        do."""
        memory = slabs.numpy()
        for span in spans:
            rows = np.arange(span.first, span.first + span.length)
            in_slab, width = (
                span.rows_of_a_slab(self.layout),
                memory.shape[2] // span.rows_of_a_slab(self.layout),
            )
            slab, word = span.slabs[rows // in_slab], rows % in_slab * width
            for layer in range(len(memory)):
                assert (memory[layer, slab, word] == marks[span.start : span.end] + layer).all(), (
                    "a row holds another token"
                )
                if not span.is_text:
                    assert (memory[layer, slab, word + 1] == memory[layer, span.basis, 0]).all(), (
                        "a row has another basis"
                    )

    def check_bound(self, row: np.ndarray, layout: PoolLayout) -> None:
        visual = row[row >= layout.first_visual_slot]
        bases = self.slot_to_basis[visual - layout.first_visual_slot]
        found = self.rows(self.slabs, visual)[0, :, 1]
        assert (found == self.slabs.numpy()[0, bases, 0]).all(), "a slot is bound to another basis"
