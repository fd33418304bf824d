"""The integers behind the exact sums."""

from __future__ import annotations

import math
from dataclasses import replace
from fractions import Fraction

import pytest
import torch

from hswq.errors import InputError
from hswq.kernels import fixed_point
from tests import oracle
from tests.kernels import cases


def wide_values() -> torch.Tensor:
    """Return float64 values of every size that a mean can have, signs and special ones included."""
    sizes = torch.rand(2000, dtype=torch.float64, generator=cases.generator()) * 120 - 80
    values = torch.exp2(sizes) * torch.where(torch.arange(2000) % 2 == 0, 1.0, -1.0)
    limit = fixed_point.MEAN_LIMIT
    special = [0.0, limit, -limit, 2.0**-56, -(2.0**-57), 1.5 * 2.0**-56, 255 / 256, 1 - 2.0**-53]
    # One whose low part rounds up to a whole step of the high part.
    special.append(2.0**-8 - 2.0**-61)
    return torch.cat((values, torch.tensor(special, dtype=torch.float64)))


def test_pairs_are_rounded_once_and_keep_their_form() -> None:
    """Backends agree on a mean's bits only if its pair is the nearest one and unique."""
    values = wide_values()
    for value, (high, low) in zip(
        values.tolist(), fixed_point.to_pair(values).tolist(), strict=True
    ):
        assert 0 <= low < 2**48
        assert abs(high) <= 2**48
        expected = Fraction(oracle.round_to_step(Fraction(value), 56), 2**56)
        assert fixed_point.pair_to_fraction(high, low) == expected


def test_negated_values_have_negated_pairs() -> None:
    """Rounding towards one side would make mean(y) drift over thousands of calls."""
    for value in wide_values():
        pairs = fixed_point.to_pair(torch.stack((value, -value)))
        positive, negative = (fixed_point.pair_to_fraction(*pair) for pair in pairs.tolist())
        assert positive == -negative


def test_abs_means_are_rounded_once() -> None:
    """The step of importance is 2**-32, up to its largest contribution."""
    values = wide_values().abs().clamp(max=fixed_point.ABS_MEAN_LIMIT)
    bits = fixed_point.ABS_MEAN_BITS
    steps = fixed_point.to_fixed(values, bits).tolist()
    assert steps == [oracle.round_to_step(Fraction(value), bits) for value in values.tolist()]
    assert fixed_point.fixed_to_fraction(steps[0], bits) == Fraction(steps[0], 2**32)


@pytest.mark.parametrize("field", ["calls", "skipped", "mean_y", "mean_y2", "abs_mean"])
def test_accumulators_of_another_form_are_refused(field: str) -> None:
    """Kernels write through their addresses: beyond the end of a shorter one, for example."""
    sums = fixed_point.MonitorAccumulators.zeros(3)
    value = getattr(sums, field)
    for bad, message in (
        (value.int(), f"{field} is int32; it must be int64"),
        (value.new_zeros(7, 1), rf"{field} has shape \[7, 1\]; it needs \[\d\]"),
        (value.to("meta"), f"on one device; found .*{field} on meta"),
    ):
        with pytest.raises(InputError, match=message):
            replace(sums, **{field: bad})
    # One element is always contiguous.
    if len(value) > 1:
        with pytest.raises(InputError, match=f"{field} is not contiguous"):
            replace(sums, **{field: value.new_zeros(len(value), 2)[:, 0]})


def test_accumulators_hold_their_calls() -> None:
    """int64 must not overflow when every call brings the largest contribution."""
    calls = fixed_point.CALLS_PER_ACCUMULATOR
    assert calls * int(fixed_point.ABS_MEAN_LIMIT) * 2**fixed_point.ABS_MEAN_BITS < 2**63
    assert calls * int(fixed_point.MEAN_LIMIT) * 2**fixed_point.MEAN_HIGH_BITS < 2**63
    assert calls * 2**fixed_point.MEAN_LOW_BITS < 2**63


@pytest.mark.parametrize("numel", [1, 2, 3, 4, 1000, 13_107_200, 2**35])
def test_importances_are_rounded_once_and_cannot_overflow(numel: int) -> None:
    """A step that depends on a library's pow, or a sum beyond int64, would change files."""
    uniform = torch.rand(50, generator=cases.generator(numel))
    for importance in (
        uniform,
        torch.exp2(uniform * 50 - 30),
        torch.tensor([1.0, 0.5, 0.0]),
        torch.tensor([math.nextafter(1.0, 2.0), 2.0**-149]),
        torch.tensor([cases.FLOAT32_MAX, 1.0]),
        torch.tensor([2.0**-149]),
    ):
        fixed = fixed_point.importance_to_fixed(importance, numel).tolist()
        assert fixed == oracle.importance_integers(importance[None].numpy(), numel)[0]
        assert numel * max(fixed) < 2**62
