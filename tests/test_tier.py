"""The host-memory tier: what is written, loaded and lost, and what of it is in the rows that
requests read."""

from __future__ import annotations

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import initialize, rule
from scheduler_host import Host, WaitingRequest, image
from sglang.srt.managers.schedule_policy import AddReqResult
from test_admission import add, make_adder
from test_tree import LARGE, Chats

from sglang_rotatek.config import RotateKConfig
from sglang_rotatek.memory.layout import PoolLayout

pytestmark = pytest.mark.usefixtures("host_configuration")
POLICIES = ("write_through", "write_through_selective", "write_back")
# Of head_dim 128: the paper's rows at rank 32, coded rows in bf16; and smaller ones.
SIZES = [(60, 57, 20, 32), (60, 57, 19, 64), (30, 26, 5, 8), (120, 80, 1, 1)]


class TieredChats(Chats):
    """The chats of test_tree.py, with a memory for the host that may be smaller than the
    device's."""

    @initialize(
        cuts=st.sampled_from([(None, None), (None, 64), (4, None), (4, 9)]),
        sizes=st.sampled_from(SIZES),
        share=st.sampled_from([0.1, 0.5, 2.0]),
        policy=st.sampled_from(POLICIES),
    )
    def start_server(self, cuts, sizes, share, policy):
        config = RotateKConfig(min_image_tokens=cuts[0], segment_tokens=cuts[1])
        host_slabs = max(1, int(share * sizes[0]))
        self.host = Host(PoolLayout(*sizes), config, host_slabs=host_slabs, write_policy=policy)

    @rule(slabs=st.integers(0, 130))
    def lose_host_copies(self, slabs):
        self.host.tree.tier.tree.make_room(slabs)

    def teardown(self):
        super().teardown()
        if hasattr(self, "host"):
            tier = self.host.tree.tier
            tier.tree.make_room(LARGE)
            assert tier.tree.slabs.free == tier.memory.num_slabs


TestTieredChats = TieredChats.TestCase
TestTieredChats.settings = settings(max_examples=200, stateful_step_count=30, deadline=None)


def tiered(policy: str = "write_through", host_slabs: int = 120) -> Host:
    layout = PoolLayout(num_slabs=60, max_visual_slabs=57, text_rows=20, visual_rows=32)
    return Host(layout, RotateKConfig(), host_slabs=host_slabs, write_policy=policy)


PROMPT = [1, *image(330), *[2] * 15]


@pytest.mark.parametrize("policy", POLICIES)
def test_an_evicted_image_comes_back_with_its_basis(policy):
    host = tiered(policy)
    for _ in range(2):  # of a selective policy, the second writes
        host.cache(PROMPT)
    host.tree.make_room(LARGE)
    assert host.used() == (0, 0, 0)
    turn = host.start([*PROMPT, 50, 3])
    assert (turn.prefix_len, host.used()) == (len(PROMPT), (16, 330, 1))
    host.prefill([(turn, LARGE)])
    host.check()
    host.finish(turn)
    host.check()


def test_one_use_writes_nothing_by_a_selective_policy():
    host = tiered("write_through_selective")
    host.cache(PROMPT)
    assert host.tree.tier.memory.stats.written_bytes == 0
    host.cache([*PROMPT, 7])
    assert host.tree.tier.tree.slabs.text_tokens == 16


def test_nothing_is_written_back_while_it_is_on_the_device():
    host = tiered("write_back")
    host.cache(PROMPT)
    assert host.tree.tier.memory.stats.written_bytes == 0
    host.tree.make_room(LARGE)
    assert host.tree.tier.tree.slabs.visual_tokens == 330
    host.check()


def test_turns_of_a_chat_share_a_slab_on_the_host_as_on_the_device():
    host = tiered()
    chat = [*PROMPT]
    for turn in range(12):
        host.cache([*chat, 3 + turn])
        chat += [3 + turn]
    assert host.tree.tier.tree.slabs.of_text == host.slabs.of_text == 2
    host.check()


def test_chats_of_an_image_take_no_slab_more_on_the_host_than_on_the_device():
    """Of coded rows: 46 slabs of an image's rows, one of its basis, and 9 of text, where stock's
    3,089 rows fill 163."""
    host = Host(PoolLayout(600, 590, 19, 64), RotateKConfig(), host_slabs=10 * 56)
    for number in range(10):
        host.cache([100 + number] * 35 + image(2928, number) + [2] * 126)
    host_slabs = host.tree.tier.tree.slabs
    assert (host_slabs.text_tokens, host_slabs.visual_tokens, host_slabs.free) == (1610, 29280, 0)
    host.check()


