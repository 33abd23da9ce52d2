"""The radix cache, the allocator and the extend plan together, driven in the scheduler's order without a model."""

from __future__ import annotations

from array import array

import numpy as np
import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from sglang.srt.managers.schedule_batch import ReqKvInfo
from sglang.srt.mem_cache.base_prefix_cache import EvictParams, MatchPrefixParams
from sglang.srt.mem_cache.cache_init_params import CacheInitParams
from sglang.srt.mem_cache.common import checkpoint_kv_cache, release_kv_cache
from sglang.srt.mem_cache.memory_pool import ReqToTokenPool
from sglang.srt.mem_cache.radix_cache import RadixKey

from sglang_rotatek.memory.admission import place_images
from sglang_rotatek.memory.allocator import ExtendPlan, RotateKAllocator
from sglang_rotatek.config import RotateKConfig
from sglang_rotatek.memory.layout import PoolLayout
from sglang_rotatek.patches.allocation import plan_extend
from sglang_rotatek.memory.tree import RotateKRadixCache, request_state
from sglang_rotatek.memory.segments import FIRST_PAD_ID, ImageRun, Placement, image_runs

TEXTS = ([1, 2, 3], [1, 2, 4, 5], [6], [7] * 12)
CONTEXT = 512

pytestmark = pytest.mark.usefixtures("host_configuration")


def image(length: int, number: int = 0) -> list[int]:
    """Pads as the host's: a cycle of four ids of the picture."""
    return [FIRST_PAD_ID + 4 * number + position % 4 for position in range(length)]


IMAGES = [image(length, number) for number, length in enumerate((1, 5, 13, 24, 40))]


class Request:
    """What the host's tree, allocator and adder read of a request, under its names."""

    skip_radix_cache_insert = False
    cache_salt = extra_key = None
    priority = 0

    def __init__(self, token_ids: list[int]) -> None:
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
        return self.kv.kv_committed_len

    def finished(self) -> bool:
        return self.is_finished

    @property
    def is_prefilled(self) -> bool:
        return self.kv.kv_committed_len >= len(self.full_untruncated_fill_ids)


