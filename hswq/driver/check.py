"""A file checked on its own, and against the checkpoint that it was made from."""

from __future__ import annotations

import hashlib
import math
import os
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hswq.driver.inspect import stored_plan
from hswq.errors import FormatError
from hswq.formats.e4m3 import E4M3_MAX
from hswq.formats.quantized import (
    dequantize,
    quantized_weights,
    read_input_scale,
    read_scale,
    read_weight,
)
from hswq.formats.reader import Checkpoint, TensorInfo
from hswq.models.defaults import plain_defaults
from hswq.models.detect import denoiser_prefix
from hswq.plan import LayerPlan
from hswq.progress import Progress, no_progress
from hswq.quality import check_rounding, compare_checkpoints, is_correction

_CHUNK_BYTES = 32 << 20
_SHOWN = 10


@dataclass(frozen=True)
class Check:
    """What was found in order.

    Attributes:
        sha256: hexadecimal digest of every file, by its path.
        tensors: tensors read.
        quantized_layers: of them, one-byte weights.
        against: path of the source it was compared with; None without one.
        equal_tensors: tensors that are the source's bit for bit.
        corrected_biases: biases that differ from the source's since they were corrected.
        worst_sqnr_db: the least SQNR of an FP8 weight against the source's; None without source,
            or where all are equal.
    """

    sha256: dict[str, str]
    tensors: int
    quantized_layers: int
    against: str | None = None
    equal_tensors: int | None = None
    corrected_biases: int | None = None
    worst_sqnr_db: float | None = None


@plain_defaults()
def check_file(
    path: str | os.PathLike[str],
    against: str | os.PathLike[str] | None = None,
    *,
    progress: Progress = no_progress,
) -> Check:
    """Read every byte of a checkpoint and refuse what no reader should be given.

    Floating-point tensors must be finite, FP8 codes no NaN, scales one positive number or one a
    row, and layers in FP8 exactly those of the plan in the metadata, where there is one. Against
    the source: no key is missing or new; all tensors but FP8 weights and corrected biases are
    equal bit for bit. Where the plan in the metadata says nearest rounding, every code is the
    nearest one; compensated codes and those of other tools are near it in every row and element,
    so that few wrong bits in them can pass (see `check_rounding`). Biases moved by no more than
    the rounding of their weight can need.

    Args:
        path: checkpoint of any container, of hswq or another tool.
        against: the checkpoint it was made from.
        progress: called with (phase, done, total).
    Raises:
        FormatError: something is wrong; the text lists the first ten findings.
        InputError: a file cannot be read, or the two share no tensor.
    """
    with Checkpoint.open(path) as checkpoint:
        findings: list[str] = []
        digests = _scan(checkpoint, findings, progress)
        quantized = quantized_weights(checkpoint)
        for base, weight in quantized.items():
            if checkpoint.tensors[weight.weight_key].dtype == "F8_E4M3":
                _collect(findings, read_scale, checkpoint, base)
                _collect(findings, read_input_scale, checkpoint, base)
        _check_plan(checkpoint, findings)
        facts: dict[str, Any] = {}
        if against is not None:
            with Checkpoint.open(against) as source:
                facts = _check_source(checkpoint, source, findings, progress)
    if findings:
        dots = f"; and {len(findings) - _SHOWN} more" if len(findings) > _SHOWN else ""
        raise FormatError(
            f"{path} is not in order: {'; '.join(findings[:_SHOWN])}{dots}. Write it again, or get "
            "it again from where it came."
        )
    return Check(digests, len(checkpoint.tensors), len(quantized), **facts)


def _scan(checkpoint: Checkpoint, findings: list[str], progress: Progress) -> dict[str, str]:
    """Read all bytes once, in the order of the files; return their digests."""
    total = sum(path.stat().st_size for path in checkpoint.files)
    done = 0
    digests = {}
    for path in checkpoint.files:
        digest = hashlib.sha256()
        tensors = sorted(
            (info for info in checkpoint.tensors.values() if info.path == path),
            key=lambda info: info.begin,
        )
        start = min((info.begin for info in tensors), default=path.stat().st_size)
        with path.open("rb") as handle:
            digest.update(handle.read(start))
        done += start
        for info in tensors:
            damaged = False
            for part in _chunks(checkpoint, info):
                digest.update(part)
                damaged = damaged or not _is_sound(part, info)
                done += len(part)
                progress("check", done, total)
            if damaged:
                findings.append(f"{info.name!r} ({info.dtype}) holds NaN or Inf")
        digests[str(path)] = digest.hexdigest()
    return digests


def _chunks(checkpoint: Checkpoint, info: TensorInfo) -> Iterator[memoryview]:
    for offset in range(0, info.nbytes, _CHUNK_BYTES):
        length = min(_CHUNK_BYTES, info.nbytes - offset)
        yield memoryview(checkpoint.read_bytes(info.name, offset, length))


