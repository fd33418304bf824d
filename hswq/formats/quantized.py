"""FP8 weights in files of any container, hswq's or another tool's: found, named and read."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

import torch
from torch import Tensor

from hswq.errors import FormatError, InputError
from hswq.formats.containers import (
    COMFY_MARKER,
    COMFY_METADATA,
    INPUT_SCALE_SUFFIXES,
    LEGACY_MARKER,
    SCALE_SUFFIXES,
)
from hswq.formats.e4m3 import decode
from hswq.formats.reader import Checkpoint, TensorInfo

_WEIGHT = ".weight"
# Scales of blocks and of scales (DeepSeek's FP8, NVFP4): codes beside them are not the values.
_FOREIGN_SCALES = (".weight_scale_inv", ".weight_scale_2", ".scale_inv")
# Four-bit weights of other tools, packed into int32 (GPTQ, AWQ, SVDQuant; compressed-tensors).
_PACKED_SUFFIXES = (".qweight", ".weight_packed")


@dataclass(frozen=True)
class QuantizedWeight:
    """One one-byte weight found in a file.

    Attributes:
        base: the key without '.weight'.
        weight_key: key of the codes.
        scale_key: key of the scale; None where the codes are the values.
        per_row: the scale has one value per row of the weight.
    """

    base: str
    weight_key: str
    scale_key: str | None
    per_row: bool


def is_quantized(checkpoint: Checkpoint, prefix: str = "") -> str | None:
    """Say how a denoiser is quantized, by hswq or any other tool; None for 16 or 32 bits.

    Args:
        checkpoint: an open file.
        prefix: what the denoiser's keys start with; other tensors are not looked at.
    Returns:
        Words for an error message: 'comfy markers on 743 layers, 794 tensors of F8_E4M3'.
    """
    tensors = {key: info for key, info in checkpoint.tensors.items() if key.startswith(prefix)}
    marked = sum(key.endswith(COMFY_MARKER) for key in tensors)
    packed = sum(key.endswith(_PACKED_SUFFIXES) for key in tensors)
    scales = Counter(
        weight.scale_key.removeprefix(weight.base + ".")
        for weight in quantized_weights(checkpoint).values()
        if weight.scale_key is not None and weight.weight_key in tensors
    )
    dtypes = Counter(info.dtype for info in tensors.values() if _is_quantized_part(info))
    words = [f"comfy markers on {marked} layers"] if marked else []
    if COMFY_METADATA in checkpoint.metadata and not marked:
        words.append(f"metadata {COMFY_METADATA}")
    words += [f"{name} on {count} layers" for name, count in scales.items()]
    words += [f"packed weights on {packed} layers"] if packed else []
    words += [f"{count} tensors of {dtype}" for dtype, count in dtypes.items()]
    return ", ".join(words) or None


def detect_container(checkpoint: Checkpoint) -> str:
    """Return the container of a file: one of CONTAINERS, or 'none' where no FP8 weight is found.

    Scaled files of other tools count as the container whose scale keys they use.
    """
    scales = {
        weight.scale_key.removeprefix(weight.base)
        for weight in quantized_weights(checkpoint).values()
        if weight.scale_key is not None
    }
    keys = checkpoint.tensors
    if COMFY_METADATA in checkpoint.metadata or any(key.endswith(COMFY_MARKER) for key in keys):
        return "comfy"
    for container, suffix in SCALE_SUFFIXES.items():
        if suffix in scales:
            return container
    if any(key == LEGACY_MARKER or key.endswith(f".{LEGACY_MARKER}") for key in keys):
        return "legacy"
    return "plain" if any(info.dtype.startswith("F8_") for info in keys.values()) else "none"


def quantized_weights(checkpoint: Checkpoint) -> dict[str, QuantizedWeight]:
    """Find every weight of one-byte elements, with its scale, in the order of the file.

    Those that are not E4M3 are listed too, so that none passes for a 16-bit weight; `dequantize`
    refuses them.

    Returns:
        By base, the key without '.weight'.
    """
    found = (_quantized_weight(checkpoint, info) for info in checkpoint.tensors.values())
    return {weight.base: weight for weight in found if weight is not None}


def read_scale(checkpoint: Checkpoint, base: str) -> Tensor:
    """Read the scale of a quantized weight.

    Args:
        checkpoint: an open file of any container.
        base: key of `quantized_weights`.
    Returns:
        float32 [] or one a row, on the CPU; 1 where the file has none.
    Raises:
        InputError: the file has no such quantized weight.
        FormatError: its codes are not E4M3, or its scale is not one finite number > 0 or one a row.
    """
    info = checkpoint.tensors.get(base + _WEIGHT)
    weight = None if info is None else _quantized_weight(checkpoint, info)
    if info is None or weight is None:
        raise InputError(f"{checkpoint.path} has no quantized weight {base + _WEIGHT!r}.")
    if info.dtype != "F8_E4M3":
        raise FormatError(
            f"weight {info.name!r} in {info.path} is {info.dtype}: only F8_E4M3 can be dequantized "
            "here. Use the tool that wrote it."
        )
    foreign = [base + suffix for suffix in _FOREIGN_SCALES if base + suffix in checkpoint.tensors]
    if foreign:
        raise FormatError(
            f"weight {info.name!r} in {info.path} is scaled by {foreign[0]!r}, blocks of it by "
            "numbers of their own: only one scale a weight or one a row can be read. Use the tool "
            "that wrote it."
        )
    if weight.scale_key is None:
        return torch.ones((), device="cpu")
    scale = checkpoint.read(weight.scale_key)
    if not _is_scale(scale) or not (weight.per_row or scale.numel() == 1):
        raise FormatError(
            f"scale {weight.scale_key!r} {list(scale.shape)} in {info.path} does not fit weight "
            f"{list(info.shape)}: one finite number above 0 is needed, or one a row. Use the tool "
            "that wrote it."
        )
    return scale.float().reshape(-1 if weight.per_row else ())


def read_weight(
    checkpoint: Checkpoint, base: str, start_row: int | None = None, stop_row: int | None = None
) -> tuple[Tensor, Tensor]:
    """Read the codes and the scale of a quantized weight, or of some of its rows.

    Args:
        checkpoint: an open file of any container.
        base: key of `quantized_weights`.
        start_row: first row; None is 0.
        stop_row: row after the last; None is the weight's number of rows.
    Returns:
        The codes, uint8, and the scale, float32 [] or one a row that was read. On the CPU.
    Raises:
        The errors of `read_scale`; InputError: not these rows.
    """
    scale = read_scale(checkpoint, base)
    codes = checkpoint.read(base + _WEIGHT, start_row, stop_row).view(torch.uint8)
    return codes, scale[start_row:stop_row] if scale.dim() else scale


def read_input_scale(checkpoint: Checkpoint, base: str) -> Tensor | None:
    """Read the static scale of a quantized layer's input; None where the file has none.

    Args:
        checkpoint: an open file of any container.
        base: key of `quantized_weights`.
    Returns:
        float32 [] on the CPU.
    Raises:
        FormatError: it is not one finite number > 0.
    """
    found = [base + suffix for suffix in INPUT_SCALE_SUFFIXES.values()]
    key = next((name for name in found if name in checkpoint.tensors), None)
    if key is None:
        return None
    value = checkpoint.read(key)
    if not _is_scale(value) or value.numel() != 1:
        raise FormatError(
            f"input scale {key!r} {list(value.shape)} in {checkpoint.path} is not one finite "
            "number above 0. Use the tool that wrote it."
        )
    return value.float().reshape(())


def dequantize(checkpoint: Checkpoint, base: str) -> Tensor:
    """Read a quantized weight: float32(code value) * float32(scale).

    Args:
        checkpoint: an open file of any container.
        base: key of `quantized_weights`.
    Returns:
        float32, shape of the weight, on the CPU.
    Raises:
        The errors of `read_weight`.
    """
    codes, scale = read_weight(checkpoint, base)
    values = decode(codes)
    return values.mul_(scale.reshape(-1, *[1] * (values.dim() - 1)) if scale.dim() else scale)


def container_keys(checkpoint: Checkpoint) -> set[str]:
    """Return the keys that belong to a container and not to the model: scales and markers."""
    found = {
        key
        for key in checkpoint.tensors
        if key.endswith(COMFY_MARKER) or key.rpartition(".")[2] == LEGACY_MARKER
    }
    for weight in quantized_weights(checkpoint).values():
        scales = {weight.base + suffix for suffix in INPUT_SCALE_SUFFIXES.values()}
        found |= scales & checkpoint.tensors.keys()
        if weight.scale_key is not None:
            found.add(weight.scale_key)
    return found


def model_metadata(checkpoint: Checkpoint) -> dict[str, str]:
    """Return the metadata without what a container or hswq itself wrote about the FP8 layers."""
    return {
        key: text
        for key, text in checkpoint.metadata.items()
        if key != COMFY_METADATA and not key.startswith("hswq.")
    }


def _is_scale(value: Tensor) -> bool:
    """Tell whether all values are finite numbers above 0 of more than eight bits."""
    is_number = value.is_floating_point() and value.itemsize > 1
    return is_number and bool((value.isfinite() & (value > 0.0)).all())


def _has_byte_elements(info: TensorInfo) -> bool:
    """Tell codes from the small byte vectors that other data are stored in (markers, JSON)."""
    return info.dtype.startswith("F8_") or (info.dtype in ("I8", "U8") and len(info.shape) > 1)


def _is_quantized_part(info: TensorInfo) -> bool:
    """Tell codes from byte matrices of other uses: tools name theirs weight, weight._data, …."""
    return _has_byte_elements(info) and (info.dtype.startswith("F8_") or _WEIGHT in info.name)


def _quantized_weight(checkpoint: Checkpoint, info: TensorInfo) -> QuantizedWeight | None:
    if not info.name.endswith(_WEIGHT) or not _has_byte_elements(info):
        return None
    base = info.name.removesuffix(_WEIGHT)
    for container, suffix in SCALE_SUFFIXES.items():
        scale = checkpoint.tensors.get(base + suffix)
        if scale is None or (container == "hswq" and info.dtype != "F8_E4M3"):
            continue
        rows = info.shape[0] if info.shape else 1
        per_row = scale.numel == rows > 1 and scale.shape[0] == rows
        return QuantizedWeight(base, info.name, scale.name, per_row)
    return QuantizedWeight(base, info.name, None, False)
