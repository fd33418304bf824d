"""The table of ops that every backend answers to, and the checks of their arguments.

A backend's function has the name of the op and takes the arguments of hswq.kernels' function in
that order, positionally, without `backend`, checked and brought to one form:

- tensors of one call are on one device; gradients and autocast are off;
- weights, codes and importances are contiguous, activations may be strided;
- codes are uint8; `dim` counts from the end; `stride`, `padding`, `dilation`, `kernel_size` are
  pairs;
- `amax` and `scale` are float32 tensors, [] or [O] (`input_scale`: [] or None);
- `weighted_histogram`: w is [O, I, K] (a vector is [1, n, 1]), importance is None or int64 [G, I],
  as fixed_point.importance_to_fixed makes it; `search_amax`: hists [L, bins] and max_abs [L],
  returns [L] and [L];
- `gram`, `scaled_conv2d`: convolution inputs are [B, C, H, W]; `compute` is never 'auto';
- no tensor is empty, except the activations of moments, channel_abs_mean and monitor.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from numbers import Real

import torch
from torch import Tensor

from hswq.errors import InputError

FLOATS = (torch.float16, torch.bfloat16, torch.float32)
# What the bounds of the search are derived for; the options of these names end there too.
MAX_BINS = 1 << 20
MAX_CANDIDATES = 100_000
MAX_REFINEMENTS = 100
# Columns that a call of sweep_codes takes: what kernels keep at hand.
MAX_SWEPT = 64
# Of strides, paddings and dilations, so that no size of an image overflows.
MAX_STEP = 1 << 16
CODES = (torch.uint8, torch.float8_e4m3fn)
COMPUTE = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
ACTIVATIONS = ("gelu", "gelu_tanh", "silu")


@dataclass(frozen=True)
class Op:
    """One row of the contract.

    Attributes:
        summary: what it computes.
        exact: True where every backend gives the same bits (bytes, indices); False where the
            result is a sum within a bound derived from count and precision.
    """

    summary: str
    exact: bool


CONTRACT = {
    "moments": Op("count, sum and sum of squares of a tensor", exact=False),
    "channel_abs_mean": Op("mean |x| per channel", exact=False),
    "monitor": Op("both of one hook call, added to fixed-point accumulators", exact=False),
    "weighted_histogram": Op("importance-weighted histogram of |w|", exact=True),
    "clip_mse": Op("objective of given clipping thresholds", exact=False),
    "search_amax": Op("coarse-to-fine search of the threshold", exact=True),
    "quantize_e4m3": Op("clip, divide by the scale, round to codepoints", exact=True),
    "dequantize_e4m3": Op("codepoint value times scale", exact=True),
    "gram": Op("sum of x x^T for compensated rounding", exact=False),
    "round_compensated": Op("error-compensated rounding to codepoints", exact=True),
    "sweep_codes": Op("codes of columns chosen anew for what the others have become", exact=True),
    "scaled_matmul": Op("linear layer on FP8 weights", exact=False),
    "scaled_conv2d": Op("convolution on FP8 weights", exact=False),
}


def check_dtype(op: str, name: str, value: Tensor, dtypes: Sequence[torch.dtype]) -> None:
    """Raise InputError unless the tensor has one of the dtypes."""
    if value.dtype not in dtypes:
        names = ", ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
        raise InputError(
            f"{op}: {name} is {str(value.dtype).removeprefix('torch.')}; it must be {names}. "
            "Convert it first."
        )


def check_shape(op: str, name: str, value: Tensor, shape: Sequence[int], why: str) -> None:
    """Raise InputError unless the tensor has the shape; `why` says where the shape comes from."""
    if value.shape != tuple(shape):
        raise InputError(f"{op}: {name} has shape {list(value.shape)}; {why} needs {list(shape)}.")


def check_contiguous(op: str, name: str, value: Tensor) -> None:
    """Raise InputError for a tensor that is written in place and does not lie in one piece."""
    if not value.is_contiguous():
        raise InputError(f"{op}: {name} is not contiguous and changed in place; hand in a copy.")


def check_devices(op: str, **tensors: Tensor | None) -> torch.device:
    """Return the one device of the tensors.

    Raises:
        InputError: they are on several.
    """
    devices = [value.device for value in tensors.values() if value is not None]
    if devices.count(devices[0]) < len(devices):
        given = (name for name, value in tensors.items() if value is not None)
        places = ", ".join(
            f"{name} on {device}" for name, device in zip(given, devices, strict=True)
        )
        raise InputError(f"{op}: all tensors must be on one device; found {places}. Move them.")
    return devices[0]


def check_count(op: str, name: str, value: int, least: int, most: int) -> None:
    """Raise InputError unless the value is a whole number with least <= value <= most."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise InputError(f"{op}: {name} is {value!r}; it must be a whole number.")
    if value < least:
        raise InputError(f"{op}: {name} is {value}; it must be at least {least}.")
    if value > most:
        raise InputError(f"{op}: {name} is {value}; it must be at most {most}.")


def check_range(
    op: str, name: str, value: Tensor, *, positive: bool = False, or_nan: bool = False
) -> None:
    """Raise InputError unless all values are finite and >= 0 (positive: > 0), or NaN if allowed.

    Only tensors on the CPU are looked at: elsewhere it would cost a wait for the device.
    """
    if value.device.type != "cpu" or value.numel() == 0:
        return
    value = value.detach().reshape(-1)
    # NaN compares as false; the elements are looked at one by one only where some are doubtful.
    least, largest = (value.item(),) * 2 if len(value) == 1 else map(float, torch.aminmax(value))
    if (least > 0.0 if positive else least >= 0.0) and largest < math.inf:
        return
    good = value.isfinite() & (value > 0.0 if positive else value >= 0.0)
    if or_nan:
        good |= value.isnan()
    if not good.all():
        found = float(value[~good][0])
        needed = f"finite and {'> 0' if positive else '>= 0'}{', or NaN' if or_nan else ''}"
        raise InputError(f"{op}: {name} is {found}; it must be {needed}.")


