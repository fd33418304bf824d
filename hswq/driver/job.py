"""One output file before and while it is written: layers, specs, metadata, search and rounding."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

import hswq
from hswq import kernels
from hswq.calibration import Calibration, Codes
from hswq.calibration.codes import UnitCodes
from hswq.calibration.gram import MAX_COLUMNS
from hswq.config import BUDGETS, QuantizeConfig
from hswq.driver.source import Source
from hswq.errors import InputError
from hswq.formats.containers import (
    FORMAT_VERSION,
    QuantizedLayer,
    can_scale,
    container_metadata,
    extra_specs,
)
from hswq.formats.dtypes import DTYPES
from hswq.formats.e4m3 import E4M3_MAX
from hswq.formats.reader import TensorInfo
from hswq.formats.writer import CheckpointWriter, TensorSpec
from hswq.models.families import FAMILIES
from hswq.models.map import ModelMap, Unit
from hswq.plan import (
    Candidate,
    LayerPlan,
    Plan,
    check_impact,
    keep_preset,
    plan_options,
    select_layers,
    static_input_scale,
)
from hswq.quality.weights import output_sqnr_db
from hswq.search import AmaxResult, search_amax

QUANTIZABLE_DTYPES = ("F16", "BF16", "F32")
# The longest repr of a float64: metadata are reserved for it before the search knows the figures.
_LONGEST_FLOAT = 2.2250738585072014e-308


@dataclass(frozen=True)
class Job:
    """All that is known about one output file before the first weight is read."""

    source: Source
    calibration: Calibration
    config: QuantizeConfig
    units: dict[str, Unit]
    layers: dict[str, LayerPlan]
    specs: tuple[TensorSpec, ...]
    metadata_bytes: int
    device: torch.device
    codes: Codes | None = None

    @property
    def quantized_layers(self) -> tuple[QuantizedLayer, ...]:
        """The FP8 layers as the container sees them."""
        return tuple(
            QuantizedLayer(
                key,
                layer.kind,
                layer.shape,
                layer.scaled,
                static_input=self.input_scale(key) is not None,
            )
            for key, layer in self.layers.items()
            if layer.quantized
        )

    def input_scale(self, key: str) -> float | None:
        """Return the scale that is stored for the inputs of an FP8 layer, if one is.

        Raises:
            InputError: FP8 activations are asked for and the statistics hold no ranges of inputs.
        """
        unit = self.units[key]
        if self.config.activations != "fp8" or not can_scale(self.config.container, unit.kind):
            return None
        return static_input_scale(self.calibration, unit.modules[0].name)

    def plan(self, results: dict[str, AmaxResult], predicted_bytes: int) -> Plan:
        """Return the plan with what the search found so far."""
        return Plan(
            tuple(
                layer.with_search(results[key]) if key in results else layer
                for key, layer in self.layers.items()
            ),
            plan_options(self.config),
            self.source.source_bytes,
            predicted_bytes,
        )

    def metadata(self, plan: Plan) -> dict[str, str]:
        """Return the output's metadata: the source's own, the container's and `hswq.*`."""
        return {
            **self.source.checkpoint.metadata,
            **container_metadata(self.config.container, self.quantized_layers),
            "hswq.format_version": FORMAT_VERSION,
            "hswq.version": hswq.__version__,
            "hswq.calibration": _compact(
                {**self.calibration.settings, "samples": len(self.calibration.samples)}
            ),
            "hswq.plan": _compact(plan.to_dict()),
        }

    def search(self, key: str, weight: Tensor) -> AmaxResult:
        """Search the amax of one quantized layer; that of compensated codes is known."""
        if self.codes is not None:
            known = self.codes.units[key]
            return AmaxResult(known.amax, known.mse, known.max_abs, known.power)
        bins, candidates, refinements = self.config.search_settings
        layer, unit = self.layers[key], self.units[key]
        return search_amax(
            weight.to(self.device),
            self.calibration.importance(unit.modules[0].name),
            scaled=layer.scaled,
            bins=bins,
            candidates=candidates,
            refinements=refinements,
            backend=self.config.backend,
            name=f"layer {layer.name!r} ({key})",
        )

    def is_denoiser_float(self, info: TensorInfo) -> bool:
        """Say whether a tensor is one of the denoiser's, in 16 or 32 bit."""
        prefix = self.source.detection.prefix
        return info.name.startswith(prefix) and info.dtype in QUANTIZABLE_DTYPES

    def check_finite(self, key: str, weight: Tensor) -> None:
        """Refuse a copied tensor of the denoiser that holds NaN or Inf.

        FP8 layers are refused by their search.

        Raises:
            InputError: the weight is not finite.
        """
        # A sum of squares in float64 is finite where all values are.
        if not math.isfinite(
            float(kernels.moments(weight.to(self.device), backend=self.config.backend)[2])
        ):
            layer = self.layers.get(key)
            described = f"tensor {key!r}" if layer is None else f"layer {layer.name!r} ({key})"
            raise InputError(
                f"{described} {list(weight.shape)} holds NaN or Inf: "
                "the checkpoint is damaged or its dtype overflowed: export it again."
            )

    def scale(self, key: str, result: AmaxResult) -> float:
        """Return the scale that one FP8 layer is rounded and stored with; V1: 1.0."""
        return result.scale if self.layers[key].scaled else 1.0

    def encode(self, key: str, weight: Tensor, result: AmaxResult, start: int = 0) -> Tensor:
        """Return the codepoints of a weight's rows from `start` on.

        Nearest codes of V1 ignore the searched amax, which could only harm.
        """
        if self.codes is not None:
            return self.codes.read(key, start, start + len(weight))
        return kernels.quantize_e4m3(
            weight.to(self.device),
            result.amax if self.layers[key].scaled else E4M3_MAX,
            self.scale(key, result),
            backend=self.config.backend,
        ).cpu()

    def biases(self) -> dict[str, Tensor]:
        """Return the corrected biases of FP8 layers, in the dtypes of the source, by key."""
        if self.codes is None:
            return {}
        found = {}
        for layer in self.quantized_layers:
            bias = self.codes.bias(layer.key)
            if bias is not None:
                key = layer.key.removesuffix(".weight") + ".bias"
                found[key] = bias.to(self.source.checkpoint.tensors[key].torch_dtype)
        return found


