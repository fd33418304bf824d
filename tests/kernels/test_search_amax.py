"""The whole search: threshold and objective equal to the last bit."""

from __future__ import annotations

import math
from dataclasses import fields

import numpy as np
import pytest
import torch
from torch import Tensor

from hswq import kernels
from hswq.config import QuantizeConfig
from hswq.errors import InputError
from tests import oracle
from tests.conftest import Backend
from tests.kernels import cases

OP = "search_amax"


def histogram(kind: str, bins: int) -> Tensor:
    x = (torch.arange(bins, dtype=torch.float64) + 0.5) / bins
    hist = {
        "gaussian": torch.exp(-10 * x * x),
        "uniform": torch.ones_like(x),
        "heavy tail": 1 / (1 + (60 * x) ** 3),
        "last bin": (x > 1 - 1 / bins).double(),
        "two spikes": ((x * bins).floor() % (bins - 1) == 3 % max(1, bins - 1)).double(),
        "random": torch.rand(bins, dtype=torch.float64, generator=cases.generator(4)) ** 4,
    }[kind]
    return hist / hist.sum()


def check(
    hist: Tensor,
    max_abs: float,
    scaled: bool,
    backend: Backend,
    candidates: int = 50,
    refinements: int = 2,
) -> tuple[float, float]:
    largest = torch.tensor(max_abs, dtype=torch.float32)
    amax, mse = kernels.search_amax(
        hist.to(backend.device),
        largest.to(backend.device),
        scaled,
        candidates,
        refinements,
        backend=backend.name,
    )
    assert (amax.dtype, amax.shape) == (torch.float32, ())
    assert (mse.dtype, mse.shape) == (torch.float64, ())
    expected = oracle.search_amax(hist.tolist(), float(largest), scaled, candidates, refinements)
    assert (float(amax), float(mse)) == expected
    return expected


@pytest.mark.parametrize("max_abs", [0.0847, 1.0, 0.0013, 37.7, 1000.0, 2.0**-20])
@pytest.mark.parametrize(
    "kind", ["gaussian", "uniform", "heavy tail", "last bin", "two spikes", "random"]
)
@pytest.mark.parametrize("scaled", [False, True])
def test_search_equals_brute_force(
    scaled: bool, kind: str, max_abs: float, backend: Backend
) -> None:
    """A candidate too few, another tie rule or a looser sum finds another threshold or error."""
    check(histogram(kind, 64), max_abs, scaled, backend)


@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize(
    ("bins", "candidates", "refinements"),
    [(1, 2, 0), (2, 3, 5), (7, 2, 3), (61, 33, 3), (1000, 9, 1), (1025, 50, 2)],
)
def test_odd_settings_equal_brute_force(
    bins: int, candidates: int, refinements: int, scaled: bool, backend: Backend
) -> None:
    """Sums are padded to a power of two, and two candidates are a stage too."""
    check(histogram("gaussian", bins), 0.31, scaled, backend, candidates, refinements)


