import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from sglang_rotatek.memory.layout import PoolLayout
from sglang_rotatek.memory.slabs import Slabs
from sglang_rotatek.memory.visual_slots import VisualSlots

# Visual slots 27 + 4 * slab ... 30 + 4 * slab, of slabs 1 to 8, of which images may hold 7.
LAYOUT = PoolLayout(num_slabs=8, max_visual_slabs=7, text_rows=3, visual_rows=4)
# The first segment's rows begin in slab 2, behind its basis.
FIRST = LAYOUT.first_visual_slot + 2 * LAYOUT.visual_rows


@pytest.fixture
def slabs():
    return Slabs(LAYOUT)


@pytest.fixture
def pool(slabs):
    return VisualSlots(LAYOUT, slabs)


def test_fresh_slabs_go_out_lowest_first_and_without_slab_0(slabs):
    assert slabs.take(2).tolist() == [1, 2]
    assert slabs.take(6).tolist() == [3, 4, 5, 6, 7, 8]
    assert slabs.free == 0
    assert slabs.take(0).tolist() == []
    with pytest.raises(AssertionError, match="1 slabs wanted, 0 free"):
        slabs.take(1)


def test_slabs_that_came_back_go_out_next_in_the_same_order(slabs):
    slabs.take(7)
    slabs.give(np.array([4, 2]))
    assert slabs.free == 3
    assert sorted(slabs.free_ids().tolist()) == [2, 4, 8]
    assert slabs.take(3).tolist() == [4, 2, 8]


def test_taken_slabs_are_no_view_of_the_free_list(slabs):
    taken = slabs.take(3)
    slabs.give(np.array([3, 1]))
    assert taken.tolist() == [1, 2, 3]


def test_a_fresh_pool_hands_out_the_lowest_visual_slots_behind_the_basis(pool):
    slots, basis = pool.alloc(6)
    assert slots.tolist() == list(range(FIRST, FIRST + 6))
    assert slots.dtype == np.int64
    assert basis == 1
    assert type(basis) is int
    pool.check_integrity()


def test_a_segment_takes_whole_slabs_and_one_for_its_basis(pool, slabs):
    first, _ = pool.alloc(5)
    second, basis = pool.alloc(1)
    assert (pool.used, pool.used_slabs, pool.bases, pool.free_slabs, slabs.free) == (6, 5, 2, 2, 3)
    assert basis == 4
    assert second[0] == first[0] + 3 * LAYOUT.visual_rows
    assert pool.used_slab_ids().tolist() == [1, 2, 3, 4, 5]
    pool.check_integrity()


def test_images_get_no_more_slabs_than_they_may_hold(pool, slabs):
    assert pool.alloc(25) is None
    assert (pool.used, pool.used_slabs, pool.bases, pool.free_slabs, slabs.free) == (0, 0, 0, 7, 8)
    assert pool.alloc(24) is not None
    assert (pool.free_slabs, slabs.free) == (0, 1)
    pool.check_integrity()


def test_slabs_that_text_holds_are_not_free_to_images(pool, slabs):
    held = slabs.take(4)
    assert pool.free_slabs == 4
    assert pool.alloc(13) is None
    slabs.give(held)
    assert pool.alloc(13) is not None
    pool.check_integrity()


def test_a_slab_for_the_basis_alone_means_no_slots(pool, slabs):
    slabs.take(7)
    assert pool.free_slabs == 1
    assert pool.alloc(1) is None
    assert (slabs.free, pool.bases) == (1, 0)
    pool.check_integrity()


def test_a_slab_returns_with_its_last_slot_and_the_basis_with_the_last_slab(pool, slabs):
    slots, basis = pool.alloc(8)
    pool.release(slots[1:7], locked=True)
    assert (slabs.free, pool.used_slabs, pool.bases) == (5, 3, 1)
    pool.release(slots[:1], locked=True)
    assert (slabs.free, pool.used_slabs, pool.bases) == (6, 2, 1)
    assert pool.bases_of(slots[7:]).tolist() == [basis]
    assert pool.used_slab_ids().tolist() == [basis, 3]
    pool.release(slots[7:], locked=True)
    assert (slabs.free, pool.used, pool.used_slabs, pool.bases) == (8, 0, 0, 0)
    pool.check_integrity()


def test_the_slab_of_a_basis_that_came_back_can_hold_rows(pool):
    first, basis = pool.alloc(1)
    pool.release(first, locked=True)
    slots, _ = pool.alloc(24)
    assert basis in (slots - LAYOUT.first_visual_slot) // LAYOUT.visual_rows
    pool.check_integrity()


