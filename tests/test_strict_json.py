"""JSON of strangers: what is refused, and with which words."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from hswq.calibration.codes import Codes
from hswq.driver.bench import _options
from hswq.errors import FormatError, InputError
from hswq.formats.reader import Checkpoint
from hswq.models.folders import read_json
from hswq.strict_json import MAX_DEPTH, MAX_TEXT_BYTES, parse_any, parse_json
from tests.formats.files import entry, pack, write

DEEP = '{"a":' * 10**5


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (DEEP, "x is not usable JSON: it is nested too deeply"),
        ("[" * MAX_DEPTH + "1" + "]" * MAX_DEPTH, "nested too deeply"),
        ('"' + "a" * MAX_TEXT_BYTES + '"', "16777218 bytes, at most 16777216 are read"),
        ('{"a": 1, "a": 2}', "'a' occurs twice"),
        ('{"a": NaN}', "NaN is not JSON"),
        ('{"a": ' + "1" * 5000 + "}", "not valid JSON"),
        (b"\xff", "not valid JSON"),
        ("[]", "no object"),
        ("", "not valid JSON"),
    ],
)
def test_what_no_file_of_ours_holds_is_refused(text, words):
    """RecursionError and MemoryError are no answer to a damaged file."""
    with pytest.raises(FormatError, match=words):
        parse_json(text, "x")


def test_what_python_writes_is_read():
    """Statistics hold infinities, and texts as deep as recorded calls are."""
    assert parse_any("[1, Infinity]", "x", constants=True) == [1, math.inf]
    deep = "[" * (MAX_DEPTH - 1) + "]" * (MAX_DEPTH - 1)
    assert json.dumps(parse_any(deep, "x")) == deep


def test_deep_json_of_every_file_is_told(tmp_path: Path):
    """Each ended in a traceback of Python, or in an exit code that blames hswq."""

    def file(metadata: dict[str, str]) -> Path:
        header = {"__metadata__": metadata, "a": entry("U8", [0], 0, 0)}
        return write(tmp_path / "x.safetensors", pack(header))

    with pytest.raises(FormatError, match=r"'hswq\.settings' of .* is nested too deeply"):
        Codes(file({"hswq.codes_version": "1", "hswq.fingerprint": "", "hswq.settings": DEEP}))
    assert _options(file({"hswq.plan": DEEP})) == {}
    config = write(tmp_path / "config.json", DEEP.encode())
    with pytest.raises(InputError, match=r"cannot be read as JSON: .* nested too deeply"):
        read_json(config)
    with Checkpoint.open(file({})) as checkpoint, pytest.raises(FormatError, match="too deeply"):
        _ = checkpoint.config
    large = write(tmp_path / "config.json", b" " * (MAX_TEXT_BYTES + 1))
    with pytest.raises(InputError, match="cannot be read as JSON"):
        read_json(large)
