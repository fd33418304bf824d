"""The clipping threshold of one weight: weighted histogram, then coarse-to-fine search."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from hswq import kernels
from hswq.errors import InputError
from hswq.formats.e4m3 import E4M3_MAX


@dataclass(frozen=True)
class AmaxResult:
    """What the search found for one weight.

    Attributes:
        amax: largest magnitude kept.
        mse: the objective at amax, J = sum H(b) * (q(x_b) - x_b)^2, H normalised to sum 1. That of
            the scale amax / 448: where it is below 2^-126, `scale` is larger and the error another.
        max_abs: largest magnitude in the weight.
        power: sum H(b) * x_b^2, so that mse / power is the relative weighted error.
    """

    amax: float
    mse: float
    max_abs: float
    power: float

    @property
    def scale(self) -> float:
        """float32(amax / 448), the scale of V2, at least 2^-126; 1 for an all-zero weight.

        A smaller scale would be subnormal: rounded coarsely here, and 0 to readers that flush.
        """
        if self.amax == 0.0:
            return 1.0
        return float(
            torch.tensor(max(self.amax / E4M3_MAX, 2.0**-126), dtype=torch.float32, device="cpu")
        )

    @property
    def relative_mse(self) -> float:
        """mse / power: 0 for an all-zero weight."""
        return self.mse / self.power if self.power > 0.0 else 0.0


def histogram_power(hist: Tensor, max_abs: float) -> float:
    """Return sum H(b) * x_b^2 over the bin centres, by the fixed halving tree of the contract.

    Args:
        hist: float64 [bins], normalised to sum 1.
        max_abs: right edge of the last bin.
    """
    centres = kernels.bin_centres(max_abs, hist.numel())
    return float(kernels.tree_sum(hist.cpu() * centres * centres))


def search_amax(
    weight: Tensor,
    importance: Tensor | None = None,
    *,
    scaled: bool,
    bins: int = 4096,
    candidates: int = 200,
    refinements: int = 3,
    backend: str | None = None,
    name: str = "weight",
) -> AmaxResult:
    """Find the amax with the least importance-weighted squared error.

    J(amax) = sum_b H(b) * (q(x_b, amax) - x_b)^2 over `candidates` thresholds between 0.5 and 1.0
    times max|w|, refined `refinements` times around the best (at most 1.2 times max|w|).

    Args:
        weight: float16, bfloat16 or float32, [O, I, ...], any device.
        importance: float32 [I], or [G, I] for a convolution of G groups; >= 0. None: all alike.
        scaled: True for V2 (q divides by amax / 448), False for V1.
        bins: equal-width bins of the histogram on [0, max|w|].
        candidates: thresholds a stage, 2 to 100,000.
        refinements: further stages, 0 to 100.
        backend: kernel backend; None lets the dispatcher choose.
        name: how errors call the weight.
    Returns:
        The threshold, its objective and the largest magnitude. An all-zero weight gives amax 0.
    Raises:
        InputError: weight is empty, holds NaN or Inf, importance has another length, or a count is
            out of range.
    """
    if weight.numel() == 0:
        raise InputError(f"{name} {list(weight.shape)} is empty: there is nothing to quantize.")
    hist, max_abs = kernels.weighted_histogram(weight, importance, bins, backend=backend)
    largest = float(max_abs)
    if not math.isfinite(largest):
        raise InputError(
            f"{name} {list(weight.shape)} holds NaN or Inf; only finite weights can be quantized. "
            "The checkpoint is damaged or was saved in a dtype that overflowed: export it again."
        )
    amax, mse = kernels.search_amax(hist, max_abs, scaled, candidates, refinements, backend=backend)
    return AmaxResult(float(amax), float(mse), largest, histogram_power(hist, largest))
