"""Tiny random checkpoints of SDXL's topology, for everybody's tests.

The UNet has three levels of widths 16, 32 and 48 and 1.3 million weights; writing a file takes a
fraction of a second. Equal seeds give equal weights in every layout and prefix, so that what is
read from two of them can be compared. A tiny file fits no shipped configuration: give the folder of
`write_tiny_pipeline` as --pipeline.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import save_file

from benchmarks import make_checkpoint
from benchmarks.make_transformer import flux_shapes, qwen_image_shapes, z_image_shapes

__all__ = [
    "flux_shapes",
    "qwen_image_shapes",
    "write_header_only",
    "write_random",
    "write_tiny_pipeline",
    "write_tiny_sdxl",
    "z_image_shapes",
]

UNET_PREFIX = "model.diffusion_model."


def write_tiny_sdxl(
    path: Path,
    *,
    layout: str = "ldm",
    dtype: torch.dtype = torch.float16,
    seed: int = 0,
    unet_only: bool = False,
    prefix: str = UNET_PREFIX,
    v_pred: bool = False,
    zero_snr: bool = False,
) -> Path:
    """Write a tiny SDXL checkpoint and return its path.

    Args:
        path: the .safetensors file; with layout 'diffusers' the pipeline folder.
        layout: 'ldm' or 'diffusers'.
        dtype: float16, bfloat16 or float32.
        seed: of the weights.
        unet_only: leave out the weights of text encoders and VAE.
        prefix: of the UNet's keys in LDM layout; '' as in files of the UNet alone.
        v_pred: mark it as predicting v.
        zero_snr: mark its noise schedule as ending in pure noise.
    """
    common = {"width": "tiny", "dtype": dtype, "seed": seed, "v_pred": v_pred, "zero_snr": zero_snr}
    if layout == "ldm":
        make_checkpoint.write_single_file(path, unet_only=unet_only, prefix=prefix, **common)
    else:
        components = ("unet",) if unet_only else make_checkpoint.COMPONENTS
        make_checkpoint.write_folder(path, components=components, **common)
    return path


def write_tiny_pipeline(folder: Path, *, weights: bool = True, seed: int = 0) -> Path:
    """Write the diffusers pipeline folder that belongs to tiny checkpoints and return its path.

    It holds all configurations and tokenizers, and no UNet weights.

    Args:
        folder: made where it is missing.
        weights: whether text encoders and VAE come with theirs (float32, those of `seed`).
        seed: of the weights.
    """
    components = make_checkpoint.COMPONENTS[1:] if weights else ()
    make_checkpoint.write_folder(
        folder, width="tiny", dtype=torch.float32, seed=seed, components=components
    )
    return folder


def write_header_only(
    path: Path, shapes: Mapping[str, tuple[int, ...]], metadata: Mapping[str, str] | None = None
) -> Path:
    """Write a float16 safetensors file whose tensors are one hole: zeros that take no disk space.

    Args:
        path: the file.
        shapes: every tensor's.
        metadata: of the header; None: no such entry.
    """
    header: dict[str, object] = {"__metadata__": dict(metadata)} if metadata else {}
    position = 0
    for name, shape in shapes.items():
        end = position + 2 * math.prod(shape)
        header[name] = {"dtype": "F16", "shape": shape, "data_offsets": [position, end]}
        position = end
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + position)
    return path


def write_random(
    path: Path,
    shapes: Mapping[str, tuple[int, ...]],
    *,
    dtype: torch.dtype = torch.bfloat16,
    prefix: str = "",
    seed: int = 0,
) -> Path:
    """Write a file of normal numbers and return its path."""
    generator = torch.Generator().manual_seed(seed)
    tensors = {
        prefix + name: (torch.randn(shape, generator=generator) * 0.05).to(dtype)
        for name, shape in shapes.items()
    }
    save_file(tensors, path)
    return path
