"""The denoiser as a torch module: built from its configuration, filled through the map."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from hswq.errors import InputError
from hswq.formats.reader import Checkpoint
from hswq.models.folders import refusing
from hswq.models.map import ModelMap, Source
from hswq.models.quiet import quiet_libraries


def meta_denoiser(config: dict[str, Any]) -> Any:
    """Build the UNet2DConditionModel of a configuration without memory for its weights.

    Raises:
        InputError: diffusers cannot build a UNet from the configuration.
    """
    from diffusers import UNet2DConditionModel

    damage = refusing(
        "diffusers cannot build a UNet from its configuration",
        "The unet/config.json of an SDXL pipeline is needed.",
    )
    with damage, quiet_libraries(), torch.device("meta"):
        return UNet2DConditionModel.from_config(config)


def load_denoiser(
    checkpoint: Checkpoint,
    model_map: ModelMap,
    config: dict[str, Any],
    dtype: torch.dtype,
    device: torch.device,
) -> nn.Module:
    """Build the UNet of a configuration and fill it from the checkpoint, tensor by tensor.

    Beside the module itself one checkpoint tensor is in memory at a time.

    Args:
        checkpoint: open checkpoint of 16- or 32-bit weights.
        model_map: the map traced for this checkpoint and configuration.
        config: the UNet's configuration.
        dtype: floating point dtype of the module.
        device: where the module is to be.
    Returns:
        The UNet in eval mode, without gradients.
    Raises:
        InputError: diffusers cannot build a UNet from the configuration, or a tensor holds NaN
            or Inf.
        FormatError: the checkpoint's file is damaged.
    """
    unet: nn.Module = meta_denoiser(config)
    state = {
        name: _gather(checkpoint, sources).to(device=device, dtype=dtype)
        for name, sources in model_map.sources.items()
    }
    unet.load_state_dict(state, strict=True, assign=True)
    return unet.requires_grad_(False).eval()


def _gather(checkpoint: Checkpoint, sources: tuple[Source, ...]) -> Tensor:
    parts = [checkpoint.read(part.key, part.start, part.stop) for part in sources]
    for part, tensor in zip(sources, parts, strict=True):
        if not bool(torch.isfinite(tensor).all()):
            raise InputError(
                f"{part.key!r} in '{checkpoint.path}' holds NaN or Inf: the file is damaged, or "
                "its dtype overflowed: export it again."
            )
    return parts[0] if len(parts) == 1 else torch.cat(parts)
