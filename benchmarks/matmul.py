"""scaled_matmul and scaled_conv2d against torch's products of 16- and 32-bit weights.

    python -m benchmarks.matmul --dtype bf16

SDXL's linear shapes at 1,024 rows and some of its convolutions at 32 x 32 positions. Sides: `ours`
takes x in --dtype and E4M3 codes with one scale (compute auto); `16-bit` is F.linear or F.conv2d on
x and weight in --dtype, `fp32` the same in float32. `weight_bytes` is what each side keeps of the
weight, `extra_bytes` what one call adds to the resident memory at its peak, result included (Linux;
memory that a library keeps between calls is not seen). The row `all` is the sum over SDXL's linear
layers, each shape as often as it occurs.
"""

from __future__ import annotations

import argparse
import ctypes
import re
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from benchmarks.cases import linear_shapes
from benchmarks.record import record
from benchmarks.timing import (
    Side,
    Times,
    add_run_options,
    backend_of,
    interleave,
    start_run,
    summary,
)
from hswq import kernels
from hswq.formats.e4m3 import E4M3_MAX

ROWS = 1024
EDGE = 32
# Few: torch's 16-bit convolutions take seconds on CPUs without 16-bit units.
CONVOLUTIONS = ((320, 320, 3, 3), (640, 640, 3, 3), (640, 960, 1, 1))
RATIOS = (("16-bit", "ours"), ("fp32", "ours"))


def sides_of(x: Tensor, weight: Tensor) -> tuple[dict[str, Side], dict[str, int]]:
    """Return the sides of one product and the bytes that each keeps of the weight.

    Args:
        x: 16-bit, [rows, I] or [B, C, H, W].
        weight: float32 [O, I] or [O, C, kh, kw].
    """
    scale = weight.abs().max().item() / E4M3_MAX
    codes = kernels.quantize_e4m3(weight, scale * E4M3_MAX, scale)
    half, wide = weight.to(x.dtype), x.float()
    if weight.dim() == 2:
        ours: Side = partial(kernels.scaled_matmul, x, codes, scale)
        product: Any = functional.linear
    else:
        padding = weight.shape[-1] // 2
        ours = partial(kernels.scaled_conv2d, x, codes, scale, padding=padding)
        product = partial(functional.conv2d, padding=padding)
    sides = {
        "ours": ours,
        "16-bit": partial(product, x, half),
        "fp32": partial(product, wide, weight),
    }
    kept = {"ours": codes.nbytes, "16-bit": half.nbytes, "fp32": weight.nbytes}
    return sides, kept


def status_bytes(field: str) -> int:
    """Return a memory figure of this process from /proc."""
    found = re.search(rf"^{field}:\s+(\d+) kB", Path("/proc/self/status").read_text(), re.M)
    if found is None:
        raise RuntimeError(f"/proc/self/status has no {field}")
    return int(found[1]) * 1024


def extra_bytes(side: Side) -> int | None:
    """Return by how much one call raises the resident memory; None where /proc does not tell."""
    reset = Path("/proc/self/clear_refs")
    if not reset.exists():
        return None
    # Memory that was freed and not given back would take the call's part unseen.
    ctypes.CDLL(None).malloc_trim(0)
    reset.write_text("5")
    before = status_bytes("VmRSS")
    side()
    return max(0, status_bytes("VmHWM") - before)


def main() -> None:
    """Time every shape, record a row for each and one for all linear layers."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--dtype", choices=("fp16", "bf16"), default="bf16")
    parser.add_argument("--rows", type=int, default=ROWS)
    parser.add_argument("--no-conv", action="store_true")
    add_run_options(parser, rounds=7)
    options = parser.parse_args()
    run = start_run(options.threads)
    dtype = {"fp16": torch.float16, "bf16": torch.bfloat16}[options.dtype]
    generator = torch.Generator().manual_seed(options.seed)
    counts = linear_shapes()
    convolutions = () if options.no_conv else CONVOLUTIONS
    total: Times = {}
    for shape in (*counts, *convolutions):
        linear = len(shape) == 2
        op = "scaled_matmul" if linear else "scaled_conv2d"
        x_shape = (options.rows, shape[1]) if linear else (1, shape[1], EDGE, EDGE)
        x = torch.randn(x_shape, generator=generator).to(dtype)
        weight = torch.randn(shape, generator=generator).mul_(0.02)
        sides, weight_bytes = sides_of(x, weight)
        times = interleave(sides, options.rounds)
        fields = {"dtype": options.dtype, "backend": backend_of(op), **run}
        record(
            {
                "op": op,
                "case": "x".join(str(size) for size in shape),
                "rows": options.rows if linear else EDGE * EDGE,
                **fields,
                **summary(times, RATIOS),
                "weight_bytes": weight_bytes,
                "extra_bytes": {name: extra_bytes(side) for name, side in sides.items()},
            }
        )
        if linear:
            for name, seconds in times.items():
                weighted = [counts[shape] * value for value in seconds]
                known = total.get(name, [0.0] * options.rounds)
                total[name] = [sum(pair) for pair in zip(known, weighted, strict=True)]
    record(
        {
            "op": "scaled_matmul",
            "case": "all",
            "layers": sum(counts.values()),
            "rows": options.rows,
            **{"dtype": options.dtype, "backend": backend_of("scaled_matmul"), **run},
            **summary(total, RATIOS),
        }
    )


if __name__ == "__main__":
    main()
