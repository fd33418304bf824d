"""quantize_e4m3 and dequantize_e4m3 against torch's cast and against plain copies.

    python -m benchmarks.elementwise

Sides: `ours` is the public op, which allocates its result; `ours-into` the extension with memory
that is there already, so that page faults can be told from the kernel; `cast` is
`w.clamp(-a, a).to(torch.float8_e4m3fn)`, backwards `codes.to(dtype)`, both without a scale;
`clone` and `copy` copy the 16- or 32-bit tensor to fresh and to existing memory. `share_of_copy`
are bytes read and written in a second over those of a copy: a weight of n bytes counts n + 1 bytes
when it is quantized or dequantized, and 2 n when it is copied.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from benchmarks.cases import DTYPES, Pool
from benchmarks.record import record
from benchmarks.timing import Side, Times, add_run_options, interleave, rounded, start_run, summary
from benchmarks.timing import ratio as ratio_of
from hswq import kernels
from hswq.formats.e4m3 import E4M3_MAX
from hswq.kernels import _cpp

SHAPES = ((1280, 1280), (10240, 1280), (1280, 2560, 3, 3))
SCALINGS = ("none", "tensor", "row")
COPIES = {"ours": "clone", "ours-into": "copy"}


def scaling(kind: str, weight: Tensor) -> tuple[Tensor, Tensor]:
    """Return amax and scale, float32 [1] or one a row."""
    if kind == "none":
        return torch.tensor([E4M3_MAX]), torch.tensor([1.0])
    dims = tuple(range(weight.dim()))
    amax = weight.float().abs().amax(dims[1:] if kind == "row" else dims).reshape(-1)
    return amax, amax / E4M3_MAX


def extension_dtype(dtype: torch.dtype) -> Any:
    """Return the extension's name of a dtype."""
    return getattr(_cpp.DType, str(dtype).removeprefix("torch."))


def quantize_sides(take: Callable[[], Tensor], amax: Tensor, scale: Tensor) -> dict[str, Side]:
    """Return the sides of quantize_e4m3; `take` gives a weight."""
    weight = take()
    codes, same = torch.empty(weight.shape, dtype=torch.uint8), torch.empty_like(weight)
    rows, dtype = amax.numel(), extension_dtype(weight.dtype)
    # Numbers where there is one for all: what the driver passes.
    amaxes, scales = (value if rows > 1 else value.item() for value in (amax, scale))
    largest = amax.max().item()

    def into() -> None:
        w = take()
        _cpp.quantize_e4m3(
            dtype,
            w.data_ptr(),
            rows,
            w.numel() // rows,
            amax.data_ptr(),
            scale.data_ptr(),
            torch.get_num_threads(),
            codes.data_ptr(),
        )

    return {
        "ours": lambda: kernels.quantize_e4m3(take(), amaxes, scales, backend="cpp"),
        "ours-into": into,
        "cast": lambda: take().clamp(-largest, largest).to(torch.float8_e4m3fn),
        "clone": lambda: take().clone(),
        "copy": lambda: same.copy_(take()),
    }


def dequantize_sides(take: Callable[[], Tensor], amax: Tensor, scale: Tensor) -> dict[str, Side]:
    """Return the sides of dequantize_e4m3 to the dtype of the weights that `take` gives."""
    weight = take()
    same = torch.empty_like(weight)
    pool = Pool(torch.float32, seed=1, deviation=100.0)
    codes = kernels.quantize_e4m3(pool.take((pool.numel,)), E4M3_MAX, 1.0)
    del pool
    return {}


def main() -> None:
    """Time every op, dtype, size and scaling; record a row for each."""
