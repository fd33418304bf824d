"""SDXL base and its fine-tunes, in the layout of single files (LDM) or diffusers'."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from hswq.formats.reader import Checkpoint
from hswq.models.family import LDM_PREFIXES, Detection, Family, Shapes, refusal
from hswq.models.folders import read_json
from hswq.models.quiet import quiet_libraries
from hswq.models.sampler import CLIP_SIGNATURE, CLIP_TOKENS, Sampler, TextEncoder

V_PREDICTION_KEY, ZERO_SNR_KEY = "v_pred", "ztsnr"


def _recognize(checkpoint: Checkpoint, shapes: Shapes) -> Detection | None:
    for prefix in LDM_PREFIXES:
        first, label = f"{prefix}input_blocks.0.0.weight", f"{prefix}label_emb.0.0.weight"
        if first in shapes:
            _check_unet(checkpoint, shapes[first], shapes.get(label), _context(shapes, prefix))
            return _with_prediction(checkpoint, "ldm", prefix)
    first, label = "conv_in.weight", "add_embedding.linear_1.weight"
    if first in shapes and any(name.startswith("up_blocks.") for name in shapes):
        _check_unet(checkpoint, shapes[first], shapes.get(label), _context(shapes, ""))
        return _with_prediction(checkpoint, "diffusers", "")
    return None


def _convert(numbered: dict[str, Tensor], config: dict[str, Any]) -> dict[str, Tensor]:
    from diffusers.loaders.single_file_utils import convert_ldm_unet_checkpoint

    # The converter wants the prefix of full checkpoints, whatever the file's own is.
    full = {LDM_PREFIXES[0] + name: rows for name, rows in numbered.items()}
    with quiet_libraries():
        converted = convert_ldm_unet_checkpoint(full, config)
    return {name: rows for name, rows in converted.items() if rows is not None}


def _context(shapes: dict[str, tuple[int, ...]], prefix: str) -> int | None:
    """Width of the text embeddings that cross-attention reads; both layouts name it alike."""
    for name, shape in shapes.items():
        if name.startswith(prefix) and name.endswith(".attn2.to_k.weight"):
            return shape[1]
    return None


def _check_unet(
    checkpoint: Checkpoint,
    first: tuple[int, ...],
    conditioning: tuple[int, ...] | None,
    context: int | None,
) -> None:
    """Refuse UNets that are not SDXL base.

    Widths tell real models apart from each other; that a UNet is SDXL's at all is told by its
    size conditioning, which narrower models of the same topology have too.

    Args:
        checkpoint: named in the error.
        first: shape of the first convolution's weight.
        conditioning: shape of the first layer that embeds sizes and pooled text; None: no such.
        context: width of the text embeddings; None: no cross-attention.
    Raises:
        InputError: the UNet is another one.
    """
    sdxl = conditioning is not None
    family = "an SDXL" if sdxl else "a Stable Diffusion 1.x or 2.x"
    if len(first) == 4 and first[1] == 9:
        raise refusal(
            checkpoint, f"{family} inpainting UNet: its first convolution reads 9 channels, not 4"
        )
    if len(first) != 4 or first[1] != 4:
        raise refusal(
            checkpoint, f"a UNet whose first convolution is {list(first)}; SDXL's reads 4 channels"
        )
    if not sdxl:
        version = {768: "a Stable Diffusion 1.x", 1024: "a Stable Diffusion 2.x"}
        raise refusal(
            checkpoint,
            f"{version.get(context or 0, family)} UNet (or another without SDXL's size "
            f"conditioning): its cross-attention reads {context or 'no'} channels",
        )
    if context == 1280 and conditioning is not None and conditioning[-1] == 2560:
        raise refusal(checkpoint, "an SDXL refiner, not an SDXL base model")
    if any(name.startswith("edm_") for name in checkpoint.tensors):
        raise refusal(
            checkpoint,
            "an SDXL UNet of EDM noise scaling (Playground 2.5, CosXL), whose sampler hswq lacks",
        )


def _with_prediction(checkpoint: Checkpoint, layout: str, prefix: str) -> Detection:
    """Complete a detection with what marker keys, metadata and scheduler say of the noise."""
    scheduler = _scheduler_config(checkpoint)
    prediction = scheduler.get("prediction_type", "epsilon")
    stated = checkpoint.metadata.get("modelspec.prediction_type", "")
    if V_PREDICTION_KEY in checkpoint.tensors or stated in ("v", "v_prediction"):
        prediction = "v_prediction"
    known = prediction in ("epsilon", "v_prediction")
    if not known or str(scheduler.get("_class_name", "")).startswith("EDM"):
        raise refusal(
            checkpoint,
            f"an SDXL UNet sampled by {scheduler.get('_class_name')!r} with prediction type "
            f"{prediction!r}; 'epsilon' or 'v_prediction' of a discrete schedule is needed",
        )
    return Detection(
        family="sdxl",
        layout=layout,
        prefix=prefix,
        prediction_type=prediction,
        zero_terminal_snr=ZERO_SNR_KEY in checkpoint.tensors
        or bool(scheduler.get("rescale_betas_zero_snr", False)),
    )


def _scheduler_config(checkpoint: Checkpoint) -> dict[str, Any]:
    if checkpoint.pipeline_dir is None:
        return {}
    return read_json(checkpoint.pipeline_dir / "scheduler" / "scheduler_config.json") or {}


@dataclass(frozen=True)
class _SDXLSampler(Sampler):
    """Classifier-free guidance in one batch with an empty prompt."""

    def scheduler_overrides(
        self, detection: Detection, config: Mapping[str, Any], shipped: bool
    ) -> dict[str, Any]:
        # A file that says nothing is of the type that the configuration names.
        overrides: dict[str, Any] = {}
        if detection.prediction_type == "v_prediction":
            overrides["prediction_type"] = "v_prediction"
        if detection.zero_terminal_snr:
            # Only this spacing starts from the last timestep, the one of pure noise.
            overrides |= {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
        return overrides

    def pipeline_options(self, index: Mapping[str, Any]) -> dict[str, Any]:
        return {
            "force_zeros_for_empty_prompt": index.get("force_zeros_for_empty_prompt", True),
            "add_watermarker": False,
        }

    def widths(self, config: Mapping[str, Any]) -> dict[str, int | None]:
        widths: dict[str, int | None] = {"prompt_embeds": config.get("cross_attention_dim")}
        if config.get("addition_embed_type") == "text_time":
            # Six sizes and crop offsets are embedded beside the pooled text.
            times = 6 * config["addition_time_embed_dim"]
            pooled = config["projection_class_embeddings_input_dim"] - times
            widths["pooled_prompt_embeds"] = pooled
        return widths

    def embeddings(self, guidance: float) -> tuple[str, ...]:
        # The pipeline asks for all of them whatever the guidance.
        return (
            "prompt_embeds",
            "negative_prompt_embeds",
            "pooled_prompt_embeds",
            "negative_pooled_prompt_embeds",
        )

    def encode(self, pipeline: Any, prompt: str, guidance: float) -> dict[str, Tensor]:
        encoded = pipeline.encode_prompt(prompt, do_classifier_free_guidance=True)
        return dict(zip(self.embeddings(guidance), encoded, strict=True))


SDXL = Family(
    name="sdxl",
    component="unet",
    class_name="UNet2DConditionModel",
    sampler=_SDXLSampler(
        class_name="StableDiffusionXLPipeline",
        guided_halves=True,
        text_encoders=(
            TextEncoder(
                name="text_encoder",
                class_name="CLIPTextModel",
                tokenizer="tokenizer",
                prefix="conditioner.embedders.0.",
                signature=CLIP_SIGNATURE,
                tokens=CLIP_TOKENS,
                widths={"prompt_embeds": "hidden_size"},
                fixed_length=True,
            ),
            TextEncoder(
                name="text_encoder_2",
                class_name="CLIPTextModelWithProjection",
                tokenizer="tokenizer_2",
                prefix="conditioner.embedders.1.",
                signature=CLIP_SIGNATURE,
                tokens=CLIP_TOKENS,
                widths={"prompt_embeds": "hidden_size", "pooled_prompt_embeds": "projection_dim"},
                fixed_length=True,
            ),
        ),
        hub="stabilityai/stable-diffusion-xl-base-1.0",
        steps=25,
        guidance=5.0,
        scheduler="EulerDiscreteScheduler",
        vae_prefix="first_stage_model.",
        patch=1,
    ),
    recognize=_recognize,
    convert=_convert,
    unused=frozenset({V_PREDICTION_KEY, ZERO_SNR_KEY}),
    # What the diffusers examples of NVIDIA's Model Optimizer exclude.
    keep_presets={
        "peers": (
            r"(^|\.)(time_emb_proj|conv_shortcut)$",
            r"^(time_embedding|add_embedding)\.",
            r"^conv_(in|out)$",
        )
    },
)
