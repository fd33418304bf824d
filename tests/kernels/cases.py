"""Tensors that the tests of several ops share."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

DTYPES = (torch.float16, torch.bfloat16, torch.float32)
SIXTEEN_BIT = (torch.float16, torch.bfloat16)
FLOAT32_MAX = torch.finfo(torch.float32).max


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def normal(
    *shape: int, sigma: float = 1.0, dtype: torch.dtype = torch.float32, seed: int = 0
) -> Tensor:
    return (torch.randn(shape, generator=generator(seed)) * sigma).to(dtype)


def all_patterns(dtype: torch.dtype) -> Tensor:
    """Every value of a 16-bit dtype: zeros, subnormals, Inf and all NaN included."""
    return torch.arange(-(1 << 15), 1 << 15, dtype=torch.int32).to(torch.int16).view(dtype)


def to_numpy(tensor: Tensor) -> np.ndarray:
    """Float32 values of a 16- or 32-bit float tensor."""
    return tensor.detach().cpu().float().numpy()


def significand_unit(dtype: torch.dtype) -> float:
    """Largest relative error of rounding to a dtype."""
    return torch.finfo(dtype).eps / 2