class Host:
    """The scheduler's calls, in its order, on real pools without a model."""

    def __init__(self, layout: PoolLayout, config: RotateKConfig) -> None:
        self.config = config
        self.rows = ReqToTokenPool(16, CONTEXT, "cpu", enable_memory_saver=False)
        self.allocator = RotateKAllocator(layout, config, torch.float32, "cpu", kvcache=None)
        self.tree = RotateKRadixCache(
            CacheInitParams(
                disable=False, req_to_token_pool=self.rows, token_to_kv_pool_allocator=self.allocator, page_size=1
            )
        )
        self.visual = self.allocator.visual
        self.running: list[Request] = []

    def start(self, token_ids: list[int]) -> Request:
        """Match, lock and place, as init_next_round_input and the adder do."""
        req = Request(token_ids)
        key = RadixKey(req.origin_input_ids, limit=len(token_ids) - 1)
        match = self.tree.match_prefix(MatchPrefixParams(key=key))
        req.prefix_len, req.last_node = match.device_prefix_len, match.last_device_node
        req.extend_end = req.kv.cache_protected_len = req.kv.kv_committed_len = req.prefix_len
        req.lock = self.tree.lock(req.last_node)
        runs, layout = image_runs(token_ids), self.allocator.layout
        self.tree.make_room(
            visual_slabs=Placement(runs).max_slabs(req.prefix_len, None, self.config.segment_tokens, layout)
        )
        request_state(req).placement = place_images(
            runs,
            req.prefix_len,
            self.config,
            slab_budget=self.visual.free_slabs + self.visual.evictable_slabs,
            chunk_tokens=None,
            layout=layout,
        )
        self.running.append(req)
        return req

    def extend(self, reqs: list[Request]) -> tuple[ExtendPlan, np.ndarray]:
        """Slots for [prefix_len, extend_end) of each request, as alloc_for_extend; the plan, and the slots."""
        num_tokens = sum(req.extend_len for req in reqs)
        prefixes = [None if req.kv.holds_kv else self.tree.prefix_device_indices(req) for req in reqs]
        plan, owned = plan_extend(reqs, self.tree, self.allocator)
        assert plan.num_tokens == num_tokens
        with self.allocator.planned(plan):
            self.allocator.evict_to_free_tokens(self.tree, num_tokens)
            slots = self.allocator.alloc(num_tokens)
        assert slots is not None, "admitted, but out of memory"
        self.rows.alloc(reqs)
        for req, position, visual_slots in owned:
            self.tree.runs_of(req.kv.req_pool_idx).append(position, visual_slots)
        at = 0
        for req, prefix in zip(reqs, prefixes):
            row = req.kv.req_pool_idx
            if prefix is not None:
                self.rows.write((row, slice(0, req.prefix_len)), prefix.int())
            self.rows.write((row, slice(req.prefix_len, req.extend_end)), slots[at : at + req.extend_len].int())
            at += req.extend_len
            req.kv.kv_committed_len = req.kv.kv_allocated_len = req.extend_end
        return plan, slots.numpy()

    def prefill(self, chunks: list[tuple[Request, int]]) -> bool:
        """One extend batch: the next ``length`` tokens of each request. False, and no change, when it does not fit."""
        reqs = [req for req, _ in chunks]
        for req, length in chunks:
            req.extend_end = min(req.prefix_len + length, len(req.full_untruncated_fill_ids))
        num_tokens = sum(req.extend_len for req in reqs)
        layout = self.allocator.layout
        segments = [
            segment
            for req in reqs
            for segment in request_state(req).placement.segments(
                req.prefix_len, req.extend_end, self.config.segment_tokens
            )
        ]
        visual_tokens = sum(end - start for start, end in segments)
        slabs = sum(layout.slabs_of(end - start) for start, end in segments)
        all_fit = slabs <= self.visual.free_slabs + self.visual.evictable_slabs
        costs = [(end - start, layout.slabs_of(end - start) * layout.text_rows) for start, end in segments]
        if num_tokens - visual_tokens + sum(narrow if all_fit else max(wide, narrow) for wide, narrow in costs) > (
            self.tree.text_reachable_size()
        ):
            return False
        plan, slots = self.extend(reqs)
        if all_fit:
            assert plan.num_text_tokens == num_tokens - visual_tokens, "what admission promised did not come true"
        assert ((slots >= self.allocator.layout.first_visual_slot) == plan.is_visual()).all()
        for req in reqs:
            checkpoint_kv_cache(req, self.tree)
            if req.is_prefilled:
                req.output_ids.append(50)
        return True

    def decode(self, req: Request, token: int) -> bool:
        """One text slot for the newest token. False when there is none."""
        self.allocator.evict_to_free_tokens(self.tree, 1)
        slot = self.allocator.alloc(1)
        if slot is None:
            return False
        self.rows.write((req.kv.req_pool_idx, req.kv.kv_committed_len), slot[0].int())
        req.kv.kv_committed_len += 1
        req.kv.kv_allocated_len += 1
        req.output_ids.append(token)
        return True

    def finish(self, req: Request, *, insert: bool = True) -> None:
        self.running.remove(req)
        if not req.kv.holds_kv:  # never prefilled: only its lock to give back
            self.tree.unlock(req.lock)
            return
        req.is_finished = True
        release_kv_cache(req, self.tree, checkpoint=insert)

    def run(self, token_ids: list[int], *, chunk: int = CONTEXT) -> Request:
        req = self.start(token_ids)
        while not req.is_prefilled:
            assert self.prefill([(req, chunk)])
        return req

    def cache(self, token_ids: list[int], *, chunk: int = CONTEXT) -> None:
        self.finish(self.run(token_ids, chunk=chunk))

    def row(self, req: Request) -> np.ndarray:
        return self.rows.req_to_token[req.kv.req_pool_idx, : req.kv.kv_committed_len].numpy().astype(np.int64)

    def used(self) -> tuple[int, int, int]:
        """Text slots, visual slots and bases that somebody holds."""
        return self.allocator.text_used, self.visual.used, self.visual.bases

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
            assert row[:protected].tolist() == in_tree.tolist(), "a row does not read the tree's copy"
            is_visual = row >= first_visual
            self.visual.bases_of(row[is_visual])
            placed = np.zeros(len(row), dtype=bool)
            for run in request_state(req).placement.rotated:
                placed[run.start : run.end] = True
            assert not (is_visual & ~placed)[protected:].any(), "a token took a visual slot that was not placed there"
            recorded = self.tree.runs_of(req.kv.req_pool_idx).slots()
            assert recorded.tolist() == row[protected:][is_visual[protected:]].tolist()
            owned.append(row[protected:])
        slots = np.concatenate(owned) if owned else np.empty(0, np.int64)
        text, visual, _ = self.used()
        assert len(np.unique(slots)) == len(slots), "a slot has two owners"
        assert (text, visual) == ((slots < first_visual).sum(), (slots >= first_visual).sum())
        assert self.allocator.available_size() + text + visual == self.allocator.size