def test_a_chat_goes_on_in_the_slab_that_was_loaded_and_in_its_mirror():
    host = tiered()
    host.cache(PROMPT)
    host.tree.make_room(LARGE)
    host.cache([*PROMPT, 4])
    assert host.slabs.of_text == host.tree.tier.tree.slabs.of_text == 1
    host.check()
    host.tree.make_room(LARGE)
    turn = host.start([*PROMPT, 4, 5])
    assert turn.prefix_len == len(PROMPT) + 1
    host.check()
    host.finish(turn)


def test_two_ends_of_one_prompt_that_were_loaded_apart_keep_their_rows():
    host = tiered()
    host.cache(PROMPT)
    host.cache([*PROMPT, 4, 4])  # in the rest of the slab
    host.tree.make_room(LARGE)
    host.cache([*PROMPT, 9, 9])  # loads the prompt alone, and goes on where 4, 4 stand on the host
    host.check()
    host.tree.make_room(LARGE)
    turns = [host.start([*PROMPT, *end, 6]) for end in ([4, 4], [9, 9])]
    # The second finds the prompt on the device, and two tokens are computed sooner than loaded.
    assert [turn.prefix_len for turn in turns] == [len(PROMPT) + 2, len(PROMPT)]
    for turn in turns:
        host.prefill([(turn, LARGE)])
        host.check()
        host.finish(turn)


def test_part_of_an_image_is_loaded_behind_the_part_that_is_on_the_device():
    host = tiered()
    host.cache(PROMPT)
    reader = host.start([1, *image(100), 3])
    host.tree.make_room(LARGE)
    assert host.used() == (1, 100, 1)
    turn = host.start([*PROMPT, 3])
    assert (turn.prefix_len, host.used()) == (len(PROMPT), (16, 330, 2))
    host.prefill([(turn, LARGE), (reader, LARGE)])
    host.check()


def test_a_prefix_that_was_lost_on_the_host_is_written_again_when_it_is_asked_for():
    host = tiered()
    host.cache(PROMPT)
    host.tree.tier.tree.make_room(LARGE)
    host.cache([*PROMPT, 5])
    host.tree.make_room(LARGE)
    turn = host.start([*PROMPT, 5, 6])
    assert turn.prefix_len == len(PROMPT) + 1
    host.check()


def test_what_does_not_fit_on_the_host_is_not_written_and_evicts_nothing():
    host = tiered(host_slabs=8)
    host.cache([4] * 40)
    host.cache(PROMPT)
    tier = host.tree.tier
    assert (tier.tree.slabs.text_tokens, tier.tree.slabs.visual_tokens) == (40, 0)
    assert tier.writes_skipped == 2  # behind the prefill, and at the end
    host.check()


def test_what_is_evicted_for_a_load_does_not_take_its_place_on_the_host():
    host = tiered("write_back", host_slabs=14)
    host.cache(PROMPT)
    host.tree.make_room(LARGE)
    for token in range(5, 10):
        host.cache([token] * 220)
    turn = host.start([*PROMPT, 3])
    assert turn.prefix_len == len(PROMPT)
    host.prefill([(turn, LARGE)])
    host.check()


def test_a_prefix_on_the_host_does_not_make_room_for_what_follows_it():
    host = tiered(host_slabs=14)
    host.cache(PROMPT)
    host.cache([*PROMPT, *[5] * 60])
    assert host.tree.tier.tree.slabs.text_tokens + host.tree.tier.tree.slabs.visual_tokens == len(
        PROMPT
    )
    host.check()


def test_an_inexact_image_is_not_loaded_and_replaced_on_the_host():
    host = tiered()
    host.cache(PROMPT)
    host.tree.make_room(LARGE)
    host.allocator.inexact.add(image(4))
    turn = host.run([*PROMPT, 3])
    assert (turn.prefix_len, host.used()[1:]) == (len(PROMPT) + 1, (0, 0))
    assert host.tree.tier.tree.slabs.of_images == 0
    host.check()
    host.finish(turn)
    host.tree.make_room(LARGE)
    assert host.start([*PROMPT, 3, 3]).prefix_len == len(PROMPT) + 1  # at full width


