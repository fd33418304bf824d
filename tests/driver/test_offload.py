"""Weights in main memory that visit the device layer by layer: slower, and the same bytes.

accelerate's hooks do the same with a CPU as the device as with a GPU: between calls the layers hold
nothing.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import hswq
from hswq.errors import OptionError
from hswq.models.offload import (
    execution_device,
    offload_layers,
    parameter_of,
    replace_parameter,
)
from tests.tiny import Tiny, tiny_calibration_config


@pytest.mark.slow
@pytest.mark.parametrize("preset", ["best", "seed"])
def test_offload_changes_no_byte(tiny: Tiny, tmp_path: Path, preset: str) -> None:
    """A 24-GB card must give the statistics, codes and impacts of an 80-GB one."""
    files = {}
    for name, given in (("plain", {}), ("offloaded", {"sequential_offload": True})):
        folder = tmp_path / name
        folder.mkdir()
        # With the seed's preset and impact the weights are rounded from the module's own.
        config = tiny_calibration_config(
            tiny.pipeline, preset=preset, sensitivity="impact", calls=1, **given
        )
        hswq.calibrate_checkpoint(tiny.checkpoint, config, folder / "s.safetensors")
        files[name] = {path.name: path.read_bytes() for path in folder.iterdir()}
    assert files["plain"] == files["offloaded"]


def test_parameters_of_an_offloaded_layer() -> None:
    """Its own parameters are on no device; values changed there would be lost at the next call."""
    layers = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Linear(4, 2))
    x, weight = torch.randn(3, 4), layers[1].weight.detach().clone()
    plain = layers(x)
    offload_layers(layers, torch.device("cpu"))
    assert layers[1].weight.is_meta
    assert execution_device(layers) == torch.device("cpu")
    assert torch.equal(parameter_of(layers[1], "weight"), weight)
    before = replace_parameter(layers[1], "weight", torch.zeros(2, 4, dtype=torch.float64))
    assert torch.equal(before, weight)
    assert torch.equal(
        layers(x), layers[1].bias.new_zeros(3, 2, device="cpu") + parameter_of(layers[1], "bias")
    )
    replace_parameter(layers[1], "weight", before)
    assert torch.equal(layers(x), plain)


def test_offloads_exclude_each_other() -> None:
    """One of them would be without effect."""
    with pytest.raises(OptionError, match="exclude each other"):
        hswq.CalibrationConfig(cpu_offload=True, sequential_offload=True)
