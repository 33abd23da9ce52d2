"""Coded rows: a PCA head of 8-bit coordinates, a Hadamard residual and Values of few bits. The
plain-torch reference: every kernel over coded rows is held to it. row_format.py has the sizes.

Of a segment with Keys k_t, per KV head: mean mu; V [D, A] the top eigenvectors of the centred
covariance, sigma [A] their steps; H the orthonormal Hadamard matrix of D (blocks of it, where D is
no power of two). Of token t

    z_t = round(diag(1 / sigma) Vᵀ (k_t - mu))        int8 [A]
    e_t = H (k_t - mu - P z_t),   P = V diag(sigma)   the residual of the *decoded* head, P as
                                                      it is stored
    e_t ~ d_th (c_t - n_th)                           c_t key_bits a channel; step d and zero
                                                      point n of each half h = 0, 1 of the channels
    v_t ~ g_th (u_t - o_th)                           u_t value_bits a channel; the same

and a query q scores it

    (Pᵀ q) . z_t + sum over h of d_th ((H q)_h . c_th - n_th sum((H q)_h)) + q . mu

so nothing is rebuilt to full width. The head takes the few directions that carry outliers, the turn
by H spreads what is left evenly over the channels, and steps of the token's own cost no rare token
its detail.

A step is one byte S, the float 32 * (fp16 with the bits S << 6): 2^-13 to 62 with 4 bits of
mantissa, for ranges up to 930 with 4 bits and 186 with 2; what lies beyond is clipped, and shows in
the errors that the server tells. A zero point is one byte Z: Z / 2^(8 - bits) codes; the range of
every half holds 0, so that small Values of tokens much looked at stay small. Two halves with a step
of 3 % precision each are closer than one fp16 step and minimum in the same four bytes: KL 1.0e-3
against 1.4e-3 on SmolLM2-135M, where stock's FP8 has 1.3e-3; with the search of ``quantise`` for
Keys 0.9e-3.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch

from ..basis import Basis
from ..basis.pca import MOST_CODE

FP8 = torch.float8_e4m3fn


HALVES = 2
PARTS = 4  # channels in a word of codes
WORDS = {4: torch.int16, 2: torch.uint8}
STEP_SHIFT, STEP_UNIT = 6, 32.0
# Shares of a half's range that ``quantise`` tries.
RANGES: dict[int, tuple[float, ...]] = {4: (1.0, 0.96, 0.92, 0.88, 0.84, 0.8, 0.76)}
RANGES[3] = RANGES[2] = (1.0, 0.92, 0.85, 0.78, 0.71, 0.64, 0.57, 0.5)


class Codes(NamedTuple):
    """Of n tokens and H heads: packed uint8 [n, H, channels * bits / 8] (``pack``), steps uint8
    [n, H, 4]: step and zero point of the first half of the channels, then of the second."""

    packed: torch.Tensor
    steps: torch.Tensor


def hadamard(size: int, device: torch.device | str = "cpu") -> torch.Tensor:
    """The orthonormal Hadamard matrix [size, size] fp32, symmetric: Sylvester's for a power of two,
    else blocks of the largest power of two that divides ``size`` along the diagonal (80: five of
    16; 96: three of 32)."""
    block = size & -size
    if block < 8:
        raise ValueError(f"a turn by Hadamard blocks needs a multiple of 8 channels, got {size}")
    matrix = torch.ones(1, 1, device=device)
    while len(matrix) < block:
        matrix = torch.cat([torch.cat([matrix, matrix], 1), torch.cat([matrix, -matrix], 1)])
    return torch.block_diag(*[matrix / block**0.5] * (size // block))


@functools.cache
def sign_matrix(size: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """``hadamard`` without its scale: 1, -1 and 0 are exact in every dtype."""
    return hadamard(size).sign().to(device, dtype)


def pack(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """uint8 [..., C] below 2^bits, 4 or 2, -> [..., C * bits / 8]. Word j, of two bytes or one,
    holds the channels j, j + C / 4, j + C / 2 and j + 3 C / 4 from its low bits on: a kernel takes
    the same bits of all words for a quarter of the channels, and finds them in registers as a
    product of half precision wants them."""
    parts = codes.unflatten(-1, (PARTS, -1)).int()
    words = (parts << (bits * torch.arange(PARTS, device=codes.device)[:, None])).sum(
        -2, dtype=torch.int32
    )
    return words.to(WORDS[bits]).view(torch.uint8)


def unpack(packed: torch.Tensor, bits: int) -> torch.Tensor:
    """The inverse of ``pack``."""
    words = packed.contiguous().view(WORDS[bits]).int().unsqueeze(-2)
    codes = words >> (bits * torch.arange(PARTS, device=packed.device)[:, None])
    return (codes & (2**bits - 1)).to(torch.uint8).flatten(-2)


def quantise(x: torch.Tensor, bits: int, *, searches: bool = False) -> Codes:
    """Codes of x [n, H, C]. ``searches``: of RANGES, each half takes the one with the least squared
    error, else 1. Values must not: channels that are clipped in every token alike do not average
    out."""
    codes, steps = nearest_codes(x, bits, searches=searches)
    return Codes(pack(codes, bits), steps)


def nearest_codes(
    x: torch.Tensor, bits: int, *, searches: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """``quantise`` before it packs: codes [n, H, C] and steps [n, H, 4], uint8."""
    halves = x.float().unflatten(-1, (HALVES, -1))
    low = halves.amin(-1, keepdim=True).clamp_max(0)
    high = halves.amax(-1, keepdim=True).clamp_min(0)
    best: tuple[torch.Tensor, ...] | None = None
    for share in RANGES[bits] if searches else (1.0,):
        step_code = to_step_code((high - low) * share / (2**bits - 1))
        step = step_of(step_code)
        zero_code = (
            (((2**bits - 1) / 2 - (low + high) / 2 / step) * 2 ** (8 - bits)).round().clamp(0, 255)
        )
        zero = zero_code / 2 ** (8 - bits)
        codes = (halves / step + zero).round().clamp(0, 2**bits - 1)
        error = (step * (codes - zero) - halves).square().sum(-1, keepdim=True)
        tried = error, codes, step_code, zero_code.to(torch.uint8)
        if best is None:
            best = tried
        else:
            best = tuple(
                torch.where(error < best[0], new, old) for new, old in zip(tried, best, strict=True)
            )
    assert best is not None
    _, codes, step_code, zero_code = best
    return codes.flatten(-2).to(torch.uint8), torch.cat([step_code, zero_code], -1).flatten(-2)


def to_step_code(step: torch.Tensor) -> torch.Tensor:
    """The byte [...] of the float next to ``step``, at least 1."""
    bits = (step / STEP_UNIT).half().view(torch.int16).int()
    return ((bits + (1 << STEP_SHIFT - 1)) >> STEP_SHIFT).clamp(1, 255).to(torch.uint8)


def step_of(code: torch.Tensor) -> torch.Tensor:
    """fp32 of a step's byte [...]."""
    return (code.to(torch.int16) << STEP_SHIFT).view(torch.float16).float() * STEP_UNIT


