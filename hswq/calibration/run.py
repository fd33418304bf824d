"""The sampling run: the pipeline's own sampler on real prompts, with the hooks in place."""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from typing import Any

import torch

from hswq.calibration.observer import observe
from hswq.calibration.prompts import Embeddings, prompts_hash
from hswq.calibration.statistics import Calibration
from hswq.config import CalibrationConfig
from hswq.errors import InputError
from hswq.progress import Progress, no_progress

logger = logging.getLogger(__name__)

# diffusers refuses image edges that are not multiples of this.
_PIXEL_STEP = 8


def run_calibration(
    pipeline: Any,
    config: CalibrationConfig,
    conditioning: Sequence[str] | Embeddings,
    *,
    progress: Progress = no_progress,
    samples: Sequence[int] | None = None,
) -> Calibration:
    """Sample latents with a diffusers pipeline and return what the hooks on its denoiser saw.

    Sample i starts from noise of seed `config.seed + i`, drawn on the CPU so that it is the same
    for every device, and takes prompt i modulo their number. Statistics of disjoint samples merge
    to those of one run, bit for bit.

    Args:
        pipeline: diffusers pipeline with a `unet` or a `transformer`, on its device.
        config: steps, latent, guidance, seed, backend and, where `samples` is None, how many.
        conditioning: prompts, or embeddings where the pipeline has no text encoders.
        progress: called after every sampler step with ('calibrate', steps done, steps in all).
        samples: indices to run, each >= 0 and once; None runs 0 .. config.samples - 1.
    Returns:
        Statistics with settings and samples; the caller adds the model map and the fingerprint.
    Raises:
        InputError: the latent size, the samples or the embeddings do not fit, or every sample
            ended in NaN or Inf.
    """
    indices = list(range(config.samples)) if samples is None else list(samples)
    if not indices or min(indices) < 0 or len(set(indices)) != len(indices):
        raise InputError(f"samples are {indices[:10]}; distinct indices >= 0 are needed.")
    denoiser = getattr(pipeline, "unet", None) or pipeline.transformer
    pixels = config.latent * pipeline.vae_scale_factor
    if pixels % _PIXEL_STEP:
        step = _PIXEL_STEP // pipeline.vae_scale_factor
        raise InputError(
            f"--latent {config.latent} is {pixels} pixels with this checkpoint's VAE; a multiple "
            f"of {_PIXEL_STEP} is needed: use --latent {-(-config.latent // step) * step}."
        )
    if isinstance(conditioning, Embeddings):
        _check_widths(denoiser.config, conditioning)
    if max(indices) >= len(conditioning):
        logger.info(
            "%d prompts for samples up to %d: they are used again from the first, with other noise",
            len(conditioning),
            max(indices),
        )
    pipeline.set_progress_bar_config(disable=True)
    finite = 0
    input_max = config.activations == "fp8"
    with observe(denoiser, backend=config.backend, input_max=input_max) as calibration:
        for position, index in enumerate(indices):

            def report(pipe: Any, step: int, _: Any, tensors: Any, done: int = position) -> Any:
                steps = pipe.num_timesteps
                progress("calibrate", done * steps + step + 1, len(indices) * steps)
                return tensors

            latents = pipeline(
                **_arguments(conditioning, index, denoiser),
                height=pixels,
                width=pixels,
                num_inference_steps=config.steps,
                guidance_scale=config.guidance,
                generator=torch.Generator("cpu").manual_seed(config.seed + index),
                output_type="latent",
                callback_on_step_end=report,
            ).images
            finite += bool(torch.isfinite(latents).all())
        if finite == 0:
            raise InputError(
                f"all {len(indices)} samples ended in NaN or Inf with the denoiser in "
                f"{_dtype_name(denoiser)}: its activations overflow, or the checkpoint is damaged. "
                "Run with --calib-dtype bf16 or fp32."
            )
    if finite < len(indices):
        logger.warning(
            "%d of %d samples ended in NaN or Inf; use --calib-dtype bf16 or fp32",
            len(indices) - finite,
            len(indices),
        )
    calibration.settings = _settings(pipeline, denoiser, config, conditioning)
    calibration.samples = tuple(sorted(indices))
    logger.info(
        "calibrated %d layers: %d samples of %d steps at %d pixels, %s",
        len(calibration.modules),
        len(indices),
        config.steps,
        pixels,
        _dtype_name(denoiser),
    )
    return calibration


def _arguments(
    conditioning: Sequence[str] | Embeddings, index: int, denoiser: Any
) -> dict[str, Any]:
    if isinstance(conditioning, Embeddings):
        return dict(conditioning.arguments(index, denoiser.device, denoiser.dtype))
    return {"prompt": conditioning[index % len(conditioning)]}


def _check_widths(unet: Any, embeddings: Embeddings) -> None:
    """Refuse embeddings of other text encoders than the UNet was trained with.

    Args:
        unet: the denoiser's configuration; a transformer's has none of these entries.
        embeddings: what is to be fed in.
    """
    widths = []
    if "cross_attention_dim" in unet:
        widths.append(("prompt_embeds", unet.cross_attention_dim))
    if unet.get("addition_embed_type") == "text_time":
        # Six sizes and crop offsets are embedded beside the pooled text.
        times = 6 * unet.addition_time_embed_dim
        widths.append(("pooled_prompt_embeds", unet.projection_class_embeddings_input_dim - times))
    for key, width in widths:
        shape = list(embeddings.tensors()[key].shape)
        if shape[-1] != width:
            raise InputError(
                f"{key!r} has shape {shape}, but this denoiser needs a last dimension of {width}: "
                "the embeddings were made with text encoders of another model."
            )


def _dtype_name(denoiser: Any) -> str:
    return str(denoiser.dtype).removeprefix("torch.")


def _settings(
    pipeline: Any,
    denoiser: Any,
    config: CalibrationConfig,
    conditioning: Sequence[str] | Embeddings,
) -> dict[str, Any]:
    """Return what the statistics depend on beside the checkpoint and the samples."""
    sampler = json.loads(pipeline.scheduler.to_json_string())
    embedded = isinstance(conditioning, Embeddings)
    return {
        "steps": config.steps,
        "latent": config.latent,
        "guidance": config.guidance,
        "seed": config.seed,
        "embeddings" if embedded else "prompts": (
            conditioning.hash()
            if isinstance(conditioning, Embeddings)
            else prompts_hash(conditioning)
        ),
        "sampler": type(pipeline.scheduler).__name__,
        # Entries with an underscore name versions and folders, which change nothing.
        "sampler_config": {key: sampler[key] for key in sampler if not key.startswith("_")},
        "dtype": _dtype_name(denoiser),
    }
