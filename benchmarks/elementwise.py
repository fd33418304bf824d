"""quantize_e4m3 and dequantize_e4m3 against torch's casts and against plain copies.

    python -m benchmarks.elementwise

Sides: `ours` is the public op, which allocates its result; `ours-into` the extension with memory
that is there already, so that page faults can be told from the kernel; `cast` is
`w.clamp(-a, a).to(torch.float8_e4m3fn)`, backwards `codes.to(dtype)`, both without a scale;
`clone` and `copy` copy the 16- or 32-bit tensor to fresh memory and to memory that is there.
`share_of_copy` are bytes read and written in a second over those of the copy: a weight of n bytes
counts n + 1 bytes when it is quantized or dequantized, and 2 n when it is copied. Inputs lie in no
cache.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from benchmarks.cases import DTYPES, Pool, noise
from benchmarks.record import record
from benchmarks.timing import Side, add_run_options, interleave, ratio, rounded, start_run, summary
from hswq import kernels
from hswq.formats.e4m3 import E4M3_MAX
from hswq.kernels import _cpp

SHAPES = ((1280, 1280), (10240, 1280), (1280, 2560, 3, 3))
SCALINGS = ("none", "tensor", "row")
Numbers = float | Tensor


def scaling_of(kind: str, weight: Tensor) -> tuple[Numbers, Numbers]:
    """Return amax and scale as the public ops take them: numbers, or float32, one a row."""
    if kind == "none":
        return E4M3_MAX, 1.0
    rows = weight.float().abs().flatten(1).amax(1)
    amax = rows if kind == "row" else rows.max().item()
    return amax, amax / E4M3_MAX


def one_or_rows(value: Numbers) -> Tensor:
    """Return what the extension reads: float32 [1] or one a row."""
    return value if isinstance(value, Tensor) else torch.tensor([value])


def extension_dtype(dtype: torch.dtype) -> Any:
    """Return the extension's name of a dtype."""
    return getattr(_cpp.DType, str(dtype).removeprefix("torch."))


def quantize_sides(take: Callable[[], Tensor], kind: str) -> dict[str, Side]:
    """Return the sides of quantize_e4m3; `take` gives a weight."""
    weight = take()
    amax, scale = scaling_of(kind, weight)
    amaxes, scales = one_or_rows(amax), one_or_rows(scale)
    largest = amaxes.max().item()
    codes, same = torch.empty(weight.shape, dtype=torch.uint8), torch.empty_like(weight)
    rows, dtype = amaxes.numel(), extension_dtype(weight.dtype)

    def into() -> None:
        _cpp.quantize_e4m3(
            dtype,
            take().data_ptr(),
            rows,
            codes.numel() // rows,
            amaxes.data_ptr(),
            scales.data_ptr(),
            torch.get_num_threads(),
            codes.data_ptr(),
        )

    return {
        "ours": lambda: kernels.quantize_e4m3(take(), amax, scale, backend="cpp"),
        "ours-into": into,
        "cast": lambda: take().clamp(-largest, largest).to(torch.float8_e4m3fn),
        "clone": lambda: take().clone(),
        "copy": lambda: same.copy_(take()),
    }


def dequantize_sides(
    take: Callable[[], Tensor], take_codes: Callable[[], Tensor], kind: str
) -> dict[str, Side]:
    """Return the sides of dequantize_e4m3 to the dtype of the weights that `take` gives."""
    weight = take()
    _, scale = scaling_of(kind, weight)
    scales = one_or_rows(scale)
    same = torch.empty_like(weight)
    rows, dtype = scales.numel(), extension_dtype(weight.dtype)

    def into() -> None:
        _cpp.dequantize_e4m3(
            take_codes().data_ptr(),
            rows,
            same.numel() // rows,
            scales.data_ptr(),
            dtype,
            torch.get_num_threads(),
            same.data_ptr(),
        )

    return {
        "ours": lambda: kernels.dequantize_e4m3(take_codes(), scale, weight.dtype, backend="cpp"),
        "ours-into": into,
        "cast": lambda: take_codes().view(torch.float8_e4m3fn).to(weight.dtype),
        "clone": lambda: take().clone(),
        "copy": lambda: same.copy_(take()),
    }


def main() -> None:
    """Time every dtype, size, scaling and op; record a row for each."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--dtypes", nargs="+", choices=tuple(DTYPES), default=list(DTYPES))
    parser.add_argument("--scalings", nargs="+", choices=SCALINGS, default=list(SCALINGS))
    add_run_options(parser, rounds=15)
    options = parser.parse_args()
    run = start_run(options.threads)
    codes = Pool(kernels.quantize_e4m3(noise(torch.float32, options.seed, 100.0), E4M3_MAX, 1.0))
    for name in options.dtypes:
        dtype = DTYPES[name]
        weights = Pool(noise(dtype, options.seed))
        for shape in SHAPES:
            for kind in options.scalings:

                def take(shape: tuple[int, ...] = shape, pool: Pool = weights) -> Tensor:
                    return pool.take(shape)

                def take_codes(shape: tuple[int, ...] = shape) -> Tensor:
                    return codes.take(shape)

                for op, sides in (
                    ("quantize_e4m3", quantize_sides(take, kind)),
                    ("dequantize_e4m3", dequantize_sides(take, take_codes, kind)),
                ):
                    times = interleave(sides, options.rounds)
                    ratios = [("cast", "ours"), ("cast", "ours-into")]
                    bytes_over_copy = (dtype.itemsize + 1) / (2 * dtype.itemsize)
                    record(
                        {
                            "op": op,
                            "case": "x".join(str(size) for size in shape),
                            "scale": kind,
                            "weights": math.prod(shape),
                            "dtype": name,
                            "backend": "cpp",
                            **run,
                            **summary(times, ratios),
                            "share_of_copy": {
                                f"{ours}/{copy}": rounded(
                                    bytes_over_copy * ratio(times, copy, ours)
                                )
                                for ours, copy in (("ours", "clone"), ("ours-into", "copy"))
                            },
                        }
                    )


if __name__ == "__main__":
    main()
