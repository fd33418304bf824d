"""The 256 codepoints of float8_e4m3fn: their values, and exact encoding and decoding.

Encoding works on the bits of the float32, never through a cast: what torch's cast to FP8 does
beyond 448 changed between releases. The table of values is read off the dtype itself.

Source: OCP 8-bit Floating Point Specification 1.0, section 5 (E4M3).
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from hswq.errors import InputError

E4M3_MAX = 448.0

_MAX_BITS = 0x43E00000  # float32 448.0
_INFINITY_BITS = 0x7F800000
_SMALLEST_NORMAL_BITS = 0x3C800000  # float32 2**-6
# float32 keeps 23 bits of mantissa, E4M3 keeps 3; their exponent biases are 127 and 7.
_DROPPED_BITS = 20
_BIAS_DIFFERENCE = (127 - 7) << 3
# Below 2**-6 a float32 of exponent field e is significand * 2**(e - 150), and the codepoint counts
# steps of 2**-9: significand >> (141 - e).
_SUBNORMAL_SHIFT = 141


@functools.cache
def e4m3_values() -> Tensor:
    """Value of every codepoint.

    Returns:
        float32 [256] on the CPU, indexed by the codepoint; 0x7F and 0xFF are NaN. The tensor is
        shared by all callers: do not change it in place.
    """
    codes = torch.arange(256, dtype=torch.uint8, device="cpu")
    return codes.view(torch.float8_e4m3fn).to(torch.float32)


@functools.cache
def e4m3_magnitudes() -> Tensor:
    """The finite magnitudes in rising order: value of the codepoints 0x00 to 0x7E.

    Returns:
        float64 [127] on the CPU, 0 to 448. Shared by all callers: do not change it in place.
    """
    return e4m3_values()[:127].double()


def encode(x: Tensor) -> Tensor:
    """Round each float32 to its nearest E4M3 codepoint, ties to the even one.

    Magnitudes above 448, infinity included, saturate to 448. NaN becomes 0x7F plus its sign.

    Args:
        x: float32, any shape, strides and device.
    Returns:
        uint8 codepoints, shape and device of x.
    Raises:
        InputError: x has another dtype.
    """
    if x.dtype != torch.float32:
        raise InputError(f"encode takes float32, not {x.dtype}: convert the tensor with .float().")
    bits = x.view(torch.int32)
    sign = (bits >> 24) & 0x80
    magnitude = bits & 0x7FFFFFFF
    is_nan = magnitude > _INFINITY_BITS
    magnitude = magnitude.clamp(max=_MAX_BITS)

    half = (1 << (_DROPPED_BITS - 1)) - 1 + ((magnitude >> _DROPPED_BITS) & 1)
    normal = ((magnitude + half) >> _DROPPED_BITS) - _BIAS_DIFFERENCE

    significand = (magnitude & 0x7FFFFF) | 0x800000
    # From 26 on everything rounds to 0, float32's own subnormals included; for normal values the
    # shift below is meaningless and only has to stay defined.
    shift = (_SUBNORMAL_SHIFT - (magnitude >> 23)).clamp(1, 26)
    half = (1 << (shift - 1)) - 1 + ((significand >> shift) & 1)
    subnormal = (significand + half) >> shift

    code = torch.where(magnitude < _SMALLEST_NORMAL_BITS, subnormal, normal)
    return (torch.where(is_nan, 0x7F, code) | sign).to(torch.uint8)


def decode(codes: Tensor) -> Tensor:
    """Value of each codepoint, by table.

    Args:
        codes: uint8, any shape, strides and device.
    Returns:
        float32, shape and device of codes; 0x7F and 0xFF give NaN.
    Raises:
        InputError: codes has another dtype.
    """
    if codes.dtype != torch.uint8:
        raise InputError(f"decode takes uint8 codepoints, not {codes.dtype}: use .view(uint8).")
    table = e4m3_values().to(codes.device)
    return table.index_select(0, codes.reshape(-1).int()).reshape(codes.shape)
