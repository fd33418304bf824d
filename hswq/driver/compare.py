"""Two files of one model compared, with statistics where there are some."""

from __future__ import annotations

import os

from torch import Tensor

from hswq.calibration import Calibration
from hswq.formats.reader import Checkpoint
from hswq.models.detect import denoiser_prefix
from hswq.progress import Progress, no_progress
from hswq.quality.compare import Comparison, compare_checkpoints


def compare_files(
    first: str | os.PathLike[str],
    second: str | os.PathLike[str],
    stats: str | os.PathLike[str] | None = None,
    *,
    progress: Progress = no_progress,
) -> Comparison:
    """Compare two files of one model, layer by layer.

    Args:
        first: file of any container, or of 16 or 32 bits.
        second: the same.
        stats: statistics of the model, for an estimate of what the layers' outputs change.
        progress: called with ('compare', tensors done, tensors in all).
    Raises:
        InputError: the files cannot be read, or are of different models.
        FormatError: a file is damaged.
    """
    importance = None if stats is None else _importance(Calibration.load(stats))
    with Checkpoint.open(first) as ours, Checkpoint.open(second) as theirs:
        prefixes = denoiser_prefix(ours), denoiser_prefix(theirs)
        return compare_checkpoints(ours, theirs, prefixes, importance, progress)


def _importance(calibration: Calibration) -> dict[str, Tensor]:
    """Return the importance of every unit, by the checkpoint's name and by the modules'."""
    found: dict[str, Tensor] = {}
    for name in calibration.modules:
        values = calibration.importance(name)
        if values is not None:
            found[name] = values
    if calibration.model_map is not None:
        for unit in calibration.model_map.units():
            if unit.modules[0].name in found:
                found[unit.name] = found[unit.modules[0].name]
    return found
