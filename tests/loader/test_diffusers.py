"""FP8 models in diffusers: built, saved, loaded again, sampled."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import hswq
from hswq.driver.demo import demo_folder
from hswq.errors import InputError
from hswq.models.quiet import quiet_libraries
from tests.tiny import Tiny

# Per layer, relative to the norm of its output: what another order of summation may change.
ACCUMULATION = 1e-3
LATENT_SIZE = 64


def raw(value: Tensor) -> Tensor:
    return value.detach().reshape(-1).view(torch.uint8)


def assert_equal_states(first: nn.Module, second: nn.Module) -> None:
    states = first.state_dict(), second.state_dict()
    assert states[0].keys() == states[1].keys()
    for name, value in states[0].items():
        assert value.dtype == states[1][name].dtype, name
        assert torch.equal(raw(value), raw(states[1][name])), name


@pytest.fixture(scope="module")
def fp8_file(tiny: Tiny, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("fp8") / "fp8.safetensors"
    # conv_in, which the tests look at, is one of the layers that are kept otherwise.
    options = {"scaled": True, "container": "hswq", "quantize": (r"input_blocks\.0\.0",)}
    hswq.quantize_checkpoint(tiny.checkpoint, path, tiny.config(**options))
    return path


def test_unet_goes_through_a_diffusers_folder(tiny: Tiny, fp8_file: Path, tmp_path: Path) -> None:
    """save_pretrained, from_pretrained and load_unet give back every bit, scales in float32."""
    from diffusers import UNet2DConditionModel

    unet = hswq.load_unet(fp8_file, pipeline=tiny.pipeline)
    assert unet.dtype == torch.float16
    unet.save_pretrained(tmp_path / "unet")
    config = json.loads((tmp_path / "unet" / "config.json").read_text())["quantization_config"]
    assert config["quant_method"] == "hswq"
    hswq.register_diffusers()
    # In another dtype: what is not FP8 follows it, codes and scales do not.
    other = UNet2DConditionModel.from_pretrained(tmp_path / "unet", torch_dtype=torch.bfloat16)
    assert other.dtype == torch.bfloat16
    assert other.conv_in.scale.dtype == torch.float32
    assert torch.equal(other.conv_in.scale, unet.conv_in.scale)
    same = UNet2DConditionModel.from_pretrained(tmp_path / "unet", torch_dtype=torch.float16)
    assert_equal_states(same, unet)
    assert_equal_states(hswq.load_unet(tmp_path / "unet"), unet)
    assert any(isinstance(part, hswq.Conv2d) for part in same.modules())


def test_model_changes_its_dtype(tiny: Tiny, fp8_file: Path) -> None:
    """diffusers refuses `.to(dtype)` for quantized models; these modules stay right under it."""
    unet = hswq.load_unet(fp8_file, pipeline=tiny.pipeline, dtype=torch.bfloat16)
    assert unet.dtype == torch.bfloat16
    assert unet.conv_in.weight.dtype == torch.float8_e4m3fn
    assert unet.conv_in.scale.dtype == torch.float32


def test_dequantized_model_holds_the_same_weights(tiny: Tiny, fp8_file: Path) -> None:
    """diffusers' `dequantize` gives a plain model back, for training or merging."""
    unet = hswq.load_unet(fp8_file, pipeline=tiny.pipeline, dtype=torch.float32)
    expected = unet.conv_in.dequantize()
    plain = unet.dequantize()
    assert type(plain.conv_in) is nn.Conv2d
    assert torch.equal(plain.conv_in.weight, expected)
    assert not any(isinstance(part, (hswq.Linear, hswq.Conv2d)) for part in plain.modules())


