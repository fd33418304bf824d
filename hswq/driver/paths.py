"""Checks of output paths, made before any work is done."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path

from hswq.errors import InputError


def check_target(path: str | os.PathLike[str], sources: Iterable[Path] = ()) -> Path:
    """Return the output path, or refuse one that cannot or must not be written.

    Args:
        path: the .safetensors file to write.
        sources: files that are read and must not be overwritten.
    Raises:
        InputError: the folder is missing, the name does not end in .safetensors, or the target is
            one of the sources.
    """
    target = Path(path)
    if target.suffix != ".safetensors":
        raise InputError(
            f"output {str(target)!r} does not end in .safetensors, by which programs know the "
            f"format: call it {target.stem}.safetensors."
        )
    if not target.parent.is_dir():
        raise InputError(
            f"output folder {str(target.parent)!r} does not exist: create it, or choose another."
        )
    if target.exists() and any(target.samefile(source) for source in sources):
        raise InputError(
            f"output {str(target)!r} is the input itself; the source is never overwritten: "
            "choose another name."
        )
    return target
