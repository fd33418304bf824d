"""Weight error of an FP8 file against its source."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

from torch import Tensor

from hswq.calibration.codes import UnitCodes
from hswq.formats.quantized import dequantize, quantized_weights
from hswq.formats.reader import Checkpoint


@dataclass(frozen=True)
class LayerError:
    """Weight error of one FP8 layer: `sqnr_db` against the source, unweighted."""

    name: str
    numel: int
    sqnr_db: float


def sqnr_db(signal: Tensor, approximation: Tensor) -> float:
    """Return the signal to quantization noise ratio in dB.

    SQNR = 10 * log10(sum signal^2 / sum (signal - approximation)^2), sums in float64.

    Args:
        signal: floating point, any shape.
        approximation: the same shape.
    Returns:
        dB; infinite where the two are equal, minus infinite where only the signal is zero.
    """
    exact = signal.double()
    power = float(exact.square().sum())
    noise = float((exact - approximation.double()).square().sum())
    if noise == 0.0:
        return math.inf
    return 10.0 * math.log10(power / noise) if power > 0.0 else -math.inf


def output_sqnr_db(unit: UnitCodes) -> float | None:
    """Return 10 log10(signal / error) of a layer's output on the calibration's inputs.

    Args:
        unit: what the calibration says of the layer's codes.
    Returns:
        Infinite where nothing changes; None where no usable Gram matrix tells it.
    """
    if not (0.0 < unit.signal < math.inf and 0.0 <= unit.error < math.inf):
        return None
    return 10.0 * math.log10(unit.signal / unit.error) if unit.error else math.inf


def weight_errors(source: Checkpoint, quantized: Checkpoint) -> Iterator[LayerError]:
    """Yield the weight error of every FP8 layer, one layer in memory at a time.

    Args:
        source: the 16-bit or 32-bit checkpoint.
        quantized: the FP8 file made from it, any container.
    """
    for base, weight in quantized_weights(quantized).items():
        signal = source.read(weight.weight_key)
        yield LayerError(base, signal.numel(), sqnr_db(signal, dequantize(quantized, base)))