def steps_and_zeros(steps: torch.Tensor, bits: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Steps and zero points fp32 [..., 2] of each half, from bytes [..., 4]."""
    step_code, zero_code = steps.unflatten(-1, (HALVES, 2)).unbind(-1)
    return step_of(step_code), zero_code.float() / 2 ** (8 - bits)


def dequantise(codes: Codes, bits: int) -> torch.Tensor:
    """[n, H, C] fp32."""
    return of_codes(unpack(codes.packed, bits), codes.steps, bits)


def of_codes(codes: torch.Tensor, steps: torch.Tensor, bits: int) -> torch.Tensor:
    """The inverse of ``nearest_codes``, fp32."""
    step, zero = steps_and_zeros(steps, bits)
    halves = codes.float().unflatten(-1, (HALVES, -1))
    return (step[..., None] * (halves - zero[..., None])).flatten(-2)


def encode_keys(keys: torch.Tensor, basis: Basis, key_bits: int) -> tuple[torch.Tensor, Codes]:
    """z int8 [n, H, A] and residual of keys [n, H, D] of a segment, to which ``basis`` was fitted
    by ``pca.fit_coded``. Its query_map must be rounded to the dtype that it is stored in: the
    residual makes up for that too."""
    centred = keys.float() - basis.mean
    z = torch.einsum("nhd,hda->nha", centred, basis.key_map).round().clamp(-MOST_CODE, MOST_CODE)
    residual = centred - torch.einsum("nha,hda->nhd", z, basis.query_map)
    turned = residual @ hadamard(keys.shape[-1], keys.device)
    return z.to(torch.int8), quantise(turned, key_bits, searches=True)


def decode_keys(z: torch.Tensor, residual: Codes, basis: Basis, key_bits: int) -> torch.Tensor:
    """The Keys [n, H, D] fp32 that the codes stand for."""
    turned = dequantise(residual, key_bits)
    head = torch.einsum("nha,hda->nhd", z.float(), basis.query_map)
    return head + turned @ hadamard(turned.shape[-1], turned.device) + basis.mean


def residual_scores(q: torch.Tensor, residual: Codes, key_bits: int) -> torch.Tensor:
    """q [m, H, G, D] fp32 -> [m, H, G, n] fp32: what the residual of each token adds to q . k, from
    its codes."""
    turned = (q @ hadamard(q.shape[-1], q.device)).unflatten(-1, (HALVES, -1))
    step, zero = steps_and_zeros(residual.steps, key_bits)
    codes = unpack(residual.packed, key_bits).float().unflatten(-1, (HALVES, -1))
    on_codes = torch.einsum("mhgsd,nhsd->mhgns", turned, codes)
    on_zeros = torch.einsum("mhgs,nhs->mhgns", turned.sum(-1), zero)
    return torch.einsum("mhgns,nhs->mhgn", on_codes - on_zeros, step)


def encode_values(values: torch.Tensor, value_bits: int) -> torch.Tensor | Codes:
    """values [n, H, Dv] as they are (16), in FP8 (8), or as codes (4, 2)."""
    if value_bits == 16:
        return values
    return to_fp8(values) if value_bits == 8 else quantise(values.float(), value_bits)


def decode_values(stored: torch.Tensor | Codes, value_bits: int) -> torch.Tensor:
    """[n, H, Dv] fp32."""
    return dequantise(stored, value_bits) if isinstance(stored, Codes) else stored.float()


def to_fp8(x: torch.Tensor) -> torch.Tensor:
    """e4m3, large numbers as the largest: a plain conversion would make NaN of them."""
    most = torch.finfo(FP8).max
    return x.float().clamp(-most, most).to(FP8)


def residual_energy(keys: torch.Tensor, basis: Basis) -> torch.Tensor:
    """Share [H] of the centred Keys' energy that principal components, before they are rounded,
    leave to the residual."""
    centred = keys.float() - basis.mean
    z = torch.einsum("nhd,hda->nha", centred, basis.key_map)
    head = z.square() * basis.query_map.square().sum(1)
    energy = centred.square().sum((0, 2))
    left = (energy - head.sum((0, 2))).clamp_min(0)
    return left / torch.where(energy > 0, energy, 1.0)
