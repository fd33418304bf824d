"""Selection of the layers that stay 16-bit: ranking, budget, overrides."""

from __future__ import annotations

import math
import re
from bisect import bisect_left
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction

from hswq.config import QuantizeConfig
from hswq.errors import PlanError
from hswq.formats.containers import can_quantize, can_scale
from hswq.plan.plan import LayerPlan

# What a decision of the budget is called.
KEPT_BY_BUDGET, BELOW_BUDGET = "among the most sensitive", "below the budget"
# Keeping a layer makes a file larger by its `kept_bytes`, and smaller by what is stored of an FP8
# one: scale, marker, their entries in the header, figures in the metadata. Less than this.
_FP8_EXTRA_BYTES = 2048


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

    @property
    def numel(self) -> int:
        """Number of weights."""
        return math.prod(self.shape)

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
    room: Callable[[Sequence[LayerPlan]], float] | None = None,
) -> tuple[LayerPlan, ...]:
    """Decide for each layer whether it is quantized.

    The budget goes to the layers that rank first, ties by name:

    - keep_ratio R: the int(N * R) layers of largest variance or impact.
    - keep_bytes R and target_size: the ranking, by variance or by impact per weight (for
      target_size per byte), is walked to its end, and each layer that still fits is kept; others
      are skipped.
    - max_error E: layers of most impact per weight are kept until the impacts of the others add up
      to E at most.

    A layer the container cannot hold, whose rank is unknown, or which a preset names, is kept
    besides. `--quantize` and `--keep` overrule the ranking and the preset, `--keep` last.

    Args:
        candidates: every Linear and Conv2d of the denoiser, in the order of the model.
        config: the budget, sensitivity, keep, keep_preset, quantize, container, conv and scaled are
            read.
        preset: the patterns of config.keep_preset; they need not match any layer.
        room: for target_size: how many bytes a file of these decisions leaves free; negative where
            it is larger.
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

    def decide(within: Collection[str]) -> tuple[LayerPlan, ...]:
        return tuple(_decision(layer, forced, within, config) for layer in candidates)

    return decide(_within_budget(candidates, free, forced, config, decide, room))


def _decision(
    layer: Candidate,
    forced: Mapping[str, tuple[bool, str]],
    within: Collection[str],
    config: QuantizeConfig,
) -> LayerPlan:
    """Return what happens to a layer when the budget keeps those `within` it."""
    if layer.name in forced:
        quantized, reason = forced[layer.name]
    elif layer.rank(config.sensitivity) is None:
        quantized, reason = False, "no counted call in the calibration"
    elif layer.name in within:
        quantized, reason = False, KEPT_BY_BUDGET
    else:
        quantized, reason = True, BELOW_BUDGET
    return LayerPlan(
        name=layer.name,
        kind=layer.kind,
        shape=layer.shape,
        quantized=quantized,
        scaled=quantized and config.scaled and can_scale(config.container, layer.kind),
        reason=reason,
        sensitivity=layer.sensitivity,
        impact=layer.impact,
    )


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
    decide: Callable[[Collection[str]], tuple[LayerPlan, ...]],
    room: Callable[[Sequence[LayerPlan]], float] | None,
) -> set[str]:
    """Return the names of the layers that the budget keeps."""
    budget, amount = config.budget
    by_layer = sorted(
        (layer for layer in candidates if layer.rank(config.sensitivity) is not None),
        key=lambda layer: (-(layer.rank(config.sensitivity) or 0.0), layer.name),
    )
    if budget == "keep_ratio":
        return {layer.name for layer in by_layer[: int(len(candidates) * amount)]}
    if budget == "target_size":
        if room is None:
            raise PlanError("--target-size needs a file: a module in memory has none.")
        by_byte = rank_by_size(free, config.sensitivity, lambda layer: layer.kept_bytes)
        return _filling(by_byte, lambda within: room(decide(within)), config)
    ranked = rank_by_size(free, config.sensitivity)
    if budget == "max_error":
        return _until_error(candidates, ranked, forced, amount)
    # The decimal text is meant: as a float, 0.29 of 100 is less than 29.
    left = Fraction(repr(float(amount))) * quantizable_weights(candidates, config)
    taken = set()
    for layer in ranked:
        if layer.numel <= left:
            left -= layer.numel
            taken.add(layer.name)
    return taken


def quantizable_weights(candidates: Iterable[Candidate], config: QuantizeConfig) -> int:
    """Return how many weights container and options could turn to FP8: keep_bytes is a share of it.

    Those of layers that `--keep`, `--quantize` or a preset decide on are among them.
    """
    return sum(layer.numel for layer in candidates if not _obstacle(layer.kind, config))


def rank_by_size(
    candidates: Sequence[Candidate],
    sensitivity: str,
    size: Callable[[Candidate], int] = lambda layer: layer.numel,
) -> list[Candidate]:
    """Return layers in the order in which byte budgets keep them, ties by name.

    By variance, as the seed ranks; or by impact per weight, or whatever else of it is bought.
    """

    def key(layer: Candidate) -> tuple[float, str]:
        rank = layer.rank(sensitivity) or 0.0
        return -rank / (max(1, size(layer)) if sensitivity == "impact" else 1), layer.name

    return sorted(candidates, key=key)


def _filling(
    ranked: Sequence[Candidate], room: Callable[[Collection[str]], float], config: QuantizeConfig
) -> set[str]:
    """Walk the whole ranking and keep each layer with which the file is still small enough.

    Files are laid out to know their sizes; so that few are, how many layers fit up to the next one
    that does not is found by doubling and bisection.
    """
    left = room(())
    if left < 0:
        raise PlanError(
            f"--target-size {config.target_size} cannot be met: the file is {-left:,.0f} bytes "
            "larger even with every layer FP8 that options allow. Give a larger size."
        )
    taken: list[str] = []
    names: list[str] = []

    def exceeds(count: int) -> bool:
        return room((*taken, *names[:count])) < 0

    rest = list(ranked)
    while rest:
        # Far too large ones need no file to be laid out.
        rest = [layer for layer in rest if layer.kept_bytes <= left + _FP8_EXTRA_BYTES]
        names = [layer.name for layer in rest]
        step = 1
        while step <= len(rest) and not exceeds(step):
            step *= 2
        between = range(step // 2 + 1, min(step, len(rest) + 1))
        fitting = step // 2 + bisect_left(between, True, key=exceeds)
        taken += names[:fitting]
        rest = rest[fitting + 1 :]
        left = room(taken) if fitting else left
    return set(taken)


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
