"""Prompts: a text file, one a line."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence
from pathlib import Path

from hswq.errors import InputError

# Text encoders read 77 to 512 tokens of a prompt; a longer line is not a prompt.
MAX_PROMPT_CHARACTERS = 10_000

_SHIPPED_PROMPTS = Path(__file__).with_name("prompts.txt")


def load_prompts(path: str | os.PathLike[str] | None = None) -> list[str]:
    """Read prompts from a UTF-8 text file, one a line.

    Blank lines and lines that begin with '#' are skipped; a byte order mark is tolerated.

    Args:
        path: the file; None reads the 128 prompts that hswq ships.
    Returns:
        At least one prompt, in file order, without surrounding white space.
    Raises:
        InputError: the file cannot be read, is not UTF-8 text, has a line over
            MAX_PROMPT_CHARACTERS, or holds no prompt.
    """
    source = _SHIPPED_PROMPTS if path is None else Path(path)
    prompts = []
    try:
        with source.open(encoding="utf-8-sig") as handle:
            # Bounded reads: a checkpoint given by mistake can be one line of many gigabytes.
            while line := handle.readline(MAX_PROMPT_CHARACTERS + 2):
                if len(line.rstrip("\n")) > MAX_PROMPT_CHARACTERS or "\0" in line:
                    raise InputError(
                        f"{source} is not a prompt file: it holds a NUL character or a line of "
                        f"more than {MAX_PROMPT_CHARACTERS} characters. Give a UTF-8 text file, "
                        "one prompt a line."
                    )
                prompt = line.strip()
                if prompt and not prompt.startswith("#"):
                    prompts.append(prompt)
    except UnicodeDecodeError as error:
        raise InputError(
            f"{source} is not UTF-8 text ({error.reason}): save it as UTF-8, one prompt a line."
        ) from error
    except OSError as error:
        raise InputError(
            f"prompt file {source} cannot be read ({error.strerror}): give a UTF-8 text file, one "
            "prompt a line."
        ) from error
    if not prompts:
        raise InputError(
            f"{source} holds no prompt: blank lines and lines that begin with '#' do not count. "
            "Write at least one prompt, one a line."
        )
    return prompts


def prompts_hash(prompts: Sequence[str]) -> str:
    """Return the SHA-256 of the prompts and their order, as 64 hexadecimal digits."""
    return hashlib.sha256(json.dumps(list(prompts)).encode()).hexdigest()
