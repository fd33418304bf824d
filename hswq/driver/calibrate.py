"""Statistics of a checkpoint from its own sampler."""

from __future__ import annotations

import gc
import json
import logging
import os
import time
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import torch

from hswq.calibration import (
    Calibration,
    Codes,
    Embeddings,
    SamplingRun,
    check_embeddings,
    codes_path,
    encode_prompts,
    load_embeddings,
    load_prompts,
    prompts_hash,
    run_calibration,
    sampling_settings,
)
from hswq.config import CalibrationConfig
from hswq.driver.compensate import RoundedParts, check_codes, write_codes
from hswq.driver.source import Source, open_source
from hswq.errors import BackendError, HswqError, InputError
from hswq.models.denoiser import denoiser_config
from hswq.models.families import FAMILIES
from hswq.models.fingerprint import fingerprint
from hswq.models.map import ModelMap
from hswq.models.sampler import Sampler
from hswq.plan import measure_impact
from hswq.progress import Progress, no_progress

logger = logging.getLogger(__name__)

_SAVE_EVERY_S = 60.0

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
    output: str | os.PathLike[str] | None = None,
    *,
    progress: Progress = no_progress,
) -> Calibration:
    """Run a checkpoint's own sampler and return what the hooks saw.

    Args:
        src: single file, sharded index or diffusers folder.
        config: samples, steps, prompts and the like.
        output: statistics file to write, and to write again from time to time while impact is
            measured. Where it holds an unfinished measurement of the same run, that is gone on
            with. Compensated codes are written beside it, in NAME.codes.safetensors. None writes
            nothing.
        progress: called with (phase, done, total).
    Returns:
        Statistics of every Linear and Conv2d of the denoiser, with the traced map and the
        fingerprint of the checkpoint.
    Raises:
        InputError: the checkpoint, a component or the prompts cannot be used.
        FormatError: a file is damaged.
    """
    with open_source(src) as source:
        return calibrate_source(source, config, progress, None if output is None else Path(output))


def calibrate_source(
    source: Source,
    config: CalibrationConfig,
    progress: Progress,
    output: Path | None = None,
    codes: Path | None = None,
) -> Calibration:
    """Calibrate an open checkpoint; see `calibrate_checkpoint`.

    `codes` is the file of compensated codes to write, beside `output` where it is not given.
    """
    # Runs with given statistics do without the pipeline.
    from hswq.models.pipeline import build_pipeline
    from hswq.models.quiet import quiet_libraries

    device = resolve_device(config.device)
    folder = None if config.pipeline is None else Path(config.pipeline)
    checkpoint, sampler = source.checkpoint, FAMILIES[source.detection.family].sampler
    # Prompts are read before anything slow, so that a wrong file is told at once.
    prompts = load_prompts(config.calib_file) if config.embeddings is None else []
    given = None if config.embeddings is None else load_embeddings(config.embeddings)
    denoiser, _ = denoiser_config(checkpoint, folder, source.detection)
    _, guidance = sampling_settings(sampler, denoiser, config)
    if given is not None:
        check_embeddings(given, sampler.embeddings(guidance), sampler.widths(denoiser))
    model_map = source.trace(config.pipeline)
    build = partial(
        build_pipeline,
        checkpoint,
        source.detection,
        pipeline_dir=folder,
        dtype=calibration_dtype(config, source, model_map, device),
        device=device,
        text_encoders=tuple(map(Path, config.text_encoder)),
        allow_download=config.allow_download,
    )
    with quiet_libraries():
        # Text encoders and denoiser are never in memory together: each may fill a card.
        conditioning = given or _encode(build(None), sampler, config, guidance, prompts, progress)
        _free_cached_memory(device)
        pipeline = build(model_map, encoders=False)
        identity = fingerprint(checkpoint, model_map)
        run = SamplingRun(pipeline, sampler, config, conditioning)
        calibration = _unfinished(output, run, identity, config)
        if calibration is None:
            calibration = run_calibration(
                pipeline, sampler, config, conditioning, progress=progress
            )
            calibration.model_map, calibration.fingerprint = model_map, identity
            if output is not None:
                # What follows may be interrupted, and need not sample again.
                calibration.save(output)
        if config.rounding == "compensated":
            calibration.codes = codes or codes_path(output or _no_place_for_codes())
            if not _are_codes_of(calibration, config):
                write_codes(
                    source, model_map, run, calibration, config, calibration.codes, progress
                )
        if config.sensitivity == "impact":
            _measure_impact(run.denoiser, calibration, config, progress, output)
    if output is not None:
        calibration.save(output)
    return calibration


