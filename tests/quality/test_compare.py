"""Two files of one model, layer by layer."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import hswq
from hswq.driver import compare_files
from hswq.errors import InputError
from hswq.fast.__main__ import main
from tests.checkpoints import flux_shapes, write_random
from tests.tiny import Tiny


@pytest.fixture(scope="module")
def files(tiny: Tiny, tmp_path_factory) -> dict[str, Path]:
    """V1 and V2 of the tiny checkpoint."""
    folder = tmp_path_factory.mktemp("files")
    for name, options in (
        ("v1", {}),
        ("v2", {"scaled": True, "container": "hswq", "keep_ratio": 0.0}),
    ):
        output = folder / f"{name}.safetensors"
        hswq.quantize_checkpoint(tiny.checkpoint, output, tiny.config(**options))
    return {name: folder / f"{name}.safetensors" for name in ("v1", "v2")}


def test_against_the_source(tiny, files):
    """Every quantized layer, its weight error, and nothing else."""
    comparison = compare_files(tiny.checkpoint, files["v1"], tiny.stats)
    plan = hswq.Plan.from_dict(
        json.loads(hswq.formats.reader.Checkpoint.open(files["v1"]).metadata["hswq.plan"]), "file"
    )
    assert {layer.name for layer in comparison.layers} == {it.name for it in plan.quantized}
    source = load_file(tiny.checkpoint)
    written = load_file(files["v1"])
    calibration = tiny.calibration
    importance = {
        unit.name: calibration.importance(unit.modules[0].name)
        for unit in calibration.model_map.units()
    }
    for layer in comparison.layers:
        key = f"model.diffusion_model.{layer.name}.weight"
        exact = source[key].double()
        error = exact - written[key].double()
        expected = 10 * math.log10(exact.square().sum() / error.square().sum())
        assert layer.sqnr_db == pytest.approx(expected)
        assert (layer.first, layer.second, layer.codes_changed) == ("F16", "E4M3", None)
        channels = importance[layer.name].double()
        factor = channels.reshape(1, -1, *[1] * (exact.dim() - 2))
        weighted = (exact * factor).square().sum() / (error * factor).square().sum()
        # Importance is float32, and so are its products with weights.
        assert layer.weighted_sqnr_db == pytest.approx(float(10 * weighted.log10()), abs=1e-4)
        # Nobody has measured outputs with these codes.
        assert layer.output_sqnr_db is None
    assert comparison.others_changed == ()
    assert comparison.only_first == comparison.only_second == ()


def test_two_files_of_codes(files):
    """Kept in one and quantized in the other; codes changed; scales told."""
    comparison = compare_files(files["v1"], files["v2"])
    kinds = {(layer.first, layer.second) for layer in comparison.layers}
    assert kinds == {("E4M3", "E4M3 * scale"), ("F16", "E4M3 * scale")}
    ours, theirs = load_file(files["v1"]), load_file(files["v2"])
    for layer in comparison.layers:
        key = f"model.diffusion_model.{layer.name}.weight"
        if layer.first == "E4M3":
            codes = [it[key].view(torch.uint8) for it in (ours, theirs)]
            changed = (codes[0] != codes[1]).double().mean()
            assert layer.codes_changed == pytest.approx(float(changed))
        else:
            assert layer.codes_changed is None
        assert layer.weighted_sqnr_db is layer.output_sqnr_db is None


def test_equal_files_are_equal(files):
    """Infinite decibels must not become a figure, nor invalid JSON."""
    comparison = compare_files(files["v1"], files["v1"])
    assert all(layer.sqnr_db == math.inf for layer in comparison.layers)
    assert all(layer.codes_changed == 0.0 for layer in comparison.layers)
    content = json.loads(json.dumps(comparison.to_dict(), allow_nan=False))
    assert {layer["sqnr_db"] for layer in content["layers"]} == {None}


def test_other_tensors_are_compared_bit_for_bit(tiny, files, tmp_path):
    """A changed norm or bias would go unseen."""
    tensors = load_file(files["v1"])
    names = [key for key in tensors if key.endswith("in_layers.0.weight")][:2]
    tensors[names[0]] = tensors[names[0]] + 1
    removed = names[1].removeprefix("model.diffusion_model.")
    del tensors[names[1]]
    tensors["model.diffusion_model.extra"] = torch.ones(2)
    save_file(tensors, tmp_path / "x.safetensors")
    comparison = compare_files(files["v1"], tmp_path / "x.safetensors")
    assert comparison.others_changed == (names[0].removeprefix("model.diffusion_model."),)
    assert comparison.only_first == (removed,)
    assert comparison.only_second == ("extra",)


def test_prefix_is_no_difference(files, tmp_path):
    """The denoiser alone, as ComfyUI's users keep it, is the same model."""
    prefix = "model.diffusion_model."
    bare = {
        key.removeprefix(prefix): tensor
        for key, tensor in load_file(files["v1"]).items()
        if key.startswith(prefix)
    }
    save_file(bare, tmp_path / "bare.safetensors")
    comparison = compare_files(files["v1"], tmp_path / "bare.safetensors")
    assert {layer.sqnr_db for layer in comparison.layers} == {math.inf}
    assert not comparison.others_changed


def test_other_models_are_told(tiny, files, tmp_path):
    """A table of nonsense is worse than an error."""
    write_random(tmp_path / "flux.safetensors", flux_shapes())
    with pytest.raises(InputError, match="share no tensor"):
        compare_files(files["v1"], tmp_path / "flux.safetensors")
    tensors = load_file(files["v1"])
    key = next(key for key in tensors if key.endswith("ff.net.2.weight"))
    tensors[key] = tensors[key][:-1]
    save_file(tensors, tmp_path / "x.safetensors")
    with pytest.raises(InputError, match=r"they are files of different models"):
        compare_files(files["v1"], tmp_path / "x.safetensors")


def test_command_line(tiny, files, capfd):
    """The table of a terminal, and JSON."""
    arguments = ["compare", str(tiny.checkpoint), str(files["v2"]), "--stats", str(tiny.stats)]
    assert main([*arguments, "--quiet", "--json"]) == 0
    content = json.loads(capfd.readouterr().out)
    assert main(arguments) == 0
    text = capfd.readouterr().out
    assert all(layer["name"] in text for layer in content["layers"])
    assert f"{len(content['layers'])} layers hold codes" in text
