"""Which pool an image goes to, and which requests the adder lets in."""

from __future__ import annotations

import random
from array import array
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scheduler_host import Host, WaitingRequest, image
from sglang.srt.managers.schedule_batch import Modality, MultimodalDataItem, ReqKvInfo
from sglang.srt.managers.schedule_policy import AddReqResult
from sglang.srt.mem_cache.common import checkpoint_kv_cache

from sglang_rotatek.config import RotateKConfig
from sglang_rotatek.memory.admission import RotateKPrefillAdder
from sglang_rotatek.memory.layout import PoolLayout
from sglang_rotatek.memory.placement import place_images, prompt_runs
from sglang_rotatek.memory.segments import ImageRun, Placement
from sglang_rotatek.patches.scheduler import init_req_max_new_tokens
from sglang_rotatek.stats import NO_SLABS, NOT_SMALLER, TOO_MANY_SEGMENTS, TOO_SHORT

CONFIG = RotateKConfig(min_image_tokens=4)
LARGE = 1 << 20


pytestmark = pytest.mark.usefixtures("host_configuration")


def place(runs, start=0, *, slabs=LARGE, chunk=None, config=CONFIG, slab_tokens=1, text_rows=1):
    """What is rotated, and what is not with its reason."""
    layout = PoolLayout(LARGE, LARGE, text_rows=text_rows, visual_rows=slab_tokens)
    placement = place_images(
        runs, start, config, slab_budget=slabs, chunk_tokens=chunk, layout=layout
    )
    return placement.rotated, placement.full_width


def test_a_short_image_stays_at_full_width():
    assert place([ImageRun(0, 3), ImageRun(3, 7)]) == ([ImageRun(3, 7)], [(TOO_SHORT, 3)])


@pytest.mark.parametrize(
    ("tokens", "is_rotated"),
    [(40, False), (60, False), (61, True), (64, True), (65, False), (80, False), (81, True)],
)
def test_without_a_limit_an_image_is_rotated_where_that_takes_less_memory(tokens, is_rotated):
    """Slabs of 20 text rows and 32 visual rows: three, that of the basis among them, hold an image
    of 64 or 60 text tokens."""
    assert place([ImageRun(0, tokens)], config=RotateKConfig(), slab_tokens=32, text_rows=20) == (
        ([ImageRun(0, tokens)], []) if is_rotated else ([], [(NOT_SMALLER, tokens)])
    )


def test_a_rest_of_an_image_that_is_no_smaller_narrow_stays_at_full_width():
    runs = [ImageRun(0, 2928)]
    assert place(runs, 2925, config=RotateKConfig(), slab_tokens=32, text_rows=20) == (
        [],
        [(NOT_SMALLER, 3)],
    )
    layout = PoolLayout(LARGE, LARGE, text_rows=20, visual_rows=32)
    placement = place_images(
        runs, 0, RotateKConfig(), slab_budget=LARGE, chunk_tokens=2925, layout=layout
    )
    assert placement.segments(0, 2925) == [(0, 2925)]
    assert placement.segments(2925, 2928) == []


def test_an_image_without_enough_slabs_stays_at_full_width_and_leaves_room_for_a_smaller_one():
    runs = [ImageRun(0, 20), ImageRun(20, 30)]
    assert place(runs, slabs=20) == ([ImageRun(20, 30)], [(NO_SLABS, 20)])


def test_images_share_one_budget_of_slabs():
    runs = [ImageRun(0, 20), ImageRun(20, 30)]
    assert place(runs, slabs=31) == ([ImageRun(0, 20)], [(NO_SLABS, 10)])
    assert place(runs, slabs=32) == (runs, [])


def test_every_segment_takes_whole_slabs_and_one_for_its_basis():
    run = [ImageRun(0, 20)]
    left, rotated = ([], [(NO_SLABS, 20)]), (run, [])
    assert place(run, slabs=3, slab_tokens=8) == left
    assert place(run, slabs=4, slab_tokens=8) == rotated
    # A chunk of 10 can cut it twice.
    assert place(run, slabs=7, chunk=10, slab_tokens=8) == left
    assert place(run, slabs=8, chunk=10, slab_tokens=8) == rotated
    segments = RotateKConfig(min_image_tokens=4, segment_tokens=5)
    assert place(run, slabs=9, config=segments, slab_tokens=8) == left
    assert place(run, slabs=10, config=segments, slab_tokens=8) == rotated


