"""Z-Image: Turbo and base, in ComfyUI's layout (fused qkv) or diffusers'."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from hswq.formats.reader import Checkpoint
from hswq.models.family import LDM_PREFIXES, Detection, Family, Shapes, count_blocks, refusal
from hswq.models.sampler import Sampler, TextEncoder

# Rotary channels by axis (frame and text, y, x) for heads of 128 channels.
_AXES = {128: [32, 48, 48]}


def _recognize(checkpoint: Checkpoint, shapes: Shapes) -> Detection | None:
    for prefix in LDM_PREFIXES:
        if f"{prefix}cap_pad_token" not in shapes:
            continue
        if f"{prefix}siglip_pad_token" in shapes:
            raise refusal(checkpoint, "a Z-Image Omni transformer, which reads images too")
        if f"{prefix}all_x_embedder.2-1.weight" in shapes:
            return Detection("z-image", "diffusers", prefix, "flow", zero_terminal_snr=False)
        if f"{prefix}layers.0.attention.qkv.weight" in shapes:
            return Detection("z-image", "ldm", prefix, "flow", zero_terminal_snr=False)
    return None


def _config(shapes: Shapes) -> dict[str, Any]:
    width, inputs = shapes["x_embedder.weight"]
    head = shapes["layers.0.attention.q_norm.weight"][0]
    third = head // 3 - head // 3 % 2
    return {
        "all_patch_size": [2],
        "all_f_patch_size": [1],
        # Patches of 2 x 2.
        "in_channels": inputs // 4,
        "dim": width,
        "n_layers": count_blocks(shapes, "layers."),
        "n_refiner_layers": count_blocks(shapes, "noise_refiner."),
        "n_heads": width // head,
        "n_kv_heads": width // head,
        "qk_norm": True,
        "cap_feat_dim": shapes["cap_embedder.1.weight"][1],
        "axes_dims": _AXES.get(head, [head - 2 * third, third, third]),
    }


def _convert(numbered: dict[str, Tensor], config: dict[str, Any]) -> dict[str, Tensor]:
    from diffusers.loaders.single_file_utils import (
        convert_z_image_transformer_checkpoint_to_diffusers,
    )

    converted: dict[str, Tensor] = convert_z_image_transformer_checkpoint_to_diffusers(numbered)
    return converted


@dataclass(frozen=True)
class _ZImageSampler(Sampler):
    """Prompts are lists of unpadded texts; guidance adds to the prediction, so that 0 is none."""

    def widths(self, config: Mapping[str, Any]) -> dict[str, int | None]:
        return {"prompt_embeds": config.get("cap_feat_dim")}

    def embeddings(self, guidance: float) -> tuple[str, ...]:
        return ("prompt_embeds", "negative_prompt_embeds") if guidance > 0 else ("prompt_embeds",)

    def encode(self, pipeline: Any, prompt: str, guidance: float) -> dict[str, Tensor]:
        encoded = pipeline.encode_prompt(prompt, do_classifier_free_guidance=guidance > 0)
        return {
            name: texts[0].unsqueeze(0)
            for name, texts in zip(self.embeddings(guidance), encoded, strict=False)
        }

    def arguments(self, embeddings: dict[str, Tensor], guidance: float) -> dict[str, Any]:
        return {name: list(embeddings[name]) for name in self.embeddings(guidance)}


Z_IMAGE = Family(
    name="z-image",
    component="transformer",
    class_name="ZImageTransformer2DModel",
    sampler=_ZImageSampler(
        class_name="ZImagePipeline",
        text_encoders=(
            TextEncoder(
                name="text_encoder",
                class_name="Qwen3Model",
                tokenizer="tokenizer",
                prefix="text_encoders.qwen3_4b.transformer.",
                signature=("model.embed_tokens.weight", "model.layers.0.self_attn.q_norm.weight"),
                tokens=("<|im_start|>", "<|im_end|>"),
                widths={"prompt_embeds": "hidden_size"},
            ),
        ),
        hub="Tongyi-MAI/Z-Image-Turbo",
        # Those of Turbo; the base model has the same keys and shapes.
        steps=8,
        guidance=0.0,
    ),
    recognize=_recognize,
    convert=_convert,
    config=_config,
    # A norm that the model was trained without using.
    unused=frozenset({"norm_final.weight"}),
    dtype_modules=frozenset({"t_embedder.mlp.0"}),
    # What diffusers' layerwise casting skips.
    keep_presets={"peers": (r"^(t_embedder|cap_embedder)\.",)},
)
