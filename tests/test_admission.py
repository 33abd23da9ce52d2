"""Which pool an image goes to, and which requests the adder lets in."""

from __future__ import annotations

import random
from array import array
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sglang.srt.managers.schedule_batch import Modality, MultimodalDataItem, ReqKvInfo
from sglang.srt.managers.schedule_policy import AddReqResult
from sglang.srt.mem_cache.base_prefix_cache import MatchPrefixParams
from sglang.srt.mem_cache.common import checkpoint_kv_cache
from sglang.srt.mem_cache.radix_cache import RadixKey
from test_radix_cache import Host, Request, image

from sglang_rotatek.memory.admission import RotateKPrefillAdder, place_images, prompt_runs
from sglang_rotatek.config import RotateKConfig
from sglang_rotatek.memory.layout import PoolLayout
from sglang_rotatek.patches.scheduler import init_req_max_new_tokens
from sglang_rotatek.memory.tree import request_state
from sglang_rotatek.memory.segments import ImageRun, Placement, cut_segments
from sglang_rotatek.stats import NO_SLABS, TOO_SHORT

CONFIG = RotateKConfig(min_image_tokens=4)
LARGE = 1 << 20


pytestmark = pytest.mark.usefixtures("host_configuration")


def place(runs, start=0, *, slabs=LARGE, chunk=None, config=CONFIG, slab_tokens=1):
    layout = PoolLayout(LARGE, LARGE, text_rows=1, visual_rows=slab_tokens)
    return place_images(runs, start, config, slab_budget=slabs, chunk_tokens=chunk, layout=layout)


def test_a_short_image_stays_at_full_width():
    assert place([ImageRun(0, 3), ImageRun(3, 7)]) == Placement([ImageRun(3, 7)], [(TOO_SHORT, 3)])


def test_an_image_without_enough_slabs_stays_at_full_width_and_leaves_room_for_a_smaller_one():
    runs = [ImageRun(0, 20), ImageRun(20, 30)]
    assert place(runs, slabs=20) == Placement([ImageRun(20, 30)], [(NO_SLABS, 20)])


def test_images_share_one_budget_of_slabs():
    runs = [ImageRun(0, 20), ImageRun(20, 30)]
    assert place(runs, slabs=31) == Placement([ImageRun(0, 20)], [(NO_SLABS, 10)])
    assert place(runs, slabs=32) == Placement(runs)


def test_every_segment_takes_whole_slabs_and_one_for_its_basis():
    run = [ImageRun(0, 20)]
    assert place(run, slabs=3, slab_tokens=8).full_width == [(NO_SLABS, 20)]
    assert place(run, slabs=4, slab_tokens=8).rotated == run
    # A chunk of 10 can cut it twice.
    assert place(run, slabs=7, chunk=10, slab_tokens=8).full_width == [(NO_SLABS, 20)]
    assert place(run, slabs=8, chunk=10, slab_tokens=8).rotated == run
    segments = RotateKConfig(min_image_tokens=4, segment_tokens=5)
    assert place(run, slabs=9, config=segments, slab_tokens=8).full_width == [(NO_SLABS, 20)]
    assert place(run, slabs=10, config=segments, slab_tokens=8).rotated == run


def test_only_the_uncached_part_of_an_image_is_charged():
    runs = [ImageRun(0, 10), ImageRun(12, 32)]
    assert place(runs, 28, slabs=5) == Placement([ImageRun(12, 32)])
    assert place(runs, 28, slabs=4) == Placement([], [(NO_SLABS, 4)])


def test_the_length_of_an_image_counts_even_when_little_of_it_is_left_to_compute():
    assert place([ImageRun(0, 10)], 9) == Placement([ImageRun(0, 10)])


class WaitingRequest(Request):
    """What the adder reads of a host request, besides the cache's part."""

    host_hit_length = swa_host_hit_length = auxiliary_swa_host_hit_length = 0
    storage_hit_length = storage_hit_start = 0
    host_hit_is_storage = retracted_stain = False
    cache_request_handle = discard_output_reason = to_finish = multimodal_inputs = None
    rid = "waiting"

    def __init__(self, token_ids: list[int], max_new_tokens: int = 10) -> None:
        super().__init__(token_ids)
        self.sampling_params = SimpleNamespace(max_new_tokens=max_new_tokens, min_new_tokens=0, ignore_eos=False)

    def needs_host_load_back(self) -> bool:
        return False

    def materialized_host_hit_len(self) -> int:
        return 0

    def fulfilled_storage_hit_len(self, prefix_len: int) -> int:
        return 0

    def set_finish_with_abort(self, message: str) -> None:
        self.to_finish = message

    def match(self, tree) -> WaitingRequest:
        """As init_next_round_input."""
        self.refresh_fill_ids()
        key = RadixKey(self.full_untruncated_fill_ids, limit=len(self.full_untruncated_fill_ids) - 1)
        match = tree.match_prefix(MatchPrefixParams(key=key))
        self.prefix_len, self.last_node = match.device_prefix_len, match.last_device_node
        self.kv.cache_protected_len = self.prefix_len
        return self


