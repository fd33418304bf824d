"""Load a V1 file's UNet through stock diffusers and compare every weight with the source's.

    python -m benchmarks.load_with_diffusers --source unet.safetensors --quantized v1.safetensors

Weights of FP8 layers must be the plain saturating cast of the source's, all others the same.
The configuration is the one that hswq ships; give --config for other sizes.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from diffusers import UNet2DConditionModel

from hswq.formats.quantized import quantized_weights
from hswq.formats.reader import Checkpoint
from hswq.models.folders import SHIPPED


def load(path: Path, config: Path) -> dict[str, torch.Tensor]:
    """Return the state dict of the UNet in float16, as diffusers reads it."""
    unet = UNet2DConditionModel.from_single_file(
        str(path), config=str(config), local_files_only=True, torch_dtype=torch.float16
    )
    return unet.state_dict()


def main() -> None:
    """Load both files, compare, print the counts."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--source", type=Path, required=True)
    parser.add_argument("--quantized", type=Path, required=True)
    parser.add_argument("--config", type=Path, default=SHIPPED / "unet")
    arguments = parser.parse_args()
    source = load(arguments.source, arguments.config)
    quantized = load(arguments.quantized, arguments.config)
    if source.keys() != quantized.keys():
        raise SystemExit(f"keys differ: {sorted(source.keys() ^ quantized.keys())[:10]}")
    changed = 0
    for name, weight in source.items():
        if torch.equal(quantized[name], weight):
            continue
        changed += 1
        cast = weight.float().clamp(-448, 448).to(torch.float8_e4m3fn).half()
        if not torch.equal(quantized[name], cast):
            raise SystemExit(f"{name} is neither the source's weight nor its FP8 cast")
    with Checkpoint.open(arguments.quantized) as checkpoint:
        layers = len(quantized_weights(checkpoint))
    if changed != layers:
        raise SystemExit(f"{changed} weights changed, {layers} layers are FP8")
    print(f"{len(source)} tensors: {changed} are the FP8 cast, the others unchanged")


if __name__ == "__main__":
    main()
