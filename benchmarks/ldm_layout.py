"""Names of SDXL's single-file (LDM) layout, walked off the diffusers models themselves.

The way back from diffusers' names to those of the files that users have, for writing test files.
hswq reads with diffusers' own converter; tests run it on what is named here and compare. All
functions take modules; on the meta device they give names and shapes.
"""

from __future__ import annotations

import re

import torch
from torch import Tensor, nn

PREFIXES = {
    "unet": "model.diffusion_model.",
    "text_encoder": "conditioner.embedders.0.transformer.text_model.",
    "text_encoder_2": "conditioner.embedders.1.model.",
    "vae": "first_stage_model.",
}

_UNET_RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
_VAE_RESNET = {"conv_shortcut": "nin_shortcut"}
_VAE_ATTENTION = {
    "group_norm": "norm",
    "to_q": "q",
    "to_k": "k",
    "to_v": "v",
    "to_out.0": "proj_out",
}
_OPEN_CLIP = {
    "encoder.layers": "transformer.resblocks",
    "self_attn.out_proj": "attn.out_proj",
    "layer_norm1": "ln_1",
    "layer_norm2": "ln_2",
    "mlp.fc1": "mlp.c_fc",
    "mlp.fc2": "mlp.c_proj",
    "embeddings.token_embedding": "token_embedding",
    "embeddings.position_embedding.weight": "positional_embedding",
    "final_layer_norm": "ln_final",
}


def unet_names(unet: nn.Module) -> dict[str, str]:
    """Return LDM's name, without prefix, of each weight of a UNet2DConditionModel like SDXL's.

    LDM counts blocks through: one for the first convolution, one for each residual layer with its
    attention, one for each downsampling; upsampling belongs to the layer before it.
    """
    places = {
        "conv_in": "input_blocks.0.0",
        "time_embedding.linear_1": "time_embed.0",
        "time_embedding.linear_2": "time_embed.2",
        "add_embedding.linear_1": "label_emb.0.0",
        "add_embedding.linear_2": "label_emb.0.2",
        "conv_norm_out": "out.0",
        "conv_out": "out.2",
        "mid_block.resnets.0": "middle_block.0",
        "mid_block.attentions.0": "middle_block.1",
        "mid_block.resnets.1": "middle_block.2",
    }
    number = 1
    for level, block in enumerate(unet.down_blocks):
        for layer in range(len(block.resnets)):
            places[f"down_blocks.{level}.resnets.{layer}"] = f"input_blocks.{number}.0"
            places[f"down_blocks.{level}.attentions.{layer}"] = f"input_blocks.{number}.1"
            number += 1
        if block.downsamplers:
            places[f"down_blocks.{level}.downsamplers.0.conv"] = f"input_blocks.{number}.0.op"
            number += 1
    number = 0
    for level, block in enumerate(unet.up_blocks):
        attention = 1 if hasattr(block, "attentions") else 0
        for layer in range(len(block.resnets)):
            places[f"up_blocks.{level}.resnets.{layer}"] = f"output_blocks.{number}.0"
            places[f"up_blocks.{level}.attentions.{layer}"] = f"output_blocks.{number}.1"
            number += 1
        places[f"up_blocks.{level}.upsamplers.0"] = f"output_blocks.{number - 1}.{1 + attention}"
    names = {}
    for name in unet.state_dict():
        place, rest = _placed(name, places)
        names[name] = place + _renamed(rest, _UNET_RESNET if ".resnets." in name else {})
    return names


def unet_state(unet: nn.Module) -> dict[str, Tensor]:
    """Return the weights of a UNet2DConditionModel like SDXL's; names without prefix."""
    names = unet_names(unet)
    return {names[name]: weight for name, weight in unet.state_dict().items()}


