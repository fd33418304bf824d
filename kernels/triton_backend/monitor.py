"""Triton kernel of monitor, moments and channel_abs_mean: the sums over activations.

One launch reads x and y once. Programs add float64 partial sums, each over its own part of a group:
a block of channels of x, or all of y. The last program of a group to arrive adds the group's
partial sums in the order of the parts, and the last group to arrive adds the call's means to the
accumulators. Who arrives last changes nothing: how the work is cut follows from the shape alone, so
that equal inputs give equal bits on every GPU.
"""

from __future__ import annotations

import functools
import math
import weakref
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from hswq.kernels.fixed_point import MonitorAccumulators
from hswq.kernels.triton_backend._configs import (
    CHANNELS_IMAGES,
    CHANNELS_TOKENS,
    FLOAT_TYPES,
    MOMENTS,
    MONITOR_IMAGES,
    MONITOR_KNOWN,
    MONITOR_TOKENS,
    Config,
    Kernel,
    monitor_parts,
)
from hswq.kernels.triton_backend._floats import widen
from hswq.kernels.triton_backend._launch import launch
from hswq.kernels.triton_backend._sums import tree_sum

# hswq.kernels.fixed_point: steps of 2**-32 and 2**-56, and the largest means that are counted.
_ABS_MEAN_SCALE = tl.constexpr(2.0**32)
_ABS_MEAN_LIMIT = tl.constexpr(2.0**20)
_HIGH_SCALE = tl.constexpr(2.0**8)
_LOW_SCALE = tl.constexpr(2.0**48)
_LOW_BITS = tl.constexpr(48)
_MEAN_LIMIT = tl.constexpr(2.0**40)
# Adding it leaves no fraction bits to 0 <= v <= 2**52: v is rounded to an integer, ties to even.
_ROUNDER = tl.constexpr(2.0**52)
# Partial sums of a group that are added side by side.
_PARTS_AT_ONCE = tl.constexpr(16)


