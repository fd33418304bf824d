"""The seed project's optimizer class, for programs that import it by name."""

from __future__ import annotations

import torch
from torch import Tensor

from hswq.search import AmaxResult, search_amax


class HSWQWeightedHistogramOptimizer:
    """Drop-in for the seed's optimizer: histogram-weighted search of amax.

    One deliberate difference: an importance vector of the wrong length raises InputError, where
    the seed pads or truncates it.

    Args:
        bins: equal-width bins of the histogram.
        num_candidates: thresholds a stage.
        refinement_iterations: further stages around the best.
        device: where to compute; weights are moved there.
    """

    def __init__(
        self,
        bins: int = 4096,
        num_candidates: int = 200,
        refinement_iterations: int = 3,
        device: str | torch.device = "cpu",
    ) -> None:
        self.bins = bins
        self.num_candidates = num_candidates
        self.refinement_iterations = refinement_iterations
        self.device = torch.device(device)

    def compute_optimal_amax(
        self, weight: Tensor, importance: Tensor | None = None, scaled: bool = True
    ) -> float:
        """Return the amax of least weighted error; see `hswq.search_amax`."""
        return self._search(weight, importance, scaled).amax

    def compute_optimal_amax_with_stats(
        self, weight: Tensor, importance: Tensor | None = None, scaled: bool = True
    ) -> dict[str, float]:
        """Return optimal_amax, max_val, compression_ratio (amax / max) and estimated_mse."""
        result = self._search(weight, importance, scaled)
        return {
            "optimal_amax": result.amax,
            "max_val": result.max_abs,
            "compression_ratio": result.amax / result.max_abs if result.max_abs > 0.0 else 1.0,
            "estimated_mse": result.mse,
        }

    def _search(self, weight: Tensor, importance: Tensor | None, scaled: bool) -> AmaxResult:
        return search_amax(
            weight.to(self.device),
            None if importance is None else importance.float(),
            scaled=scaled,
            bins=self.bins,
            candidates=self.num_candidates,
            refinements=self.refinement_iterations,
        )
