"""A module filled from an FP8 file of any container."""

from __future__ import annotations

import os
from collections.abc import Iterable

import torch
from torch import Tensor, nn

from hswq.errors import FormatError, InputError
from hswq.formats.e4m3 import decode
from hswq.formats.quantized import (
    container_keys,
    quantized_weights,
    read_input_scale,
    read_scale,
    read_weight,
)
from hswq.formats.reader import Checkpoint
from hswq.loader.modules import Conv2d, Linear, check_compute, fp8_layer
from hswq.models.detect import detect
from hswq.models.families import FAMILIES
from hswq.models.family import Family
from hswq.models.map import Source

Sources = dict[str, tuple[Source, ...]]
_SHOWN = 10
# E4M3 lies inside each of them.
_FLOATS = (torch.float16, torch.bfloat16, torch.float32)


def load_quantized(
    module: nn.Module,
    path: str | os.PathLike[str],
    compute: str = "auto",
    *,
    device: torch.device | str | None = None,
) -> nn.Module:
    """Fill a module from a file whose weights are FP8, whole or in part.

    Every nn.Linear and nn.Conv2d whose weight is FP8 in the file becomes an hswq.Linear or
    hswq.Conv2d; all else takes the file's values in the file's dtype, exactly. Parameters get no
    gradient. Tensors are read one by one: memory is what the module takes, and one tensor.

    Files of all containers are read, those of other tools with a scale a weight or one a row too,
    with the module's own names, under any prefix; for diffusers' denoisers of the families that
    hswq knows also in the layout of single-file checkpoints, whose other components are left alone.
    A layer whose weight's dtype diffusers' code asks for (Z-Image's first of the timestep) gets its
    FP8 values in the dtype of its bias.

    Args:
        module: as it is built from its configuration, on any device; meta is best.
        path: .safetensors file, sharded index or diffusers folder.
        compute: auto computes with activations in the dtype they come in, fp32, bf16 and fp16 in
            that dtype, in all four with the weights decoded as they are used; fp8 rounds the
            activations too, with the file's input scale or one a row, save where there are fewer
            than 32 rows.
        device: where to load; None is where the module's tensors lie, and the CPU for meta.
    Returns:
        The module, changed in place.
    Raises:
        InputError: keys are missing, unexpected or of another shape (the text lists them), or the
            path or an option cannot be used.
        FormatError: a file is damaged, or its FP8 weights are of a kind that cannot be read. In all
            these cases the module is as it was.
    """
    check_compute(compute)
    if isinstance(module, (nn.Linear, nn.Conv2d)):
        raise InputError(
            "the module is itself a layer, which cannot be replaced in place: load the module that "
            "holds it."
        )
    with Checkpoint.open(path) as checkpoint:
        filler = _Filler(module, checkpoint, _find_sources(module, checkpoint), compute, device)
        filler.check()
        filler.fill()
    tell_diffusers(module)
    return module


def tell_diffusers(module: nn.Module) -> None:
    """Let a model of diffusers know that it holds FP8 layers, if it is one and does."""
    # By name: diffusers is not imported for modules that are not its own.
    is_model = any(kind.__name__ == "ModelMixin" for kind in type(module).__mro__)
    if is_model and any(isinstance(part, (Linear, Conv2d)) for part in module.modules()):
        from hswq.loader.diffusers_quantizer import attach

        attach(module)


def _expected(module: nn.Module) -> dict[str, tuple[int, ...]]:
    """Return the names that a 16-bit file of this module holds, with their shapes."""
    extra = {
        f"{name}.{buffer}" if name else buffer
        for name, part in module.named_modules()
        if isinstance(part, (Linear, Conv2d))
        for buffer in ("scale", "input_scale")
    }
    state = module.state_dict()
    return {name: tuple(value.shape) for name, value in state.items() if name not in extra}


