"""Two files of one model, layer by layer."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor

from hswq.calibration import Codes
from hswq.errors import InputError
from hswq.formats.quantized import (
    QuantizedWeight,
    container_keys,
    dequantize,
    quantized_weights,
    read_scale,
)
from hswq.formats.reader import Checkpoint
from hswq.progress import Progress, no_progress
from hswq.quality.weights import output_sqnr_db, sqnr_db


@dataclass(frozen=True)
class LayerComparison:
    """What one layer is in two files.

    Attributes:
        name: key without prefix and '.weight'.
        shape: of the weight.
        first: how the first file holds it: its dtype, '* scale' where a scale belongs to it.
        second: the same for the second file.
        codes_changed: share of the codes that differ, where both hold codes; else None.
        sqnr_db: weight of the second against the first, unweighted; infinite where equal.
        weighted_sqnr_db: the same with every input channel's weights times the mean of its
            magnitude; None without statistics. It knows of no correlation between channels, which
            compensated codes make use of: there they look worse than nearest ones.
        output_sqnr_db: power of the layer's output over that of its change, measured by the
            calibration that made the second file's codes; None for other codes.
    """

    name: str
    shape: tuple[int, ...]
    first: str
    second: str
    codes_changed: float | None
    sqnr_db: float
    weighted_sqnr_db: float | None
    output_sqnr_db: float | None


@dataclass(frozen=True)
class Comparison:
    """Two files of one model.

    Attributes:
        layers: every layer of which one file holds codes, in the order of the first.
        others_equal: tensors of both that are equal, bit for bit.
        others_changed: names of those that are not.
        only_first: names of tensors that only the first has, scales and markers apart.
        only_second: the same for the second.
    """

    layers: tuple[LayerComparison, ...]
    others_equal: int
    others_changed: tuple[str, ...]
    only_first: tuple[str, ...]
    only_second: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        """Return the comparison as JSON-ready data; infinite figures become None."""
        content = asdict(self)
        for layer in content["layers"]:
            for key in ("sqnr_db", "weighted_sqnr_db", "output_sqnr_db"):
                if layer[key] is not None and not math.isfinite(layer[key]):
                    layer[key] = None
        return content


def compare_checkpoints(
    first: Checkpoint,
    second: Checkpoint,
    prefixes: tuple[str, str],
    importance: Mapping[str, Tensor] | None = None,
    progress: Progress = no_progress,
    made: tuple[Codes, str] | None = None,
) -> Comparison:
    """Compare two open files of one denoiser, a layer in memory at a time.

    Args:
        first: file of any container, or of 16 or 32 bits.
        second: the same.
        prefixes: what the denoiser's keys start with in each.
        importance: mean magnitude of each input channel, by layer name; None: unknown.
        progress: called with ('compare', tensors done, tensors in all).
        made: codes that a calibration of the first file made, and what their keys start with.
    Raises:
        InputError: they share no layer, or a layer has two shapes.
    """
    codes = [quantized_weights(file) for file in (first, second)]
    ours, theirs = (_model_names(*given) for given in zip((first, second), prefixes, strict=True))
    common = [name for name in ours if name in theirs]
    if not common:
        raise InputError(
            f"'{first.path}' and '{second.path}' share no tensor: they are files of different "
            "models or layouts."
        )
    layers, equal, changed = [], 0, []
    for done, name in enumerate(common, 1):
        keys = prefixes[0] + name, prefixes[1] + name
        shapes = [tuple(f.tensors[k].shape) for f, k in zip((first, second), keys, strict=True)]
        bases = [key.removesuffix(".weight") for key in keys]
        weights = [found.get(base) for found, base in zip(codes, bases, strict=True)]
        is_float = first.tensors[keys[0]].torch_dtype.is_floating_point
        if shapes[0] != shapes[1] and (is_float or any(weights)):
            raise InputError(
                f"{name!r} is {list(shapes[0])} in '{first.path}' and {list(shapes[1])} in "
                f"'{second.path}': they are files of different models."
            )
        if any(weights):
            layer = _layer(name, shapes[0], (first, second), keys, weights, importance)
            if made is not None and weights[0] is None:
                layer = replace(layer, output_sqnr_db=_measured(second, keys[1], name, *made))
            layers.append(layer)
        elif _bytes_equal(first, second, keys):
            equal += 1
        else:
            changed.append(name)
        progress("compare", done, len(common))
    return Comparison(
        tuple(layers),
        equal,
        tuple(changed),
        tuple(name for name in ours if name not in theirs),
        tuple(name for name in theirs if name not in ours),
    )


def _model_names(file: Checkpoint, prefix: str) -> dict[str, None]:
    """Return the names of the model's own tensors, of every dtype: no scales and no markers."""
    extra = container_keys(file)
    return {
        name.removeprefix(prefix): None
        for name in file.tensors
        if name.startswith(prefix) and name not in extra
    }


def _layer(
    name: str,
    shape: tuple[int, ...],
    files: tuple[Checkpoint, Checkpoint],
    keys: tuple[str, str],
    weights: list[QuantizedWeight | None],
    importance: Mapping[str, Tensor] | None,
) -> LayerComparison:
    bases = [key.removesuffix(".weight") for key in keys]
    values = [
        dequantize(file, base) if weight else file.read(key).float()
        for file, base, key, weight in zip(files, bases, keys, weights, strict=True)
    ]
    base_name = name.removesuffix(".weight")
    channels = None if importance is None else importance.get(base_name)
    codes_changed = None
    if all(weights):
        raw = [file.read(key).view(torch.uint8) for file, key in zip(files, keys, strict=True)]
        codes_changed = float((raw[0] != raw[1]).double().mean())
    weighted = None
    if channels is not None and channels.numel() == shape[1]:
        factor = channels.reshape(1, -1, *[1] * (len(shape) - 2))
        weighted = sqnr_db(values[0] * factor, values[1] * factor)
    first, second = (_described(*given) for given in zip(files, bases, keys, weights, strict=True))
    return LayerComparison(
        name=base_name,
        shape=shape,
        first=first,
        second=second,
        codes_changed=codes_changed,
        sqnr_db=sqnr_db(*values),
        weighted_sqnr_db=weighted,
        output_sqnr_db=None,
    )


def _measured(file: Checkpoint, key: str, name: str, codes: Codes, prefix: str) -> float | None:
    """Return what the calibration measured of a layer, if its codes are those of the file."""
    made = prefix + name
    unit = codes.units.get(made)
    if unit is None or not torch.equal(file.read(key).view(torch.uint8), codes.read(made)):
        return None
    base = key.removesuffix(".weight")
    if not bool((read_scale(file, base) == codes.scale(made)).all()):
        return None
    bias = codes.bias(made)
    if bias is not None:
        written = file.read(f"{base}.bias")
        if not torch.equal(written, bias.to(written.dtype)):
            return None
    return output_sqnr_db(unit)


def _described(file: Checkpoint, base: str, key: str, weight: QuantizedWeight | None) -> str:
    dtype = file.tensors[key].dtype
    if weight is None:
        return dtype
    scale = read_scale(file, base)
    return "E4M3" if bool((scale == 1.0).all()) else "E4M3 * scale"


def _bytes_equal(first: Checkpoint, second: Checkpoint, keys: tuple[str, str]) -> bool:
    infos = [file.tensors[key] for file, key in zip((first, second), keys, strict=True)]
    if (infos[0].dtype, infos[0].shape) != (infos[1].dtype, infos[1].shape):
        return False
    ours, theirs = (
        f.read_bytes(i.name, 0, i.nbytes) for f, i in zip((first, second), infos, strict=True)
    )
    return ours == theirs
