"""What the kernels of FP8 layers share: operands of a matrix product, and its epilogue.

A product's operands are of one type, chosen by the compile-time value TYPE (OPERANDS): 16-bit
activations and weights decoded to them; codepoints that are decoded, or that go to the matrix units
as they are; or float32. All of them hold the values exactly; float16 made of a codepoint's bits is
2**-8 of its value, which the epilogue makes up for.
"""

from __future__ import annotations

import triton
import triton.language as tl

from hswq.kernels.triton_backend._e4m3 import decode
from hswq.kernels.triton_backend._floats import narrow, widen

# The types of operands. `halves` and `codes` are what compute 'fp8' uses: activations are
# codepoints too, decoded where there are no matrix units for FP8.
OPERANDS = {"fp32": 0, "fp16": 1, "bf16": 2, "halves": 3, "codes": 4}
_FP32, _FP16, _BF16, _HALVES, _CODES = (tl.constexpr(number) for number in OPERANDS.values())
ACTIVATIONS = {None: 0, "gelu": 1, "gelu_tanh": 2, "silu": 3}
_GELU, _GELU_TANH, _SILU = (tl.constexpr(number) for number in (1, 2, 3))
_ROOT_HALF = tl.constexpr(0.7071067811865476)
_ROOT_2_BY_PI = tl.constexpr(0.7978845608028654)


@triton.jit
def halves(codes):
    """float16 of 2**-8 times the value of each codepoint: its bits, moved; NaN stays NaN."""
    bits = codes.to(tl.uint16)
    magnitude = bits & 0x7F
    half = tl.where(magnitude == 0x7F, 0x7E00, magnitude << 7) | ((bits & 0x80) << 8)
    return half.to(tl.uint16).to(tl.float16, bitcast=True)


@triton.jit
def weight_operand(codes, TYPE: tl.constexpr):
    """Codepoints of a weight as an operand."""
    if TYPE == _CODES:
        return codes.to(tl.float8e4nv, bitcast=True)
    elif TYPE == _FP32:
        return decode(codes)
    elif TYPE == _BF16:
        # The three bits of mantissa are among the upper sixteen.
        bits = decode(codes).to(tl.uint32, bitcast=True) >> 16
        return bits.to(tl.uint16).to(tl.bfloat16, bitcast=True)
    else:
        return halves(codes)


@triton.jit
def input_operand(x, TYPE: tl.constexpr):
    """Activations as an operand, rounded to its type; codepoints for the last two types."""
    if TYPE == _CODES:
        return x.to(tl.float8e4nv, bitcast=True)
    elif TYPE == _HALVES:
        return halves(x)
    elif TYPE == _FP16:
        return x if x.dtype == tl.float16 else narrow(widen(x), tl.float16)
    elif TYPE == _BF16:
        return x if x.dtype == tl.bfloat16 else narrow(widen(x), tl.bfloat16)
    else:
        return widen(x)


@triton.jit
def multiply_add(a, b, total, TYPE: tl.constexpr, WIDE: tl.constexpr):
    """total + a b in float32; WIDE: the operands are made float32 first."""
    if TYPE == _FP32 or WIDE:
        return tl.dot(widen(a), widen(b), total, input_precision="ieee")
    elif TYPE == _CODES:
        # Hopper's matrix units keep 14 bits of an FP8 sum: it goes to float32 every 32 products.
        return tl.dot(a, b, total, max_num_imprecise_acc=32)
    else:
        return tl.dot(a, b, total)


@triton.jit
def unit(TYPE: tl.constexpr):
    """What a product of two operands has to be multiplied with."""
    if TYPE == _FP16:
        return 256.0
    elif TYPE == _HALVES:
        return 65536.0
    else:
        return 1.0


@triton.jit
def activate(value, ACTIVATION: tl.constexpr):
    """Apply one of ACTIVATIONS to float32 values."""
    if ACTIVATION == _GELU:
        return 0.5 * value * (1.0 + tl.math.erf(value * _ROOT_HALF))
    elif ACTIVATION == _GELU_TANH:
        inner = _ROOT_2_BY_PI * (value + 0.044715 * value * value * value)
        # (1 + tanh(z)) / 2 = 1 / (1 + exp(-2 z))
        return value / (1.0 + tl.exp(-2.0 * inner))
    elif ACTIVATION == _SILU:
        return value / (1.0 + tl.exp(-value))
    else:
        return value
