"""The header of one safetensors file, checked strictly.

A file is 8 bytes of little-endian header length, the header (JSON), and the tensors' bytes without
holes. Everything here may come from a hostile file: nothing is allocated on its word, and whatever
is wrong raises FormatError. The header is read entry by entry: a general parser would make twenty
times its bytes of nested junk before anybody could look at it.

Source: https://github.com/huggingface/safetensors, README, "Format".
"""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeGuard

import torch

from hswq.errors import FormatError, InputError
from hswq.formats.dtypes import DTYPES
from hswq.strict_json import MAX_TEXT_BYTES, parse_json, shown

MAX_HEADER_BYTES = 100_000_000
# Tensors of one file, and entries of its metadata: ten times what diffusion models have.
MAX_ENTRIES = 50_000
# The longest name of a tensor or of an entry of the metadata: twenty times what models have.
MAX_NAME_BYTES = 4096
LENGTH_BYTES = 8
METADATA_KEY = "__metadata__"

_PICKLE_SUFFIXES = (".ckpt", ".pt", ".pth", ".bin", ".pkl", ".pickle")
_PICKLE = (
    "a PyTorch pickle, which can run any code when it is loaded and is never opened here: convert "
    "it to safetensors with a program you trust with it"
)


_SPACE = re.compile(rb"[ \t\n\r]*")
# One tensor's entry: dtype, shape and offsets, flat, and no number below 0, not even -0.
_ENTRY = re.compile(rb"\{[^{}-]{0,4096}\}")
# Weights have up to five dimensions; thousands of them in each of many entries would take seconds.
_MOST_COMMAS = 24
# Strings of printable ASCII without a backslash, as nearly all are: quick to read.
_PLAIN = re.compile(rb'[ !#-\[\]-~]*"')
# What is looked at first for the end of a string; few names are longer.
_WINDOW_BYTES = 256


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """Where one tensor lies.

    Attributes:
        name: the key.
        dtype: its name in safetensors ('F16').
        shape: row-major; () for a scalar.
        path: file that holds it.
        begin: absolute offset of its first byte in that file.
        end: absolute offset after its last byte.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    path: Path
    begin: int
    end: int

    @property
    def nbytes(self) -> int:
        """Size in bytes."""
        return self.end - self.begin

    @property
    def numel(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    @property
    def torch_dtype(self) -> torch.dtype:
        """The dtype of torch."""
        return DTYPES[self.dtype]


def read_header(path: Path) -> tuple[list[TensorInfo], dict[str, str]]:
    """Read and check the header of a safetensors file.

    Returns:
        The tensors in the order of their bytes, and the metadata.
    Raises:
        FormatError: the file is of another kind, damaged or truncated.
        InputError: it cannot be read.
    """
    try:
        with path.open("rb") as handle:
            size = os.fstat(handle.fileno()).st_size
            start = handle.read(LENGTH_BYTES + 1)
            length = int.from_bytes(start[:LENGTH_BYTES], "little")
            if start[LENGTH_BYTES:] != b"{" or length > min(MAX_HEADER_BYTES, size - LENGTH_BYTES):
                what = _describe(path, start, length, size)
                raise FormatError(f"{path} is not a safetensors file: {what}.")
            handle.seek(LENGTH_BYTES)
            text = handle.read(length)
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror}.") from error
    data_start = LENGTH_BYTES + length
    tensors, metadata = _parse_header(text, path, data_start)
    tensors.sort(key=lambda info: (info.begin, info.end))
    position = data_start
    for info in tensors:
        if info.begin != position:
            what = "overlaps the tensor before it" if info.begin < position else "follows a hole"
            raise _damaged(path, f"tensor {shown(info.name)} {what}")
        position = info.end
    if position != size:
        what = "truncated" if position > size else "followed by bytes that belong to no tensor"
        raise _damaged(
            path, f"its tensors end at byte {position}, the file at {size}: it is {what}"
        )
    return tensors, metadata


def _describe(path: Path, start: bytes, length: int, size: int) -> str:
    """Say what a file is that does not begin like a safetensors file."""
    if not size:
        return "it is empty; the download or copy failed"
    if start.startswith(b"GGUF"):
        return "it is a GGUF file; give the 16-bit safetensors file it was made from"
    is_pickle = start[:2] in (b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05")
    if start.startswith(b"PK\x03\x04") or is_pickle or path.suffix.lower() in _PICKLE_SUFFIXES:
        return f"it is {_PICKLE}"
    if start.startswith(b"version "):
        return "it is a Git LFS pointer; run `git lfs pull` to fetch the file itself"
    if start.startswith(b"<"):
        return "it is a web page or XML; download the file itself"
    if size <= LENGTH_BYTES + 1:
        return f"{size} bytes are too few"
    return (
        f"of its {size} bytes the first declare a header of {length} (at most {MAX_HEADER_BYTES} "
        f"are allowed), which starts with {start[LENGTH_BYTES:]!r} and not with a brace"
    )


def _damaged(path: Path, what: str) -> FormatError:
    return FormatError(f"{path} is damaged: {what}. Get the file again from where it came.")


def _parse_header(
    text: bytes, path: Path, data_start: int
) -> tuple[list[TensorInfo], dict[str, str]]:
    """Parse the header's JSON, each entry checked before the next is read."""
    where = f"the header of {path}"
    tensors: list[TensorInfo] = []
    metadata: dict[str, str] = {}
    room = MAX_TEXT_BYTES

    def read_tensor(name: str, position: int) -> int:
        if name == METADATA_KEY:
            if text[position : position + 1] != b"{":
                raise _damaged(path, f"{METADATA_KEY} is no JSON object")
            return _read_object(text, position, read_metadata)
        found = _ENTRY.match(text, position)
        if found is None or text.count(b",", position, found.end()) > _MOST_COMMAS:
            raise _damaged(
                path, f"the entry of tensor {shown(name)} is no flat JSON object of texts and sizes"
            )
        entry = parse_json(found.group(), f"the entry of tensor {shown(name)} in {path}")
        tensors.append(_checked_tensor(path, name, entry, data_start))
        return found.end()

    def read_metadata(key: str, position: int) -> int:
        nonlocal room
        if text[position : position + 1] != b'"':
            raise _damaged(path, f"the value of metadata {shown(key)} is no text")
        value, end = _read_string(text, position, room)
        room -= end - position
        if not (_is_text(key) and _is_text(value)):
            raise _damaged(path, f"the value of metadata {shown(key)} is no text")
        metadata[key] = value
        return end

    try:
        end = _skip(text, _read_object(text, _skip(text, 0), read_tensor))
        if end != len(text):
            raise ValueError(f"there is more behind its end at byte {end}")
    except FormatError:
        raise
    except ValueError as error:
        raise FormatError(f"{where} is not valid JSON: {error}.") from error
    return tensors, metadata


