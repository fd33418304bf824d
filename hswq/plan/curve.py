"""Predicted error against size: what a budget buys."""

from __future__ import annotations

import math
from collections.abc import Sequence
from fractions import Fraction

from hswq.config import QuantizeConfig
from hswq.plan.plan import CurvePoint, LayerPlan
from hswq.plan.select import (
    BELOW_BUDGET,
    KEPT_BY_BUDGET,
    Candidate,
    quantizable_weights,
    rank_by_size,
)

_BUDGET_REASONS = (KEPT_BY_BUDGET, BELOW_BUDGET)


def error_curve(
    candidates: Sequence[Candidate],
    layers: Sequence[LayerPlan],
    file_bytes: int,
    config: QuantizeConfig,
) -> tuple[CurvePoint, ...]:
    """Return the curve of all budgets, from none to keeping every layer.

    Layers are kept in the order of impact per weight; what options keep or quantize in any case
    stays as it is.

    Args:
        candidates: every layer, with its impact.
        layers: the decisions of a plan, in the same order.
        file_bytes: size of that plan's file.
        config: container and conv are read, which say of what the kept bytes are a share.
    """
    free = [
        candidate
        for candidate, layer in zip(candidates, layers, strict=True)
        if layer.reason in _BUDGET_REASONS and candidate.impact is not None
    ]
    fixed = [
        layer.impact or 0.0
        for layer in layers
        if layer.quantized and layer.reason not in _BUDGET_REASONS
    ]
    kept_now = {layer.name for layer in layers if not layer.quantized}
    size = file_bytes - sum(it.kept_bytes for it in free if it.name in kept_now)
    ranked = rank_by_size(free, "impact")
    weights = quantizable_weights(candidates, config)
    least = min((candidate.numel for candidate in free), default=1)
    # From the end, so that small rests do not vanish beside large sums.
    errors = [math.fsum(fixed)]
    for candidate in reversed(ranked):
        errors.append(errors[-1] + (candidate.impact or 0.0))
    errors.reverse()
    points, kept_weights = [], 0
    for number, error in enumerate(errors):
        share = _rounded_up(kept_weights, max(1, weights), least)
        points.append(CurvePoint(number, share, size, error))
        if number < len(ranked):
            kept_weights += ranked[number].numel
            size += ranked[number].kept_bytes
    return tuple(points)


def _rounded_up(part: int, whole: int, least: int) -> float:
    """Return part / whole with as few decimals as it takes to keep `part` and not `least` more."""
    digits = 4
    while True:
        unit = 10**digits
        share = Fraction(-(-part * unit // whole), unit)
        if share * whole < part + least:
            return float(share)
        digits += 1


def thinned(points: Sequence[CurvePoint], count: int = 16) -> list[CurvePoint]:
    """Return about `count` points, evenly spread over the factors between their errors."""
    if len(points) <= count:
        return list(points)
    chosen = [points[0]]
    known = [point.error for point in points if 0.0 < point.error < math.inf] or [1.0]
    ratio = (known[-1] / known[0]) ** (1.0 / (count - 1))
    for point in points[1:-1]:
        if point.error < math.inf and point.error <= chosen[-1].error * ratio:
            chosen.append(point)
    return [*chosen, points[-1]]