def item(modality: Modality, *offsets: tuple[int, int], grid: list[int] | None = None) -> MultimodalDataItem:
    fields = {} if grid is None else {f"{modality.name.lower()}_grid_thw": torch.tensor([grid])}
    return MultimodalDataItem(modality=modality, feature=None, offsets=list(offsets), model_specific_data=fields)


def test_a_video_of_one_range_is_cut_by_its_frame_groups_and_others_are_not():
    ids = [1, *image(1200, 1), 2, *image(1200, 2), 3, *image(300, 3), 4, *image(300, 3), 5]
    req = WaitingRequest(ids)
    whole = [ImageRun(1, 1201), ImageRun(1202, 2402), ImageRun(2403, 2703), ImageRun(2704, 3004)]
    assert prompt_runs(req) == whole
    req.multimodal_inputs = SimpleNamespace(
        mm_items=[
            item(Modality.IMAGE, (1, 1200), grid=[1, 60, 80]),
            item(Modality.VIDEO, (1202, 2401), grid=[4, 30, 40]),
            item(Modality.VIDEO, (2403, 2702), (2704, 3003), grid=[2, 30, 40]),  # text between the groups
        ]
    )
    groups = [ImageRun(1202 + 300 * i, 1502 + 300 * i) for i in range(4)]
    assert prompt_runs(req) == [whole[0], *groups, *whole[2:]]


def batch_of(reqs) -> SimpleNamespace:
    return SimpleNamespace(reqs=reqs, is_empty=lambda: not reqs, batch_size=lambda: len(reqs))


def make_adder(tree, *, chunk=None, running=(), scheduler=None):
    scheduler = scheduler or SimpleNamespace(_pending_chunked_abort_req=None)
    running_batch = batch_of(list(running))
    return RotateKPrefillAdder(
        1, tree, tree.token_to_kv_pool_allocator, running_batch, 0.1, LARGE, chunk, scheduler=scheduler
    )


def add(adder, req: WaitingRequest):
    return adder.add_one_req(req.match(adder.tree_cache), has_chunked_req=False, truncation_align_size=None)


def make_host(num_slabs=200, max_visual_slabs=100):
    """Slabs of one text token, or of four image tokens."""
    return Host(PoolLayout(num_slabs, max_visual_slabs, text_rows=1, visual_rows=4), CONFIG)


@pytest.fixture
def host():
    return make_host(num_slabs=100)


def test_a_text_request_is_admitted_when_images_hold_all_that_they_may():
    host = make_host(max_visual_slabs=80)
    host.visual.alloc(316)
    req, adder = WaitingRequest([1] * 20), make_adder(host.tree)
    assert add(adder, req) == AddReqResult.CONTINUE
    assert adder.can_run_list == [req]
    assert adder.rem_total_tokens == 120 - 20 - 10 - 1
    assert adder.cur_rem_tokens == 120 - 20 - 1


def test_an_image_is_charged_its_slabs_in_text_tokens(host):
    req, adder = WaitingRequest([1, *image(299), 2, 3]), make_adder(host.tree)
    assert add(adder, req) == AddReqResult.CONTINUE
    assert (req.prefix_len, req.extend_end) == (0, 302)
    assert adder.rem_total_tokens == 100 - 3 - 76 - 10 - 1
    assert host.allocator.stats.images_compressed == 1


@pytest.mark.parametrize(("text", "result"), [(12, AddReqResult.CONTINUE), (13, AddReqResult.NO_TOKEN)])
def test_a_prompt_is_refused_when_its_text_and_images_and_answer_do_not_fit(host, text, result):
    adder = make_adder(host.tree)
    assert add(adder, WaitingRequest([1] * text + image(300))) == result
    assert len(adder.can_run_list) == (result == AddReqResult.CONTINUE)
    assert host.used() == (0, 0, 0)
    host.check()


