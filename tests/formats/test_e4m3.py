"""Encoding and decoding of E4M3 codepoints."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hswq.errors import InputError
from hswq.formats.e4m3 import E4M3_MAX, decode, e4m3_magnitudes, e4m3_values, encode


def oracle(value: float) -> int:
    """Nearest codepoint by exhaustive comparison in float64, ties to the even code."""
    sign = 0x80 if math.copysign(1.0, value) < 0 else 0
    if math.isnan(value):
        return 0x7F | sign
    magnitude = min(abs(value), E4M3_MAX)
    distances = [abs(known - magnitude) for known in e4m3_magnitudes().tolist()]
    nearest = [code for code, distance in enumerate(distances) if distance == min(distances)]
    return sign | next(code for code in nearest if len(nearest) == 1 or code % 2 == 0)


def test_values_follow_the_ocp_specification():
    """The table is E4M3 itself: sign, 4 bits of exponent with bias 7, 3 of mantissa, one NaN."""
    for code, value in enumerate(e4m3_values().tolist()):
        exponent, mantissa = (code >> 3) & 15, code & 7
        if code & 0x7F == 0x7F:
            assert math.isnan(value)
            continue
        magnitude = (
            math.ldexp(mantissa, -9) if not exponent else math.ldexp(8 + mantissa, exponent - 10)
        )
        assert value == (-magnitude if code & 0x80 else magnitude)
        assert math.copysign(1.0, value) == (-1.0 if code & 0x80 else 1.0)


def test_magnitudes_are_the_127_finite_ones_in_rising_order():
    """A missing or doubled magnitude would move every search result."""
    magnitudes = e4m3_magnitudes()
    assert magnitudes.dtype == torch.float64
    assert magnitudes.shape == (127,)
    assert magnitudes[0] == 0
    assert magnitudes[-1] == E4M3_MAX
    assert (magnitudes.diff() > 0).all()


def test_decode_gives_every_codepoint_its_value_on_any_shape():
    """A wrong or shuffled table entry, a lost -0 or shape would show."""
    codes = torch.arange(256, dtype=torch.uint8)
    expected = codes.view(torch.float8_e4m3fn).float()
    assert torch.equal(decode(codes).view(torch.int32), expected.view(torch.int32))
    strided = codes.reshape(16, 16).t()
    assert torch.equal(
        decode(strided).nan_to_num(7.0), expected.reshape(16, 16).t().nan_to_num(7.0)
    )
    assert decode(codes[:0].reshape(0, 3)).shape == (0, 3)
    assert decode(codes[0x38]).item() == 1.0


def test_every_codepoint_survives_a_round_trip():
    """Values that E4M3 holds exactly are not moved; both NaNs keep their sign."""
    codes = torch.arange(256, dtype=torch.uint8)
    assert torch.equal(encode(decode(codes)), codes)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_encode_equals_the_exhaustive_oracle_on_all_16_bit_patterns(dtype):
    """Any of the 65,536 patterns rounded the wrong way, at a tie or in a subnormal, would show."""
    patterns = torch.arange(65536, dtype=torch.int32).to(torch.int16).view(dtype).float()
    magnitudes = e4m3_magnitudes()
    clipped = patterns.double().abs().clamp(max=E4M3_MAX)
    # Midpoints of neighbours are exact in float64: above one rounds up, on one goes to even.
    midpoints = (magnitudes[1:] + magnitudes[:-1]) / 2
    below = torch.searchsorted(midpoints, clipped)
    on_midpoint = (below < 126) & (midpoints[below.clamp(max=125)] == clipped)
    code = below + (on_midpoint & (below % 2 == 1))
    sign = torch.signbit(patterns) * 0x80
    code = torch.where(patterns.isnan(), 0x7F, code) | sign
    assert torch.equal(encode(patterns), code.to(torch.uint8))


def test_encode_saturates_beyond_448():
    """Overflow must neither become NaN nor wrap, whatever torch's own cast does."""
    values = torch.tensor([448.0, 463.9, 464.0, 465.0, 1e4, 3.4e38, math.inf])
    assert encode(values).tolist() == [0x7E] * 7
    assert encode(-values).tolist() == [0xFE] * 7


def test_encode_at_the_edge_of_the_subnormals():
    """2**-10 is the tie between 0 and the smallest code; float32's own subnormals are 0."""
    step = 2.0**-9
    values = [
        0.0,
        -0.0,
        step / 2,
        math.nextafter(step / 2, 1),
        1.5 * step,
        7.5 * step,
        1e-45,
        -1e-45,
    ]
    codes = encode(torch.tensor(values, dtype=torch.float64).float())
    # nextafter of float64 is lost in float32, so that one is again the tie.
    assert codes.tolist() == [0x00, 0x80, 0x00, 0x00, 0x02, 0x08, 0x00, 0x80]
    above = torch.tensor(step / 2).nextafter(torch.tensor(1.0))
    assert encode(above).item() == 0x01


@given(st.lists(st.floats(width=32), min_size=1, max_size=50))
@settings(max_examples=60, deadline=None)
def test_encode_equals_the_oracle_on_any_float32(values):
    """float32 has 2**32 patterns: rounding must see all 23 bits of the mantissa."""
    codes = encode(torch.tensor(values, dtype=torch.float32))
    # A NaN's sign is not kept by the way through a list.
    for value, code in zip(values, codes.tolist(), strict=True):
        assert (code | 0x80) == 0xFF if math.isnan(value) else code == oracle(value)


def test_encode_keeps_the_sign_of_nan():
    """METHOD: NaN becomes 0x7F plus its sign."""
    bits = torch.tensor([0x7FC00000, 0x7F800001, -0x400000, -1], dtype=torch.int32)
    assert encode(bits.view(torch.float32)).tolist() == [0x7F, 0x7F, 0xFF, 0xFF]


@pytest.mark.parametrize("shape", [(), (0,), (1,), (31, 127), (2, 3, 5, 7)])
def test_encode_keeps_the_shape_also_of_strided_tensors(shape):
    """A flattened or transposed result would scramble a weight."""
    values = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    assert encode(values).shape == shape
    assert encode(values).dtype == torch.uint8
    if values.dim() == 2:
        assert torch.equal(encode(values.t()), encode(values).t())
        assert torch.equal(encode(values[::2, 1::3]), encode(values)[::2, 1::3])


def test_wrong_dtypes_are_refused():
    """Silently reading float16 bits as float32, or int64 as codes, would give garbage."""
    with pytest.raises(InputError, match="float32"):
        encode(torch.zeros(3, dtype=torch.float16))
    with pytest.raises(InputError, match="uint8"):
        decode(torch.zeros(3, dtype=torch.int64))
