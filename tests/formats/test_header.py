"""Headers: hostile, damaged and foreign files are refused by what they are."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from hswq.errors import FormatError, InputError
from hswq.formats.header import MAX_ENTRIES, MAX_HEADER_BYTES, MAX_NAME_BYTES
from hswq.formats.reader import Checkpoint
from hswq.strict_json import MAX_TEXT_BYTES
from tests.formats.files import entry, pack, write
from tests.formats.fuzz_header import fuzz, fuzz_large


def open_bytes(tmp_path: Path, data: bytes) -> None:
    Checkpoint.open(write(tmp_path / "file.safetensors", data)).close()


ONE = {"w": entry("F32", [2], 0, 8)}
HOSTILE = {
    "overlap": {"a": entry("F32", [2], 0, 8), "b": entry("F32", [2], 4, 12)},
    "hole": {"a": entry("F32", [1], 0, 4), "b": entry("F32", [1], 8, 12)},
    "starts late": {"a": entry("F32", [2], 4, 12)},
    "same bytes twice": {"a": entry("F32", [3], 0, 12), "b": entry("F32", [3], 0, 12)},
    "span too short": {"a": entry("F32", [4], 0, 12)},
    "span too long": {"a": entry("F32", [2], 0, 12)},
    "backwards": {"a": entry("F32", [3], 12, 0)},
    "unknown dtype": {"a": entry("F33", [3], 0, 12)},
    "dtype no text": {"a": {"dtype": ["F32"], "shape": [3], "data_offsets": [0, 12]}},
    "negative dimension": {"a": entry("F32", [-3], 0, 12)},
    "two negatives": {"a": entry("F32", [-3, -1], 0, 12)},
    "bool dimension": {"a": {"dtype": "F32", "shape": [3, True], "data_offsets": [0, 12]}},
    "float dimension": {"a": {"dtype": "F32", "shape": [3.0], "data_offsets": [0, 12]}},
    "shape overflow": {"a": entry("F32", [2**62, 4, 3], 0, 12)},
    "huge empty shape": {"a": entry("F32", [0, 2**62, 2**62], 0, 0)},
    "no shape": {"a": {"dtype": "F32", "data_offsets": [0, 12]}},
    "three offsets": {"a": {"dtype": "F32", "shape": [3], "data_offsets": [0, 12, 12]}},
    "entry no object": {"a": 3},
    "metadata no object": {"__metadata__": [], "a": entry("F32", [3], 0, 12)},
    "metadata number": {"__metadata__": {"k": 1}, "a": entry("F32", [3], 0, 12)},
    "half a surrogate pair": {"\ud800": entry("F32", [3], 0, 12)},
    "data without tensors": {},
}


@pytest.mark.parametrize("header", HOSTILE.values(), ids=HOSTILE.keys())
def test_hostile_header_is_refused(tmp_path, header):
    """Every one of these would read past, twice, or something that is not a tensor."""
    with pytest.raises(FormatError):
        open_bytes(tmp_path, pack(header, bytes(12)))


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"", "empty"),
        (b"\x03\x00", "too few"),
        (pack(b"{}")[:9], "too few"),
        (pack(ONE, bytes(7)), "truncated"),
        (pack(ONE, bytes(9)), "belong to no tensor"),
        (pack(ONE, bytes(8))[:40], "declare a header"),
        ((2**63).to_bytes(8, "little") + b"{}", "declare a header"),
        ((2**64 - 1).to_bytes(8, "little") + b"{" * 100, "declare a header"),
        (pack(b" {}"), "starts with"),
        (pack(b"{'a': 1}"), "not valid JSON"),
        (pack(b'{"a": NaN}'), "no flat JSON object"),
        (pack(b'{"a": {"dtype": NaN}}'), "NaN is not JSON"),
        (pack(b'{"\xff": 1}'), "not valid JSON"),
        (pack(b'{"a": ' + b"9" * 5000 + b"}"), "no flat JSON object"),
        (
            pack(b'{"a": ' + b"[" * 200_000 + b"]" * 200_000 + b"}"),
            "no flat JSON object",
        ),
        (pack(b'{"a": {"shape":' + b"[" * 2000 + b"]" * 2000 + b"}}"), "nested too deeply"),
        (
            pack(b'{"a": {"shape":[' + b"1," * 3000 + b"1]}}"),
            "no flat JSON object",
        ),
        (pack(b'{"__metadata__": {"a": "b\\"}}'), "has no end"),
        (pack(b'{"__metadata__": {"a": "b\\\\"} "c"'), "',' is needed"),
        (pack(b'{"__metadata__": {"a": "b"}} {'), "more behind its end"),
        (pack(b'{"__metadata__": {"a" "b"}}'), "':' is needed"),
        (pack(b'{"__metadata__": {"a": "b",}}'), "is needed"),
        (
            pack(
                b'{"a":{"dtype":"U8","shape":[1],"data_offsets":[0,1]},'
                b'"a":{"dtype":"U8","shape":[1],"data_offsets":[0,1]}}',
                b"x",
            ),
            "'a' occurs twice",
        ),
        (b"PK\x03\x04\x14\x00\x08\x08archive/data.pkl", "pickle"),
        (b"\x80\x02}q\x00(X\x05\x00\x00\x00modelq\x01", "pickle"),
        (b"GGUF\x03\x00\x00\x00" + bytes(64), "GGUF"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "Git LFS"),
        (b"<!DOCTYPE html><html></html>", "web page"),
    ],
)
def test_other_and_broken_files_are_refused_by_what_they_are(tmp_path, data, words):
    """A message that does not say what the file is sends the user the wrong way."""
    with pytest.raises(FormatError, match=words):
        open_bytes(tmp_path, data)


def test_pickle_is_never_loaded(tmp_path):
    """Unpickling a checkpoint runs whatever code its maker put in."""
    for name in ("model.ckpt", "model.pt", "model.safetensors"):
        torch.save({"w": torch.ones(2)}, tmp_path / name)
        with pytest.raises(FormatError, match=r"pickle.*never opened"):
            Checkpoint.open(tmp_path / name)
    write(tmp_path / "old.ckpt", b"not even a pickle")
    with pytest.raises(FormatError, match="pickle"):
        Checkpoint.open(tmp_path / "old.ckpt")


def test_header_that_looks_like_a_pickle_opens(tmp_path):
    """A header of 640 bytes begins with 0x80 0x02, as pickles do: it is still a good file."""
    data = pack(json.dumps(ONE).encode().ljust(0x280), bytes(8))
    assert data.startswith(b"\x80\x02")
    open_bytes(tmp_path, data)


def test_declared_header_of_the_maximum_is_not_allocated(tmp_path):
    """A sparse file can be as large as it claims; beyond 100 MB it is refused unread."""
    path = write(tmp_path / "x.safetensors", (MAX_HEADER_BYTES + 1).to_bytes(8, "little") + b"{")
    os.truncate(path, 4 << 30)
    with pytest.raises(FormatError, match="declare a header"):
        Checkpoint.open(path)


VALID = pack(
    {"__metadata__": {"k": "v"}, "a": entry("F16", [2, 2], 0, 8), "b": entry("U8", [3], 8, 11)},
    bytes(range(11)),
)


@given(
    st.lists(st.tuples(st.integers(0, len(VALID) - 1), st.integers(0, 255)), max_size=4),
    st.integers(0, len(VALID)),
)
@settings(
    max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
def test_damaged_bytes_raise_only_our_errors(tmp_path, changes, length):
    """Whatever bytes a file has, a user sees a message of ours and never a traceback of Python."""
    data = bytearray(VALID)
    for position, value in changes:
        data[position] = value
    path = write(tmp_path / "fuzz.safetensors", bytes(data[:length] if length % 3 else data))
    try:
        with Checkpoint.open(path) as checkpoint:
            for name in checkpoint.tensors:
                checkpoint.read(name)
    except (FormatError, InputError):
        pass


JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**65), 2**65) | st.floats() | st.text(max_size=3),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3)
    ),
    max_leaves=6,
)


@given(
    st.dictionaries(
        st.sampled_from(["__metadata__", "a", "b"]),
        JSON
        | st.fixed_dictionaries(
            {
                "dtype": st.sampled_from(["F16", "U8", "BOOL", "C64"]) | JSON,
                "shape": st.lists(st.integers(0, 4), max_size=3) | JSON,
                "data_offsets": st.lists(st.integers(0, 11), min_size=2, max_size=2) | JSON,
            }
        ),
    )
)
@settings(
    max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
def test_any_json_header_raises_only_our_errors(tmp_path, header):
    """The same for headers that are JSON and say anything."""
    path = write(tmp_path / "fuzz.safetensors", pack(header, bytes(11)))
    try:
        with Checkpoint.open(path) as checkpoint:
            for name in checkpoint.tensors:
                checkpoint.read(name)
    except (FormatError, InputError):
        pass


def test_zero_sized_tensors_between_others_open(tmp_path):
    """SDXL v-prediction files hold empty marker keys; equal offsets are no overlap."""
    header = {
        "v_pred": entry("F32", [0], 4, 4),
        "a": entry("F32", [1], 0, 4),
        "b": entry("F32", [1], 4, 8),
        "ztsnr": entry("F32", [0], 8, 8),
    }
    open_bytes(tmp_path, pack(header, bytes(8)))


def test_no_more_tensors_than_any_model_has(tmp_path):
    """Millions of empty tensors cost gigabytes and minutes, and hold nothing."""
    empty = json.dumps(entry("U8", [0], 0, 0)).encode()
    tensors = b",".join(b'"%d":%s' % (number, empty) for number in range(MAX_ENTRIES + 1))
    with pytest.raises(FormatError, match=f"more than {MAX_ENTRIES} entries"):
        open_bytes(tmp_path, pack(b"{" + tensors + b"}"))


def test_names_and_metadata_have_a_length(tmp_path):
    """One emoji makes Python hold four bytes a character: a name of megabytes costs thirteen times
    the file, and stands in the message as a whole."""
    for name in (b"a" * MAX_NAME_BYTES, b"\\\\" * (MAX_NAME_BYTES // 2)):
        good = b'{"%s":{"dtype":"U8","shape":[0],"data_offsets":[0,0]}}'
        open_bytes(tmp_path, pack(good % name))
        for header in (good % (name + b"a"), b'{"__metadata__":{"%sa":"b"}}' % name):
            with pytest.raises(FormatError, match=f"is longer than {MAX_NAME_BYTES} bytes"):
                open_bytes(tmp_path, pack(header))
    half = b"a" * (MAX_TEXT_BYTES // 2)
    open_bytes(tmp_path, pack(b'{"__metadata__":{"a":"%s","b":"x"}}' % half))
    with pytest.raises(FormatError, match=r"the string at byte .* is longer than"):
        open_bytes(tmp_path, pack(b'{"__metadata__":{"a":"%s","b":"%s"}}' % (half, half)))


def test_messages_show_names_in_part(tmp_path):
    """A message of 4000 characters of a stranger's choice pushes everything else off the screen."""
    name = "n" * 4000
    headers = (
        {name: 3},
        {name: entry("F33", [1], 0, 4)},
        {name: entry("F32", [-1], 0, 4)},
        {name: entry("F32", [1], 0, 5)},
        {name: entry("F32", [1], 8, 12)},
        {"__metadata__": {name: 1}},
        b'{"%s":%s,"%s":{}}' % ((name.encode(), json.dumps(ONE["w"]).encode(), name.encode())),
    )
    for header in headers:
        with pytest.raises(FormatError) as raised:
            open_bytes(tmp_path, pack(header, bytes(8)))
        assert len(str(raised.value)) < 500 + len(str(tmp_path))
        assert "(4000 characters)" in str(raised.value)