def test_images_that_would_make_more_segments_than_a_request_may_have_stay_at_full_width():
    runs = [ImageRun(0, 20), ImageRun(20, 40), ImageRun(40, 45)]
    layout = PoolLayout(LARGE, LARGE, text_rows=1, visual_rows=1)
    config = RotateKConfig(min_image_tokens=4, segment_tokens=10)
    options = {"slab_budget": LARGE, "chunk_tokens": None, "layout": layout, "segment_budget": 3}
    placement = place_images(runs, 0, config, **options)
    assert placement.rotated == [runs[0], runs[2]]
    assert placement.full_width == [(TOO_MANY_SEGMENTS, 20)]


def test_the_segments_of_the_prefix_count(host):
    prompt = [1, *image(20), 2, *image(10, 1), 3]
    host.cache(prompt)
    adder = make_adder(host.tree)
    adder._most_segments = 3
    req = WaitingRequest([*prompt, *image(10, 2), 4, *image(10, 3), 5])
    assert add(adder, req) == AddReqResult.CONTINUE
    assert host.tree.segments_of(req.last_node) == 2
    assert [reason for reason, _ in host.tree.placement_of(req).full_width] == [TOO_MANY_SEGMENTS]


def test_only_the_uncached_part_of_an_image_is_charged():
    runs = [ImageRun(0, 10), ImageRun(12, 32)]
    assert place(runs, 28, slabs=5) == ([ImageRun(12, 32)], [])
    assert place(runs, 28, slabs=4) == ([], [(NO_SLABS, 4)])


def test_the_length_of_an_image_counts_even_when_little_of_it_is_left_to_compute():
    assert place([ImageRun(0, 10)], 9) == ([ImageRun(0, 10)], [])


def item(
    modality: Modality, *offsets: tuple[int, int], grid: list[int] | None = None
) -> MultimodalDataItem:
    fields = {} if grid is None else {f"{modality.name.lower()}_grid_thw": torch.tensor([grid])}
    return MultimodalDataItem(
        modality=modality, feature=None, offsets=list(offsets), model_specific_data=fields
    )


