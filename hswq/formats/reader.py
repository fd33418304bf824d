"""Reading checkpoints: one interface over single files, sharded files and diffusers folders.

Tensors are read with preadv into fresh buffers, never mapped: memory is what was asked for, and row
ranges read only their own bytes.
"""

from __future__ import annotations

import math
import os
import re
import threading
from collections.abc import Iterable
from functools import cached_property
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch import Tensor

from hswq.errors import FormatError, InputError
from hswq.formats.header import TensorInfo, read_header
from hswq.strict_json import MAX_TEXT_BYTES, parse_json, shown

__all__ = ["Checkpoint", "TensorInfo", "is_index"]

# One preadv moves at most 2**31 - 4096 bytes on Linux.
_READ_BYTES = 1 << 30
_COMPONENTS = ("unet", "transformer")
# diffusers writes the variant before '.json' or before '.safetensors'.
_INDEX = re.compile(r"\.safetensors\.index(\..+)?\.json$")
_SHARD = re.compile(r"-\d{5}-of-\d{5}")
_FULL_PRECISION = (
    "diffusion_pytorch_model.safetensors",
    "diffusion_pytorch_model.safetensors.index.json",
)
_NEEDED = (
    "give a .safetensors file, a .safetensors.index.json, a diffusers component folder or a "
    "diffusers pipeline folder"
)


class Checkpoint:
    """The tensors of a checkpoint, wherever they lie. Safe to read from several threads.

    Attributes:
        path: what was opened, as it was given.
        files: the files that hold tensors.
        tensors: name to TensorInfo, in the order of the files and of the bytes in them.
        metadata: the headers' metadata; of equal keys the first shard's.
        pipeline_dir: for a component of a diffusers pipeline, the folder with model_index.json.
    """

    def __init__(
        self,
        path: Path,
        files: Iterable[Path],
        tensors: dict[str, TensorInfo],
        metadata: dict[str, str],
    ) -> None:
        self.path = path
        self.files = tuple(files)
        self.tensors = tensors
        self.metadata = metadata
        self._descriptors: dict[Path, int] = {}
        self._lock = threading.Lock()
        self._closed = False

    @classmethod
    def open(cls, path: str | os.PathLike[str]) -> Checkpoint:
        """Open a checkpoint and check its headers; no tensor is read.

        Args:
            path: a .safetensors file; a .safetensors.index.json or a folder holding one; a
                diffusers component folder; a diffusers pipeline folder, whose 'unet' or
                'transformer' is opened.
        Raises:
            InputError: there is nothing usable at `path`.
            FormatError: a file is of another kind, damaged, or not what the index says.
        """
        given = Path(path)
        found = _locate(given)
        if is_index(found):
            files, tensors, metadata = _read_shards(found)
        else:
            listed, metadata = read_header(found)
            files, tensors = [found], {info.name: info for info in listed}
        return cls(given, files, tensors, metadata)

    @cached_property
    def config(self) -> dict[str, Any] | None:
        """The config.json beside the files; None where there is none.

        Raises:
            FormatError: it is no JSON object.
        """
        path = self.files[0].parent / "config.json"
        return _read_json(path) if path.is_file() else None

    @property
    def pipeline_dir(self) -> Path | None:
        """The folder with model_index.json one level above the files; None where there is none."""
        folder = self.files[0].absolute().parent.parent
        return folder if (folder / "model_index.json").is_file() else None

    def read(self, name: str, start_row: int | None = None, stop_row: int | None = None) -> Tensor:
        """Read a tensor, or rows start_row to stop_row of its first dimension, into a new buffer.

        Returns:
            Tensor on the CPU of the file's dtype.
        Raises:
            InputError: no such tensor, or rows outside of it.
            FormatError: the file was shortened after it was opened.
        """
        info = self._info(name)
        begin, end, shape = info.begin, info.end, info.shape
        if start_row is not None or stop_row is not None:
            rows = shape[0] if shape else 0
            start = 0 if start_row is None else start_row
            stop = rows if stop_row is None else stop_row
            if not shape or not 0 <= start <= stop <= rows:
                raise InputError(
                    f"rows {start} to {stop} of tensor {name!r} {list(shape)} in {info.path} were "
                    "asked for: they must lie inside its first dimension."
                )
            row_bytes = math.prod(shape[1:]) * info.torch_dtype.itemsize
            begin, end = begin + start * row_bytes, begin + stop * row_bytes
            shape = (stop - start, *shape[1:])
        buffer = torch.empty(end - begin, dtype=torch.uint8, device="cpu")
        self._fill(buffer.numpy().data, info, begin)
        return buffer.view(info.torch_dtype).reshape(shape)

    def read_bytes(self, name: str, offset: int, length: int) -> bytes:
        """Read `length` bytes of a tensor from byte `offset` of it.

        Raises:
            As `read_into`.
        """
        info = self._checked(name, offset, length)
        buffer = bytearray(length)
        self._fill(memoryview(buffer), info, info.begin + offset)
        return bytes(buffer)

    def read_into(self, name: str, offset: int, buffer: memoryview) -> None:
        """Fill a writable buffer of bytes from byte `offset` of a tensor.

        Raises:
            InputError: no such tensor, or bytes outside of it.
            FormatError: the file was shortened after it was opened.
        """
        info = self._checked(name, offset, len(buffer))
        self._fill(buffer, info, info.begin + offset)

    def close(self) -> None:
        """Close the files; reading afterwards is an InputError."""
        with self._lock:
            self._closed = True
            while self._descriptors:
                os.close(self._descriptors.popitem()[1])

    def __enter__(self) -> Checkpoint:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def _info(self, name: str) -> TensorInfo:
        try:
            return self.tensors[name]
        except KeyError:
            raise InputError(f"{self.path} has no tensor {name!r}.") from None

    def _checked(self, name: str, offset: int, length: int) -> TensorInfo:
        """Return the tensor that holds so many bytes from byte `offset` on."""
        info = self._info(name)
        if not 0 <= offset <= offset + length <= info.nbytes:
            raise InputError(
                f"bytes {offset} to {offset + length} of tensor {name!r} in {info.path} were asked "
                f"for, which has {info.nbytes}."
            )
        return info

    def _descriptor(self, path: Path) -> int:
        with self._lock:
            if self._closed:
                raise InputError(f"{self.path} was closed: open it again to read from it.")
            if path not in self._descriptors:
                self._descriptors[path] = os.open(path, os.O_RDONLY)
            return self._descriptors[path]

    def _fill(self, buffer: memoryview, info: TensorInfo, begin: int) -> None:
        """Fill the buffer from byte `begin` of the tensor's file."""
        done = 0
        while done < len(buffer):
            try:
                descriptor = self._descriptor(info.path)
                part = buffer[done : done + _READ_BYTES]
                count = os.preadv(descriptor, [part], begin + done)
            except OSError as error:
                raise InputError(
                    f"tensor {info.name!r} in {info.path} cannot be read: {error.strerror}."
                ) from error
            if not count:
                raise FormatError(
                    f"{info.path} ends inside tensor {info.name!r}: it was shortened after it was "
                    "opened. Start again with the whole file."
                )
            done += count