@pytest.mark.slow
def test_prefix_sums_that_rank_lose_no_small_term(backend: Backend) -> None:
    """Plain prefix sums err by half a unit a bin here and rank the best threshold out of reach.

    Almost all mass lies in one bin, which both 1.3125 and 1.75 store without error. Of the bins
    below it, those that 1.3125 rounds higher than 1.75 does hold 0.51 units of the last place: each
    such mass is rounded up to a whole unit when it is added, each such first moment is lost.
    """
    max_abs, bins = 1.75, (1 << 19) - 5
    largest_bin = (9 * bins // 7 - 1) // 2
    x = torch.tensor(oracle.centres(max_abs, bins), dtype=torch.float64)

    def rounded(amax: float) -> Tensor:
        below = torch.searchsorted(torch.tensor(oracle.MIDPOINTS).double(), x * 448 / amax)
        return torch.tensor(oracle.MAGNITUDES).double()[below] * amax / 448

    hist = (rounded(1.3125) > rounded(1.75)).double() * 0.51 * 2.0**-52
    hist[largest_bin:] = 0.0
    hist[largest_bin] = 1.0
    assert check(hist, max_abs, True, backend, 3, 0)[0] == 1.3125


@pytest.mark.slow
@pytest.mark.parametrize("scaled", [False, True])
def test_default_preset_equals_brute_force(scaled: bool, backend: Backend) -> None:
    """The sizes that real layers are searched with."""
    check(histogram("random", 4096), 0.0847, scaled, backend, 200, 3)


def test_real_histogram_equals_brute_force(backend: Backend) -> None:
    """Histograms of 16-bit weights are full of gaps, unlike smooth ones."""
    w = cases.normal(96, 64, sigma=0.02, dtype=torch.bfloat16).to(backend.device)
    hist, max_abs = kernels.weighted_histogram(w, None, 512, backend=backend.name)
    for scaled in (False, True):
        check(hist.cpu(), float(max_abs), scaled, backend, 40, 3)


def test_first_of_equal_candidates_wins(backend: Backend) -> None:
    """Without a scale, thresholds that clip to one codepoint are all alike: the lowest is kept."""
    # All weights lie in the first of 4 bins, below every threshold: every candidate is equal.
    hist = torch.tensor([1.0, 0.0, 0.0, 0.0], dtype=torch.float64)
    amax, _ = check(hist, 3.0, False, backend)
    assert amax == 1.5


def test_maximum_at_a_midpoint_is_rounded_down(backend: Backend) -> None:
    """Why V1 never applies its threshold: the largest weight would lose a code."""
    hist = histogram("last bin", 1024)
    for max_abs in (0.10546875, 1.1875, 2.0**-10):
        check(hist, max_abs, False, backend, 9, 1)


def test_better_thresholds_lie_beyond_the_maximum(backend: Backend) -> None:
    """Refinements may look up to 1.2 times the maximum, where the golden answers lie too."""
    amax, _ = check(histogram("heavy tail", 100), 0.0847, True, backend, 50, 3)
    assert amax > np.float32(0.0847)


def test_thresholds_end_at_1_2_times_the_maximum(backend: Backend) -> None:
    """This objective falls from 1.0 to 1.2 times the maximum and on: the end itself is the best."""
    hist = torch.zeros(9, dtype=torch.float64)
    hist[[5, 8]] = 0.5
    assert check(hist, 1.0, True, backend, 2, 3)[0] == np.float32(1.2)


@pytest.mark.parametrize("max_abs", [2.9e38, 3.3e38, cases.FLOAT32_MAX])
@pytest.mark.parametrize("scaled", [False, True])
def test_thresholds_end_at_the_largest_float32(
    scaled: bool, max_abs: float, backend: Backend
) -> None:
    """1.2 times such a maximum is no float32: an infinite threshold has no objective."""
    hist = torch.zeros(9, dtype=torch.float64)
    hist[[5, 8]] = 0.5
    for some in (hist, histogram("heavy tail", 64)):
        for candidates in (2, 9):
            assert math.isfinite(check(some, max_abs, scaled, backend, candidates, 4)[1])


def test_layers_in_one_call_are_searched_alone(backend: Backend) -> None:
    """A list of layers is one launch; none may see its neighbour's histogram or maximum."""
    kinds = ("gaussian", "heavy tail", "uniform", "random")
    hists = torch.stack([histogram(kind, 100) for kind in kinds])
    max_abs = torch.tensor([0.1, 3.0, 0.0, 700.0])
    for scaled in (False, True):
        amax, mse = kernels.search_amax(
            hists.to(backend.device),
            max_abs.to(backend.device),
            scaled,
            15,
            2,
            backend=backend.name,
        )
        expected = [
            oracle.search_amax(hist.tolist(), float(largest), scaled, 15, 2)
            for hist, largest in zip(hists, max_abs, strict=True)
        ]
        assert list(zip(amax.tolist(), mse.tolist(), strict=True)) == expected


def test_all_zero_layer_gets_zero(backend: Backend) -> None:
    """Its scale is then 1 and its codes are zeros."""
    assert check(histogram("gaussian", 16), 0.0, True, backend) == (0.0, 0.0)


@pytest.mark.parametrize("scaled", [False, True])
def test_subnormal_maximum_is_searched(scaled: bool, backend: Backend) -> None:
    """448 / amax is huge there, and half the smallest float32 rounds to a threshold of 0."""
    for max_abs in (2.0**-149, 2.0**-140):
        check(histogram("gaussian", 8), max_abs, scaled, backend)


@pytest.mark.parametrize("scaled", [False, True])
def test_damaged_layer_gives_nan_and_spares_the_others(scaled: bool, backend: Backend) -> None:
    """Damaged weights have a histogram of NaN; the search must not invent a threshold."""
    hists = torch.stack((torch.full((16,), math.nan, dtype=torch.float64), histogram("random", 16)))
    max_abs = torch.tensor([math.nan, 1.0])
    amax, mse = kernels.search_amax(
        hists.to(backend.device), max_abs.to(backend.device), scaled, 5, 1, backend=backend.name
    )
    assert amax[0].isnan()
    assert mse[0].isnan()
    expected = oracle.search_amax(hists[1].tolist(), 1.0, scaled, 5, 1)
    assert (float(amax[1]), float(mse[1])) == expected


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("scaled", [False, True])
def test_damaged_histogram_gives_nan(scaled: bool, value: float, backend: Backend) -> None:
    """No candidate has an objective then; an error of 0 or infinity would look like an answer."""
    hists = torch.stack([histogram("random", 16)] * 2)
    hists[0, 3] = value
    amax, mse = kernels.search_amax(
        hists.to(backend.device),
        torch.ones(2, device=backend.device),
        scaled,
        5,
        1,
        backend=backend.name,
    )
    assert amax.isnan().tolist() == mse.isnan().tolist() == [True, False]


@pytest.mark.parametrize("bad", [math.inf, -1.0, -math.inf, -(2.0**-149)])
def test_maximum_that_is_none_is_refused(bad: float, backend: Backend) -> None:
    """A negative or infinite maximum has no candidates; each backend would make up its own."""
    max_abs = torch.tensor([1.0, math.nan, bad])
    with pytest.raises(InputError, match=f"max_abs is {bad}; it must be finite and >= 0, or NaN"):
        kernels.search_amax(
            torch.ones(3, 4, dtype=torch.float64), max_abs, True, 2, 0, backend=backend.name
        )


def test_bad_arguments_are_refused(backend: Backend) -> None:
    """One candidate has no spacing, and thousands of bins do for any float32 weight."""
    hist, one = torch.ones(4, dtype=torch.float64), torch.ones(())
    with pytest.raises(InputError, match="candidates is 1; it must be at least 2"):
        kernels.search_amax(hist, one, True, 1, 0, backend=backend.name)
    with pytest.raises(InputError, match="refinements is -1"):
        kernels.search_amax(hist, one, True, 2, -1, backend=backend.name)
    for name, least in (("candidates", 2), ("refinements", 0)):
        option = next(field for field in fields(QuantizeConfig) if field.name == name)
        most = option.metadata["maximum"]
        assert option.metadata["minimum"] == least
        for value, message in (
            (most + 1, f"{name} is {most + 1}; it must be at most {most}"),
            (2.5, f"{name} is 2.5; it must be a whole number"),
            (True, f"{name} is True; it must be a whole number"),
        ):
            counts = {"candidates": 2, "refinements": 0, name: value}
            with pytest.raises(InputError, match=message):
                kernels.search_amax(hist, one, True, backend=backend.name, **counts)
    with pytest.raises(InputError, match=r"max_abs has shape \[2\]"):
        kernels.search_amax(hist, torch.ones(2), True, 2, 0, backend=backend.name)
    hist = torch.ones((1 << 20) + 1, dtype=torch.float64)
    with pytest.raises(InputError, match="bins is 1048577; it must be at most 1048576"):
        kernels.search_amax(hist, one, True, 2, 0, backend=backend.name)
