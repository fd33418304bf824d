"""Selection of the layers that stay 16-bit: ranking, budget, overrides."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
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
    """

    name: str
    aliases: tuple[str, ...]
    kind: str
    shape: tuple[int, ...]
    sensitivity: float | None

    def matches(self, pattern: re.Pattern[str]) -> bool:
        """Tell whether the pattern is found in one of the layer's names."""
        return any(pattern.search(name) for name in (self.name, *self.aliases))


def select_layers(
    candidates: Sequence[Candidate], config: QuantizeConfig, preset: Sequence[str] = ()
) -> tuple[LayerPlan, ...]:
    """Decide for each layer whether it is quantized.

    The int(N * keep_ratio) layers of largest output variance are kept (ties by name); a layer the
    container cannot hold, whose sensitivity is unknown, or which a preset names, is kept besides.
    `--quantize` and `--keep` overrule the ranking and the preset, `--keep` last.

    Args:
        candidates: every Linear and Conv2d of the denoiser, in the order of the model.
        config: keep_ratio, keep, keep_preset, quantize, container, conv and scaled are read.
        preset: the patterns of config.keep_preset; they need not match any layer.
    Returns:
        One decision a layer, in the order given, without amax.
    Raises:
        PlanError: a pattern matches no layer, or asks for one the container cannot hold.
    """
    ranked = sorted(
        (layer for layer in candidates if layer.sensitivity is not None),
        key=lambda layer: (-(layer.sensitivity or 0.0), layer.name),
    )
    budget = int(len(candidates) * config.effective_keep_ratio)
    most_sensitive = {layer.name for layer in ranked[:budget]}
    keep = _matched(candidates, config.keep, "--keep")
    quantize = _matched(candidates, config.quantize, "--quantize")
    patterns = [re.compile(text) for text in preset]
    in_preset = {it.name for it in candidates if any(it.matches(each) for each in patterns)}
    plans = []
    for layer in candidates:
        obstacle = _obstacle(layer.kind, config)
        if layer.name in keep:
            quantized, reason = False, "--keep"
        elif layer.name in quantize:
            if obstacle:
                raise PlanError(
                    f"--quantize names layer {layer.name!r} ({layer.kind}), but {obstacle}: "
                    "choose another container, or drop the pattern."
                )
            quantized, reason = True, "--quantize"
        elif layer.name in in_preset:
            quantized, reason = False, f"--keep-preset {config.keep_preset}"
        elif obstacle:
            quantized, reason = False, obstacle
        elif layer.sensitivity is None:
            quantized, reason = False, "no counted call in the calibration"
        elif layer.name in most_sensitive:
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
            )
        )
    return tuple(plans)


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
