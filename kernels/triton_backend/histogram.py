"""Triton kernels of weighted_histogram: integer sums of importances, by magnitude or by bin.

A 16-bit weight has one of 2**15 magnitudes. One pass over the weights sums the importance of each,
which needs no maximum first and loses nothing; the few sums are then put into bins. Float32 weights
take two passes, the first for the maximum. Importances are integers (fixed point), so that atomic
additions give the same sums in any order.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from hswq.kernels.triton_backend._configs import (
    ELEMENTWISE,
    FINISH_HISTOGRAM,
    TABLE_KINDS,
    WEIGHTS_ALIKE,
    WEIGHTS_WITH_IMPORTANCE,
    Config,
    Kernel,
    elementwise_config,
    histogram_copies,
)
from hswq.kernels.triton_backend._floats import widen
from hswq.kernels.triton_backend._launch import launch
from hswq.kernels.triton_backend._tiles import tile, tile_programs

MAGNITUDES = 1 << 15
_KINDS = {torch.float32: "bins", torch.float16: "fp16", torch.bfloat16: "bf16"}
_BINS = tl.constexpr(TABLE_KINDS["bins"])
_FLOAT16 = tl.constexpr(TABLE_KINDS["fp16"])
_INFINITY = tl.constexpr(float("inf"))
_NAN = tl.constexpr(float("nan"))


@triton.jit
def weights_of(importance_ptr, row, column, channels, taps, group_rows, inside):
    """Importance of each weight of a tile: int64 [BLOCK_R, BLOCK_C]."""
    place = (row // group_rows)[:, None] * channels + (column // taps)[None, :]
    return tl.load(importance_ptr + place, mask=inside, other=0)


@triton.jit
def bin_index(magnitudes, width, bins):
    """Bin of each magnitude: floor(magnitude / width), at most bins - 1; 0 belongs to bin 0.

    Args:
        magnitudes: float32, >= 0 or NaN.
        width: float32 scalar.
    Returns:
        int32 in 0 .. bins - 1, whatever the magnitudes are.
    """
    ratio = tl.div_rn(magnitudes, tl.zeros_like(magnitudes) + width)
    last = (bins - 1).to(tl.float32)
    # A comparison with NaN is false.
    ratio = tl.where(ratio < last, ratio, last)
    return tl.where(magnitudes > 0.0, ratio, 0.0).to(tl.int32)


@triton.jit
def bin_width(largest, bins):
    """float32(largest / bins), divided in float64; 0 where the largest magnitude is not finite."""
    finite = tl.where(largest < _INFINITY, largest, 0.0)
    return (finite.to(tl.float64) / bins.to(tl.float64)).to(tl.float32)


@triton.jit
def from_pattern(bits, KIND: tl.constexpr):
    """float32 value of the bit pattern of a 16-bit magnitude."""
    if KIND == _FLOAT16:
        return widen(bits.to(tl.int16).to(tl.float16, bitcast=True))
    else:
        return widen(bits.to(tl.int16).to(tl.bfloat16, bitcast=True))


# Sizes bound the grid and choose importances; specialised, they would only cost compilations.
@triton.jit(do_not_specialize=["rows", "channels", "taps", "group_rows", "bins", "copies"])
def sum_weights_kernel(
    bits_ptr,
    importance_ptr,
    tables_ptr,
    top_ptr,
    rows,
    columns,
    channels,
    taps,
    group_rows,
    bins,
    copies,
    HAS_IMPORTANCE: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Add importances to tables int64 [copies, 2**15] by magnitude, and find the largest of those.

    Of float32 weights, whose largest magnitude is known, to tables [copies, bins] by bin.
    """
    row, column, offset, inside = tile(rows, columns, BLOCK_R, BLOCK_C)
    # Neighbouring programs meet the same magnitudes: each adds to a table of its own.
    copy = tl.program_id(0).to(tl.int64) % copies
    bits = tl.load(bits_ptr + offset, mask=inside, other=0)
    if bits.dtype == tl.int32:
        magnitudes = (bits & 0x7FFFFFFF).to(tl.float32, bitcast=True)
        largest = tl.load(top_ptr).to(tl.int32).to(tl.float32, bitcast=True)
        entries = bins
        entry = bin_index(magnitudes, bin_width(largest, bins), bins)
    else:
        entries = 32768
        entry = bits.to(tl.int32) & 0x7FFF
        top = tl.max(tl.max(tl.where(inside, entry, 0), axis=1), axis=0)
        tl.atomic_max(top_ptr, top.to(tl.int64), sem="relaxed")
    if HAS_IMPORTANCE:
        weight = weights_of(importance_ptr, row, column, channels, taps, group_rows, inside)
    else:
        weight = tl.full([BLOCK_R, BLOCK_C], 1, tl.int64)
    tl.atomic_add(tables_ptr + copy * entries + entry, weight, mask=inside, sem="relaxed")


