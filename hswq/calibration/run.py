"""The sampling run: the pipeline's own sampler on real prompts, with the hooks in place."""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from hswq.calibration.embeddings import Embeddings, check_embeddings
from hswq.calibration.observer import observe
from hswq.calibration.prompts import prompts_hash
from hswq.calibration.statistics import Calibration
from hswq.config import CalibrationConfig
from hswq.errors import InputError
from hswq.models.sampler import Sampler
from hswq.progress import Progress, no_progress

logger = logging.getLogger(__name__)

# diffusers refuses image edges that are not multiples of this.
_PIXEL_STEP = 8


def run_calibration(
    pipeline: Any,
    sampler: Sampler,
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
        sampler: how the family's pipeline is called.
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
    pixels = _pixels(pipeline, sampler, config.latent)
    steps, guidance = sampling_settings(sampler, denoiser.config, config)
    if isinstance(conditioning, Embeddings):
        check_embeddings(
            conditioning, sampler.embeddings(guidance), sampler.widths(denoiser.config)
        )
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
                every = pipe.num_timesteps
                progress("calibrate", done * every + step + 1, len(indices) * every)
                return tensors

            if isinstance(conditioning, Embeddings):
                given = sampler.arguments(
                    conditioning.sample(index, denoiser.device, denoiser.dtype), guidance
                )
            else:
                given = sampler.prompted(conditioning[index % len(conditioning)], guidance)
            latents = pipeline(
                **given,
                **sampler.guided(guidance),
                height=pixels,
                width=pixels,
                num_inference_steps=steps,
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
    calibration.settings = {
        "steps": steps,
        "latent": config.latent,
        "guidance": guidance,
        "seed": config.seed,
        **_conditioning_hash(conditioning),
        **_sampler_settings(pipeline),
        "dtype": _dtype_name(denoiser),
    }
    calibration.samples = tuple(sorted(indices))
    logger.info(
        "calibrated %d layers: %d samples of %d steps at %d pixels, %s",
        len(calibration.modules),
        len(indices),
        steps,
        pixels,
        _dtype_name(denoiser),
    )
    return calibration


def sampling_settings(
    sampler: Sampler, denoiser_config: Mapping[str, Any], config: CalibrationConfig
) -> tuple[int, float]:
    """Return steps and guidance: what was asked for, else what this denoiser is run with."""
    steps, guidance = sampler.defaults(denoiser_config)
    return (
        steps if config.steps is None else config.steps,
        guidance if config.guidance is None else config.guidance,
    )


def _pixels(pipeline: Any, sampler: Sampler, latent: int) -> int:
    """Return the edge of the image that a latent stands for.

    Raises:
        InputError: the pipeline would refuse it, or take a smaller one.
    """
    scale: int = pipeline.vae_scale_factor
    step = math.lcm(sampler.patch, _PIXEL_STEP // math.gcd(_PIXEL_STEP, scale))
    if latent % step:
        raise InputError(
            f"--latent {latent} is {latent * scale} pixels with this checkpoint's VAE; a multiple "
            f"of {step * scale} is needed: use --latent {-(-latent // step) * step}."
        )
    return latent * scale


def _dtype_name(denoiser: Any) -> str:
    return str(denoiser.dtype).removeprefix("torch.")


def _conditioning_hash(conditioning: Sequence[str] | Embeddings) -> dict[str, str]:
    if not isinstance(conditioning, Embeddings):
        return {"prompts": prompts_hash(conditioning)}
    if conditioning.prompts is not None:
        return {"prompts": conditioning.prompts}
    return {"embeddings": conditioning.hash()}


def _sampler_settings(pipeline: Any) -> dict[str, Any]:
    entries = json.loads(pipeline.scheduler.to_json_string())
    return {
        "sampler": type(pipeline.scheduler).__name__,
        # Entries with an underscore name versions and folders, which change nothing.
        "sampler_config": {key: entries[key] for key in entries if not key.startswith("_")},
    }