def list_candidates(
    source: Source, model_map: ModelMap, calibration: Calibration | None
) -> list[Candidate]:
    """Return every layer of the denoiser, with its sensitivity where statistics are given.

    Raises:
        InputError: a layer's weight is of a dtype that cannot be quantized.
    """
    candidates = []
    for unit in model_map.units():
        dtype = source.checkpoint.tensors[unit.key].dtype
        if dtype not in QUANTIZABLE_DTYPES:
            raise InputError(
                f"layer {unit.name!r} ({unit.key}) of {source.checkpoint.path} is {dtype}; only "
                f"{', '.join(QUANTIZABLE_DTYPES)} can be quantized: convert it to one of them."
            )
        # A fused weight is decided on as a whole: all outputs that its rows make.
        rows = {module.name: module.shape[0] for module in unit.modules}
        candidates.append(
            Candidate(
                name=unit.name,
                aliases=tuple(module.name for module in unit.modules),
                kind=unit.kind,
                shape=unit.shape,
                sensitivity=None if calibration is None else calibration.joint_sensitivity(rows),
                impact=None if calibration is None else calibration.measured_impact(rows),
                kept_bytes=math.prod(unit.shape) * (DTYPES[dtype].itemsize - 1),
            )
        )
    return candidates


def smallest_output_bytes(source: Source, config: QuantizeConfig, model_map: ModelMap) -> int:
    """Return a lower bound of the output's size that no statistics can change.

    Every layer is FP8 that options and container allow, without scales and metadata.

    Raises:
        InputError: a layer's weight is of a dtype that cannot be quantized.
        PlanError: a pattern does not fit the layers.
    """
    candidates = [
        replace(layer, sensitivity=0.0) for layer in list_candidates(source, model_map, None)
    ]
    preset = keep_preset(FAMILIES[model_map.family], config)
    nothing: dict[str, Any] = {**dict.fromkeys(BUDGETS), "keep_ratio": 0.0}
    nothing["sensitivity"] = "variance"
    layers = select_layers(candidates, replace(config, **nothing), preset)
    fp8 = {
        unit.key for unit, layer in zip(model_map.units(), layers, strict=True) if layer.quantized
    }
    return CheckpointWriter.predict_file_bytes(_model_specs(source, fp8), 0)


