"""What a file is, told from its header."""

from __future__ import annotations

import json

import pytest

from hswq.errors import InputError
from hswq.formats.reader import Checkpoint
from hswq.models.detect import detect
from tests.checkpoints import write_header_only, write_tiny_sdxl

LDM = "model.diffusion_model."
# The keys by which real UNets are told apart, with their real shapes.
SDXL = {
    "input_blocks.0.0.weight": (320, 4, 3, 3),
    "label_emb.0.0.weight": (1280, 2816),
    "input_blocks.4.1.transformer_blocks.0.attn2.to_k.weight": (640, 2048),
}
SD1 = {
    "input_blocks.0.0.weight": (320, 4, 3, 3),
    "input_blocks.1.1.transformer_blocks.0.attn2.to_k.weight": (320, 768),
}
SD2 = SD1 | {"input_blocks.1.1.transformer_blocks.0.attn2.to_k.weight": (320, 1024)}
REFINER = {
    "input_blocks.0.0.weight": (384, 4, 3, 3),
    "label_emb.0.0.weight": (1536, 2560),
    "input_blocks.4.1.transformer_blocks.0.attn2.to_k.weight": (768, 1280),
}
NINE = {"input_blocks.0.0.weight": (320, 9, 3, 3)}
DIFFUSERS = {
    "conv_in.weight": (320, 4, 3, 3),
    "up_blocks.0.resnets.0.conv1.weight": (1280, 2560, 3, 3),
    "add_embedding.linear_1.weight": (1280, 2816),
    "down_blocks.1.attentions.0.transformer_blocks.0.attn2.to_k.weight": (640, 2048),
}
# The same of transformers.
FLUX = {
    "double_blocks.0.img_attn.qkv.weight": (9216, 3072),
    "img_in.weight": (3072, 64),
}
FLUX_DIFFUSERS = {
    "x_embedder.weight": (3072, 64),
    "context_embedder.weight": (3072, 4096),
    "transformer_blocks.0.norm1.linear.weight": (18432, 3072),
    "transformer_blocks.0.attn.add_q_proj.weight": (3072, 3072),
    "single_transformer_blocks.0.attn.to_q.weight": (3072, 3072),
    "single_transformer_blocks.0.proj_mlp.weight": (12288, 3072),
}
Z_IMAGE = {"layers.0.attention.qkv.weight": (11520, 3840), "cap_pad_token": (1, 3840)}
QWEN_IMAGE = {
    "txt_norm.weight": (3584,),
    "transformer_blocks.0.img_mod.1.weight": (18432, 3072),
}
Z_IMAGE_DIFFUSERS = {"all_x_embedder.2-1.weight": (3840, 64), "cap_pad_token": (1, 3840)}


