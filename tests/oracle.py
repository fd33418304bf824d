"""The contract once more, slowly: plain Python numbers, fractions and numpy's IEEE float32.

Nothing here comes from hswq or torch's arithmetic; it follows METHOD's definitions one element at a
time. Python floats are IEEE float64 and never fused, so exact ops can be compared bit for bit.
"""

from __future__ import annotations

import bisect
import itertools
import math
from fractions import Fraction

import numpy as np

FLOAT32_MAX = (2 - 2.0**-23) * 2.0**127
UNIT32 = 2.0**-24
UNIT64 = 2.0**-53


def codepoint_value(code: int) -> float:
    """Value of a byte by the OCP definition: sign, exponent of 4 bits and bias 7, 3 of mantissa."""
    sign = -1.0 if code & 0x80 else 1.0
    exponent, mantissa = (code >> 3) & 15, code & 7
    if exponent == 15 and mantissa == 7:
        return math.nan
    if exponent == 0:
        return sign * mantissa * 2.0**-9
    return sign * (8 + mantissa) * 2.0 ** (exponent - 10)


MAGNITUDES = [codepoint_value(code) for code in range(127)]
# Between neighbours; exact, since a magnitude has 4 significant bits.
MIDPOINTS = [(low + high) / 2 for low, high in itertools.pairwise(MAGNITUDES)]


def encode(values: np.ndarray) -> np.ndarray:
    """Nearest codepoint of float32 values: ties to even, saturating, NaN to 0x7F plus its sign."""
    values = np.asarray(values, dtype=np.float32)
    magnitudes = np.abs(values.astype(np.float64))
    below = np.searchsorted(MIDPOINTS, magnitudes, side="left")
    tie = np.isin(magnitudes, MIDPOINTS)
    # `below` is the smaller neighbour at a tie; an odd code gives way to the even one above.
    codes = np.where(tie & (below % 2 == 1), below + 1, below)
    codes = np.where(np.isnan(values), 0x7F, codes)
    return (codes | np.where(np.signbit(values), 0x80, 0)).astype(np.uint8)


def decode(codes: np.ndarray) -> np.ndarray:
    """Float32 value of uint8 codepoints."""
    table = np.array([codepoint_value(code) for code in range(256)], dtype=np.float32)
    return table[codes]


def quantize(w: np.ndarray, amax: np.ndarray, scale: np.ndarray) -> np.ndarray:
    """Codepoints of float32 w; amax and scale are float32 and broadcast against it."""
    clipped = np.where(np.abs(w) > amax, np.copysign(amax, w), w).astype(np.float32)
    with np.errstate(all="ignore"):
        return encode(clipped / np.asarray(scale, dtype=np.float32))


def bin_width(max_abs: float, bins: int) -> np.float32:
    """Width of a histogram bin: the float64 quotient, rounded once."""
    return np.float32(np.float64(max_abs) / np.float64(bins))


def importance_integers(importance: np.ndarray, numel: int) -> list[list[int]]:
    """Importances [G, I] in steps such that the sum over numel weights stays below 2**62."""
    bits = 62 - numel.bit_length()
    largest = Fraction(float(importance.max()))
    exponent = next(e for e in range(-160, 140) if largest < Fraction(2) ** e)
    step = Fraction(2) ** (exponent - bits)
    return [[round(Fraction(float(value)) / step) for value in group] for group in importance]


