"""What fidelity.py compares: codes of Keys and Values, each as the tensor that would be read back.

An arm is KEY/VALUE. Bytes are of one token and KV head, bases left out. Keys:

    full, fp8 (e4m3, scale 1, as stock's flag)
    int4      a step and a minimum a token
    kivi4     a step and a minimum a channel (KIVI)
    had4      centred, turned by Hadamard, a step and a minimum a token
    rankR     this project's rows of R channels of the model's dtype, PCA
    paperR    the same with the paper's basis, which looks at the last queries (basis/paper.py)
    thinkR    ThinK: R channels are kept, those with the largest Keys times queries (basis/think.py)
    sparkR    SparK: R channels a token's own, the others refilled with one size and their signs
    A+zB      coded rows: an 8-bit PCA head of A channels, B bits a channel of the turned rest
              (kernels/coded.py; B = 3 is simulated, with the bytes of packed codes)
    A+hB      the same bytes, where the rest has a step and a minimum a token

Values: full, fp8, int4, int3, int2 (a step and a minimum a token), z4, z3, z2 (those of coded
rows).
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass

import torch

from sglang_rotatek.basis import get_basis, pca
from sglang_rotatek.kernels import coded
from sglang_rotatek.kernels.row_format import STEP_BYTES

ARMS = (
    "full", "fp8/fp8", "int4/int4", "kivi4/int4", "had4/int4", "rank32", "rank64", "paper32",
    "think32", "spark32", "16+h4/int4", "16+h4", "16+z4/z4", "16+h3/int4", "16+h2/int4", "16+z2/z4",
    "16+h2/int2",
)  # fmt: skip
BASES = {"rank": "pca", "paper": "paper", "think": "think"}
FP16_BYTES = 2

# Of one layer and segment, fp32: Keys or Values [n, H, D] -> what is read back. Keys come with the
# last queries [w, Hq, D] of the prompt that was coded.
KeyCode = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
ValueCode = Callable[[torch.Tensor], torch.Tensor]


def fp8(x: torch.Tensor) -> torch.Tensor:
    return x.to(coded.FP8).float()


def per_token(x: torch.Tensor, bits: int) -> torch.Tensor:
    """A step and a minimum a token, in fp16: one rounded up, the other down, so that nothing is
    clipped."""
    minimum = rounded(x.amin(-1, keepdim=True), float("-inf"))
    span = x.amax(-1, keepdim=True) - minimum
    step = rounded(span / (2**bits - 1), float("inf"))
    codes = ((x - minimum) / torch.where(step > 0, step, 1.0)).round().clamp(0, 2**bits - 1)
    return codes * step + minimum


def rounded(x: torch.Tensor, towards: float) -> torch.Tensor:
    """x in fp16, not on the other side of it."""
    nearest = x.half()
    beyond = torch.nextafter(nearest, torch.full_like(nearest, towards))
    is_short = nearest.float() > x if towards < 0 else nearest.float() < x
    return torch.where(is_short, beyond, nearest).float()


def per_channel(x: torch.Tensor, bits: int) -> torch.Tensor:
    """KIVI's Keys: a step a channel, over all tokens of the segment."""
    low, high = x.amin(0), x.amax(0)
    step = ((high - low) / (2**bits - 1)).clamp_min(1e-12)
    return ((x - low) / step).round() * step + low


def in_halves(x: torch.Tensor, bits: int, *, searches: bool = False) -> torch.Tensor:
    """coded.quantise and its inverse, for any number of bits: nothing is packed."""
    return coded.of_codes(*coded.nearest_codes(x, bits, searches=searches), bits)


def turned(x: torch.Tensor, code: ValueCode) -> torch.Tensor:
    turn = coded.hadamard(x.shape[-1], x.device)
    return code(x @ turn) @ turn


def centred_hadamard(x: torch.Tensor, bits: int) -> torch.Tensor:
    mean = x.mean(0)
    return turned(x - mean, lambda y: per_token(y, bits)) + mean


def low_rank(x: torch.Tensor, queries: torch.Tensor, rank: int, basis: str) -> torch.Tensor:
    """``rank`` channels a token in bf16; queries score them as basis/__init__.py says."""
    fitted = get_basis(basis)(x, queries, rank)
    z = torch.einsum("nhd,hdr->nhr", x - fitted.mean, fitted.key_map).bfloat16().float()
    return torch.einsum("nhr,hdr->nhd", z, fitted.query_map) + fitted.mean


