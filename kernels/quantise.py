"""What kernels over coded rows and FP8 share: rounding, codes and the turn by Hadamard blocks
(coded.py, in Triton)."""

from __future__ import annotations

import triton
import triton.language as tl

from . import coded

STEP_SHIFT, STEP_UNIT = tl.constexpr(coded.STEP_SHIFT), tl.constexpr(coded.STEP_UNIT)
STEP_ROUND = tl.constexpr(1 << coded.STEP_SHIFT - 1)
MOST_FP8 = tl.constexpr(448.0)
# 1.5 * 2^23: fp32 numbers of its size are whole, so that adding it rounds, half to even, as
# torch.round does.
WHOLE = tl.constexpr(12582912.0)


@triton.jit
def _stored(x, dtype: tl.constexpr):
    """x as ``dtype``; FP8 as coded.to_fp8 has it."""
    if dtype.is_fp8():
        x = tl.minimum(tl.maximum(x.to(tl.float32), -MOST_FP8), MOST_FP8)
    return x.to(dtype)


@triton.jit
def _rounded(x):
    return (x + WHOLE) - WHOLE


@triton.jit
def _step_of(code):
    """fp32 step of the byte ``code``, an integer (coded.step_of)."""
    return (code << STEP_SHIFT).to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32) * STEP_UNIT


@triton.jit
def _step_and_zero(low, high, share, BITS: tl.constexpr):
    """Of halves that range from ``low`` <= 0 to ``high`` >= 0 [n] fp32, ``share`` of which has
    codes: the bytes of step and zero point, int32, and both as fp32 (coded.quantise)."""
    MOST: tl.constexpr = 2.0**BITS - 1
    UNIT: tl.constexpr = 2.0 ** (8 - BITS)
    wanted = tl.div_rn((high - low) * share, tl.zeros_like(low) + MOST) / STEP_UNIT
    bits = wanted.to(tl.float16).to(tl.int16, bitcast=True).to(tl.int32)
    step_code = tl.minimum(tl.maximum((bits + STEP_ROUND) >> STEP_SHIFT, 1), 255)
    step = _step_of(step_code)
    zero = _rounded((MOST / 2 - tl.div_rn((low + high) / 2, step)) * UNIT)
    zero = tl.minimum(tl.maximum(zero, 0.0), 255.0)
    return step_code, zero.to(tl.int32), step, zero / UNIT


@triton.jit
def _codes(x, step, zero, BITS: tl.constexpr):
    """fp32 codes of x [..., C] fp32 with ``step`` and ``zero`` [..., 1]."""
    return tl.minimum(
        tl.maximum(_rounded(tl.div_rn(x, tl.broadcast_to(step, x.shape)) + zero), 0.0),
        2.0**BITS - 1,
    )


@triton.jit
def _steps_and_zeros(steps, mask, BITS: tl.constexpr, MASKED: tl.constexpr):
    """Of the four bytes at ``steps`` [n]: steps and zero points fp32 of both halves. One load of
    4 bytes, which can be asynchronous."""
    if MASKED:
        word = tl.load(steps, mask=mask, other=0)
    else:
        word = tl.load(steps)
    UNIT: tl.constexpr = 2.0 ** (BITS - 8)
    zero = ((word >> 8) & 0xFF).to(tl.float32) * UNIT
    second_zero = ((word >> 24) & 0xFF).to(tl.float32) * UNIT
    return _step_of(word & 0xFF), zero, _step_of((word >> 16) & 0xFF), second_zero


# Of both words in a register at once; Triton would take them apart, and put the codes together
# again, one by one. A bitwise (a & b) | c is 0xEA.
_ASM = "{ .reg .b32 t; SHIFT t, $1, BY; lop3.b32 $0, t, MASK, POWER, 0xEA; }"


def _asm(by: int, mask: int, power: int) -> tl.constexpr:
    """Shift words right by ``by``, negative to the left, and put what ``mask`` leaves below a power
    of two."""
    words = {"SHIFT": "shr.b32" if by >= 0 else "shl.b32", "BY": str(abs(by))}
    words |= {"MASK": hex(mask * 0x10001), "POWER": hex(power * 0x10001)}
    asm = _ASM
    for word, value in words.items():
        asm = asm.replace(word, value)
    return tl.constexpr(asm)


BF16_0, BF16_4, BF16_8, BF16_12 = (_asm(4 * i, 0xF, 0x4300) for i in range(4))
FP16_0, FP16_4, FP16_8, FP16_12 = (_asm(4 * i - 6, 0x3C0, 0x4C00) for i in range(4))


@triton.jit
def _unpacked(
    packed, PART: tl.constexpr, BITS: tl.constexpr, dtype: tl.constexpr, ASM: tl.constexpr
):
    """The codes of a part of the channels from words of coded.pack, plus ``_offset``. ASM: in PTX,
    where BITS is 4.

    Half precision needs no conversion: bits of a mantissa are a number above the power of two that
    the exponent says. In bf16 they are the last ones, and the power 128: it costs one shift less,
    and accuracy that bf16 does not have. In fp16 they are the first ones: sums of 1024 and a code a
    token would lose three digits of fp32's seven."""
    if ASM and BITS == 4 and dtype == tl.bfloat16:
        return tl.inline_asm_elementwise(
            BF16_0 if PART == 0 else BF16_4 if PART == 1 else BF16_8 if PART == 2 else BF16_12,
            "=r,r", [packed], dtype=tl.bfloat16, is_pure=True, pack=2,
        )  # fmt: skip
    if ASM and BITS == 4 and dtype == tl.float16:
        return tl.inline_asm_elementwise(
            FP16_0 if PART == 0 else FP16_4 if PART == 1 else FP16_8 if PART == 2 else FP16_12,
            "=r,r", [packed], dtype=tl.float16, is_pure=True, pack=2,
        )  # fmt: skip
    codes = (packed.to(tl.int16) >> (PART * BITS)) & (2**BITS - 1)
    if dtype == tl.bfloat16:
        return (codes | 0x4300).to(tl.bfloat16, bitcast=True)
    elif dtype == tl.float16:
        return ((codes << (10 - BITS)) | ((15 + BITS) * 1024)).to(tl.float16, bitcast=True)
    else:
        return codes.to(dtype)


@triton.jit
def _words(pool, stride, BITS: tl.constexpr):
    """``pool`` of packed codes and the ``stride`` of its rows, in bytes, as words of coded.pack."""
    if BITS == 4:
        return pool.to(tl.pointer_type(tl.int16)), stride // 2
    else:
        return pool, stride


@triton.jit
def _offset(BITS: tl.constexpr, dtype: tl.constexpr):
    if dtype == tl.bfloat16:
        return 128.0
    elif dtype == tl.float16:
        return 2.0**BITS
    else:
        return 0.0


@triton.jit
def _signs(row, column, BLOCK: tl.constexpr):
    """coded.hadamard [row, column] times BLOCK^0.5, BLOCK the size of its blocks: 1 or -1, exact in
    every dtype, or 0."""
    common = (row & column) & (BLOCK - 1)
    common ^= common >> 4
    common ^= common >> 2
    common ^= common >> 1
    return tl.where(row // BLOCK == column // BLOCK, 1.0 - 2.0 * (common & 1).to(tl.float32), 0.0)


def hadamard_block(head_dim: int) -> int:
    """Size of the blocks of coded.hadamard; _signs knows up to 256."""
    block = head_dim & -head_dim
    if not 8 <= block <= 256:
        raise ValueError(
            f"a turn by Hadamard blocks needs a multiple of 8 channels, 256 at most, got {head_dim}"
        )
    return block
