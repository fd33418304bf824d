"""A module in memory, quantized as a plan says and saved."""

from __future__ import annotations

import json
import os
from typing import Any

import torch
from torch import Tensor, nn

import hswq
from hswq import kernels
from hswq.calibration import Calibration
from hswq.errors import InputError, PlanError
from hswq.formats.containers import (
    FORMAT_VERSION,
    QuantizedLayer,
    container_metadata,
    extra_specs,
    extra_tensors,
    marker_tensors,
)
from hswq.formats.dtypes import DTYPE_NAMES
from hswq.formats.e4m3 import E4M3_MAX
from hswq.formats.writer import CheckpointWriter, TensorSpec
from hswq.loader.load import tell_diffusers
from hswq.loader.modules import Conv2d, Linear, fp8_layer
from hswq.plan import LayerPlan, Plan, static_input_scale
from hswq.search import scale_of
from hswq.search.compensated import Factors, round_weight


def quantize_module(
    module: nn.Module,
    plan: Plan,
    calibration: Calibration | None = None,
    *,
    backend: str | None = None,
) -> nn.Module:
    """Replace the layers that a plan quantizes by hswq.Linear and hswq.Conv2d.

    The bytes are those that `quantize_checkpoint` writes for the same weights and the same plan.

    Args:
        module: the module that `make_plan` was called with.
        plan: its plan.
        calibration: what the plan was made from; needed where it asks for FP8 activations, or for
            compensated rounding: then observed with gram=True.
        backend: of the kernels.
    Returns:
        The module, changed in place.
    Raises:
        PlanError: the plan names a layer that the module lacks, or was made without a search; the
            module is then as it was.
        InputError: the plan asks for FP8 activations, and the statistics hold no ranges of inputs,
            or for compensated rounding, and they hold no Gram matrices.
    """
    compensated = plan.options.get("rounding") == "compensated"
    if compensated and (calibration is None or not calibration.grams):
        raise InputError(
            "the plan asks for compensated rounding: pass the calibration that it was made from, "
            "observed with gram=True."
        )
    input_scales = _input_scales(plan, calibration)
    found = {layer.name: _layer_of(module, layer) for layer in plan.quantized}
    for layer in plan.quantized:
        part = found[layer.name]
        weight = part.weight.detach()
        amax = float(layer.amax) if layer.scaled and layer.amax is not None else E4M3_MAX
        scale = scale_of(amax) if layer.scaled else 1.0
        bias = part.bias
        gram = calibration.grams.get(layer.name) if compensated and calibration else None
        if gram is None:
            codes = kernels.quantize_e4m3(weight, amax, scale, backend=backend)
        else:
            centred = bool(plan.options.get("bias_correction")) and bias is not None
            factors = Factors(gram, centred, float(plan.options["damping"]))
            sweeps = int(plan.options.get("sweeps", 0))
            rounded = round_weight(weight, factors, amax, scale, sweeps=sweeps, backend=backend)
            codes = rounded.codes.to(weight.device)
            if centred and bias is not None:
                shifted = bias.detach().double() + rounded.shift.to(bias.device)
                bias = shifted.to(bias.dtype)
        values = torch.tensor([scale], dtype=torch.float32, device=weight.device)
        input_scale = input_scales.get(layer.name)
        if input_scale is not None:
            input_scale = input_scale.to(weight.device)
        module.set_submodule(layer.name, fp8_layer(part, codes, values, bias, input_scale))
    tell_diffusers(module)
    return module


def dequantize_module(module: nn.Module) -> nn.Module:
    """Replace the FP8 layers of a module by plain ones that hold their decoded weights.

    In float32 the numbers are the same; it takes four times the memory, and is quicker on CPUs.

    Returns:
        The module, changed in place.
    """
    for name, part in list(module.named_modules()):
        if isinstance(part, (Linear, Conv2d)):
            module.set_submodule(name, part.to_float())
    return module