def test_an_image_that_stays_at_full_width_is_charged_as_text():
    host = make_host(max_visual_slabs=80)
    host.visual.alloc(312)
    adder = make_adder(host.tree)
    assert add(adder, WaitingRequest([1, *image(50), 2])) == AddReqResult.CONTINUE
    assert adder.rem_total_tokens == 121 - 52 - 10 - 1
    assert add(adder, WaitingRequest([1, *image(50, 1), 2])) == AddReqResult.NO_TOKEN
    assert host.allocator.stats.segments_full_width == {NO_SLABS: 1}


def test_requests_of_one_round_share_the_slabs():
    host = make_host(max_visual_slabs=90)
    adder = make_adder(host.tree)
    first, second = WaitingRequest([1, *image(300), 2]), WaitingRequest([1, *image(50, 1), *image(60, 2), 2])
    assert [add(adder, first), add(adder, second)] == [AddReqResult.CONTINUE] * 2
    assert request_state(second).placement == Placement([ImageRun(1, 51)], [(NO_SLABS, 60)])
    assert adder.rem_total_tokens == 200 - (2 + 76 + 10 + 1) - (2 + 14 + 60 + 10 + 1)


def test_a_request_waits_when_its_prefix_is_what_another_was_promised():
    host = make_host()
    host.cache([*image(300), 1])
    locking = WaitingRequest([*image(300), 1, 2])
    adder = make_adder(host.tree)
    assert add(adder, WaitingRequest([3, *image(350, 1), 3])) == AddReqResult.CONTINUE
    assert add(adder, locking) == AddReqResult.OTHER
    assert len(adder.can_run_list) == 1
    assert locking.last_node.lock_ref == 0


def test_cached_text_goes_for_an_image_that_free_slabs_and_images_cannot_hold(host):
    for number in range(9):
        host.cache([number] * 10)
    adder = make_adder(host.tree)
    assert add(adder, WaitingRequest([11, *image(100), 12])) == AddReqResult.CONTINUE
    assert adder.can_run_list[0].rotatek.placement.rotated == [ImageRun(1, 101)]
    assert host.used()[0] == 70  # 10 slabs were free, 26 are wanted


def test_cached_text_stays_when_the_image_could_not_be_admitted_all_the_same(host):
    running = host.run([1] * 60)
    host.cache([2] * 30)
    adder = make_adder(host.tree, running=[WaitingRequest([1])])
    assert add(adder, WaitingRequest([11, *image(200), 12])) == AddReqResult.NO_TOKEN
    assert host.used()[0] == 90
    host.finish(running)


def chunked(host, token_ids: list[int], placement: Placement) -> WaitingRequest:
    req = WaitingRequest(token_ids)
    req.last_node = host.tree.root_node
    request_state(req).placement = placement
    return req


def test_a_chunk_is_shortened_to_the_text_budget(host):
    req = chunked(host, [1] * 15 + image(30) + [2] * 30, Placement([ImageRun(15, 45)]))
    host.allocator.alloc(71)
    adder = make_adder(host.tree, chunk=64)
    assert adder.add_chunked_req(req) is req
    assert (req.prefix_len, req.extend_end) == (0, 15 + 30 + 5)
    assert adder.can_run_list == [req]
    assert adder.cur_rem_tokens == -1  # memory of 29 text tokens, and the host's one page for each request


@pytest.mark.parametrize(("used", "length"), [(76, 15 + 30 + 0), (77, 15), (95, 5)])
def test_a_chunk_that_memory_shortens_cuts_no_image(host, used, length):
    req = chunked(host, [1] * 15 + image(30) + [2] * 30, Placement([ImageRun(15, 45)]))
    host.allocator.alloc(used)
    adder = make_adder(host.tree, chunk=64)
    assert adder.add_chunked_req(req) is req
    assert (req.prefix_len, req.extend_end) == (0, length)


def test_the_last_chunk_returns_none(host):
    req = chunked(host, [1] * 15 + image(30), Placement([ImageRun(15, 45)]))
    adder = make_adder(host.tree, chunk=64)
    assert adder.add_chunked_req(req) is None
    assert req.extend_len == 45
    assert adder.rem_chunk_tokens == 64 - 45


def test_a_chunked_request_without_a_text_slot_is_parked_and_no_other_is_chunked(host):
    req = chunked(host, [1] * 30, Placement([]))
    host.allocator.alloc(100)
    adder = make_adder(host.tree, chunk=64, running=[WaitingRequest([1])])
    assert adder.add_chunked_req(req) is req
    host.allocator.free(torch.arange(1, 101))
    assert add(adder, WaitingRequest([5] * 70)) == AddReqResult.OTHER
    assert (adder.can_run_list, adder.new_chunked_req) == ([], None)