def _no_place_for_codes() -> Path:
    raise InputError(
        "compensated codes need a file: give calibrate_checkpoint an output, beside which they are "
        "written."
    )


def _are_codes_of(calibration: Calibration, config: CalibrationConfig) -> bool:
    """Tell whether an interrupted run has left the codes that are wanted."""
    if calibration.codes is None or not calibration.codes.is_file():
        return False
    try:
        with Codes(calibration.codes) as codes:
            check_codes(codes, calibration, config)
    except HswqError:
        return False
    return True


def _measure_impact(
    denoiser: Any,
    calibration: Calibration,
    config: CalibrationConfig,
    progress: Progress,
    output: Path | None,
) -> None:
    """Measure with the codes that files will have."""
    with ExitStack() as opened:
        rounder = None
        compensated = config.rounding == "compensated"
        if compensated and calibration.codes is not None and calibration.model_map is not None:
            codes = opened.enter_context(Codes(calibration.codes))
            rounder = RoundedParts(codes, calibration.model_map)
        measure_impact(
            *(denoiser, calibration, config),
            rounder=rounder,
            progress=progress,
            save=_saver(calibration, output),
        )


def _unfinished(
    output: Path | None, run: SamplingRun, identity: str, config: CalibrationConfig
) -> Calibration | None:
    """Return the statistics of an equal run that was interrupted after sampling."""
    measures = config.sensitivity == "impact" or config.rounding == "compensated"
    if output is None or not measures or not output.is_file():
        return None
    try:
        found = Calibration.load(output)
    except HswqError:
        return None
    same = (found.fingerprint, found.settings, found.samples) == (
        *(identity, json.loads(json.dumps(run.settings()))),
        tuple(run.indices),
    )
    complete = found.impact is not None and found.impact.values
    if not same or complete or (config.sensitivity == "impact" and not _has_calls(found, run)):
        return None
    if config.activations == "fp8" and any(found.input_max(name) is None for name in found.modules):
        return None
    logger.info("going on with what %s holds", output)
    return found


def _has_calls(found: Calibration, run: SamplingRun) -> bool:
    """Tell whether as many steps were recorded as are asked for, of one or two calls each."""
    steps = len(run.recorded_steps())
    return len(found.records) in (steps, 2 * steps)


def _saver(calibration: Calibration, output: Path | None) -> Callable[[], None]:
    """Return a function that saves the statistics when the last time was long enough ago."""
    saved = time.monotonic()

    def save() -> None:
        nonlocal saved
        if output is not None and time.monotonic() - saved > _SAVE_EVERY_S:
            calibration.save(output)
            saved = time.monotonic()

    return save


def _encode(
    pipeline: Any,
    sampler: Sampler,
    config: CalibrationConfig,
    guidance: float,
    prompts: list[str],
    progress: Progress,
) -> Embeddings:
    """Encode the prompts of a run; afterwards nobody holds the text encoders."""
    used = prompts[: config.samples]
    with torch.no_grad():
        return encode_prompts(
            used,
            lambda prompt: sampler.encode(pipeline, prompt, guidance),
            prompts_hash(prompts),
            lambda done: progress("encode", done, len(used)),
        )


def _free_cached_memory(device: torch.device) -> None:
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


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
