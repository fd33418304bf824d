"""The sampling run: the pipeline's own sampler on real prompts, with the hooks in place."""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from hswq.calibration.calls import Recorder
from hswq.calibration.embeddings import Embeddings, check_embeddings
from hswq.calibration.observer import warn_of_gaps, watch
from hswq.calibration.prompts import prompts_hash
from hswq.calibration.statistics import Calibration
from hswq.config import CalibrationConfig
from hswq.errors import InputError
from hswq.models.offload import execution_device
from hswq.models.sampler import Sampler
from hswq.progress import Progress, no_progress

logger = logging.getLogger(__name__)

# diffusers refuses image edges that are not multiples of this.
_PIXEL_STEP = 8


def check_calibration(calibration: Calibration, dtype: str) -> None:
    """Say what the statistics of a whole run lack.

    Args:
        calibration: of all samples.
        dtype: of the denoiser.
    Raises:
        InputError: every sample ended in NaN or Inf.
    """
    count, lost = len(calibration.samples), len(calibration.overflowed)
    if lost == count:
        raise InputError(
            f"all {count} samples ended in NaN or Inf with the denoiser in {dtype}: its "
            "activations overflow, or the checkpoint is damaged. Run with --calib-dtype bf16 or "
            "fp32."
        )
    if lost:
        logger.warning(
            "%d of %d samples ended in NaN or Inf; use --calib-dtype bf16 or fp32", lost, count
        )
    warn_of_gaps(calibration)
    settings = calibration.settings
    logger.info(
        "calibrated %d layers: %d samples of %d steps at latent %d, %s",
        len(calibration.modules),
        count,
        settings["steps"],
        settings["latent"],
        dtype,
    )