def text_encoder_state(model: nn.Module) -> dict[str, Tensor]:
    """Return the weights of SDXL's first text encoder (CLIPTextModel); names without prefix.

    The file also carries the positions, an int64 buffer that today's transformers do not keep.
    """
    weights = _text_weights(model)
    count = weights["embeddings.position_embedding.weight"].shape[0]
    return {"embeddings.position_ids": torch.arange(count)[None], **weights}


def open_clip_state(model: nn.Module) -> dict[str, Tensor]:
    """Return the weights of SDXL's second text encoder in OpenCLIP's layout; names without prefix.

    Queries, keys and values are stacked, and the projection is transposed.
    """
    weights = _text_weights(model)
    state = {
        "logit_scale": torch.tensor(100.0).log(),
        "text_projection": weights.pop("text_projection.weight").T.contiguous(),
    }
    for name, weight in weights.items():
        fused = re.fullmatch(r"(.*self_attn\.)q_proj\.(weight|bias)", name)
        if fused:
            parts = [weights[f"{fused[1]}{letter}_proj.{fused[2]}"] for letter in "qkv"]
            key = f"{fused[1].removesuffix('self_attn.')}attn.in_proj_{fused[2]}"
            state[_renamed(key, _OPEN_CLIP)] = torch.cat(parts)
        elif not re.search(r"self_attn\.[kv]_proj", name):
            state[_renamed(name, _OPEN_CLIP)] = weight
    return state


def vae_state(vae: nn.Module) -> dict[str, Tensor]:
    """Return the weights of an AutoencoderKL; names without prefix.

    LDM numbers the decoder's levels from the image inwards, and its attention is made of 1x1
    convolutions.
    """
    places = {name: name for name in ("quant_conv", "post_quant_conv")}
    for side in ("encoder", "decoder"):
        places |= {
            f"{side}.conv_in": f"{side}.conv_in",
            f"{side}.conv_out": f"{side}.conv_out",
            f"{side}.conv_norm_out": f"{side}.norm_out",
            f"{side}.mid_block.resnets.0": f"{side}.mid.block_1",
            f"{side}.mid_block.attentions.0": f"{side}.mid.attn_1",
            f"{side}.mid_block.resnets.1": f"{side}.mid.block_2",
        }
    levels = len(vae.encoder.down_blocks)
    for level in range(levels):
        outward = levels - 1 - level
        places |= {
            f"encoder.down_blocks.{level}.resnets": f"encoder.down.{level}.block",
            f"encoder.down_blocks.{level}.downsamplers.0": f"encoder.down.{level}.downsample",
            f"decoder.up_blocks.{level}.resnets": f"decoder.up.{outward}.block",
            f"decoder.up_blocks.{level}.upsamplers.0": f"decoder.up.{outward}.upsample",
        }
    state = {}
    for name, weight in vae.state_dict().items():
        place, rest = _placed(name, places)
        attention = ".attentions." in name
        key = place + _renamed(rest, _VAE_ATTENTION if attention else _VAE_RESNET)
        state[key] = weight[:, :, None, None] if attention and weight.ndim == 2 else weight
    return state


def _text_weights(model: nn.Module) -> dict[str, Tensor]:
    """Return the weights without the wrapper's name, which depends on transformers' version."""
    return {name.removeprefix("text_model."): weight for name, weight in model.state_dict().items()}


def _placed(name: str, places: dict[str, str]) -> tuple[str, str]:
    """Split a name at the one place that begins it: LDM's place, and the rest with its dot."""
    fitting = [place for place in places if name.startswith(f"{place}.")]
    if len(fitting) != 1:
        raise ValueError(f"weight {name!r} has {len(fitting)} places in the LDM layout, not one")
    return places[fitting[0]], name[len(fitting[0]) :]


def _renamed(name: str, parts: dict[str, str]) -> str:
    """Replace whole dotted parts of a name."""
    for old, new in parts.items():
        name = re.sub(rf"(?<![^.]){re.escape(old)}(?![^.])", new, name)
    return name
