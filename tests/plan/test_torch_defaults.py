"""What a caller made torch's default dtype and device changes no plan, no module and no file."""

from __future__ import annotations

import copy
import threading
from pathlib import Path

import pytest
import torch
from torch import nn

import hswq
from hswq.loader import dequantize_module
from hswq.models.defaults import plain_defaults
from tests.torch_defaults import DEFAULTS, default_dtype

CONFIG = hswq.QuantizeConfig(
    preset="best", keep_bytes=0.2, scaled=True, container="hswq", activations="fp8"
)


def model() -> nn.Module:
    generator = torch.Generator().manual_seed(0)
    layers = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Flatten(), nn.Linear(288, 16), nn.Linear(16, 4))
    for parameter in layers.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator).mul_(0.1)
    return layers.requires_grad_(False)


def quantized(module: nn.Module, x: torch.Tensor, folder: Path) -> dict[str, torch.Tensor]:
    """Do all that a loop of one's own does, and return what came out."""
    with hswq.observe(module, record=2, gram=True, input_max=True) as calibration:
        for _ in range(2):
            module(x)
    impact = calibration.measure_impact(module, CONFIG)
    plan = hswq.make_plan(module, calibration, CONFIG)
    calibration.save(folder / "stats.safetensors")
    result = hswq.quantize_module(copy.deepcopy(module), plan, calibration)
    hswq.save_quantized(result, folder / "fp8.safetensors")
    loaded = hswq.load_quantized(copy.deepcopy(module), folder / "fp8.safetensors")
    found = {
        "impact": torch.tensor(list(impact.values.values()), dtype=torch.float64, device="cpu"),
        "output": loaded(x),
        "decoded": dequantize_module(copy.deepcopy(loaded))(x),
        **{f"made.{name}": value for name, value in result.state_dict().items()},
        **{f"loaded.{name}": value for name, value in loaded.state_dict().items()},
    }
    for name in ("stats", "fp8"):
        data = bytearray((folder / f"{name}.safetensors").read_bytes())
        found[name] = torch.frombuffer(data, dtype=torch.uint8)
    return found


@pytest.mark.parametrize("name", DEFAULTS)
def test_loop_of_ones_own(name: str, tmp_path: Path) -> None:
    module = model()
    # More patches of a call than bfloat16 counts: 257 are 256 there.
    x = torch.randn(29, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    expected = quantized(module, x, tmp_path)
    with DEFAULTS[name]():
        found = quantized(module, x, tmp_path)
    assert expected.keys() == found.keys()
    assert any(key.endswith("input_scale") for key in found)
    for key, value in expected.items():
        assert value.dtype == found[key].dtype, key
        assert torch.equal(value, found[key]), key


def test_threads_that_overlap_give_back_what_the_first_found() -> None:
    """The default dtype is the process's: the second to enter would take ours for the caller's."""
    entered, left = threading.Event(), threading.Event()

    def first() -> None:
        with plain_defaults():
            entered.wait(60)
        left.set()

    with default_dtype(torch.float64):
        thread = threading.Thread(target=first)
        thread.start()
        while torch.get_default_dtype() != torch.float32:
            assert thread.is_alive()
        with plain_defaults():
            entered.set()
            assert left.wait(60)
            assert torch.get_default_dtype() == torch.float32
        thread.join()
        assert torch.get_default_dtype() == torch.float64
