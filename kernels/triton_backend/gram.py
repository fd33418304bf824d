"""Triton kernels of gram: products of input columns, convolutions through their geometry."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from hswq.kernels import reference
from hswq.kernels.triton_backend._configs import (
    FLOAT_TYPES,
    GRAM_EXACT,
    GRAM_SIXTEEN_BIT,
    LONG_ROWS,
    Kernel,
)
from hswq.kernels.triton_backend._floats import widen
from hswq.kernels.triton_backend._launch import launch
from hswq.kernels.triton_backend._patches import load_patches, patch_columns

# 2**40 in float32: what is above, or not finite, is no activation.
_LIMIT_BITS = tl.constexpr((127 + 40) << 23)


@triton.jit
def largest_magnitude_kernel(x_ptr, top_ptr, size, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr):
    """Find the largest |x| as float32 bits, which order like the values, NaN above all."""
    offset = tl.program_id(0).to(tl.int64) * (BLOCK_R * BLOCK_C)
    offset += tl.arange(0, BLOCK_R * BLOCK_C)
    x = widen(tl.load(x_ptr + offset, mask=offset < size, other=0.0))
    bits = x.to(tl.int32, bitcast=True) & 0x7FFFFFFF
    tl.atomic_max(top_ptr, tl.max(bits, axis=0), sem="relaxed")


# One kernel for all layers: a Linear's input is images of one element. Nothing but the position
# of x and the number of channels can make loads wider.
@triton.jit(
    do_not_specialize=[
        *("rows", "width", "tiles", "height", "length", "out_h", "out_w", "kernel_h", "kernel_w"),
        *("stride_h", "stride_w", "padding_h", "padding_w", "dilation_h", "dilation_w"),
    ]
)
def gram_kernel(
    x_ptr,
    top_ptr,
    sums_ptr,
    counted_ptr,
    rows,
    width,
    tiles,
    channels,
    height,
    length,
    out_h,
    out_w,
    kernel_h,
    kernel_w,
    stride_h,
    stride_w,
    padding_h,
    padding_w,
    dilation_h,
    dilation_w,
    TF32: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_P: tl.constexpr,
    PANEL: tl.constexpr,
):
    """Add the products of two tiles of columns, i <= j, to the sums of one block, both triangles.

    The sum of PANEL rows at a time is made from 0 and then added: its errors do not grow with all.
    """
    program = tl.program_id(0)
    pairs = tiles * (tiles + 1) // 2
    block = program // pairs
    # Pair number j (j + 1) / 2 + i stands for the tiles i <= j.
    pair = program % pairs
    tile_j = ((tl.sqrt((8 * pair + 1).to(tl.float32)) - 1.0) * 0.5).to(tl.int32)
    # The root may be off by one either way.
    tile_j = tl.where(tile_j * (tile_j + 1) // 2 > pair, tile_j - 1, tile_j)
    tile_j = tl.where((tile_j + 1) * (tile_j + 2) // 2 <= pair, tile_j + 1, tile_j)
    tile_i = pair - tile_j * (tile_j + 1) // 2
    column_i = tile_i * BLOCK_T + tl.arange(0, BLOCK_T)
    column_j = tile_j * BLOCK_T + tl.arange(0, BLOCK_T)
    first = block * width
    channel_i, shift_yi, shift_xi, inside_i = patch_columns(
        column_i, first, width, kernel_h, kernel_w, dilation_h, dilation_w
    )
    channel_j, shift_yj, shift_xj, inside_j = patch_columns(
        column_j, first, width, kernel_h, kernel_w, dilation_h, dilation_w
    )
    # Nothing is read where nothing is added.
    used = tl.where(tl.load(top_ptr) <= _LIMIT_BITS, rows, 0)
    total = tl.zeros([BLOCK_T, BLOCK_T], dtype=tl.float32)
    for start in range(0, used, PANEL):
        panel = tl.zeros([BLOCK_T, BLOCK_T], dtype=tl.float32)
        for begin in range(start, tl.minimum(start + PANEL, used), BLOCK_P):
            row = begin + tl.arange(0, BLOCK_P)
            image = row // (out_h * out_w)
            y = row // out_w % out_h * stride_h - padding_h
            x = row % out_w * stride_w - padding_w
            inside = row < rows
            values_i = widen(
                load_patches(
                    x_ptr,
                    *(image, y, x, inside),
                    *(channel_i, shift_yi, shift_xi, inside_i),
                    *(channels, height, length),
                )
            )
            values_j = widen(
                load_patches(
                    x_ptr,
                    *(image, y, x, inside),
                    *(channel_j, shift_yj, shift_xj, inside_j),
                    *(channels, height, length),
                )
            )
            if TF32:
                # 16-bit values are exact in tf32 and their products in float32.
                panel = tl.dot(values_i, tl.trans(values_j), panel, input_precision="tf32")
            else:
                panel = tl.dot(values_i, tl.trans(values_j), panel, input_precision="ieee")
        total += panel
    sums_ptr += block.to(tl.int64) * width * width
    # What is above the diagonal is written twice, and nothing where nothing is added.
    reach = tl.where(used > 0, width, 0)
    inside = (column_i < reach)[:, None] & inside_j[None, :]
    above = inside & (column_i[:, None] < column_j[None, :])
    inside &= column_i[:, None] <= column_j[None, :]
    upper = sums_ptr + column_i[:, None].to(tl.int64) * width + column_j[None, :]
    lower = sums_ptr + column_j[None, :].to(tl.int64) * width + column_i[:, None]
    tl.store(upper, total + tl.load(upper, mask=inside, other=0.0), mask=inside)
    tl.store(lower, total + tl.load(lower, mask=above, other=0.0), mask=above)
    if program == 0:
        tl.store(counted_ptr, used.to(tl.int64))


def gram(
    x: Tensor,
    accumulator: Tensor,
    kernel_size: tuple[int, int] | None,
    stride: tuple[int, int],
    padding: tuple[int, int],
    dilation: tuple[int, int],
) -> Tensor:
    """Add the products of a layer's input columns to an accumulator, without a wait.

    As hswq.kernels.gram says. Patches are read in place, never copied. 16-bit inputs go through the
    matrix units: their products are exact, and sums of 1,024 rows at a time are assumed to be off
    by no more than float32 additions in a row would be.

    Args:
        x: float16, bfloat16 or float32, [..., n], or [B, C, H, W] where kernel_size is given.
        accumulator: float32 or float64 [blocks, width, width], contiguous, changed in place.
        kernel_size, stride, padding, dilation: of the convolution.
    Returns:
        int64 []: rows added.
    Equals: hswq.kernels.reference.gram, within the bound of float32 sums.
    Moves: each pair of column tiles reads the patches of both.
    """
    if accumulator.dtype == torch.float64 or x[0].numel() >= 1 << 31:
        # Matrix products in float64 are the library's, and images that large are nobody's.
        rows: Tensor = reference.gram(x, accumulator, kernel_size, stride, padding, dilation)
        return rows
    if kernel_size is None:
        kernel_size = (1, 1)
        x = x.reshape(-1, x.shape[-1], 1, 1)
    x = x.contiguous()
    images, channels, *size = x.shape
    outputs = [
        (edge + 2 * pad - step * (taps - 1) - 1) // jump + 1
        for edge, pad, step, taps, jump in zip(
            size, padding, dilation, kernel_size, stride, strict=True
        )
    ]
    top = torch.zeros((), dtype=torch.int32, device=x.device)
    reading = LONG_ROWS.constants["BLOCK_R"] * LONG_ROWS.constants["BLOCK_C"]
    programs = triton.cdiv(x.numel(), reading)
    launch(largest_magnitude_kernel, programs, x.device, LONG_ROWS, x, top, x.numel())
    # Elsewhere than on NVIDIA's GPUs tf32 may mean something else.
    matrix_units = x.dtype != torch.float32 and torch.version.hip is None
    config = GRAM_SIXTEEN_BIT if matrix_units else GRAM_EXACT
    blocks, width, _ = accumulator.shape
    tiles = triton.cdiv(width, config.constants["BLOCK_T"])
    counted = torch.empty((), dtype=torch.int64, device=x.device)
    sizes = images * outputs[0] * outputs[1], width, tiles, channels, *size, *outputs
    geometry = *kernel_size, *stride, *padding, *dilation
    pointers = x, top, accumulator, counted
    programs = blocks * tiles * (tiles + 1) // 2
    launch(gram_kernel, programs, x.device, config, *pointers, *sizes, *geometry)
    return counted


_SIZES = ("rows", "width", "tiles", "height", "length", "out_h", "out_w", "kernel_h", "kernel_w")
_STEPS = ("stride_h", "stride_w", "padding_h", "padding_w", "dilation_h", "dilation_w")
_POINTERS = {"top_ptr": "*i32:16", "sums_ptr": "*fp32:16", "counted_ptr": "*i64:16"}


def _signatures(*kinds: str) -> tuple[dict[str, str], ...]:
    return tuple(
        {"x_ptr": f"*{kind}:16", **_POINTERS, "channels": "i32:16"}
        | dict.fromkeys((*_SIZES, *_STEPS), "i32")
        for kind in kinds
    )


KERNELS = (
    Kernel(
        largest_magnitude_kernel,
        tuple(
            {"x_ptr": f"*{kind}:16", "top_ptr": "*i32:16", "size": "i32:16"} for kind in FLOAT_TYPES
        ),
        (LONG_ROWS,),
    ),
    Kernel(gram_kernel, _signatures("fp16", "bf16"), (GRAM_SIXTEEN_BIT,)),
    Kernel(gram_kernel, _signatures(*FLOAT_TYPES), (GRAM_EXACT,)),
)