def test_shapes_of_thousands_of_dimensions_are_refused(tmp_path):
    """No tensor has them, and numbers are what takes longest to read: seconds in a large header."""
    with pytest.raises(FormatError, match="no flat JSON object"):
        open_bytes(tmp_path, pack({"a": entry("U8", [0] + [1] * 1000, 0, 0)}))
    open_bytes(tmp_path, pack({"a": entry("U8", [0] + [1] * 18, 0, 0)}))


def test_texts_with_escapes_are_read_as_json_reads_them(tmp_path):
    """Training tools keep whole JSON texts with escaped quotes in the metadata."""
    nested = json.dumps({"tags": {'say "no"': 1, "back\\slash\\": 2, "\n\u00e9\U0001f600": 3}})
    names = ['"', "\\", '\\"', "\u00e9\n", "}{", "a.b/../c"]
    header = {"__metadata__": {"ss_tags": nested, "": "", '\\"': '"\\'}}
    header |= {name: entry("U8", [0], 0, 0) for name in names}
    for ascii_only in (True, False):
        text = json.dumps(header, ensure_ascii=ascii_only, indent=2).encode()
        with Checkpoint.open(write(tmp_path / "file.safetensors", pack(text))) as checkpoint:
            assert checkpoint.metadata == header["__metadata__"]
            assert list(checkpoint.tensors) == names


def test_fuzzed_files():
    """What a hostile file can do is refuse to load; the script runs a million of them."""
    found = fuzz(2000, seed=1)
    assert found["accepted"] > 20
    assert found["refused"] > 1000
    assert found["slowest_ms"] < 1000


def test_large_fuzzed_files():
    """What grows faster than the file shows only in large ones."""
    found = fuzz_large(0.5)
    assert found["large_files"] >= 10
    assert found["large_peak_share_of_the_limit"] <= 1.0
