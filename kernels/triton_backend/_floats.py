"""Conversions between float32 and the 16-bit types, exact on every device.

Triton's interpreter truncates float32 to bfloat16 and breaks bfloat16 subnormals, and hardware
conversions drop the sign of a NaN. These work on the bits where that matters, so that what the
interpreter tests is what a GPU runs.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def widen(x):
    """float16, bfloat16 or float32 -> float32, the same value."""
    if x.dtype == tl.bfloat16:
        bits = x.to(tl.uint16, bitcast=True).to(tl.uint32) << 16
        return bits.to(tl.float32, bitcast=True)
    else:
        return x.to(tl.float32)


@triton.jit
def narrow(x, dtype: tl.constexpr):
    """float32 -> float16, bfloat16 or float32, nearest, ties to even; overflow gives Inf."""
    if dtype == tl.bfloat16:
        bits = x.to(tl.uint32, bitcast=True)
        rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
        # Rounding could carry the payload of a NaN out of the exponent.
        rounded = tl.where(x == x, rounded, 0x7FC0)
        return rounded.to(tl.uint16).to(tl.bfloat16, bitcast=True)
    else:
        return x.to(dtype)
