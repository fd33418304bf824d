"""The traced map against diffusers' own loader, and what does not map."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from diffusers import UNet2DConditionModel
from diffusers.loaders import single_file_utils

from benchmarks import ldm_layout, make_checkpoint
from hswq.errors import InputError
from hswq.formats.reader import Checkpoint
from hswq.models.denoiser import load_denoiser
from hswq.models.detect import detect
from hswq.models.fingerprint import fingerprint
from hswq.models.trace import trace_map
from tests.checkpoints import UNET_PREFIX, write_header_only, write_tiny_sdxl

CPU = torch.device("cpu")


def traced(path: Path, pipeline_dir: Path | None):
    with Checkpoint.open(path) as checkpoint:
        return trace_map(checkpoint, detect(checkpoint), pipeline_dir)


def loaded_state(path: Path, pipeline_dir: Path, dtype: torch.dtype = torch.float32):
    """The UNet's state dict, loaded through the map."""
    config = json.loads((pipeline_dir / "unet" / "config.json").read_text())
    with Checkpoint.open(path) as checkpoint:
        model_map = trace_map(checkpoint, detect(checkpoint), pipeline_dir)
        return load_denoiser(checkpoint, model_map, config, dtype, CPU).state_dict()


def assert_equal_states(ours, theirs):
    assert ours.keys() == theirs.keys()
    assert [name for name in ours if not torch.equal(ours[name], theirs[name])] == []


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
def test_single_file_loads_as_diffusers_loads_it(tmp_path, pipeline_dir, dtype):
    """A weight would sit in the wrong module, or be changed on the way."""
    path = write_tiny_sdxl(tmp_path / "model.safetensors", dtype=dtype, seed=1)
    theirs = UNet2DConditionModel.from_single_file(
        str(path), config=str(pipeline_dir), subfolder="unet", local_files_only=True, dtype=dtype
    )
    assert_equal_states(loaded_state(path, pipeline_dir, dtype), theirs.state_dict())


def test_folder_loads_as_diffusers_loads_it(folder):
    """The identity map of diffusers' own layout would miss a name."""
    theirs = UNet2DConditionModel.from_pretrained(folder / "unet", local_files_only=True)
    ours = loaded_state(folder, folder, theirs.dtype)
    assert_equal_states(ours, theirs.state_dict())


def test_unet_only_file_without_prefix_loads_the_same_weights(single_file, unet_file, pipeline_dir):
    """The converter finds no key without the prefix of full checkpoints."""
    ours = loaded_state(unet_file, pipeline_dir)
    assert_equal_states(ours, loaded_state(single_file, pipeline_dir))
    sources = traced(unet_file, pipeline_dir).sources
    assert sources["conv_in.weight"][0].key == "input_blocks.0.0.weight"


def test_lone_file_in_diffusers_layout_loads(tmp_path, folder, pipeline_dir):
    """A UNet file of diffusers taken out of its folder would not be recognized."""
    path = tmp_path / "lone.safetensors"
    path.write_bytes((folder / "unet/diffusion_pytorch_model.safetensors").read_bytes())
    assert_equal_states(loaded_state(path, pipeline_dir), loaded_state(folder, folder))


def test_component_folder_brings_its_own_configuration(folder):
    """A diffusers component would be compared with SDXL's full-size configuration."""
    assert traced(folder / "unet", None).layout == "diffusers"


def test_configuration_of_something_else_beside_a_single_file_is_ignored(tmp_path, single_file):
    """A text encoder's config.json in a folder of models would be taken for the UNet's."""
    path = tmp_path / "model.safetensors"
    path.write_bytes(single_file.read_bytes())
    (tmp_path / "config.json").write_text('{"model_type": "clip_text_model"}')
    with pytest.raises(InputError, match="configuration of SDXL base"):
        traced(path, None)


