"""diffusers' models, built from their configuration and filled from an FP8 file."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch

from hswq.errors import InputError
from hswq.formats.reader import Checkpoint
from hswq.loader.load import load_quantized
from hswq.models.defaults import plain_defaults
from hswq.models.denoiser import denoiser_config, meta_denoiser
from hswq.models.detect import detect
from hswq.models.families import FAMILIES
from hswq.models.quiet import quiet_libraries

PathLike = str | os.PathLike[str]


def register_diffusers() -> None:
    """Teach diffusers the quantization method of hswq.

    After it, `from_pretrained` of a folder that `save_pretrained` wrote of an FP8 model loads it as
    one; `load_unet`, `load_transformer` and `load_quantized` of a diffusers model call it too.
    """
    from hswq.loader import diffusers_quantizer

    diffusers_quantizer.register()


def load_unet(
    path: PathLike,
    compute: str = "auto",
    *,
    device: torch.device | str = "cpu",
    dtype: torch.dtype | None = None,
    pipeline: PathLike | None = None,
) -> Any:
    """Build diffusers' UNet of an FP8 checkpoint and load it: `pipe.unet = hswq.load_unet(path)`.

    Args:
        path: file of any container, in the layout of single-file checkpoints or of diffusers, or a
            diffusers folder.
        compute: see `hswq.load_quantized`.
        device: where to load.
        dtype: of all that is not FP8; None keeps the file's.
        pipeline: diffusers folder whose unet/config.json describes the UNet; None: the
            configuration beside a diffusers component, else SDXL base's.
    Returns:
        UNet2DConditionModel in eval mode, without gradients.
    Raises:
        The errors of `hswq.load_quantized`.
    """
    return _load(path, "unet", compute, device, dtype, pipeline)


def load_transformer(
    path: PathLike,
    compute: str = "auto",
    *,
    device: torch.device | str = "cpu",
    dtype: torch.dtype | None = None,
    pipeline: PathLike | None = None,
) -> Any:
    """Build diffusers' transformer of an FP8 checkpoint and load it.

    Args:
        path: Flux.1 or Z-Image file of any container, in the layout of single-file checkpoints; or
            the diffusers component or pipeline folder of any transformer.
        compute: see `hswq.load_quantized`.
        device: where to load.
        dtype: of all that is not FP8; None keeps the file's.
        pipeline: diffusers folder whose transformer/config.json describes the transformer; None:
            the configuration beside a diffusers component, else what the file's shapes say.
    Returns:
        diffusers' class, in eval mode, without gradients.
    Raises:
        The errors of `hswq.load_quantized`.
    """
    return _load(path, "transformer", compute, device, dtype, pipeline)


@plain_defaults()
def _load(
    path: PathLike,
    component: str,
    compute: str,
    device: torch.device | str,
    dtype: torch.dtype | None,
    pipeline: PathLike | None,
) -> Any:
    with Checkpoint.open(path) as checkpoint:
        beside = checkpoint.config or {}
        name = beside.get("_class_name")
        if component == "transformer" and pipeline is None and _is_transformer(name):
            config, class_name = beside, str(name)
        else:
            detection = detect(checkpoint)
            family = FAMILIES[detection.family]
            if family.component != component:
                raise InputError(
                    f"the denoiser of {path} ({family.name}) is a {family.title}: load it with "
                    f"hswq.load_{family.component}."
                )
            folder = None if pipeline is None else Path(pipeline)
            config, _ = denoiser_config(checkpoint, folder, detection)
            class_name = family.class_name
    model = meta_denoiser(_plain(config), class_name)
    load_quantized(model, path, compute, device=device)
    with quiet_libraries():
        model.to(device=device, dtype=dtype) if dtype is not None else model.to(device=device)
    return model.eval()


def _is_transformer(name: object) -> bool:
    return isinstance(name, str) and "Transformer" in name and name.endswith("Model")


def _plain(config: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in config.items() if key != "quantization_config"}
