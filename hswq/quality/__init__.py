"""Measures of what quantization changed."""

from hswq.quality.compare import Comparison, LayerComparison, compare_checkpoints
from hswq.quality.rounding import RoundingCheck, check_rounding, is_correction
from hswq.quality.weights import LayerError, sqnr_db, weight_errors

__all__ = [
    "Comparison",
    "LayerComparison",
    "LayerError",
    "RoundingCheck",
    "check_rounding",
    "compare_checkpoints",
    "is_correction",
    "sqnr_db",
    "weight_errors",
]