def _find_sources(module: nn.Module, checkpoint: Checkpoint) -> Sources:
    """Return which rows of which tensors of the file fill each tensor of the module."""
    expected = _expected(module)
    if not expected:
        raise InputError(f"{type(module).__name__} has no parameters to load.")
    extra = container_keys(checkpoint)
    found = {
        key: info.shape
        for key, info in checkpoint.tensors.items()
        if key not in extra and info.numel
    }
    prefix = _prefix(expected, found)
    has_all = all(prefix + name in found for name in expected)
    if not has_all and _family(module) is not None and _is_single_file(checkpoint):
        # The names are not the module's own but those of single-file checkpoints.
        from hswq.models.trace import trace_map

        return trace_map(checkpoint, detect(checkpoint), denoiser=module).sources
    ours = {key.removeprefix(prefix) for key in found if key.startswith(prefix)}
    problems = [
        *_listed("missing", (prefix + name for name in expected if name not in ours)),
        *_listed("unexpected", (prefix + name for name in ours if name not in expected)),
        *_listed(
            "of another shape",
            (
                f"{prefix}{name} {list(found[prefix + name])}, needed {list(shape)}"
                for name, shape in expected.items()
                if name in ours and found[prefix + name] != shape
            ),
        ),
    ]
    if problems:
        raise InputError(
            f"{checkpoint.path} does not fit {type(module).__name__}: {'; '.join(problems)}. Give "
            "the file of this model, or build the module from the file's own configuration."
        )
    return {
        name: (Source(prefix + name, 0, shape[0] if shape else 1),)
        for name, shape in expected.items()
    }


def _family(module: nn.Module) -> Family | None:
    """Return the family whose denoiser a module is, if hswq knows it."""
    # By name: diffusers is not imported for modules that are not its own.
    classes = {kind.__name__ for kind in type(module).__mro__}
    return next((it for it in FAMILIES.values() if it.class_name in classes), None)


def _is_single_file(checkpoint: Checkpoint) -> bool:
    """Tell whether a file of a known family has the names of single-file checkpoints."""
    try:
        return detect(checkpoint).layout == "ldm"
    except InputError:
        return False


def _prefix(expected: Iterable[str], found: Iterable[str]) -> str:
    """Return what the file puts before the module's names: the prefix that fits most of them."""
    names = set(expected)
    last = {name.rpartition(".")[2] for name in names}
    candidates = {""}
    first = max(names, key=len)
    for key in found:
        if key.rpartition(".")[2] in last and key.endswith(f".{first}"):
            candidates.add(key.removesuffix(first))
    keys = set(found)
    return max(sorted(candidates), key=lambda prefix: sum(prefix + name in keys for name in names))


def _listed(what: str, names: Iterable[str]) -> list[str]:
    found = sorted(names)
    if not found:
        return []
    more = f" and {len(found) - _SHOWN} more" if len(found) > _SHOWN else ""
    return [f"{len(found)} {what}: {', '.join(found[:_SHOWN])}{more}"]


