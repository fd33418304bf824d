"""Checks of output paths, made before any work is done."""

from __future__ import annotations

import os
from pathlib import Path

from hswq.config import CalibrationConfig
from hswq.errors import InputError
from hswq.formats.reader import Checkpoint

PathLike = str | os.PathLike[str]


def check_outputs(
    src: PathLike, config: CalibrationConfig, *outputs: PathLike | None
) -> list[Path]:
    """Return the output paths, or refuse one that cannot or must not be written.

    Args:
        src: the checkpoint that is read.
        config: options; the files they name are read too.
        outputs: .safetensors files to write; None is passed over.
    Raises:
        InputError: a folder is missing or not writable, a name does not end in .safetensors, or an
            output is one of the files that are read, or is named twice.
        FormatError: the checkpoint is damaged.
    """
    targets = [Path(path) for path in outputs if path is not None]
    for target in targets:
        _check_target(target)
    read = _files_read(src, config)
    taken: dict[Path, Path] = {Path(os.path.realpath(path)): path for path in read}
    for target in targets:
        resolved = Path(os.path.realpath(target))
        if resolved in taken:
            what = "an input" if taken[resolved] in read else "named twice as an output"
            raise InputError(
                f"output {str(target)!r} is {what} of this run; what is read is never overwritten: "
                "choose another name."
            )
        taken[resolved] = target
    return targets


def _check_target(target: Path) -> None:
    if target.suffix != ".safetensors":
        raise InputError(
            f"output {str(target)!r} does not end in .safetensors, by which programs know the "
            f"format: call it {target.stem}.safetensors."
        )
    if not target.parent.is_dir():
        raise InputError(
            f"output folder {str(target.parent)!r} does not exist: create it, or choose another."
        )
    if target.is_dir():
        raise InputError(f"output {str(target)!r} is a folder: give the name of a file.")
    folder = Path(os.path.realpath(target)).parent
    if not os.access(folder, os.W_OK | os.X_OK):
        raise InputError(
            f"output folder {str(folder)!r} is not writable: change that, or choose another."
        )


def _files_read(src: PathLike, config: CalibrationConfig) -> set[Path]:
    """Return every file that a run with these options may read."""
    given = (
        *(config.calib_file, config.embeddings, getattr(config, "stats", None)),
        *config.text_encoder,
    )
    read = {Path(src), *(Path(path) for path in given if path is not None)}
    folders = {Path(config.pipeline)} if config.pipeline is not None else set()
    with Checkpoint.open(src) as checkpoint:
        read |= set(checkpoint.files)
        if checkpoint.pipeline_dir is not None:
            folders.add(checkpoint.pipeline_dir)
    for folder in folders:
        read |= {path for path in folder.rglob("*") if path.is_file()}
    return read