def test_16_bit_model_is_not_quantized_on_the_fly(tmp_path: Path) -> None:
    """`from_pretrained(quantization_config=...)` on a 16-bit folder would load noise."""
    from diffusers import UNet2DConditionModel

    from hswq.loader.diffusers_quantizer import HswqConfig

    hswq.register_diffusers()
    folder = demo_folder() / "unet"
    UNet2DConditionModel.from_config(UNet2DConditionModel.load_config(folder)).save_pretrained(
        tmp_path / "unet"
    )
    with pytest.raises(ValueError, match="pre-quantized"):
        UNet2DConditionModel.from_pretrained(tmp_path / "unet", quantization_config=HswqConfig())


def tiny_flux() -> Any:
    from diffusers import FluxTransformer2DModel

    torch.manual_seed(0)
    return FluxTransformer2DModel(
        patch_size=1,
        in_channels=16,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=32,
        pooled_projection_dim=32,
        axes_dims_rope=(4, 4, 8),
        guidance_embeds=True,
    ).eval()


def flux_inputs() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return {
        "hidden_states": torch.randn(1, 16, 16, generator=generator),
        "encoder_hidden_states": torch.randn(1, 8, 32, generator=generator),
        "pooled_projections": torch.randn(1, 32, generator=generator),
        "timestep": torch.tensor([0.5]),
        "guidance": torch.tensor([3.5]),
        "txt_ids": torch.zeros(8, 3),
        "img_ids": torch.zeros(16, 3),
    }


@torch.no_grad()
def test_transformer_goes_through_a_diffusers_folder(tmp_path: Path) -> None:
    """load_transformer builds the class that config.json names; its own '.scale' keys stay."""
    flux = tiny_flux()
    with hswq.observe(flux) as calibration:
        flux(**flux_inputs())
    plan = hswq.make_plan(flux, calibration, hswq.QuantizeConfig(scaled=True, container="hswq"))
    hswq.quantize_module(flux, plan)
    flux.save_pretrained(tmp_path / "flux")
    again = hswq.load_transformer(tmp_path / "flux")
    assert_equal_states(again, flux)
    assert torch.equal(again(**flux_inputs()).sample, flux(**flux_inputs()).sample)


def test_loader_of_the_other_kind_is_named(fp8_file: Path, tmp_path: Path) -> None:
    """UNets and transformers are two attributes of a pipeline."""
    with pytest.raises(InputError, match=r"\(sdxl\) is a UNet: load it with hswq\.load_unet"):
        hswq.load_transformer(fp8_file)


@pytest.fixture(scope="module")
def demo_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from hswq.driver.demo import run_demo

    folder = tmp_path_factory.mktemp("demo")
    run_demo(folder, "seed")
    return folder / "demo.v2.safetensors"


def demo_pipeline(unet: nn.Module) -> Any:
    from diffusers import StableDiffusionXLPipeline

    with quiet_libraries():
        pipeline = StableDiffusionXLPipeline.from_single_file(
            str(demo_folder() / "demo.safetensors"),
            config=str(demo_folder()),
            local_files_only=True,
            torch_dtype=torch.float32,
            unet=unet,
        )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def paint(unet: nn.Module) -> np.ndarray:
    prompt = (demo_folder() / "prompts.txt").read_text(encoding="utf-8").splitlines()[0]
    return demo_pipeline(unet)(
        prompt,
        height=LATENT_SIZE,
        width=LATENT_SIZE,
        num_inference_steps=10,
        generator=torch.Generator().manual_seed(0),
        output_type="np",
    ).images[0]


