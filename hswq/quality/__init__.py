"""Measures of what quantization changed."""

from hswq.quality.compare import Comparison, LayerComparison, compare_checkpoints
from hswq.quality.weights import LayerError, sqnr_db, weight_errors

__all__ = [
    "Comparison",
    "LayerComparison",
    "LayerError",
    "compare_checkpoints",
    "sqnr_db",
    "weight_errors",
]
