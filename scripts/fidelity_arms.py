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
    A+hB      coded rows: an 8-bit PCA head of A channels, B bits a channel of the turned rest
              (kernels/coded.py; B = 3 is simulated, with the bytes of packed codes)
    A+zB      the same bytes, where each half of the rest has a step and a zero point of one byte

Values: full, fp8, int4, int3, int2 (a step and a minimum a token), z4, z3, z2 (a step and a zero
point of one byte each half of the channels).
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass

import torch

from sglang_rotatek.basis import get_basis
from sglang_rotatek.kernels import coded
from sglang_rotatek.kernels.coded import CodedFormat

ARMS = (
    "full", "fp8/fp8", "int4/int4", "kivi4/int4", "had4/int4", "rank32", "rank64", "paper32",
    "think32", "spark32", "16+h4/int4", "16+h4", "16+z4/z4", "16+h3/int4", "16+h2/int4", "16+z2/z4",
    "16+h2/int2",
)  # fmt: skip
BASES = {"rank": "pca", "paper": "paper", "think": "think"}
FP16_BYTES = 2
HALVES = 2
HALVES_BYTES = 2 * HALVES  # a step and a zero point each
STEP_UNIT = 32.0
# What the step of a half is tried at, times the one that reaches all its channels. For Keys alone,
# whose rest is turned: clipping the same channel of all Values would not average out.
REACH_ALL = (1.0,)
SHARES = {4: (1.0, 0.96, 0.92, 0.88, 0.84, 0.8, 0.76)}
SHARES[3] = SHARES[2] = (1.0, 0.92, 0.85, 0.78, 0.71, 0.64, 0.57, 0.5)

# Of one layer and segment, fp32: Keys or Values [n, H, D] -> what is read back. Keys come with the
# last queries [w, Hq, D] of the prompt that was coded.
KeyCode = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
ValueCode = Callable[[torch.Tensor], torch.Tensor]


def fp8(x: torch.Tensor) -> torch.Tensor:
    return x.to(coded.FP8).float()


def per_token(x: torch.Tensor, bits: int) -> torch.Tensor:
    """coded.quantise and its inverse, for any number of bits: nothing is packed."""
    minimum = coded._rounded(x.amin(-1, keepdim=True), float("-inf")).float()
    span = x.amax(-1, keepdim=True) - minimum
    step = coded._rounded(span / (2**bits - 1), float("inf")).float()
    codes = ((x - minimum) / torch.where(step > 0, step, 1.0)).round().clamp(0, 2**bits - 1)
    return codes * step + minimum


def per_channel(x: torch.Tensor, bits: int) -> torch.Tensor:
    """KIVI's Keys: a step a channel, over all tokens of the segment."""
    low, high = x.amin(0), x.amax(0)
    step = ((high - low) / (2**bits - 1)).clamp_min(1e-12)
    return ((x - low) / step).round() * step + low


def halves(x: torch.Tensor, bits: int, shares: tuple[float, ...] = REACH_ALL) -> torch.Tensor:
    """Codes c of ``bits`` with a step s and a zero point z of one byte for each half of the
    channels: s (c - z / 2^(8 - bits)). The range holds zero; the share with the least squared
    error is taken."""
    parts = x.unflatten(-1, (HALVES, -1))
    low = parts.amin(-1, keepdim=True).clamp_max(0)
    high = parts.amax(-1, keepdim=True).clamp_min(0)
    fine, most = 2 ** (8 - bits), 2**bits - 1
    best, least = parts, torch.full_like(low, torch.inf)
    for share in shares:
        step = byte_step((high - low) * share / most)
        zero = ((most / 2 - (low + high) / 2 / step) * fine).round().clamp(0, 255) / fine
        read_back = step * ((parts / step + zero).round().clamp(0, most) - zero)
        error = (read_back - parts).square().sum(-1, keepdim=True)
        best = torch.where(error < least, read_back, best)
        least = torch.minimum(error, least)
    return best.flatten(-2)


def byte_step(step: torch.Tensor) -> torch.Tensor:
    """The nearest step that one byte tells, STEP_UNIT times the fp16 of the byte shifted left by 6:
    4 bits of exponent and 4 of mantissa, up to 62. Never zero."""
    byte = ((step / STEP_UNIT).half().view(torch.int16).int() + 32 >> 6).clamp(1, 255)
    return (byte << 6).to(torch.int16).view(torch.half).float() * STEP_UNIT


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
    basis = coded.fit(x, channels)
    form = CodedFormat(channels)
    head = coded.encode_keys(x, basis, form).head.float()
    read_back = torch.einsum("nha,hda->nhd", head, basis.query_map) + basis.mean
    return read_back + turned(x - read_back, rest)


def coded_keys(x: torch.Tensor, form: CodedFormat) -> torch.Tensor:
    basis = coded.fit(x, form.head_channels)
    return coded.decode_keys(coded.encode_keys(x, basis, form), basis, form)


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
    if match := re.fullmatch(r"z([234])", value):
        bits = int(match[1])
        return lambda v: halves(v, bits), head_dim * bits / 8 + HALVES_BYTES
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
    if kind == "h" and bits in coded.KEY_BITS:
        form = CodedFormat(channels, bits)
        return lambda k, _: coded_keys(k, form), form.key_bytes(head_dim)
    if kind == "h":
        rest, steps = lambda x: per_token(x, bits), 2 * FP16_BYTES
    else:
        rest, steps = lambda x: halves(x, bits, SHARES[bits]), HALVES_BYTES
    return (
        lambda k, _: head_and_rest(k, channels, rest),
        channels + head_dim * bits / 8 + steps,
    )
