"""Qwen-Image and Qwen-Image-Edit, whose single files have diffusers' own names."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from hswq.formats.reader import Checkpoint
from hswq.models.family import LDM_PREFIXES, Detection, Family, Shapes, count_blocks, refusal
from hswq.models.sampler import Sampler, TextEncoder

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


# What the model's authors give against classifier-free guidance's own prompt: nothing.
_NEGATIVE_PROMPT = " "


@dataclass(frozen=True)
class _QwenImageSampler(Sampler):
    """Classifier-free guidance by a second call of the denoiser."""

    def widths(self, config: Mapping[str, Any]) -> dict[str, int | None]:
        return {"prompt_embeds": config.get("joint_attention_dim")}

    def embeddings(self, guidance: float) -> tuple[str, ...]:
        return ("prompt_embeds", "negative_prompt_embeds") if guidance > 1 else ("prompt_embeds",)

    def encode(self, pipeline: Any, prompt: str, guidance: float) -> dict[str, Tensor]:
        return {
            name: pipeline.encode_prompt(text)[0]
            for name, text in zip(
                self.embeddings(guidance), (prompt, _NEGATIVE_PROMPT), strict=False
            )
        }

    def guided(self, guidance: float) -> dict[str, Any]:
        return {"true_cfg_scale": guidance}

    def prompted(self, prompt: str, guidance: float) -> dict[str, Any]:
        negative = {"negative_prompt": _NEGATIVE_PROMPT} if guidance > 1 else {}
        return {"prompt": prompt, **negative}


QWEN_IMAGE = Family(
    name="qwen-image",
    component="transformer",
    class_name="QwenImageTransformer2DModel",
    sampler=_QwenImageSampler(
        class_name="QwenImagePipeline",
        text_encoders=(
            TextEncoder(
                name="text_encoder",
                class_name="Qwen2_5_VLForConditionalGeneration",
                tokenizer="tokenizer",
                prefix="text_encoders.qwen25_7b.transformer.",
                signature=("model.embed_tokens.weight", "model.layers.0.self_attn.q_proj.bias"),
                tokens=("<|im_start|>", "<|im_end|>"),
                widths={"prompt_embeds": "hidden_size"},
            ),
        ),
        hub="Qwen/Qwen-Image",
        steps=50,
        guidance=4.0,
        vae="AutoencoderKLQwenImage",
    ),
    recognize=_recognize,
    convert=_convert,
    config=_config,
    # What the diffusers examples of NVIDIA's Model Optimizer exclude of these names.
    keep_presets={"peers": (r"^(time_text_embed|norm_out)\.",)},
)
