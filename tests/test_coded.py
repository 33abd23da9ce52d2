"""The plain-torch reference of coded rows: sizes, packing, errors, and scores on codes."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from sglang_rotatek.basis import Basis, pca
from sglang_rotatek.kernels import coded, reference
from sglang_rotatek.kernels.coded import FP8, Codes
from sglang_rotatek.kernels.pools import LayerPools, VisualRows
from sglang_rotatek.kernels.row_format import RowFormat

HEADS, GROUP = 2, 3
CODED = [
    RowFormat(),
    RowFormat(key_bits=2),
    RowFormat(8, 4, 8),
    RowFormat(16, 4, 2),
    RowFormat(16, 2, 16),
]
FORMATS = [*CODED, RowFormat(32, 16, 16), RowFormat(32, 16, 4), RowFormat(32, 16, 8)]


def of_formats(forms):
    return pytest.mark.parametrize(
        "form", forms, ids=lambda f: f"r{f.rank}-k{f.key_bits}-v{f.value_bits}"
    )


head_dims = pytest.mark.parametrize("head_dim", [64, 80, 96, 128])


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


def keys_of(n: int, head_dim: int, seed: int = 0, decay: float = 0.9) -> torch.Tensor:
    """Keys [n, HEADS, head_dim] with a mean, and energy that falls with the direction."""
    draw = torch.Generator().manual_seed(seed)
    scale = decay ** torch.arange(head_dim)
    turn = torch.linalg.qr(torch.randn(HEADS, head_dim, head_dim, generator=draw))[0]
    mean = 3 * torch.randn(HEADS, head_dim, generator=draw)
    return (
        torch.einsum("nhd,hde->nhe", torch.randn(n, HEADS, head_dim, generator=draw) * scale, turn)
        + mean
    )


def fit(keys: torch.Tensor, form: RowFormat) -> Basis:
    return pca.fit_coded(keys, keys, form.rank)


def coded_keys(keys, form) -> tuple[Basis, torch.Tensor, Codes]:
    basis = fit(keys, form)
    return basis, *coded.encode_keys(keys, basis, form.key_bits)


def decoded_keys(keys, form) -> torch.Tensor:
    basis, *row = coded_keys(keys, form)
    return coded.decode_keys(*row, basis, form.key_bits)


def test_a_row_has_the_bytes_of_the_format():
    sizes = {
        (16, 4, 4): 152,
        (16, 2, 4): 120,
        (16, 4, 16): 340,
        (16, 4, 8): 212,
        (16, 2, 2): 88,
        (32, 16, 16): 320,
    }
    assert {key: RowFormat(*key).row_bytes(128, 128) for key in sizes} == sizes


@of_formats(FORMATS)
@head_dims
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bf16", "fp32"])
def test_the_parts_of_a_row_are_its_bytes_and_aligned(form, head_dim, dtype):
    row_bytes = HEADS * form.row_bytes(head_dim, head_dim, dtype.itemsize)
    memory = torch.zeros(3, 5 * row_bytes, dtype=torch.uint8)
    parts = [
        part
        for part in VisualRows.view(memory, form, HEADS, head_dim, head_dim, dtype)
        if part is not None
    ]
    for part in parts:
        assert part.shape[:3] == (3, 5, HEADS)
        part[1, 2].view(torch.uint8).fill_(1)  # none overlaps: all bytes of the row are filled
    assert memory.view(3, 5, -1).sum(-1).tolist() == [
        [row_bytes * ((i, j) == (1, 2)) for j in range(5)] for i in range(3)
    ]
    assert row_bytes % 4 == 0


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"key_bits": 3}, "key_bits must be one of 16, 4, 2, got 3"),
        ({"value_bits": 5}, "value_bits must be one of 16, 8, 4, 2, got 5"),
        ({"rank": 6}, "rank must be a multiple of 4, got 6"),
    ],
)
def test_a_format_that_is_none_is_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        RowFormat(**fields)


@pytest.mark.parametrize("size", [8, 64, 80, 96, 128])
def test_the_turn_is_orthonormal_and_its_own_inverse(size):
    turn = coded.hadamard(size)
    assert torch.allclose(turn @ turn, torch.eye(size), atol=1e-6)
    assert torch.equal(turn, turn.T)
    # It spreads every channel evenly over its block.
    block = math.gcd(size, 128)
    assert set((turn.abs() * block**0.5).round(decimals=3).unique().tolist()) <= {0.0, 1.0}
    with pytest.raises(ValueError, match="multiple of 8"):
        coded.hadamard(100)


@pytest.mark.parametrize("bits", [2, 4])
def test_packing_is_reversible_and_keeps_parts_of_the_channels_together(bits):
    codes = torch.randint(0, 2**bits, (3, HEADS, 128), dtype=torch.uint8)
    packed = coded.pack(codes, bits)
    assert packed.shape == (3, HEADS, 16 * bits)
    assert torch.equal(coded.unpack(packed, bits), codes)
    words = packed.view(coded.WORDS[bits])
    assert torch.equal((words & (2**bits - 1)).to(torch.uint8), codes[..., :32])


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 1 << 30), st.sampled_from([2, 4]), st.floats(1e-2, 50), st.floats(-200, 200))
def test_no_channel_is_off_by_much_more_than_half_a_step(seed, bits, scale, shift):
    x = torch.randn(4, HEADS, 64, generator=torch.Generator().manual_seed(seed)) * scale + shift
    # Beyond, the largest step clips.
    assume(x.amax().clamp_min(0) - x.amin().clamp_max(0) < 60 * (2**bits - 1))
    codes = coded.quantise(x, bits)
    error = (coded.dequantise(codes, bits) - x).abs().unflatten(-1, (2, -1))
    step, _ = coded.steps_and_zeros(codes.steps, bits)
    # The ends of the range are off by what the step's byte, 3 % or the smallest step's half, and
    # that of the zero point round.
    off = (2**bits - 1) * 2.0**-14
    assert (
        error <= off + step[..., None] * (0.5 + (2**bits - 1) / 2 * 0.032 + 2.0 ** (bits - 9))
    ).all()
    halves = x.unflatten(-1, (2, -1))
    span = halves.amax(-1).clamp_min(0) - halves.amin(-1).clamp_max(0)
    assert (step * (2**bits - 1) <= span * 1.033 + off).all()


@given(st.floats(2**-14, 80))
def test_the_byte_of_a_step_is_the_next_float_of_four_bits_mantissa(step):
    code = coded.to_step_code(torch.tensor(step))
    decoded = float(coded.step_of(code))
    assert 1 <= code <= 255
    if 2**-9 <= step <= 62:
        assert abs(decoded - step) <= step / 32
    elif step > 62:
        assert decoded == 62
    else:
        assert abs(decoded - step) <= 2**-14


def test_zero_takes_a_code_of_its_own_half_and_next_to_no_error():
    x = torch.zeros(2, HEADS, 64)
    assert coded.dequantise(coded.quantise(x, 4), 4).abs().max() < 1e-4
    # A large half costs the other one nothing.
    x[..., :32] = 1000 * torch.randn(32)
    assert coded.dequantise(coded.quantise(x, 4), 4)[..., 32:].abs().max() < 1e-4


@pytest.mark.parametrize("bits", [2, 4])
def test_a_search_is_never_worse_in_any_half(bits):
    x = torch.randn(200, HEADS, 128)
    errors = [
        (coded.dequantise(coded.quantise(x, bits, searches=searches), bits) - x)
        .square()
        .unflatten(-1, (2, -1))
        .sum(-1)
        for searches in (False, True)
    ]
    assert (errors[1] <= errors[0] * (1 + 1e-6)).all()
    assert errors[1].sum() < {4: 0.95, 2: 0.7}[bits] * errors[0].sum()


@of_formats(CODED)
@head_dims
@pytest.mark.parametrize("n", [1, 2, 7, 65])
def test_scores_on_codes_are_those_of_the_decoded_keys(form, head_dim, n):
    basis, z, residual = coded_keys(keys_of(n, head_dim, seed=n), form)
    q = torch.randn(4, HEADS, GROUP, head_dim)
    decoded = coded.decode_keys(z, residual, basis, form.key_bits)
    expected = torch.einsum("mhgd,nhd->mhgn", q, decoded)
    of_head = torch.einsum("mhgd,hda,nha->mhgn", q, basis.query_map, z.float())
    of_mean = torch.einsum("mhgd,hd->mhg", q, basis.mean)[..., None]
    scores = of_head + of_mean + coded.residual_scores(q, residual, form.key_bits)
    assert torch.allclose(scores, expected, rtol=1e-4, atol=1e-4 * expected.abs().max())


def test_the_residual_makes_up_for_a_query_map_that_is_rounded():
    keys, form = keys_of(300, 128, decay=0.7), RowFormat()
    basis = fit(keys, form)
    rounded = basis._replace(query_map=basis.query_map.bfloat16().float())
    errors = []
    for used in (basis, rounded):
        decoded = coded.decode_keys(
            *coded.encode_keys(keys, used, form.key_bits), used, form.key_bits
        )
        errors.append(float((decoded - keys).square().mean()))
    # Read back through the rounded map, codes of the exact one are worse.
    stale = coded.decode_keys(
        *coded.encode_keys(keys, basis, form.key_bits), rounded, form.key_bits
    )
    assert errors[1] < 1.2 * errors[0] < float((stale - keys).square().mean())


@of_formats(FORMATS)
@pytest.mark.parametrize("text_dtype", [torch.bfloat16, FP8], ids=["text bf16", "text fp8"])
def test_attention_over_rows_of_any_format_is_that_over_what_they_decode_to(form, text_dtype):
    """Two segments with text around them, stored, then against dense attention over Keys and Values
    decoded outside."""
    dim, lens, num_text = 64, (40, 9), 12
    dtype, scales = torch.bfloat16, (0.5, 2.0) if text_dtype == FP8 else (1.0, 1.0)
    rows = VisualRows.view(
        torch.zeros(1, 60 * HEADS * form.row_bytes(dim, dim), dtype=torch.uint8),
        form,
        HEADS,
        dim,
        dim,
        dtype,
    )
    z, values, residual, steps = (None if part is None else part[0] for part in rows)
    text = torch.zeros(20, HEADS, dim).to(text_dtype), torch.zeros(20, HEADS, dim).to(text_dtype)
    maps = torch.zeros(3, HEADS, dim, form.rank, dtype=dtype), torch.zeros(3, HEADS, dim)
    slot_to_basis = torch.full((60,), -1, dtype=torch.int32)
    pools = LayerPools(*text, z, values, *maps, slot_to_basis, residual, steps, *scales)

    text_slots = torch.randperm(20)[:num_text]
    k, v = (torch.randn(num_text, HEADS, dim).to(dtype) for _ in range(2))
    reference.store_text(pools, text_slots, k, v)

    def in_text_dtype(x, scale):
        return (x.float() / scale).to(text_dtype).float() * scale

    slots, all_keys, all_values = (
        [text_slots],
        [in_text_dtype(k, scales[0])],
        [in_text_dtype(v, scales[1])],
    )
    free = torch.randperm(60)
    for basis_id, n in zip((2, 0), lens, strict=True):
        keys, own_values = keys_of(n, dim, seed=n).to(dtype), torch.randn(n, HEADS, dim).to(dtype)
        own, free = free[:n], free[n:]
        slot_to_basis[own] = basis_id
        basis = fit(keys, form) if form.has_residual else pca.fit(keys, keys, form.rank)
        reference.store_keys(pools, own, basis_id, basis, keys)
        reference.store_values(pools, own, own_values)
        stored = basis._replace(query_map=basis.query_map.to(dtype).float())
        if form.has_residual:
            decoded = coded.decode_keys(
                *coded.encode_keys(keys, stored, form.key_bits), stored, form.key_bits
            )
        else:
            rotated = reference.compress(keys, basis.key_map, basis.mean).to(dtype).float()
            decoded = torch.einsum("nhr,hdr->nhd", rotated, stored.query_map) + basis.mean
        slots.append(own + 20)
        all_keys.append(decoded)
        all_values.append(
            coded.decode_values(coded.encode_values(own_values, form.value_bits), form.value_bits)
        )
    slots, all_keys, all_values = torch.cat(slots), torch.cat(all_keys), torch.cat(all_values)
    order = torch.randperm(len(slots))
    q = torch.randn(1, HEADS * GROUP, dim)
    scores = torch.einsum("hgd,nhd->hgn", q[0].view(HEADS, GROUP, dim), all_keys) * 0.1
    expected = torch.einsum("hgn,nhd->hgd", scores.softmax(-1), all_values).flatten(0, 1)
    attended = reference.decode(q, pools, [0, len(slots)], slots[order], 0.1)
    assert torch.allclose(attended[0], expected, atol=2e-4)
    for part, whole in zip(reference.expand(slots, pools), (all_keys, all_values), strict=True):
        assert torch.allclose(part, whole, atol=1e-3)


@pytest.mark.parametrize(("key_bits", "limit"), [(4, 2e-3), (2, 5e-2)])
def test_the_error_of_decoded_keys_is_small_against_their_energy(key_bits, limit):
    keys = keys_of(500, 128)
    error = (decoded_keys(keys, RowFormat(key_bits=key_bits)) - keys).square().sum()
    assert error / (keys - keys.mean(0)).square().sum() < limit


def test_an_outlier_bias_of_keys_costs_nothing():
    """A bias on a few rotary pairs, 50 times the Keys' rms, turned by the token's position as RoPE
    does: FP8 pays for it."""
    keys = keys_of(1000, 128, decay=1.0)
    keys -= keys.mean(0)
    angle = torch.arange(1000)[:, None] * torch.tensor([1.0, 0.1, 0.01])
    biased = keys.clone()
    biased[:, :, :3] += 50 * keys.square().mean().sqrt() * torch.cos(angle)[:, None]
    biased[:, :, 64:67] += 50 * keys.square().mean().sqrt() * torch.sin(angle)[:, None]
    q = torch.randn(64, HEADS, GROUP, 128)

    def error(decoded: torch.Tensor, exact: torch.Tensor) -> float:
        off = torch.einsum("mhgd,nhd->mhgn", q, decoded - exact)
        return float(
            off.square().mean().sqrt()
            / torch.einsum("mhgd,nhd->mhgn", q, keys).square().mean().sqrt()
        )

    plain = [error(decoded_keys(k, RowFormat()), k) for k in (keys, biased)]
    fp8 = error(biased.to(torch.float8_e4m3fn).float(), biased)
    assert plain[1] < 1.3 * plain[0]
    assert fp8 > 2 * plain[1]


@pytest.mark.parametrize(("value_bits", "limit"), [(16, 0.0), (8, 1e-3), (4, 2e-2), (2, 4e-1)])
def test_values_are_close(value_bits, limit):
    values = torch.randn(50, HEADS, 128)
    decoded = coded.decode_values(coded.encode_values(values, value_bits), value_bits)
    assert (decoded - values).square().mean() <= limit * values.square().mean()


def test_the_residuals_energy_is_what_the_head_leaves():
    keys = keys_of(300, 64)
    basis = fit(keys, RowFormat())
    exact = torch.linalg.svdvals((keys - keys.mean(0)).transpose(0, 1)).square()
    assert torch.allclose(
        coded.residual_energy(keys, basis), exact[:, 16:].sum(-1) / exact.sum(-1), atol=1e-4
    )
    assert not coded.residual_energy(keys[:1], fit(keys[:1], RowFormat())).any()
