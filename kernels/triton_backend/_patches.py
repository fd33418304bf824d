"""The patches of a convolution's input, read in place: the columns of its weight."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def patch_columns(column, first, width, kernel_h, kernel_w, dilation_h, dilation_w):
    """Channel of each column of a block of the layer's weight, and its shift in the image.

    Returns:
        channel, shift_y, shift_x, each int32 shape of column, and inside bool.
    """
    taps = kernel_h * kernel_w
    place = first + column
    tap = place % taps
    return (
        place // taps,
        tap // kernel_w * dilation_h,
        tap % kernel_w * dilation_w,
        column < width,
    )


@triton.jit
def load_patches(
    x_ptr,
    image,
    y,
    x,
    inside_rows,
    channel,
    shift_y,
    shift_x,
    inside_columns,
    channels,
    height,
    length,
):
    """Values of some patches (rows) at some columns: dtype of x, [columns, rows], 0 outside."""
    at_y = y[None, :] + shift_y[:, None]
    at_x = x[None, :] + shift_x[:, None]
    inside = inside_columns[:, None] & inside_rows[None, :]
    inside &= (at_y >= 0) & (at_y < height) & (at_x >= 0) & (at_x < length)
    # Within an image 32 bits are enough: `gram` sees to that.
    place = (channel[:, None] * height + at_y) * length + at_x
    start = image.to(tl.int64) * channels * height * length
    return tl.load((x_ptr + start)[None, :] + place, mask=inside, other=0)