@triton.jit(do_not_specialize=["rows"])
def largest_bits_kernel(
    bits_ptr, top_ptr, rows, columns, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr
):
    """Find the largest magnitude of float32 weights: its bits order like the value, NaN above."""
    _, _, offset, inside = tile(rows, columns, BLOCK_R, BLOCK_C)
    magnitudes = tl.load(bits_ptr + offset, mask=inside, other=0) & 0x7FFFFFFF
    top = tl.max(tl.max(magnitudes, axis=1), axis=0)
    tl.atomic_max(top_ptr, top.to(tl.int64), sem="relaxed")


@triton.jit(do_not_specialize=["entries", "bins", "copies"])
def finish_histogram_kernel(
    tables_ptr,
    top_ptr,
    sums_ptr,
    hist_ptr,
    max_abs_ptr,
    entries,
    bins,
    copies,
    KIND: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Add the copies of each entry, put the sums into bins and divide them by their total.

    sums: int64 [bins + 2], zeros: by bin, the total, and the programs that have finished.
    """
    entry = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = entry < entries
    total = tl.zeros([BLOCK], dtype=tl.int64)
    for copy in range(0, copies):
        total += tl.load(tables_ptr + copy * entries + entry, mask=inside, other=0)
    if KIND == _BINS:
        index = entry
        largest = tl.load(top_ptr).to(tl.int32).to(tl.float32, bitcast=True)
    else:
        largest = from_pattern(tl.load(top_ptr), KIND)
        width = bin_width(largest, bins)
        index = bin_index(from_pattern(entry, KIND), width, bins)
    tl.atomic_add(sums_ptr + index, total, mask=inside & (total != 0), sem="relaxed")
    tl.atomic_add(sums_ptr + bins, tl.sum(total, axis=0), sem="relaxed")
    # All threads have added before one of them says so.
    tl.debug_barrier()
    arrived = tl.atomic_add(sums_ptr + bins + 1, tl.full([], 1, tl.int64), sem="acq_rel")
    if arrived == tl.num_programs(0) - 1:
        whole = tl.load(sums_ptr + bins, cache_modifier=".cg").to(tl.float64)
        finite = largest < _INFINITY
        for first in range(0, bins, BLOCK):
            b = first + tl.arange(0, BLOCK)
            some = tl.load(sums_ptr + b, mask=b < bins, other=0, cache_modifier=".cg")
            share = some.to(tl.float64) / whole
            tl.store(hist_ptr + b, tl.where(finite, share, _NAN), mask=b < bins)
        tl.store(max_abs_ptr, tl.where(finite, largest, _NAN))


def launch_tiles(
    kernel: Any, configs: Sequence[Config], bits: Tensor, rows: int, *arguments: Tensor | int
) -> None:
    """Run a kernel over all weights, seen as [rows, columns].

    Args:
        kernel: takes bits, pointers, rows, columns, numbers.
        configs: for long rows and for short ones.
        bits: contiguous.
        rows: divides the number of weights.
        arguments: the pointers, then the numbers.
    """
    columns = bits.numel() // rows
    config = elementwise_config(columns, configs)
    block_r, block_c = config.constants["BLOCK_R"], config.constants["BLOCK_C"]
    programs = tile_programs(rows, columns, block_r, block_c)
    pointers = [each for each in arguments if isinstance(each, Tensor)]
    numbers = arguments[len(pointers) :]
    launch(kernel, programs, bits.device, config, bits, *pointers, rows, columns, *numbers)


def weighted_histogram(w: Tensor, importance: Tensor | None, bins: int) -> tuple[Tensor, Tensor]:
    """Importance-weighted histogram of the magnitudes of a weight, without a wait.

    As hswq.kernels.weighted_histogram says.

    Args:
        w: float16, bfloat16 or float32 [O, I, K], contiguous, not empty.
        importance: int64 [G, I], fixed point, contiguous; None weighs all alike.
        bins: 1 to 2**20.
    Returns:
        hist float64 [bins] and max|w| float32 [].
    Equals: hswq.kernels.reference.weighted_histogram, bit for bit.
    Moves: reads w once (float32: twice), and adds to up to eight tables of 256 KB (float32: of 8
        bytes a bin).
    """
    kind = _KINDS[w.dtype]
    entries = bins if kind == "bins" else MAGNITUDES
    copies = histogram_copies(w.numel())
    # One piece of zeros: the tables, the sums by bin with total and counter, the maximum.
    zeros = torch.zeros(copies * entries + bins + 3, dtype=torch.int64, device=w.device)
    tables, sums, top = zeros.split((copies * entries, bins + 2, 1))
    bits = w.view(torch.int32 if kind == "bins" else torch.int16)
    if kind == "bins":
        launch_tiles(largest_bits_kernel, ELEMENTWISE, bits, 1, top)
    if importance is None:
        numbers = 1, 1, 1, bins, copies
        launch_tiles(sum_weights_kernel, WEIGHTS_ALIKE, bits, 1, zeros, tables, top, *numbers)
    else:
        rows, channels, taps = w.shape
        numbers = channels, taps, rows // len(importance), bins, copies
        configs = WEIGHTS_WITH_IMPORTANCE
        launch_tiles(sum_weights_kernel, configs, bits, rows, importance, tables, top, *numbers)
    hist = torch.empty(bins, dtype=torch.float64, device=w.device)
    max_abs = torch.empty((), dtype=torch.float32, device=w.device)
    config = FINISH_HISTOGRAM[kind]
    programs = triton.cdiv(entries, config.constants["BLOCK"])
    pointers = tables, top, sums, hist, max_abs
    launch(finish_histogram_kernel, programs, w.device, config, *pointers, entries, bins, copies)
    return hist, max_abs


_WORK = {"tables_ptr": "*i64:16", "top_ptr": "*i64"}
_SIZES = {"rows": "i32", "columns": "i32:16"}
_NUMBERS = dict.fromkeys(("channels", "taps", "group_rows", "bins", "copies"), "i32")
_SUM_SIGNATURES = tuple(
    {"bits_ptr": f"*{kind}:16", "importance_ptr": "*i64:16", **_WORK, **_SIZES, **_NUMBERS}
    for kind in ("i16", "i32")
)
_LARGEST_SIGNATURE = {"bits_ptr": "*i32:16", "top_ptr": "*i64", **_SIZES}
KERNELS = (
    Kernel(sum_weights_kernel, _SUM_SIGNATURES, (*WEIGHTS_ALIKE, *WEIGHTS_WITH_IMPORTANCE)),
    Kernel(
        largest_bits_kernel, ({"bits_ptr": "*i32:16", "top_ptr": "*i64", **_SIZES},), ELEMENTWISE
    ),
    Kernel(
        finish_histogram_kernel,
        (
            _WORK
            | {"sums_ptr": "*i64", "hist_ptr": "*fp64:16", "max_abs_ptr": "*fp32:16"}
            | {"entries": "i32", "bins": "i32", "copies": "i32"},
        ),
        tuple(FINISH_HISTOGRAM.values()),
    ),
)
