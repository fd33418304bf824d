"""What the seed project computes, written from the definition of the method: the baseline.

Deliberately slow as the seed is: a float32 copy of the weight, an int64 index and a float64
importance for every element, one candidate after the other in Python, two host synchronisations a
hook call. Its meaning is that of `hswq.search.search_amax` and `hswq.calibration.observe`, except
that it rounds in float32, keeps float32 means and pads nothing.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from fractions import Fraction
from typing import Any

import torch
from torch import Tensor

_LARGEST = 448.0

Rounding = Callable[[Tensor], Tensor]


@functools.cache
def magnitudes_and_midpoints(device: torch.device) -> tuple[Tensor, Tensor]:
    """Return the magnitudes, float32 [127], and the midpoints between them, [126]."""
    codes = torch.arange(0x7F, dtype=torch.uint8, device=device)
    magnitudes = codes.view(torch.float8_e4m3fn).float()
    return magnitudes, (magnitudes[:-1] + magnitudes[1:]) / 2


def round_by_distance(x: Tensor) -> Tensor:
    """Round float32 [n] >= 0 to the nearest magnitude, ties to the smaller, by all distances."""
    magnitudes, _ = magnitudes_and_midpoints(x.device)
    return magnitudes[(x[:, None] - magnitudes).abs().argmin(dim=1)]


def round_by_bisection(x: Tensor) -> Tensor:
    """Round float32 [n] >= 0 to the nearest magnitude, ties to the smaller, by searchsorted."""
    magnitudes, midpoints = magnitudes_and_midpoints(x.device)
    return magnitudes[torch.searchsorted(midpoints, x)]


def weighted_histogram(
    weight: Tensor, importance: Tensor | None, bins: int
) -> tuple[Tensor, float]:
    """Return the histogram, float64 [bins] of sum 1, and max|w|.

    Args:
        weight: floating point [O, I, ...] with a maximum above 0.
        importance: float32 [I]. None: 1 for all.
        bins: equal bins on [0, max|w|].
    """
    magnitude = weight.float().abs()
    largest = magnitude.max().item()
    index = (magnitude / (largest / bins)).long().clamp(0, bins - 1)
    if importance is None:
        importance = torch.ones(weight.shape[1])
    per_element = importance.double().view(1, -1, *[1] * (weight.dim() - 2)).expand(weight.shape)
    histogram = torch.zeros(bins, dtype=torch.float64)
    histogram.scatter_add_(0, index.flatten(), per_element.flatten())
    return histogram / histogram.sum(), largest


def clip_mse(
    histogram: Tensor, centres: Tensor, amax: float, scaled: bool, rounding: Rounding
) -> float:
    """Return the weighted squared error of one threshold."""
    x = centres.float()
    if scaled:
        scale = _LARGEST / amax
        rounded = rounding((x * scale).clamp(max=_LARGEST)) / scale
    else:
        rounded = rounding(x.clamp(max=min(amax, _LARGEST)))
    return (histogram * (rounded.double() - centres) ** 2).sum().item()


def search_amax(
    weight: Tensor,
    importance: Tensor | None,
    *,
    scaled: bool,
    bins: int,
    candidates: int,
    refinements: int,
    rounding: Rounding,
) -> tuple[float, float]:
    """Return the threshold of least error, coarse to fine, and its error."""
    histogram, largest = weighted_histogram(weight, importance, bins)
    centres = (torch.arange(bins, dtype=torch.float64) + 0.5) * (largest / bins)
    low, high = 0.5 * largest, largest
    best, least = largest, math.inf
    for _ in range(refinements + 1):
        for candidate in torch.linspace(low, high, candidates):
            amax = candidate.item()
            mse = clip_mse(histogram, centres, amax, scaled, rounding)
            if mse < least:
                best, least = amax, mse
        width = (high - low) / 4
        low, high = max(0.1 * largest, best - width), min(1.2 * largest, best + width)
    return best, least


class DualMonitor:
    """Forward hook of one layer: moments of the output, mean magnitude of each input channel."""

    def __init__(self) -> None:
        self.mean = 0.0
        self.mean_of_squares = 0.0
        self.calls = 0
        self.importance: Tensor | None = None

    def __call__(self, module: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        y = output.detach().float()
        self.mean += y.mean().item()
        self.mean_of_squares += (y**2).mean().item()
        x = inputs[0].detach()
        # The rank of the tensor stands for the kind of the layer.
        others = (0, 2, 3) if x.dim() == 4 else tuple(range(x.dim() - 1))
        abs_mean = x.abs().mean(dim=others)
        if self.importance is None:
            self.importance = abs_mean
        else:
            self.importance = (self.importance * self.calls + abs_mean) / (self.calls + 1)
        self.calls += 1

    @property
    def variance(self) -> float:
        """Output variance S over all calls."""
        return self.mean_of_squares / self.calls - (self.mean / self.calls) ** 2


def kept_by_variance(variances: dict[str, float], sizes: dict[str, int], share: float) -> set[str]:
    """Return the layers that a byte budget keeps: the ranking by S, each that still fits.

    Args:
        variances: output variance S by layer.
        sizes: weights by layer.
        share: of all weights that may be kept.
    """
    # The decimal text is meant: as a float, 0.29 of 100 is less than 29.
    left = Fraction(repr(float(share))) * sum(sizes.values())
    kept = set()
    for name in sorted(variances, key=lambda name: (-variances[name], name)):
        if sizes[name] <= left:
            kept.add(name)
            left -= sizes[name]
    return kept
