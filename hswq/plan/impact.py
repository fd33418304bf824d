"""Measured impact: what quantizing one unit alone changes in the denoiser's output."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from hswq import kernels
from hswq.calibration import Calibration, Impact
from hswq.config import CalibrationConfig
from hswq.errors import InputError
from hswq.formats.containers import can_scale
from hswq.formats.e4m3 import E4M3_MAX
from hswq.models.offload import execution_device, parameter_of, replace_parameter
from hswq.plan.replay import Replay
from hswq.progress import Progress, no_progress
from hswq.search import search_amax
from hswq.search.compensated import Factors, round_weight

logger = logging.getLogger(__name__)

# Units are measured in this many interleaved rounds: late ones run faster than early ones, and an
# estimate of the time to come would else be wrong by half.
_ROUNDS = 8


@dataclass(frozen=True)
class Part:
    """What one layer of a unit becomes.

    Attributes:
        name: of the layer's module.
        weight: its weight as a reader of the file decodes it, float32.
        bias: its corrected bias; None where it stays.
    """

    name: str
    weight: Tensor
    bias: Tensor | None = None


class Rounder(Protocol):
    """Gives a unit's layers as they will be after quantization."""

    def __call__(self, unit: Sequence[str]) -> list[Part]: ...


def units_of(module: nn.Module, calibration: Calibration) -> list[tuple[str, ...]]:
    """Return the units of decision as names of layers: fused weights' layers together.

    Raises:
        InputError: the module has no Linear and no Conv2d.
    """
    layers = [
        name for name, part in module.named_modules() if isinstance(part, (nn.Linear, nn.Conv2d))
    ]
    if not layers:
        raise InputError(f"{type(module).__name__} has no nn.Linear and no nn.Conv2d to quantize.")
    model_map = calibration.model_map
    if model_map is not None and {spec.name for spec in model_map.modules} == set(layers):
        return [tuple(spec.name for spec in unit.modules) for unit in model_map.units()]
    return [(name,) for name in layers]


@torch.inference_mode(False)
def measure_impact(
    module: nn.Module,
    calibration: Calibration,
    config: CalibrationConfig,
    *,
    rounder: Rounder | None = None,
    progress: Progress = no_progress,
    save: Callable[[], None] | None = None,
    share: Callable[[Sequence[tuple[str, ...]]], list[tuple[str, ...]]] | None = None,
) -> Impact:
    """Quantize each unit alone, replay the recorded calls, and keep the change of the output.

    impact(u) = mean over calls of sum (y_u - y)^2 / sum y^2, y the module's output as it is and
    y_u with unit u quantized. Blocks that ran before the unit are not run again.

    Args:
        module: the denoiser that `calibration` observed; unchanged in the end.
        calibration: holds records; its `impact` is filled, and taken up again where an earlier
            measurement with the same options was interrupted.
        config: scaled, container, conv, the search and the rounding are read.
        rounder: gives the units quantized; None rounds the module's own weights as the options say.
        progress: called with ('impact', runs done, runs in all).
        save: called after every run with the measurement so far in `calibration.impact`.
        share: chooses some of the units that are yet to be measured. The measurement then stays
            partial, and `complete_impact` ends it when all parts are together.
    Returns:
        The impact of every layer; that of a fused weight is divided among its layers by size.
    Raises:
        InputError: no call was recorded, a call gives NaN, Inf or only zeros, compensated
            rounding is asked for and no Gram matrices were gathered, or the module was loaded in
            inference mode.
    """
    if any(value.is_inference() for value in chain(module.parameters(), module.buffers())):
        raise InputError(
            f"{type(module).__name__} holds tensors of torch.inference_mode(), whose changes torch "
            "does not follow: load and convert the module outside that mode."
        )
    if not calibration.records:
        raise InputError(
            "the calibration holds no recorded calls, which measuring impact needs: observe the "
            "module with record=4, or calibrate with --sensitivity impact."
        )
    config = config.settled(calibration.measured(codes=config.rounding != "nearest"))
    device = execution_device(module)
    layers = dict(module.named_modules())
    units = units_of(module, calibration)
    impact = calibration.impact
    options = impact_options(config)
    if impact is None or impact.options != options or impact.calls != len(calibration.records):
        impact = Impact({}, options, len(calibration.records))
    calibration.impact = impact
    if rounder is None:
        compensated = config.rounding == "compensated"
        rounder = (_Compensated if compensated else _Nearest)(layers, calibration, config)
    calls = len(calibration.records)
    mine = units
    if share is not None:
        mine = share([unit for unit in units if len(impact.partial.get(unit[0], ())) < calls])
    sums = {unit: list(impact.partial.get(unit[0], ())) for unit in mine}
    total = len(mine) * calls
    done = 0
    for number, call in enumerate(calibration.records):
        missing = [unit for unit in mine if len(sums[unit]) <= number]
        done += len(mine) - len(missing)
        if not missing:
            continue
        replay = Replay(module, call, [name for unit in units for name in unit], device)
        for unit in (u for start in range(_ROUNDS) for u in missing[start::_ROUNDS]):
            sums[unit].append(_change(replay, unit, layers, rounder))
            impact.partial[unit[0]] = tuple(sums[unit])
            done += 1
            if save is not None:
                save()
            progress("impact", done, total)
    if share is None:
        complete_impact(module, calibration)
    return impact


