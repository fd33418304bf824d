"""Statistics of a checkpoint from its own sampler."""

from __future__ import annotations

import logging
import os
from pathlib import Path

import torch

from hswq.calibration import (
    Calibration,
    Embeddings,
    load_embeddings,
    load_prompts,
    run_calibration,
)
from hswq.config import CalibrationConfig
from hswq.driver.source import Source, open_source
from hswq.errors import BackendError, InputError
from hswq.models.fingerprint import fingerprint
from hswq.models.map import ModelMap
from hswq.progress import Progress, no_progress

logger = logging.getLogger(__name__)

_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


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


def calibrate_checkpoint(
    src: str | os.PathLike[str],
    config: CalibrationConfig,
    *,
    progress: Progress = no_progress,
) -> Calibration:
    """Run a checkpoint's own sampler and return what the hooks saw.

    Args:
        src: single file, sharded index or diffusers folder.
        config: samples, steps, prompts and the like.
        progress: called with (phase, done, total).
    Returns:
        Statistics of every Linear and Conv2d of the denoiser, with the traced map and the
        fingerprint of the checkpoint.
    Raises:
        InputError: the checkpoint, a component or the prompts cannot be used.
        FormatError: a file is damaged.
    """
    with open_source(src) as source:
        return calibrate_source(source, config, progress)


def calibrate_source(source: Source, config: CalibrationConfig, progress: Progress) -> Calibration:
    """Calibrate an open checkpoint; see `calibrate_checkpoint`."""
    # Runs with given statistics do without the pipeline.
    from hswq.models.quiet import quiet_libraries
    from hswq.models.sdxl import build_pipeline

    if source.detection.family != "sdxl":
        raise InputError(
            f"hswq does not sample {source.detection.family} checkpoints by itself: run diffusers' "
            "pipeline on it within `hswq.observe(pipeline.transformer)`, save the calibration, and "
            "give that file with --stats."
        )
    device = resolve_device(config.device)
    # Prompts are read before anything slow, so that a wrong file is told at once.
    conditioning: Embeddings | list[str] = (
        load_prompts(config.calib_file)
        if config.embeddings is None
        else load_embeddings(config.embeddings)
    )
    model_map = source.trace(config.pipeline)
    pipeline = build_pipeline(
        source.checkpoint,
        source.detection,
        model_map,
        pipeline_dir=None if config.pipeline is None else Path(config.pipeline),
        embeddings=config.embeddings is not None,
        dtype=_calibration_dtype(config, source, model_map, device),
        device=device,
        allow_download=config.allow_download,
    )
    with quiet_libraries():
        calibration = run_calibration(pipeline, config, conditioning, progress=progress)
    calibration.model_map = model_map
    calibration.fingerprint = fingerprint(source.checkpoint, model_map)
    return calibration


def _calibration_dtype(
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
