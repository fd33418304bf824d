"""Statistics of a checkpoint from its own sampler."""

from __future__ import annotations

import json
import logging
import os
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from hswq.calibration import (
    Calibration,
    Codes,
    SamplingRun,
    codes_path,
    run_calibration,
)
from hswq.config import CalibrationConfig
from hswq.driver.compensate import RoundedParts, check_codes, write_codes
from hswq.driver.sampling import prepare_sampling
from hswq.driver.source import Source, open_source
from hswq.errors import HswqError, InputError
from hswq.models.fingerprint import fingerprint
from hswq.models.quiet import quiet_libraries
from hswq.plan import measure_impact
from hswq.progress import Progress, no_progress

logger = logging.getLogger(__name__)

_SAVE_EVERY_S = 60.0


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
    config = config.settled()
    sampling = prepare_sampling(source, config, progress)
    model_map = sampling.model_map
    sampled = (sampling.pipeline, sampling.sampler, config, sampling.conditioning)
    with quiet_libraries():
        identity = fingerprint(source.checkpoint, model_map)
        run = SamplingRun(*sampled)
        calibration = _unfinished(output, run, identity, config)
        if calibration is None:
            calibration = run_calibration(*sampled, progress=progress)
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
