"""The quantization method "hswq" of diffusers: FP8 models by `from_pretrained`, and saved.

This module imports diffusers; nothing but `register_diffusers` and the loading of its models does.
"""

from __future__ import annotations

from collections.abc import Mapping
from enum import Enum
from typing import Any

import torch
from diffusers.quantizers import auto
from diffusers.quantizers.base import DiffusersQuantizer
from diffusers.quantizers.quantization_config import QuantizationConfigMixin
from torch import Tensor, nn

from hswq.errors import InputError
from hswq.loader.modules import Conv2d, Linear, check_compute, fp8_layer

_BUFFERS = ("weight", "scale", "input_scale")


class _Method(str, Enum):
    """diffusers reads the method's name from an enum of its own, which cannot be extended."""

    HSWQ = "hswq"


class HswqConfig(QuantizationConfigMixin):  # type: ignore[misc]
    """What config.json says of an FP8 model under 'quantization_config'.

    Args:
        modules_to_not_convert: names of the Linear and Conv2d modules that are not FP8.
        static_inputs: names of those FP8 modules that have an input scale.
        compute: see `hswq.load_quantized`.
    """

    def __init__(
        self,
        modules_to_not_convert: list[str] | None = None,
        static_inputs: list[str] | None = None,
        compute: str = "auto",
        **_: Any,
    ) -> None:
        check_compute(compute)
        self.quant_method = _Method.HSWQ
        self.modules_to_not_convert = list(modules_to_not_convert or [])
        self.static_inputs = list(static_inputs or [])
        self.compute = compute

    def to_diff_dict(self) -> dict[str, Any]:
        """Return what differs from the defaults: all of it is written, and shown by repr."""
        return dict(self.to_dict())


def _split(name: str) -> tuple[str, str]:
    path, _, leaf = name.rpartition(".")
    return path, leaf


class HswqQuantizer(DiffusersQuantizer):  # type: ignore[misc]
    """Builds the FP8 modules of a model that diffusers loads."""

    requires_calibration = True
    use_keep_in_fp32_modules = True
    is_serializable = True
    is_trainable = False
    is_compileable = True

    def check_if_quantized_param(
        self, model: nn.Module, param_value: Tensor, param_name: str, *_: Any, **__: Any
    ) -> bool:
        """Tell whether a tensor of the file is codes or scale of an FP8 module."""
        path, leaf = _split(param_name)
        return leaf in _BUFFERS and isinstance(model.get_submodule(path), (Linear, Conv2d))

    def create_quantized_param(
        self,
        model: nn.Module,
        param_value: Tensor,
        param_name: str,
        target_device: Any,
        state_dict: Mapping[str, Tensor] | None = None,
        *_: Any,
        **__: Any,
    ) -> None:
        """Put codes or a scale in place, in the file's dtype."""
        path, leaf = _split(param_name)
        # The value handed in was cast to the model's dtype, which costs a scale its last bits.
        exact = param_value if state_dict is None else state_dict[param_name]
        value = exact if leaf == "weight" else exact.to(torch.float32)
        model.get_submodule(path)._buffers[leaf] = value.to(target_device)

    def _process_model_before_weight_loading(self, model: nn.Module, **_: Any) -> None:
        config = self.quantization_config
        kept = set(config.modules_to_not_convert)
        for name, part in list(model.named_modules()):
            if name in kept or not isinstance(part, (nn.Linear, nn.Conv2d)):
                continue
            codes = torch.empty(part.weight.shape, dtype=torch.uint8, device="meta")
            scale = torch.empty(1, dtype=torch.float32, device="meta")
            input_scale = scale.reshape(()) if name in config.static_inputs else None
            layer = fp8_layer(part, codes, scale, part.bias, input_scale, config.compute)
            model.set_submodule(name, layer)
        model.register_to_config(quantization_config=config)  # type: ignore[operator]

    def _process_model_after_weight_loading(self, model: nn.Module, **_: Any) -> None:
        # diffusers forbids .to(dtype) to models that are, and these modules stay right under it.
        model.is_quantized = False  # type: ignore[assignment]

    def _dequantize(self, model: nn.Module) -> nn.Module:
        for name, part in list(model.named_modules()):
            if isinstance(part, (Linear, Conv2d)):
                model.set_submodule(name, part.to_float())
        return model


def register() -> None:
    """Make the method known to diffusers' tables; again is harmless."""
    auto.AUTO_QUANTIZER_MAPPING["hswq"] = HswqQuantizer
    auto.AUTO_QUANTIZATION_CONFIG_MAPPING["hswq"] = HswqConfig


def attach(model: nn.Module) -> None:
    """Tell a diffusers model with FP8 modules what it is, so that `save_pretrained` keeps them.

    Raises:
        InputError: its FP8 modules compute in different ways, which config.json cannot say.
    """
    register()
    layers = {
        name: part
        for name, part in model.named_modules()
        if isinstance(part, (nn.Linear, nn.Conv2d))
    }
    fp8 = {name: part for name, part in layers.items() if isinstance(part, (Linear, Conv2d))}
    computes = {part.compute for part in fp8.values()}
    if len(computes) > 1:
        raise InputError(f"the FP8 layers compute in several ways: {', '.join(sorted(computes))}.")
    config = HswqConfig(
        modules_to_not_convert=[name for name in layers if name not in fp8],
        static_inputs=[name for name, part in fp8.items() if part.input_scale is not None],
        compute=next(iter(computes), "auto"),
    )
    model.register_to_config(quantization_config=config)  # type: ignore[operator]
    model.hf_quantizer = HswqQuantizer(config, pre_quantized=True)