def test_a_video_of_one_range_is_cut_by_its_frame_groups_and_others_are_not():
    ids = [1, *image(1200, 1), 2, *image(1200, 2), 3, *image(300, 3), 4, *image(300, 3), 5]
    req = WaitingRequest(ids)
    whole = [ImageRun(1, 1201), ImageRun(1202, 2402), ImageRun(2403, 2703), ImageRun(2704, 3004)]
    assert prompt_runs(WaitingRequest(ids)) == whole
    req.multimodal_inputs = SimpleNamespace(
        mm_items=[
            item(Modality.IMAGE, (1, 1200), grid=[1, 60, 80]),
            item(Modality.VIDEO, (1202, 2401), grid=[4, 30, 40]),
            # Text between the groups.
            item(Modality.VIDEO, (2403, 2702), (2704, 3003), grid=[2, 30, 40]),
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
        1,
        tree,
        tree.token_to_kv_pool_allocator,
        running_batch,
        0.1,
        LARGE,
        chunk,
        scheduler=scheduler,
    )


def add(adder, req: WaitingRequest):
    return adder.add_one_req(
        req.match(adder.tree_cache), has_chunked_req=False, truncation_align_size=None
    )


def make_host(num_slabs=200, max_visual_slabs=100):
    """Slabs of one text token, or of four image tokens."""
    return Host(PoolLayout(num_slabs, max_visual_slabs, text_rows=1, visual_rows=4), CONFIG)


@pytest.fixture
def host():
    return make_host(num_slabs=100)


def fill(host, slabs: int) -> None:
    """Text that a running request holds in so many slabs."""
    host.run([7] * (slabs * host.allocator.layout.text_rows))


REST = 1  # the last slab of a request's text may be filled by a row alone: here a slab is a row
PAGE = 1  # that the host adds for each request


def test_a_text_request_is_admitted_when_images_hold_all_that_they_may():
    host = make_host(max_visual_slabs=80)
    host.run([*image(316), 9])
    req, adder = WaitingRequest([1] * 20), make_adder(host.tree)
    assert add(adder, req) == AddReqResult.CONTINUE
    assert adder.can_run_list == [req]
    assert adder.rem_total_tokens == 119 - 20 - 10 - PAGE - REST
    assert adder.cur_rem_tokens == 119 - 20 - PAGE - REST


def test_an_image_is_charged_its_slabs_in_text_tokens(host):
    req, adder = WaitingRequest([1, *image(299), 2, 3]), make_adder(host.tree)
    assert add(adder, req) == AddReqResult.CONTINUE
    assert (req.prefix_len, req.extend_end) == (0, 302)
    assert adder.rem_total_tokens == 100 - 3 - 76 - 10 - PAGE - REST
    assert host.allocator.stats.images_compressed == 1


@pytest.mark.parametrize(
    ("text", "result"), [(11, AddReqResult.CONTINUE), (12, AddReqResult.NO_TOKEN)]
)
def test_a_prompt_is_refused_when_its_text_and_images_and_answer_do_not_fit(host, text, result):
    adder = make_adder(host.tree)
    assert add(adder, WaitingRequest([1] * text + image(300))) == result
    assert len(adder.can_run_list) == (result == AddReqResult.CONTINUE)
    assert host.used() == (0, 0, 0)
    host.check()


def test_an_image_that_stays_at_full_width_is_charged_as_text():
    host = make_host(max_visual_slabs=80)
    host.run([*image(312), 9])
    adder = make_adder(host.tree)
    assert add(adder, WaitingRequest([1, *image(50), 2])) == AddReqResult.CONTINUE
    assert adder.rem_total_tokens == 120 - 52 - 10 - PAGE - REST
    assert add(adder, WaitingRequest([1, *image(50, 1), 2])) == AddReqResult.NO_TOKEN
    assert host.allocator.stats.segments_full_width == {NO_SLABS: 1}


def test_requests_of_one_round_share_the_slabs():
    host = make_host(max_visual_slabs=90)
    adder = make_adder(host.tree)
    first, second = (
        WaitingRequest([1, *image(300), 2]),
        WaitingRequest([1, *image(50, 1), *image(60, 2), 2]),
    )
    assert [add(adder, first), add(adder, second)] == [AddReqResult.CONTINUE] * 2
    placement = host.tree.placement_of(second)
    assert (placement.rotated, placement.full_width) == ([ImageRun(1, 51)], [(NO_SLABS, 60)])
    assert adder.rem_total_tokens == 200 - (2 + 76 + 10 + 1 + REST) - (
        2 + 14 + 60 + 10 + PAGE + REST
    )


def test_a_request_waits_when_its_prefix_is_what_another_was_promised():
    host = make_host()
    host.cache([*image(300), 1])
    locking = WaitingRequest([*image(300), 1, 2])
    adder = make_adder(host.tree)
    assert add(adder, WaitingRequest([3] * 120)) == AddReqResult.CONTINUE
    assert add(adder, locking) == AddReqResult.NO_TOKEN
    assert len(adder.can_run_list) == 1
    assert locking.last_node.lock_ref == 0


def test_a_request_waits_when_its_prefix_is_images_that_another_was_promised():
    host = make_host(num_slabs=200, max_visual_slabs=100)
    host.cache([*image(300), 1])
    locking = WaitingRequest([*image(300), 1, 2])
    adder = make_adder(host.tree)
    assert add(adder, WaitingRequest([3, *image(350, 1), 3])) == AddReqResult.CONTINUE
    assert add(adder, locking) == AddReqResult.OTHER
    assert len(adder.can_run_list) == 1
    assert locking.last_node.lock_ref == 0


def test_admission_evicts_nothing(host):
    for number in range(9):
        host.cache([number] * 10)
    adder = make_adder(host.tree)
    assert add(adder, WaitingRequest([11, *image(100), 12])) == AddReqResult.CONTINUE
    assert host.tree.placement_of(adder.can_run_list[0]).rotated == [ImageRun(1, 101)]
    assert host.used() == (90, 0, 0)
    host.check()


def test_an_admitted_image_evicts_what_it_needs_and_no_more():
    """Slabs of 20 text rows and 32 visual rows, full of text of 64 chats that decoded side by
    side."""
    host = Host(PoolLayout(400, 380, text_rows=20, visual_rows=32), RotateKConfig())
    for first in range(0, 64, 8):
        chats = [host.run([1000 + first + i] * 7) for i in range(8)]
        for step in range(110):
            assert all(host.decode(req, step) for req in chats)
        for req in chats:
            host.finish(req)
    assert host.slabs.free < 20
    cached = host.tree.total_size()
    adder = make_adder(host.tree)
    prompt = [1, *image(2928), 2]
    assert add(adder, WaitingRequest(prompt)) == AddReqResult.CONTINUE
    host.running += adder.can_run_list
    needed = 94 - host.slabs.free  # 92 slabs of rows, a basis, and one of text
    host.extend(adder.can_run_list)
    evicted = cached - host.tree.total_size()
    assert evicted <= 1.2 * needed * 20 + 117
    host.check()


def test_cached_text_stays_when_the_image_could_not_be_admitted_all_the_same(host):
    running = host.run([1] * 60)
    host.cache([2] * 30)
    adder = make_adder(host.tree, running=[WaitingRequest([1])])
    assert add(adder, WaitingRequest([11, *image(200), 12])) == AddReqResult.NO_TOKEN
    assert host.used()[0] == 90
    host.finish(running)


def running_request(max_new_tokens: int) -> WaitingRequest:
    req = WaitingRequest([1], max_new_tokens)
    req.sampling_params.ignore_eos = True
    req.priority, req.finished = 0, lambda: False
    req.time_stats = SimpleNamespace(wait_queue_entry_time=0)
    return req


@pytest.mark.parametrize(("tokens", "is_preempted"), [(236, True), (237, False)])
def test_preemption_counts_an_image_as_what_it_takes(host, tokens, is_preempted, monkeypatch):
    """27 of 100 are taken and 50 reserved. An image of 236 tokens takes 60, and its text, answer
    and rest of a slab 13."""
    monkeypatch.setattr(
        "sglang.srt.managers.schedule_policy.get_schedule",
        lambda: SimpleNamespace(schedule_low_priority_values_first=False),
    )
    running = running_request(max_new_tokens=50)
    adder = make_adder(host.tree, running=[running])
    adder.running_batch.release_req = lambda *_: None
    adder.running_batch.filter_batch = lambda **_: None
    fill(host, 27)
    req = WaitingRequest([1, *image(tokens), 2])  # the host asks before it matches
    req.priority = 5
    assert adder.preempt_to_schedule(req) is is_preempted


def test_preemption_does_not_trust_a_match_of_an_earlier_round(host, monkeypatch):
    monkeypatch.setattr(
        "sglang.srt.managers.schedule_policy.get_schedule",
        lambda: SimpleNamespace(schedule_low_priority_values_first=False),
    )
    host.cache([1, *image(40), 2])
    host.cache([*image(300, 1), 3])
    req = WaitingRequest([1, *image(40), 2, *image(399, 2)]).match(host.tree)
    req.priority = 5
    host.tree.drop_branch(req.last_node)
    adder = make_adder(host.tree, running=[running_request(max_new_tokens=50)])
    assert adder.preempt_to_schedule(req) is False
    assert req.prefix_len == 0
    host.check()


def test_a_branch_that_a_parked_request_reads_is_not_dropped(host):
    parked = chunked(host, [1] * 30, [])
    fill(host, 99)
    scheduler = SimpleNamespace(_pending_chunked_abort_req=None)
    adder = make_adder(host.tree, chunk=64, scheduler=scheduler)
    assert adder.add_chunked_req(parked) is parked
    assert scheduler._pending_chunked_abort_req is parked
    assert add(adder, WaitingRequest([1] * 30)) != AddReqResult.CONTINUE
    assert host.allocator.stats.prefixes_dropped == 0
    host.check()


def test_the_stub_of_an_aborted_prompt_has_no_images(host):
    req = WaitingRequest([1, *image(300), 2])
    assert len(prompt_runs(req)) == 1
    req.origin_input_ids = array("q", [0])  # as set_finish_with_abort
    assert prompt_runs(req) == []


def test_a_request_that_is_alone_goes_on_without_room_for_its_images():
    host = make_host(num_slabs=100, max_visual_slabs=4)
    req = chunked(host, [1, *image(40)], [ImageRun(1, 41)])
    adder = make_adder(host.tree, chunk=64)
    assert adder.add_chunked_req(req) is None
    assert host.tree.placement_of(req).rotated == []
    assert host.allocator.stats.segments_full_width == {NO_SLABS: 1}


def chunked(host, token_ids: list[int], rotated: list[ImageRun]) -> WaitingRequest:
    """A request whose first token is computed."""
    req = WaitingRequest(token_ids).match(host.tree)
    req.lock, req.extend_end = host.tree.lock(req.last_node), 1
    host.tree.place(req, Placement(rotated, host.allocator.layout))
    host.running.append(req)
    host.extend([req])
    checkpoint_kv_cache(req, host.tree)
    return req


def test_a_chunk_is_shortened_to_the_text_budget(host):
    req = chunked(host, [1] * 15 + image(30) + [2] * 30, [ImageRun(15, 45)])
    fill(host, 71)
    adder = make_adder(host.tree, chunk=64)
    assert adder.add_chunked_req(req) is req
    assert (req.prefix_len, req.extend_end) == (1, 15 + 30 + 5)
    assert adder.can_run_list == [req]


@pytest.mark.parametrize(("used", "length"), [(76, 15 + 30 + 0), (77, 15), (95, 5)])
def test_a_chunk_that_memory_shortens_cuts_no_image(host, used, length):
    req = chunked(host, [1] * 15 + image(30) + [2] * 30, [ImageRun(15, 45)])
    fill(host, used)
    adder = make_adder(host.tree, chunk=64)
    assert adder.add_chunked_req(req) is req
    assert (req.prefix_len, req.extend_end) == (1, length)


def test_the_last_chunk_returns_none(host):
    req = chunked(host, [1] * 15 + image(30), [ImageRun(15, 45)])
    adder = make_adder(host.tree, chunk=64)
    assert adder.add_chunked_req(req) is None
    assert req.extend_len == 44
    assert adder.rem_chunk_tokens == 64 - 44


def test_a_chunked_request_without_a_slab_is_parked_and_no_other_is_chunked(host):
    req = chunked(host, [1] * 30, [])
    other = host.run([7] * 99)
    adder = make_adder(host.tree, chunk=64, running=[WaitingRequest([1])])
    assert adder.add_chunked_req(req) is req
    host.finish(other)
    assert add(adder, WaitingRequest([5] * 70)) == AddReqResult.OTHER
    assert (adder.can_run_list, adder.new_chunked_req) == ([], None)


def test_a_parked_request_is_aborted_only_when_nothing_else_can_free_text(host):
    req = chunked(host, [1] * 30, [])
    fill(host, 99)
    scheduler = SimpleNamespace(_pending_chunked_abort_req=None)
    for running, expected in (([WaitingRequest([1])], None), ([], req), ([], req)):
        assert (
            make_adder(host.tree, chunk=64, running=running, scheduler=scheduler).add_chunked_req(
                req
            )
            is req
        )
        assert scheduler._pending_chunked_abort_req is expected
    assert host.allocator.stats.requests_stranded == 1
    assert req.discard_output_reason.status_code == 503
    assert "Shorten the prompt" in req.discard_output_reason.message
    # Else the host would store a chunk that was not computed.
    assert req.extend_end == req.prefix_len


def test_nothing_goes_for_an_image_while_another_request_has_the_chunk(host):
    host.cache([2] * 90)
    adder = make_adder(host.tree, chunk=64)
    adder.rem_chunk_tokens = 0
    assert add(adder, WaitingRequest([1, *image(100), 2])) != AddReqResult.CONTINUE
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
    req = WaitingRequest(
        [1, *sum((image(100, i) for i in range(4)), []), *[2] * 50], max_new_tokens=100_000
    )
    init_req_max_new_tokens(lambda *_: None, host, req)
    assert req.sampling_params.max_new_tokens > 1500
    req.output_ids = array("q", [50] * num_outputs)
    adder = make_adder(host.tree, chunk=512)
    add(adder, req)
    assert adder.can_run_list == [req]


def test_a_lone_request_whose_cached_prefix_takes_its_room_drops_the_prefix():
    host = make_host(num_slabs=100, max_visual_slabs=36)
    blocking = host.run([*image(120, 9), 5])
    host.cache([1, *image(60), 2])  # at full width
    host.cache([4] * 5)
    host.finish(blocking, insert=False)
    host.tree.drop_branch(blocking.last_node)
    assert host.used() == (62 + 5, 0, 0)
    req = WaitingRequest([1, *image(60), 2] + [3] * 50)
    assert add(make_adder(host.tree), req) == AddReqResult.NO_TOKEN
    assert host.allocator.stats.prefixes_dropped == 1
    assert host.used() == (5, 0, 0), "what others have cached stays"
    assert add(make_adder(host.tree), req) == AddReqResult.CONTINUE


class Scheduler(Host):
    """The host's scheduling loop in small: prefill first, one chunked request, retraction; results
    a round late."""

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
        assert adder.new_chunked_req is None or self.chunked is None, (
            "two requests are prefilled in chunks"
        )
        self.chunked = adder.new_chunked_req or self.chunked
        if batch:
            self.extend_batch(batch)
        late, self.in_flight = self.in_flight, [req for req in batch if req is not self.chunked]
        for req in late:
            checkpoint_kv_cache(req, self.tree)
        if not batch:
            self.decode_step()
        self.decoding += self.in_flight

    def extend_batch(self, batch: list[WaitingRequest]) -> None:
        full_width = self.allocator.stats.segments_full_width.total()
        self.extend(batch)
        assert self.allocator.stats.segments_full_width.total() == full_width, (
            "an image found no room that admission promised"
        )
        self.running += [req for req in batch if req not in self.running]

    def decode_step(self) -> None:
        def fits(reqs) -> bool:
            return self.allocator.check_decode_capacity(
                num_tokens=len(reqs), tree_cache=self.tree, requests=reqs
            )

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
    rows, num_slabs = (
        rng.choice([(20, 32), (5, 8), (9, 16), (3, 4), (1, 1), (11, 16)]),
        rng.choice([20, 40, 80]),
    )
    layout = PoolLayout(num_slabs, int(num_slabs * rng.choice([0.95, 0.5, 0.3])), *rows)
    min_image_tokens, segment_tokens = rng.choice([(None, None), (None, 64), (4, None), (4, 16)])
    config = RotateKConfig(min_image_tokens=min_image_tokens, segment_tokens=segment_tokens)
    scheduler = Scheduler(layout, config, chunk=rng.choice([8, 16, 33, 64, 200]))
    lengths = [3, 4, rows[1], rows[1] + 1, 30, 64, 100]
    pieces = [
        [1, 2, 3],
        [4] * 20,
        *(image(length, number) for number, length in enumerate(lengths)),
    ]
    left = 12
    for _ in range(3000):
        if left and rng.random() < 0.6:
            left -= 1
            prompt = [*sum(rng.choices(pieces, k=rng.randint(1, 4)), []), 8]
            req = WaitingRequest(prompt, max_new_tokens=rng.randint(1, 30))
            req.stop_after = rng.randint(1, 30)
            if scheduler.submit(req):
                req.stop_after = min(req.stop_after, req.sampling_params.max_new_tokens)
        scheduler.round()
        if not (left or scheduler.waiting or scheduler.running or scheduler.chunked):
            break
    assert (left, scheduler.waiting, scheduler.running, scheduler.chunked) == (0, [], [], None)
    scheduler.check()
