"""The plain-torch reference of coded rows: sizes, packing, errors, and scores on codes."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sglang_rotatek.kernels import coded
from sglang_rotatek.kernels.coded import CodedFormat

HEADS, GROUP = 2, 3
FORMATS = [CodedFormat(), CodedFormat(key_bits=2), CodedFormat(8, 4, 8), CodedFormat(16, 4, 2), CodedFormat(16, 2, 16)]
formats = pytest.mark.parametrize("form", FORMATS, ids=lambda f: f"{f.head_channels}+h{f.key_bits}-v{f.value_bits}")
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
    return torch.einsum("nhd,hde->nhe", torch.randn(n, HEADS, head_dim, generator=draw) * scale, turn) + mean


def coded_keys(keys, form):
    basis = coded.fit(keys, form.head_channels)
    return basis, coded.encode_keys(keys, basis, form)


def test_a_row_has_the_bytes_of_the_format():
    sizes = {(16, 4, 4): 152, (16, 2, 4): 120, (16, 4, 16): 340, (16, 4, 8): 212, (16, 2, 2): 88}
    assert {key: CodedFormat(*key).row_bytes(128, 128) for key in sizes} == sizes


@formats
@head_dims
def test_the_parts_of_a_row_take_the_bytes_of_the_format(form, head_dim):
    keys = keys_of(5, head_dim)
    _, row = coded_keys(keys, form)
    values = coded.encode_values(keys.half(), form)
    of_keys = (row.head, *row.residual)
    of_values = values if isinstance(values, coded.Codes) else (values,)
    assert sum(part[0, 0].nbytes for part in of_keys) == form.key_bytes(head_dim)
    assert sum(part[0, 0].nbytes for part in of_values) == form.value_bytes(head_dim)
    assert form.row_bytes(head_dim, head_dim) % 4 == 0


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"key_bits": 3}, "key_bits must be one of 4, 2, got 3"),
        ({"value_bits": 5}, "value_bits must be one of 16, 8, 4, 2, got 5"),
        ({"head_channels": 6}, "head_channels must be a multiple of 4, got 6"),
    ],
)
def test_a_format_that_is_none_is_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        CodedFormat(**fields)


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
    assert torch.equal(packed & (2**bits - 1), codes[..., : 16 * bits])


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 1 << 30), st.sampled_from([2, 4]), st.floats(1e-3, 1e3), st.floats(-1e3, 1e3))
def test_no_channel_is_off_by_more_than_half_a_step(seed, bits, scale, shift):
    x = torch.randn(4, HEADS, 64, generator=torch.Generator().manual_seed(seed)) * scale + shift
    codes = coded.quantise(x, bits)
    error = (coded.dequantise(codes, bits) - x).abs()
    assert (error <= codes.step.float()[..., None] * 0.5001 + 1e-6 * abs(shift)).all()
    span = x.amax(-1) - x.amin(-1)
    # The step is no larger than the span asks for, but for what fp16 rounds of it and of the minimum.
    assert (codes.step.float() * (2**bits - 1) <= span * 1.002 + abs(shift) * 2e-3 + 1e-5).all()


def test_a_token_of_equal_channels_has_no_step_and_no_error():
    x = torch.full((2, HEADS, 64), 0.5)
    codes = coded.quantise(x, 4)
    assert not codes.step.any() and torch.equal(coded.dequantise(codes, 4), x)


@formats
@head_dims
@pytest.mark.parametrize("n", [1, 2, 7, 65])
def test_scores_on_codes_are_those_of_the_decoded_keys(form, head_dim, n):
    keys = keys_of(n, head_dim, seed=n)
    basis, row = coded_keys(keys, form)
    q = torch.randn(4, HEADS, GROUP, head_dim)
    expected = torch.einsum("mhgd,nhd->mhgn", q, coded.decode_keys(row, basis, form))
    assert torch.allclose(coded.scores(q, row, basis, form), expected, rtol=1e-4, atol=1e-4 * expected.abs().max())


@pytest.mark.parametrize(("key_bits", "limit"), [(4, 2e-3), (2, 5e-2)])
def test_the_error_of_decoded_keys_is_small_against_their_energy(key_bits, limit):
    keys = keys_of(500, 128)
    form = CodedFormat(key_bits=key_bits)
    basis, row = coded_keys(keys, form)
    error = (coded.decode_keys(row, basis, form) - keys).square().sum()
    assert error / (keys - basis.mean).square().sum() < limit


def test_an_outlier_bias_of_keys_costs_nothing():
    """A bias on a few rotary pairs, 50 times the Keys' rms, turned by the token's position as RoPE does: FP8 pays for it."""
    keys = keys_of(1000, 128, decay=1.0)
    keys -= keys.mean(0)
    angle = torch.arange(1000)[:, None] * torch.tensor([1.0, 0.1, 0.01])
    biased = keys.clone()
    biased[:, :, :3] += 50 * keys.square().mean().sqrt() * torch.cos(angle)[:, None]
    biased[:, :, 64:67] += 50 * keys.square().mean().sqrt() * torch.sin(angle)[:, None]
    q = torch.randn(64, HEADS, GROUP, 128)

    def error(decoded: torch.Tensor, exact: torch.Tensor) -> float:
        off = torch.einsum("mhgd,nhd->mhgn", q, decoded - exact)
        return float(off.square().mean().sqrt() / torch.einsum("mhgd,nhd->mhgn", q, keys).square().mean().sqrt())

    form = CodedFormat()
    plain = [error(coded.decode_keys(*coded_keys(k, form)[::-1], form), k) for k in (keys, biased)]
    fp8 = error(biased.to(torch.float8_e4m3fn).float(), biased)
    assert plain[1] < 1.3 * plain[0]
    assert fp8 > 2 * plain[1]


@pytest.mark.parametrize(("value_bits", "limit"), [(16, 0.0), (8, 1e-3), (4, 2e-2), (2, 4e-1)])
def test_values_are_close(value_bits, limit):
    values = torch.randn(50, HEADS, 128)
    form = CodedFormat(value_bits=value_bits)
    decoded = coded.decode_values(coded.encode_values(values, form), form)
    assert (decoded - values).square().mean() <= limit * values.square().mean()


def test_the_residuals_energy_is_what_the_head_leaves():
    keys = keys_of(300, 64)
    basis = coded.fit(keys, 16)
    exact = torch.linalg.svdvals((keys - keys.mean(0)).transpose(0, 1)).square()
    assert torch.allclose(coded.residual_energy(keys, basis), exact[:, 16:].sum(-1) / exact.sum(-1), atol=1e-4)
    assert not coded.residual_energy(keys[:1], coded.fit(keys[:1], 16)).any()
