"""From a checkpoint to an FP8 file: one pass that reads, searches, rounds and writes."""

from __future__ import annotations

import logging
import os
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path

from torch import Tensor

from hswq.calibration import Calibration, Codes
from hswq.config import QuantizeConfig
from hswq.driver.calibrate import calibrate_source, save_with_codes
from hswq.driver.compensate import check_codes
from hswq.driver.job import (
    Job,
    job_warnings,
    list_candidates,
    make_job,
    smallest_output_bytes,
)
from hswq.driver.paths import check_outputs
from hswq.driver.ranks import Ranks
from hswq.driver.report import Report, Stopwatch, peak_memory_bytes
from hswq.driver.sampling import Encodings, memory_told, resolve_device
from hswq.driver.source import Source, check_statistics, open_source
from hswq.driver.stream import Piece, Stream
from hswq.driver.verify import verify_output
from hswq.driver.work import WorkFolder
from hswq.errors import InputError
from hswq.formats.containers import extra_tensors, marker_tensors
from hswq.formats.writer import CheckpointWriter, check_room
from hswq.models.defaults import plain_defaults
from hswq.plan import Plan, error_curve
from hswq.progress import Progress, no_progress
from hswq.search import AmaxResult

logger = logging.getLogger(__name__)

COPY_CHUNK_BYTES = 32 << 20
ROUND_CHUNK = 8 << 20


@plain_defaults()
def quantize_checkpoint(
    src: str | os.PathLike[str],
    dst: str | os.PathLike[str],
    config: QuantizeConfig,
    calibration: Calibration | None = None,
    *,
    progress: Progress = no_progress,
) -> Report:
    """Write the FP8 version of a checkpoint.

    Every tensor that is not quantized is copied byte for byte. The file appears under its name
    only when it is complete; equal inputs and statistics write equal bytes.

    Args:
        src: single file, sharded index or diffusers folder.
        dst: the .safetensors file to write; an existing one is replaced at the end.
        config: every option.
        calibration: statistics of `src`; None reads `config.stats`, or runs the sampler.
        progress: called with (phase, done, total).
    Returns:
        What was done, with sizes, seconds by phase and warnings.
    Raises:
        InputError: an input cannot be used, or there is no room for the output.
        FormatError: a file is damaged.
        PlanError: an option does not fit the layers.
        BackendError: a backend or device that was asked for cannot run.
    """
    return quantize_one(src, dst, config, calibration, progress)


def quantize_one(
    src: str | os.PathLike[str],
    dst: str | os.PathLike[str],
    config: QuantizeConfig,
    calibration: Calibration | None,
    progress: Progress,
    encodings: Encodings | None = None,
) -> Report:
    """Do what `quantize_checkpoint` does, with embeddings that other checkpoints may share."""
    watch = Stopwatch()
    target, *_ = check_outputs(src, config, dst, config.save_stats)
    samples = calibration is None and config.stats is None
    told = memory_told(config, samples=samples, keeps=samples)
    with told, open_source(src) as source, ExitStack() as resources:
        job, warnings = _prepare(
            source, config, calibration, watch, progress, resources, target, encodings
        )
        with CheckpointWriter(target, job.specs, job.metadata_bytes) as writer:
            results = _write_tensors(job, writer, watch, progress)
            plan = job.plan(results, writer.file_bytes)
            with watch.phase("finish"):
                digest = writer.commit(
                    job.metadata(plan),
                    lambda path: verify_output(job, path, plan, results),
                    digest=True,
                )
    return Report(
        source=str(src),
        output=str(target),
        plan=plan,
        container=config.container,
        scaled=config.scaled,
        source_bytes=plan.source_bytes,
        output_bytes=target.stat().st_size,
        sha256=digest,
        seconds=watch.seconds,
        peak_memory_bytes=peak_memory_bytes(),
        warnings=tuple(warnings),
    )


@plain_defaults()
def plan_checkpoint(
    src: str | os.PathLike[str],
    config: QuantizeConfig,
    calibration: Calibration | None = None,
    *,
    progress: Progress = no_progress,
) -> Plan:
    """Decide and search as `quantize_checkpoint` would, and write nothing.

    Returns:
        The plan with the search results of every quantized layer, the size of the file and, where
        impact was measured, the curve of other budgets.
    Raises:
        The errors of `quantize_checkpoint`.
    """
    watch = Stopwatch()
    samples = calibration is None and config.stats is None
    told = memory_told(config, samples=samples)
    with told, open_source(src) as source, ExitStack() as resources:
        job, _ = _prepare(source, config, calibration, watch, progress, resources)
        wanted = [source.checkpoint.tensors[key] for key, it in job.layers.items() if it.quantized]
        results = {}
        wanted.sort(key=lambda info: (str(info.path), info.begin))
        with Stream(source.checkpoint, [Piece.whole(info) for info in wanted]) as stream:
            for done, loan in enumerate(stream):
                key = loan.piece.info.name
                results[key] = job.search(key, loan.tensor)
                loan.release()
                progress("search", done + 1, len(wanted))
        size = CheckpointWriter.predict_file_bytes(job.specs, job.metadata_bytes)
        plan = job.plan(results, size)
        if job.calibration.impact is None:
            return plan
        model_map = source.map_from(job.calibration, config.pipeline)
        candidates = list_candidates(source, model_map, job.calibration)
        return replace(plan, curve=error_curve(candidates, plan.layers, size, job.config))