@triton.jit
def sum_magnitudes(
    x_ptr,
    block,
    part,
    parts,
    outer,
    channels,
    inner,
    stride_o,
    stride_c,
    stride_i,
    BLOCK_C: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Sum of |x| over one part of the positions, for one block of channels.

    Args:
        x_ptr: element (o, c, i) lies at o * stride_o + c * stride_c + i * stride_i.
        block: number of the block of channels.
        part, parts: every parts-th chunk of BLOCK_N positions is this program's.
    Returns:
        float64 [BLOCK_C].
    """
    c = block.to(tl.int64) * BLOCK_C + tl.arange(0, BLOCK_C)
    n = tl.arange(0, BLOCK_N).to(tl.int64)
    offset = c[:, None] * stride_c + n[None, :] * stride_i
    chunks_of_row = tl.cdiv(inner, BLOCK_N)
    sums = tl.zeros([BLOCK_C, BLOCK_N], dtype=tl.float64)
    # The loop's variable is int64 as well, and so are the offsets made from it.
    for chunk in range(part.to(tl.int64), outer * chunks_of_row, parts):
        first = chunk % chunks_of_row * BLOCK_N
        start = chunk // chunks_of_row * stride_o + first * stride_i
        inside = (c < channels)[:, None] & (first + n < inner)[None, :]
        x = tl.load(x_ptr + start + offset, mask=inside, other=0.0)
        sums += tl.abs(widen(x)).to(tl.float64)
    return tree_sum(sums)


@triton.jit
def sum_parts(partial_ptr, parts, columns, column):
    """Add the partial sums [parts, columns] of some columns, which other programs have stored.

    Past the nearest cache, which may hold what was there before.

    Returns:
        float64, shape of column.
    """
    p = tl.arange(0, _PARTS_AT_ONCE)
    total = tl.zeros([column.shape[0], _PARTS_AT_ONCE], dtype=tl.float64)
    for first in range(0, parts, _PARTS_AT_ONCE):
        place = column[:, None] + (first + p)[None, :] * columns
        inside = (column < columns)[:, None] & (first + p < parts)[None, :]
        total += tl.load(partial_ptr + place, mask=inside, other=0.0, cache_modifier=".cg")
    return tree_sum(total)


@triton.jit
def rounded(value):
    """Nearest integer of a float64 in 0 .. 2**52, ties to even, as int64."""
    return ((value + _ROUNDER) - _ROUNDER).to(tl.int64)


@triton.jit
def add_pair(sum_ptr, value):
    """Add a float64 to a pair of int64, as hswq.kernels.fixed_point.to_pair splits it."""
    scaled = tl.abs(value) * _HIGH_SCALE
    high = scaled.to(tl.int64)
    low = rounded((scaled - high.to(tl.float64)) * _LOW_SCALE)
    high = tl.where(value < 0, -high, high)
    low = tl.where(value < 0, -low, low)
    carry = low >> _LOW_BITS
    tl.store(sum_ptr, tl.load(sum_ptr) + high + carry)
    tl.store(sum_ptr + 1, tl.load(sum_ptr + 1) + low - (carry << _LOW_BITS))


@triton.jit
def commit(
    moments_ptr,
    means_ptr,
    channels,
    calls_ptr,
    skipped_ptr,
    mean_y_ptr,
    mean_y2_ptr,
    abs_mean_ptr,
    BLOCK: tl.constexpr,
):
    """Add the means of one call to the accumulators, or count it as skipped."""
    count = tl.load(moments_ptr, cache_modifier=".cg")
    mean_y = tl.load(moments_ptr + 1, cache_modifier=".cg") / count
    mean_y2 = tl.load(moments_ptr + 2, cache_modifier=".cg") / count
    # Comparisons with NaN are false.
    counted = ((tl.abs(mean_y) <= _MEAN_LIMIT) & (mean_y2 <= _MEAN_LIMIT)).to(tl.int32)
    lanes = tl.arange(0, BLOCK)
    for first in range(0, channels, BLOCK):
        c = first + lanes
        means = tl.load(means_ptr + c, mask=c < channels, other=0.0, cache_modifier=".cg")
        counted &= tl.min((means <= _ABS_MEAN_LIMIT).to(tl.int32), axis=0)
    if counted != 0:
        tl.store(calls_ptr, tl.load(calls_ptr) + 1)
        add_pair(mean_y_ptr, mean_y)
        add_pair(mean_y2_ptr, mean_y2)
        for first in range(0, channels, BLOCK):
            c = first + lanes
            means = tl.load(means_ptr + c, mask=c < channels, other=0.0, cache_modifier=".cg")
            total = tl.load(abs_mean_ptr + c, mask=c < channels, other=0)
            tl.store(abs_mean_ptr + c, total + rounded(means * _ABS_MEAN_SCALE), mask=c < channels)
    else:
        tl.store(skipped_ptr, tl.load(skipped_ptr) + 1)


# `channels`, `inner` and `y_size` are specialised, since vector loads need masks that end at a
# multiple of 16; the counts of programs are not.
@triton.jit(do_not_specialize=["outer", "x_parts", "y_parts"])
def monitor_kernel(
    x_ptr,
    y_ptr,
    moments_ptr,
    arrivals_ptr,
    means_ptr,
    calls_ptr,
    skipped_ptr,
    mean_y_ptr,
    mean_y2_ptr,
    abs_mean_ptr,
    outer,
    channels,
    inner,
    stride_o,
    stride_c,
    stride_i,
    x_parts,
    y_size,
    y_parts,
    SUM_X: tl.constexpr,
    SUM_Y: tl.constexpr,
    COMMIT: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_Y: tl.constexpr,
):
    # moments: count, sum y, sum y^2; behind them lie the partial sums of x and of y.
    # arrivals: of groups that have finished, of programs of y, of those of each block of channels.
    program = tl.program_id(0)
    blocks = tl.cdiv(channels, BLOCK_C)
    partial_ptr = moments_ptr + 3
    y_partial_ptr = partial_ptr
    groups = 0
    if SUM_X:
        y_partial_ptr += x_parts * channels
        groups += blocks
    if SUM_Y:
        groups += 1
    finished = program < 0

    if SUM_X:
        if program < blocks * x_parts:
            block = program % blocks
            part = program // blocks
            sums = sum_magnitudes(
                x_ptr,
                block,
                part,
                x_parts,
                outer,
                channels,
                inner,
                stride_o,
                stride_c,
                stride_i,
                BLOCK_C,
                BLOCK_N,
            )
            c = block * BLOCK_C + tl.arange(0, BLOCK_C)
            tl.store(partial_ptr + part * channels + c, sums, mask=c < channels)
            # All threads have stored before one of them says so.
            tl.debug_barrier()
            arrived = tl.atomic_add(arrivals_ptr + 2 + block, 1, sem="acq_rel")
            finished = arrived == x_parts - 1
            if finished:
                count = tl.full([], outer, tl.float64) * tl.full([], inner, tl.float64)
                total = sum_parts(partial_ptr, x_parts, channels, c)
                tl.store(means_ptr + c, total / count, mask=c < channels)
                tl.store(arrivals_ptr + 2 + block, 0)
        program -= blocks * x_parts

    # Nested, since the outer condition is decided by the compiler.
    if SUM_Y:  # noqa: SIM102
        if program >= 0:
            lanes = tl.arange(0, BLOCK_Y)[None, :]
            sums_y = tl.zeros([1, BLOCK_Y], dtype=tl.float64)
            sums_y2 = tl.zeros([1, BLOCK_Y], dtype=tl.float64)
            for chunk in range(program.to(tl.int64), tl.cdiv(y_size, BLOCK_Y), y_parts):
                offset = chunk * BLOCK_Y + lanes
                y = widen(tl.load(y_ptr + offset, mask=offset < y_size, other=0.0)).to(tl.float64)
                sums_y += y
                # A square of 24 bits is exact in float64: fused or not, the bits are the same.
                sums_y2 = tl.fma(y, y, sums_y2)
            place = y_partial_ptr + 2 * program + tl.arange(0, 1)
            tl.store(place, tree_sum(sums_y))
            tl.store(place + 1, tree_sum(sums_y2))
            tl.debug_barrier()
            arrived = tl.atomic_add(arrivals_ptr + 1, 1, sem="acq_rel")
            finished = arrived == y_parts - 1
            if finished:
                both = tl.arange(0, 2)
                tl.store(moments_ptr, tl.full([], y_size, tl.float64))
                tl.store(moments_ptr + 1 + both, sum_parts(y_partial_ptr, y_parts, 2, both))
                tl.store(arrivals_ptr + 1, 0)

    if COMMIT:  # noqa: SIM102
        if finished:
            tl.debug_barrier()
            arrived = tl.atomic_add(arrivals_ptr, 1, sem="acq_rel")
            if arrived == groups - 1:
                commit(
                    moments_ptr,
                    means_ptr,
                    channels,
                    calls_ptr,
                    skipped_ptr,
                    mean_y_ptr,
                    mean_y2_ptr,
                    abs_mean_ptr,
                    BLOCK_Y,
                )
                tl.store(arrivals_ptr, 0)


def merge_axes(sizes: Sequence[int], strides: Sequence[int]) -> list[tuple[int, int]]:
    """Describe the elements of a strided tensor, in any order, with as few axes as possible.

    Returns:
        Size and stride of each axis, the outermost first; none for a single element.
    """
    if 0 in sizes:
        return [(0, 1)]
    merged: list[tuple[int, int]] = []
    axes = [axis for axis in zip(sizes, strides, strict=True) if axis[0] != 1]
    for size, stride in sorted(axes, key=lambda axis: -axis[1]):
        if merged and merged[-1][1] == size * stride:
            size *= merged.pop()[0]
        merged.append((size, stride))
    return merged


class Cut(NamedTuple):
    """How the sums of some shapes are cut into programs.

    Attributes:
        config: of the launch.
        numbers: the kernel's arguments from `outer` to `y_parts`.
        programs: size of the grid.
        workspace: float64 numbers for count, sums and partial sums.
    """

    config: Config
    numbers: tuple[int, ...]
    programs: int
    workspace: int


# For channels side by side in memory, and for others.
_CONFIGS = {
    "monitor": (MONITOR_TOKENS, MONITOR_IMAGES),
    "known": (MONITOR_KNOWN, MONITOR_KNOWN),
    "moments": (MOMENTS, MOMENTS),
    "channels": (CHANNELS_TOKENS, CHANNELS_IMAGES),
}


# A model has some dozens of shapes and a hook is called thousands of times.
@functools.lru_cache(maxsize=1 << 12)
def cut(
    wanted: str,
    x_shape: tuple[int, ...],
    x_strides: tuple[int, ...],
    dim: int,
    y_shape: tuple[int, ...],
    y_strides: tuple[int, ...],
) -> Cut | None:
    """Cut the sums over x and y into programs; None where the kernel cannot walk through them.

    It can where y fills one piece of memory, in any order, and x has two axes besides its channels
    once those that follow one another are merged: contiguous and channels-last images, and tokens.
    """
    if merge_axes(y_shape, y_strides) not in ([], [(math.prod(y_shape), 1)]):
        return None
    sizes, strides = list(x_shape), list(x_strides)
    channels, stride_c = sizes.pop(dim), strides.pop(dim)
    axes = merge_axes(sizes, strides)
    if len(axes) > 2:
        return None
    (outer, stride_o), (inner, stride_i) = [(1, 0)] * (2 - len(axes)) + axes
    config = _CONFIGS[wanted][stride_c != 1]
    wants, y_size = config.constants, math.prod(y_shape)
    blocks = triton.cdiv(channels, wants["BLOCK_C"]) if wants["SUM_X"] else 0
    x_parts = monitor_parts(outer * triton.cdiv(inner, wants["BLOCK_N"]), blocks)
    y_parts = monitor_parts(triton.cdiv(y_size, wants["BLOCK_Y"]), 1) if wants["SUM_Y"] else 0
    numbers = outer, channels, inner, stride_o, stride_c, stride_i, x_parts, y_size, y_parts
    workspace = 3 + (x_parts * channels if blocks else 0) + 2 * y_parts
    return Cut(config, numbers, blocks * x_parts + y_parts, workspace)


def add_up(
    wanted: str,
    x: Tensor,
    dim: int,
    y: Tensor,
    means: Tensor,
    arrivals: Tensor,
    sums: Iterable[Tensor],
) -> Tensor:
    """Launch the kernel.

    Args:
        wanted: a key of _CONFIGS; of tensors that it does not need any will do.
        x: channels on axis `dim`.
        y: any shape.
        means: float64 [C], written; read where the mean |x| is known.
        arrivals: int32 [2 + C], zeros before and after.
        sums: the five tensors of the accumulators.
    Returns:
        float64: count, sum and sum of squares of y, then partial sums.
    """
    found = cut(wanted, x.shape, x.stride(), dim, y.shape, y.stride())
    if found is None:
        return add_up(wanted, x.contiguous(), dim, y.contiguous(), means, arrivals, sums)
    moments = torch.empty(found.workspace, dtype=torch.float64, device=means.device)
    pointers = x, y, moments, arrivals, means, *sums
    launch(monitor_kernel, found.programs, means.device, found.config, *pointers, *found.numbers)
    return moments


# Of each set of accumulators: made at its first call and left at zero by every launch.
_arrivals: weakref.WeakKeyDictionary[MonitorAccumulators, Tensor] = weakref.WeakKeyDictionary()


def no_arrivals(channels: int, device: torch.device) -> Tensor:
    return torch.zeros(2 + channels, dtype=torch.int32, device=device)


def monitor(
    x: Tensor, y: Tensor, dim: int, accumulators: MonitorAccumulators, abs_mean: Tensor | None
) -> Tensor:
    """Add one call of a layer to its accumulators, in one launch and without a wait.

    As hswq.kernels.monitor says, with float64 sums in an order that follows from the shapes alone.

    Args:
        x: float16, bfloat16 or float32, channels on axis `dim` < 0, any strides.
        y: float16, bfloat16 or float32, any shape and strides.
        dim: axis of x.
        accumulators: changed in place. Two streams must not add to one set at once.
        abs_mean: float64 [C] of an earlier call with the same x; x is then not read.
    Returns:
        float64 [C]: the mean |x| of each channel.
    Equals: hswq.kernels.reference.monitor, within the bounds of float64 sums.
    Moves: reads x and y once; copies first what is neither dense nor made of two axes.
    """
    arrivals = _arrivals.get(accumulators)
    if arrivals is None:
        arrivals = no_arrivals(accumulators.abs_mean.numel(), y.device)
        _arrivals[accumulators] = arrivals
    sums = vars(accumulators).values()
    if abs_mean is not None:
        # Read in place of x.
        known = abs_mean.contiguous()
        add_up("known", known, -1, y, known, arrivals, sums)
        return abs_mean
    abs_mean = torch.empty(x.shape[dim], dtype=torch.float64, device=x.device)
    add_up("monitor", x, dim, y, abs_mean, arrivals, sums)
    return abs_mean


def moments(y: Tensor) -> Tensor:
    """Count, sum and sum of squares of all elements.

    Args:
        y: float16, bfloat16 or float32, any shape and strides, also empty.
    Returns:
        float64 [3].
    Equals: hswq.kernels.reference.moments, within the bounds of float64 sums.
    Moves: reads y once.
    """
    arrivals = no_arrivals(0, y.device)
    # Only its device matters here.
    means = torch.empty(1, dtype=torch.float64, device=y.device)
    return add_up("moments", means, -1, y, means, arrivals, [arrivals] * 5)[:3]


def channel_abs_mean(x: Tensor, dim: int) -> Tensor:
    """Mean |x| of each channel.

    Args:
        x: float16, bfloat16 or float32, channels on axis `dim` < 0, any strides.
        dim: axis of x.
    Returns:
        float64 [C]; NaN where there are no elements.
    Equals: hswq.kernels.reference.channel_abs_mean, within the bounds of float64 sums.
    Moves: reads x once.
    """
    means = torch.empty(x.shape[dim], dtype=torch.float64, device=x.device)
    if len(means):
        arrivals = no_arrivals(len(means), x.device)
        add_up("channels", x, dim, means, means, arrivals, [arrivals] * 5)
    return means


_POINTERS = (
    {"moments_ptr": "*fp64:16", "arrivals_ptr": "*i32:16", "means_ptr": "*fp64:16"}
    | dict.fromkeys(("calls_ptr", "skipped_ptr", "mean_y_ptr", "mean_y2_ptr"), "*i64:16")
    | {"abs_mean_ptr": "*i64:16"}
)
_COUNTS = {"outer": "i32", "x_parts": "i32", "y_parts": "i32"}
_TOKENS = {"inner": "i32:16", "stride_o": "i32:16", "stride_c": "i32:1", "stride_i": "i32:16"}
_IMAGES = {"inner": "i32:16", "stride_o": "i32:16", "stride_c": "i32:16", "stride_i": "i32:1"}
# A prompt's 77 tokens, and one vector an image.
_ODD_TOKENS = _TOKENS | {"inner": "i32"}
_VECTORS = _TOKENS | {"inner": "i32:1", "stride_o": "i32"}
# In place of x where its sums are known or not wanted: means, or one number.
_MEANS = _TOKENS | {"inner": "i32:1", "x_ptr": "*fp64:16"}
_NOTHING = _MEANS | {"channels": "i32:1"}
_NO_OUTPUT = {"y_ptr": "*fp64:16"}


def _signatures(
    *layouts: dict[str, str], kinds: Sequence[str] = FLOAT_TYPES
) -> tuple[dict[str, str], ...]:
    """List the launches of aligned activations of one type with multiples of 16 channels."""
    return tuple(
        {"x_ptr": f"*{kind}:16", "y_ptr": f"*{kind}:16", "channels": "i32:16", "y_size": "i32:16"}
        | _POINTERS
        | _COUNTS
        | layout
        for layout in layouts
        for kind in kinds
    )


_ONE_TYPE = ("fp16",)
KERNELS = (
    Kernel(
        monitor_kernel,
        (*_signatures(_TOKENS), *_signatures(_ODD_TOKENS, _VECTORS, kinds=_ONE_TYPE)),
        (MONITOR_TOKENS,),
    ),
    Kernel(monitor_kernel, _signatures(_IMAGES), (MONITOR_IMAGES,)),
    Kernel(monitor_kernel, _signatures(_MEANS), (MONITOR_KNOWN,)),
    Kernel(monitor_kernel, _signatures(_NOTHING, kinds=_ONE_TYPE), (MOMENTS,)),
    Kernel(monitor_kernel, _signatures(_TOKENS | _NO_OUTPUT, kinds=_ONE_TYPE), (CHANNELS_TOKENS,)),
    Kernel(monitor_kernel, _signatures(_IMAGES | _NO_OUTPUT, kinds=_ONE_TYPE), (CHANNELS_IMAGES,)),
)