def test_map_covers_every_layer_and_every_row_once(single_file, pipeline_dir):
    """A layer outside the map would silently stay as it was."""
    model_map = traced(single_file, pipeline_dir)
    unet = make_checkpoint.meta_module("unet", "tiny")
    layers = {
        name: tuple(module.weight.shape)
        for name, module in unet.named_modules()
        if isinstance(module, torch.nn.Linear | torch.nn.Conv2d)
    }
    assert {module.name: module.shape for module in model_map.modules} == layers
    assert model_map.sources.keys() == unet.state_dict().keys()
    units = model_map.units()
    assert len(units) == len(layers)
    with Checkpoint.open(single_file) as checkpoint:
        assert all(checkpoint.tensors[unit.key].shape == unit.shape for unit in units)
    assert all(unit.key == f"{UNET_PREFIX}{unit.name}.weight" for unit in units)


def test_second_trace_of_equal_headers_runs_no_converter(single_file, pipeline_dir, monkeypatch):
    """Calibrating and quantizing in one process would trace twice."""
    first = traced(single_file, pipeline_dir)
    monkeypatch.setattr(single_file_utils, "convert_ldm_unet_checkpoint", None)
    assert traced(single_file, pipeline_dir) == first


KEY = f"{UNET_PREFIX}input_blocks.1.0.in_layers.2"


def test_added_key_does_not_map(edited, pipeline_dir):
    """A weight that no module takes would be copied silently."""
    path = edited(lambda tensors: tensors.update({f"{KEY}.extra": torch.zeros(2)}))
    with pytest.raises(InputError, match=rf"1 keys that do not map: '{KEY}.extra'.*--pipeline DIR"):
        traced(path, pipeline_dir)


def test_removed_key_is_named(edited, pipeline_dir):
    """A module would keep its uninitialized weight."""
    path = edited(lambda tensors: tensors.pop(f"{KEY}.bias"))
    with pytest.raises(InputError, match=r"1 parameters have no key: .*resnets\.0\.conv1\.bias"):
        traced(path, pipeline_dir)


def test_removed_key_that_the_converter_needs_is_named(edited, pipeline_dir):
    """The converter's own KeyError would reach the user as a traceback."""
    path = edited(lambda tensors: tensors.pop(f"{UNET_PREFIX}label_emb.0.2.bias"))
    with pytest.raises(InputError, match=rf"'{UNET_PREFIX}label_emb.0.2.bias' is missing"):
        traced(path, pipeline_dir)


@pytest.mark.parametrize("shape", [(16, 16, 1, 1), (8, 16, 3, 3), (16,)], ids=str)
def test_misshapen_key_is_named_with_both_shapes(edited, pipeline_dir, shape):
    """A damaged tensor would end in an error of torch that names no file."""
    path = edited(lambda tensors: tensors.update({f"{KEY}.weight": torch.zeros(shape)}))
    with pytest.raises(InputError) as caught:
        traced(path, pipeline_dir)
    assert f"'{KEY}.weight' gives {list(shape)}, needed [16, 16, 3, 3]" in str(caught.value)


def test_model_of_another_size_points_to_pipeline(single_file):
    """A narrow SDXL would be refused with hundreds of shapes and no cure."""
    with pytest.raises(InputError) as caught:
        traced(single_file, None)
    text = str(caught.value)
    assert "does not fit the UNet configuration of SDXL base" in text
    assert text.count("gives") == 10
    assert "--pipeline DIR" in text


def test_pipeline_folder_without_unet_is_refused(single_file, tmp_path):
    """The shipped configuration would be used in place of the one asked for."""
    with pytest.raises(InputError, match=r"holds no 'unet/config\.json'"):
        traced(single_file, tmp_path)


def test_configuration_that_diffusers_cannot_build_is_refused(single_file, tmp_path):
    """diffusers' own traceback would reach the user."""
    (tmp_path / "unet").mkdir()
    (tmp_path / "unet/config.json").write_text('{"down_block_types": ["NoSuchBlock2D"]}')
    with pytest.raises(InputError, match="diffusers cannot build"):
        traced(single_file, tmp_path)


def test_keys_outside_the_denoiser_are_left_alone(edited, pipeline_dir):
    """Copies of the averaged weights, or a sampler's table, would be errors."""
    extra = {"model_ema.decay": torch.zeros(1), "denoiser.sigmas": torch.zeros(9)}
    assert traced(edited(lambda tensors: tensors.update(extra)), pipeline_dir).unmatched == ()


