"""Tree, records and slabs together, driven in the scheduler's order without a model."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from scheduler_host import Host, Request, image
from sglang.srt.mem_cache.base_prefix_cache import EvictParams
from sglang.srt.mem_cache.common import checkpoint_kv_cache

from sglang_rotatek.config import RotateKConfig
from sglang_rotatek.kernels.row_format import RowFormat
from sglang_rotatek.memory.allocator import InexactImages
from sglang_rotatek.memory.layout import KVShape, PoolLayout, layout_of_slabs
from sglang_rotatek.memory.segments import ImageRun, Placement

TEXTS = ([1, 2, 3], [1, 2, 4, 5], [6], [7] * 12, [9] * 45)
LARGE = 1 << 20

pytestmark = pytest.mark.usefixtures("host_configuration")


IMAGES = [image(length, number) for number, length in enumerate((1, 5, 13, 24, 40, 64, 100, 330))]


class Chats(RuleBasedStateMachine):
    @initialize(
        cuts=st.sampled_from([(None, None), (None, 64), (4, None), (4, 4), (4, 9)]),
        # The first is that of head_dim 128 at rank 32.
        sizes=st.sampled_from([(60, 57, 20, 32), (30, 26, 5, 8), (45, 45, 3, 4), (120, 80, 1, 1)]),
    )
    def start_server(self, cuts, sizes):
        config = RotateKConfig(min_image_tokens=cuts[0], segment_tokens=cuts[1])
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
    @rule(lengths=st.lists(st.integers(1, 400), min_size=1, max_size=3))
    def prefill(self, lengths):
        self.host.prefill(list(zip(self.waiting, lengths, strict=False)))

    @precondition(lambda self: self.waiting)
    @rule(data=st.data(), length=st.integers(20, 800))
    def prefill_one(self, data, length):
        self.host.prefill([(self.pick(data, self.waiting), length)])

    @precondition(lambda self: self.decoding)
    @rule(token=st.integers(50, 51))
    def decode(self, token):
        self.host.decode_all(self.decoding, token)

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

    @rule(slabs=st.integers(0, 130), of_images=st.integers(0, 90))
    def make_room(self, slabs, of_images):
        """As much becomes free as there is; nobody who holds a row loses it (the invariant)."""
        tree, stock = self.host.tree, self.host.slabs
        reachable, allowed = stock.reachable, stock.allowed_for_images + stock.evictable_of_images
        tree.make_room(slabs)
        assert stock.free >= min(slabs, reachable) and stock.reachable == reachable
        tree.make_room(0, of_images=of_images)
        assert stock.allowed_for_images >= min(of_images, allowed) and stock.reachable == reachable

    @rule(picture=st.sampled_from(IMAGES))
    def find_inexact(self, picture):
        self.host.allocator.inexact.add(picture[:4])

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
        """When all requests have ended and all that is cached is evicted, every slab is back."""
        if hasattr(self, "host"):
            for req in list(self.host.running):
                self.host.finish(req)
            self.host.check()
            self.host.tree.make_room(LARGE)
            self.host.check()
            assert self.host.slabs.free == self.host.allocator.layout.num_slabs


TestChats = Chats.TestCase
TestChats.settings = settings(max_examples=200, stateful_step_count=30, deadline=None)


@pytest.fixture
def host():
    layout = PoolLayout(num_slabs=100, max_visual_slabs=60, text_rows=1, visual_rows=1)
    return Host(layout, RotateKConfig(min_image_tokens=4))


def test_a_cached_image_keeps_its_slots_and_basis(host):
    host.cache([1, *image(10), 2])
    assert host.used() == (2, 10, 1)
    assert host.slabs.evictable == 2 + 11
    host.check()


def test_an_evicted_segment_returns_its_basis(host):
    host.cache([1, *image(10), 2])
    host.tree.make_room(LARGE)
    assert host.used() == (0, 0, 0)
    host.check()


def test_a_segment_evicted_by_half_keeps_its_basis(host):
    host.cache([1, *image(10), 2])
    reader = host.start([1, *image(4), 3])  # locks the first four tokens of the image
    host.tree.make_room(LARGE)
    assert host.used() == (1, 4, 1)
    host.finish(reader)
    host.check()


@pytest.mark.parametrize("prefix", [0, 2])
def test_an_image_that_is_known_to_be_inexact_is_stored_at_full_width_in_its_place(host, prefix):
    cat, dog = image(10, 1), image(10, 2)
    prompt = [1, *dog, *[7] * prefix, *cat, 2]
    host.cache(prompt)
    host.allocator.inexact.add(cat[:4])
    reader = host.run([*prompt, 3])
    assert reader.last_node is not host.tree.root_node
    assert host.used()[1:] == (10, 1)  # the dog's
    host.check()
    host.finish(reader)
    again = host.start([*prompt, 4])
    assert again.prefix_len == len(prompt)
    reader = host.run([*prompt, 5])
    assert host.row(reader).max() >= host.allocator.layout.first_visual_slot
    host.finish(again)
    host.finish(reader)
    host.check()


def test_an_inexact_image_that_a_request_reads_is_replaced_after_it(host):
    prompt = [1, *image(10), 2]
    host.cache(prompt)
    reader = host.run([*prompt, 3])
    host.allocator.inexact.add(image(4))
    other = host.run([*prompt, 4])
    # Theirs stays.
    assert (other.kv.cache_protected_len, host.used()[1:]) == (len(prompt) + 1, (10, 1))
    host.check()
    host.finish(other)
    host.finish(reader)
    host.cache([*prompt, 5])
    assert host.used()[1:] == (0, 0)
    host.check()


def test_the_image_runs_of_a_prompt_tell_a_segments_image(host):
    host.tree.tells_images = True
    request = host.start([1, *image(10, 3), 2])
    (segment,) = host.extend_all(request).segments
    assert segment.pad_ids == tuple(image(4, 3))


def test_the_oldest_of_very_many_inexact_images_are_forgotten(monkeypatch):
    monkeypatch.setattr(InexactImages, "MOST", 8)
    inexact = InexactImages()
    for number in (1, 2, 1, 3):
        inexact.add(image(4, number))
    assert len(inexact) == 8
    assert [image(1, number)[0] in inexact for number in (1, 2, 3)] == [True, False, True]


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
    upper, lower = (node for node in host.nodes())
    lengths = [
        [(span.start, span.length, span.is_text) for span in node.held.spans]
        for node in (upper, lower)
    ]
    assert lengths == [[(0, 1, True), (1, 4, False)], [(0, 6, False), (6, 1, True)]]
    assert upper.held.spans[1].basis == lower.held.spans[0].basis
    assert (upper.lock_ref, lower.lock_ref) == (1, 0)
    host.check()


def test_a_text_shortage_stops_when_nothing_evictable_is_left(host):
    running = host.run([1, 2, 3])
    host.cache([4, *image(10), 5])
    host.tree.make_room(LARGE)
    assert host.used() == (3, 0, 0)
    assert host.tree.make_room(LARGE).num_tokens_evicted == 0
    host.finish(running)
    host.check()


def test_a_text_shortage_evicts_no_more_than_it_needs(host):
    host.cache([1, 2, 3])
    host.cache([4, 5, 6])
    assert host.tree.make_room(97).num_tokens_evicted == 3
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
    assert host.tree.make_room(0, of_images=60).num_tokens_evicted == 12
    assert host.used() == (3, 0, 0)
    assert [list(node.key.token_ids) for node in host.nodes()] == [[1, 2, 3]]
    host.check()


def test_images_at_their_limit_evict_the_text_that_stands_after_the_image(host):
    host.cache([4, *image(10), 5])
    host.cache([4, *image(10), 6, 7])
    assert host.tree.make_room(0, of_images=60).num_tokens_evicted == 14
    assert host.used() == (0, 0, 0)
    host.check()


def test_images_at_their_limit_do_not_evict_text_behind_an_image_that_is_in_use(host):
    host.cache([4, *image(10), 5])
    reader = host.start([4, *image(10), 6])
    assert host.tree.make_room(0, of_images=60).num_tokens_evicted == 0
    assert host.used() == (2, 10, 1)
    host.finish(reader)
    host.check()


def test_an_aborted_prefill_returns_the_slots_that_only_it_held(host):
    req = host.start([1, *image(20), 2])
    host.prefill([(req, 8)])
    host.finish(req, insert=False)
    assert host.used() == (1, 7, 1)  # the chunk is in the tree already
    host.tree.make_room(LARGE)
    assert host.used() == (0, 0, 0)
    host.check()


def test_a_segment_that_finds_no_slab_stays_at_full_width_and_is_counted(host):
    req = host.start([1, *image(70), 2])
    # Beyond what images may hold.
    host.tree.place(req, Placement([ImageRun(1, 71)], host.allocator.layout))
    assert host.extend_all(req)
    assert host.allocator.stats.segments_full_width == {"no_room_for_images": 1}
    assert host.used() == (72, 0, 0)
    host.finish(req)
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
    shared.check()


def test_text_takes_the_memory_of_the_oldest_image(shared):
    shared.cache([1, *image(60), 2])
    shared.cache([3, *image(60, 1), 4])
    shared.cache([5] * 30)
    assert shared.used() == (32, 60, 1)
    assert [node.key.token_ids[0] for node in shared.nodes()] == [3, 5]
    shared.check()


def test_the_text_of_a_request_fills_its_own_slabs(shared):
    readers = [shared.run([i] * 4) for i in range(1, 6)]
    for _ in range(6):
        for req in readers:
            assert shared.decode(req, 50)
    assert shared.slabs.of_text == 5 * 2
    for req in readers[1:]:
        shared.finish(req, insert=False)
    shared.tree.make_room(LARGE)
    assert (shared.used(), shared.slabs.free) == ((10, 0, 0), 20 - 2)
    shared.check()


def test_the_next_turn_of_a_chat_goes_on_in_the_slab_of_the_last(shared):
    shared.cache([1, 2, 3])
    turn = shared.run([1, 2, 3, 4, 5])
    assert shared.slabs.of_text == 1
    assert np.diff(shared.row(turn)).tolist() == [1] * 4
    other = shared.run([1, 2, 3, 6])  # the rows behind the prefix are taken
    assert shared.slabs.of_text == 2
    shared.check()
    shared.finish(turn)
    shared.finish(other)
    shared.check()


def test_a_row_behind_the_end_of_an_answer_is_the_next_to_be_filled(shared):
    """The overlapped schedule computes a token too many, whose row the host gives back."""
    req = shared.run([1, 2, 3])
    assert shared.decode(req, 50)
    req.finished_len = 0
    shared.finish(req)
    assert shared.used() == (3, 0, 0)
    turn = shared.run([1, 2, 3, 7])
    assert (shared.slabs.of_text, np.diff(shared.row(turn)).tolist()) == (1, [1] * 3)
    shared.finish(turn)
    shared.check()


def test_what_others_lock_in_part_is_not_evicted_in_vain(shared):
    running = shared.run([1, 2, 3])
    for i in range(4):
        shared.cache([1, 2, 3, 10 + i])  # in slabs of their own
    shared.finish(shared.run([1, 2, 3]))
    assert shared.tree.make_room(LARGE).num_tokens_evicted == 4
    assert shared.used() == (3, 0, 0)
    shared.finish(running)
    shared.check()


@pytest.mark.parametrize("tokens", [1, 19, 20, 21, 64, 65, 79, 80, 81, 330])
@pytest.mark.parametrize("rank", [16, 32, 64, 96])
def test_an_image_never_takes_more_memory_than_at_full_width(tokens, rank):
    rows = RowFormat(rank, 16, 16)
    shape = KVShape(
        num_layers=2,
        num_kv_heads=2,
        head_dim=128,
        v_head_dim=128,
        rows=rows,
        kv_bytes=2,
        dtype_bytes=2,
    )
    layout = layout_of_slabs(60, RotateKConfig(), shape)
    host = Host(layout, RotateKConfig())
    host.cache([*image(tokens), 1])
    full_width = Host(layout, RotateKConfig(min_image_tokens=LARGE))
    full_width.cache([*image(tokens), 1])
    assert host.slabs.free >= full_width.slabs.free


def test_a_flush_gives_all_slabs_back(shared):
    shared.cache([1, *image(60), 2])
    shared.tree.reset()
    shared.allocator.clear()
    assert (shared.used(), shared.slabs.free, shared.slabs.allowed_for_images) == (
        (0, 0, 0),
        20,
        19,
    )
    assert shared.allocator.available_size() == shared.allocator.size
    shared.check()


def test_the_device_is_told_of_a_row_that_the_tree_rewrote(host):
    prompt = [1, *image(10), 2]
    first, second = host.start(prompt), host.start(prompt)
    host.extend_all(first, second)
    host.tree.rewritten.clear()
    for req in (first, second):
        checkpoint_kv_cache(req, host.tree)
    assert host.tree.rewritten == {second.kv.req_pool_idx}
    for req in (first, second):
        host.finish(req)
