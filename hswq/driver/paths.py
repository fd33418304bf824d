"""Checks of output paths, made before any work is done."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterable
from pathlib import Path

from hswq.calibration import codes_path, find_codes
from hswq.config import CalibrationConfig
from hswq.errors import InputError
from hswq.formats.reader import Checkpoint, is_index

PathLike = str | os.PathLike[str]

# Folders of a diffusers pipeline that a run may read from, by the beginnings of their names.
_COMPONENTS = ("unet", "transformer", "vae", "text_encoder", "tokenizer", "scheduler")


def check_outputs(
    src: PathLike, config: CalibrationConfig, *outputs: PathLike | None
) -> list[Path]:
    """Return the output paths, or refuse one that cannot or must not be written.

    Args:
        src: the checkpoint that is read.
        config: options; the files they name are read too, and the codes beside the statistics
            that they save are written.
        outputs: .safetensors files to write; None is passed over.
    Raises:
        InputError: a folder is missing or not writable, a name does not end in .safetensors, or an
            output is one of the files that are read, or is named twice.
        FormatError: the checkpoint is damaged.
    """
    targets = [Path(path) for path in outputs if path is not None]
    for target in targets:
        _check_target(target)
    saved = getattr(config, "save_stats", None)
    beside = [] if saved is None else [codes_path(saved)]
    refuse_overwriting(files_read(src, config), [*targets, *beside])
    return targets


def refuse_overwriting(read: Iterable[PathLike], outputs: Iterable[PathLike]) -> None:
    """Refuse an output that is a file of the run already, whatever name leads to it.

    Raises:
        InputError: one is among the files that are read, by a symbolic or hard link too, or two
            are one file.
    """
    inputs = {identity for path in read for identity in _identities(path)}
    taken: set[str] = set()
    for target in outputs:
        resolved = os.path.realpath(target)
        is_input = not inputs.isdisjoint(_identities(target))
        if is_input or resolved in taken:
            what = "an input" if is_input else "named twice as an output"
            raise InputError(
                f"output {str(target)!r} is {what} of this run; what is read is never overwritten: "
                "choose another name."
            )
        taken.add(resolved)


def files_read(src: PathLike, config: CalibrationConfig) -> set[Path]:
    """Return every file that a run with these options may read.

    Raises:
        InputError: the checkpoint cannot be used.
        FormatError: it is damaged.
    """
    read = files_given(src, config)
    folders = {Path(config.pipeline)} if config.pipeline is not None else set()
    with Checkpoint.open(src) as checkpoint:
        read |= set(checkpoint.files)
        beside = checkpoint.files[0].absolute().parent
        read.add(beside / "config.json")
        if Path(src).is_dir():
            read |= {path for path in beside.iterdir() if is_index(path)}
        if checkpoint.pipeline_dir is not None:
            folders.add(checkpoint.pipeline_dir)
    for folder in folders:
        read.add(folder / "model_index.json")
        for component in folder.glob("*/"):
            if component.name.startswith(_COMPONENTS):
                read |= _files_in(component)
    return {path for path in read if path.is_file()}


def files_given(src: PathLike, config: CalibrationConfig) -> set[Path]:
    """Return the files that the user has named, the checkpoint as it was named among them."""
    stats = getattr(config, "stats", None)
    codes = None if stats is None else find_codes(stats)
    named = (config.calib_file, config.embeddings, stats, codes, *config.text_encoder)
    read = {Path(src)}
    for path in named:
        if path is not None:
            read |= _files_in(Path(path)) | {Path(path)}
    return read


def _files_in(folder: Path) -> set[Path]:
    return {path for path in folder.rglob("*") if path.is_file()}


def _identities(path: PathLike) -> set[object]:
    """Return what all names of a file have in common: where they lead, and the file itself."""
    found: set[object] = {os.path.realpath(path)}
    with contextlib.suppress(OSError):
        status = os.stat(path)
        found.add((status.st_dev, status.st_ino))
    return found


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