def test_a_slab_of_rows_or_of_a_basis_is_evictable_only_when_none_of_its_slots_is_locked(pool):
    slots, _ = pool.alloc(8)
    assert (pool.evictable, pool.evictable_slabs) == (0, 0)
    pool.unlock(slots[:5])
    assert (pool.evictable, pool.evictable_slabs) == (5, 1)
    pool.unlock(slots[5:])
    assert (pool.evictable, pool.evictable_slabs) == (8, 3)
    pool.lock(slots[1:2])
    assert (pool.evictable, pool.evictable_slabs) == (7, 1)
    pool.release(slots[4:], locked=False)
    assert (pool.evictable, pool.evictable_slabs) == (3, 0)
    pool.unlock(slots[1:2])
    assert (pool.evictable, pool.evictable_slabs) == (4, 2)
    pool.release(slots[:4], locked=False)
    assert (pool.evictable, pool.evictable_slabs) == (0, 0)
    pool.check_integrity()


def test_slabs_become_evictable_when_their_locked_slots_are_released(pool):
    slots, _ = pool.alloc(4)
    pool.unlock(slots[:2])
    pool.release(slots[2:], locked=True)
    assert (pool.evictable, pool.evictable_slabs) == (2, 2)
    pool.check_integrity()


def test_a_segment_may_lie_in_slabs_out_of_order(pool):
    first, _ = pool.alloc(16)
    for begin in (0, 4, 8):
        pool.release(first[begin : begin + 4], locked=True)
    slots, basis = pool.alloc(10)
    assert basis == 4
    assert ((slots - LAYOUT.first_visual_slot) // LAYOUT.visual_rows).tolist() == [3] * 4 + [2] * 4 + [6] * 2
    pool.unlock(slots)
    assert pool.evictable_slabs == 4
    pool.lock(slots[3:9])
    assert pool.evictable_slabs == 0
    assert pool.bases_of(slots).tolist() == [basis] * 10
    pool.check_integrity()


@pytest.mark.parametrize("use", ["release", "lock", "unlock", "bases_of"])
def test_a_freed_slot_cannot_be_used_again(pool, use):
    slots, _ = pool.alloc(2)
    pool.release(slots, locked=True)
    call = {
        "release": lambda: pool.release(slots, locked=True),
        "lock": lambda: pool.lock(slots),
        "unlock": lambda: pool.unlock(slots),
        "bases_of": lambda: pool.bases_of(slots),
    }[use]
    with pytest.raises(RuntimeError, match=rf"\[{FIRST}(, {FIRST + 1})?\] are used after they were freed"):
        call()
    pool.check_integrity()


def test_clear_forgets_every_segment(pool, slabs):
    slots, _ = pool.alloc(5)
    pool.unlock(slots)
    slabs.clear()
    pool.clear()
    assert (slabs.free, pool.free_slabs, pool.used, pool.used_slabs, pool.bases) == (8, 7, 0, 0, 0)
    assert (pool.evictable, pool.evictable_slabs) == (0, 0)
    pool.check_integrity()


def test_a_slot_locked_twice_fails_the_integrity_check(pool):
    slots, _ = pool.alloc(2)
    pool.lock(slots[:1])
    with pytest.raises(AssertionError, match="locked counts"):
        pool.check_integrity()


def test_a_slab_that_outlives_its_basis_fails_the_integrity_check(pool):
    pool.alloc(2)
    pool._basis[2] = -1
    with pytest.raises(AssertionError, match="live and die together"):
        pool.check_integrity()


def test_a_slab_of_rows_that_is_a_basis_too_fails_the_integrity_check(pool):
    pool.alloc(2)
    pool._live_of_basis[2] = 2
    with pytest.raises(AssertionError, match="holds rows and a basis"):
        pool.check_integrity()


class VisualSlotsMachine(RuleBasedStateMachine):
    """Any order of calls, against a dict of slot -> [basis, locked], in the order of ``alloc``."""

    @initialize(data=st.data(), num_slabs=st.integers(0, 12), text_rows=st.integers(1, 4))
    def start(self, data, num_slabs, text_rows):
        most_visual = data.draw(st.integers(0, num_slabs))
        visual_rows = data.draw(st.integers(text_rows, 5))
        self.layout = PoolLayout(num_slabs, most_visual, text_rows, visual_rows)
        self.slabs = Slabs(self.layout)
        self.pool = VisualSlots(self.layout, self.slabs)
        self.model = {}
        self.text = set()
        self.freed = set()

    def slab_of(self, slot):
        return (slot - self.layout.first_visual_slot) // self.layout.visual_rows

    def visual_slabs(self, only_locked=False):
        """Slabs of the slots, and those of their bases."""
        held = {slot: basis for slot, (basis, locked) in self.model.items() if locked or not only_locked}
        return {self.slab_of(slot) for slot in held} | set(held.values())

    def draw_slots(self, data, locked):
        """Slots of one segment, in its order."""
        candidates = [slot for slot, (_, is_locked) in self.model.items() if is_locked == locked]
        if not candidates:
            return np.array([], dtype=np.int64)
        basis = data.draw(st.sampled_from(sorted({self.model[slot][0] for slot in candidates})))
        candidates = [slot for slot in candidates if self.model[slot][0] == basis]
        chosen = data.draw(st.sets(st.sampled_from(candidates)) | st.just(candidates))
        return np.array([slot for slot in candidates if slot in chosen], dtype=np.int64)

    @rule(num_tokens=st.integers(1, 16))
    def alloc(self, num_tokens):
        held = self.visual_slabs()
        free = min(self.layout.num_slabs - len(self.text) - len(held), self.layout.max_visual_slabs - len(held))
        allocated = self.pool.alloc(num_tokens)
        assert (allocated is not None) == (num_tokens <= (free - 1) * self.layout.visual_rows)
        if allocated is None:
            return
        slots, basis = allocated
        assert len(set(slots.tolist())) == num_tokens
        taken = {self.slab_of(slot) for slot in slots.tolist()}
        assert basis not in taken
        taken.add(basis)
        assert len(taken) == self.layout.slabs_of(num_tokens)
        assert taken <= set(range(1, 1 + self.layout.num_slabs)) - held - self.text
        for slot in slots.tolist():
            self.model[slot] = [basis, True]
        self.freed -= set(slots.tolist())

    @rule(data=st.data(), locked=st.booleans())
    def release(self, data, locked):
        slots = self.draw_slots(data, locked)
        self.pool.release(slots, locked=locked)
        for slot in slots.tolist():
            del self.model[slot]
        self.freed |= set(slots.tolist())

    @rule(data=st.data())
    def lock(self, data):
        slots = self.draw_slots(data, locked=False)
        self.pool.lock(slots)
        for slot in slots.tolist():
            self.model[slot][1] = True

    @rule(data=st.data())
    def unlock(self, data):
        slots = self.draw_slots(data, locked=True)
        self.pool.unlock(slots)
        for slot in slots.tolist():
            self.model[slot][1] = False

    @precondition(lambda self: self.freed)
    @rule(data=st.data(), locked=st.booleans())
    def double_free_raises(self, data, locked):
        slot = data.draw(st.sampled_from(sorted(self.freed)))
        with pytest.raises(RuntimeError, match="after they were freed"):
            self.pool.release(np.array([slot], dtype=np.int64), locked=locked)

    @precondition(lambda self: self.slabs.free)
    @rule(data=st.data())
    def text_takes_slabs(self, data):
        self.text |= set(self.slabs.take(data.draw(st.integers(1, self.slabs.free))).tolist())

    @precondition(lambda self: self.text)
    @rule(data=st.data())
    def text_gives_slabs(self, data):
        given = data.draw(st.lists(st.sampled_from(sorted(self.text)), min_size=1, unique=True))
        self.slabs.give(np.array(given))
        self.text -= set(given)

    @rule()
    def clear(self):
        self.slabs.clear()
        self.pool.clear()
        self.freed |= set(self.model)
        self.model = {}
        self.text = set()

    @invariant()
    def pool_equals_model(self):
        assert self.pool.used == len(self.model)
        assert self.pool.evictable == sum(not locked for _, locked in self.model.values())
        assert self.pool.bases == len({basis for basis, _ in self.model.values()})
        slots = np.array(list(self.model), dtype=np.int64)
        assert self.pool.bases_of(slots).tolist() == [basis for basis, _ in self.model.values()]
        self.pool.check_integrity()

    @invariant()
    def slabs_equal_model(self):
        held = self.visual_slabs()
        free = set(range(1, 1 + self.layout.num_slabs)) - held - self.text
        assert sorted(self.slabs.free_ids().tolist()) == sorted(free)
        assert self.pool.used_slab_ids().tolist() == sorted(held)
        assert self.pool.used_slabs == len(held) <= self.layout.max_visual_slabs
        assert self.pool.evictable_slabs == len(held - self.visual_slabs(only_locked=True))
        assert self.pool.free_slabs == min(len(free), self.layout.max_visual_slabs - len(held))


TestVisualSlotsMachine = VisualSlotsMachine.TestCase
TestVisualSlotsMachine.settings = settings(max_examples=100, stateful_step_count=30, deadline=None)