def _is_sound(part: memoryview, info: TensorInfo) -> bool:
    if info.dtype == "F8_E4M3":
        codes = torch.frombuffer(bytearray(part), dtype=torch.uint8)
        return not bool(((codes & 0x7F) == 0x7F).any())
    if not info.torch_dtype.is_floating_point:
        return True
    values: Tensor = torch.frombuffer(bytearray(part), dtype=info.torch_dtype)
    return bool((values if values.itemsize > 1 else values.float()).isfinite().all())


def _collect(findings: list[str], read: Any, checkpoint: Checkpoint, base: str) -> None:
    try:
        read(checkpoint, base)
    except FormatError as error:
        findings.append(str(error).rstrip("."))


def _check_plan(checkpoint: Checkpoint, findings: list[str]) -> None:
    plan = stored_plan(checkpoint)
    if plan is None:
        return
    prefix = denoiser_prefix(checkpoint)
    for layer in plan.layers:
        info = checkpoint.tensors.get(f"{prefix}{layer.name}.weight")
        if info is None:
            findings.append(f"layer {layer.name!r} of its plan is missing")
        elif (info.dtype == "F8_E4M3") != layer.quantized:
            planned = "FP8" if layer.quantized else "kept"
            findings.append(f"layer {layer.name!r} is planned {planned} and is {info.dtype}")


def _check_source(
    checkpoint: Checkpoint, source: Checkpoint, findings: list[str], progress: Progress
) -> dict[str, Any]:
    prefixes = denoiser_prefix(source), denoiser_prefix(checkpoint)
    if prefixes[0] == prefixes[1]:
        # Text encoders and the VAE are compared as well.
        prefixes = "", ""
    found = compare_checkpoints(source, checkpoint, prefixes, progress=progress)
    plan = stored_plan(checkpoint)
    planned = {} if plan is None else {layer.name: layer for layer in plan.layers}
    options = {} if plan is None else plan.options
    inner = denoiser_prefix(checkpoint).removeprefix(prefixes[1])
    distances = {}
    for layer in found.layers:
        known = (
            planned.get(layer.name.removeprefix(inner))
            if options.get("rounding") == "nearest"
            else None
        )
        problem, distances[layer.name] = _check_layer(
            source, checkpoint, [f"{prefix}{layer.name}" for prefix in prefixes], known
        )
        if problem:
            findings.append(f"{layer.name!r} is no rounding of the source's weight: {problem}")
    biases = []
    for name in found.others_changed:
        distance = distances.get(name.removesuffix(".bias")) if name.endswith(".bias") else None
        if distance is None or not options.get("bias_correction"):
            findings.append(f"{name!r} differs from the source's")
            continue
        biases.append(name)
        exact, bias = (
            file.read(prefix + name)
            for file, prefix in zip((source, checkpoint), prefixes, strict=True)
        )
        if exact.dtype != bias.dtype or not is_correction(exact, bias, distance):
            findings.append(f"{name!r} is further from the source's than a correction can be")
    findings += [f"{name!r} of the source is missing" for name in found.only_first]
    findings += [f"{name!r} is not in the source" for name in found.only_second]
    ratios = [layer.sqnr_db for layer in found.layers if math.isfinite(layer.sqnr_db)]
    return {
        "against": str(source.path),
        "equal_tensors": found.others_equal,
        "corrected_biases": len(biases),
        "worst_sqnr_db": min(ratios, default=None),
    }


def _check_layer(
    source: Checkpoint, checkpoint: Checkpoint, bases: list[str], planned: LayerPlan | None
) -> tuple[str, Tensor | None]:
    """Return why a layer is no rounding of the source's, and how far its rows are from it.

    Args:
        source: the checkpoint it was made from.
        checkpoint: the file.
        bases: the layer's keys in both, without '.weight'.
        planned: the layer in a plan of nearest rounding; None without one.
    """
    weight_keys = [f"{base}.weight" for base in bases]
    is_fp8 = source.tensors[weight_keys[0]].dtype == "F8_E4M3"
    exact = dequantize(source, bases[0]) if is_fp8 else source.read(weight_keys[0])
    if checkpoint.tensors[weight_keys[1]].dtype != "F8_E4M3":
        values = checkpoint.read(weight_keys[1])
        return "" if torch.equal(exact.to(values.dtype), values) else "it is no cast of it", None
    codes, scale = read_weight(checkpoint, bases[1])
    amax = None
    if planned is not None:
        amax = planned.amax if planned.scaled else E4M3_MAX
    found = check_rounding(exact, codes, scale, amax)
    return found.problem, found.distance