class _Filler:
    """Fills a module from an open file whose names were found to fit."""

    def __init__(
        self,
        module: nn.Module,
        checkpoint: Checkpoint,
        sources: Sources,
        compute: str,
        device: torch.device | str | None,
    ) -> None:
        self._module = module
        self._checkpoint = checkpoint
        self._sources = sources
        self._compute = compute
        self._device = device
        self._weights = quantized_weights(checkpoint)
        family = _family(module)
        self._never_fp8 = frozenset() if family is None else family.dtype_modules

    def check(self) -> None:
        """Refuse what `fill` cannot do, before anything of the module is changed.

        Raises:
            FormatError: the file's FP8 weights are of another kind, or only parts of a layer's, or
                a scale cannot be used.
            InputError: the module has FP8 layers where the file has none.
        """
        where = self._checkpoint.path
        infos = (
            self._checkpoint.tensors[part.key] for parts in self._sources.values() for part in parts
        )
        foreign = _listed(
            "tensors",
            (
                f"{info.name} {info.dtype}"
                for info in infos
                if (self._is_fp8(info.name) or info.dtype.startswith("F8_"))
                and info.dtype != "F8_E4M3"
            ),
        )
        if foreign:
            raise FormatError(
                f"{where} holds quantized weights that are not FP8 E4M3: {foreign[0]}. Use the "
                "tool that wrote it."
            )
        for name, path, layer in self._layers():
            fp8 = [self._is_fp8(part.key) for part in self._sources[name]]
            if any(fp8) and not all(fp8):
                raise FormatError(
                    f"only parts of the weight of layer {path!r} are FP8 in {where}: quantize the "
                    "checkpoint again."
                )
            for part in self._sources[name] if all(fp8) else ():
                base = part.key.removesuffix(".weight")
                read_scale(self._checkpoint, base)
                read_input_scale(self._checkpoint, base)
            if not any(fp8) and isinstance(layer, (Linear, Conv2d)):
                raise InputError(
                    f"layer {path!r} of the module is FP8 already, and {where} keeps it in 16 or "
                    "32 bit: build the module anew."
                )

    def fill(self) -> None:
        """Load every tensor."""
        filled = set()
        for name, path, layer in self._layers():
            if all(self._is_fp8(part.key) for part in self._sources[name]):
                filled |= {name, f"{path}.bias"}
                self._fill_layer(name, path, layer)
        for name in self._sources:
            if name not in filled:
                path, _, leaf = name.rpartition(".")
                self._set(self._module.get_submodule(path), leaf, self._read(name))

    def _layers(self) -> list[tuple[str, str, nn.Linear | nn.Conv2d]]:
        """Return each Linear and Conv2d: name of its weight, its path, itself."""
        return [
            (f"{path}.weight", path, part)
            for path, part in self._module.named_modules()
            if isinstance(part, (nn.Linear, nn.Conv2d))
            and f"{path}.weight" in self._sources
            and path not in self._never_fp8
        ]

    def _is_fp8(self, key: str) -> bool:
        return key.endswith(".weight") and key.removesuffix(".weight") in self._weights

    def _fill_layer(self, name: str, path: str, layer: nn.Linear | nn.Conv2d) -> None:
        place = self._place(layer.weight)
        codes, scale = self._read_codes(name)
        bias = None if layer.bias is None else self._read(f"{path}.bias").to(place)
        input_scale = self._read_input_scale(name)
        if input_scale is not None:
            input_scale = input_scale.to(place)
        new = fp8_layer(layer, codes.to(place), scale.to(place), bias, input_scale, self._compute)
        self._module.set_submodule(path, new)

    def _read_input_scale(self, name: str) -> Tensor | None:
        """Return the input scale that all parts of a weight share, or None."""
        keys = {part.key.removesuffix(".weight") for part in self._sources[name]}
        found = [read_input_scale(self._checkpoint, key) for key in sorted(keys)]
        first = found[0]
        if first is None or any(other is None or bool(other != first) for other in found):
            return None
        return first

    def _read_codes(self, name: str) -> tuple[Tensor, Tensor]:
        """Return codes and scale of a weight; the scale of parts that differ is one a row."""
        parts = [
            read_weight(self._checkpoint, part.key.removesuffix(".weight"), part.start, part.stop)
            for part in self._sources[name]
        ]
        if len(parts) == 1:
            return parts[0]
        scales = [scale for _, scale in parts]
        codes = torch.cat([codes for codes, _ in parts])
        if all(scale.dim() == 0 and bool(scale == scales[0]) for scale in scales):
            return codes, scales[0]
        return codes, torch.cat([scale.expand(len(codes)) for codes, scale in parts])

    def _read(self, name: str) -> Tensor:
        """Return a tensor that stays in 16 or 32 bit; FP8 values become those of its own dtype."""
        tensors = []
        for part in self._sources[name]:
            info = self._checkpoint.tensors[part.key]
            base = part.key.removesuffix(".weight")
            rows = (part.start, part.stop) if info.shape else (None, None)
            if self._is_fp8(part.key):
                codes, scale = read_weight(self._checkpoint, base, *rows)
                shape = (-1, *[1] * (codes.dim() - 1)) if scale.dim() else ()
                values = decode(codes) * scale.reshape(shape)
            elif info.dtype == "F8_E4M3":
                values = decode(self._checkpoint.read(part.key, *rows).view(torch.uint8))
            else:
                tensors.append(self._checkpoint.read(part.key, *rows))
                continue
            tensors.append(values.to(self._float_dtype(name)))
        return tensors[0] if len(tensors) == 1 else torch.cat(tensors)

    def _float_dtype(self, name: str) -> torch.dtype:
        """Return the dtype for FP8 values: that of the bias in the file, else of the module."""
        path, _, leaf = name.rpartition(".")
        bias = self._sources.get(f"{path}.bias", ())
        found = [self._checkpoint.tensors[part.key].torch_dtype for part in bias]
        found.append(getattr(self._module.get_submodule(path), leaf).dtype)
        return next((dtype for dtype in found if dtype in _FLOATS), torch.float32)

    def _place(self, tensor: Tensor) -> torch.device:
        if self._device is not None:
            return torch.device(self._device)
        return torch.device("cpu") if tensor.is_meta else tensor.device

    def _set(self, owner: nn.Module, leaf: str, value: Tensor) -> None:
        value = value.to(self._place(getattr(owner, leaf)))
        if leaf in owner._buffers:
            owner._buffers[leaf] = value
        else:
            owner._parameters[leaf] = nn.Parameter(value, requires_grad=False)
