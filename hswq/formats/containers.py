"""The four file layouts of FP8 checkpoints: what each adds to a file. `quantized` reads them.

comfy: V1 linear and conv2d, V2 linear with scale and conv2d without. A linear L adds L.weight_scale
    F32 [] (V1: 1.0) and L.comfy_quant U8 (JSON), the file metadata _quantization_metadata; with
    FP8 activations L.input_scale F32 [].
plain: V1 linear and conv2d; adds nothing.
legacy: V2 linear. L adds L.scale_weight F32 [], the file <prefix>scaled_fp8 E4M3 [2].
hswq: V1 and V2 linear and conv2d. L adds L.scale F32 [1] (V1: 1.0), or [O] with one a row; with FP8
    activations L.input_scale F32 [].

Source: ComfyUI, comfy/utils.py (convert_old_quants) and comfy/ops.py (_load_from_state_dict).
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from hswq.config import CONTAINERS
from hswq.errors import InputError
from hswq.formats.dtypes import DTYPE_NAMES
from hswq.formats.writer import TensorSpec

# Of the metadata hswq.*, in files of every container.
FORMAT_VERSION = "1"

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
_FORMAT = "float8_e4m3fn"
COMFY_MARKER = ".comfy_quant"
COMFY_METADATA = "_quantization_metadata"
LEGACY_MARKER = "scaled_fp8"
# In the order in which they are looked for; '.scale' is also a name that models use themselves
# (Flux: norm.query_norm.scale), and counts only beside an E4M3 weight.
SCALE_SUFFIXES = {"comfy": ".weight_scale", "legacy": ".scale_weight", "hswq": ".scale"}
INPUT_SCALE_SUFFIXES = {"comfy": ".input_scale", "legacy": ".scale_input", "hswq": ".input_scale"}


@dataclass(frozen=True)
class QuantizedLayer:
    """One FP8 layer of a file to be written.

    Attributes:
        key: full key of the weight, prefix included, ending in '.weight'.
        kind: 'linear' or 'conv2d'.
        shape: shape of the weight.
        scaled: whether a scale other than 1 may be stored with it.
        per_row: the scale has one value per row of the weight.
        static_input: a scale of its input is stored too, for FP8 activations.
    """

    key: str
    kind: str
    shape: tuple[int, ...]
    scaled: bool
    per_row: bool = False
    static_input: bool = False

    @property
    def base(self) -> str:
        """The key without '.weight'."""
        return self.key.removesuffix(_WEIGHT)


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
        # The specs depend on no scale's value.
        tensors |= extra_tensors(container, layer, 1.0)
    return [
        TensorSpec(name, DTYPE_NAMES[tensor.dtype], tuple(tensor.shape))
        for name, tensor in tensors.items()
    ]


def extra_tensors(
    container: str,
    layer: QuantizedLayer,
    scale: float | Tensor,
    input_scale: float | Tensor | None = None,
) -> dict[str, Tensor]:
    """Return what the container stores beside one weight.

    Args:
        container: one of CONTAINERS.
        layer: the FP8 layer.
        scale: real = code value * scale; 1.0 for a layer that is not scaled, [O] for one per row.
        input_scale: scale of the layer's input, where `layer.static_input`.
    Raises:
        InputError: the container cannot hold this layer, or not with these scales.
    """
    _check_layer(container, layer)
    # A number for every value where only the specs are wanted.
    values = torch.as_tensor(scale, dtype=torch.float32, device="cpu").reshape(-1)
    if not layer.scaled and not bool((values == 1.0).all()):
        raise InputError(
            f"layer {layer.base!r} is not scaled and was given the scale {float(values[0])}."
        )
    tensors = {}
    if can_scale(container, layer.kind):
        rows = layer.shape[0] if layer.per_row else 1
        shape = (rows,) if container == "hswq" else ()
        name = layer.base + SCALE_SUFFIXES[container]
        tensors[name] = values.expand(rows).clone().reshape(shape)
    if layer.static_input:
        value = 1.0 if input_scale is None else float(input_scale)
        if not (0.0 < value < math.inf):
            raise InputError(f"layer {layer.base!r} was given the input scale {value}.")
        name = layer.base + INPUT_SCALE_SUFFIXES[container]
        tensors[name] = torch.tensor(value, dtype=torch.float32, device="cpu")
    if container == "comfy" and can_scale(container, layer.kind):
        marker = json.dumps(_comfy_layer(layer), separators=(",", ":")).encode()
        tensors[layer.base + COMFY_MARKER] = torch.tensor(
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
    return {prefix + LEGACY_MARKER: torch.zeros(2, device="cpu").to(torch.float8_e4m3fn)}


def container_metadata(container: str, layers: Iterable[QuantizedLayer]) -> dict[str, str]:
    """Return the metadata that the container's readers need; names are written in full.

    Args:
        container: one of CONTAINERS.
        layers: the FP8 layers.
    """
    if container != "comfy":
        return {}
    marked = {
        layer.base: _comfy_layer(layer) for layer in layers if can_scale(container, layer.kind)
    }
    if not marked:
        return {}
    found = {"format_version": "1.0", "layers": marked}
    return {COMFY_METADATA: json.dumps(found, separators=(",", ":"))}


def _comfy_layer(layer: QuantizedLayer) -> dict[str, object]:
    # Without an input scale and this flag ComfyUI would quantize the activations with scale 1.
    flags = {} if layer.static_input else {"full_precision_matrix_mult": True}
    return {"format": _FORMAT, **flags}


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
    if layer.per_row and container != "hswq":
        raise InputError(
            f"container {container} holds one scale a layer, and {layer.base!r} has one a row of "
            f"its {layer.shape[0]} rows: use container hswq."
        )
    if layer.static_input and container == "legacy":
        raise InputError(
            f"container legacy marks the whole file as weight-only, and {layer.base!r} has a scale "
            "for its input: use container comfy or hswq."
        )
