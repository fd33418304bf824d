"""The objective of given thresholds."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from hswq import kernels
from hswq.errors import InputError
from tests import oracle
from tests.conftest import Backend
from tests.kernels import cases

OP = "clip_mse"
FRACTIONS = (0.0, 1e-3, 0.1, 0.5, 0.77, 0.999, 1.0, 1.1, 1.2, 5.0)


def histogram(bins: int, seed: int = 0) -> Tensor:
    """Return a bell-shaped histogram with gaps."""
    b = torch.arange(bins, dtype=torch.float64)
    hist = torch.exp(-8 * (b / bins) ** 2)
    hist *= torch.rand(bins, dtype=torch.float64, generator=cases.generator(seed)) > 0.2
    return hist / hist.sum()


@pytest.mark.parametrize("max_abs", [0.08, 1.0, 447.9, 1000.0, 1e-3, 2.0**-140, 3e38])
@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize("bins", [1, 100, 1024])
def test_objective_is_within_its_bound(
    bins: int, scaled: bool, max_abs: float, backend: Backend
) -> None:
    """Prefix sums are allowed, an approximation of the rounding is not."""
    hist = histogram(bins)
    largest = torch.tensor(max_abs, dtype=torch.float32)
    thresholds = torch.tensor([min(max_abs * f, 3.4e38) for f in FRACTIONS], dtype=torch.float32)
    errors = kernels.clip_mse(
        hist.to(backend.device),
        largest.to(backend.device),
        thresholds.to(backend.device),
        scaled,
        backend=backend.name,
    )
    weights = hist.tolist()
    centres = oracle.centres(float(largest), bins)
    power = math.fsum(h * x * x for h, x in zip(weights, centres, strict=True))
    # The contract's bound, and once more for the oracle's own sum.
    bound = 11 * (bins + 160) * oracle.UNIT64 * power
    assert errors.dtype == torch.float64
    for error, amax in zip(errors.tolist(), thresholds.tolist(), strict=True):
        terms = oracle.error_terms(weights, float(largest), amax, scaled)
        assert abs(error - math.fsum(terms)) <= bound


def test_unscaled_threshold_above_448_clips_at_448(backend: Backend) -> None:
    """Nothing above 448 can be stored without a scale."""
    hist = torch.tensor([0.0, 1.0], dtype=torch.float64, device=backend.device)
    max_abs = torch.tensor(1000.0, device=backend.device)
    thresholds = torch.tensor([448.0, 449.0, 900.0], device=backend.device)
    errors = kernels.clip_mse(hist, max_abs, thresholds, False, backend=backend.name)
    assert errors.tolist() == [(750.0 - 448.0) ** 2] * 3


def test_ties_go_to_the_smaller_magnitude(backend: Backend) -> None:
    """Hardware rounds ties to even; the objective, like the seed's, rounds them down."""
    # All weights are 1.5. Clipped at 1.1875, the midpoint of 1.125 and the even code 1.25, they
    # must become 1.125.
    hist = torch.ones(1, dtype=torch.float64, device=backend.device)
    max_abs = torch.tensor(3.0, device=backend.device)
    thresholds = torch.tensor([1.125, 1.1875, 1.1876, 1.25], device=backend.device)
    errors = kernels.clip_mse(hist, max_abs, thresholds, False, backend=backend.name)
    assert errors.tolist() == [0.375**2, 0.375**2, 0.25**2, 0.25**2]


def test_all_zero_weights_have_no_error(backend: Backend) -> None:
    """amax / 0 and 0 * infinity must not make NaN of a dead layer."""
    hist = torch.tensor([1.0, 0.0], dtype=torch.float64, device=backend.device)
    zero = torch.zeros((), device=backend.device)
    thresholds = torch.tensor([0.0, 1.0], device=backend.device)
    for scaled in (False, True):
        errors = kernels.clip_mse(hist, zero, thresholds, scaled, backend=backend.name)
        assert errors.tolist() == [0.0, 0.0]


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("scaled", [False, True])
def test_damaged_histograms_have_no_objective(scaled: bool, value: float, backend: Backend) -> None:
    """An error of 0 would make the best threshold of a damaged layer."""
    hist = histogram(16).to(backend.device)
    hist[5] = value
    thresholds = torch.tensor([0.0, 0.3, 1.0, 2.0], device=backend.device)
    one = torch.ones((), device=backend.device)
    errors = kernels.clip_mse(hist, one, thresholds, scaled, backend=backend.name)
    assert not errors.isfinite().any()
    errors = kernels.clip_mse(
        torch.full_like(hist, math.nan), one * math.nan, thresholds, scaled, backend=backend.name
    )
    assert errors.isnan().all()


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf, -0.5])
def test_thresholds_that_are_none_are_refused(bad: float, backend: Backend) -> None:
    """A threshold of NaN would have an objective of its own on each backend."""
    hist, one = histogram(4), torch.ones(())
    with pytest.raises(InputError, match=f"candidates is {bad}; it must be finite and >= 0"):
        kernels.clip_mse(hist, one, torch.tensor([0.5, bad]), True, backend=backend.name)
    if not math.isnan(bad):
        with pytest.raises(InputError, match=f"max_abs is {bad}; it must be finite and >= 0"):
            kernels.clip_mse(hist, one * bad, torch.ones(1), True, backend=backend.name)


def test_bad_arguments_are_refused(backend: Backend) -> None:
    """float32 histograms lose what the search needs; thresholds must be what a file can hold."""
    hist, one = torch.ones(4, dtype=torch.float64), torch.ones(())
    with pytest.raises(InputError, match="hist is float32; it must be float64"):
        kernels.clip_mse(hist.float(), one, torch.ones(2), True, backend=backend.name)
    with pytest.raises(InputError, match="candidates is float64"):
        kernels.clip_mse(hist, one, torch.ones(2).double(), True, backend=backend.name)
    with pytest.raises(InputError, match=r"hist has shape \[2, 2\]; it must have 1 axis"):
        kernels.clip_mse(hist.reshape(2, 2), one, torch.ones(2), True, backend=backend.name)
    hist = torch.ones((1 << 20) + 1, dtype=torch.float64)
    with pytest.raises(InputError, match="bins is 1048577; it must be at most 1048576"):
        kernels.clip_mse(hist, one, torch.ones(2), True, backend=backend.name)
