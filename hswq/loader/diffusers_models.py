"""diffusers' models, built from their configuration and filled from an FP8 file."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
from torch import nn

from hswq.errors import InputError
from hswq.formats.reader import Checkpoint
from hswq.loader.load import load_quantized
from hswq.models.denoiser import meta_denoiser
from hswq.models.folders import denoiser_config, refusing
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
    with Checkpoint.open(path) as checkpoint:
        config, _ = denoiser_config(checkpoint, None if pipeline is None else Path(pipeline))
    return _finish(meta_denoiser(_plain(config)), path, compute, device, dtype)


def load_transformer(
    path: PathLike,
    compute: str = "auto",
    *,
    device: torch.device | str = "cpu",
    dtype: torch.dtype | None = None,
) -> Any:
    """Build diffusers' transformer of an FP8 checkpoint and load it.

    Args:
        path: diffusers component or pipeline folder, or a file beside its config.json.
        compute: see `hswq.load_quantized`.
        device: where to load.
        dtype: of all that is not FP8; None keeps the file's.
    Returns:
        The class that config.json names, in eval mode, without gradients.
    Raises:
        InputError: there is no config.json of a diffusers transformer; and the errors of
            `hswq.load_quantized`.
    """
    with Checkpoint.open(path) as checkpoint:
        config = checkpoint.config or {}
    name = config.get("_class_name")
    if not isinstance(name, str) or not name.endswith("Transformer2DModel"):
        raise InputError(
            f"beside {path} lies no config.json of a diffusers transformer (its _class_name is "
            f"{name!r}): give a diffusers folder; UNets load with hswq.load_unet."
        )
    with quiet_libraries():
        import diffusers

        kind = getattr(diffusers, name, None)
        if kind is None:
            raise InputError(
                f"the installed diffusers {diffusers.__version__} has no {name}, which config.json "
                f"beside {path} names: install a newer one."
            )
        from accelerate import init_empty_weights

        damage = refusing(f"diffusers cannot build a {name} from config.json beside {path}", "")
        # Buffers that no file holds (tables of positions) are made, parameters are not.
        with damage, init_empty_weights(include_buffers=False):
            model = kind.from_config(_plain(config))
    return _finish(model, path, compute, device, dtype)


def _plain(config: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in config.items() if key != "quantization_config"}


def _finish(
    model: nn.Module,
    path: PathLike,
    compute: str,
    device: torch.device | str,
    dtype: torch.dtype | None,
) -> nn.Module:
    load_quantized(model, path, compute, device=device)
    with quiet_libraries():
        model.to(device=device, dtype=dtype) if dtype is not None else model.to(device=device)
    return model.eval()