def is_index(path: Path) -> bool:
    """Tell by its name whether a file is the index of a sharded checkpoint, with variant or not."""
    return _INDEX.search(path.name) is not None


def _locate(path: Path) -> Path:
    """Return the .safetensors or index file that a user means by `path`."""
    if os.path.isdir(path):
        if (path / "model_index.json").is_file():
            components = [path / name for name in _COMPONENTS if (path / name).is_dir()]
            if not components:
                raise InputError(
                    f"pipeline folder {path} has neither of {', '.join(_COMPONENTS)}: {_NEEDED}."
                )
            path = components[0]
        return _locate_in(path)
    if not os.path.exists(path):
        raise InputError(f"{path} does not exist or cannot be reached: {_NEEDED}.")
    if not os.path.isfile(path):
        raise InputError(f"{path} is no regular file: {_NEEDED}.")
    return path


def _locate_in(folder: Path) -> Path:
    """Return the one checkpoint of a folder; diffusers' own name goes before a variant (fp16)."""
    try:
        names = sorted(os.listdir(folder))
    except OSError as error:
        raise InputError(f"{folder} cannot be read: {error.strerror}.") from error
    found = [
        name
        for name in names
        if _INDEX.search(name) or (name.endswith(".safetensors") and not _SHARD.search(name))
    ]
    for name in _FULL_PRECISION:
        if name in found:
            return folder / name
    if not found:
        raise InputError(f"folder {folder} holds no .safetensors checkpoint: {_NEEDED}.")
    if len(found) > 1:
        listed = ", ".join(found[:10]) + (" …" if len(found) > 10 else "")
        raise InputError(
            f"folder {folder} holds {len(found)} checkpoints ({listed}): give the path of one."
        )
    return folder / found[0]


def _read_json(path: Path) -> dict[str, Any]:
    try:
        with path.open("rb") as handle:
            data = handle.read(MAX_TEXT_BYTES + 1)
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror}.") from error
    if len(data) > MAX_TEXT_BYTES:
        raise FormatError(f"{path} is larger than {MAX_TEXT_BYTES} bytes: it is no such file.")
    return parse_json(data, str(path))


def _read_shards(index: Path) -> tuple[list[Path], dict[str, TensorInfo], dict[str, str]]:
    """Read the headers of all shards and compare them with the index's weight_map."""
    weight_map = _read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise FormatError(f"{index} has no weight_map: it is no index of a sharded checkpoint.")
    names: dict[str, None] = {}
    for tensor, name in weight_map.items():
        if not isinstance(name, str) or not name or "/" in name or "\0" in name:
            raise FormatError(
                f"{index} puts tensor {shown(tensor)} into {shown(str(name))}: the name of a file "
                "beside it is needed."
            )
        names[name] = None
    files: list[Path] = []
    tensors: dict[str, TensorInfo] = {}
    metadata: dict[str, str] = {}
    for name in names:
        shard = index.parent / name
        if not shard.is_file():
            raise FormatError(
                f"{shard} is missing, which {index.name} names: get all shards of the checkpoint."
            )
        listed, shard_metadata = read_header(shard)
        for info in listed:
            expected = weight_map.get(info.name)
            if expected != name:
                raise FormatError(
                    f"{shard} holds tensor {shown(info.name)}, which {index.name} "
                    f"{'does not know' if expected is None else f'puts into {expected!r}'}: shards "
                    "and index belong to different checkpoints."
                )
            tensors[info.name] = info
        files.append(shard)
        metadata = {**shard_metadata, **metadata}
    for tensor, name in weight_map.items():
        if tensor not in tensors:
            raise FormatError(
                f"tensor {shown(tensor)} is not in {index.parent / name}, where {index.name} puts "
                "it: shards and index belong to different checkpoints."
            )
    return files, tensors, metadata