def _read_object(text: bytes, position: int, read_value: Callable[[str, int], int]) -> int:
    """Read one JSON object.

    Args:
        text: the header.
        position: of the brace that opens the object.
        read_value: called with a key and the position of its value, returns that behind it.
    Returns:
        The position behind the object.
    Raises:
        ValueError: it is none, a key occurs twice, or there are too many.
    """
    position = _skip(text, _expect(text, position, b"{"))
    if text[position : position + 1] == b"}":
        return position + 1
    seen: set[str] = set()
    while True:
        key, position = _read_string(text, position, MAX_NAME_BYTES)
        if key in seen:
            raise ValueError(f"key {shown(key)} occurs twice")
        seen.add(key)
        if len(seen) > MAX_ENTRIES:
            raise ValueError(f"there are more than {MAX_ENTRIES} entries")
        position = _skip(text, _expect(text, _skip(text, position), b":"))
        position = _skip(text, read_value(key, position))
        if text[position : position + 1] == b"}":
            return position + 1
        position = _skip(text, _expect(text, position, b","))


def _read_string(text: bytes, position: int, most: int) -> tuple[str, int]:
    """Return a JSON string of at most so many bytes between its quotes, and the position behind it.

    Raises:
        ValueError: it is none, is longer, or has no end.
    """
    start = _expect(text, position, b'"')
    stop = min(len(text), start + most + 1)
    if plain := _PLAIN.match(text, start, stop):
        return text[start : plain.end() - 1].decode("ascii"), plain.end()
    end = _find_quote(text, start, stop)
    if end < 0:
        what = "has no end" if stop == len(text) else f"is longer than {most} bytes"
        raise ValueError(f"the string at byte {position} {what}")
    value: str = json.loads(text[position : end + 1])
    return value, end + 1


def _find_quote(text: bytes, start: int, stop: int) -> int:
    """Return the position of the quote that ends a string's characters; -1 where none does."""
    size = _WINDOW_BYTES
    while True:
        # What is escaped is hidden, in the parser's own order: pairs of backslashes first. Each
        # window is four times the one before, so that all of them cost no more than the last.
        window = text[start : min(start + size, stop)]
        found = window.replace(b"\\\\", b"__").replace(b'\\"', b"__").find(b'"')
        if found >= 0:
            return start + found
        if start + size >= stop:
            return -1
        size *= 4


def _expect(text: bytes, position: int, character: bytes) -> int:
    if text[position : position + 1] != character:
        raise ValueError(
            f"{character.decode()!r} is needed at byte {position}, and "
            f"{text[position : position + 1]!r} is there"
        )
    return position + 1


def _skip(text: bytes, position: int) -> int:
    found = _SPACE.match(text, position)
    return position if found is None else found.end()


def _is_text(text: str) -> bool:
    """Tell whether a string can be written: JSON escapes can spell half a surrogate pair."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _checked_tensor(path: Path, name: str, entry: Any, data_start: int) -> TensorInfo:
    if not _is_text(name):
        raise _damaged(path, f"the name {shown(name)} is no text")
    if not isinstance(entry, dict):
        raise _damaged(path, f"the entry of tensor {shown(name)} is no JSON object")
    dtype, shape, offsets = (entry.get(key) for key in ("dtype", "shape", "data_offsets"))
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise FormatError(
            f"tensor {shown(name)} in {path} has dtype {dtype!r}; known are {', '.join(DTYPES)}."
        )
    # torch counts elements and strides in int64, zero-sized dimensions counting as 1 in a stride.
    if not _is_counts(shape) or math.prod(filter(None, shape)) >= 2**63:
        raise _damaged(path, f"tensor {shown(name)} has shape {shape!r}")
    if not _is_counts(offsets) or len(offsets) != 2:
        raise _damaged(path, f"tensor {shown(name)} has data_offsets {offsets!r}")
    begin, end = (data_start + offset for offset in offsets)
    info = TensorInfo(name, dtype, tuple(shape), path, begin, end)
    expected = info.numel * info.torch_dtype.itemsize
    if info.nbytes != expected:
        raise _damaged(
            path,
            f"tensor {shown(name)}, {dtype} {shape}, needs {expected} bytes and has {info.nbytes}",
        )
    return info


def _is_counts(value: Any) -> TypeGuard[list[int]]:
    # bool is an int to isinstance, but no count.
    return (
        isinstance(value, list)
        and {int}.issuperset(map(type, value))
        and min(value, default=0) >= 0
    )
