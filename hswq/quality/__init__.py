"""Measures of what quantization changed."""

from hswq.quality.weights import LayerError, sqnr_db, weight_errors

__all__ = ["LayerError", "sqnr_db", "weight_errors"]
