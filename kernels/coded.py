"""Coded rows: a PCA head of 8-bit channels, a Hadamard residual and Values of few bits. The format, and its plain-torch
reference: every kernel over coded rows is held to it.

Of a segment with Keys k_t, per KV head: mean mu; V [D, A] the top eigenvectors of the centred covariance, sigma [A] their
steps; H the orthonormal Hadamard matrix of D (blocks of it, where D is no power of two). Of token t

    a_t = round(Vᵀ (k_t - mu) / sigma)                          int8 [A]
    e_t = H (k_t - mu - V (sigma a_t))                          the residual of the *decoded* head
    c_t = round((e_t - m_t) / d_t)                              key_bits a channel; d_t, m_t fp16 of the token
    v_t ~ g_t u_t + w_t                                         u_t value_bits a channel; g_t, w_t fp16 of the token

and a query q scores it, with P = V sigma,

    (Pᵀ q) . a_t + d_t (H q) . c_t + m_t sum(H q) + q . mu

so nothing is rebuilt to full width. The head takes the few directions that carry outliers, the turn by H spreads what is
left evenly over the channels, and a step of the token's own costs no rare token its detail.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch

MOST_HEAD_CODE = 127
KEY_BITS = (4, 2)
VALUE_BITS = (16, 8, 4, 2)
FP16_BYTES = 2
FP8 = torch.float8_e4m3fn


@dataclass(frozen=True)
class CodedFormat:
    """``head_channels`` (A): 8-bit channels of the PCA head. ``key_bits`` of a residual channel; ``value_bits`` of a Value
    channel, where 16 is the model's dtype and 8 is FP8 (e4m3)."""

    head_channels: int = 16
    key_bits: int = 4
    value_bits: int = 4

    def __post_init__(self) -> None:
        for name, value, fine in (
            ("key_bits", self.key_bits, KEY_BITS),
            ("value_bits", self.value_bits, VALUE_BITS),
        ):
            if value not in fine:
                raise ValueError(f"{name} must be one of {', '.join(map(str, fine))}, got {value}")
        if self.head_channels < 4 or self.head_channels % 4:
            raise ValueError(f"head_channels must be a multiple of 4, got {self.head_channels}: rows are aligned to 4 bytes")

    def key_bytes(self, head_dim: int) -> int:
        """Of one token and KV head: head, residual, step and minimum."""
        return self.head_channels + head_dim * self.key_bits // 8 + 2 * FP16_BYTES

    def value_bytes(self, v_head_dim: int) -> int:
        steps = 2 * FP16_BYTES if self.value_bits < 8 else 0
        return v_head_dim * self.value_bits // 8 + steps

    def row_bytes(self, head_dim: int, v_head_dim: int) -> int:
        return self.key_bytes(head_dim) + self.value_bytes(v_head_dim)


class CodedBasis(NamedTuple):
    """Of one segment, fp32. query_map [H, D, A] = V sigma; mean [H, D]; vectors [H, D, A] and steps [H, A] (sigma), which
    encoding alone needs."""

    query_map: torch.Tensor
    mean: torch.Tensor
    vectors: torch.Tensor
    steps: torch.Tensor


class Codes(NamedTuple):
    """Of n tokens and H heads: codes uint8 [n, H, channels * bits / 8] packed (``pack``), step and minimum fp16 [n, H]."""

    packed: torch.Tensor
    step: torch.Tensor
    minimum: torch.Tensor


class CodedKeys(NamedTuple):
    """head int8 [n, H, A]; residual: codes of D channels."""

    head: torch.Tensor
    residual: Codes


