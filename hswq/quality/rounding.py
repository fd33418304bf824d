"""Whether codes are roundings of a weight, and how far a corrected bias may have moved."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from hswq import kernels
from hswq.formats.e4m3 import E4M3_MAX, decode

# Compensated codes (and stochastic ones) are not the nearest: their row's errors are added to the
# columns that follow. A column's error is then that of its own rounding and what it makes up for,
# which the inputs' correlations bound, not the weight. Allowed is, against nearest codes, three
# times what tiny checkpoints and the demo showed (layers 4.1, rows of 32 columns 9.5 in the mean
# square; elements 13.9 in the root). Damage lies beyond: E4M3 keeps 31 dB, of which one changed
# sign in a hundred leaves 14, 57 times the error, and a row of zeros nothing, 1200 times.
_LAYER_FACTOR = 12.0
_ROW_FACTOR = 32.0
_ELEMENT_FACTOR = 48.0
# A correction is delta @ E[x], delta the error of the row's weights: at most its sum of magnitudes
# times the largest |E[x]|. Weighted by delta, means of inputs lie below 1 behind norms and
# activations; 64 leaves room for inputs without a norm and channels of massive activations.
_LARGEST_MEAN = 64.0
_CHUNK = 1 << 22


@dataclass(frozen=True, eq=False)
class RoundingCheck:
    """What codes are to a weight.

    Attributes:
        problem: why they are no rounding of it; empty where they may be one.
        distance: sum over each row of |code value * scale - weight|, float64 [O].
    """

    problem: str
    distance: Tensor


def check_rounding(
    exact: Tensor, codes: Tensor, scale: Tensor, nearest_amax: float | None
) -> RoundingCheck:
    """Compare codes with the nearest ones of a weight.

    Args:
        exact: the weight, floating point [O, ...], on the CPU.
        codes: uint8, the same shape.
        scale: float32 [] or [O].
        nearest_amax: clipping threshold of codes that are to be the nearest, each of them; None
            where they may be compensated or of another tool.
    """
    flat, flat_codes = exact.reshape(len(exact), -1), codes.reshape(len(codes), -1)
    amax = scale * E4M3_MAX if nearest_amax is None else nearest_amax
    distance = torch.empty(len(flat), dtype=torch.float64)
    other, total, allowed, problem = 0, 0.0, 0.0, ""
    for rows in _row_chunks(*flat.shape):
        part, given = flat[rows], flat_codes[rows]
        of_rows = scale[rows] if scale.dim() else scale
        limit = amax[rows] if isinstance(amax, Tensor) and amax.dim() else amax
        nearest = kernels.quantize_e4m3(part, limit, of_rows)
        other += int((nearest != given).sum())
        weight, factor = part.double(), of_rows.double().reshape(-1, 1)
        error = decode(given).double().mul_(factor).sub_(weight).abs_()
        distance[rows] = error.sum(1)
        # Of a step's square uniform errors make a twelfth; clipped weights are further away.
        step = torch.exp2(((nearest >> 3) & 15).clamp(min=1).double() - 10.0).mul_(factor)
        least = decode(nearest).double().mul_(factor).sub_(weight).square_()
        usual = torch.maximum(least.sum(1), step.square_().sum(1) / 12.0)
        found = error.square().sum(1)
        total, allowed = total + float(found.sum()), allowed + float(usual.sum())
        root = (usual / max(1, part.shape[1])).sqrt()
        # Written so that NaN is a problem too.
        bad = ~(found <= _ROW_FACTOR * usual) | ~(error.amax(1) <= _ELEMENT_FACTOR * root)
        if not problem and bool(bad.any()):
            problem = f"row {rows.start + int(bad.int().argmax())} is too far from it"
    if nearest_amax is not None:
        problem = f"{other} of {codes.numel()} codes are not the nearest" if other else ""
    elif not problem and not total <= _LAYER_FACTOR * allowed:
        problem = f"its mean square error is {total / allowed:.0f} times that of nearest codes"
    return RoundingCheck(problem, distance)


def is_correction(exact: Tensor, corrected: Tensor, distance: Tensor) -> bool:
    """Tell whether a bias can be another one that makes up for the rounding of its weight.

    Args:
        exact: bias of the source, [O].
        corrected: bias of the file, [O] and of the same dtype.
        distance: that of `RoundingCheck`.
    """
    kind = torch.finfo(corrected.dtype)
    rounding = corrected.double().abs() * kind.eps + kind.smallest_normal
    moved = (corrected.double() - exact.double()).abs()
    return bool((moved <= _LARGEST_MEAN * distance + rounding).all())


def _row_chunks(rows: int, columns: int) -> Iterator[slice]:
    step = max(1, _CHUNK // max(1, columns))
    for start in range(0, rows if columns else 0, step):
        yield slice(start, min(start + step, rows))
