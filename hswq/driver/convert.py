"""FP8 files into other containers, and back into 16 or 32 bit."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import hswq
from hswq import kernels
from hswq.config import CONTAINERS, CalibrationConfig
from hswq.driver.paths import check_outputs
from hswq.driver.stream import Piece, Stream
from hswq.driver.verify import check_copy, check_header, check_tensor, chosen
from hswq.errors import InputError
from hswq.formats.containers import (
    FORMAT_VERSION,
    QuantizedLayer,
    can_quantize,
    can_scale,
    container_metadata,
    extra_specs,
    extra_tensors,
    marker_tensors,
)
from hswq.formats.dtypes import DTYPE_NAMES
from hswq.formats.e4m3 import E4M3_MAX, decode
from hswq.formats.quantized import (
    QuantizedWeight,
    container_keys,
    dequantize,
    model_metadata,
    quantized_weights,
    read_input_scale,
    read_scale,
    read_weight,
)
from hswq.formats.reader import Checkpoint
from hswq.formats.writer import CheckpointWriter, TensorSpec
from hswq.models.defaults import plain_defaults
from hswq.models.detect import denoiser_prefix
from hswq.progress import Progress, no_progress
from hswq.quality import sqnr_db
from hswq.search import scale_of

DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}

_COPY_BYTES = 32 << 20
_KINDS = {2: "linear", 4: "conv2d"}
_SHOWN = 10


@dataclass(frozen=True)
class ConvertReport:
    """What was done with one file.

    Attributes:
        source: path read.
        output: path written.
        container: file layout written; 'none' for a file without FP8.
        layers: FP8 layers of the source.
        requantized: for each layer that the container could not hold as it was, the SQNR in dB of
            what was written against code value * scale of the source; None where they are equal.
        source_bytes: size read.
        output_bytes: size written.
        sha256: of the output, as 64 hexadecimal digits.
    """

    source: str
    output: str
    container: str
    layers: int
    source_bytes: int
    output_bytes: int
    sha256: str
    requantized: dict[str, float | None] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """Return the report as JSON-ready data."""
        return dataclasses.asdict(self)


@dataclass(frozen=True)
class _Layer:
    """One FP8 layer of the source and what the new container lacks for it.

    Attributes:
        weight: the layer in the source.
        target: the layer in the output; None where it is no FP8 layer there.
        scale: float32 [] or [O], of the source.
        input_scale: float32 [] that is carried over, or None.
        lacks: in words, what the container cannot hold of it.
        codes_stay: the codes are copied.
    """

    weight: QuantizedWeight
    target: QuantizedLayer | None
    scale: Tensor
    input_scale: Tensor | None
    lacks: tuple[str, ...]
    codes_stay: bool


@plain_defaults()
def convert_checkpoint(
    src: str | os.PathLike[str],
    dst: str | os.PathLike[str],
    container: str,
    *,
    requantize: bool = False,
    progress: Progress = no_progress,
) -> ConvertReport:
    """Write an FP8 file in another container; codes and scales are carried over bit for bit.

    Args:
        src: FP8 file of any container, of hswq or another tool, or a folder.
        dst: the .safetensors file to write; an existing one is replaced at the end.
        container: one of hswq.formats.CONTAINERS.
        requantize: encode anew, from code value * scale, what the container cannot hold: with one
            scale a layer (largest magnitude / 448) in the place of one a row, without where it
            holds none, in float16 where it holds no FP8. Input scales it cannot hold are left out.
        progress: called with (phase, done, total).
    Raises:
        InputError: the container cannot hold some layers (the text names them) and `requantize` is
            not set; the source has no FP8 weight; or the paths cannot be used.
        FormatError: the file is damaged, or its FP8 weights are of a kind that cannot be read.
    """
    if container not in CONTAINERS:
        raise InputError(f"container {container!r} is not one of {', '.join(CONTAINERS)}.")
    target, *_ = check_outputs(src, CalibrationConfig(), dst)
    with Checkpoint.open(src) as checkpoint:
        layers = {
            weight.weight_key: _layer(checkpoint, weight, container)
            for weight in _fp8_weights(checkpoint).values()
        }
        if not requantize:
            _refuse_losses(checkpoint, container, layers.values())
        errors: dict[str, float | None] = {}

        def encode(key: str) -> dict[str, Tensor]:
            tensors, error = _encode(checkpoint, container, key, layers[key])
            errors[layers[key].weight.base] = None if error == float("inf") else error
            return tensors

        whole = all(layer.codes_stay for layer in layers.values())
        targets = [layer.target for layer in layers.values() if layer.target is not None]
        prefix = denoiser_prefix(checkpoint)
        extra = marker_tensors(container, prefix)
        for layer in layers.values():
            if layer.codes_stay and layer.target is not None:
                extra |= extra_tensors(container, layer.target, layer.scale, layer.input_scale)
        floats = {
            key: torch.float16
            for key, layer in layers.items()
            if layer.target is None and not layer.codes_stay
        }
        size, sha256 = _write(
            checkpoint,
            target,
            [*_specs(checkpoint, floats), *extra_specs(container, targets, prefix)],
            _metadata(checkpoint, container, targets, whole=whole),
            extra,
            {key: encode for key, layer in layers.items() if not layer.codes_stay},
            progress,
        )
        source_bytes = sum(path.stat().st_size for path in checkpoint.files)
    return ConvertReport(
        *(str(src), str(target), container, len(layers), source_bytes, size, sha256, errors)
    )


@plain_defaults()
def dequantize_checkpoint(
    src: str | os.PathLike[str],
    dst: str | os.PathLike[str],
    dtype: str = "fp16",
    *,
    progress: Progress = no_progress,
) -> ConvertReport:
    """Write an FP8 file's weights as code value * scale, in 16 or 32 bit, without any container.

    The float32 product is rounded once, to `dtype`. What is not FP8 is copied byte for byte.

    Args:
        src: FP8 file of any container, of hswq or another tool, or a folder.
        dst: the .safetensors file to write; an existing one is replaced at the end.
        dtype: 'fp16', 'bf16' or 'fp32'.
        progress: called with (phase, done, total).
    Raises:
        InputError: the file has no FP8 weight, one overflows `dtype`, or a path cannot be used.
        FormatError: the file is damaged, or its FP8 weights are of a kind that cannot be read.
    """
    if dtype not in DTYPES:
        raise InputError(f"dtype {dtype!r} is not one of {', '.join(DTYPES)}.")
    target, *_ = check_outputs(src, CalibrationConfig(), dst)
    with Checkpoint.open(src) as checkpoint:
        weights = _fp8_weights(checkpoint)
        extra = container_keys(checkpoint)
        for base in weights:
            # Another format is told before gigabytes are written.
            read_scale(checkpoint, base)

        def restore(key: str) -> dict[str, Tensor]:
            base = key.removesuffix(".weight")
            if base in weights:
                codes, scale = read_weight(checkpoint, base)
            else:
                codes, scale = checkpoint.read(key).view(torch.uint8), torch.ones(())
            values = kernels.dequantize_e4m3(codes, scale, DTYPES[dtype])
            if not bool(torch.isfinite(values).all()):
                raise InputError(
                    f"{key!r} of {checkpoint.path} holds NaN, or values beyond the range of "
                    f"{dtype}: use --dtype bf16 or fp32, or get the file again."
                )
            return {key: values}

        changed = [
            info.name
            for info in checkpoint.tensors.values()
            if info.dtype == "F8_E4M3" and info.name not in extra
        ]
        size, sha256 = _write(
            checkpoint,
            target,
            _specs(checkpoint, dict.fromkeys(changed, DTYPES[dtype])),
            model_metadata(checkpoint),
            {},
            dict.fromkeys(changed, restore),
            progress,
        )
        source_bytes = sum(path.stat().st_size for path in checkpoint.files)
    return ConvertReport(*(str(src), str(target), "none", len(weights), source_bytes, size, sha256))


def _fp8_weights(checkpoint: Checkpoint) -> dict[str, QuantizedWeight]:
    weights = quantized_weights(checkpoint)
    if not weights:
        raise InputError(
            f"{checkpoint.path} holds no FP8 weight: give a quantized file, or quantize this one."
        )
    return weights


def _layer(checkpoint: Checkpoint, weight: QuantizedWeight, container: str) -> _Layer:
    """Find out what a container makes of one FP8 layer."""
    shape = checkpoint.tensors[weight.weight_key].shape
    kind = _KINDS.get(len(shape), "")
    scale = read_scale(checkpoint, weight.base)
    input_scale = read_input_scale(checkpoint, weight.base)
    is_one = bool((scale == 1.0).all())
    scalable = bool(kind) and can_scale(container, kind)
    lacks = []
    # A norm in FP8 passes as it is; no container has scales for it.
    held = bool(kind) and can_quantize(container, kind, scaled=container == "legacy")
    if kind and not held:
        lacks.append(f"FP8 weights of {kind}")
    elif not is_one and not scalable:
        lacks.append(f"scales of {kind or 'other weights'}")
    elif scale.dim() and not is_one and container != "hswq":
        lacks.append("scales of rows")
    codes_stay = not lacks
    if input_scale is not None and (container == "legacy" or not scalable):
        lacks.append("input scales")
        input_scale = None
    layer = QuantizedLayer(
        weight.weight_key,
        kind,
        shape,
        scaled=scalable,
        per_row=scale.dim() > 0 and container == "hswq",
        static_input=input_scale is not None,
    )
    if scale.dim() and is_one and container != "hswq":
        scale = torch.ones(())
    return _Layer(weight, layer if held else None, scale, input_scale, tuple(lacks), codes_stay)


def _refuse_losses(checkpoint: Checkpoint, container: str, layers: Iterable[_Layer]) -> None:
    problems: dict[str, list[str]] = {}
    for layer in layers:
        for lack in layer.lacks:
            problems.setdefault(lack, []).append(layer.weight.base)
    if problems:
        described = "; ".join(
            f"{lack} (it has {len(bases)}: {', '.join(bases[:_SHOWN])}"
            f"{', …' if len(bases) > _SHOWN else ''})"
            for lack, bases in problems.items()
        )
        raise InputError(
            f"container {container} cannot hold all of {checkpoint.path}: {described}. Use another "
            "container (hswq holds every scale), or --requantize to encode these layers anew."
        )


def _encode(
    checkpoint: Checkpoint, container: str, key: str, layer: _Layer
) -> tuple[dict[str, Tensor], float]:
    """Return a layer that the container cannot hold as it is as what it can, and its SQNR."""
    exact = dequantize(checkpoint, layer.weight.base)
    if layer.target is None:
        values = exact.to(torch.float16)
        if not bool(torch.isfinite(values).all()):
            raise InputError(f"{key!r} of {checkpoint.path} overflows float16.")
        return {key: values}, sqnr_db(exact, values)
    amax = float(exact.abs().max()) if layer.target.scaled else E4M3_MAX
    scale = scale_of(amax) if layer.target.scaled else 1.0
    codes = kernels.quantize_e4m3(exact, amax, scale)
    extra = extra_tensors(container, layer.target, scale, layer.input_scale)
    return {key: codes, **extra}, sqnr_db(exact, decode(codes).mul_(scale))


def _metadata(
    checkpoint: Checkpoint, container: str, layers: Iterable[QuantizedLayer], *, whole: bool
) -> dict[str, str]:
    """Return the output's metadata; how the codes came about stays where all of them stay."""
    kept = {key: text for key, text in checkpoint.metadata.items() if key.startswith("hswq.")}
    return {
        **model_metadata(checkpoint),
        **(kept if whole else {}),
        **container_metadata(container, layers),
        "hswq.format_version": FORMAT_VERSION,
        "hswq.version": hswq.__version__,
    }