def hadamard(size: int, device: torch.device | str = "cpu") -> torch.Tensor:
    """The orthonormal Hadamard matrix [size, size] fp32, symmetric: Sylvester's for a power of two, else blocks of the
    largest power of two that divides ``size`` along the diagonal (80: five of 16; 96: three of 32)."""
    block = size & -size
    if block < 8:
        raise ValueError(f"a turn by Hadamard blocks needs a multiple of 8 channels, got {size}")
    matrix = torch.ones(1, 1, device=device)
    while len(matrix) < block:
        matrix = torch.cat([torch.cat([matrix, matrix], 1), torch.cat([matrix, -matrix], 1)])
    return torch.block_diag(*[matrix / block**0.5] * (size // block))


def pack(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """uint8 [..., C] below 2^bits -> [..., C * bits / 8]. Byte j holds the channels j, j + C', j + 2 C', ... from its low
    bits on, C' = C * bits / 8: a kernel takes the same bits of all bytes for a contiguous part of the channels."""
    parts = codes.unflatten(-1, (8 // bits, -1)).to(torch.uint8)
    shifts = bits * torch.arange(8 // bits, device=codes.device, dtype=torch.uint8)
    return (parts << shifts[:, None]).sum(-2, dtype=torch.uint8)


def unpack(packed: torch.Tensor, bits: int) -> torch.Tensor:
    """The inverse of ``pack``."""
    shifts = bits * torch.arange(8 // bits, device=packed.device, dtype=torch.uint8)
    return ((packed.unsqueeze(-2) >> shifts[:, None]) & (2**bits - 1)).flatten(-2)


def quantise(x: torch.Tensor, bits: int) -> Codes:
    """Codes of x [n, H, C] with a step and a minimum a token and head. The minimum is rounded down and the step up to
    fp16, so that no channel is clipped."""
    low, high = x.amin(-1), x.amax(-1)
    minimum = _rounded(low, float("-inf"))
    step = _rounded((high - minimum.float()) / (2**bits - 1), float("inf"))
    divisor = torch.where(step > 0, step.float(), 1.0)
    codes = ((x - minimum.float()[..., None]) / divisor[..., None]).round().clamp(0, 2**bits - 1)
    return Codes(pack(codes.to(torch.uint8), bits), step, minimum)


def _rounded(x: torch.Tensor, towards: float) -> torch.Tensor:
    """fp16 of x, not on the other side of it."""
    nearest = x.half()
    beyond = torch.nextafter(nearest, torch.full_like(nearest, towards))
    is_short = nearest.float() > x if towards < 0 else nearest.float() < x
    return torch.where(is_short, beyond, nearest)


def dequantise(codes: Codes, bits: int) -> torch.Tensor:
    """[n, H, C] fp32."""
    return unpack(codes.packed, bits) * codes.step.float()[..., None] + codes.minimum.float()[..., None]


def fit(keys: torch.Tensor, head_channels: int) -> CodedBasis:
    """The basis of a segment: top eigenvectors of the centred covariance, a step a channel that its largest coordinate
    reaches with code 127. keys [n, H, D] any float dtype."""
    keys = keys.float().transpose(0, 1)
    mean = keys.mean(1)
    centred = keys - mean[:, None]
    _, vectors = torch.linalg.eigh(centred.mT @ centred)  # ascending
    vectors = vectors[..., -head_channels:].flip(-1).contiguous()
    steps = (centred @ vectors).abs().amax(1) / MOST_HEAD_CODE
    return CodedBasis(vectors * steps[:, None], mean, vectors, steps)


def encode_keys(keys: torch.Tensor, basis: CodedBasis, form: CodedFormat) -> CodedKeys:
    """keys [n, H, D] of the segment that ``basis`` was fitted to."""
    centred = keys.float() - basis.mean
    steps = torch.where(basis.steps > 0, basis.steps, 1.0)
    head = torch.einsum("nhd,hda->nha", centred, basis.vectors) / steps
    head = head.round().clamp(-MOST_HEAD_CODE, MOST_HEAD_CODE)
    residual = centred - torch.einsum("nha,hda->nhd", head, basis.query_map)
    turned = residual @ hadamard(keys.shape[-1], keys.device)
    return CodedKeys(head.to(torch.int8), quantise(turned, form.key_bits))


def decode_keys(coded: CodedKeys, basis: CodedBasis, form: CodedFormat) -> torch.Tensor:
    """The Keys [n, H, D] fp32 that the codes stand for."""
    turned = dequantise(coded.residual, form.key_bits)
    head = torch.einsum("nha,hda->nhd", coded.head.float(), basis.query_map)
    return head + turned @ hadamard(turned.shape[-1], turned.device) + basis.mean


def scores(q: torch.Tensor, coded: CodedKeys, basis: CodedBasis, form: CodedFormat) -> torch.Tensor:
    """q [m, H, G, D] -> [m, H, G, n] fp32: q . k of the decoded Keys, from the codes. Not scaled."""
    q = q.float()
    turned = q @ hadamard(q.shape[-1], q.device)
    codes = unpack(coded.residual.packed, form.key_bits).float()
    head = torch.einsum("mhga,nha->mhgn", torch.einsum("mhgd,hda->mhga", q, basis.query_map), coded.head.float())
    wide = torch.einsum("mhgd,nhd->mhgn", turned, codes) * coded.residual.step.float().T[None, :, None]
    minimum = turned.sum(-1, keepdim=True) * coded.residual.minimum.float().T[None, :, None]
    return head + wide + minimum + torch.einsum("mhgd,hd->mhg", q, basis.mean)[..., None]


def encode_values(values: torch.Tensor, form: CodedFormat) -> torch.Tensor | Codes:
    """values [n, H, Dv] as they are, in FP8, or as codes."""
    if form.value_bits == 16:
        return values
    if form.value_bits == 8:
        most = torch.finfo(FP8).max
        return values.float().clamp(-most, most).to(FP8)
    return quantise(values.float(), form.value_bits)


def decode_values(coded: torch.Tensor | Codes, form: CodedFormat) -> torch.Tensor:
    """[n, H, Dv] fp32."""
    return dequantise(coded, form.value_bits) if isinstance(coded, Codes) else coded.float()


def residual_energy(keys: torch.Tensor, basis: CodedBasis) -> torch.Tensor:
    """Share [H] of the centred Keys' energy that the exact head leaves to the residual."""
    centred = keys.float() - basis.mean
    head = torch.einsum("nhd,hda->nha", centred, basis.vectors)
    energy = centred.square().sum((0, 2))
    left = (energy - head.square().sum((0, 2))).clamp_min(0)
    return left / torch.where(energy > 0, energy, 1.0)
