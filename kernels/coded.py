"""Coded rows: a PCA head of 8-bit coordinates, a Hadamard residual and Values of few bits. The plain-torch reference:
every kernel over coded rows is held to it. row_format.py has the sizes.

Of a segment with Keys k_t, per KV head: mean mu; V [D, A] the top eigenvectors of the centred covariance, sigma [A] their
steps; H the orthonormal Hadamard matrix of D (blocks of it, where D is no power of two). Of token t

    z_t = round(diag(1 / sigma) Vᵀ (k_t - mu))                  int8 [A]
    e_t = H (k_t - mu - P z_t),   P = V diag(sigma)             the residual of the *decoded* head, P as it is stored
    c_t = round((e_t - m_t) / d_t)                              key_bits a channel; d_t, m_t fp16 of the token
    v_t ~ g_t u_t + w_t                                         u_t value_bits a channel; g_t, w_t fp16 of the token

and a query q scores it

    (Pᵀ q) . z_t + d_t (H q) . c_t + m_t sum(H q) + q . mu

so nothing is rebuilt to full width. The head takes the few directions that carry outliers, the turn by H spreads what is
left evenly over the channels, and a step of the token's own costs no rare token its detail.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from ..basis import Basis
from ..basis.pca import MOST_CODE

FP8 = torch.float8_e4m3fn


class Codes(NamedTuple):
    """Of n tokens and H heads: packed uint8 [n, H, channels * bits / 8] (``pack``), steps fp16 [n, H, 2]: step and minimum."""

    packed: torch.Tensor
    steps: torch.Tensor


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
    return Codes(pack(codes.to(torch.uint8), bits), torch.stack([step, minimum], -1))


def _rounded(x: torch.Tensor, towards: float) -> torch.Tensor:
    """fp16 of x, not on the other side of it."""
    nearest = x.half()
    beyond = torch.nextafter(nearest, torch.full_like(nearest, towards))
    is_short = nearest.float() > x if towards < 0 else nearest.float() < x
    return torch.where(is_short, beyond, nearest)


def dequantise(codes: Codes, bits: int) -> torch.Tensor:
    """[n, H, C] fp32."""
    step, minimum = codes.steps.float().unbind(-1)
    return unpack(codes.packed, bits) * step[..., None] + minimum[..., None]


def encode_keys(keys: torch.Tensor, basis: Basis, key_bits: int) -> tuple[torch.Tensor, Codes]:
    """z int8 [n, H, A] and residual of keys [n, H, D] of a segment, to which ``basis`` was fitted by ``pca.fit_coded``. Its
    query_map must be rounded to the dtype that it is stored in: the residual makes up for that too."""
    centred = keys.float() - basis.mean
    z = torch.einsum("nhd,hda->nha", centred, basis.key_map).round().clamp(-MOST_CODE, MOST_CODE)
    residual = centred - torch.einsum("nha,hda->nhd", z, basis.query_map)
    return z.to(torch.int8), quantise(residual @ hadamard(keys.shape[-1], keys.device), key_bits)


def decode_keys(z: torch.Tensor, residual: Codes, basis: Basis, key_bits: int) -> torch.Tensor:
    """The Keys [n, H, D] fp32 that the codes stand for."""
    turned = dequantise(residual, key_bits)
    head = torch.einsum("nha,hda->nhd", z.float(), basis.query_map)
    return head + turned @ hadamard(turned.shape[-1], turned.device) + basis.mean


def residual_scores(q: torch.Tensor, residual: Codes, key_bits: int) -> torch.Tensor:
    """q [m, H, G, D] fp32 -> [m, H, G, n] fp32: what the residual of each token adds to q . k, from its codes."""
    turned = q @ hadamard(q.shape[-1], q.device)
    step, minimum = residual.steps.float().unbind(-1)
    on_codes = torch.einsum("mhgd,nhd->mhgn", turned, unpack(residual.packed, key_bits).float())
    return on_codes * step.T[None, :, None] + turned.sum(-1, keepdim=True) * minimum.T[None, :, None]


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
    """Share [H] of the centred Keys' energy that principal components, before they are rounded, leave to the residual."""
    centred = keys.float() - basis.mean
    z = torch.einsum("nhd,hda->nha", centred, basis.key_map)
    head = z.square() * basis.query_map.square().sum(1)
    energy = centred.square().sum((0, 2))
    left = (energy - head.sum((0, 2))).clamp_min(0)
    return left / torch.where(energy > 0, energy, 1.0)
