"""A plan for a module in memory, from a loop of the user's own."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import hswq
from hswq.errors import InputError, PlanError
from hswq.quality.bench import Trajectory


def small_model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.SiLU(), nn.Flatten(), nn.Linear(8 * 36, 16), nn.Linear(16, 4)
    ).half()


def calibrated(model: nn.Module, input_max: bool = False) -> hswq.Calibration:
    model = model.float()
    with hswq.observe(model, input_max=input_max) as calibration, torch.no_grad():
        model(torch.randn(2, 3, 8, 8))
    model.half()
    return calibration


def state_bytes(module: nn.Module) -> int:
    return sum(it.numel() * it.element_size() for it in module.state_dict().values())


@pytest.mark.parametrize("activations", ["16bit", "fp8"])
@pytest.mark.parametrize("scaled", [False, True])
def test_plan_of_a_module_counts_its_bytes(scaled: bool, activations: str) -> None:
    """Who plans for a card's memory must get what was said."""
    model = small_model()
    config = hswq.QuantizeConfig(
        scaled=scaled, container="hswq", keep_ratio=0.34, activations=activations
    )
    calibration = calibrated(model, input_max=activations == "fp8")
    plan = hswq.make_plan(model, calibration, config)
    assert plan.source_bytes == state_bytes(model)
    assert plan.predicted_bytes == state_bytes(hswq.quantize_module(model, plan, calibration))
    assert len(plan.kept) == 1
    assert all(layer.sqnr_db is not None and layer.sqnr_db > 28 for layer in plan.quantized)
    assert all(layer.name in plan.table() for layer in plan.layers)


def test_plan_needs_statistics_of_the_same_module() -> None:
    """Statistics of another model would rank layers that are not there."""
    with pytest.raises(InputError):
        hswq.make_plan(small_model(), hswq.Calibration(), hswq.QuantizeConfig())


def test_preset_of_an_unknown_module_is_refused() -> None:
    """A preset that protects nothing must not pass for one that does."""
    model = torch.nn.Sequential(torch.nn.Linear(4, 3))
    with hswq.observe(model) as calibration, torch.no_grad():
        model(torch.randn(2, 4))
    config = hswq.QuantizeConfig(keep_preset="peers")
    with pytest.raises(PlanError, match=r"no --keep-preset peers for this model.*--keep"):
        hswq.make_plan(model, calibration, config)


@pytest.mark.parametrize("rounding", ["nearest", "compensated"])
def test_predicted_error_is_near_the_measured_one(rounding: str) -> None:
    """Users choose a budget by it: the impacts added up, as if layers erred independently."""
    torch.manual_seed(0)
    parts: list[nn.Module] = [nn.Conv2d(3, 16, 3, padding=1), nn.SiLU(), nn.Flatten(2)]
    parts += [nn.Linear(64, 48), nn.SiLU(), nn.Linear(48, 48), nn.SiLU(), nn.Linear(48, 8)]
    model = nn.Sequential(*parts).eval()
    with (
        torch.no_grad(),
        hswq.observe(model, gram=rounding == "compensated", record=4) as calibration,
    ):
        for _ in range(4):
            model(torch.randn(4, 3, 8, 8) + 0.5)
    options = {"rounding": rounding, "bias_correction": False, "sensitivity": "impact"}
    config = hswq.QuantizeConfig(**options, keep_bytes=0.3, container="hswq")
    calibration.measure_impact(model, config)
    plan = hswq.make_plan(model, calibration, config)
    assert plan.kept
    assert len(plan.quantized) > 1
    cpu = torch.device("cpu")
    calls = calibration.records
    with torch.no_grad():
        answers = tuple(call.run(model, cpu).double() for call in calls)
    quantized = hswq.quantize_module(copy.deepcopy(model), plan, calibration)
    measured = float(Trajectory(tuple(calls), answers).errors(quantized, cpu).mean())
    # Errors of layers that follow each other are not independent, but nearly so.
    assert plan.predicted_error is not None
    assert measured / 1.5 < plan.predicted_error < measured * 1.5
