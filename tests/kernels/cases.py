"""Tensors that the tests of several ops share."""

from __future__ import annotations

from collections.abc import Callable

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


def wide(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Values of so many magnitudes that float64 sums of them depend on their order."""
    # The largest stay below float16's 65504.
    exponents = torch.randint(-30, 13, shape, generator=generator(1))
    return torch.ldexp(normal(*shape), exponents).to(dtype)


def all_patterns(dtype: torch.dtype) -> Tensor:
    """Every value of a 16-bit dtype: zeros, subnormals, Inf and all NaN included."""
    return torch.arange(-(1 << 15), 1 << 15, dtype=torch.int32).to(torch.int16).view(dtype)


def random_bits(count: int) -> Tensor:
    """Float32 values of random bits: every exponent is equally likely, Inf and NaN occur."""
    limits = torch.iinfo(torch.int32)
    bits = torch.randint(limits.min, limits.max + 1, (count,), generator=generator())
    return bits.to(torch.int32).view(torch.float32)


def to_numpy(tensor: Tensor) -> np.ndarray:
    """Float32 values of a 16- or 32-bit float tensor."""
    return tensor.detach().cpu().float().numpy()


def significand_unit(dtype: torch.dtype) -> float:
    """Largest relative error of rounding to a dtype."""
    return torch.finfo(dtype).eps / 2


def on_threads(function: Callable[[], Tensor]) -> list[tuple[float, ...]]:
    """Values that a function returns where torch has one thread, and where it has two."""
    before = torch.get_num_threads()
    try:
        results = []
        for threads in (1, 2):
            torch.set_num_threads(threads)
            results.append(tuple(function().tolist()))
        return results
    finally:
        torch.set_num_threads(before)
