"""What a checkpoint is, told from its keys and shapes alone."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from hswq.errors import InputError
from hswq.formats.reader import Checkpoint
from hswq.models.folders import read_json

LDM_PREFIXES = ("model.diffusion_model.", "")
V_PREDICTION_KEY, ZERO_SNR_KEY = "v_pred", "ztsnr"

_SUPPORTED = (
    "Supported are SDXL base checkpoints and their fine-tunes: single files, UNet-only files with "
    "or without 'model.diffusion_model.', sharded files and diffusers folders."
)

# Parts of keys that only one kind of file has. The first row that matches names the file: a LoRA's
# keys hold those of the layers it adapts, and a Flux transformer has Stable Diffusion 3's too.
_SIGNS = (
    (
        ("lora_up.", "lora_down.", "lora_A.", "lora_B.", ".hada_w1", ".lokr_w"),
        "a LoRA: an adapter, not a model; merge it into its checkpoint and give that",
    ),
    (
        ("control_model.", "controlnet_", "input_hint_block.", "control_layers."),
        "a ControlNet, not a text-to-image denoiser",
    ),
    (("double_blocks.0.img_attn.", "single_transformer_blocks."), "a Flux transformer"),
    (("cap_embedder.", "noise_refiner."), "a Z-Image (or Lumina) transformer"),
    (("joint_blocks.", "context_embedder."), "a Stable Diffusion 3 transformer"),
    (("time_stack.", "motion_modules."), "a video diffusion model"),
)
_PARTS = (
    (
        (
            "text_model.",
            "transformer.resblocks.",
            "cond_stage_model.",
            "embed_tokens.",
            "encoder.block.0.layer.",
        ),
        "a text encoder without a denoiser",
    ),
    (("decoder.conv_in.", "encoder.conv_in."), "a VAE without a denoiser"),
)


@dataclass(frozen=True)
class Detection:
    """What `detect` found.

    Attributes:
        family: 'sdxl'.
        layout: 'ldm' (input_blocks…) or 'diffusers' (down_blocks…).
        prefix: what the denoiser's keys start with; may be empty.
        prediction_type: 'epsilon' or 'v_prediction'.
        zero_terminal_snr: whether the noise schedule was rescaled to end in pure noise.
    """

    family: str
    layout: str
    prefix: str
    prediction_type: str
    zero_terminal_snr: bool


def denoiser_prefix(checkpoint: Checkpoint) -> str:
    """Return what the denoiser's keys start with; '' where the file holds nothing else.

    Unlike `detect` this refuses no architecture: quantized layers hide what a file is.
    """
    full = LDM_PREFIXES[0]
    return full if any(name.startswith(full) for name in checkpoint.tensors) else ""


def detect(checkpoint: Checkpoint) -> Detection:
    """Tell a checkpoint's family, layout and noise parametrization from its header.

    Raises:
        InputError: it is of no supported architecture; the text says what it is.
    """
    shapes = {name: info.shape for name, info in checkpoint.tensors.items()}
    found = _match(shapes, _SIGNS)
    if found is not None:
        raise _refusal(checkpoint, found)
    for prefix in LDM_PREFIXES:
        first, label = f"{prefix}input_blocks.0.0.weight", f"{prefix}label_emb.0.0.weight"
        if first in shapes:
            _check_unet(checkpoint, shapes[first], shapes.get(label), _context(shapes, prefix))
            return _with_prediction(checkpoint, "ldm", prefix)
    first, label = "conv_in.weight", "add_embedding.linear_1.weight"
    if first in shapes and any(name.startswith("up_blocks.") for name in shapes):
        _check_unet(checkpoint, shapes[first], shapes.get(label), _context(shapes, ""))
        return _with_prediction(checkpoint, "diffusers", "")
    names = ", ".join(repr(name) for name in list(shapes)[:10])
    raise _refusal(
        checkpoint, _match(shapes, _PARTS) or f"of an unknown architecture; its first keys: {names}"
    )


def _match(
    shapes: dict[str, tuple[int, ...]], signs: tuple[tuple[tuple[str, ...], str], ...]
) -> str | None:
    for parts, meaning in signs:
        if any(part in name for name in shapes for part in parts):
            return meaning
    return None


def _refusal(checkpoint: Checkpoint, found: str) -> InputError:
    return InputError(f"'{checkpoint.path}' is {found}. {_SUPPORTED}")


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
        raise _refusal(
            checkpoint, f"{family} inpainting UNet: its first convolution reads 9 channels, not 4"
        )
    if len(first) != 4 or first[1] != 4:
        raise _refusal(
            checkpoint, f"a UNet whose first convolution is {list(first)}; SDXL's reads 4 channels"
        )
    if not sdxl:
        version = {768: "a Stable Diffusion 1.x", 1024: "a Stable Diffusion 2.x"}
        raise _refusal(
            checkpoint,
            f"{version.get(context or 0, family)} UNet (or another without SDXL's size "
            f"conditioning): its cross-attention reads {context or 'no'} channels",
        )
    if context == 1280 and conditioning is not None and conditioning[-1] == 2560:
        raise _refusal(checkpoint, "an SDXL refiner, not an SDXL base model")
    if any(name.startswith("edm_") for name in checkpoint.tensors):
        raise _refusal(
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
        raise _refusal(
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
