"""The clipping threshold of one weight: weighted histogram, then coarse-to-fine search."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from hswq import kernels
from hswq.errors import InputError
from hswq.formats.e4m3 import E4M3_MAX

# Histograms that are kept at a time: those of any real model with the default number of bins.
_BATCH_BYTES = 256 << 20


class Layer(NamedTuple):
    """A weight to search.

    Attributes:
        name: how errors call it.
        weight: float16, bfloat16 or float32, [O, I, ...], any device.
        importance: float32 [I], or [G, I] for a convolution of G groups; >= 0. None: all alike.
        scaled: True for V2 (q divides by amax / 448), False for V1.
    """

    name: str
    weight: Tensor
    importance: Tensor | None
    scaled: bool


def scale_of(amax: float) -> float:
    """Return float32(amax / 448), the scale of V2, at least 2^-126; 1 for an all-zero weight.

    A smaller scale would be subnormal: rounded coarsely here, and 0 to readers that flush.
    """
    if amax == 0.0:
        return 1.0
    return float(torch.tensor(max(amax / E4M3_MAX, 2.0**-126), dtype=torch.float32, device="cpu"))


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
        """The scale of V2 at amax, see `scale_of`."""
        return scale_of(self.amax)

    @property
    def relative_mse(self) -> float:
        """mse / power: 0 for an all-zero weight."""
        return self.mse / self.power if self.power > 0.0 else 0.0


def histogram_power(hists: Tensor, max_abs: Tensor) -> Tensor:
    """Return sum H(b) * x_b^2 over the bin centres, by the fixed halving tree of the contract.

    Args:
        hists: float64 [L, bins], each normalised to sum 1.
        max_abs: float32 [L], right edges of the last bins.
    Returns:
        float64 [L], on the device of the histograms.
    """
    places, bins = _places(hists.shape[-1], hists.device)
    centres = places * (max_abs.double() / bins)[:, None]
    return kernels.tree_sum(hists * centres * centres)


@lru_cache(maxsize=8)
def _places(bins: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Return b + 0.5 of every bin, and the number of bins, both float64.

    That is a tensor as well: a division by a number may become a product with its reciprocal.
    """
    with torch.inference_mode(False):
        places = torch.arange(bins, dtype=torch.float64, device=device) + 0.5
        return places, torch.tensor(bins, dtype=torch.float64, device=device)


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
    layer = Layer(name, weight, importance, scaled)
    settings = {"bins": bins, "candidates": candidates, "refinements": refinements}
    return search_layers([layer], **settings, backend=backend)[0]


def search_layers(
    layers: Iterable[Layer],
    *,
    bins: int = 4096,
    candidates: int = 200,
    refinements: int = 3,
    backend: str | None = None,
) -> list[AmaxResult]:
    """Find the amax of every layer of a model, as `search_amax` finds that of one.

    On an accelerator nothing waits before the last layer's work is under way: one histogram after
    the other, then one search of them all (of every 256 MB of histograms, if there are more).

    Args:
        layers: weights, taken one by one.
        bins, candidates, refinements, backend: as for `search_amax`.
    Returns:
        A result for each layer, in their order.
    Raises:
        InputError: as for `search_amax`, for the first layer concerned.
    """
    results: list[AmaxResult] = []
    searched: list[_Searched] = []

    def finish() -> None:
        results.extend(_results(searched, candidates, refinements, backend))
        searched.clear()

    for layer in layers:
        if layer.weight.numel() == 0:
            raise InputError(
                f"{layer.name} {list(layer.weight.shape)} is empty: there is nothing to quantize."
            )
        hist, max_abs = kernels.weighted_histogram(
            layer.weight, layer.importance, bins, backend=backend
        )
        searched.append(_Searched(layer.name, layer.weight.shape, layer.scaled, hist, max_abs))
        if len(searched) * hist.nbytes >= _BATCH_BYTES:
            finish()
    finish()
    return results


class _Searched(NamedTuple):
    """A layer's histogram, and what its result needs to be told apart."""

    name: str
    shape: torch.Size
    scaled: bool
    hist: Tensor
    max_abs: Tensor


def _results(
    layers: Sequence[_Searched], candidates: int, refinements: int, backend: str | None
) -> list[AmaxResult]:
    """Search some histograms and wait for the answers, once a device."""
    by_device: defaultdict[torch.device, defaultdict[bool, list[int]]]
    by_device = defaultdict(lambda: defaultdict(list))
    for number, layer in enumerate(layers):
        by_device[layer.hist.device][layer.scaled].append(number)
    found: dict[int, list[float]] = {}
    for groups in by_device.values():
        columns = []
        for scaled, numbers in groups.items():
            hists = torch.stack([layers[number].hist for number in numbers])
            max_abs = torch.stack([layers[number].max_abs for number in numbers])
            amax, mse = kernels.search_amax(
                hists, max_abs, scaled, candidates, refinements, backend=backend
            )
            power = histogram_power(hists, max_abs)
            columns.append(torch.stack((amax.double(), mse, max_abs.double(), power)))
        order = [number for numbers in groups.values() for number in numbers]
        rows: list[list[float]] = torch.cat(columns, dim=1).T.tolist()
        found.update(zip(order, rows, strict=True))
    results = []
    for number, layer in enumerate(layers):
        result = AmaxResult(*found[number])
        if not math.isfinite(result.max_abs):
            raise InputError(
                f"{layer.name} {list(layer.shape)} holds NaN or Inf; only finite weights can be "
                "quantized. The checkpoint is damaged or was saved in a dtype that overflowed: "
                "export it again."
            )
        results.append(result)
    return results
