"""Transformers: the traced map against diffusers' own loader, on files of every layout."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import hswq
from hswq.errors import InputError
from hswq.formats.reader import Checkpoint
from hswq.models.denoiser import denoiser_config, load_denoiser
from hswq.models.detect import detect
from hswq.models.families import FAMILIES
from hswq.models.trace import trace_map
from tests.checkpoints import (
    flux_shapes,
    qwen_image_shapes,
    write_header_only,
    write_random,
    z_image_shapes,
)

PREFIX = "model.diffusion_model."
SHAPES = {"flux": flux_shapes, "z-image": z_image_shapes, "qwen-image": qwen_image_shapes}


def traced(path: Path) -> Any:
    with Checkpoint.open(path) as checkpoint:
        return trace_map(checkpoint, detect(checkpoint))


def through_the_map(path: Path) -> dict[str, Tensor]:
    """Load a single file's denoiser as hswq does."""
    with Checkpoint.open(path) as checkpoint:
        detection = detect(checkpoint)
        config, _ = denoiser_config(checkpoint, None, detection)
        model_map = trace_map(checkpoint, detection)
        module = load_denoiser(
            *(checkpoint, model_map, config, torch.float32, torch.device("cpu")),
            class_name=FAMILIES[detection.family].class_name,
        )
    return module.state_dict()