def test_a_parked_request_is_aborted_only_when_nothing_else_can_free_text(host):
    req = chunked(host, [1] * 30, Placement([]))
    host.allocator.alloc(100)
    scheduler = SimpleNamespace(_pending_chunked_abort_req=None)
    for running, expected in (([WaitingRequest([1])], None), ([], req), ([], req)):
        assert make_adder(host.tree, chunk=64, running=running, scheduler=scheduler).add_chunked_req(req) is req
        assert scheduler._pending_chunked_abort_req is expected
    assert host.allocator.stats.requests_stranded == 1
    assert req.discard_output_reason.status_code == 503
    assert "Shorten the prompt" in req.discard_output_reason.message
    assert req.extend_end == req.prefix_len  # else the host would store a chunk that was not computed


def add_chunk_beside_text(rows_held: int):
    """Adder and request of an image and text, where other text holds ``rows_held`` of the 5 rows of every slab."""
    layout = PoolLayout(num_slabs=40, max_visual_slabs=38, text_rows=5, visual_rows=8)
    host = Host(layout, CONFIG)
    slots = host.allocator.alloc(layout.text_slots).view(-1, layout.text_rows)
    host.allocator.free(slots[:, rows_held:].flatten())
    req = chunked(host, image(50) + [2] * 30, Placement([ImageRun(0, 50)]))
    adder = make_adder(host.tree, chunk=64, running=[WaitingRequest([1])])
    assert adder.add_chunked_req(req) is req
    return adder, req, host.allocator.stats


def test_a_chunk_goes_on_at_full_width_where_free_rows_make_no_slab():
    _, req, stats = add_chunk_beside_text(rows_held=1)
    assert (req.prefix_len, req.extend_end) == (0, 64)
    assert request_state(req).placement.rotated == []
    assert stats.segments_full_width == {NO_SLABS: 1}


def test_a_chunk_waits_where_neither_slabs_nor_full_width_fit():
    adder, req, _ = add_chunk_beside_text(rows_held=4)
    assert (adder.can_run_list, adder.rem_chunk_tokens) == ([], 0)
    assert request_state(req).placement.rotated == [ImageRun(0, 50)]


def test_nothing_goes_for_an_image_while_another_request_has_the_chunk(host):
    host.cache([2] * 90)
    adder = make_adder(host.tree, chunk=64)
    adder.rem_chunk_tokens = 0
    assert add(adder, WaitingRequest([1, *image(100), 2])) == AddReqResult.NO_TOKEN
    assert host.used() == (90, 0, 0)


def test_nothing_goes_for_an_image_beyond_what_images_may_hold():
    host = make_host(num_slabs=100, max_visual_slabs=20)
    host.cache([1, *image(40), 2])
    host.cache([3] * 60)
    adder = make_adder(host.tree, running=[WaitingRequest([1])])
    assert add(adder, WaitingRequest([4, *image(90, 1), 5])) == AddReqResult.NO_TOKEN
    assert host.used() == (62, 40, 1)


@pytest.mark.parametrize("num_outputs", [0, 60, 61, 500, 1500])
def test_a_retracted_request_that_outgrew_the_chunk_is_admitted(num_outputs):
    config = RotateKConfig(min_image_tokens=64)
    host = Host(PoolLayout(num_slabs=400, max_visual_slabs=380, text_rows=5, visual_rows=8), config)
    host.chunked_prefill_size, host.token_to_kv_pool_allocator = 512, host.allocator
    req = WaitingRequest([1, *sum((image(100, i) for i in range(4)), []), *[2] * 50], max_new_tokens=100_000)
    init_req_max_new_tokens(lambda *_: None, host, req)
    assert req.sampling_params.max_new_tokens > 1500
    req.output_ids = array("q", [50] * num_outputs)
    adder = make_adder(host.tree, chunk=512)
    add(adder, req)
    assert adder.can_run_list == [req]


def test_a_lone_request_whose_cached_prefix_takes_its_room_drops_the_prefix():
    host = make_host(num_slabs=100, max_visual_slabs=36)
    blocked, _ = host.visual.alloc(120)
    host.cache([1, *image(60), 2])  # at full width
    host.visual.release(blocked, locked=True)
    req = WaitingRequest([1, *image(60), 2] + [3] * 50)
    assert add(make_adder(host.tree), req) == AddReqResult.NO_TOKEN
    assert host.allocator.stats.prefixes_dropped == 1
    assert host.used() == (0, 0, 0)
    assert add(make_adder(host.tree), req) == AddReqResult.CONTINUE


