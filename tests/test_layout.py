import math
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from capacity import chats_held
from hypothesis import given, settings
from hypothesis import strategies as st

from sglang_rotatek.config import RotateKConfig
from sglang_rotatek.kernels.row_format import KEY_BITS, VALUE_BITS, RowFormat
from sglang_rotatek.memory.layout import (
    KVShape,
    PoolLayout,
    layout_of_bytes,
    layout_of_slabs,
    layout_of_total,
)
from sglang_rotatek.memory.pool import RotateKKVPool

PAPER = RowFormat(rank=32, key_bits=16, value_bits=16)
QWEN2_5_VL_7B = KVShape(28, 4, head_dim=128, v_head_dim=128, rows=PAPER, kv_bytes=2, dtype_bytes=2)
LLAVA_NEXT_8B = KVShape(32, 8, head_dim=128, v_head_dim=128, rows=PAPER, kv_bytes=2, dtype_bytes=2)
KNOWN_MODELS = pytest.mark.parametrize(
    "shape", [QWEN2_5_VL_7B, LLAVA_NEXT_8B], ids=["qwen2.5-vl-7b", "llava-next-8b"]
)
KIB = 1024

shapes = st.builds(
    lambda layers, heads, head_dim, v_head_dim, share, key_bits, value_bits, bytes_: KVShape(
        layers,
        heads,
        head_dim,
        v_head_dim,
        RowFormat(max(16, head_dim * share // 8 // 16 * 16), key_bits, value_bits),
        *bytes_,
    ),
    layers=st.integers(1, 80),
    heads=st.integers(1, 16),
    head_dim=st.sampled_from([64, 80, 96, 128, 256]),
    v_head_dim=st.sampled_from([64, 80, 96, 128]),
    share=st.integers(1, 8),
    key_bits=st.sampled_from(KEY_BITS),
    value_bits=st.sampled_from(VALUE_BITS),
    bytes_=st.sampled_from([(1, 2), (2, 2), (4, 4)]),  # of text rows in FP8, bf16, fp32
).filter(lambda shape: shape.visual_row_bytes <= shape.text_row_bytes)  # else the server refuses
configs = st.builds(
    RotateKConfig,
    visual_fraction=st.floats(0.01, 0.99),
    min_image_tokens=st.integers(1, 256),
    segment_tokens=st.none() | st.integers(256, 4096),
)
budgets = st.integers(0, 200 * 2**30)
slab_counts = st.integers(0, 10**7)


def test_row_basis_and_slab_bytes_of_two_known_models():
    assert (QWEN2_5_VL_7B.text_row_bytes, QWEN2_5_VL_7B.visual_row_bytes) == (56 * KIB, 35 * KIB)
    assert (LLAVA_NEXT_8B.text_row_bytes, LLAVA_NEXT_8B.visual_row_bytes) == (128 * KIB, 80 * KIB)
    assert (QWEN2_5_VL_7B.slab_bytes, LLAVA_NEXT_8B.slab_bytes) == (1120 * KIB, 2560 * KIB)
    # [D, r] in bf16 and [D] in fp32, per layer and head.
    assert QWEN2_5_VL_7B.basis_bytes == 28 * 4 * (128 * 32 * 2 + 128 * 4)
    assert LLAVA_NEXT_8B.basis_bytes == 32 * 8 * (128 * 32 * 2 + 128 * 4)


@KNOWN_MODELS
@pytest.mark.parametrize(
    ("rank", "text_rows", "visual_rows"),
    [(16, 9, 16), (32, 20, 32), (48, 33, 48), (64, 33, 44), (128, 65, 65)],
)
def test_a_slab_of_the_known_models_holds_so_many_rows_of_either_kind(
    shape, rank, text_rows, visual_rows
):
    shape = replace(shape, rows=RowFormat(rank, 16, 16))
    assert (shape.text_rows, shape.visual_rows) == (text_rows, visual_rows)


@given(shapes)
def test_a_slab_is_the_smallest_that_holds_a_basis_and_is_whole_rows_of_either_kind(shape):
    assert (
        shape.text_rows * shape.text_row_bytes
        == shape.visual_rows * shape.visual_row_bytes
        == shape.slab_bytes
    )
    assert shape.slab_bytes >= shape.basis_bytes
    # The rows of a smaller slab would have to keep the ratio.
    step = shape.text_rows // math.gcd(shape.text_rows, shape.visual_rows)
    assert (shape.text_rows - step) * shape.text_row_bytes < shape.basis_bytes


@KNOWN_MODELS
@pytest.mark.parametrize(
    ("rows", "kv_bytes", "text_rows", "visual_rows"),
    [
        (RowFormat(), 2, 19, 64),
        (RowFormat(), 1, 19, 32),
        (RowFormat(key_bits=2), 2, 15, 64),
        (RowFormat(key_bits=2), 1, 30, 64),  # 15 would not hold a basis
    ],
)
def test_a_slab_holds_so_many_coded_rows(shape, rows, kv_bytes, text_rows, visual_rows):
    shape = replace(shape, rows=rows, kv_bytes=kv_bytes)
    heads = shape.num_layers * shape.num_kv_heads
    assert shape.visual_row_bytes == heads * {4: 152, 2: 120}[rows.key_bits]
    assert (shape.text_rows, shape.visual_rows) == (text_rows, visual_rows)


def test_slot_ids_leave_slab_0_to_the_padding_row():
    layout = PoolLayout(num_slabs=2, max_visual_slabs=1, text_rows=5, visual_rows=8)
    assert layout.first_visual_slot == 15  # after the ids of text in slabs 0, 1 and 2
    assert layout.all_visual_rows == 24
    assert (layout.text_slots, layout.visual_slots, layout.total_slots) == (10, 8, 13)


@given(st.integers(0, 20), configs, shapes)
def test_every_row_of_every_slab_has_an_id_of_its_own(num_slabs, config, shape):
    layout = layout_of_slabs(num_slabs, config, shape)
    text, visual = layout.text_rows, layout.visual_rows
    ids = [slab * text + row for slab in range(1 + num_slabs) for row in range(text)]
    ids += [
        layout.first_visual_slot + slab * visual + row
        for slab in range(1 + num_slabs)
        for row in range(visual)
    ]
    assert ids == list(range(layout.first_visual_slot + layout.all_visual_rows))


@settings(deadline=None)
@given(st.data(), st.integers(0, 3), st.integers(1, 2), st.integers(1, 3), shapes)
def test_text_rows_visual_rows_and_basis_of_a_slab_are_the_memory_of_that_slab_alone(
    data, more, layers, heads, shape
):
    shape = replace(shape, num_layers=layers, num_kv_heads=heads)
    layout = PoolLayout(more, more, shape.text_rows, shape.visual_rows)
    pool = SimpleNamespace(
        layout=layout,
        shape=shape,
        layer_num=layers,
        head_num=heads,
        head_dim=shape.head_dim,
        v_head_dim=shape.v_head_dim,
        store_dtype={1: torch.uint8, 2: torch.bfloat16, 4: torch.float32}[shape.kv_bytes],
        row_dtype={2: torch.bfloat16, 4: torch.float32}[shape.dtype_bytes],
        device="cpu",
        _init_data_ptrs_and_strides=lambda: None,
    )
    RotateKKVPool._create_buffers(pool)
    slab = data.draw(st.integers(0, more))
    text = slice(slab * layout.text_rows, (slab + 1) * layout.text_rows)
    visual = slice(slab * layout.visual_rows, (slab + 1) * layout.visual_rows)
    visual_views = [part[:, visual] for part in pool.visual if part is not None]
    for views, expected in (
        ([view[text] for view in pool.k_buffer + pool.v_buffer], shape.slab_bytes),
        (visual_views, shape.slab_bytes),
        # All of its bytes are marked, hence the query map and the mean do not overlap.
        ([pool.query_map[:, slab], pool.mean[:, slab]], shape.basis_bytes),
    ):
        pool.memory.zero_()
        for view in views:
            view.view(torch.uint8).fill_(255)
        marked = (pool.memory.view(torch.uint8).view(layers, 1 + more, -1) == 255).sum((0, 2))
        assert marked.tolist() == [expected * (other == slab) for other in range(1 + more)]


@given(slab_counts, st.integers(1, 10**5), configs, shapes)
def test_a_segment_takes_a_slab_for_its_basis_and_no_more_slabs_of_rows_than_it_needs(
    num_slabs, num_tokens, config, shape
):
    layout = layout_of_slabs(num_slabs, config, shape)
    rows = (layout.slabs_of(num_tokens) - 1) * layout.visual_rows
    assert num_tokens <= rows < num_tokens + layout.visual_rows


@given(budgets, configs, shapes)
def test_the_memory_never_exceeds_the_budget(budget, config, shape):
    layout = layout_of_bytes(budget, config, shape)
    assert layout.bytes(shape) <= budget


@given(budgets, configs, shapes)
def test_one_slab_more_would_not_fit(budget, config, shape):
    layout = layout_of_bytes(budget, config, shape)
    assert layout_of_slabs(layout.num_slabs + 1, config, shape).bytes(shape) > budget


@given(budgets, configs, shapes)
def test_the_total_alone_reproduces_the_layout(budget, config, shape):
    layout = layout_of_bytes(budget, config, shape)
    assert layout_of_total(layout.total_slots, config, shape) == layout


@given(st.integers(0, 10**7), configs, shapes)
def test_a_layout_has_at_most_the_total_that_was_asked_for(total, config, shape):
    layout = layout_of_total(total, config, shape)
    assert (
        layout.total_slots
        <= total
        < layout_of_slabs(layout.num_slabs + 1, config, shape).total_slots
    )


@given(slab_counts, configs, shapes)
def test_images_may_hold_their_fraction_of_the_slabs(num_slabs, config, shape):
    layout = layout_of_slabs(num_slabs, config, shape)
    assert (
        layout.max_visual_slabs <= num_slabs * config.visual_fraction < layout.max_visual_slabs + 1
    )


@KNOWN_MODELS
@pytest.mark.parametrize("budget_gib", [8, 40, 100])
@pytest.mark.parametrize(
    ("image_tokens", "text_tokens", "factor"),
    # Whole chats against stock's unrounded. Rows of 0.625 the bytes would give 1.55, 1.48 and 1.48
    # without bases.
    [(2928, 161, 1.5), (1225, 200, 1.4), (256, 40, 1.33)],
)
def test_the_defaults_hold_so_many_times_the_chats_of_full_width(
    shape, budget_gib, image_tokens, text_tokens, factor
):
    budget = budget_gib * 2**30
    layout = layout_of_bytes(budget, RotateKConfig(), shape)
    chats = int(chats_held(layout, image_tokens, text_tokens))
    image_slabs = chats * layout.slabs_of(image_tokens)
    assert image_slabs <= layout.max_visual_slabs
    assert image_slabs + math.ceil(chats * text_tokens / layout.text_rows) <= layout.num_slabs
    assert chats >= factor * (budget // shape.text_row_bytes) / (image_tokens + text_tokens)


@KNOWN_MODELS
@pytest.mark.parametrize("budget_gib", [8, 40, 100])
def test_the_defaults_hold_as_much_text_as_full_width_to_a_thousandth(shape, budget_gib):
    budget = budget_gib * 2**30
    assert layout_of_bytes(budget, RotateKConfig(), shape).text_slots >= 0.999 * (
        budget // shape.text_row_bytes
    )


@KNOWN_MODELS
def test_a_budget_below_one_slab_holds_nothing(shape):
    assert layout_of_bytes(shape.slab_bytes - 1, RotateKConfig(), shape).total_slots == 0


@KNOWN_MODELS
@pytest.mark.parametrize(
    ("kv_bytes", "of_bf16", "of_fp8"),
    [(2, 2.8, 1.4), (1, 3.1, 1.55)],
    ids=["text bf16", "text fp8"],
)
def test_coded_rows_hold_so_many_times_the_chats_of_stock(shape, kv_bytes, of_bf16, of_fp8):
    shape = replace(shape, rows=RowFormat(), kv_bytes=kv_bytes)
    budget = 40 * 2**30
    chats = int(chats_held(layout_of_bytes(budget, RotateKConfig(), shape), 2928, 161))
    stock = budget // shape.full_row_bytes / (2928 + 161)
    assert chats >= of_bf16 * stock and chats >= of_fp8 * 2 * stock