class Chats(RuleBasedStateMachine):
    @initialize(
        segment_tokens=st.sampled_from([None, 4, 9]),
        sizes=st.sampled_from([(30, 26, 5, 8), (45, 45, 3, 4), (120, 80, 1, 1)]),
    )
    def start_server(self, segment_tokens, sizes):
        config = RotateKConfig(min_image_tokens=4, segment_tokens=segment_tokens)
        self.host = Host(PoolLayout(*sizes), config)

    def pick(self, data, reqs: list[Request]) -> Request:
        return reqs[data.draw(st.integers(0, len(reqs) - 1))]

    @property
    def waiting(self) -> list[Request]:
        return [req for req in self.host.running if not req.is_prefilled]

    @property
    def decoding(self) -> list[Request]:
        return [req for req in self.host.running if req.is_prefilled]

    @precondition(lambda self: len(self.host.running) < 4)
    @rule(pieces=st.lists(st.sampled_from([*TEXTS, *IMAGES]), min_size=1, max_size=5))
    def start(self, pieces):
        self.host.start([*sum(pieces, []), 8])

    @precondition(lambda self: self.waiting)
    @rule(lengths=st.lists(st.integers(1, 60), min_size=1, max_size=3))
    def prefill(self, lengths):
        self.host.prefill(list(zip(self.waiting, lengths)))

    @precondition(lambda self: self.waiting)
    @rule(data=st.data(), length=st.integers(20, 200))
    def prefill_one(self, data, length):
        self.host.prefill([(self.pick(data, self.waiting), length)])

    @precondition(lambda self: self.decoding)
    @rule(token=st.integers(50, 51))
    def decode(self, token):
        for req in self.decoding:
            self.host.decode(req, token)

    @precondition(lambda self: self.decoding)
    @rule(data=st.data(), insert=st.booleans())
    def finish(self, data, insert):
        self.host.finish(self.pick(data, self.decoding), insert=insert)

    @precondition(lambda self: self.waiting)
    @rule(data=st.data(), insert=st.booleans())
    def abort(self, data, insert):
        self.host.finish(self.pick(data, self.waiting), insert=insert)

    @precondition(lambda self: self.decoding)
    @rule(data=st.data())
    def retract(self, data):
        req = self.pick(data, self.decoding)
        self.host.finish(req, insert=False)
        self.host.start([*req.origin_input_ids, *req.output_ids])

    @rule(text=st.integers(0, 140), slabs=st.integers(0, 80))
    def make_room(self, text, slabs):
        """Of each kind alone as much becomes free as there is; nobody who holds a slot loses it (the invariant)."""
        tree, visual, allocator = self.host.tree, self.host.visual, self.host.allocator
        text_reachable = tree.text_reachable_size()
        tree.make_room(text=text)
        assert allocator.text_available_size() >= min(text, text_reachable)
        assert tree.text_reachable_size() == text_reachable
        slabs_reachable = visual.free_slabs + visual.evictable_slabs
        tree.make_room(visual_slabs=slabs)
        assert visual.free_slabs >= min(slabs, slabs_reachable)
        assert tree.text_reachable_size() == text_reachable

    @precondition(lambda self: not self.host.running)
    @rule()
    def flush(self):
        self.host.tree.reset()
        self.host.allocator.clear()
        assert self.host.used() == (0, 0, 0)

    @invariant()
    def owners_and_counts_agree(self):
        if hasattr(self, "host"):
            self.host.check()

    def teardown(self):
        if hasattr(self, "host"):
            for req in list(self.host.running):
                self.host.finish(req)
            self.host.check()


TestChats = Chats.TestCase
TestChats.settings = settings(max_examples=200, stateful_step_count=30, deadline=None)


@pytest.fixture
def host():
    layout = PoolLayout(num_slabs=100, max_visual_slabs=60, text_rows=1, visual_rows=1)
    return Host(layout, RotateKConfig(min_image_tokens=4))


