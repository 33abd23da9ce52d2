import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from sglang_rotatek.layout import PoolLayout
from sglang_rotatek.visual_slots import VisualSlots

LAYOUT = PoolLayout(text_slots=10, visual_slots=12, num_bases=3)


@pytest.fixture
def pool():
    return VisualSlots(LAYOUT)


def test_a_fresh_pool_hands_out_the_lowest_visual_slots_first(pool):
    slots, basis = pool.alloc(3)
    assert slots.tolist() == [11, 12, 13]
    assert slots.dtype == np.int64
    assert basis == 0
    pool.check_integrity()


def test_a_segment_larger_than_the_free_slots_gets_nothing(pool):
    assert pool.alloc(13) is None
    assert (pool.free, pool.free_bases) == (12, 3)
    pool.check_integrity()


def test_no_free_basis_means_no_slots(pool):
    for _ in range(3):
        pool.alloc(1)
    assert pool.alloc(1) is None
    assert pool.free == 9
    pool.check_integrity()


def test_a_basis_returns_with_its_last_slot(pool):
    slots, basis = pool.alloc(4)
    pool.release(slots[:3], locked=True)
    assert pool.free_bases == 2
    assert pool.bases_of(slots[3:]).tolist() == [basis]
    pool.release(slots[3:], locked=True)
    assert (pool.free, pool.free_bases) == (12, 3)
    pool.check_integrity()


def test_a_basis_is_evictable_only_when_none_of_its_slots_is_locked(pool):
    slots, _ = pool.alloc(4)
    pool.unlock(slots[:3])
    assert (pool.evictable, pool.evictable_bases) == (3, 0)
    pool.unlock(slots[3:])
    assert (pool.evictable, pool.evictable_bases) == (4, 1)
    pool.lock(slots[1:2])
    assert (pool.evictable, pool.evictable_bases) == (3, 0)
    pool.check_integrity()


def test_one_release_may_span_several_bases(pool):
    first, _ = pool.alloc(2)
    second, basis = pool.alloc(3)
    pool.release(np.concatenate([first, second[:1]]), locked=True)
    assert (pool.free, pool.free_bases) == (10, 2)
    assert set(pool.bases_of(second[1:]).tolist()) == {basis}
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
    with pytest.raises(RuntimeError, match=r"\[11(, 12)?\] are used after they were freed"):
        call()
    pool.check_integrity()


def test_clear_returns_everything(pool):
    slots, _ = pool.alloc(5)
    pool.unlock(slots)
    pool.clear()
    assert (pool.free, pool.free_bases, pool.evictable, pool.evictable_bases) == (12, 3, 0, 0)
    pool.check_integrity()


def test_a_slot_twice_in_the_free_list_fails_the_integrity_check(pool):
    pool._stack[0] = pool._stack[1]
    with pytest.raises(AssertionError, match="twice"):
        pool.check_integrity()


def test_a_slot_locked_twice_fails_the_integrity_check(pool):
    slots, _ = pool.alloc(2)
    pool.lock(slots[:1])
    with pytest.raises(AssertionError, match="locked counts"):
        pool.check_integrity()


class VisualSlotsMachine(RuleBasedStateMachine):
    """Any order of calls, against a dict of slot -> [basis, locked]."""

    @initialize(text=st.integers(0, 5), visual=st.integers(0, 24), bases=st.integers(0, 5))
    def start(self, text, visual, bases):
        self.layout = PoolLayout(text, visual, bases)
        self.pool = VisualSlots(self.layout)
        self.model = {}
        self.freed = set()

    def by_segment(self, slots):
        bases = np.array([self.model[slot][0] for slot in slots.tolist()])
        return [slots[bases == basis] for basis in np.unique(bases)]

    def draw_slots(self, data, locked):
        candidates = sorted(slot for slot, (_, is_locked) in self.model.items() if is_locked == locked)
        chosen = data.draw(st.lists(st.sampled_from(candidates), unique=True)) if candidates else []
        return np.array(chosen, dtype=np.int64)

    @rule(num_tokens=st.integers(1, 10))
    def alloc(self, num_tokens):
        used_bases = {basis for basis, _ in self.model.values()}
        fits = num_tokens <= self.layout.visual_slots - len(self.model) and len(used_bases) < self.layout.num_bases
        allocated = self.pool.alloc(num_tokens)
        assert (allocated is not None) == fits
        if allocated is None:
            return
        slots, basis = allocated
        assert len(set(slots.tolist())) == num_tokens
        assert basis not in used_bases
        assert 0 <= basis < self.layout.num_bases
        for slot in slots.tolist():
            assert self.layout.first_visual_slot <= slot <= self.layout.total_slots
            assert slot not in self.model
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
        for segment in self.by_segment(slots):
            self.pool.lock(segment)
        for slot in slots.tolist():
            self.model[slot][1] = True

    @rule(data=st.data())
    def unlock(self, data):
        slots = self.draw_slots(data, locked=True)
        for segment in self.by_segment(slots):
            self.pool.unlock(segment)
        for slot in slots.tolist():
            self.model[slot][1] = False

    @precondition(lambda self: self.freed)
    @rule(data=st.data(), locked=st.booleans())
    def double_free_raises(self, data, locked):
        slot = data.draw(st.sampled_from(sorted(self.freed)))
        with pytest.raises(RuntimeError, match="after they were freed"):
            self.pool.release(np.array([slot], dtype=np.int64), locked=locked)

    @rule()
    def clear(self):
        self.pool.clear()
        self.freed |= set(self.model)
        self.model = {}

    @invariant()
    def pool_equals_model(self):
        locked_bases = {basis for basis, locked in self.model.values() if locked}
        all_bases = {basis for basis, _ in self.model.values()}
        assert self.pool.free == self.layout.visual_slots - len(self.model)
        assert self.pool.evictable == sum(not locked for _, locked in self.model.values())
        assert self.pool.free_bases == self.layout.num_bases - len(all_bases)
        assert self.pool.evictable_bases == len(all_bases - locked_bases)
        slots = np.array(sorted(self.model), dtype=np.int64)
        assert self.pool.bases_of(slots).tolist() == [self.model[slot][0] for slot in slots.tolist()]
        assert set(self.pool.free_slot_ids().tolist()).isdisjoint(self.model)
        self.pool.check_integrity()


TestVisualSlotsMachine = VisualSlotsMachine.TestCase
TestVisualSlotsMachine.settings = settings(max_examples=100, stateful_step_count=30, deadline=None)
