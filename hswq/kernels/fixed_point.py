"""Fixed-point numbers: sums of integers are exact, so order, threads and merging change no bit.

Two uses. The Dual Monitor adds one contribution per call of a layer:

| sum | step | largest contribution | held as |
|---|---|---|---|
| abs_mean | 2**-32 | 2**20 | one int64 per channel |
| mean_y, mean_y2 | 2**-56 | 2**40 in magnitude | two int64: high * 2**-8 + low * 2**-56 |

A high part is at most 2**48 in magnitude, and a low part lies in [0, 2**48). A set of accumulators
holds CALLS_PER_ACCUMULATOR calls whatever they bring; who watches longer starts another set and
adds the sets as Python integers.

The weighted histogram adds importances as integers whose step depends on the largest of them and on
the number of weights, so that no sum reaches 2**62.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from fractions import Fraction

import torch
from torch import Tensor

from hswq.kernels import contract

ABS_MEAN_BITS = 32
ABS_MEAN_LIMIT = 2.0**20
MEAN_HIGH_BITS = 8
MEAN_LOW_BITS = 48
MEAN_LIMIT = 2.0**40
CALLS_PER_ACCUMULATOR = 2**11 - 1


@dataclass(frozen=True, eq=False)
class MonitorAccumulators:
    """Sums of one layer over its calls, all int64 on the device of the layer's output.

    Backends write through their addresses, so their form is checked here, once.

    Attributes:
        calls: [1] calls counted.
        skipped: [1] calls with a non-finite or out-of-range value; they add nothing else.
        mean_y: [2] sum of mean(y), high and low part.
        mean_y2: [2] sum of mean(y^2), high and low part.
        abs_mean: [C] sum of mean |x| per input channel.
    Raises:
        InputError: another dtype or shape, a tensor that is not contiguous, or several devices.
    """

    calls: Tensor
    skipped: Tensor
    mean_y: Tensor
    mean_y2: Tensor
    abs_mean: Tensor

    def __post_init__(self) -> None:
        op, sums = type(self).__name__, vars(self)
        contract.check_devices(op, **sums)
        lengths = 1, 1, 2, 2, self.abs_mean.numel()
        for (name, value), length in zip(sums.items(), lengths, strict=True):
            contract.check_dtype(op, name, value, (torch.int64,))
            contract.check_shape(op, name, value, [length], "it")
            contract.check_contiguous(op, name, value)

    @classmethod
    def zeros(cls, channels: int, device: torch.device | str = "cpu") -> MonitorAccumulators:
        """Return empty sums for a layer of so many input channels."""
        return cls(
            *(torch.zeros(n, dtype=torch.int64, device=device) for n in (1, 1, 2, 2, channels))
        )


def to_fixed(value: Tensor, bits: int) -> Tensor:
    """Round float64 values to int64 multiples of 2**-bits, ties to even.

    Args:
        value: float64, |value| * 2**bits < 2**53 so that scaling is exact.
        bits: position of the step.
    """
    return torch.round(value * 2.0**bits).to(torch.int64)


def to_pair(value: Tensor) -> Tensor:
    """Round float64 values to the nearest multiple of 2**-56, as high and low part.

    value = high * 2**-8 + low * 2**-56 with 0 <= low < 2**48. The magnitude is split, where the
    remainder is exact in float64, and the sign put back, so that rounding is symmetric.

    Args:
        value: float64 [...], |value| <= 2**40.
    Returns:
        int64 [..., 2].
    """
    scaled = value.abs() * 2.0**MEAN_HIGH_BITS
    high = scaled.floor()
    low = torch.round((scaled - high) * 2.0**MEAN_LOW_BITS)
    sign = torch.where(value < 0, -1, 1)
    high, low = high.to(torch.int64) * sign, low.to(torch.int64) * sign
    carry = low >> MEAN_LOW_BITS
    return torch.stack((high + carry, low - (carry << MEAN_LOW_BITS)), dim=-1)


def fixed_to_fraction(value: int, bits: int) -> Fraction:
    """Return value * 2**-bits exactly."""
    return Fraction(value, 1 << bits)


def pair_to_fraction(high: int, low: int) -> Fraction:
    """Return high * 2**-8 + low * 2**-56 exactly; a sum of pairs is read like one pair."""
    return Fraction((high << MEAN_LOW_BITS) + low, 1 << (MEAN_HIGH_BITS + MEAN_LOW_BITS))


def importance_to_fixed(importance: Tensor, numel: int) -> Tensor:
    """Round importances to integers whose weighted sums stay below 2**62.

    With bits = 62 - bit_length(numel) and E the smallest integer with max(importance) < 2**E,
    the step is 2**(E - bits) and the result rint(importance / step) <= 2**bits.

    Args:
        importance: float32, finite, >= 0, not all zero.
        numel: number of weights in the tensor, each of which adds one importance.
    Returns:
        int64, shape and device of importance.
    """
    _, exponent = math.frexp(float(importance.max()))
    bits = 62 - numel.bit_length()
    return torch.round(importance.double() * math.ldexp(1.0, bits - exponent)).to(torch.int64)
