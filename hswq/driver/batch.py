"""Several checkpoints, one after the other: what one cannot do does not end the others."""

from __future__ import annotations

import dataclasses
import json
import logging
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hswq.config import QuantizeConfig
from hswq.driver.calibrate import run_facts
from hswq.driver.paths import files_given, files_read, refuse_overwriting
from hswq.driver.quantize import quantize_one
from hswq.driver.report import Report
from hswq.driver.sampling import Encodings
from hswq.driver.work import WorkFolder
from hswq.errors import BackendError, HswqError, InputError, OptionError
from hswq.models.defaults import plain_defaults
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


@plain_defaults()
def quantize_checkpoints(
    sources: Sequence[str | os.PathLike[str]],
    folder: str | os.PathLike[str],
    config: QuantizeConfig,
    *,
    progress: Progress = no_progress,
) -> list[Outcome]:
    """Write the FP8 versions of several checkpoints as NAME-fp8.safetensors into a folder.

    Those with equal text encoders share their prompts' embeddings. A checkpoint that fails is
    named with the reason, and the others go on, whatever the reason. What an interrupted run has
    written is not written again, unless a file it was made from has changed since: that is noted
    in batch.hswq-work in the folder, until all are done.

    Args:
        sources: checkpoints as `quantize_checkpoint` takes them.
        folder: where the files go.
        config: every option, for all of them.
        progress: called with (phase, done, total).
    Returns:
        What became of each, in the order given.
    Raises:
        OptionError: two checkpoints have one name, or an option is of one checkpoint.
        InputError: the folder cannot be used, an unfinished run in it had other options, or an
            output is one of the files that are read.
        BackendError: a backend or device that was asked for cannot run.
    """
    outputs = _outputs(sources, Path(folder), config)
    read = {source: _files(source, config) for source in outputs}
    refuse_overwriting(set().union(*read.values()), outputs.values())
    encodings = Encodings()
    outcomes = []
    with WorkFolder(Path(folder) / "batch") as work:
        work.agree(run_facts(config, QuantizeConfig))
        for source, output in outputs.items():
            note = _Note(work, output, read[source])
            if note.is_valid():
                outcomes.append(Outcome(source, str(output)))
                continue
            try:
                report = quantize_one(source, output, config, None, progress, encodings)
            except BackendError:
                raise
            except Exception as error:
                outcomes.append(Outcome(source, str(output), error=_told(source, error)))
                work.keep = True
                continue
            note.write()
            outcomes.append(Outcome(source, str(output), report))
    return outcomes


def _told(source: str, error: Exception) -> str:
    """Log why a checkpoint failed and return it as text.

    Everything but an interruption is caught, here and at the top of the command line alone: a
    defect that shows at one checkpoint of a night's run costs this one.
    """
    text = f"{type(error).__name__}: {error}"
    if isinstance(error, (HswqError, OSError)):
        logger.error("%s failed: %s", source, error)
        return text
    logger.error("%s failed by an internal error", source, exc_info=error)
    return f"{text} (internal error; the log has its traceback)"


class _Note:
    """What is noted in the work folder of a file that is done.

    Args:
        work: the work folder.
        output: the file.
        read: what it is made from, as it is before the work begins.
    """

    def __init__(self, work: WorkFolder, output: Path, read: Iterable[Path]) -> None:
        self._work = work
        self._output = output
        self._name = f"done-{output.name}"
        self._read = {os.path.realpath(path): _state(path) for path in sorted(read)}

    def is_valid(self) -> bool:
        """Tell whether the file is the noted one, and was made from files as they are now."""
        try:
            found = json.loads((self._work.path / self._name).read_text("utf-8"))
        except (OSError, ValueError):
            return False
        return self._output.is_file() and bool(found == self._content())

    def write(self) -> None:
        """Note the file. It is complete: where the disk refuses the note, the file stays."""
        try:
            self._work.write(self._name, json.dumps(self._content()))
        except InputError as error:
            logger.warning("%s is done and would be written again: %s", self._output, error)

    def _content(self) -> dict[str, Any]:
        return {"output": _state(self._output), "read": self._read}


def _outputs(
    sources: Sequence[str | os.PathLike[str]], folder: Path, config: QuantizeConfig
) -> dict[str, Path]:
    """Return the output of every source.

    Raises:
        OptionError: two have one name, or an option is of one checkpoint.
        InputError: there is no such folder.
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
    taken = set()
    for source in map(str, sources):
        name = Path(os.path.abspath(source)).name
        for suffix in (".safetensors", ".safetensors.index.json"):
            name = name.removesuffix(suffix)
        output = folder / (name + _SUFFIX)
        # Two names may be links to one file.
        if (resolved := os.path.realpath(output)) in taken:
            raise OptionError(
                f"two checkpoints would be written as {output}: rename one, or quantize them one "
                "by one with --output."
            )
        taken.add(resolved)
        outputs[source] = output
    return outputs


def _files(source: str, config: QuantizeConfig) -> set[Path]:
    """Return the files that a checkpoint's run reads; of one that cannot be opened, those named."""
    try:
        return files_read(source, config)
    except (HswqError, OSError):
        # It is told when its turn comes.
        return files_given(source, config)


def _state(path: Path) -> list[int] | None:
    """Return what tells a file from another under its name: size and time; None without one."""
    try:
        found = path.stat()
    except OSError:
        return None
    return [found.st_size, found.st_mtime_ns]
