"""Statistics of a checkpoint from its own sampler, in parts that are kept and shared out."""

from __future__ import annotations

import dataclasses
import os
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack
from functools import reduce
from pathlib import Path
from typing import Any

import torch

import hswq
from hswq.calibration import (
    Calibration,
    Codes,
    Impact,
    SamplingRun,
    check_calibration,
    codes_path,
)
from hswq.config import CalibrationConfig
from hswq.driver.compensate import RoundedParts, write_codes
from hswq.driver.paths import check_outputs
from hswq.driver.ranks import Ranks, joined_ranks
from hswq.driver.sampling import Encodings, machine_facts, memory_told, prepare_sampling
from hswq.driver.source import Source, open_source
from hswq.driver.work import WorkFolder
from hswq.errors import InputError
from hswq.formats.reader import Checkpoint
from hswq.formats.writer import place_copy
from hswq.models.defaults import plain_defaults
from hswq.models.fingerprint import fingerprint
from hswq.models.quiet import quiet_libraries
from hswq.plan import complete_impact, impact_options, measure_impact
from hswq.progress import Progress, no_progress

_SAVE_EVERY_S = 60.0
# Options that change no figure, and `preset`, which stands for others.
_WITHOUT_EFFECT = (
    *("preset", "gram_memory", "allow_download"),
    *("cpu_offload", "sequential_offload"),
)


@plain_defaults()
def calibrate_checkpoint(
    src: str | os.PathLike[str],
    config: CalibrationConfig,
    output: str | os.PathLike[str] | None = None,
    *,
    progress: Progress = no_progress,
) -> Calibration:
    """Run a checkpoint's own sampler and return what the hooks saw.

    What is finished is kept in NAME.hswq-work beside the output until all is: a run that was
    interrupted goes on from there. Under torchrun the processes share samples, Gram matrices and
    layers; the result is the same, bit for bit.

    Args:
        src: single file, sharded index or diffusers folder.
        config: samples, steps, prompts and the like.
        output: statistics file to write. Compensated codes are written beside it, in
            NAME.codes.safetensors. None writes nothing.
        progress: called with (phase, done, total).
    Returns:
        Statistics of every Linear and Conv2d of the denoiser, with the traced map and the
        fingerprint of the checkpoint.
    Raises:
        InputError: the checkpoint, a component or the prompts cannot be used, an output cannot or
            must not be written, or the work folder holds a run with other options.
        FormatError: a file is damaged.
        RankError: another process of the run has ended.
    """
    config = config.settled()
    if output is None and config.rounding == "compensated":
        raise InputError(
            "compensated codes need a file: give calibrate_checkpoint an output, beside which they "
            "are written."
        )
    with memory_told(config, keeps=output is not None), ExitStack() as opened:
        # Before all that may fail on one machine alone: the others would wait for it.
        ranks = opened.enter_context(joined_ranks())
        if output is not None:
            check_outputs(src, config, output, codes_path(output))
        source = opened.enter_context(open_source(src))
        if output is None:
            target = Path(opened.enter_context(tempfile.TemporaryDirectory())) / "statistics"
        else:
            target = Path(output)
        work = opened.enter_context(WorkFolder(target, shared=not ranks.is_first))
        calibration = calibrate_source(source, config, work, ranks, progress)
        if output is not None:
            if ranks.is_first:
                save_with_codes(calibration, target)
            calibration.codes = codes_path(target) if calibration.codes is not None else None
        ranks.wait()
    return calibration


def calibrate_source(
    source: Source,
    config: CalibrationConfig,
    work: WorkFolder,
    ranks: Ranks,
    progress: Progress,
    encodings: Encodings | None = None,
) -> Calibration:
    """Calibrate an open checkpoint; see `calibrate_checkpoint`.

    Compensated codes stay in the work folder.
    """
    config = config.settled()

    def agree(facts: dict[str, Any]) -> None:
        # A process that does another job must not note its facts for all.
        ranks.agree(facts)
        work.agree(facts)

    agree({**run_facts(config, CalibrationConfig), **machine_facts(config)})
    with quiet_libraries():
        sampling = prepare_sampling(source, config, progress, encodings=encodings)
        model_map = sampling.model_map
        run = SamplingRun(sampling.pipeline, sampling.sampler, config, sampling.conditioning)
        identity = fingerprint(source.checkpoint, model_map)
        agree({"checkpoint": identity, **run.facts()})
        calibration = _sample(run, identity, work, ranks, progress)
        calibration.model_map = model_map
        try:
            check_calibration(calibration, run.dtype)
        except InputError:
            # The cure is another option, with which these samples are of no use.
            work.clear()
            raise
        if config.rounding == "compensated":
            calibration.codes = write_codes(
                *(source, model_map, run, calibration, config), work, ranks, progress
            )
        if config.sensitivity == "impact":
            _measure_impact(run.denoiser, calibration, config, work, ranks, progress)
    return calibration