def complete_impact(module: nn.Module, calibration: Calibration) -> None:
    """End a measurement whose parts are all in `calibration.impact`.

    Raises:
        InputError: a unit was not measured in all calls.
    """
    impact, layers = calibration.impact, dict(module.named_modules())
    units = units_of(module, calibration)
    measured = {} if impact is None else impact.partial
    calls = len(calibration.records)
    missing = [unit[0] for unit in units if len(measured.get(unit[0], ())) != calls]
    if impact is None or missing:
        raise InputError(
            f"{len(missing)} layers have no measured impact ({', '.join(missing[:10])}): measure "
            "again."
        )
    sizes = {name: layers[name].weight.numel() for unit in units for name in unit}
    for unit in units:
        whole = sum(sizes[name] for name in unit)
        for name in unit:
            impact.values[name] = sizes[name] / whole * sum(measured[unit[0]]) / calls
    impact.partial.clear()


def impact_options(config: CalibrationConfig) -> dict[str, Any]:
    """Return the options that a measurement of impact depends on."""
    bins, candidates, refinements = config.search_settings
    options: dict[str, Any] = {"rounding": config.rounding, "scaled": config.scaled}
    if config.scaled:
        options |= {"container": config.container, "bins": bins}
        options |= {"candidates": candidates, "refinements": refinements}
    if config.rounding == "compensated":
        options |= config.compensation
    return options


def check_impact(calibration: Calibration, config: CalibrationConfig) -> None:
    """Refuse a ranking by impact that was not measured; warn of one measured for other options.

    Raises:
        InputError: the statistics hold no impact, or an unfinished measurement of it.
    """
    if config.sensitivity != "impact":
        return
    impact = calibration.impact
    if impact is None or not impact.values:
        found = "no measured impact" if impact is None else "an unfinished measurement of impact"
        raise InputError(
            f"the statistics hold {found}: run `calibrate --sensitivity impact` (again, with the "
            "same options, to go on with an unfinished one)."
        )
    # Earlier measurements told of fewer options.
    wanted = impact_options(config)
    options = {name: wanted.get(name) for name in impact.options}
    if impact.options != options:
        logger.warning(
            "the impact was measured with %s, and this plan is made with %s: the ranking is a "
            "guess; calibrate again with the plan's options",
            impact.options,
            options,
        )


def _change(
    replay: Replay, unit: Sequence[str], layers: Mapping[str, Any], rounder: Rounder
) -> float:
    if not any(map(replay.was_called, unit)):
        return 0.0
    with quantized(layers, rounder(unit)):
        return replay.change(unit)


