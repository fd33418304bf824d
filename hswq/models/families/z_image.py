"""Z-Image: Turbo and base, in ComfyUI's layout (fused qkv) or diffusers'."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from hswq.formats.reader import Checkpoint
from hswq.models.family import LDM_PREFIXES, Detection, Family, Shapes, count_blocks, refusal

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


Z_IMAGE = Family(
    name="z-image",
    component="transformer",
    class_name="ZImageTransformer2DModel",
    recognize=_recognize,
    convert=_convert,
    config=_config,
    # A norm that the model was trained without using.
    unused=frozenset({"norm_final.weight"}),
    dtype_modules=frozenset({"t_embedder.mlp.0"}),
    # What diffusers' layerwise casting skips.
    keep_presets={"peers": (r"^(t_embedder|cap_embedder)\.",)},
)