class Scheduler(Host):
    """The host's scheduling loop in small: prefill first, one chunked request, retraction; results a round late."""

    def __init__(self, layout: PoolLayout, config: RotateKConfig, chunk: int) -> None:
        super().__init__(layout, config)
        self.chunked_prefill_size, self.token_to_kv_pool_allocator = chunk, self.allocator
        self.waiting: list[WaitingRequest] = []
        self.decoding: list[WaitingRequest] = []
        self.in_flight: list[WaitingRequest] = []
        self.chunked: WaitingRequest | None = None

    def submit(self, req: WaitingRequest) -> bool:
        init_req_max_new_tokens(lambda *_: None, self, req)
        if req.to_finish is None:
            self.waiting.append(req)
        return req.to_finish is None

    def round(self) -> None:
        if self.chunked in self.running and self.chunked.extend_end > self.chunked.prefix_len:
            checkpoint_kv_cache(self.chunked, self.tree)
        adder = make_adder(self.tree, chunk=self.chunked_prefill_size, running=self.decoding)
        if self.chunked is not None:
            self.chunked = adder.add_chunked_req(self.chunked)
        for req in self.waiting:
            if add(adder, req) != AddReqResult.CONTINUE:
                break
        batch = adder.can_run_list
        self.waiting = [req for req in self.waiting if req not in batch]
        self.chunked = adder.new_chunked_req or self.chunked
        if batch:
            self.extend_all(batch)
        late, self.in_flight = self.in_flight, [req for req in batch if req is not self.chunked]
        for req in late:
            checkpoint_kv_cache(req, self.tree)
        if not batch:
            self.decode_all()
        self.decoding += self.in_flight

    def extend_all(self, batch: list[WaitingRequest]) -> None:
        visual_tokens = sum(
            high - low
            for req in batch
            for run in request_state(req).placement.rotated
            for low, high in cut_segments(run, req.prefix_len, req.extend_end, None)
        )
        plan, _ = self.extend(batch)
        assert plan.num_text_tokens == plan.num_tokens - visual_tokens, "an image found no room that admission promised"
        self.running += [req for req in batch if req not in self.running]

    def decode_all(self) -> None:
        def fits(reqs) -> bool:
            return self.allocator.check_decode_capacity(num_tokens=len(reqs), tree_cache=self.tree)

        for req in [req for req in self.decoding if len(req.output_ids) >= req.stop_after]:
            self.decoding.remove(req)
            self.finish(req)
        while self.decoding and not fits(self.decoding):
            req = self.decoding.pop()
            self.finish(req, insert=False)
            assert self.decoding, "the last request cannot decode"
            req.kv, req.lock, req.is_finished = ReqKvInfo(), None, False
            self.waiting.append(req)
        for req in self.decoding:
            assert self.decode(req, 50)


@settings(max_examples=150, deadline=None)
@given(st.integers(0, 1 << 32))
def test_what_the_adder_admits_finds_its_slots_and_every_request_ends(seed):
    rng = random.Random(seed)
    rows, num_slabs = rng.choice([(5, 8), (9, 16), (3, 4), (1, 1), (11, 16)]), rng.choice([20, 40, 80])
    layout = PoolLayout(num_slabs, int(num_slabs * rng.choice([0.95, 0.5, 0.3])), *rows)
    config = RotateKConfig(min_image_tokens=4, segment_tokens=rng.choice([None, None, 16]))
    scheduler = Scheduler(layout, config, chunk=rng.choice([8, 16, 33, 64, 200]))
    lengths = [3, 4, rows[1], rows[1] + 1, 30, 64, 100]
    pieces = [[1, 2, 3], [4] * 20, *(image(length, number) for number, length in enumerate(lengths))]
    left = 12
    for _ in range(3000):
        if left and rng.random() < 0.6:
            left -= 1
            prompt = sum(rng.choices(pieces, k=rng.randint(1, 4)), []) + [8]
            req = WaitingRequest(prompt, max_new_tokens=rng.randint(1, 30))
            req.stop_after = rng.randint(1, 30)
            if scheduler.submit(req):
                req.stop_after = min(req.stop_after, req.sampling_params.max_new_tokens)
        scheduler.round()
        if not (left or scheduler.waiting or scheduler.running or scheduler.chunked):
            break
    assert (left, scheduler.waiting, scheduler.running, scheduler.chunked) == (0, [], [], None)
    scheduler.check()
