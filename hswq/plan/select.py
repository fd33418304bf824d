"""Selection of the layers that stay 16-bit: ranking, budget, overrides."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

from hswq.config import QuantizeConfig
from hswq.errors import PlanError
from hswq.formats.containers import can_quantize, can_scale
from hswq.plan.plan import LayerPlan


@dataclass(frozen=True)
class Candidate:
    """A layer that could be quantized.

    Attributes:
        name: layer name, the checkpoint key without prefix and '.weight'.
        aliases: other names a pattern may match (the module's name).
        kind: 'linear' or 'conv2d'.
        shape: shape of the weight.
        sensitivity: output variance S; None without a counted call.
        impact: measured change of the denoiser's output; None where it was not measured.
        kept_bytes: how many bytes more a file has that keeps the layer.
    """

    name: str
    aliases: tuple[str, ...]
    kind: str
    shape: tuple[int, ...]
    sensitivity: float | None
    impact: float | None = None
    kept_bytes: int = 0

    def rank(self, sensitivity: str) -> float | None:
        """Return the figure that `--sensitivity` ranks by; None for a layer that was not seen."""
        if self.sensitivity is None:
            return None
        return self.impact if sensitivity == "impact" else self.sensitivity

    def matches(self, pattern: re.Pattern[str]) -> bool:
        """Tell whether the pattern is found in one of the layer's names."""
        return any(pattern.search(name) for name in (self.name, *self.aliases))


def select_layers(
    candidates: Sequence[Candidate],
    config: QuantizeConfig,
    preset: Sequence[str] = (),
    room: Callable[[Sequence[str]], float] | None = None,
) -> tuple[LayerPlan, ...]:
    """Decide for each layer whether it is quantized.

    The budget goes to the layers that rank first, ties by name:

    - keep_ratio R: the int(N * R) layers of largest variance or impact.
    - keep_bytes R and target_size: the ranking, by variance or by impact per weight, is walked to
      its end, and each layer that still fits is kept; others are skipped.
    - max_error E: layers of most impact per weight are kept until the impacts of the others add up
      to E at most.

    A layer the container cannot hold, whose rank is unknown, or which a preset names, is kept
    besides. `--quantize` and `--keep` overrule the ranking and the preset, `--keep` last.

    Args:
        candidates: every Linear and Conv2d of the denoiser, in the order of the model.
        config: the budget, sensitivity, keep, keep_preset, quantize, container, conv and scaled are
            read.
        preset: the patterns of config.keep_preset; they need not match any layer.
        room: for target_size: how many bytes are left when the layers of these names, and no
            others, are FP8.
    Returns:
        One decision a layer, in the order given, without amax.
    Raises:
        PlanError: a pattern matches no layer, asks for one the container cannot hold, or the budget
            cannot be met.
    """
    forced = _forced(candidates, config, preset)
    free = [
        layer
        for layer in candidates
        if layer.name not in forced and layer.rank(config.sensitivity) is not None
    ]
    within = _within_budget(candidates, free, forced, config, room)
    plans = []
    for layer in candidates:
        if layer.name in forced:
            quantized, reason = forced[layer.name]
        elif layer.rank(config.sensitivity) is None:
            quantized, reason = False, "no counted call in the calibration"
        elif layer.name in within:
            quantized, reason = False, "among the most sensitive"
        else:
            quantized, reason = True, "below the budget"
        plans.append(
            LayerPlan(
                name=layer.name,
                kind=layer.kind,
                shape=layer.shape,
                quantized=quantized,
                scaled=quantized and config.scaled and can_scale(config.container, layer.kind),
                reason=reason,
                sensitivity=layer.sensitivity,
                impact=layer.impact,
            )
        )
    return tuple(plans)


def _forced(
    candidates: Sequence[Candidate], config: QuantizeConfig, preset: Sequence[str]
) -> dict[str, tuple[bool, str]]:
    """Return what is not the ranking's to decide: quantized or not, and why, by layer name."""
    keep = _matched(candidates, config.keep, "--keep")
    quantize = _matched(candidates, config.quantize, "--quantize")
    patterns = [re.compile(text) for text in preset]
    decided = {}
    for layer in candidates:
        obstacle = _obstacle(layer.kind, config)
        if layer.name in keep:
            decided[layer.name] = False, "--keep"
        elif layer.name in quantize:
            if obstacle:
                raise PlanError(
                    f"--quantize names layer {layer.name!r} ({layer.kind}), but {obstacle}: "
                    "choose another container, or drop the pattern."
                )
            decided[layer.name] = True, "--quantize"
        elif any(layer.matches(pattern) for pattern in patterns):
            decided[layer.name] = False, f"--keep-preset {config.keep_preset}"
        elif obstacle:
            decided[layer.name] = False, obstacle
    return decided


def _within_budget(
    candidates: Sequence[Candidate],
    free: Sequence[Candidate],
    forced: Mapping[str, tuple[bool, str]],
    config: QuantizeConfig,
    room: Callable[[Sequence[str]], float] | None,
) -> set[str]:
    """Return the names of the layers that the budget keeps."""
    budget, amount = config.budget
    by_layer = sorted(
        (layer for layer in candidates if layer.rank(config.sensitivity) is not None),
        key=lambda layer: (-(layer.rank(config.sensitivity) or 0.0), layer.name),
    )
    if budget == "keep_ratio":
        return {layer.name for layer in by_layer[: int(len(candidates) * amount)]}
    ranked = rank_by_size(free, config.sensitivity)
    if budget == "max_error":
        return _until_error(candidates, ranked, forced, amount)
    if budget == "keep_bytes":
        quantizable = sum(
            math.prod(layer.shape) for layer in candidates if not _obstacle(layer.kind, config)
        )
        return _fitting(ranked, lambda layer: math.prod(layer.shape), amount * quantizable)
    if room is None:
        raise PlanError("--target-size needs a file: a module in memory has none.")
    fp8 = [layer.name for layer in candidates if forced.get(layer.name, (True, ""))[0]]
    unknown = {layer.name for layer in candidates} - {layer.name for layer in free} - set(forced)
    fp8 = [name for name in fp8 if name not in unknown]
    left = room(fp8)
    if left < 0:
        raise PlanError(
            f"--target-size {config.target_size} cannot be met: the file is {-left:,.0f} bytes "
            "larger even with every layer FP8 that options allow. Give a larger size."
        )
    return _fitting(ranked, lambda layer: layer.kept_bytes, left)


def rank_by_size(candidates: Sequence[Candidate], sensitivity: str) -> list[Candidate]:
    """Return layers in the order in which byte budgets keep them, ties by name.

    By variance, as the seed ranks; or by impact per weight, since what is bought is bytes.
    """

    def key(layer: Candidate) -> tuple[float, str]:
        rank = layer.rank(sensitivity) or 0.0
        size = math.prod(layer.shape) if sensitivity == "impact" else 1
        return -rank / size, layer.name

    return sorted(candidates, key=key)


def _fitting(
    ranked: Sequence[Candidate], cost: Callable[[Candidate], float], amount: float
) -> set[str]:
    """Walk the whole ranking and take each layer that still fits."""
    taken = set()
    for layer in ranked:
        if cost(layer) <= amount:
            amount -= cost(layer)
            taken.add(layer.name)
    return taken


def _until_error(
    candidates: Sequence[Candidate],
    ranked: Sequence[Candidate],
    forced: Mapping[str, tuple[bool, str]],
    limit: float,
) -> set[str]:
    """Keep layers in order until the impacts of the others add up to `limit` at most."""
    fixed = [layer.impact or 0.0 for layer in candidates if forced.get(layer.name, (False, ""))[0]]
    if math.fsum(fixed) > limit:
        raise PlanError(
            f"--max-error {limit:g} cannot be met: the layers that --quantize names have an impact "
            f"of {math.fsum(fixed):.3g} together."
        )
    for number in range(len(ranked) + 1):
        if math.fsum([*fixed, *(layer.impact or 0.0 for layer in ranked[number:])]) <= limit:
            return {layer.name for layer in ranked[:number]}
    return {layer.name for layer in ranked}


def _obstacle(kind: str, config: QuantizeConfig) -> str:
    """Say why layers of this kind cannot be quantized; empty where they can."""
    if kind == "conv2d" and config.conv == "16bit":
        return "--conv 16bit"
    if not can_quantize(config.container, kind, config.scaled):
        return f"container {config.container} holds no FP8 {kind}"
    return ""


def _matched(candidates: Iterable[Candidate], patterns: Sequence[str], flag: str) -> set[str]:
    """Return the names of the layers that the patterns match; each must match at least one."""
    names: set[str] = set()
    for text in patterns:
        pattern = re.compile(text)
        found = {layer.name for layer in candidates if layer.matches(pattern)}
        if not found:
            raise PlanError(
                f"{flag} {text!r} matches no layer; layer names look like "
                f"{next((layer.name for layer in candidates), 'none')!r}: run `plan` to list them."
            )
        names |= found
    return names