def test_a_cached_image_keeps_its_slots_and_basis(host):
    host.cache([1, *image(10), 2])
    assert host.used() == (2, 10, 1)
    assert host.visual.evictable == 10
    host.check()


def test_an_evicted_segment_returns_its_basis(host):
    host.cache([1, *image(10), 2])
    host.tree.make_room(visual_slabs=60)
    assert host.used() == (0, 0, 0)
    host.check()


def test_a_segment_evicted_by_half_keeps_its_basis(host):
    host.cache([1, *image(10), 2])
    reader = host.start([1, *image(4), 3])  # locks the first four tokens of the image
    host.tree.make_room(visual_slabs=60)
    assert host.used() == (1, 4, 1)
    host.finish(reader)
    host.check()


def test_two_requests_that_prefill_one_image_at_once_end_up_with_one_copy(host):
    prompt = [1, *image(10), 2]
    first, second = host.start(prompt), host.start(prompt)
    host.prefill([(first, len(prompt)), (second, len(prompt))])
    assert host.row(first).tolist() == host.row(second).tolist()
    assert host.used() == (2, 10, 1)
    host.check()
    host.finish(first)
    host.finish(second)
    host.check()


def test_a_duplicate_cut_in_other_chunks_goes_back_chunk_by_chunk(host):
    prompt = [1, *image(10), 2]
    whole, pieces = host.start(prompt), host.start(prompt)
    host.prefill([(pieces, 4)])
    host.prefill([(whole, 12)])
    assert host.used() == (2, 10, 2)  # three tokens of the first copy, seven of the second
    host.prefill([(pieces, 4)])
    host.prefill([(pieces, 4)])
    assert host.row(pieces).tolist() == host.row(whole).tolist()
    assert host.used() == (2, 10, 2)
    host.check()


def test_a_match_that_ends_inside_an_image_splits_the_nodes_record(host):
    host.cache([1, *image(10), 2])
    host.start([1, *image(4), 3])
    upper, lower = host.nodes()
    assert [(at, len(slots)) for at, slots in upper.visual.runs] == [(1, 4)]
    assert [(at, len(slots)) for at, slots in lower.visual.runs] == [(0, 6)]
    assert (upper.lock_ref, lower.lock_ref, host.visual.evictable) == (1, 0, 6)
    host.check()


def test_a_text_shortage_stops_when_nothing_evictable_is_left(host):
    running = host.run([1, 2, 3])
    host.cache([4, *image(10), 5])
    host.tree.make_room(text=1000)
    assert host.used() == (3, 0, 0)
    assert host.tree.make_room(text=1000).num_tokens_evicted == 0
    host.finish(running)
    host.check()


def test_a_text_shortage_evicts_no_more_than_it_needs(host):
    host.cache([1, 2, 3])
    host.cache([4, 5, 6])
    assert host.tree.make_room(text=97).num_tokens_evicted == 3
    assert host.used() == (3, 0, 0)
    host.check()


def test_the_hosts_evict_frees_that_many_text_slots_more(host):
    host.cache([1, 2, *image(10)])
    host.cache([3, 4, 5])
    host.tree.evict(EvictParams(num_tokens=2))
    assert host.used() == (3, 0, 0)  # the older leaf, image and all
    assert len(host.nodes()) == 1
    host.check()


def test_images_at_their_limit_do_not_evict_text_that_leads_to_no_image(host):
    host.cache([1, 2, 3])
    host.cache([4, *image(10), 5])
    assert host.tree.make_room(visual_slabs=60).num_tokens_evicted == 12
    assert host.used() == (3, 0, 0)
    assert [list(node.key.token_ids) for node in host.nodes()] == [[1, 2, 3]]
    host.check()


def test_images_at_their_limit_evict_the_text_that_stands_after_the_image(host):
    host.cache([4, *image(10), 5])
    host.cache([4, *image(10), 6, 7])
    assert host.tree.make_room(visual_slabs=50).num_tokens_evicted == 14
    assert host.used() == (0, 0, 0)
    host.check()


def test_images_at_their_limit_do_not_evict_text_behind_an_image_that_is_in_use(host):
    host.cache([4, *image(10), 5])
    reader = host.start([4, *image(10), 6])
    assert host.tree.make_room(visual_slabs=60).num_tokens_evicted == 0
    assert host.used() == (2, 10, 1)
    host.finish(reader)
    host.check()