def _specs(checkpoint: Checkpoint, dtypes: Mapping[str, torch.dtype]) -> list[TensorSpec]:
    """Return the specs of the model's own tensors, some of them in another dtype."""
    extra = container_keys(checkpoint)
    return [
        TensorSpec(
            info.name,
            DTYPE_NAMES[dtypes[info.name]] if info.name in dtypes else info.dtype,
            info.shape,
        )
        for info in checkpoint.tensors.values()
        if info.name not in extra
    ]


def _write(
    checkpoint: Checkpoint,
    target: Path,
    specs: list[TensorSpec],
    metadata: dict[str, str],
    extra: Mapping[str, Tensor],
    changed: Mapping[str, Callable[[str], dict[str, Tensor]]],
    progress: Progress,
) -> tuple[int, str]:
    """Write a file: copied tensors, given ones, and those that are made anew one by one.

    It is read back before it takes its name, as `verify_output` does with `--verify spot`.

    Returns:
        Its size in bytes, and its SHA-256.
    Raises:
        FormatError: what was read back differs.
    """
    names = {spec.name for spec in specs} - container_keys(checkpoint)
    infos = sorted(checkpoint.tensors.values(), key=lambda info: (str(info.path), info.begin))
    copied = [info for info in infos if info.name in names and info.name not in changed]
    pieces = [piece for info in copied for piece in Piece.cut(info, _COPY_BYTES)]
    remade = [info for info in infos if info.name in changed]
    total = sum(piece.nbytes for piece in pieces) + sum(info.nbytes for info in remade)
    done = 0
    room = len(json.dumps(metadata).encode())
    with CheckpointWriter(target, specs, room) as writer:
        for name, tensor in extra.items():
            writer.write(name, tensor)
        with Stream(checkpoint, pieces) as stream:
            for loan in stream:
                piece = loan.piece
                stream.behind(writer.write_chunk, piece.info.name, piece.offset, loan.view)
                stream.behind(loan.release)
                done += piece.nbytes
                progress("convert", done, total)
            stream.flush()
        for info in remade:
            for name, tensor in changed[info.name](info.name).items():
                writer.write(name, tensor)
            done += info.nbytes
            progress("convert", done, total)

        def verify(path: Path) -> None:
            with Checkpoint.open(path) as written:
                check_header(written, specs, metadata)
                for name in chosen([info.name for info in copied]):
                    check_copy(written, checkpoint, name)
                expected = dict(extra)
                for name in chosen([info.name for info in remade]):
                    expected |= changed[name](name)
                for name, tensor in expected.items():
                    check_tensor(written, name, tensor)

        sha256 = writer.commit(metadata, verify, digest=True)
        return writer.file_bytes, sha256