def check_not_empty(op: str, name: str, value: Tensor) -> None:
    """Raise InputError for a tensor without elements."""
    if value.numel() == 0:
        raise InputError(f"{op}: {name} {list(value.shape)} is empty; it needs an element.")


def codes_of(op: str, name: str, value: Tensor) -> Tensor:
    """Return codepoints as contiguous uint8, also from a float8_e4m3fn tensor."""
    check_dtype(op, name, value, CODES)
    return value.detach().contiguous().view(torch.uint8)


def channel_axis(op: str, x: Tensor, dim: int) -> int:
    """Return `dim` counted from the end."""
    if not -x.dim() <= dim < x.dim():
        raise InputError(
            f"{op}: dim {dim} is no axis of x {list(x.shape)}; a Conv2d's channels are axis -3, "
            "a Linear's are axis -1."
        )
    return dim if dim < 0 else dim - x.dim()


def row_values(
    op: str, name: str, value: float | Tensor, rows: int, device: torch.device
) -> Tensor:
    """Return a value of the whole tensor or of each row as float32 [] or [rows] on the device.

    Raises:
        InputError: another dtype or shape, or as float32 not finite, negative, or a scale of 0.
    """
    if isinstance(value, Tensor):
        check_dtype(op, name, value, (torch.float32,))
        if value.numel() == 1:
            value = value.reshape(())
        else:
            check_shape(op, name, value, [rows], f"one value per row of {rows} rows")
    elif isinstance(value, Real):
        value = torch.tensor(value, dtype=torch.float32, device="cpu")
    else:
        raise InputError(f"{op}: {name} is {value!r}; it must be a number or a float32 tensor.")
    check_range(op, name, value, positive=name.endswith("scale"))
    return value.detach().to(device).contiguous()


def pair(op: str, name: str, value: int | Sequence[int], least: int) -> tuple[int, int]:
    """Return a size of both image axes from one number or two."""
    first, second = (value, value) if isinstance(value, int) else value
    for number in (first, second):
        check_count(op, name, number, least, MAX_STEP)
    return first, second


def geometry(
    op: str,
    size: Sequence[int],
    kernel: Sequence[int],
    stride: int | Sequence[int],
    padding: int | Sequence[int],
    dilation: int | Sequence[int],
) -> tuple[tuple[int, int], tuple[int, int], tuple[int, int]]:
    """Return stride, padding and dilation of a convolution of [H, W] images as pairs."""
    strides = pair(op, "stride", stride, 1)
    paddings = pair(op, "padding", padding, 0)
    dilations = pair(op, "dilation", dilation, 1)
    for edge, taps, pad, step in zip(size, kernel, paddings, dilations, strict=True):
        if step * (taps - 1) + 1 > edge + 2 * pad:
            raise InputError(
                f"{op}: a kernel {list(kernel)} of dilation {list(dilations)} does not fit into an "
                f"image {list(size)} with padding {list(paddings)}."
            )
    return strides, paddings, dilations


def images(op: str, x: Tensor) -> Tensor:
    """Return the input of a convolution as [B, C, H, W]."""
    check_dtype(op, "x", x, FLOATS)
    if x.dim() not in (3, 4):
        raise InputError(
            f"{op}: x has shape {list(x.shape)}; a convolution needs [B, C, H, W] or [C, H, W]."
        )
    return x if x.dim() == 4 else x[None]


def layer_arguments(
    op: str,
    x: Tensor,
    codes: Tensor,
    scale: float | Tensor,
    bias: Tensor | None,
    input_scale: float | Tensor | None,
    compute: str,
    activation: str | None,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None, str, str | None]:
    """Check what scaled_matmul and scaled_conv2d share.

    Returns:
        codes, scale, bias, input_scale, compute and activation in the backends' form.
    """
    check_dtype(op, "x", x, FLOATS)
    plain_codes = codes_of(op, "codes", codes)
    check_not_empty(op, "codes", codes)
    check_devices(op, x=x, codes=codes, bias=bias)
    rows = len(codes)
    if bias is not None:
        check_dtype(op, "bias", bias, FLOATS)
        check_shape(op, "bias", bias, [rows], f"codes {list(codes.shape)}")
        bias = bias.detach().contiguous()
    if compute == "auto":
        compute = next(name for name, dtype in COMPUTE.items() if dtype == x.dtype)
    for name, value, choices in (
        ("compute", compute, ("auto", *COMPUTE, "fp8")),
        ("activation", activation, (None, *ACTIVATIONS)),
    ):
        if value not in choices:
            raise InputError(
                f"{op}: {name} is {value!r}; it must be one of {', '.join(map(str, choices))}."
            )
    if input_scale is not None:
        if compute != "fp8":
            raise InputError(
                f"{op}: input_scale is for compute 'fp8', not {compute!r}: leave it out."
            )
        input_scale = row_values(op, "input_scale", input_scale, 1, x.device)
    scale = row_values(op, "scale", scale, rows, x.device)
    return plain_codes, scale, bias, input_scale, compute, activation
