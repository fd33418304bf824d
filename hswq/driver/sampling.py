"""A checkpoint's pipeline and what it is to be conditioned on."""

from __future__ import annotations

import gc
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from hswq.calibration import (
    Embeddings,
    check_embeddings,
    encode_prompts,
    load_embeddings,
    load_prompts,
    prompts_hash,
    sampling_settings,
)
from hswq.config import CalibrationConfig
from hswq.driver.source import Source
from hswq.errors import BackendError
from hswq.models.denoiser import denoiser_config
from hswq.models.families import FAMILIES
from hswq.models.map import ModelMap
from hswq.models.sampler import Sampler
from hswq.progress import Progress

_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True, eq=False)
class Sampling:
    """What a checkpoint is sampled with.

    Attributes:
        pipeline: the family's, without text encoders.
        sampler: how it is called.
        conditioning: embeddings of the prompts.
        prompts: the prompts that were encoded; empty where embeddings were given.
        model_map: the map traced for the checkpoint.
        steps: sampler steps.
        guidance: guidance scale.
    """

    pipeline: Any
    sampler: Sampler
    conditioning: Embeddings
    prompts: list[str]
    model_map: ModelMap
    steps: int
    guidance: float

    @property
    def denoiser(self) -> Any:
        """The pipeline's UNet or transformer."""
        return getattr(self.pipeline, FAMILIES[self.model_map.family].component)


def prepare_sampling(
    source: Source, config: CalibrationConfig, progress: Progress, *, vae: bool = False
) -> Sampling:
    """Encode the prompts of a run, then load what paints them.

    Args:
        source: open checkpoint.
        config: samples, prompts, components and the like.
        progress: called with (phase, prompts encoded, prompts in all).
        vae: whether images are wanted, and not latents alone.
    Raises:
        InputError: a component or the prompts cannot be used.
        FormatError: a file is damaged.
    """
    # Runs with given statistics do without the pipeline.
    from hswq.models.pipeline import build_pipeline
    from hswq.models.quiet import quiet_libraries

    device = resolve_device(config.device)
    folder = None if config.pipeline is None else Path(config.pipeline)
    sampler = FAMILIES[source.detection.family].sampler
    # Prompts are read before anything slow, so that a wrong file is told at once.
    prompts = load_prompts(config.calib_file) if config.embeddings is None else []
    given = None if config.embeddings is None else load_embeddings(config.embeddings)
    denoiser, _ = denoiser_config(source.checkpoint, folder, source.detection)
    steps, guidance = sampling_settings(sampler, denoiser, config)
    if given is not None:
        check_embeddings(given, sampler.embeddings(guidance), sampler.widths(denoiser))
    model_map = source.trace(config.pipeline)
    build = partial(
        build_pipeline,
        source.checkpoint,
        source.detection,
        pipeline_dir=folder,
        dtype=calibration_dtype(config, source, model_map, device),
        device=device,
        text_encoders=tuple(map(Path, config.text_encoder)),
        allow_download=config.allow_download,
    )
    used = prompts[: config.samples]
    with quiet_libraries():
        # Text encoders and denoiser are never in memory together: each may fill a card.
        conditioning = given or _encode(
            build(None), sampler, guidance, used, prompts_hash(prompts), progress
        )
        _free_cached_memory(device)
        pipeline = build(model_map, encoders=False, vae=vae)
    return Sampling(pipeline, sampler, conditioning, used, model_map, steps, guidance)


def _encode(
    pipeline: Any,
    sampler: Sampler,
    guidance: float,
    prompts: list[str],
    label: str,
    progress: Progress,
) -> Embeddings:
    """Encode the prompts of a run; afterwards nobody holds the text encoders."""
    with torch.no_grad():
        return encode_prompts(
            prompts,
            lambda prompt: sampler.encode(pipeline, prompt, guidance),
            label,
            lambda done: progress("encode", done, len(prompts)),
        )


def _free_cached_memory(device: torch.device) -> None:
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def resolve_device(name: str) -> torch.device:
    """Return the device that `--device` asks for; auto takes a GPU where there is one.

    Raises:
        BackendError: cuda was asked for and torch sees no GPU.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if name == "cuda" and not torch.cuda.is_available():
        raise BackendError(
            "--device cuda was asked for, but this torch sees no GPU: use --device cpu, or install "
            "a torch build for your GPU."
        )
    return torch.device(name)


def calibration_dtype(
    config: CalibrationConfig, source: Source, model_map: ModelMap, device: torch.device
) -> torch.dtype:
    """Return the dtype the denoiser runs in.

    Auto is float32 on a CPU, where 16-bit products are slow or missing, and on a GPU the dtype of
    the first layer's weight.
    """
    if config.calib_dtype != "auto":
        return _DTYPES[config.calib_dtype]
    if device.type == "cpu":
        return torch.float32
    first = model_map.sources[f"{model_map.modules[0].name}.weight"][0]
    return source.checkpoint.tensors[first.key].torch_dtype