def test_freeing_a_text_only_row_never_touches_the_visual_pool(host, monkeypatch):
    monkeypatch.setattr(host.visual, "release", lambda *_, **__: pytest.fail("visual slots were touched"))
    host.cache([1, 2, 3])
    host.finish(host.run([1, 2, 9]), insert=False)
    host.tree.make_room(text=100)
    assert host.used() == (0, 0, 0)
    host.check()


def test_an_aborted_prefill_returns_the_slots_that_only_it_held(host):
    req = host.start([1, *image(20), 2])
    host.prefill([(req, 8)])
    host.finish(req, insert=False)
    assert host.used() == (1, 7, 1)  # the chunk is in the tree already
    host.tree.make_room(text=100, visual_slabs=60)
    assert host.used() == (0, 0, 0)
    host.check()


def test_a_segment_that_finds_no_slab_stays_at_full_width_and_is_counted(host):
    req = host.start([*image(5), 1, *image(5, 1), 2])
    others = [host.run([3 + i, *image(15, 2 + i)] + [9]) for i in range(3)]  # 48 of 60 slabs, and the next takes 6
    host.prefill([(req, 20)])
    assert host.allocator.stats.segments_full_width == {}
    last = host.start([8, *image(5, 9), 9])
    request_state(last).placement.rotated = [ImageRun(1, 6)]
    host.prefill([(last, 7)])
    assert host.allocator.stats.segments_full_width == {"no_room_for_images": 1}
    assert host.used() == (3 * 2 + 2 + 7, 3 * 15 + 10, 5)
    for each in [req, last, *others]:
        host.finish(each)
    host.check()


@pytest.fixture
def shared():
    """Memory of 100 text tokens, or of an image of 144 beside 5 of text."""
    layout = PoolLayout(num_slabs=20, max_visual_slabs=19, text_rows=5, visual_rows=8)
    return Host(layout, RotateKConfig(min_image_tokens=4))


def test_an_image_takes_the_memory_of_the_oldest_text(shared):
    shared.cache([1] * 40)
    shared.cache([2] * 40)
    shared.cache([3, *image(60), 4])  # 9 slabs and one for the text, where 4 are free
    assert [node.key.token_ids[0] for node in shared.nodes()] == [2, 3]
    assert shared.used() == (42, 60, 1)
    assert shared.allocator.stats.text_slabs_taken_back == 8
    shared.check()


def test_text_takes_the_memory_of_the_oldest_image(shared):
    shared.cache([1, *image(60), 2])
    shared.cache([3, *image(60, 1), 4])
    shared.cache([5] * 30)
    assert shared.used() == (32, 60, 1)
    assert [node.key.token_ids[0] for node in shared.nodes()] == [3, 5]
    shared.check()


def test_slabs_that_text_uses_in_part_are_not_taken(shared):
    readers = [shared.run([i] * 4) for i in range(1, 11)]
    for i in range(4):
        for req in readers:
            assert shared.decode(req, 50)
    for req in readers[1:]:
        shared.finish(req, insert=False)
    # The one that stays has its first four slots in one slab, and each later one among those of other requests.
    shared.tree.make_room(visual_slabs=19)
    assert shared.used() == (8, 0, 0)
    assert shared.visual.free_slabs == 20 - 5
    shared.check()


def test_a_free_list_in_pieces_is_not_read_again_until_more_of_it_is_free(shared, monkeypatch):
    slots = shared.allocator.alloc(100)
    shared.allocator.free(slots[::5])
    looked = []
    monkeypatch.setattr(np, "bincount", lambda *a, original=np.bincount, **k: looked.append(1) or original(*a, **k))
    for wanted in (1, 1, 2):
        shared.tree.make_room(visual_slabs=wanted)
    assert (len(looked), shared.visual.free_slabs) == (1, 0)
    shared.allocator.free(slots[1::5])
    shared.allocator.free(torch.cat([slots[2:5], slots[7:10]]))
    shared.tree.make_room(visual_slabs=2)
    assert (len(looked), shared.visual.free_slabs) == (2, 2)


def test_a_flush_gives_all_slabs_back(shared):
    shared.cache([1, *image(60), 2])
    shared.tree.reset()
    shared.allocator.clear()
    assert (shared.used(), shared.allocator.slabs.free, shared.visual.free_slabs) == ((0, 0, 0), 20, 19)
    assert shared.allocator.available_size() == shared.allocator.size
    shared.check()
