"""The baseline computes what the seed computes: without that its times say nothing."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from benchmarks import seed_algorithm
from benchmarks.seed_algorithm import DualMonitor, round_by_bisection, round_by_distance

GOLDEN = Path(__file__).parent.parent / "golden"
ANSWERS = json.loads((GOLDEN / "search_golden.json").read_text(encoding="utf-8"))
TENSORS = load_file(GOLDEN / "search_golden.safetensors")
DEFAULT = sorted(case for case in ANSWERS if case.endswith(".default"))
# The slow searches: one tensor in both modes.
HIGH = ("conv3x3_fp16.v1.high", "conv3x3_fp16.v2.high")
BY_DISTANCE = (
    "linear_skewed_importance_fp16.v1.default",
    "linear_skewed_importance_fp16.v2.default",
)
ROUNDINGS = (round_by_bisection, round_by_distance)


def check_search(case: str, rounding: seed_algorithm.Rounding) -> None:
    """Compare with the seed's answer: the histogram's maximum, the threshold and the error.

    Both round in float32, where one bit decides a tie between neighbouring codes: of equal errors
    either threshold may win.
    """
    answer: dict[str, Any] = ANSWERS[case]
    tensor = case.rsplit(".", 2)[0]
    weight, importance = TENSORS[f"{tensor}.weight"], TENSORS.get(f"{tensor}.importance")
    _, largest = seed_algorithm.weighted_histogram(weight, importance, answer["bins"])
    assert largest == answer["max_val"]
    amax, mse = seed_algorithm.search_amax(
        weight,
        importance,
        scaled=answer["scaled"],
        bins=answer["bins"],
        candidates=answer["candidates"],
        refinements=answer["refinements"],
        rounding=rounding,
    )
    assert mse == pytest.approx(answer["estimated_mse"], rel=1e-6, abs=0)
    if answer["scaled"]:
        near = abs(amax - answer["optimal_amax"]) <= 1e-6 * largest
        assert near or mse <= answer["estimated_mse"] * (1 + 1e-9)


@pytest.mark.parametrize("case", DEFAULT)
def test_search_by_bisection_meets_the_golden_answer(case: str) -> None:
    """The quicker baseline would search for something else than the seed."""
    check_search(case, round_by_bisection)


@pytest.mark.slow
@pytest.mark.parametrize("case", HIGH)
def test_fine_search_by_bisection_meets_the_golden_answer(case: str) -> None:
    """The baseline would treat the preset of more bins and candidates in another way."""
    check_search(case, round_by_bisection)


@pytest.mark.slow
@pytest.mark.parametrize("case", BY_DISTANCE)
def test_search_by_distance_meets_the_golden_answer(case: str) -> None:
    """The slower baseline would search for something else than the seed."""
    check_search(case, round_by_distance)


@pytest.mark.parametrize("rounding", ROUNDINGS)
def test_ties_go_to_the_smaller_magnitude(rounding: seed_algorithm.Rounding) -> None:
    """The objective of the method rounds ties down; the baseline would add another error."""
    grid, _ = seed_algorithm.magnitudes_and_midpoints(torch.device("cpu"))
    midpoints = (grid[:-1] + grid[1:]) / 2
    assert torch.equal(rounding(midpoints), grid[:-1])
    above = torch.nextafter(midpoints, torch.tensor(torch.inf))
    assert torch.equal(rounding(above), grid[1:])
    assert torch.equal(rounding(grid), grid)


@pytest.mark.parametrize(
    ("layer", "shape", "others"),
    [(nn.Linear(6, 4), (2, 5, 6), (0, 1)), (nn.Conv2d(3, 4, 3), (2, 3, 8, 8), (0, 2, 3))],
    ids=["linear", "conv2d"],
)
def test_hook_means_moments_and_magnitudes(
    layer: nn.Module, shape: tuple[int, ...], others: tuple[int, ...]
) -> None:
    """The hook's time would be that of other sums."""
    monitor = DualMonitor()
    inputs = torch.randn(3, *shape, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        outputs = [layer(x) for x in inputs]
    for x, y in zip(inputs, outputs, strict=True):
        monitor(layer, (x,), y)
    # Sums of at most 400 float32 values, means of 3 calls: off by less than 500 roundings.
    bound = 500 * 2.0**-24
    expected = inputs.abs().mean(dim=[0, *(axis + 1 for axis in others)])
    torch.testing.assert_close(monitor.importance, expected, rtol=bound, atol=0)
    squares = sum((y.double() ** 2).mean().item() for y in outputs)
    assert monitor.mean_of_squares == pytest.approx(squares, rel=bound)
    assert monitor.calls == 3