def test_nothing_is_loaded_in_the_place_of_an_inexact_image_on_the_device():
    host = tiered()
    early = host.start([*PROMPT, 9])  # before it is known
    host.allocator.inexact.add(image(4))
    host.cache([*PROMPT, 3])
    host.tree.make_room(LARGE)
    host.prefill([(early, LARGE)])
    assert host.start([*PROMPT, 4]).prefix_len == 1  # the host has it, at full width
    host.check()


def test_a_request_that_ends_before_its_prefix_is_read_leaves_it_in_the_cache():
    host = tiered()
    host.cache(PROMPT)
    host.tree.make_room(LARGE)
    host.finish(host.start([*PROMPT, 3]))
    host.check()
    assert host.slabs.evictable == host.slabs.of_text + host.slabs.of_images > 0
    other = host.run([5] * 30)  # whose forward binds the segment
    turn = host.run([*PROMPT, 3])
    host.check()
    for req in (other, turn):
        host.finish(req)


def test_a_flush_empties_both_tiers():
    host = tiered()
    host.cache(PROMPT)
    host.tree.reset()
    host.allocator.clear()
    tier = host.tree.tier
    assert tier.tree.slabs.free == tier.memory.num_slabs
    assert host.run(PROMPT).prefix_len == len(PROMPT)
    host.check()


def evicted(num_slabs: int, max_visual_slabs: int | None = None) -> Host:
    """Whose host memory holds PROMPT: a slab of text, 11 of an image and one of its basis."""
    layout = PoolLayout(num_slabs, max_visual_slabs or num_slabs - 1, text_rows=20, visual_rows=32)
    host = Host(layout, RotateKConfig(), host_slabs=60)
    host.cache(PROMPT)
    host.tree.make_room(LARGE)
    return host


def test_an_admitted_request_finds_on_the_device_what_the_host_had():
    host = evicted(40)
    req, adder = WaitingRequest([*PROMPT, 3]), make_adder(host.tree)
    assert add(adder, req) == AddReqResult.CONTINUE
    assert (req.prefix_len, req.host_loaded_length, req.extend_end) == (346, 346, 347)
    assert req.kv.cache_protected_len == 346
    assert (host.used(), host.slabs.free) == ((16, 330, 1), 40 - 13)
    assert adder.log_host_hit_tokens == 346
    assert req.last_node.lock_ref == 1
    host.tree.unlock(req.lock)


def test_a_load_is_priced_in_slabs():
    """13 for its 346 tokens, one for the rest of its text, and one for its answer."""
    results = [
        add(
            make_adder(evicted(slabs).tree, running=[WaitingRequest([9])]),
            WaitingRequest([*PROMPT, 3]),
        )
        for slabs in (14, 15)
    ]
    assert results == [AddReqResult.NO_TOKEN, AddReqResult.CONTINUE]


def test_an_image_waits_for_slabs_that_others_will_give_back():
    host = evicted(60, max_visual_slabs=20)
    reader = host.run([*image(300, 1), 9])  # 11 of the 20 slabs
    req = WaitingRequest([*PROMPT, 3])
    adder = make_adder(host.tree, running=[WaitingRequest([9])])  # stands for it
    assert add(adder, req) == AddReqResult.NO_TOKEN
    assert host.allocator.stats.loads_declined == 0
    host.finish(reader)
    assert add(make_adder(host.tree), req) == AddReqResult.CONTINUE
    assert (req.prefix_len, host.allocator.stats.loads_declined) == (346, 0)
    host.tree.unlock(req.lock)
    host.check()


def test_an_image_that_may_not_be_loaded_is_computed_at_full_width():
    host = evicted(60, max_visual_slabs=20)
    reader = host.run([*image(300, 1), 9])  # 11 of the 20 slabs
    req, adder = WaitingRequest([*PROMPT, 3]), make_adder(host.tree)
    assert add(adder, req) == AddReqResult.CONTINUE
    assert (
        req.prefix_len,
        req.materialized_host_hit_len(),
        host.allocator.stats.loads_declined,
    ) == (0, 0, 1)
    assert not host.tree.placement_of(req).rotated
    host.tree.unlock(req.lock)
    host.finish(reader)
    host.check()
