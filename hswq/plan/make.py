"""A plan for a module in memory."""

from __future__ import annotations

from torch import nn

from hswq.calibration import Calibration
from hswq.config import QuantizeConfig
from hswq.errors import PlanError
from hswq.models.families import FAMILIES
from hswq.models.family import Family
from hswq.plan.activations import static_input_scale
from hswq.plan.impact import check_impact
from hswq.plan.plan import Plan
from hswq.plan.select import Candidate, select_layers
from hswq.search import Layer, search_layers


def plan_options(config: QuantizeConfig) -> dict[str, object]:
    """Return the options that shape a plan, the search settings resolved."""
    bins, candidates, refinements = config.search_settings
    return {
        "scaled": config.scaled,
        "container": config.container,
        "conv": config.conv,
        "sensitivity": config.sensitivity,
        "rounding": config.rounding,
        **_budget(config),
        "keep": list(config.keep),
        "quantize": list(config.quantize),
        "bins": bins,
        "candidates": candidates,
        "refinements": refinements,
        # Absent otherwise, as in the files of earlier releases.
        **({} if config.keep_preset == "none" else {"keep_preset": config.keep_preset}),
        **({"bias_correction": True} if config.bias_correction else {}),
        **(
            {"damping": config.damping, "sweeps": config.sweeps}
            if config.rounding == "compensated"
            else {}
        ),
        **({"activations": "fp8"} if config.activations == "fp8" else {}),
    }


def _budget(config: QuantizeConfig) -> dict[str, float | str]:
    name, value = config.budget
    # As it was given: 4.5GB and not a number of bytes.
    return {name: value if config.target_size is None else config.target_size}


def keep_preset(family: Family | None, config: QuantizeConfig) -> tuple[str, ...]:
    """Return the patterns of `config.keep_preset` for a family.

    Raises:
        PlanError: a preset is asked for, and the family is unknown or has none of this name.
    """
    if config.keep_preset == "none":
        return ()
    if family is None or config.keep_preset not in family.keep_presets:
        raise PlanError(
            f"there is no --keep-preset {config.keep_preset} for this model: name the layers with "
            "--keep."
        )
    return family.keep_presets[config.keep_preset]


def _preset(module: nn.Module, config: QuantizeConfig) -> tuple[str, ...]:
    classes = {kind.__name__ for kind in type(module).__mro__}
    family = next((it for it in FAMILIES.values() if it.class_name in classes), None)
    return keep_preset(family, config)


def make_plan(module: nn.Module, calibration: Calibration, config: QuantizeConfig) -> Plan:
    """Decide what happens to every Linear and Conv2d of a module and search their amax.

    Args:
        module: the denoiser that `calibration` observed.
        calibration: statistics of the same module names.
        config: options of the plan, the search and the backend.
    Returns:
        The plan; `predicted_bytes` counts the module's state dict after quantization.
    Raises:
        PlanError: an option does not fit the layers.
        InputError: a weight cannot be quantized, or the statistics are of another module.
    """
    config = config.settled(calibration.measured(codes=config.rounding != "nearest"))
    modules = {
        name: part
        for name, part in module.named_modules()
        if isinstance(part, (nn.Linear, nn.Conv2d))
    }
    candidates = [
        Candidate(
            name=name,
            aliases=(),
            kind="linear" if isinstance(part, nn.Linear) else "conv2d",
            shape=tuple(part.weight.shape),
            sensitivity=calibration.sensitivity(name),
            impact=calibration.measured_impact([name]),
        )
        for name, part in modules.items()
    ]
    check_impact(calibration, config)
    bins, thresholds, refinements = config.search_settings
    selected = select_layers(candidates, config, _preset(module, config))
    wanted = [layer for layer in selected if layer.quantized]
    found = search_layers(
        (
            Layer(
                f"weight of layer {layer.name!r}",
                modules[layer.name].weight.detach(),
                calibration.importance(layer.name),
                layer.scaled,
            )
            for layer in wanted
        ),
        bins=bins,
        candidates=thresholds,
        refinements=refinements,
        backend=config.backend,
    )
    results = dict(zip((layer.name for layer in wanted), found, strict=True))
    source_bytes = sum(t.numel() * t.element_size() for t in module.state_dict().values())
    predicted_bytes = source_bytes
    for layer in wanted:
        weight = modules[layer.name].weight
        predicted_bytes -= weight.numel() * (weight.element_size() - 1)
        # Beside the codes hswq.Linear and hswq.Conv2d hold a scale, and maybe one of their inputs.
        predicted_bytes += 4
        if config.activations == "fp8" and static_input_scale(calibration, layer.name) is not None:
            predicted_bytes += 4
    layers = tuple(
        layer.with_search(results[layer.name]) if layer.quantized else layer for layer in selected
    )
    return Plan(layers, plan_options(config), source_bytes, predicted_bytes)