def weighted_histogram(
    w: np.ndarray, importance: np.ndarray | None, bins: int
) -> tuple[list[float], float]:
    """Histogram of float32 w [O, I, ...]; importance [I] or [G, I]."""
    w = np.abs(w).reshape(w.shape[0], w.shape[1], -1)
    rows, columns, _ = w.shape
    max_abs = float(w.max())
    weights = np.ones((1, columns), dtype=np.float32)
    if importance is not None and importance.max() > 0:
        weights = importance.reshape(-1, columns)
    integers = importance_integers(weights, w.size)
    width = bin_width(max_abs, bins)
    sums = [0] * bins
    for row in range(rows):
        group = integers[row * len(integers) // rows]
        for column in range(columns):
            for value in w[row, column]:
                if value == 0:
                    index = 0
                elif width == 0:
                    index = bins - 1
                else:
                    index = min(int(np.floor(value / width)), bins - 1)
                sums[index] += group[column]
    total = float(sum(sums))
    return [float(value) / total for value in sums], max_abs


def centres(max_abs: float, bins: int) -> list[float]:
    return [(b + 0.5) * (max_abs / bins) for b in range(bins)]


def round_down_at_ties(value: float) -> float:
    """Nearest magnitude, ties to the smaller one."""
    return MAGNITUDES[bisect.bisect_left(MIDPOINTS, value)]


def error_terms(hist: list[float], max_abs: float, amax: float, scaled: bool) -> list[float]:
    """H * (q - x)^2 of every bin, with the clipping and rounding of the method."""
    terms = []
    for weight, x in zip(hist, centres(max_abs, len(hist)), strict=True):
        if not scaled:
            q = round_down_at_ties(min(x, min(amax, 448.0)))
        elif amax == 0.0:
            q = 0.0
        else:
            s = 448.0 / amax
            q = round_down_at_ties(min(x * s, 448.0)) / s
        terms.append(weight * ((q - x) * (q - x)))
    return terms


def tree_sum(terms: list[float]) -> float:
    """Pad to a power of two, add the upper half to the lower, repeat."""
    size = 1
    while size < len(terms):
        size *= 2
    terms = terms + [0.0] * (size - len(terms))
    while len(terms) > 1:
        half = len(terms) // 2
        terms = [terms[i] + terms[i + half] for i in range(half)]
    return terms[0]


def objective(hist: list[float], max_abs: float, amax: float, scaled: bool) -> float:
    return tree_sum(error_terms(hist, max_abs, amax, scaled))


def search_amax(
    hist: list[float], max_abs: float, scaled: bool, candidates: int, refinements: int
) -> tuple[float, float]:
    """Every candidate of every stage by the direct sum; the first strict minimum wins."""
    if max_abs == 0.0:
        return 0.0, 0.0
    best, best_error = math.nan, math.inf
    low, high = 0.5 * max_abs, max_abs
    for _ in range(refinements + 1):
        step = (high - low) / (candidates - 1)
        for i in range(candidates):
            amax = float(np.float32(low + i * step))
            error = objective(hist, max_abs, amax, scaled)
            if error < best_error:
                best, best_error = amax, error
        width = (high - low) / 4
        low = max(0.1 * max_abs, best - width)
        high = min(1.2 * max_abs, best + width, FLOAT32_MAX)
    return best, best_error


def round_to_step(value: Fraction, bits: int) -> int:
    """Nearest multiple of 2**-bits, ties to even, as a count of steps."""
    return round(value * 2**bits)


def patches(
    x: np.ndarray,
    kernel: tuple[int, int],
    stride: tuple[int, int],
    padding: tuple[int, int],
    dilation: tuple[int, int],
) -> np.ndarray:
    """Rows of (c, kh, kw) of an input [B, C, H, W]: [B, H', W', C * kh * kw]."""
    x = np.pad(x, ((0, 0), (0, 0), (padding[0],) * 2, (padding[1],) * 2))
    spans = [dilation[a] * (kernel[a] - 1) + 1 for a in range(2)]
    heights, widths = (range(0, x.shape[2 + a] - spans[a] + 1, stride[a]) for a in range(2))
    return np.stack(
        [
            np.stack(
                [
                    x[:, :, i : i + spans[0] : dilation[0], j : j + spans[1] : dilation[1]].reshape(
                        len(x), -1
                    )
                    for j in widths
                ],
                axis=1,
            )
            for i in heights
        ],
        axis=1,
    )


def round_compensated(
    w: list[list[float]], upper: list[list[float]], scale: list[np.float32], order: list[int]
) -> np.ndarray:
    """Codepoints of w [O][n]; every operation on one Python float at a time."""
    codes = np.zeros((len(w), len(order)), dtype=np.uint8)
    for row, values in enumerate(w):
        rest = [values[column] for column in order]
        for k, column in enumerate(order):
            code = encode(np.float32(rest[k]) / scale[row])
            codes[row, column] = code
            error = (rest[k] - float(decode(code) * scale[row])) / upper[k][k]
            for later in range(k + 1, len(order)):
                product = error * upper[k][later]
                rest[later] = rest[later] - product
    return codes


def sweep_codes(
    slope: np.ndarray, codes: np.ndarray, second: np.ndarray, scale: list[np.float32]
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Codes, slopes and steps [B, O]; every operation on one np.float32 at a time."""
    slope, codes, steps = slope.copy(), codes.copy(), np.zeros_like(slope)
    with np.errstate(all="ignore"):
        for lane in range(slope.shape[1]):
            for k in range(len(slope)):
                value = decode(int(codes[k, lane])) * scale[lane]
                best = value + slope[k, lane] / second[k, k]
                code = encode(best / scale[lane])
                other = decode(code) * scale[lane]
                if abs(other - best) < abs(value - best):
                    codes[k, lane], steps[k, lane] = code, other - value
                for column in range(len(slope)):
                    product = second[k, column] * steps[k, lane]
                    slope[column, lane] = slope[column, lane] - product
    return codes, slope, steps