@pytest.mark.slow
def test_images_are_those_of_the_dequantized_weights(demo_file: Path) -> None:
    """What the V2 file shows is what its weights say, layer by layer and as an image."""
    load = {"pipeline": demo_folder(), "dtype": torch.float32}
    fp8, plain = (hswq.load_unet(demo_file, **load) for _ in range(2))
    plain = plain.dequantize()
    errors: dict[str, float] = {}

    def compare(name: str) -> Any:
        exact = plain.get_submodule(name)

        def hook(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
            expected = exact(*args)
            error = float((output - expected).norm() / expected.norm())
            errors[name] = max(errors.get(name, 0.0), error)

        return hook

    for name, part in fp8.named_modules():
        if isinstance(part, (hswq.Linear, hswq.Conv2d)):
            part.register_forward_hook(compare(name))
    image = paint(fp8)
    assert len(errors) > 100
    assert max(errors.values()) <= ACCUMULATION
    assert np.abs(image - paint(plain)).max() <= 1e-3


@pytest.mark.slow
def test_pipeline_goes_through_a_folder(demo_file: Path, tmp_path: Path) -> None:
    """A published folder loads with from_pretrained, and its UNet is FP8."""
    from diffusers import StableDiffusionXLPipeline

    unet = hswq.load_unet(demo_file, pipeline=demo_folder(), dtype=torch.float32)
    demo_pipeline(unet).save_pretrained(tmp_path / "folder")
    hswq.register_diffusers()
    pipeline = StableDiffusionXLPipeline.from_pretrained(
        tmp_path / "folder", local_files_only=True, torch_dtype=torch.float32
    )
    assert_equal_states(pipeline.unet, unet)
    assert any(isinstance(part, hswq.Linear) for part in pipeline.unet.modules())


@pytest.mark.slow
def test_lora_of_diffusers_loads_on_top(demo_file: Path, tmp_path: Path) -> None:
    """load_lora_weights is how users add a style; the weights below stay FP8."""
    import warnings

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from peft import LoraConfig, get_peft_model_state_dict

    unet = hswq.load_unet(demo_file, pipeline=demo_folder(), dtype=torch.float32)
    donor = hswq.load_unet(demo_file, pipeline=demo_folder(), dtype=torch.float32)
    donor.add_adapter(LoraConfig(r=2, target_modules=["to_q", "to_v"], init_lora_weights=False))
    state = get_peft_model_state_dict(donor)
    pipeline = demo_pipeline(unet)
    before = paint(unet)
    pipeline.save_lora_weights(tmp_path, unet_lora_layers=state)
    pipeline.load_lora_weights(tmp_path)
    adapted = [part for name, part in unet.named_modules() if name.endswith("to_q.base_layer")]
    fp8 = [part for part in adapted if isinstance(part, hswq.Linear)]
    assert len(fp8) > len(adapted) / 2
    assert all(part.weight.dtype == torch.float8_e4m3fn for part in fp8)
    assert not np.array_equal(paint(unet), before)
    pipeline.unload_lora_weights()
    assert np.array_equal(paint(unet), before)


@pytest.mark.slow
def test_fp8_activations_paint_nearly_the_same(demo_file: Path) -> None:
    """FP8 activations cost about what FP8 weights cost, not the image."""
    load = {"pipeline": demo_folder(), "dtype": torch.float32}
    exact = paint(hswq.load_unet(demo_file, **load))
    rounded = paint(hswq.load_unet(demo_file, "fp8", **load))
    assert 0.0 < np.square(exact - rounded).mean() < 0.1 * exact.var()


@pytest.mark.slow
@torch.no_grad()
@pytest.mark.parametrize("outliers", [0, 4], ids=["tame", "outlier-rows"])
def test_fp8_activations_keep_28_db_a_layer(demo_file: Path, outliers: int) -> None:
    """One scale a row: tokens of 6.6e4 must not drown the others."""
    fp8 = hswq.load_unet(demo_file, "fp8", pipeline=demo_folder(), dtype=torch.float32)
    generator = torch.Generator().manual_seed(0)
    for name, part in fp8.named_modules():
        if not isinstance(part, hswq.Linear):
            continue
        x = torch.randn(256, part.in_features, generator=generator)
        x[:outliers] *= 6.6e4 / x[:outliers].abs().amax(1, keepdim=True)
        rest = slice(outliers, None)
        exact = nn.functional.linear(x, part.dequantize(), part.bias)[rest]
        error = part(x)[rest] - exact
        snr = 10 * torch.log10(exact.square().sum() / error.square().sum())
        assert float(snr) >= 28.0, name