def by_hand(name: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """What some parameters must be, said in other words than the converter's."""
    if name == "flux":
        qkv = tensors["double_blocks.0.txt_attn.qkv.weight"].chunk(3)
        linear1 = tensors["single_blocks.0.linear1.weight"]
        width = linear1.shape[1]
        shift, scale = tensors["final_layer.adaLN_modulation.1.weight"].chunk(2)
        return {
            "transformer_blocks.0.attn.add_k_proj.weight": qkv[1],
            "single_transformer_blocks.0.attn.to_v.weight": linear1[2 * width : 3 * width],
            "single_transformer_blocks.0.proj_mlp.weight": linear1[3 * width :],
            # BFL stores shift before scale, diffusers scale before shift.
            "norm_out.linear.weight": torch.cat((scale, shift)),
            "transformer_blocks.0.attn.norm_q.weight": tensors[
                "double_blocks.0.img_attn.norm.query_norm.scale"
            ],
        }
    if name == "qwen-image":
        return tensors
    qkv = tensors["layers.1.attention.qkv.weight"].chunk(3)
    return {
        "layers.1.attention.to_q.weight": qkv[0],
        "layers.1.attention.to_v.weight": qkv[2],
        "all_final_layer.2-1.linear.weight": tensors["final_layer.linear.weight"],
        "context_refiner.0.attention.norm_k.weight": tensors[
            "context_refiner.0.attention.k_norm.weight"
        ],
    }


@pytest.mark.parametrize("prefix", ["", PREFIX], ids=["bare", "prefixed"])
@pytest.mark.parametrize("family", SHAPES)
def test_small_single_file_is_mapped_whole(family: str, prefix: str, tmp_path: Path) -> None:
    """Swapped or shifted rows keep every shape and ruin the image."""
    path = write_random(tmp_path / "x.safetensors", SHAPES[family](), prefix=prefix)
    found = through_the_map(path)
    tensors = {name.removeprefix(prefix): it.float() for name, it in load_file(path).items()}
    for name, expected in by_hand(family, tensors).items():
        assert torch.equal(found[name], expected), name
    used = {source.key for sources in traced(path).sources.values() for source in sources}
    unused = {prefix + name for name in FAMILIES[family].unused}
    assert used == {prefix + name for name in tensors} - unused


@pytest.mark.slow
@pytest.mark.parametrize("family", SHAPES)
def test_map_agrees_with_diffusers_own_loader(family: str, tmp_path: Path) -> None:
    """Every parameter, in the width that diffusers' converter is written for."""
    import diffusers

    options = {"width": 3072, "head": 128, "text": 64} if family == "flux" else {}
    path = write_random(tmp_path / "x.safetensors", SHAPES[family](**options))
    with Checkpoint.open(path) as checkpoint:
        config, _ = denoiser_config(checkpoint, None, detect(checkpoint))
    kind = getattr(diffusers, FAMILIES[family].class_name)
    kind.from_config(config).save_config(tmp_path / "transformer")
    theirs = kind.from_single_file(
        str(path), config=str(tmp_path), subfolder="transformer", torch_dtype=torch.bfloat16
    ).state_dict()
    ours = through_the_map(path)
    assert ours.keys() == theirs.keys()
    for name, value in theirs.items():
        assert torch.equal(ours[name], value.float()), name


@pytest.mark.parametrize(
    ("shapes", "modules", "fused"),
    [
        (flux_shapes(3072, 128, 19, 38, 4096), 504, 76),
        (z_image_shapes(3840, 128, 30, 2, 2560), 276, 34),
        (qwen_image_shapes(3072, 128, 60, 3584), 846, 0),
    ],
    ids=["flux", "z-image", "qwen-image"],
)
def test_full_size_models_are_mapped(
    shapes: dict[str, tuple[int, ...]], modules: int, fused: int, tmp_path: Path
) -> None:
    """All Linears of the real models are found, the fused ones as one unit of decision."""
    model_map = traced(write_header_only(tmp_path / "x.safetensors", shapes))
    assert len(model_map.modules) == modules
    units = model_map.units()
    assert sum(len({module.name for module in unit.modules}) > 1 for unit in units) == fused
    assert {unit.kind for unit in units} == {"linear"}


@pytest.mark.parametrize("family", SHAPES)
def test_file_that_lacks_a_block_is_refused(family: str, tmp_path: Path) -> None:
    """A part of a model must not pass for a smaller one."""
    shapes = SHAPES[family]()
    start = {
        "flux": "double_blocks.0.img_mlp.",
        "z-image": "layers.0.feed_forward.",
        "qwen-image": "transformer_blocks.0.img_mlp.",
    }[family]
    part = {name: shape for name, shape in shapes.items() if not name.startswith(start)}
    path = write_header_only(tmp_path / "x.safetensors", part)
    with pytest.raises(InputError, match=r"does not fit the transformer configuration"):
        traced(path)
    for name in ("txt_in.weight", "cap_embedder.1.weight"):
        shapes.pop(name, None)
    path = write_header_only(tmp_path / "y.safetensors", shapes)
    with pytest.raises(InputError, match=r"lacks a tensor that every"):
        traced(path)


def observed(family: str, path: Path) -> hswq.Calibration:
    """Statistics of random inputs to each layer, as a loop of the user's own gathers them."""
    with Checkpoint.open(path) as checkpoint:
        detection = detect(checkpoint)
        config, _ = denoiser_config(checkpoint, None, detection)
        model = load_denoiser(
            *(checkpoint, trace_map(checkpoint, detection), config),
            *(torch.float32, torch.device("cpu")),
            class_name=FAMILIES[family].class_name,
        )
    layers = [part for part in model.modules() if isinstance(part, nn.Linear)]
    with hswq.observe(model) as calibration, torch.no_grad():
        for number, layer in enumerate(layers):
            layer(
                torch.randn(4, layer.in_features, generator=torch.Generator().manual_seed(number))
            )
    return calibration


@pytest.mark.parametrize("container", ["comfy", "hswq"])
@pytest.mark.parametrize("family", SHAPES)
def test_quantized_file_loads_as_its_modules_quantized(
    family: str, container: str, tmp_path: Path
) -> None:
    """File and modules are one method: fused weights are split after the rounding, not before."""
    path = write_random(tmp_path / "x.safetensors", SHAPES[family](), prefix=PREFIX)
    calibration = observed(family, path)
    output = tmp_path / "out.safetensors"
    config = hswq.QuantizeConfig(scaled=True, container=container, keep_ratio=0.2, verify="full")
    report = hswq.quantize_checkpoint(path, output, config, calibration)
    assert report.plan.kept
    assert {layer.kind for layer in report.plan.layers} == {"linear"}
    loaded = hswq.load_transformer(output)
    exact = through_the_map(path)
    source = load_file(path)
    with Checkpoint.open(path) as checkpoint:
        sources = trace_map(checkpoint, detect(checkpoint)).sources
    planned = {f"{PREFIX}{layer.name}.weight": layer for layer in report.plan.layers}
    for name, part in loaded.named_modules():
        if not isinstance(part, nn.Linear):
            continue
        keys = {it.key for it in sources[f"{name}.weight"]}
        (layer,) = (planned[key] for key in keys)
        if layer.quantized and name in FAMILIES[family].dtype_modules:
            continue
        assert isinstance(part, hswq.Linear) == layer.quantized
        if not layer.quantized:
            assert torch.equal(part.weight.float(), exact[f"{name}.weight"])
            continue
        # One search for the whole fused weight.
        whole = source[keys.pop()]
        scale = torch.tensor(layer.amax / 448, dtype=torch.float32)
        codes = hswq.kernels.quantize_e4m3(whole, layer.amax, scale)
        expected = hswq.kernels.dequantize_e4m3(codes, scale, torch.float32)
        rows = torch.cat([expected[it.start : it.stop] for it in sources[f"{name}.weight"]])
        assert torch.equal(part.dequantize(), rows), name


INPUTS: dict[str, dict[str, Any]] = {
    "flux": {
        "hidden_states": torch.randn(1, 16, 64),
        "encoder_hidden_states": torch.randn(1, 8, 32),
        "pooled_projections": torch.randn(1, 24),
        "timestep": torch.tensor([0.5]),
        "guidance": torch.tensor([3.5]),
        "txt_ids": torch.zeros(8, 3),
        "img_ids": torch.zeros(16, 3),
    },
    "z-image": {
        "x": [torch.randn(16, 1, 8, 8)],
        "t": torch.tensor([0.5]),
        "cap_feats": [torch.randn(5, 32)],
    },
    "qwen-image": {
        "hidden_states": torch.randn(1, 16, 64),
        "encoder_hidden_states": torch.randn(1, 8, 32),
        "encoder_hidden_states_mask": torch.ones(1, 8, dtype=torch.bool),
        "timestep": torch.tensor([0.5]),
        "img_shapes": [(1, 4, 4)],
    },
}


@pytest.mark.parametrize("family", SHAPES)
@torch.no_grad()
def test_fp8_transformer_computes_what_its_dequantized_one_does(
    family: str, tmp_path: Path
) -> None:
    """Some models cast activations to the dtype of a weight: FP8 must not be taken for it."""
    path = write_random(tmp_path / "x.safetensors", SHAPES[family]())
    output = tmp_path / "out.safetensors"
    config = hswq.QuantizeConfig(scaled=True, container="hswq", keep_ratio=0.0)
    hswq.quantize_checkpoint(path, output, config, observed(family, path))
    model = hswq.load_transformer(output, dtype=torch.float32)
    assert sum(isinstance(part, hswq.Linear) for part in model.modules()) > 10
    found = model(**INPUTS[family], return_dict=False)[0]
    expected = model.dequantize()(**INPUTS[family], return_dict=False)[0]
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("family", "names"),
    [
        (
            "flux",
            {
                *("img_in", "txt_in", "final_layer.adaLN_modulation.1"),
                *(
                    f"{part}_in.{layer}_layer"
                    for part in ("time", "vector", "guidance")
                    for layer in ("in", "out")
                ),
            },
        ),
        ("z-image", {"t_embedder.mlp.0", "t_embedder.mlp.2", "cap_embedder.1"}),
        (
            "qwen-image",
            {
                *(f"time_text_embed.timestep_embedder.linear_{number}" for number in (1, 2)),
                "norm_out.linear",
            },
        ),
    ],
)
def test_peers_preset_names_layers_of_the_family(
    family: str, names: set[str], tmp_path: Path
) -> None:
    """A preset whose names match nothing protects nothing."""
    path = write_random(tmp_path / "x.safetensors", SHAPES[family](), prefix=PREFIX)
    config = hswq.QuantizeConfig(keep_ratio=0.0, keep_preset="peers")
    output = tmp_path / "out.safetensors"
    report = hswq.quantize_checkpoint(path, output, config, observed(family, path))
    assert {layer.name for layer in report.plan.kept} == names


def test_other_components_are_left_alone(tmp_path: Path) -> None:
    """All-in-one files of ComfyUI hold text encoders and VAE beside the transformer."""
    path = write_random(tmp_path / "x.safetensors", flux_shapes(), prefix=PREFIX)
    extra = {"vae.decoder.conv_in.weight": torch.ones(2, 2, 3, 3), "text.t5.w": torch.ones(3)}
    save_file({**load_file(path), **extra}, tmp_path / "y.safetensors")
    assert traced(tmp_path / "y.safetensors").sources == traced(path).sources