@contextmanager
def quantized(layers: Mapping[str, Any], parts: Sequence[Part]) -> Iterator[None]:
    """Let layers have other weights and biases inside the block."""
    before = []
    try:
        for part in parts:
            layer = layers[part.name]
            for name, values in (("weight", part.weight), ("bias", part.bias)):
                if values is not None:
                    before.append((layer, name, replace_parameter(layer, name, values)))
        yield
    finally:
        for layer, name, values in before:
            replace_parameter(layer, name, values)


class _Nearest:
    """Rounds units to the nearest codepoints, as `quantize` does."""

    def __init__(
        self, layers: Mapping[str, Any], calibration: Calibration, config: CalibrationConfig
    ) -> None:
        self._layers = layers
        self._calibration = calibration
        self._config = config
        self._amax: dict[str, tuple[float, float]] = {}

    def __call__(self, unit: Sequence[str]) -> list[Part]:
        weights = [parameter_of(self._layers[name], "weight") for name in unit]
        amax, scale = self._threshold(unit, weights)
        parts = []
        for name, weight in zip(unit, weights, strict=True):
            codes = kernels.quantize_e4m3(weight, amax, scale, backend=self._config.backend)
            values = kernels.dequantize_e4m3(codes, scale, backend=self._config.backend)
            parts.append(Part(name, values))
        return parts

    def _threshold(self, unit: Sequence[str], weights: Sequence[Tensor]) -> tuple[float, float]:
        kind = "conv2d" if weights[0].dim() == 4 else "linear"
        if not self._config.scaled or not can_scale(self._config.container, kind):
            return E4M3_MAX, 1.0
        if unit[0] not in self._amax:
            bins, candidates, refinements = self._config.search_settings
            found = search_amax(
                torch.cat(list(weights)),
                self._calibration.importance(unit[0]),
                scaled=True,
                bins=bins,
                candidates=candidates,
                refinements=refinements,
                backend=self._config.backend,
                name=f"weight of layer {unit[0]!r}",
            )
            self._amax[unit[0]] = found.amax, found.scale
        return self._amax[unit[0]]


class _Compensated(_Nearest):
    """Rounds units by the Gram matrices of their inputs, as `quantize_module` does, and once."""

    def __init__(
        self, layers: Mapping[str, Any], calibration: Calibration, config: CalibrationConfig
    ) -> None:
        if not calibration.grams:
            raise InputError(
                "the calibration holds no Gram matrices, which compensated rounding needs: observe "
                "the module with gram=True."
            )
        super().__init__(layers, calibration, config)
        self._rounded: dict[str, tuple[Tensor, float, Tensor | None]] = {}

    def __call__(self, unit: Sequence[str]) -> list[Part]:
        if any(name not in self._calibration.grams for name in unit):
            return super().__call__(unit)
        weights = [parameter_of(self._layers[name], "weight") for name in unit]
        amax, scale = self._threshold(unit, weights)
        parts = []
        for name in unit:
            if name not in self._rounded:
                self._rounded[name] = self._round(name, amax, scale)
            codes, scale, bias = self._rounded[name]
            parts.append(Part(name, kernels.dequantize_e4m3(codes, scale), bias))
        return parts

    def _round(self, name: str, amax: float, scale: float) -> tuple[Tensor, float, Tensor | None]:
        layer, config = self._layers[name], self._config
        centred = config.bias_correction and layer.bias is not None
        factors = Factors(self._calibration.grams[name], centred, config.damping)
        rounded = round_weight(
            *(parameter_of(layer, "weight"), factors, amax, scale),
            sweeps=config.sweeps,
            backend=config.backend,
        )
        bias = parameter_of(layer, "bias").cpu().double() + rounded.shift if centred else None
        return rounded.codes, scale, None if bias is None else bias.float()