class SamplingRun:
    """The samples of a calibration, which can be run again: equal seeds, equal calls.

    Sample i starts from noise of seed `config.seed + i`, drawn on the CPU so that it is the same
    for every device, and takes prompt i modulo their number.

    Args:
        pipeline: diffusers pipeline with a `unet` or a `transformer`, on its device.
        sampler: how the family's pipeline is called.
        config: steps, latent, guidance, seed, calls, backend and the number of samples.
        conditioning: prompts, or embeddings where the pipeline has no text encoders.
        samples: indices to run, each >= 0 and once; None runs 0 .. config.samples - 1.
    Raises:
        InputError: the latent size, the samples or the embeddings do not fit.
    """

    def __init__(
        self,
        pipeline: Any,
        sampler: Sampler,
        config: CalibrationConfig,
        conditioning: Sequence[str] | Embeddings,
        samples: Sequence[int] | None = None,
    ) -> None:
        self.indices = list(range(config.samples)) if samples is None else list(samples)
        if not self.indices or min(self.indices) < 0 or len(set(self.indices)) < len(self.indices):
            raise InputError(f"samples are {self.indices[:10]}; distinct indices >= 0 are needed.")
        self.denoiser = getattr(pipeline, "unet", None) or pipeline.transformer
        self.pixels = _pixels(pipeline, sampler, config.latent)
        self.steps, self.guidance = sampling_settings(sampler, self.denoiser.config, config)
        self.device = execution_device(self.denoiser)
        self._pipeline, self._sampler, self._config = pipeline, sampler, config
        self._conditioning = conditioning
        if isinstance(conditioning, Embeddings):
            check_embeddings(
                conditioning,
                sampler.embeddings(self.guidance),
                sampler.widths(self.denoiser.config),
            )
        if max(self.indices) >= len(conditioning):
            logger.info(
                "%d prompts for samples up to %d: they are used again from the first, with other "
                "noise",
                len(conditioning),
                max(self.indices),
            )
        pipeline.set_progress_bar_config(disable=True)

    @property
    def dtype(self) -> str:
        """The denoiser's dtype by name."""
        return str(self.denoiser.dtype).removeprefix("torch.")

    @property
    def halves_guidance(self) -> float | None:
        """The guidance scale, where the halves of a batch are the rows without prompt and with."""
        guided = self._sampler.guided_halves and self.guidance > 1.0
        return self.guidance if guided else None

    def recorded_steps(self) -> set[tuple[int, int]]:
        """Return (sample, step) of the steps whose calls are recorded."""
        count = min(self._config.calls, len(self.indices) * self.steps)
        chosen = set()
        for number in range(count):
            step = (2 * number + 1) * self.steps // (2 * count)
            free = (
                sample
                for offset in range(len(self.indices))
                for sample in [self.indices[(number + offset) % len(self.indices)]]
                if (sample, step) not in chosen
            )
            chosen.add((next(free), step))
        return chosen

    def observe(self, samples: Sequence[int], progress: Progress = no_progress) -> Calibration:
        """Run some of the samples and return what the hooks on the denoiser saw.

        Statistics of disjoint samples merge to those of one run bit for bit, recorded calls
        included. Where the ranking is by impact, the denoiser's calls in `config.calls` steps are
        recorded, spread evenly over the sampler's schedule and each, as far as there are enough, of
        another sample.

        Args:
            samples: indices, all of them of this run.
            progress: called after every sampler step with ('calibrate', steps done, steps in all).
        Returns:
            Statistics with settings and samples; the caller adds model map and fingerprint.
        """
        config = self._config
        recorder = Recorder(0)
        recorder.armed = False
        wanted = self.recorded_steps() if config.sensitivity == "impact" else set()

        def before(sample: int, step: int) -> None:
            recorder.armed = (sample, step) in wanted

        watched = watch(
            self.denoiser,
            backend=config.backend,
            input_max=config.activations == "fp8",
            recorder=recorder if wanted else None,
        )
        with watched as calibration:
            overflowed = self.sample(samples, "calibrate", progress, before)
        calibration.settings = self.settings()
        calibration.samples = tuple(sorted(samples))
        calibration.overflowed = tuple(sorted(overflowed))
        return calibration

    def sample(
        self,
        samples: Sequence[int],
        phase: str,
        progress: Progress = no_progress,
        before: Callable[[int, int], None] = lambda sample, step: None,
    ) -> list[int]:
        """Run some of the samples.

        Args:
            samples: their indices.
            phase: name of the phase for `progress`, which is called after every sampler step.
            progress: as for `observe`.
            before: called with sample and step before each sampler step.
        Returns:
            Those that ended in NaN or Inf.
        """
        overflowed = []
        for position, index in enumerate(samples):

            def report(done: int, every: int, position: int = position) -> None:
                progress(phase, position * every + done, len(samples) * every)

            if not self._sample(index, report, before):
                overflowed.append(index)
        return overflowed

    def _sample(
        self,
        index: int,
        progress: Callable[[int, int], None],
        before: Callable[[int, int], None],
    ) -> bool:
        def report(pipe: Any, step: int, _: Any, tensors: Any) -> Any:
            progress(step + 1, pipe.num_timesteps)
            before(index, step + 1)
            return tensors

        before(index, 0)
        latents = self._pipeline(
            **self._arguments(index),
            **self._sampler.guided(self.guidance),
            height=self.pixels,
            width=self.pixels,
            num_inference_steps=self.steps,
            generator=torch.Generator("cpu").manual_seed(self._config.seed + index),
            output_type="latent",
            callback_on_step_end=report,
        ).images
        return bool(torch.isfinite(latents).all())

    def _arguments(self, index: int) -> dict[str, Any]:
        given = self._conditioning
        if isinstance(given, Embeddings):
            sample = given.sample(index, self.device, self.denoiser.dtype)
            return self._sampler.arguments(sample, self.guidance)
        return self._sampler.prompted(given[index % len(given)], self.guidance)

    def facts(self) -> dict[str, Any]:
        """Return the settings, and by what bytes prompts count: another encoder gives others."""
        given = self._conditioning
        if not isinstance(given, Embeddings):
            return self.settings()
        return {**self.settings(), "embeddings": given.hash()}

    def settings(self) -> dict[str, Any]:
        """Return what the statistics depend on beside the checkpoint and the samples."""
        return {
            "steps": self.steps,
            "latent": self._config.latent,
            "guidance": self.guidance,
            "seed": self._config.seed,
            **_conditioning_hash(self._conditioning),
            **_sampler_settings(self._pipeline),
            "dtype": self.dtype,
        }


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
