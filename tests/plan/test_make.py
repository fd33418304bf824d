"""A plan for a module in memory, from a loop of the user's own."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import hswq
from hswq.errors import InputError, PlanError


def small_model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.SiLU(), nn.Flatten(), nn.Linear(8 * 36, 16), nn.Linear(16, 4)
    ).half()


def calibrated(model: nn.Module) -> hswq.Calibration:
    model = model.float()
    with hswq.observe(model) as calibration, torch.no_grad():
        model(torch.randn(2, 3, 8, 8))
    model.half()
    return calibration


def test_plan_of_a_module_counts_its_bytes() -> None:
    """FP8 saves one byte a weight of a 16-bit module and costs four a scale."""
    model = small_model()
    config = hswq.QuantizeConfig(scaled=True, container="hswq", keep_ratio=0.34)
    plan = hswq.make_plan(model, calibrated(model), config)
    source_bytes = sum(it.numel() * it.element_size() for it in model.state_dict().values())
    assert plan.source_bytes == source_bytes
    saved = sum(layer.numel for layer in plan.quantized) - 4 * len(plan.quantized)
    assert plan.predicted_bytes == source_bytes - saved
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
