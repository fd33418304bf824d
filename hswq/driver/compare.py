"""Two files of one model compared, with statistics where there are some."""

from __future__ import annotations

import os
from contextlib import ExitStack

from torch import Tensor

from hswq.calibration import Calibration, Codes
from hswq.formats.reader import Checkpoint
from hswq.models.defaults import plain_defaults
from hswq.models.detect import denoiser_prefix
from hswq.models.fingerprint import fingerprint
from hswq.progress import Progress, no_progress
from hswq.quality.compare import Comparison, compare_checkpoints


@plain_defaults()
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
        stats: statistics of the model, for errors weighted by importance; with the codes beside
            them also for what the layers' outputs change, where `first` is the checkpoint and the
            codes of `second` are these.
        progress: called with ('compare', tensors done, tensors in all).
    Raises:
        InputError: the files cannot be read, or are of different models.
        FormatError: a file is damaged.
    """
    calibration = None if stats is None else Calibration.load(stats)
    with Checkpoint.open(first) as ours, Checkpoint.open(second) as theirs, ExitStack() as opened:
        prefixes = denoiser_prefix(ours), denoiser_prefix(theirs)
        if calibration is None:
            return compare_checkpoints(ours, theirs, prefixes, progress=progress)
        importance, made = _importance(calibration), None
        if calibration.codes is not None and _is_calibrated(ours, calibration):
            codes = opened.enter_context(Codes(calibration.codes))
            if (codes.fingerprint, codes.settings) == (
                calibration.fingerprint,
                calibration.run_settings(),
            ):
                made = codes, prefixes[0]
        return compare_checkpoints(ours, theirs, prefixes, importance, progress, made)


def _is_calibrated(checkpoint: Checkpoint, calibration: Calibration) -> bool:
    """Tell whether a file is the checkpoint that the statistics were gathered on."""
    model_map = calibration.model_map
    if model_map is None or any(unit.key not in checkpoint.tensors for unit in model_map.units()):
        return False
    return fingerprint(checkpoint, model_map) == calibration.fingerprint


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