def run_facts(config: CalibrationConfig, kind: type[CalibrationConfig]) -> dict[str, Any]:
    """Return what parts of a run depend on, by the names by which a user knows it.

    Args:
        config: of the run.
        kind: the class whose options count.
    """
    found = {
        "--" + spec.name.replace("_", "-"): getattr(config, spec.name)
        for spec in dataclasses.fields(kind)
        if spec.name not in _WITHOUT_EFFECT
    }
    return {**found, "hswq": hswq.__version__, "torch": torch.__version__}


def _sample(
    run: SamplingRun, identity: str, work: WorkFolder, ranks: Ranks, progress: Progress
) -> Calibration:
    """Run the samples that are missing, one part each, and merge all."""

    def part(index: int) -> Path:
        return work.path / f"sample-{index:05}.safetensors"

    work.drop_damaged("sample-*", lambda path: Checkpoint.open(path).close())
    ranks.exchange(work.path, "sample-*")
    mine = ranks.share([index for index in run.indices if not part(index).is_file()])
    ranks.wait()
    for position, index in enumerate(mine):

        def report(phase: str, done: int, total: int, position: int = position) -> None:
            progress(phase, position * total + done, len(mine) * total)

        found = run.observe([index], report)
        found.fingerprint = identity
        found.save(part(index))
    ranks.exchange(work.path, "sample-*")
    whole = reduce(Calibration.merge, (Calibration.load(part(index)) for index in run.indices))
    if whole.fingerprint != identity:
        raise InputError(
            f"{work.path} holds samples of another checkpoint: delete the folder to start anew."
        )
    # Nobody removes a part before all have read it.
    ranks.wait()
    return whole


def _measure_impact(
    denoiser: Any,
    calibration: Calibration,
    config: CalibrationConfig,
    work: WorkFolder,
    ranks: Ranks,
    progress: Progress,
) -> None:
    """Measure with the codes that files will have."""

    def read(file: Path) -> Impact:
        return Impact.from_json(file.read_text("utf-8"))

    def gather() -> Impact:
        work.drop_damaged("impact-*", read)
        ranks.exchange(work.path, "impact-*")
        found = Impact({}, impact_options(config), len(calibration.records))
        for file in work.parts("impact-*"):
            for name, changes in read(file).partial.items():
                found.partial[name] = max(changes, found.partial.get(name, ()), key=len)
        return found

    calibration.impact = gather()
    # A name of its own for every attempt: under an older one other machines would take what they
    # have of it for this.
    before = [int(file.stem.removeprefix("impact-")) for file in work.parts("impact-*")]
    part = f"impact-{max(before, default=-1) + 1 + ranks.rank:05}.json"
    # Nobody writes before all have read.
    ranks.wait()

    def save() -> None:
        if calibration.impact is not None:
            work.write(part, calibration.impact.to_json())

    with ExitStack() as opened:
        rounder = None
        if calibration.codes is not None and calibration.model_map is not None:
            codes = opened.enter_context(Codes(calibration.codes))
            rounder = RoundedParts(codes, calibration.model_map)
        try:
            measure_impact(
                *(denoiser, calibration, config),
                rounder=rounder,
                progress=progress,
                save=_seldom(save),
                share=ranks.share,
            )
        finally:
            save()
    calibration.impact = gather()
    complete_impact(denoiser, calibration)


def _seldom(work: Callable[[], None]) -> Callable[[], None]:
    """Return a function that does the work when the last time was long enough ago."""
    last = time.monotonic()

    def maybe() -> None:
        nonlocal last
        if time.monotonic() - last > _SAVE_EVERY_S:
            work()
            last = time.monotonic()

    return maybe


def save_with_codes(calibration: Calibration, path: str | os.PathLike[str]) -> None:
    """Write a statistics file and beside it, before, the codes of a work folder, which keeps them.

    Raises:
        InputError: a file cannot be written.
    """
    if calibration.codes is not None:
        place_copy(calibration.codes, codes_path(path))
    calibration.save(path)
