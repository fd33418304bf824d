"""The demo model's architecture: SDXL's topology, narrow.

Block types, key names, the ratio of the text encoders' widths (3 : 5), the added conditioning and
the noise schedule are SDXL's; widths, depths and the vocabulary are small. Text encoder 2 is 10
layers deep because its tenth layer is what diffusers tells an SDXL base checkpoint by.
"""

from __future__ import annotations

from typing import Any

from diffusers import AutoencoderKL, EulerDiscreteScheduler, UNet2DConditionModel
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from benchmarks.demo_model.shapes import RESOLUTION, TOKEN_COUNT

LATENT_SIDE = RESOLUTION // 4
WIDTH_1, WIDTH_2 = 24, 40  # of the text encoders; diffusers tells them apart by it, so they differ


def build_vae() -> AutoencoderKL:
    """Autoencoder of factor 4: [B, 3, 64, 64] in [-1, 1] <-> [B, 4, 16, 16]."""
    widths = (16, 16, 32)
    return AutoencoderKL(
        block_out_channels=widths,
        down_block_types=("DownEncoderBlock2D",) * len(widths),
        up_block_types=("UpDecoderBlock2D",) * len(widths),
        layers_per_block=1,
        norm_num_groups=4,  # of four channels at least, as in SDXL: one alone would lose its level
        sample_size=RESOLUTION,
        scaling_factor=0.13025,
    )


def build_unet() -> UNet2DConditionModel:
    """Noise prediction on [B, 4, 16, 16] latents, 4.1 M parameters."""
    time_embedding_width = 32
    return UNet2DConditionModel(
        sample_size=LATENT_SIDE,
        block_out_channels=(32, 64, 96),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        layers_per_block=2,
        transformer_layers_per_block=1,
        attention_head_dim=(1, 2, 3),  # heads a level, each of width 32: diffusers' own misnomer
        cross_attention_dim=WIDTH_1 + WIDTH_2,
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=time_embedding_width,
        projection_class_embeddings_input_dim=6 * time_embedding_width + WIDTH_2,
    )


def text_config(
    width: int, layers: int, activation: str, tokenizer: CLIPTokenizer
) -> CLIPTextConfig:
    """A CLIP text configuration with heads of width 8 and the tokenizer's ids."""
    return CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=4 * width,
        projection_dim=width,
        num_hidden_layers=layers,
        num_attention_heads=width // 8,
        max_position_embeddings=TOKEN_COUNT,
        hidden_act=activation,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )


def build_text_encoders(
    tokenizer: CLIPTokenizer, tokenizer_2: CLIPTokenizer
) -> tuple[CLIPTextModel, CLIPTextModelWithProjection]:
    """The two text encoders, freshly initialized.

    The UNet reads the penultimate hidden state, which no layer norm has brought to unit scale;
    CLIP's initial embeddings are too small for that, so they start larger here.
    """
    encoder = CLIPTextModel(text_config(WIDTH_1, 2, "quick_gelu", tokenizer))
    encoder_2 = CLIPTextModelWithProjection(text_config(WIDTH_2, 10, "gelu", tokenizer_2))
    for model in (encoder, encoder_2):
        for module in model.modules():
            if isinstance(module, nn.Embedding):
                nn.init.normal_(module.weight, std=0.5)
    return encoder, encoder_2


def build_scheduler() -> EulerDiscreteScheduler:
    """SDXL's scheduler with SDXL's settings."""
    return EulerDiscreteScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        timestep_spacing="leading",
        steps_offset=1,
    )


def model_index() -> dict[str, Any]:
    """The content of the pipeline's model_index.json."""
    return {
        "_class_name": "StableDiffusionXLPipeline",
        "force_zeros_for_empty_prompt": True,
        "add_watermarker": None,
        "scheduler": ["diffusers", "EulerDiscreteScheduler"],
        "text_encoder": ["transformers", "CLIPTextModel"],
        "text_encoder_2": ["transformers", "CLIPTextModelWithProjection"],
        "tokenizer": ["transformers", "CLIPTokenizer"],
        "tokenizer_2": ["transformers", "CLIPTokenizer"],
        "unet": ["diffusers", "UNet2DConditionModel"],
        "vae": ["diffusers", "AutoencoderKL"],
    }
