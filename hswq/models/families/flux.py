"""Flux.1: dev and schnell, in BFL's layout or diffusers'."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from hswq.formats.reader import Checkpoint
from hswq.models.family import LDM_PREFIXES, Detection, Family, Shapes, count_blocks, refusal
from hswq.models.sampler import CLIP_SIGNATURE, CLIP_TOKENS, Sampler, TextEncoder

# What diffusers' converter assumes of every model.
_WIDTH = 3072
_MLP_RATIO = 4
# Rotary channels by axis (text, y, x) for BFL's heads of 128 channels.
_AXES = {128: (16, 56, 56)}
# What no other class of diffusers has all of.
_DIFFUSERS_KEYS = (
    "x_embedder.weight",
    "context_embedder.weight",
    "transformer_blocks.0.norm1.linear.weight",
    "transformer_blocks.0.attn.add_q_proj.weight",
    "single_transformer_blocks.0.attn.to_q.weight",
    "single_transformer_blocks.0.proj_mlp.weight",
)
_RELATIVES = {
    "distilled_guidance_layer.": "a Chroma transformer, a relative of Flux.1",
    "double_stream_modulation_img.": "a Flux.2 transformer",
}
_VARIANTS = {
    384: "a Flux.1 Fill (inpainting) transformer: it reads an image and a mask beside the noise",
    128: "a Flux.1 Canny or Depth transformer: it reads a control image beside the noise",
}


def _recognize(checkpoint: Checkpoint, shapes: Shapes) -> Detection | None:
    for prefix in LDM_PREFIXES:
        if f"{prefix}double_blocks.0.img_attn.qkv.weight" not in shapes:
            continue
        for sign, found in _RELATIVES.items():
            if any(name.startswith(prefix + sign) for name in shapes):
                raise refusal(checkpoint, found)
        _check_variant(checkpoint, shapes.get(f"{prefix}img_in.weight"))
        return Detection("flux", "ldm", prefix, "flow", zero_terminal_snr=False)
    if all(name in shapes for name in _DIFFUSERS_KEYS):
        _check_variant(checkpoint, shapes["x_embedder.weight"])
        return Detection("flux", "diffusers", "", "flow", zero_terminal_snr=False)
    return None


def _check_variant(checkpoint: Checkpoint, first: tuple[int, ...] | None) -> None:
    inputs = first[-1] if first else None
    if inputs in _VARIANTS:
        raise refusal(checkpoint, _VARIANTS[inputs])


def _config(shapes: Shapes) -> dict[str, Any]:
    head = shapes["double_blocks.0.img_attn.norm.query_norm.scale"][0]
    width, inputs = shapes["img_in.weight"]
    # Other heads are those of small models, whose axes only have to add up.
    third = head // 3 - head // 3 % 2
    return {
        "patch_size": 1,
        "in_channels": inputs,
        "num_layers": count_blocks(shapes, "double_blocks."),
        "num_single_layers": count_blocks(shapes, "single_blocks."),
        "attention_head_dim": head,
        "num_attention_heads": width // head,
        "joint_attention_dim": shapes["txt_in.weight"][1],
        "pooled_projection_dim": shapes["vector_in.in_layer.weight"][1],
        "guidance_embeds": "guidance_in.in_layer.weight" in shapes,
        "axes_dims_rope": _AXES.get(head, (head - 2 * third, third, third)),
    }


def _convert(numbered: dict[str, Tensor], config: dict[str, Any]) -> dict[str, Tensor]:
    """Run the converter, which knows one width only, on rows that are repeated up to it.

    It cuts rows into equal parts and at multiples of the width, so that repeated rows fall where
    the rows themselves belong.
    """
    from diffusers.loaders.single_file_utils import (
        convert_flux_transformer_checkpoint_to_diffusers,
    )

    width = config["num_attention_heads"] * config["attention_head_dim"]
    times = _WIDTH // width if _WIDTH % width == 0 else 1
    repeated = {name: rows.repeat_interleave(times) for name, rows in numbered.items()}
    converted = convert_flux_transformer_checkpoint_to_diffusers(repeated)
    return {name: rows[::times] for name, rows in converted.items()}


@dataclass(frozen=True)
class _FluxSampler(Sampler):
    """Guidance is an input of the denoiser; schnell, which lacks it, takes few steps."""

    def defaults(self, config: Mapping[str, Any]) -> tuple[int, float]:
        return (self.steps, self.guidance) if _is_dev(config) else (4, 0.0)

    def scheduler_overrides(
        self, detection: Any, config: Mapping[str, Any], shipped: bool
    ) -> dict[str, Any]:
        return (
            {"shift": 1.0, "use_dynamic_shifting": False} if shipped and not _is_dev(config) else {}
        )

    def widths(self, config: Mapping[str, Any]) -> dict[str, int | None]:
        return {
            "prompt_embeds": config.get("joint_attention_dim"),
            "pooled_prompt_embeds": config.get("pooled_projection_dim"),
        }

    def embeddings(self, guidance: float) -> tuple[str, ...]:
        return ("prompt_embeds", "pooled_prompt_embeds")

    def encode(self, pipeline: Any, prompt: str, guidance: float) -> dict[str, Tensor]:
        return dict(
            zip(self.embeddings(guidance), pipeline.encode_prompt(prompt, None), strict=False)
        )


def _is_dev(config: Mapping[str, Any]) -> bool:
    return bool(config.get("guidance_embeds"))


FLUX = Family(
    name="flux",
    component="transformer",
    class_name="FluxTransformer2DModel",
    sampler=_FluxSampler(
        class_name="FluxPipeline",
        text_encoders=(
            TextEncoder(
                name="text_encoder",
                class_name="CLIPTextModel",
                tokenizer="tokenizer",
                prefix="text_encoders.clip_l.transformer.",
                signature=CLIP_SIGNATURE,
                tokens=CLIP_TOKENS,
                widths={"pooled_prompt_embeds": "hidden_size"},
                fixed_length=True,
            ),
            TextEncoder(
                name="text_encoder_2",
                class_name="T5EncoderModel",
                tokenizer="tokenizer_2",
                prefix="text_encoders.t5xxl.transformer.",
                signature=("shared.weight", "encoder.block.0.layer.0.SelfAttention.q.weight"),
                tokens=("<pad>", "</s>"),
                widths={"prompt_embeds": "d_model"},
            ),
        ),
        # Its text encoders are those of dev.
        hub="black-forest-labs/FLUX.1-schnell",
        steps=28,
        guidance=3.5,
    ),
    recognize=_recognize,
    convert=_convert,
    config=_config,
    # What the diffusers examples of NVIDIA's Model Optimizer exclude.
    keep_presets={"peers": (r"^(time_text_embed|context_embedder|x_embedder|norm_out)\.?",)},
)