def _input_scales(plan: Plan, calibration: Calibration | None) -> dict[str, Tensor]:
    """Return the scale of each quantized layer's inputs that has one."""
    if plan.options.get("activations") != "fp8":
        return {}
    if calibration is None:
        raise InputError(
            "the plan asks for FP8 activations: pass the calibration that it was made from."
        )
    found = {layer.name: static_input_scale(calibration, layer.name) for layer in plan.quantized}
    return {
        name: torch.tensor(scale, dtype=torch.float32, device="cpu")
        for name, scale in found.items()
        if scale is not None
    }


def _layer_of(module: nn.Module, layer: LayerPlan) -> nn.Linear | nn.Conv2d:
    try:
        part = module.get_submodule(layer.name)
    except AttributeError as error:
        raise PlanError(
            f"the plan quantizes layer {layer.name!r}, which {type(module).__name__} lacks: make "
            "the plan for this module."
        ) from error
    is_fp8 = isinstance(part, (Linear, Conv2d))
    if (
        is_fp8
        or not isinstance(part, (nn.Linear, nn.Conv2d))
        or tuple(part.weight.shape) != layer.shape
    ):
        raise PlanError(
            f"the plan quantizes {layer.name!r} as a {layer.kind} {list(layer.shape)}; the module "
            f"has a {type(part).__name__} there that does not fit: make the plan for this module."
        )
    if layer.scaled and layer.amax is None:
        raise PlanError(f"the plan holds no amax for layer {layer.name!r}: make it with a search.")
    return part


def save_quantized(
    module: nn.Module, path: str | os.PathLike[str], container: str = "hswq"
) -> None:
    """Write the state dict of a module with FP8 layers to a file that `load_quantized` reads.

    The file appears under its name only when it is complete.

    Args:
        module: holds hswq.Linear or hswq.Conv2d; its tensors lie on any device but meta.
        path: the .safetensors file to write; an existing one is replaced at the end.
        container: one of hswq.formats.CONTAINERS.
    Raises:
        InputError: the container cannot hold one of the layers or its scale, or the file cannot be
            written.
    """
    layers = {
        name: part for name, part in module.named_modules() if isinstance(part, (Linear, Conv2d))
    }
    if not layers:
        raise InputError(
            f"{type(module).__name__} has no FP8 layer: quantize it first, hswq.quantize_module."
        )
    planned = {name: _planned(name, part, container) for name, part in layers.items()}
    codes = {layer.key for layer in planned.values()}
    scales = {f"{name}.{leaf}" for name in layers for leaf in ("scale", "input_scale")}
    state = {name: value for name, value in module.state_dict().items() if name not in scales}
    specs = [
        TensorSpec(
            name, "F8_E4M3" if name in codes else DTYPE_NAMES[value.dtype], tuple(value.shape)
        )
        for name, value in state.items()
    ]
    specs += extra_specs(container, planned.values(), "")
    metadata = {
        **container_metadata(container, planned.values()),
        "hswq.format_version": FORMAT_VERSION,
        "hswq.version": hswq.__version__,
    }
    with CheckpointWriter(path, specs, len(json.dumps(metadata).encode())) as writer:
        for name, value in {**state, **marker_tensors(container, "")}.items():
            writer.write(name, value)
        for name, part in layers.items():
            extra = extra_tensors(container, planned[name], part.scale, _input_scale(part))
            for key, value in extra.items():
                writer.write(key, value)
        writer.commit(metadata)


def _planned(name: str, part: Linear | Conv2d, container: str) -> QuantizedLayer:
    is_linear = isinstance(part, Linear)
    is_plain = part.scale.numel() == 1 and float(part.scale) == 1.0
    return QuantizedLayer(
        f"{name}.weight",
        "linear" if is_linear else "conv2d",
        tuple(part.weight.shape),
        # Where a scale is stored in any case, it may as well be 1.
        scaled=not is_plain or container == "legacy",
        per_row=part.scale.numel() > 1,
        static_input=part.input_scale is not None,
    )


def _input_scale(part: Any) -> Tensor | None:
    scale: Tensor | None = part.input_scale
    return scale