def _prepare(
    source: Source,
    config: QuantizeConfig,
    calibration: Calibration | None,
    watch: Stopwatch,
    progress: Progress,
    resources: ExitStack,
    target: Path | None = None,
    encodings: Encodings | None = None,
) -> tuple[Job, list[str]]:
    """Gather statistics, map and plan of an open source; `target` is the file to be written.

    What must stay open until the job is done goes into `resources`.
    """
    device = resolve_device(config.device)
    where = "the statistics given"
    if calibration is None and config.stats is not None:
        where = f"statistics {config.stats}"
        with watch.phase("statistics"):
            calibration = Calibration.load(config.stats)
    if calibration is not None:
        config = config.settled(calibration.measured(codes=config.rounding != "nearest"))
    else:
        config = config.settled()
        # A wrong pattern or dtype, or a full disk, is told before the sampler runs for an hour.
        least_bytes = smallest_output_bytes(source, config, source.trace(config.pipeline))
        if target is not None:
            check_room(target, least_bytes)
        with watch.phase("calibrate"):
            place = resources.enter_context(_calibration_place(target))
            work = resources.enter_context(WorkFolder(place))
            calibration = calibrate_source(source, config, work, Ranks(), progress, encodings)
            if config.save_stats is not None:
                save_with_codes(calibration, config.save_stats)
    with watch.phase("plan"):
        model_map = source.map_from(calibration, config.pipeline)
        check_statistics(source, model_map, calibration, where)
        job = make_job(
            *(source, config, calibration, model_map, device),
            _open_codes(calibration, config, where, resources),
        )
    warnings = job_warnings(job)
    for text in warnings:
        logger.warning("%s", text)
    return job, warnings


@contextmanager
def _calibration_place(target: Path | None) -> Iterator[Path]:
    """Yield the file beside which a calibration works; a plan alone has none that stays."""
    with ExitStack() as opened:
        if target is None:
            target = Path(opened.enter_context(tempfile.TemporaryDirectory())) / "plan"
        yield target


def _open_codes(
    calibration: Calibration, config: QuantizeConfig, where: str, resources: ExitStack
) -> Codes | None:
    """Open the compensated codes that belong to the statistics, where they are asked for.

    Raises:
        InputError: there are none, or they were made for other files.
        FormatError: they are damaged.
    """
    if config.rounding != "compensated":
        return None
    if calibration.codes is None:
        raise InputError(
            f"{where} come without compensated codes (looked for in NAME.codes.safetensors beside "
            "them): run `calibrate --rounding compensated` with the options of the file that is to "
            "be written."
        )
    codes = resources.enter_context(Codes(calibration.codes))
    check_codes(codes, calibration, config)
    return codes


def _write_tensors(
    job: Job, writer: CheckpointWriter, watch: Stopwatch, progress: Progress
) -> dict[str, AmaxResult]:
    """Write every tensor of the output; return what the search found, by key.

    The phases read and write are what the work had to wait for them.
    """
    results: dict[str, AmaxResult] = {}
    fp8 = {layer.key: layer for layer in job.quantized_layers}
    biases = job.biases()
    pieces = _pieces(job)
    total = sum(piece.nbytes for piece in pieces)
    done = 0
    for name, tensor in marker_tensors(job.config.container, job.source.detection.prefix).items():
        writer.write(name, tensor)
    with Stream(job.source.checkpoint, pieces) as stream:
        loans = iter(stream)
        while True:
            with watch.phase("read"):
                loan = next(loans, None)
            if loan is None:
                break
            piece, key = loan.piece, loan.piece.info.name
            if key in fp8:
                with watch.phase("search"):
                    # Once, for search and rounding both.
                    weight = loan.tensor.to(job.device)
                    results[key] = job.search(key, weight)
                for start, rows in _row_chunks(weight):
                    with watch.phase("quantize"):
                        codes = job.encode(key, rows, results[key], start)
                    with watch.phase("write"):
                        offset = start * codes[0].numel()
                        stream.behind(writer.write_chunk, key, offset, codes)
                loan.release()
                scale = job.scale(key, results[key])
                container, input_scale = job.config.container, job.input_scale(key)
                extra = extra_tensors(container, fp8[key], scale, input_scale)
                for name, tensor in extra.items():
                    stream.behind(writer.write, name, tensor)
            else:
                with watch.phase("check"):
                    if job.is_denoiser_float(piece.info):
                        job.check_finite(key, loan.tensor)
                with watch.phase("write"):
                    if key in biases:
                        stream.behind(writer.write, key, biases[key])
                    else:
                        stream.behind(writer.write_chunk, key, piece.offset, loan.view)
                    stream.behind(loan.release)
            done += piece.nbytes
            progress("quantize", done, total)
        with watch.phase("write"):
            stream.flush()
    return results


def _pieces(job: Job) -> list[Piece]:
    """Return all bytes of the source in file order: the denoiser's tensors whole, others cut."""
    pieces: list[Piece] = []
    tensors = job.source.checkpoint.tensors.values()
    for info in sorted(tensors, key=lambda info: (str(info.path), info.begin)):
        if job.is_denoiser_float(info):
            pieces.append(Piece.whole(info))
        else:
            pieces += Piece.cut(info, COPY_CHUNK_BYTES)
    return pieces


def _row_chunks(weight: Tensor) -> Iterator[tuple[int, Tensor]]:
    """Yield rows of a weight of about ROUND_CHUNK elements together, with the first row's number.

    The allocator keeps blocks of this size for the next call: no fresh pages for every weight.
    """
    step = max(1, ROUND_CHUNK // weight[0].numel())
    for start in range(0, len(weight), step):
        yield start, weight[start : start + step]
