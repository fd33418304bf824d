"""The denoiser as a torch module: built from its configuration, filled through the map."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from hswq.errors import InputError
from hswq.formats.reader import Checkpoint
from hswq.models.families import FAMILIES
from hswq.models.family import Detection
from hswq.models.folders import SHIPPED, read_json, refusing
from hswq.models.map import ModelMap, Source
from hswq.models.quiet import quiet_libraries


def denoiser_config(
    checkpoint: Checkpoint, pipeline_dir: Path | None, detection: Detection
) -> tuple[dict[str, Any], str]:
    """Return the denoiser's configuration, and in words where it comes from.

    That is the one of `pipeline_dir`; else the one beside a diffusers component; else what the
    shapes of the file's tensors say, or SDXL base's. For families whose shapes say it,
    `pipeline_dir` need not hold one.

    Raises:
        InputError: `pipeline_dir` was given and holds no configuration of the denoiser, or the
            file is a part of a model.
    """
    family = FAMILIES[detection.family]
    if pipeline_dir is not None and not pipeline_dir.is_dir():
        raise InputError(
            f"--pipeline '{pipeline_dir}' is no folder: give a diffusers pipeline folder."
        )
    if pipeline_dir is not None and family.config is not None:
        path = pipeline_dir / family.component / "config.json"
        pipeline_dir = pipeline_dir if path.is_file() else None
    if pipeline_dir is None:
        # Beside a single file may lie the configuration of anything.
        beside = checkpoint.config or {}
        if beside.get("_class_name") == family.class_name:
            return beside, f"beside '{checkpoint.files[0]}'"
        if family.config is not None and detection.layout == "ldm":
            shapes = {
                name.removeprefix(detection.prefix): info.shape
                for name, info in checkpoint.tensors.items()
                if name.startswith(detection.prefix)
            }
            try:
                return family.config(shapes), f"read off '{checkpoint.path}'"
            except (KeyError, IndexError, ValueError, ZeroDivisionError) as error:
                raise InputError(
                    f"'{checkpoint.path}' lacks a tensor that every {family.class_name} has, or "
                    f"has it in another shape ({error}): it is damaged, or a part of a model."
                ) from error
        if family.config is not None:
            raise InputError(
                f"beside '{checkpoint.files[0]}' lies no config.json of {family.class_name}: give "
                "a diffusers pipeline folder that has it, --pipeline DIR."
            )
    path = (SHIPPED if pipeline_dir is None else pipeline_dir) / family.component / "config.json"
    config = read_json(path)
    if config is None:
        raise InputError(
            f"--pipeline '{pipeline_dir}' holds no '{family.component}/config.json': "
            "give a diffusers pipeline folder (the one with model_index.json)."
        )
    return config, "of SDXL base" if pipeline_dir is None else f"'{path}'"


def meta_denoiser(config: dict[str, Any], class_name: str = "UNet2DConditionModel") -> Any:
    """Build the denoiser of a configuration without memory for its weights.

    Buffers that no file holds, tables of positions for example, are made.

    Args:
        config: the configuration, as config.json holds it.
        class_name: diffusers' class.
    Raises:
        InputError: diffusers has no such class, or cannot build it from the configuration.
    """
    with quiet_libraries():
        import diffusers
        from accelerate import init_empty_weights

        kind = getattr(diffusers, class_name, None)
        if kind is None:
            raise InputError(
                f"the installed diffusers {diffusers.__version__} has no {class_name}: install a "
                "newer one."
            )
        damage = refusing(
            f"diffusers cannot build a {class_name} from its configuration",
            "The config.json of such a model is needed.",
        )
        with damage, init_empty_weights(include_buffers=False):
            return kind.from_config(config)


def load_denoiser(
    checkpoint: Checkpoint,
    model_map: ModelMap,
    config: dict[str, Any],
    dtype: torch.dtype,
    device: torch.device,
    class_name: str = "UNet2DConditionModel",
) -> nn.Module:
    """Build the denoiser of a configuration and fill it from the checkpoint, tensor by tensor.

    Beside the module itself one checkpoint tensor is in memory at a time.

    Args:
        checkpoint: open checkpoint of 16- or 32-bit weights.
        model_map: the map traced for this checkpoint and configuration.
        config: the denoiser's configuration.
        dtype: floating point dtype of the module.
        device: where the module is to be.
        class_name: diffusers' class of the denoiser.
    Returns:
        The denoiser in eval mode, without gradients.
    Raises:
        InputError: diffusers cannot build the class from the configuration, or a tensor holds
            NaN or Inf.
        FormatError: the checkpoint's file is damaged.
    """
    denoiser: nn.Module = meta_denoiser(config, class_name)
    state = {
        name: _gather(checkpoint, sources).to(device=device, dtype=dtype)
        for name, sources in model_map.sources.items()
    }
    denoiser.load_state_dict(state, strict=True, assign=True)
    return denoiser.requires_grad_(False).eval()


def _gather(checkpoint: Checkpoint, sources: tuple[Source, ...]) -> Tensor:
    parts = [checkpoint.read(part.key, part.start, part.stop) for part in sources]
    for part, tensor in zip(sources, parts, strict=True):
        if not bool(torch.isfinite(tensor).all()):
            raise InputError(
                f"{part.key!r} in '{checkpoint.path}' holds NaN or Inf: the file is damaged, or "
                "its dtype overflowed: export it again."
            )
    return parts[0] if len(parts) == 1 else torch.cat(parts)
