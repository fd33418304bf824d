"""Helpers for small safetensors files, well formed or not."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hswq.formats.dtypes import DTYPES


def pack(header: dict[str, Any] | bytes, data: bytes = b"") -> bytes:
    """Bytes of a safetensors file with this header, whatever it says."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data


def entry(dtype: str, shape: list[int], begin: int, end: int) -> dict[str, Any]:
    """One tensor's entry of a header."""
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


def random_tensor(dtype: str, shape: tuple[int, ...], seed: int = 0) -> Tensor:
    """Tensor of random bytes: any bit pattern, NaN payloads included."""
    generator = torch.Generator().manual_seed(seed)
    count = torch.Size(shape).numel() * DTYPES[dtype].itemsize
    high = 2 if dtype == "BOOL" else 256
    raw = torch.randint(0, high, (count,), generator=generator, dtype=torch.uint8)
    return raw.view(DTYPES[dtype]).reshape(shape)


def raw_bytes(tensor: Tensor) -> bytes:
    """The bytes of a tensor: NaNs compare equal only so."""
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def write(path: Path, data: bytes) -> Path:
    """Write a file and return its path."""
    path.write_bytes(data)
    return path
