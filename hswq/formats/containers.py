"""The four file layouts of FP8 checkpoints: what each adds to a file, and how any of them is read.

comfy: V1 linear and conv2d, V2 linear with scale and conv2d without. A linear L adds L.weight_scale
    F32 [] (V1: 1.0) and L.comfy_quant U8 (JSON), the file metadata _quantization_metadata.
plain: V1 linear and conv2d; adds nothing.
legacy: V2 linear. L adds L.scale_weight F32 [], the file <prefix>scaled_fp8 E4M3 [2].
hswq: V1 and V2 linear and conv2d. L adds L.scale F32 [1] (V1: 1.0).

Source: ComfyUI, comfy/utils.py (convert_old_quants) and comfy/ops.py (_load_from_state_dict).
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from hswq.errors import FormatError, InputError
from hswq.formats.dtypes import DTYPE_NAMES
from hswq.formats.e4m3 import decode
from hswq.formats.reader import Checkpoint, TensorInfo
from hswq.formats.writer import TensorSpec

CONTAINERS = ("comfy", "plain", "legacy", "hswq")

_WEIGHT = ".weight"
# Kinds of layers whose FP8 weight the container holds, and those it can hold a scale for.
_QUANTIZED_KINDS = {
    "comfy": ("linear", "conv2d"),
    "plain": ("linear", "conv2d"),
    "legacy": ("linear",),
    "hswq": ("linear", "conv2d"),
}
_SCALED_KINDS = {
    "comfy": ("linear",),
    "plain": (),
    "legacy": ("linear",),
    "hswq": ("linear", "conv2d"),
}
# Without full_precision_matrix_mult ComfyUI quantizes the activations too, with scale 1.
_COMFY_LAYER = {"format": "float8_e4m3fn", "full_precision_matrix_mult": True}
_COMFY_MARKER = ".comfy_quant"
_COMFY_METADATA = "_quantization_metadata"
_LEGACY_MARKER = "scaled_fp8"
# In the order in which they are looked for; '.scale' is also a name that models use themselves
# (Flux: norm.query_norm.scale), and counts only beside an E4M3 weight.
_SCALE_SUFFIXES = {"comfy": ".weight_scale", "legacy": ".scale_weight", "hswq": ".scale"}
# Four-bit weights of other tools, packed into int32 (GPTQ, AWQ, SVDQuant; compressed-tensors).
_PACKED_SUFFIXES = (".qweight", ".weight_packed")


@dataclass(frozen=True)
class QuantizedLayer:
    """One FP8 layer of a file to be written.

    Attributes:
        key: full key of the weight, prefix included, ending in '.weight'.
        kind: 'linear' or 'conv2d'.
        shape: shape of the weight.
        scaled: whether a searched scale is stored with it.
    """

    key: str
    kind: str
    shape: tuple[int, ...]
    scaled: bool

    @property
    def base(self) -> str:
        """The key without '.weight'."""
        return self.key.removesuffix(_WEIGHT)


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


def check_container(container: str, scaled: bool) -> None:
    """Refuse a container that does not exist or does not go with V1 or V2.

    Raises:
        InputError: so it is.
    """
    if container not in CONTAINERS:
        raise InputError(f"container {container!r} is not one of {', '.join(CONTAINERS)}.")
    if scaled and not _SCALED_KINDS[container]:
        raise InputError(
            f"container {container} holds no scales: use comfy, legacy or hswq for scaled weights."
        )
    if container == "legacy" and not scaled:
        raise InputError(
            "container legacy holds only scaled weights: use comfy, plain or hswq for others."
        )


def can_quantize(container: str, kind: str, scaled: bool) -> bool:
    """Tell whether a file of this container holds FP8 layers of this kind ('linear', 'conv2d').

    Raises:
        InputError: the container does not go with `scaled`.
    """
    check_container(container, scaled)
    return kind in _QUANTIZED_KINDS[container]


def can_scale(container: str, kind: str) -> bool:
    """Tell whether a layer of this kind can have a scale in this container."""
    return kind in _SCALED_KINDS[container]


def extra_specs(container: str, layers: Iterable[QuantizedLayer], prefix: str) -> list[TensorSpec]:
    """Return the specs of all that the container adds to the tensors of the model.

    Args:
        container: one of CONTAINERS.
        layers: the FP8 layers.
        prefix: prefix of the denoiser's keys ('model.diffusion_model.').
    Raises:
        InputError: the container cannot hold one of the layers, or not with a scale.
    """
    tensors = marker_tensors(container, prefix)
    for layer in layers:
        # The specs depend on no scale.
        tensors |= extra_tensors(container, layer, 1.0)
    return [
        TensorSpec(name, DTYPE_NAMES[tensor.dtype], tuple(tensor.shape))
        for name, tensor in tensors.items()
    ]


def extra_tensors(container: str, layer: QuantizedLayer, scale: float) -> dict[str, Tensor]:
    """Return what the container stores beside one weight.

    Args:
        container: one of CONTAINERS.
        layer: the FP8 layer.
        scale: real = code value * scale; 1.0 for a layer that is not scaled.
    Raises:
        InputError: the container cannot hold this layer, or not with a scale.
    """
    _check_layer(container, layer)
    if not layer.scaled and scale != 1.0:
        raise InputError(f"layer {layer.base!r} is not scaled and was given the scale {scale}.")
    if not can_scale(container, layer.kind):
        return {}
    shape = (1,) if container == "hswq" else ()
    name = layer.base + _SCALE_SUFFIXES[container]
    tensors = {name: torch.full(shape, scale, dtype=torch.float32, device="cpu")}
    if container == "comfy":
        marker = json.dumps(_COMFY_LAYER, separators=(",", ":")).encode()
        tensors[layer.base + _COMFY_MARKER] = torch.tensor(
            list(marker), dtype=torch.uint8, device="cpu"
        )
    return tensors


def marker_tensors(container: str, prefix: str) -> dict[str, Tensor]:
    """Return what the container stores once in a file.

    Args:
        container: one of CONTAINERS.
        prefix: prefix of the denoiser's keys ('model.diffusion_model.').
    """
    if container != "legacy":
        return {}
    # Two elements tell the readers to multiply in 16 bits and not to quantize the activations.
    return {prefix + _LEGACY_MARKER: torch.zeros(2, device="cpu").to(torch.float8_e4m3fn)}


def container_metadata(container: str, layers: Iterable[QuantizedLayer]) -> dict[str, str]:
    """Return the metadata that the container's readers need; names are written in full.

    Args:
        container: one of CONTAINERS.
        layers: the FP8 layers.
    """
    if container != "comfy":
        return {}
    marked = {layer.base: _COMFY_LAYER for layer in layers if can_scale(container, layer.kind)}
    if not marked:
        return {}
    found = {"format_version": "1.0", "layers": marked}
    return {_COMFY_METADATA: json.dumps(found, separators=(",", ":"))}


def _check_layer(container: str, layer: QuantizedLayer) -> None:
    check_container(container, layer.scaled)
    if layer.kind not in _QUANTIZED_KINDS[container]:
        raise InputError(
            f"container {container} holds no FP8 {layer.kind}, and {layer.base!r} is one: leave it "
            "16-bit, or use another container."
        )
    if layer.scaled and not can_scale(container, layer.kind):
        raise InputError(
            f"container {container} has no scales for {layer.kind}, and {layer.base!r} is to have "
            "one: store it without, or use container hswq."
        )


def is_quantized(checkpoint: Checkpoint, prefix: str = "") -> str | None:
    """Say how a denoiser is quantized, by hswq or any other tool; None for 16 or 32 bits.

    Args:
        checkpoint: an open file.
        prefix: what the denoiser's keys start with; other tensors are not looked at.
    Returns:
        Words for an error message: 'comfy markers on 743 layers, 794 tensors of F8_E4M3'.
    """
    tensors = {key: info for key, info in checkpoint.tensors.items() if key.startswith(prefix)}
    marked = sum(key.endswith(_COMFY_MARKER) for key in tensors)
    packed = sum(key.endswith(_PACKED_SUFFIXES) for key in tensors)
    scales = Counter(
        weight.scale_key.removeprefix(weight.base + ".")
        for weight in quantized_weights(checkpoint).values()
        if weight.scale_key is not None and weight.weight_key in tensors
    )
    dtypes = Counter(info.dtype for info in tensors.values() if _is_quantized_part(info))
    words = [f"comfy markers on {marked} layers"] if marked else []
    if _COMFY_METADATA in checkpoint.metadata and not marked:
        words.append(f"metadata {_COMFY_METADATA}")
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
    if _COMFY_METADATA in checkpoint.metadata or any(key.endswith(_COMFY_MARKER) for key in keys):
        return "comfy"
    for container, suffix in _SCALE_SUFFIXES.items():
        if suffix in scales:
            return container
    if any(key == _LEGACY_MARKER or key.endswith(f".{_LEGACY_MARKER}") for key in keys):
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


def dequantize(checkpoint: Checkpoint, base: str) -> Tensor:
    """Read a quantized weight: float32(code value) * float32(scale).

    Args:
        checkpoint: an open file of any container.
        base: key of `quantized_weights`.
    Returns:
        float32, shape of the weight, on the CPU.
    Raises:
        InputError: the file has no such quantized weight.
        FormatError: its codes are not E4M3, or its scale is not one finite number or one a row.
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
    values = decode(checkpoint.read(info.name).view(torch.uint8))
    if weight.scale_key is None:
        return values
    scale = checkpoint.read(weight.scale_key)
    is_number = scale.is_floating_point() and scale.itemsize > 1
    if not is_number or not (weight.per_row or scale.numel() == 1) or not scale.isfinite().all():
        raise FormatError(
            f"scale {weight.scale_key!r} {list(scale.shape)} in {info.path} does not fit weight "
            f"{list(info.shape)}: one finite number is needed, or one a row. Use the tool that "
            "wrote it."
        )
    shape = (-1, *[1] * (values.dim() - 1)) if weight.per_row else ()
    return values.mul_(scale.float().reshape(shape))


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
    for container, suffix in _SCALE_SUFFIXES.items():
        scale = checkpoint.tensors.get(base + suffix)
        if scale is None or (container == "hswq" and info.dtype != "F8_E4M3"):
            continue
        rows = info.shape[0] if info.shape else 1
        per_row = scale.numel == rows > 1 and scale.shape[0] == rows
        return QuantizedWeight(base, info.name, scale.name, per_row)
    return QuantizedWeight(base, info.name, None, False)