def make_job(
    source: Source,
    config: QuantizeConfig,
    calibration: Calibration,
    model_map: ModelMap,
    device: torch.device,
    codes: Codes | None = None,
) -> Job:
    """Decide what happens to every layer, and lay out the output file.

    Raises:
        PlanError: an option does not fit the layers.
        InputError: the statistics lack what the options ask for.
    """
    check_impact(calibration, config)
    units = {unit.key: unit for unit in model_map.units()}
    candidates = list_candidates(source, model_map, calibration)

    def outline(layers: Sequence[LayerPlan]) -> Job:
        by_key = dict(zip(units, layers, strict=True))
        if codes is not None:
            by_key = {key: _with_codes(it, codes.units[key]) for key, it in by_key.items()}
        job = Job(source, calibration, config, units, by_key, (), 0, device, codes)
        fp8 = {layer.key for layer in job.quantized_layers}
        specs = _model_specs(source, fp8)
        specs += extra_specs(config.container, job.quantized_layers, model_map.prefix)
        longest = AmaxResult(_LONGEST_FLOAT, _LONGEST_FLOAT, _LONGEST_FLOAT, 1.0)
        upper_bound = job.metadata(job.plan(dict.fromkeys(fp8, longest), 10**19))
        size = len(json.dumps(upper_bound).encode())
        return replace(job, specs=tuple(specs), metadata_bytes=size)

    def room(layers: Sequence[LayerPlan]) -> float:
        job = outline(layers)
        size = CheckpointWriter.predict_file_bytes(job.specs, job.metadata_bytes)
        return config.budget[1] - size

    preset = keep_preset(FAMILIES[model_map.family], config)
    return outline(select_layers(candidates, config, preset, room))


def _with_codes(layer: LayerPlan, unit: UnitCodes) -> LayerPlan:
    """Return the decision with what is known of a layer's codes."""
    if not layer.quantized:
        return layer
    return replace(
        layer,
        rounding="compensated" if unit.compensated else "nearest",
        output_sqnr_db=output_sqnr_db(unit),
    )


def cast_file_bytes(source: Source, model_map: ModelMap) -> int:
    """Return the size of a file whose every layer is FP8, without scales and metadata."""
    keys = {unit.key for unit in model_map.units()}
    return CheckpointWriter.predict_file_bytes(_model_specs(source, keys), 0)


def _model_specs(source: Source, fp8: set[str]) -> list[TensorSpec]:
    """Return the specs of the source's own tensors, those of the keys `fp8` in FP8."""
    return [
        TensorSpec(info.name, "F8_E4M3" if info.name in fp8 else info.dtype, info.shape)
        for info in source.checkpoint.tensors.values()
    ]


def job_warnings(job: Job) -> list[str]:
    """Say what the reader of this file will meet."""
    found = []
    config, detection = job.config, job.source.detection
    if config.container == "comfy" and detection.layout == "diffusers":
        found.append(
            "ComfyUI drops the markers of a diffusers-layout UNet: there this file loads as plain "
            "FP8. Quantize the single-file checkpoint for ComfyUI."
        )
    if config.scaled and config.container == "hswq":
        found.append(
            "the hswq container holds scales that only hswq applies: other programs show a wrong "
            "image. Use --container comfy for ComfyUI."
        )
    dynamic = [
        layer.name
        for key, layer in job.layers.items()
        if layer.quantized and layer.kind == "linear" and job.input_scale(key) is None
    ]
    if config.activations == "fp8" and dynamic:
        found.append(
            f"{len(dynamic)} FP8 layers get no input scale, since a few of their tokens are far "
            f"larger than the others: {', '.join(dynamic[:10])}{' …' if len(dynamic) > 10 else ''}."
        )
    wide = [
        layer.name
        for layer in job.layers.values()
        if layer.quantized and math.prod(layer.shape[1:]) > MAX_COLUMNS
    ]
    if job.codes is not None and wide:
        found.append(
            f"{len(wide)} layers have more than {MAX_COLUMNS} columns and are compensated in "
            f"blocks of them: {', '.join(wide[:10])}{' …' if len(wide) > 10 else ''}."
        )
    nearest = [layer for layer in job.layers.values() if layer.rounding == "nearest"]
    # Read off the codes and not off the run that made them, which may have been another day's.
    for names, why in (
        (
            [layer.name for layer in nearest if layer.output_sqnr_db is None],
            "they have no usable Gram matrix (no finite inputs, or a grouped convolution)",
        ),
        (
            [layer.name for layer in nearest if layer.output_sqnr_db is not None],
            "their compensated codes were not better, or could not be computed",
        ),
    ):
        if names:
            found.append(
                f"{len(names)} layers are rounded to nearest, since {why}: "
                f"{', '.join(names[:10])}{' …' if len(names) > 10 else ''}."
            )
    uncounted = [
        layer.name
        for layer in job.layers.values()
        if layer.sensitivity is None and not layer.quantized
    ]
    if uncounted:
        found.append(
            f"{len(uncounted)} layers have no counted call in the statistics and are kept: "
            f"{', '.join(uncounted[:10])}{' …' if len(uncounted) > 10 else ''}."
        )
    return found


def _compact(data: Any) -> str:
    return json.dumps(data, separators=(",", ":"), ensure_ascii=False, sort_keys=True)
