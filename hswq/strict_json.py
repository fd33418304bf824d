"""JSON that may come from a stranger: bounded in size and depth, and no key twice."""

from __future__ import annotations

import json
from typing import Any, NoReturn

from hswq.errors import FormatError

# Texts of one JSON document, or of all metadata of a file: ten times those of the largest models.
MAX_TEXT_BYTES = 16 << 20
# Configurations and recorded calls nest less than ten deep.
MAX_DEPTH = 64
_SHOWN_CHARACTERS = 200


def parse_json(data: str | bytes, where: str, *, constants: bool = False) -> dict[str, Any]:
    """Parse one JSON object.

    Args:
        data: JSON, bytes in UTF-8.
        where: what is parsed; it opens the message of an error.
        constants: whether NaN and Infinity pass, which Python writes and JSON does not know.
    Raises:
        FormatError: the text is no JSON object, is larger than MAX_TEXT_BYTES or nested deeper than
            MAX_DEPTH, or has a key twice.
    """
    parsed = parse_any(data, where, constants=constants)
    if not isinstance(parsed, dict):
        kind = type(parsed).__name__
        raise FormatError(f"{where} is JSON, but no object: it is a {kind}, an object is needed.")
    return parsed


def parse_any(data: str | bytes, where: str, *, constants: bool = False) -> Any:
    """Parse JSON of any kind; otherwise as `parse_json`."""
    if len(data) > MAX_TEXT_BYTES:
        raise FormatError(
            f"{where} is not usable JSON: it has {len(data)} bytes, at most {MAX_TEXT_BYTES} are "
            "read."
        )
    too_deep = f"{where} is not usable JSON: it is nested too deeply."
    try:
        text = data if isinstance(data, str) else data.decode("utf-8")
        parsed = (_LENIENT if constants else _STRICT).decode(text)
    except RecursionError as error:
        raise FormatError(too_deep) from error
    # UnicodeDecodeError, JSONDecodeError and an integer of too many digits are all ValueErrors.
    except ValueError as error:
        raise FormatError(f"{where} is not valid JSON: {error}.") from error
    # Nothing nests deeper than it has brackets, and a header's entries have few.
    if text.count("[") + text.count("{") < MAX_DEPTH:
        return parsed
    # How deep the parser goes depends on Python's version; who walks the value may not get as deep.
    level = [parsed]
    for _ in range(MAX_DEPTH):
        level = [
            child
            for it in level
            if isinstance(it, (dict, list))
            for child in (it.values() if isinstance(it, dict) else it)
        ]
        if not level:
            return parsed
    raise FormatError(too_deep)


def shown(name: str) -> str:
    """Return a stranger's text for a message: quoted, escaped and not longer than a line or two."""
    cut = name[:_SHOWN_CHARACTERS]
    return repr(cut) if cut == name else f"{cut!r}… ({len(name)} characters)"


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        seen: set[str] = set()
        for key, _ in pairs:
            if key in seen:
                raise ValueError(f"key {shown(key)} occurs twice")
            seen.add(key)
    return found


def _no_constant(text: str) -> NoReturn:
    raise ValueError(f"{text} is not JSON")


# Made once: `json.loads` makes one a call, which costs more than parsing a tensor's entry.
_STRICT = json.JSONDecoder(object_pairs_hook=_unique_keys, parse_constant=_no_constant)
_LENIENT = json.JSONDecoder(object_pairs_hook=_unique_keys)
