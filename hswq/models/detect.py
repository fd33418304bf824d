"""What a checkpoint is, told from its keys and shapes alone."""

from __future__ import annotations

from hswq.formats.reader import Checkpoint
from hswq.models.families import FAMILIES
from hswq.models.family import LDM_PREFIXES, Detection, refusal
from hswq.strict_json import shown

__all__ = ["Detection", "denoiser_prefix", "detect"]

# Characters of a name: real ones are shorter, and those of hostile files are long and many.
_LOOKED_AT = 256
# Parts of keys, and what files are that have them. These go first: a LoRA's keys hold those of the
# layers that it adapts, and a video model's those of an image model.
_ADAPTERS = (
    (
        ("lora_up.", "lora_down.", "lora_A.", "lora_B.", ".hada_w1", ".lokr_w"),
        "a LoRA: an adapter, not a model; merge it into its checkpoint and give that",
    ),
    (
        ("control_model.", "controlnet_", "input_hint_block.", "control_layers."),
        "a ControlNet, not a text-to-image denoiser",
    ),
    (("ip_adapter",), "an IP-Adapter: it reads images for a model, and is none"),
    (("time_stack.", "motion_modules."), "a video diffusion model"),
)
# These name what no family has recognized.
_OTHERS = (
    (
        ("double_blocks.0.img_attn.", "single_transformer_blocks."),
        "a transformer of Flux's kind that is not Flux.1",
    ),
    (("cap_embedder.", "noise_refiner."), "a Lumina transformer"),
    (("joint_blocks.", "context_embedder."), "a Stable Diffusion 3 transformer"),
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
    (("decoder.conv_in.", "encoder.conv_in.", "decoder.conv1."), "a VAE without a denoiser"),
    (("redux_down.",), "Flux.1 Redux: it reads images for Flux.1, and is no denoiser"),
)


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
    cut = [name[:_LOOKED_AT] for name in shapes]
    found = _match(cut, _ADAPTERS)
    if found is not None:
        raise refusal(checkpoint, found)
    for family in FAMILIES.values():
        detection = family.recognize(checkpoint, shapes)
        if detection is not None:
            return detection
    names = ", ".join(shown(name) for name in list(shapes)[:10])
    raise refusal(
        checkpoint,
        _match(cut, _OTHERS) or f"of an unknown architecture; its first keys: {names}",
    )


def _match(names: list[str], signs: tuple[tuple[tuple[str, ...], str], ...]) -> str | None:
    for parts, meaning in signs:
        if any(part in name for name in names for part in parts):
            return meaning
    return None
