"""Qwen-Image and Qwen-Image-Edit, whose single files have diffusers' own names."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from hswq.formats.reader import Checkpoint
from hswq.models.family import LDM_PREFIXES, Detection, Family, Shapes, count_blocks, refusal

# Rotary channels by axis (frame, y, x) for heads of 128 channels.
_AXES = {128: (16, 56, 56)}


def _recognize(checkpoint: Checkpoint, shapes: Shapes) -> Detection | None:
    for prefix in LDM_PREFIXES:
        if not {f"{prefix}txt_norm.weight", f"{prefix}transformer_blocks.0.img_mod.1.weight"} <= (
            shapes.keys()
        ):
            continue
        if f"{prefix}time_text_embed.addition_t_embedding.weight" in shapes:
            raise refusal(checkpoint, "a Qwen-Image-Layered transformer, which paints layers")
        return Detection("qwen-image", "ldm", prefix, "flow", zero_terminal_snr=False)
    return None


def _config(shapes: Shapes) -> dict[str, Any]:
    width, inputs = shapes["img_in.weight"]
    head = shapes["transformer_blocks.0.attn.norm_q.weight"][0]
    third = head // 3 - head // 3 % 2
    return {
        "patch_size": 2,
        "in_channels": inputs,
        # Patches of 2 x 2.
        "out_channels": shapes["proj_out.weight"][0] // 4,
        "num_layers": count_blocks(shapes, "transformer_blocks."),
        "attention_head_dim": head,
        "num_attention_heads": width // head,
        "joint_attention_dim": shapes["txt_in.weight"][1],
        "axes_dims_rope": _AXES.get(head, (head - 2 * third, third, third)),
    }


def _convert(numbered: dict[str, Tensor], config: dict[str, Any]) -> dict[str, Tensor]:
    # diffusers has no converter for this family: there is nothing to rename.
    return numbered


QWEN_IMAGE = Family(
    name="qwen-image",
    component="transformer",
    class_name="QwenImageTransformer2DModel",
    recognize=_recognize,
    convert=_convert,
    config=_config,
    # What the diffusers examples of NVIDIA's Model Optimizer exclude of these names.
    keep_presets={"peers": (r"^(time_text_embed|norm_out)\.",)},
)
