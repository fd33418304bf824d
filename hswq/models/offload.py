"""Modules whose weights stay in main memory and visit the GPU layer by layer, by accelerate.

accelerate puts its hooks before and after every layer; between calls the layer's own parameters
hold nothing. What reads or changes weights must ask here.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


def offload_layers(module: nn.Module, device: torch.device) -> None:
    """Keep a module's weights in main memory, and compute on the device layer by layer."""
    from accelerate import cpu_offload

    cpu_offload(module, execution_device=device, offload_buffers=True)


def execution_device(module: nn.Module) -> torch.device:
    """Return where a module computes."""
    for part in module.modules():
        device = getattr(getattr(part, "_hf_hook", None), "execution_device", None)
        if device is not None:
            return torch.device(device)
    return next(module.parameters()).device


def parameter_of(layer: nn.Module, name: str) -> Tensor:
    """Return the values of a layer's own parameter, without gradient, wherever they are kept."""
    kept = _kept(layer)
    if kept is not None:
        values: Tensor = kept[name]
        return values
    return layer.get_parameter(name).detach()


def replace_parameter(layer: nn.Module, name: str, values: Tensor) -> Tensor:
    """Give a layer's own parameter other values, in its dtype and place; return those it had."""
    before = parameter_of(layer, name)
    kept = _kept(layer)
    if kept is not None:
        kept.dataset[kept.prefix + name] = values.to(before)
    else:
        layer.get_parameter(name).data = values.to(before)
    # A caller's autocast would go on with its copy of the values of before.
    torch.clear_autocast_cache()
    return before


def _kept(layer: nn.Module) -> Any:
    """Return accelerate's map of an offloaded layer's tensors; None where it is not offloaded."""
    hook = getattr(layer, "_hf_hook", None)
    return hook.weights_map if hook is not None and getattr(hook, "offload", False) else None
