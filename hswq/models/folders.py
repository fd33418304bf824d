"""Configurations: of a diffusers folder, of the checkpoint itself, or shipped with hswq."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from hswq.errors import FormatError, HswqError, InputError
from hswq.formats.reader import Checkpoint
from hswq.strict_json import MAX_TEXT_BYTES, parse_json

# Configurations by family, each laid out as a diffusers pipeline folder.
_ASSETS = Path(__file__).resolve().parent / "assets"
# Those of SDXL base, with its tokenizer.
SHIPPED = _ASSETS / "sdxl"


def read_json(path: Path) -> dict[str, Any] | None:
    """Read a JSON object; None where there is no such file.

    Raises:
        InputError: the file is no JSON object.
    """
    try:
        with path.open("rb") as handle:
            content = parse_json(handle.read(MAX_TEXT_BYTES + 1), "it", constants=True)
    except FileNotFoundError:
        return None
    except OSError as error:
        raise InputError(f"'{path}' cannot be read as JSON: {error}.") from error
    except FormatError as error:
        raise InputError(f"'{path}' cannot be read as JSON: {error}") from error
    return content


@contextmanager
def refusing(found: str, cure: str) -> Iterator[None]:
    """Turn what diffusers, transformers or tokenizers raise on a file's content into an InputError.

    Only their calls belong in this block: for damaged files they raise anything, and tokenizers
    raises Exception itself.

    Raises:
        InputError: f"{found}: {their error}. {cure}"
    """
    try:
        yield
    except (HswqError, MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        raise InputError(f"{found}: {error or type(error).__name__}. {cure}") from error


def configuration_folders(
    checkpoint: Checkpoint, pipeline_dir: Path | None, family: str
) -> list[Path]:
    """Return where configurations may come from, the most particular first and hswq's own last."""
    given = [folder for folder in (pipeline_dir, checkpoint.pipeline_dir) if folder is not None]
    return [*given, _ASSETS / family]
