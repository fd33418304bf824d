"""--activations fp8: ranges of inputs measured, merged, stored and used."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import nn

import hswq
from hswq.calibration import Calibration, LayerStatistics
from hswq.errors import InputError, OptionError
from hswq.plan import static_input_scale
from tests.tiny import Tiny, tiny_calibration_config

FULL = {"format": "float8_e4m3fn", "full_precision_matrix_mult": True}
ACTIVATIONS = {"format": "float8_e4m3fn"}


@pytest.fixture(scope="module")
def calibration(tiny: Tiny) -> Calibration:
    config = tiny_calibration_config(tiny.pipeline, activations="fp8")
    return hswq.calibrate_checkpoint(tiny.checkpoint, config)


def quantize(tiny: Tiny, path: Path, calibration: Calibration, **options: object) -> Path:
    config = hswq.QuantizeConfig(pipeline=str(tiny.pipeline), activations="fp8", **options)
    hswq.quantize_checkpoint(tiny.checkpoint, path, config, calibration)
    return path


def statistics(largest: float | None, mean: float = 1.0) -> Calibration:
    sums = torch.full((4,), int(mean * 2**32), dtype=torch.int64)
    layer = LayerStatistics("linear", (3, 4), 1, 1, 0, 0, 0, sums, input_max=largest)
    return Calibration({"a": layer})


@torch.no_grad()
def test_observer_finds_the_largest_finite_input() -> None:
    """Too small a range clips activations; one overflow must not make it infinite."""
    model = nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2))
    inputs = [torch.randn(5, 4), -9.0 * torch.rand(2, 4), torch.full((1, 4), torch.inf)]
    with hswq.observe(model, input_max=True) as calibration:
        for x in inputs:
            model(x)
    assert calibration.input_max("0") == float(torch.cat(inputs[:2]).abs().max())
    with hswq.observe(model) as without:
        model(inputs[0])
    assert without.input_max("0") is None


def test_ranges_merge_exactly_and_are_kept_in_the_file(tmp_path: Path) -> None:
    """Runs shared out over machines give the file of one."""
    one, other = statistics(2.5), statistics(np.float32(1e-3).item())
    other.samples = (1,)
    for merged in (one.merge(other), other.merge(one)):
        assert merged.input_max("a") == 2.5
        merged.save(tmp_path / "s.safetensors")
        assert Calibration.load(tmp_path / "s.safetensors").input_max("a") == 2.5
    # Half a range is none.
    assert one.merge(dataclasses.replace(statistics(None), samples=(1,))).input_max("a") is None
    with pytest.raises(InputError, match="largest input is nan"):
        statistics(float("nan"))


def test_outlier_tokens_leave_a_layer_without_a_scale() -> None:
    """One scale for tokens of 6.6e4 and of 10 would leave the latter with a bit or two."""
    assert static_input_scale(statistics(6.6e4, mean=8.0), "a") is None
    scale = static_input_scale(statistics(50.0, mean=0.8), "a")
    assert scale == float(np.float32(50.0 / 448))
    assert static_input_scale(statistics(0.0, mean=0.0), "a") is None
    with pytest.raises(InputError, match="calibrate again with --activations fp8"):
        static_input_scale(statistics(None), "a")


@pytest.mark.parametrize("scaled", [False, True], ids=["v1", "v2"])
def test_comfy_file_has_input_scales_and_no_flag(
    tiny: Tiny, tmp_path: Path, calibration: Calibration, scaled: bool
) -> None:
    """Without a scale and a flag ComfyUI clips the activations at 448."""
    # One layer with outliers keeps its flag.
    outlier = next(name for name in calibration.modules if name.endswith("attn1.to_q"))
    layers = dict(calibration.modules)
    layers[outlier] = dataclasses.replace(layers[outlier], input_max=1e9)
    changed = dataclasses.replace(calibration, modules=layers)
    path = quantize(tiny, tmp_path / "x.safetensors", changed, scaled=scaled, keep_ratio=0.0)
    tensors = load_file(path)
    with safe_open(path, "pt") as file:
        stored = json.loads(file.metadata()["_quantization_metadata"])["layers"]
    assert changed.model_map is not None
    linears = [unit for unit in changed.model_map.units() if unit.kind == "linear"]
    assert len(stored) == len(linears)
    for unit in linears:
        base, name = unit.key.removesuffix(".weight"), unit.modules[0].name
        marker = json.loads(tensors[f"{base}.comfy_quant"].numpy().tobytes())
        assert marker == stored[base] == (FULL if name == outlier else ACTIVATIONS)
        scale = tensors.get(f"{base}.input_scale")
        if name == outlier:
            assert scale is None
            continue
        assert (scale.dtype, scale.shape) == (torch.float32, ())
        largest = calibration.input_max(name)
        assert float(scale) == float(np.float32(np.float32(largest) / np.float32(448)))
    for unit in changed.model_map.units():
        if unit.kind == "conv2d":
            assert unit.key.removesuffix("weight") + "input_scale" not in tensors


@torch.no_grad()
def test_loader_computes_with_the_stored_scale(
    tiny: Tiny, tmp_path: Path, calibration: Calibration
) -> None:
    """On inputs like those of the calibration a static scale costs no more than FP8 does."""
    path = quantize(
        tiny, tmp_path / "x.safetensors", calibration, scaled=True, container="hswq", keep_ratio=0.0
    )
    unet = hswq.load_unet(path, "fp8", pipeline=tiny.pipeline, dtype=torch.float32)
    layers = [(name, part) for name, part in unet.named_modules() if isinstance(part, hswq.Linear)]
    assert sum(part.input_scale is not None for _, part in layers) > len(layers) / 2
    generator = torch.Generator().manual_seed(0)
    for name, part in layers:
        if part.input_scale is None:
            continue
        x = torch.randn(64, part.in_features, generator=generator)
        x *= calibration.input_max(name) / x.abs().max()
        exact = nn.functional.linear(x, part.dequantize(), part.bias)
        error = part(x) - exact
        assert float(10 * torch.log10(exact.square().sum() / error.square().sum())) >= 28.0, name
        # What lies beyond the calibrated range is clipped to it.
        assert torch.equal(part(8 * x.sign() * x.abs().max()), part(1e6 * x.sign()))


def test_module_in_memory_gets_the_same_scales(tmp_path: Path) -> None:
    """quantize_module needs the statistics for it, and says so."""
    model = nn.Sequential(nn.Linear(6, 4), nn.SiLU(), nn.Linear(4, 3))
    with hswq.observe(model, input_max=True) as calibration, torch.no_grad():
        model(torch.randn(5, 6))
    config = hswq.QuantizeConfig(scaled=True, activations="fp8", keep_ratio=0.0)
    plan = hswq.make_plan(model, calibration, config)
    with pytest.raises(InputError, match="pass the calibration"):
        hswq.quantize_module(model, plan)
    hswq.quantize_module(model, plan, calibration)
    for name in ("0", "2"):
        assert float(model[int(name)].input_scale) == static_input_scale(calibration, name)
    hswq.save_quantized(model, tmp_path / "x.safetensors", "comfy")
    assert load_file(tmp_path / "x.safetensors")["0.input_scale"].shape == ()


def test_statistics_without_ranges_are_refused(tiny: Tiny, tmp_path: Path) -> None:
    """Scales guessed from nothing would clip at random."""
    with pytest.raises(InputError, match="calibrate again with --activations fp8"):
        quantize(tiny, tmp_path / "x.safetensors", tiny.calibration)
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize(("container", "scaled"), [("plain", False), ("legacy", True)])
def test_containers_without_input_scales_are_refused(container: str, scaled: bool) -> None:
    """The scales would be left out in silence."""
    with pytest.raises(OptionError, match="holds no scales of inputs"):
        hswq.QuantizeConfig(activations="fp8", container=container, scaled=scaled)
