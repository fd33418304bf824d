"""E4M3 codepoints from and to float32, on the bits.

No numeric cast to or from fp8: Triton's interpreter rounds it unlike a GPU, and GPUs before
compute capability 8.9 have none. A codepoint is sign (1 bit), exponent (4, bias 7), mantissa (3);
0x7F and 0xFF are NaN and there is no Inf.

Source: OCP 8-bit Floating Point Specification 1.0, section 5 (E4M3).
"""

from __future__ import annotations

import triton
import triton.language as tl

_MAX = tl.constexpr(448.0)
_NAN_CODE = tl.constexpr(0x7F)
_SMALLEST_NORMAL = tl.constexpr(2.0**-6)
# float32 has 20 mantissa bits more than E4M3; its exponent bias of 127 exceeds 7 by 120.
_DROPPED_BITS = tl.constexpr(20)
_BELOW_HALF = tl.constexpr((1 << 19) - 1)
_BIAS = tl.constexpr(120 << 23)
# One unit in the last place of float32 at 2**14 is 2**-9, the step of E4M3 subnormals: in
# 2**14 + x the low mantissa bits are the subnormal code of x, rounded to nearest even.
_SUBNORMAL = tl.constexpr(2.0**14)
_SUBNORMAL_BITS = tl.constexpr((127 + 14) << 23)


@triton.jit
def sign_code(x):
    """0x80 where the sign bit of x is set (-0 and NaN too), else 0.

    Read from the stored type, because widening a float16 NaN may drop its sign.

    Args:
        x: float16, bfloat16 or float32.
    Returns:
        uint8, shape of x.
    """
    if x.dtype == tl.float32:
        high = x.to(tl.uint32, bitcast=True) >> 24
    else:
        high = x.to(tl.uint16, bitcast=True) >> 8
    return (high & 0x80).to(tl.uint8)


@triton.jit
def encode_magnitude(x):
    """Nearest E4M3 codepoint, ties to even, saturating at 448; NaN becomes 0x7F.

    Args:
        x: float32, >= 0 or NaN, Inf included.
    Returns:
        uint8 in 0 .. 0x7F, shape of x.
    """
    clipped = tl.minimum(x, _MAX)
    bits = clipped.to(tl.int32, bitcast=True)
    normal = (bits - _BIAS + _BELOW_HALF + ((bits >> _DROPPED_BITS) & 1)) >> _DROPPED_BITS
    subnormal = (clipped + _SUBNORMAL).to(tl.int32, bitcast=True) - _SUBNORMAL_BITS
    code = tl.where(clipped < _SMALLEST_NORMAL, subnormal, normal)
    return tl.where(x == x, code, _NAN_CODE).to(tl.uint8)


@triton.jit
def decode(codes):
    """Value of each codepoint, exactly; 0x7F and 0xFF become NaN.

    Args:
        codes: uint8.
    Returns:
        float32, shape of codes.
    """
    magnitude = (codes & 0x7F).to(tl.int32)
    normal = ((magnitude << _DROPPED_BITS) + _BIAS).to(tl.float32, bitcast=True)
    subnormal = (magnitude + _SUBNORMAL_BITS).to(tl.float32, bitcast=True) - _SUBNORMAL
    value = tl.where(magnitude < 8, subnormal, normal)
    value = tl.where(magnitude == _NAN_CODE, float("nan"), value)
    # The sign joins as a bit: Triton negates by subtracting from 0, which turns -0 into 0.
    sign = (codes & 0x80).to(tl.uint32) << 24
    return (value.to(tl.uint32, bitcast=True) | sign).to(tl.float32, bitcast=True)
