"""Several checkpoints, one after the other: what one cannot do does not end the others."""

from __future__ import annotations

import dataclasses
import logging
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hswq.config import QuantizeConfig
from hswq.driver.calibrate import run_facts
from hswq.driver.quantize import quantize_one
from hswq.driver.report import Report
from hswq.driver.sampling import Encodings
from hswq.driver.work import WorkFolder
from hswq.errors import BackendError, HswqError, InputError, OptionError
from hswq.progress import Progress, no_progress

logger = logging.getLogger(__name__)

_SUFFIX = "-fp8.safetensors"


@dataclass(frozen=True)
class Outcome:
    """What became of one checkpoint.

    Attributes:
        source: path read.
        output: path written, or that was to be.
        report: of this run; None where it failed, or an interrupted run had written the file.
        error: why it failed, as text; None where it did not.
    """

    source: str
    output: str
    report: Report | None = None
    error: str | None = None

    def to_dict(self) -> dict[str, Any]:
        """Return the outcome as JSON-ready data."""
        report = None if self.report is None else self.report.to_dict()
        return {**dataclasses.asdict(dataclasses.replace(self, report=None)), "report": report}


def quantize_checkpoints(
    sources: Sequence[str | os.PathLike[str]],
    folder: str | os.PathLike[str],
    config: QuantizeConfig,
    *,
    progress: Progress = no_progress,
) -> list[Outcome]:
    """Write the FP8 versions of several checkpoints as NAME-fp8.safetensors into a folder.

    Those with equal text encoders share their prompts' embeddings. A checkpoint that fails is
    named with the reason, and the others go on. What an interrupted run has written is not written
    again: that is noted in batch.hswq-work in the folder, until all are done.

    Args:
        sources: checkpoints as `quantize_checkpoint` takes them.
        folder: where the files go.
        config: every option, for all of them.
        progress: called with (phase, done, total).
    Returns:
        What became of each, in the order given.
    Raises:
        OptionError: two checkpoints have one name, or an option is of one checkpoint.
        InputError: the folder cannot be used, or an unfinished run in it had other options.
        BackendError: a backend or device that was asked for cannot run.
    """
    outputs = _outputs(sources, Path(folder), config)
    encodings = Encodings()
    outcomes = []
    with WorkFolder(Path(folder) / "batch") as work:
        work.agree({**run_facts(config, QuantizeConfig), "--input": list(outputs)})
        for source, output in outputs.items():
            name = f"done-{output.name}"
            note = work.path / name
            if note.is_file() and output.is_file() and note.read_text("utf-8") == _state(output):
                outcomes.append(Outcome(source, str(output)))
                continue
            try:
                report = quantize_one(source, output, config, None, progress, encodings)
            except BackendError:
                raise
            except (HswqError, OSError) as error:
                logger.error("%s failed: %s", source, error)
                outcomes.append(
                    Outcome(source, str(output), error=f"{type(error).__name__}: {error}")
                )
                work.keep = True
                continue
            work.write(name, _state(output))
            outcomes.append(Outcome(source, str(output), report))
    return outcomes


def _outputs(
    sources: Sequence[str | os.PathLike[str]], folder: Path, config: QuantizeConfig
) -> dict[str, Path]:
    """Return the output of every source.

    Raises:
        OptionError: two have one name, or an option is of one checkpoint.
    """
    for flag, value in (("--stats", config.stats), ("--save-stats", config.save_stats)):
        if value is not None and len(sources) > 1:
            raise OptionError(
                f"{flag} is of one checkpoint, and {len(sources)} are given: quantize them one by "
                "one, or drop it."
            )
    if not folder.is_dir():
        raise InputError(
            f"output folder {str(folder)!r} does not exist: create it, or choose another."
        )
    outputs: dict[str, Path] = {}
    for source in map(str, sources):
        name = Path(os.path.abspath(source)).name
        for suffix in (".safetensors", ".safetensors.index.json"):
            name = name.removesuffix(suffix)
        output = folder / (name + _SUFFIX)
        if output in outputs.values():
            raise OptionError(
                f"two checkpoints would be written as {output}: rename one, or quantize them one "
                "by one with --output."
            )
        outputs[source] = output
    return outputs


def _state(path: Path) -> str:
    """Return what tells a file from another that was written under its name."""
    found = path.stat()
    return f"{found.st_size} {found.st_mtime_ns}"