def spark(x: torch.Tensor, queries: torch.Tensor, rank: int) -> torch.Tensor:
    """SparK (arXiv 2508.15212): of each token, the ``rank`` channels with the largest k^2 |q|, |q|
    a channel's norm over the window. The rest is refilled with sign(k) sqrt(mean / |q|), the mean
    that of the token's dropped scores. Unstructured: a simulation of accuracy alone."""
    norm = queries.unflatten(1, (x.shape[1], -1)).square().sum((0, 2)).sqrt().clamp_min(1e-12)
    score = x.square() * norm
    kept = torch.zeros_like(x).scatter_(-1, score.topk(rank, dim=-1).indices, 1.0).bool()
    mean = score.masked_fill(kept, 0).sum(-1, keepdim=True) / max(1, x.shape[-1] - rank)
    return torch.where(kept, x.bfloat16().float(), x.sign() * (mean / norm).sqrt())


def spark_bytes(rank: int, head_dim: int) -> float:
    """Kept channels in bf16, a bit a channel that tells them, a sign a dropped one, the mean."""
    return 2 * rank + head_dim / 8 + (head_dim - rank) / 8 + FP16_BYTES


def head_and_rest(x: torch.Tensor, channels: int, rest: ValueCode) -> torch.Tensor:
    """kernels/coded.py's Keys with another code of the turned rest."""
    basis = pca.fit_coded(x, x, channels)
    z, _ = coded.encode_keys(x, basis, key_bits=4)
    read_back = torch.einsum("nha,hda->nhd", z.float(), basis.query_map) + basis.mean
    return read_back + turned(x - read_back, rest)


def coded_keys(x: torch.Tensor, channels: int, bits: int) -> torch.Tensor:
    basis = pca.fit_coded(x, x, channels)
    return coded.decode_keys(*coded.encode_keys(x, basis, bits), basis, bits)


@dataclass(frozen=True)
class Arm:
    """``key`` and ``value``: what the arm reads back; ``bytes`` of a token and head."""

    name: str
    key: KeyCode
    value: ValueCode
    bytes: float


def make_arm(name: str, head_dim: int) -> Arm:
    """Raises ValueError for a name that is no arm."""
    key, _, value = name.partition("/")
    key_code, key_bytes = key_arm(key, head_dim)
    value_code, value_bytes = value_arm(value, head_dim)
    return Arm(name, key_code, value_code, key_bytes + value_bytes)


def value_arm(value: str, head_dim: int) -> tuple[ValueCode, float]:
    if value in ("", "full"):
        return lambda v: v, 2 * head_dim
    if value == "fp8":
        return fp8, head_dim
    if match := re.fullmatch(r"int([234])", value):
        bits = int(match[1])
        return lambda v: per_token(v, bits), head_dim * bits / 8 + 2 * FP16_BYTES
    if match := re.fullmatch(r"z([432])", value):
        bits = int(match[1])
        return lambda v: in_halves(v, bits), head_dim * bits / 8 + STEP_BYTES
    raise ValueError(
        f"Values of an arm must be one of full, fp8, intB or zB with B of 4, 3, 2, got {value!r}"
    )


def key_arm(key: str, head_dim: int) -> tuple[KeyCode, float]:
    plain: dict[str, tuple[ValueCode, float]] = {
        "full": (lambda k: k, 2 * head_dim),
        "fp8": (fp8, head_dim),
        "int4": (lambda k: per_token(k, 4), head_dim / 2 + 2 * FP16_BYTES),
        "kivi4": (lambda k: per_channel(k, 4), head_dim / 2),
        "had4": (lambda k: centred_hadamard(k, 4), head_dim / 2 + 2 * FP16_BYTES),
    }
    if key in plain:
        code, bytes_ = plain[key]
        return lambda k, _: code(k), bytes_
    if match := re.fullmatch(r"(rank|paper|think|spark)(\d+)", key):
        kind, rank = match[1], int(match[2])
        if 0 < rank <= head_dim:
            if kind == "spark":
                return lambda k, q: spark(k, q, rank), spark_bytes(rank, head_dim)
            return lambda k, q: low_rank(k, q, rank, BASES[kind]), 2 * rank
    if match := re.fullmatch(r"(\d+)\+([hz])([234])", key):
        channels, kind, bits = int(match[1]), match[2], int(match[3])
        if channels <= head_dim:
            return coded_arm(channels, kind, bits, head_dim)
    raise ValueError(
        "Keys of an arm must be full, fp8, int4, kivi4, had4, rankR, paperR, thinkR, sparkR, A+hB "
        f"or A+zB with R and A up to head_dim and B of 4, 3, 2, got {key!r}"
    )


def coded_arm(channels: int, kind: str, bits: int, head_dim: int) -> tuple[KeyCode, float]:
    bytes_ = channels + head_dim * bits / 8 + STEP_BYTES
    if kind == "z" and bits != 3:
        return lambda k, _: coded_keys(k, channels, bits), bytes_
    if kind == "z":
        return lambda k, _: head_and_rest(
            k, channels, lambda x: in_halves(x, 3, searches=True)
        ), bytes_
    return lambda k, _: head_and_rest(k, channels, lambda x: per_token(x, bits)), bytes_
