"""Predicted error against size: what a budget buys."""

from __future__ import annotations

import math
from collections.abc import Sequence

from hswq.plan.plan import CurvePoint, LayerPlan
from hswq.plan.select import Candidate, rank_by_size

_BUDGET_REASONS = ("among the most sensitive", "below the budget")


def error_curve(
    candidates: Sequence[Candidate], layers: Sequence[LayerPlan], file_bytes: int
) -> tuple[CurvePoint, ...]:
    """Return the curve of all budgets, from none to keeping every layer.

    Layers are kept in the order of impact per weight; what options keep or quantize in any case
    stays as it is.

    Args:
        candidates: every layer, with its impact.
        layers: the decisions of a plan, in the same order.
        file_bytes: size of that plan's file.
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
    weights = sum(math.prod(candidate.shape) for candidate in free)
    # From the end, so that small rests do not vanish beside large sums.
    errors = [math.fsum(fixed)]
    for candidate in reversed(ranked):
        errors.append(errors[-1] + (candidate.impact or 0.0))
    errors.reverse()
    points, kept_weights = [], 0
    for number, error in enumerate(errors):
        points.append(CurvePoint(number, kept_weights / max(1, weights), size, error))
        if number < len(ranked):
            kept_weights += math.prod(ranked[number].shape)
            size += ranked[number].kept_bytes
    return tuple(points)


def thinned(points: Sequence[CurvePoint], count: int = 16) -> list[CurvePoint]:
    """Return about `count` points, evenly spread over the factors between their errors."""
    if len(points) <= count:
        return list(points)
    chosen = [points[0]]
    least = next((point.error for point in reversed(points) if point.error > 0.0), 1.0)
    ratio = (least / max(points[0].error, least)) ** (1.0 / (count - 1))
    for point in points[1:-1]:
        if point.error <= chosen[-1].error * ratio:
            chosen.append(point)
    return [*chosen, points[-1]]
