"""Static scales for FP8 activations."""

from __future__ import annotations

import numpy as np

from hswq.calibration import Calibration
from hswq.errors import InputError
from hswq.formats.e4m3 import E4M3_MAX

# A scale of max |x| / 448 puts the mean |x| at 448 * mean / max. Below 8 times the smallest normal
# codepoint, 2^-6, most values would be subnormal codes with a bit or two: a few tokens are so much
# larger than the others that one scale cannot serve both.
LEAST_MEAN = 8 * 2.0**-6


def static_input_scale(calibration: Calibration, name: str) -> float | None:
    """Return the scale for a layer's inputs, float32(max |x| / 448).

    Args:
        calibration: statistics with the largest inputs.
        name: of the layer's module.
    Returns:
        None for a layer that had better compute its own scale for each token: tokens of its input
        are larger than most by more than FP8's range allows for, or it was never called.
    Raises:
        InputError: the statistics were made without looking for the largest inputs.
    """
    largest = calibration.input_max(name)
    if largest is None:
        raise InputError(
            "the statistics do not hold the range of the layers' inputs, which --activations fp8 "
            "needs: calibrate again with --activations fp8."
        )
    importance = calibration.importance(name)
    if importance is None or largest == 0.0:
        return None
    mean = float(importance.double().mean())
    if mean * E4M3_MAX < LEAST_MEAN * largest:
        return None
    scale = float(np.float32(largest / E4M3_MAX))
    return scale if scale >= 2.0**-126 else None