@pytest.mark.parametrize("shape", [(0,), ()], ids=str)
def test_markers_of_unet_only_files_are_unmatched_not_errors(
    edited, unet_file, pipeline_dir, shape
):
    """Every v-prediction UNet file would be refused for its marker."""
    path = edited(lambda tensors: tensors.update({"v_pred": torch.zeros(shape)}), unet_file)
    assert traced(path, pipeline_dir).unmatched == ("v_pred",)


ATTENTION = "input_blocks.4.1.transformer_blocks.0.attn1"


def fuse(tensors: dict[str, torch.Tensor]) -> None:
    parts = [tensors.pop(f"{UNET_PREFIX}{ATTENTION}.to_{letter}.weight") for letter in "qkv"]
    tensors[f"{UNET_PREFIX}{ATTENTION}.qkv.weight"] = torch.cat(parts)


def test_fused_weight_is_traced_to_its_rows(edited, single_file, pipeline_dir, monkeypatch):
    """A family with fused qkv would load keys as queries; here the converter is taught to split."""
    converter = single_file_utils.convert_ldm_unet_checkpoint

    def splitting(checkpoint, config):
        fused = checkpoint.pop(f"{UNET_PREFIX}{ATTENTION}.qkv.weight")
        for letter, rows in zip("qkv", fused.chunk(3), strict=True):
            checkpoint[f"{UNET_PREFIX}{ATTENTION}.to_{letter}.weight"] = rows
        return converter(checkpoint, config)

    plain_state = loaded_state(single_file, pipeline_dir)
    with Checkpoint.open(single_file) as checkpoint:
        plain = fingerprint(checkpoint, trace_map(checkpoint, detect(checkpoint), pipeline_dir))
    monkeypatch.setattr(single_file_utils, "convert_ldm_unet_checkpoint", splitting)
    path = edited(fuse)
    assert_equal_states(loaded_state(path, pipeline_dir), plain_state)
    with Checkpoint.open(path) as checkpoint:
        model_map = trace_map(checkpoint, detect(checkpoint), pipeline_dir)
        assert fingerprint(checkpoint, model_map) == plain
    (unit,) = [unit for unit in model_map.units() if unit.name == f"{ATTENTION}.qkv"]
    names = [module.name.rsplit(".", 1)[1] for module in unit.modules]
    assert (names, unit.rows) == (["to_q", "to_k", "to_v"], ((0, 32), (32, 64), (64, 96)))


def test_rows_used_twice_are_an_error(edited, pipeline_dir, monkeypatch):
    """Two modules fed by the same rows: writing one of them back would change the other."""
    converter = single_file_utils.convert_ldm_unet_checkpoint

    def doubling(checkpoint, config):
        converted = converter(checkpoint, config)
        converted["conv_out.bias"] = converted["conv_in.bias"][:4]
        return converted

    monkeypatch.setattr(single_file_utils, "convert_ldm_unet_checkpoint", doubling)
    # A key of its own inside the prefix keeps this trace apart from those in memory.
    path = edited(lambda tensors: tensors.update({f"{UNET_PREFIX}z": torch.zeros(1)}))
    with pytest.raises(InputError, match=r"3 keys that do not map: .*0\.0\.bias.*out\.2\.bias"):
        traced(path, pipeline_dir)


def test_full_size_checkpoint_has_794_units(tmp_path):
    """The shipped configuration would not be that of real SDXL checkpoints."""
    unet = make_checkpoint.meta_module("unet", "sdxl")
    shapes = {
        UNET_PREFIX + name: tuple(weight.shape)
        for name, weight in ldm_layout.unet_state(unet).items()
    }
    path = write_header_only(tmp_path / "full.safetensors", shapes)
    assert path.stat().st_size > 5_134_000_000
    model_map = traced(path, None)
    units = model_map.units()
    kinds = [unit.kind for unit in units]
    assert (len(units), kinds.count("linear"), kinds.count("conv2d")) == (794, 743, 51)
    assert len(model_map.sources) == 1680
