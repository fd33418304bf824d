"""Where every byte of a safetensors file will lie, known before any of it is written."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from hswq.errors import InputError
from hswq.formats.dtypes import DTYPES
from hswq.formats.header import LENGTH_BYTES, MAX_HEADER_BYTES, MAX_NAME_BYTES, METADATA_KEY
from hswq.strict_json import MAX_TEXT_BYTES, shown

_RANK = {name: rank for rank, name in enumerate(DTYPES)}
_HEADER_ALIGNMENT = 8


@dataclass(frozen=True)
class TensorSpec:
    """Name, safetensors dtype and shape of a tensor to be written."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Size in bytes."""
        return math.prod(self.shape) * DTYPES[self.dtype].itemsize


@dataclass(frozen=True)
class Layout:
    """The plan of one file.

    Attributes:
        specs: by name, in the order of their bytes: by dtype, widest first, then by name, as the
            safetensors package orders them.
        offsets: absolute offset of every tensor's first byte.
        header_bytes: length of the header, padding included.
        file_bytes: size of the file.
    """

    specs: dict[str, TensorSpec]
    offsets: dict[str, int]
    header_bytes: int
    file_bytes: int

    @classmethod
    def of(cls, specs: Iterable[TensorSpec], metadata_bytes: int) -> Layout:
        """Lay out a file.

        Args:
            specs: every tensor, in any order.
            metadata_bytes: upper bound of the metadata as JSON in UTF-8; 0 where there are none.
        Raises:
            InputError: two tensors share a name, a name or dtype cannot be written, or the header
                would be larger than safetensors allows.
        """
        listed = list(specs)
        for spec in listed:
            _check(spec)
        ordered: dict[str, TensorSpec] = {}
        for spec in sorted(listed, key=lambda spec: (_RANK[spec.dtype], spec.name)):
            if spec.name in ordered:
                raise InputError(
                    f"tensor {spec.name!r} is to be written twice: rename one of them."
                )
            ordered[spec.name] = spec
        # The metadata stand between a key and a comma of their own.
        reserved = len(f'"{METADATA_KEY}":,') + metadata_bytes if metadata_bytes else 0
        header_bytes = len(_header_json(ordered, {})) + reserved
        header_bytes += -header_bytes % _HEADER_ALIGNMENT
        if header_bytes > MAX_HEADER_BYTES:
            raise InputError(
                f"the header would take {header_bytes} bytes, and safetensors allows "
                f"{MAX_HEADER_BYTES}: write fewer tensors or less metadata."
            )
        if metadata_bytes > MAX_TEXT_BYTES:
            raise InputError(
                f"the metadata would take {metadata_bytes} bytes, and at most {MAX_TEXT_BYTES} are "
                "read again: write less metadata."
            )
        offsets = {}
        position = LENGTH_BYTES + header_bytes
        for spec in ordered.values():
            offsets[spec.name] = position
            position += spec.nbytes
        return cls(ordered, offsets, header_bytes, position)

    def start(self, metadata: Mapping[str, str]) -> bytes:
        """Return all bytes before the tensors: length, header and padding.

        Raises:
            InputError: the metadata are not text, or larger than what was reserved.
        """
        for key, value in metadata.items():
            if not (isinstance(key, str) and isinstance(value, str)):
                raise InputError(f"metadata {key!r} is {value!r}: safetensors holds only text.")
        header = _header_json(self.specs, metadata)
        if len(header) > self.header_bytes:
            raise InputError(
                f"the metadata are {len(header) - self.header_bytes} bytes larger than what was "
                "reserved for them: pass a larger metadata_bytes."
            )
        return self.header_bytes.to_bytes(LENGTH_BYTES, "little") + header.ljust(self.header_bytes)


def _check(spec: TensorSpec) -> None:
    if spec.dtype not in DTYPES:
        raise InputError(
            f"tensor {spec.name!r} has dtype {spec.dtype!r}; known are {', '.join(DTYPES)}."
        )
    if spec.name == METADATA_KEY:
        raise InputError(f"a tensor cannot be named {METADATA_KEY!r}: safetensors reserves it.")
    size = len(json.dumps(spec.name, ensure_ascii=False).encode(errors="surrogatepass")) - len('""')
    if size > MAX_NAME_BYTES:
        raise InputError(
            f"the name {shown(spec.name)} takes {size} bytes, and at most {MAX_NAME_BYTES} are "
            "read again: shorten it."
        )


def _header_json(specs: Mapping[str, TensorSpec], metadata: Mapping[str, str]) -> bytes:
    header: dict[str, object] = {}
    if metadata:
        header[METADATA_KEY] = dict(sorted(metadata.items()))
    position = 0
    for spec in specs.values():
        end = position + spec.nbytes
        header[spec.name] = {
            "dtype": spec.dtype,
            "shape": list(spec.shape),
            "data_offsets": [position, end],
        }
        position = end
    try:
        return json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
    except UnicodeEncodeError as error:
        found = error.object[error.start : error.end]
        raise InputError(
            f"a name or metadata hold {found!r}, half a surrogate pair, which is no text."
        ) from error
