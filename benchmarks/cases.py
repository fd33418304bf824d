"""SDXL's layers, and memory to cut tensors of their shapes from."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Sequence
from functools import cache
from typing import NamedTuple

import torch
from diffusers import UNet2DConditionModel
from torch import Tensor, nn

from hswq.models.folders import SHIPPED

LAYERS = 794
WEIGHTS = 2_565_880_320
DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}
# Several times the last cache of the machines at hand, and twice SDXL's largest weight.
POOL_NUMEL = 1 << 27
_NOISE_NUMEL = 1 << 22


class Layer(NamedTuple):
    """One Linear or Conv2d of SDXL's UNet."""

    name: str
    kind: str
    shape: tuple[int, ...]

    @property
    def numel(self) -> int:
        """Number of weights."""
        return math.prod(self.shape)


def sdxl_unet() -> nn.Module:
    """Return SDXL's UNet without memory for its weights."""
    config = json.loads((SHIPPED / "unet" / "config.json").read_text(encoding="utf-8"))
    with torch.device("meta"):
        return UNet2DConditionModel.from_config(config).requires_grad_(False).eval()


@cache
def sdxl_layers() -> tuple[Layer, ...]:
    """Return the 794 Linear and Conv2d layers in the order of the modules.

    Raises:
        RuntimeError: the UNet of this diffusers is not SDXL's.
    """
    layers = tuple(
        Layer(name, "linear" if isinstance(module, nn.Linear) else "conv2d", module.weight.shape)
        for name, module in sdxl_unet().named_modules()
        if isinstance(module, nn.Linear | nn.Conv2d)
    )
    found = len(layers), sum(layer.numel for layer in layers)
    if found != (LAYERS, WEIGHTS):
        raise RuntimeError(f"SDXL has {LAYERS} layers and {WEIGHTS} weights, not {found}")
    return layers


def linear_shapes() -> dict[tuple[int, int], int]:
    """Return shape [O, I] and number of the Linear layers that see a row for each position.

    Those of the time and size embeddings see one row an image.
    """
    shapes = Counter(
        layer.shape
        for layer in sdxl_layers()
        if layer.kind == "linear" and ".attentions." in layer.name
    )
    return dict(sorted(shapes.items()))


def noise(dtype: torch.dtype, seed: int, deviation: float = 0.02) -> Tensor:
    """Return normal numbers for a Pool; 0.02 is about the deviation of SDXL's weights."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(_NOISE_NUMEL, generator=generator).mul_(deviation).to(dtype)


class Pool:
    """Numbers to cut tensors from, each from memory that no cache holds any more.

    A checkpoint fits no cache, so a weight that is timed again and again must not lie in one.

    Args:
        values: what the memory is filled with, over and over.
        numel: elements in the memory; tensors are taken round and round.
    """

    def __init__(self, values: Tensor, numel: int = POOL_NUMEL) -> None:
        self._values = values.repeat(-(-numel // values.numel()))[:numel]
        self._position = 0

    def take(self, shape: Sequence[int]) -> Tensor:
        """Return the next numbers as a contiguous tensor; it shares the pool's memory."""
        numel = math.prod(shape)
        if self._position + numel > len(self._values):
            self._position = 0
        start, self._position = self._position, self._position + numel
        return self._values[start : start + numel].view(*shape)