def prefixed(shapes: dict[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
    return {LDM + name: shape for name, shape in shapes.items()}


def detect_header(tmp_path, shapes, metadata=None):
    path = write_header_only(tmp_path / "file.safetensors", shapes, metadata)
    with Checkpoint.open(path) as checkpoint:
        return detect(checkpoint)


@pytest.mark.parametrize(
    ("shapes", "layout", "prefix"),
    [(prefixed(SDXL), "ldm", LDM), (SDXL, "ldm", ""), (DIFFUSERS, "diffusers", "")],
    ids=["single file", "unet only", "diffusers"],
)
def test_sdxl_is_found_in_every_layout(tmp_path, shapes, layout, prefix):
    """A supported file would be refused, or its keys looked for under the wrong prefix."""
    found = detect_header(tmp_path, shapes)
    assert (found.family, found.layout, found.prefix) == ("sdxl", layout, prefix)
    assert (found.prediction_type, found.zero_terminal_snr) == ("epsilon", False)


@pytest.mark.parametrize(
    ("shapes", "family", "layout", "prefix"),
    [
        (FLUX, "flux", "ldm", ""),
        (prefixed(FLUX), "flux", "ldm", LDM),
        (FLUX_DIFFUSERS, "flux", "diffusers", ""),
        (Z_IMAGE, "z-image", "ldm", ""),
        (prefixed(Z_IMAGE), "z-image", "ldm", LDM),
        (Z_IMAGE_DIFFUSERS, "z-image", "diffusers", ""),
        (QWEN_IMAGE, "qwen-image", "ldm", ""),
        (prefixed(QWEN_IMAGE), "qwen-image", "ldm", LDM),
    ],
)
def test_transformers_are_found_in_every_layout(tmp_path, shapes, family, layout, prefix):
    """They sample a flow, whatever a file of theirs says of noise."""
    found = detect_header(tmp_path, shapes)
    assert (found.family, found.layout, found.prefix) == (family, layout, prefix)
    assert (found.prediction_type, found.zero_terminal_snr) == ("flow", False)


@pytest.mark.parametrize(
    ("shapes", "words"),
    [
        (prefixed(SD1), "Stable Diffusion 1.x UNet"),
        (SD2, "Stable Diffusion 2.x UNet"),
        (
            {name: shape for name, shape in DIFFUSERS.items() if "add_embedding" not in name},
            "Stable Diffusion 1.x or 2.x UNet",
        ),
        (prefixed(REFINER), "SDXL refiner"),
        (prefixed(SDXL | NINE), "an SDXL inpainting"),
        (prefixed(SD1 | NINE), "a Stable Diffusion 1.x or 2.x inpainting"),
        (prefixed(SDXL) | {"edm_mean": (4,)}, "EDM"),
        (FLUX | {"img_in.weight": (3072, 384)}, "Flux.1 Fill"),
        (prefixed(FLUX | {"img_in.weight": (3072, 128)}), "Flux.1 Canny or Depth"),
        (FLUX | {"distilled_guidance_layer.in_proj.weight": (8, 8)}, "Chroma"),
        (FLUX | {"double_stream_modulation_img.lin.weight": (8, 8)}, "Flux.2"),
        ({"single_transformer_blocks.0.attn.to_q.weight": (3072, 3072)}, "Flux"),
        ({f"{LDM}cap_embedder.0.weight": (2304,), f"{LDM}noise_refiner.0.w": (8,)}, "Lumina"),
        (Z_IMAGE | {"siglip_pad_token": (1, 3840)}, "Z-Image Omni"),
        ({f"{LDM}joint_blocks.0.x_block.attn.qkv.weight": (8, 8)}, "Stable Diffusion 3"),
        ({"lora_unet_down_blocks_0.lora_up.weight": (320, 4)}, "LoRA"),
        ({"unet.conv_in.lora_A.weight": (4, 320)}, "LoRA"),
        ({"control_model.input_blocks.0.0.weight": (320, 4, 3, 3)}, "ControlNet"),
        ({"conv_in.weight": (320, 4, 3, 3), "controlnet_mid_block.weight": (8, 8)}, "ControlNet"),
        (FLUX | {"controlnet_blocks.0.weight": (3072, 3072)}, "ControlNet"),
        (prefixed(Z_IMAGE) | {f"{LDM}control_layers.0.w": (8,)}, "ControlNet"),
        ({"double_blocks.0.processor.ip_adapter_double_stream_k_proj.weight": (8,)}, "IP-Adapter"),
        ({"lora_unet_double_blocks_0_img_attn_proj.lora_down.weight": (16, 3072)}, "LoRA"),
        ({"redux_down.weight": (4096, 12288), "redux_up.weight": (12288, 1152)}, "Flux.1 Redux"),
        ({"encoder.conv_in.weight": (128, 3, 3, 3), "decoder.conv_in.weight": (8,)}, "VAE"),
        ({"encoder.conv1.weight": (96, 3, 3, 3, 3), "decoder.conv1.weight": (8,)}, "VAE"),
        ({"encoder.block.0.layer.0.SelfAttention.q.weight": (4096, 4096)}, "text encoder"),
        ({"model.embed_tokens.weight": (151936, 2560)}, "text encoder"),
        ({"text_model.embeddings.token_embedding.weight": (49408, 768)}, "text encoder"),
        ({"something.else": (3,), "more": (2,)}, "unknown architecture.*'something.else', 'more'"),
    ],
)
def test_other_files_are_refused_by_name(tmp_path, shapes, words):
    """A user with the wrong file would not learn what it is, nor what is supported."""
    with pytest.raises(InputError, match=f"{words}.*Supported are SDXL"):
        detect_header(tmp_path, shapes)


def test_unknown_files_list_at_most_ten_keys(tmp_path):
    """A file of two thousand unknown keys would flood the terminal."""
    with pytest.raises(InputError) as caught:
        detect_header(tmp_path, {f"key{number:03}": (1,) for number in range(50)})
    assert "'key009'" in str(caught.value)
    assert "'key010'" not in str(caught.value)


@pytest.mark.parametrize(
    ("extra", "metadata", "prediction", "zero_snr"),
    [
        ({"v_pred": (0,)}, None, "v_prediction", False),
        ({"v_pred": (0,), "ztsnr": (0,)}, None, "v_prediction", True),
        ({}, {"modelspec.prediction_type": "v"}, "v_prediction", False),
        ({}, {"modelspec.prediction_type": "epsilon"}, "epsilon", False),
    ],
)
def test_prediction_type_of_single_files(tmp_path, extra, metadata, prediction, zero_snr):
    """A v-prediction model calibrated as epsilon sees activations it never has in use."""
    found = detect_header(tmp_path, prefixed(SDXL) | extra, metadata)
    assert (found.prediction_type, found.zero_terminal_snr) == (prediction, zero_snr)


def test_prediction_type_of_folders_comes_from_the_scheduler(tmp_path):
    """The same for diffusers folders, where no key and no metadata tells."""
    folder = write_tiny_sdxl(tmp_path / "model", layout="diffusers", v_pred=True, zero_snr=True)
    with Checkpoint.open(folder) as checkpoint:
        found = detect(checkpoint)
    assert (found.layout, found.prefix) == ("diffusers", "")
    assert (found.prediction_type, found.zero_terminal_snr) == ("v_prediction", True)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"prediction_type": "flow_prediction"}, "flow_prediction"),
        ({"_class_name": "EDMDPMSolverMultistepScheduler"}, "EDM"),
    ],
)
def test_folder_of_another_sampler_is_refused(tmp_path, folder, change, words):
    """A model of another noise parametrization would be calibrated on nonsense."""
    (tmp_path / "scheduler").mkdir()
    (tmp_path / "model_index.json").write_text("{}")
    (tmp_path / "unet").symlink_to(folder / "unet")
    scheduler = json.loads((folder / "scheduler/scheduler_config.json").read_text())
    (tmp_path / "scheduler/scheduler_config.json").write_text(json.dumps(scheduler | change))
    with Checkpoint.open(tmp_path) as checkpoint, pytest.raises(InputError, match=words):
        detect(checkpoint)
