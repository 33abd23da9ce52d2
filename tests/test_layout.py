import pytest
from hypothesis import given
from hypothesis import strategies as st

from sglang_rotatek.config import RotateKConfig
from sglang_rotatek.layout import MIN_BASES, KVShape, PoolLayout, layout_of_bytes, layout_of_total

QWEN2_5_VL_7B = KVShape(num_layers=28, num_kv_heads=4, head_dim=128, v_head_dim=128, rank=32, kv_bytes=2)
LLAVA_NEXT_8B = KVShape(num_layers=32, num_kv_heads=8, head_dim=128, v_head_dim=128, rank=32, kv_bytes=2)
KIB = 1024

shapes = st.builds(
    lambda layers, heads, head_dim, v_head_dim, share, kv_bytes: KVShape(
        layers, heads, head_dim, v_head_dim, max(16, head_dim * share // 8 // 16 * 16), kv_bytes
    ),
    layers=st.integers(1, 80),
    heads=st.integers(1, 16),
    head_dim=st.sampled_from([64, 80, 96, 128, 256]),
    v_head_dim=st.sampled_from([64, 128]),
    share=st.integers(1, 8),
    kv_bytes=st.sampled_from([1, 2, 4]),
)
configs = st.builds(
    RotateKConfig,
    visual_fraction=st.floats(0.01, 0.99),
    min_image_tokens=st.integers(1, 256),
    segment_tokens=st.none() | st.integers(256, 4096),
)
budgets = st.integers(0, 200 * 2**30)


def test_row_and_basis_bytes_of_two_known_models():
    assert (QWEN2_5_VL_7B.text_row_bytes, QWEN2_5_VL_7B.visual_row_bytes) == (56 * KIB, 35 * KIB)
    assert (LLAVA_NEXT_8B.text_row_bytes, LLAVA_NEXT_8B.visual_row_bytes) == (128 * KIB, 80 * KIB)
    # [D, r] in bf16 and [D] in fp32, per layer and head.
    assert QWEN2_5_VL_7B.basis_bytes == 28 * 4 * (128 * 32 * 2 + 128 * 4)
    assert LLAVA_NEXT_8B.basis_bytes == 32 * 8 * (128 * 32 * 2 + 128 * 4)


def test_slot_ids_leave_0_to_the_padding_row():
    layout = PoolLayout(text_slots=10, visual_slots=5, num_bases=4)
    assert layout.first_visual_slot == 11
    assert layout.total_slots == 15


@given(budgets, configs, shapes)
def test_the_pools_never_exceed_the_budget(budget, config, shape):
    layout = layout_of_bytes(budget, config, shape)
    assert layout.bytes(shape) <= budget or layout.total_slots == 0


@given(budgets, configs, shapes)
def test_one_slot_more_would_not_fit(budget, config, shape):
    layout = layout_of_bytes(budget, config, shape)
    assert layout_of_total(layout.total_slots + 1, config, shape).bytes(shape) > budget


@given(budgets, configs, shapes)
def test_the_total_alone_reproduces_the_layout(budget, config, shape):
    layout = layout_of_bytes(budget, config, shape)
    assert layout_of_total(layout.total_slots, config, shape) == layout


@given(st.integers(0, 10**7), configs, shapes)
def test_a_layout_has_the_total_that_was_asked_for(total, config, shape):
    layout = layout_of_total(total, config, shape)
    assert layout.total_slots == total
    assert layout.text_slots >= 0
    assert layout.visual_slots >= 0


@given(st.integers(0, 10**7), configs, shapes)
def test_there_is_a_basis_for_every_expected_segment(total, config, shape):
    layout = layout_of_total(total, config, shape)
    assert layout.num_bases >= MIN_BASES
    assert layout.num_bases * config.expected_segment_tokens >= layout.visual_slots


@given(st.integers(0, 10**7), configs, shapes)
def test_one_slot_more_grows_exactly_one_pool_by_one(total, config, shape):
    before = layout_of_total(total, config, shape)
    after = layout_of_total(total + 1, config, shape)
    grown = (after.text_slots - before.text_slots, after.visual_slots - before.visual_slots)
    assert grown in {(0, 1), (1, 0)}
    assert after.num_bases >= before.num_bases


@given(budgets, configs, shapes)
def test_visual_rows_and_bases_take_their_fraction_of_the_bytes(budget, config, shape):
    layout = layout_of_bytes(budget, config, shape)
    visual_bytes = layout.visual_slots * shape.visual_row_bytes + layout.num_bases * shape.basis_bytes
    # Rounding to whole rows and whole bases, of which a small pool has MIN_BASES.
    slack_bytes = MIN_BASES * shape.basis_bytes + shape.text_row_bytes + shape.visual_row_bytes
    assert abs(visual_bytes - config.visual_fraction * layout.bytes(shape)) <= slack_bytes


@pytest.mark.parametrize("shape", [QWEN2_5_VL_7B, LLAVA_NEXT_8B], ids=["qwen2.5-vl-7b", "llava-next-8b"])
@pytest.mark.parametrize("budget_gib", [8, 40, 100])
def test_the_defaults_hold_half_as_many_tokens_again_as_full_width(shape, budget_gib):
    budget = budget_gib * 2**30
    layout = layout_of_bytes(budget, RotateKConfig(), shape)
    assert layout.total_slots >= 1.5 * (budget // shape.text_row_bytes)


def test_a_budget_below_the_smallest_basis_pool_holds_nothing():
    layout = layout_of_bytes(MIN_BASES * QWEN2_5_VL_7B.basis_bytes - 1, RotateKConfig(), QWEN2_5_VL_7B)
    assert layout.total_slots == 0
