"""The ops that the C++ extension implements, on CPU tensors.

Each function has the meaning of its namesake in hswq.kernels and equals hswq.kernels.reference: bit
for bit where the contract says exact. Here are only layouts, outputs and addresses; the work is in
csrc/. Results depend neither on the number of threads (HSWQ_NUM_THREADS, else torch's own setting)
nor on the instruction set (the best of the CPU; HSWQ_ISA forces baseline, avx2 or avx512).
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from hswq.errors import OptionError
from hswq.kernels.contract import COMPUTE
from hswq.kernels.fixed_point import MonitorAccumulators
from hswq.kernels.reference import activate, quantize_rows

# Elements of the float32 tiles that the products work on: decoded weights stay in the cache, and
# memory beyond input and output stays at some megabytes whatever the layer. A tile of activations
# is larger, since weights are decoded anew for each.
_TILE = 1 << 21
_ACTIVATIONS_TILE = 1 << 23
# The same of bfloat16 weights: fewer decoded weights lie in the cache as they are multiplied, more
# make larger products.
_BFLOAT16_TILE = 1 << 20
_ONE = torch.ones((), dtype=torch.float32, device="cpu")
# Bytes from which on a result is worth a system call.
_HUGE_FROM = 4 << 20

# More than any machine has cores; each thread has tables of its own.
_MOST_THREADS = 1024

_import_error: ImportError | None = None
try:
    import hswq.kernels._cpp as _cpp
except ImportError as error:
    _import_error = error
else:
    _DTYPES = {
        torch.float16: _cpp.DType.float16,
        torch.bfloat16: _cpp.DType.bfloat16,
        torch.float32: _cpp.DType.float32,
    }


def unusable_reason() -> str | None:
    """Return why the extension cannot run here, or None."""
    if _import_error is not None:
        return (
            f"the extension hswq.kernels._cpp cannot be imported ({_import_error}); install hswq "
            "with a C++ compiler and without HSWQ_BUILD_CPP=0"
        )
    try:
        _cpp.active_isa()
    except ValueError as error:
        return str(error)
    return None


def moments(y: Tensor) -> Tensor:
    y = y.contiguous()
    sums = _empty(3, torch.float64)
    _cpp.moments(_dtype(y.dtype), y.data_ptr(), y.numel(), _threads(), sums.data_ptr())
    return sums


def channel_abs_mean(x: Tensor, dim: int) -> Tensor:
    x = x.contiguous()
    means = _empty(x.shape[dim], torch.float64)
    _cpp.channel_abs_mean(
        _dtype(x.dtype), x.data_ptr(), *_channel_layout(x, dim), _threads(), means.data_ptr()
    )
    return means


def monitor(
    x: Tensor, y: Tensor, dim: int, accumulators: MonitorAccumulators, abs_mean: Tensor | None
) -> Tensor:
    has_abs_mean = abs_mean is not None
    if abs_mean is None:
        x = x.contiguous()
        abs_mean = _empty(x.shape[dim], torch.float64)
    abs_mean, y = abs_mean.contiguous(), y.contiguous()
    _cpp.monitor(
        _dtype(x.dtype),
        x.data_ptr(),
        *_channel_layout(x, dim),
        _dtype(y.dtype),
        y.data_ptr(),
        y.numel(),
        has_abs_mean,
        _threads(),
        accumulators.calls.data_ptr(),
        accumulators.skipped.data_ptr(),
        accumulators.mean_y.data_ptr(),
        accumulators.mean_y2.data_ptr(),
        accumulators.abs_mean.data_ptr(),
        abs_mean.data_ptr(),
    )
    return abs_mean


def weighted_histogram(w: Tensor, importance: Tensor | None, bins: int) -> tuple[Tensor, Tensor]:
    hist = _empty(bins, torch.float64)
    max_abs = _cpp.weighted_histogram(
        _dtype(w.dtype),
        w.data_ptr(),
        w.shape,
        0 if importance is None else importance.data_ptr(),
        1 if importance is None else len(importance),
        bins,
        _threads(),
        hist.data_ptr(),
    )
    return hist, torch.tensor(max_abs, dtype=torch.float32, device="cpu")


def clip_mse(hist: Tensor, max_abs: Tensor, candidates: Tensor, scaled: bool) -> Tensor:
    hist, candidates = hist.contiguous(), candidates.contiguous()
    mse = _empty(candidates.shape, torch.float64)
    _cpp.clip_mse(
        hist.data_ptr(),
        hist.numel(),
        float(max_abs),
        candidates.data_ptr(),
        candidates.numel(),
        scaled,
        mse.data_ptr(),
    )
    return mse


def search_amax(
    hists: Tensor, max_abs: Tensor, scaled: bool, candidates: int, refinements: int
) -> tuple[Tensor, Tensor]:
    hists, max_abs = hists.contiguous(), max_abs.contiguous()
    layers, bins = hists.shape
    amax = _empty(layers, torch.float32)
    mse = _empty(layers, torch.float64)
    _cpp.search_amax(
        hists.data_ptr(),
        layers,
        bins,
        max_abs.data_ptr(),
        scaled,
        candidates,
        refinements,
        _threads(),
        amax.data_ptr(),
        mse.data_ptr(),
    )
    return amax, mse


def quantize_e4m3(w: Tensor, amax: Tensor, scale: Tensor) -> Tensor:
    rows = max(amax.numel(), scale.numel())
    amax, scale = amax.expand(rows).contiguous(), scale.expand(rows).contiguous()
    codes = _empty(w.shape, torch.uint8)
    _cpp.quantize_e4m3(
        _dtype(w.dtype),
        w.data_ptr(),
        rows,
        w.numel() // rows,
        amax.data_ptr(),
        scale.data_ptr(),
        _threads(),
        codes.data_ptr(),
    )
    return codes


def dequantize_e4m3(codes: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    rows = scale.numel()
    values = _empty(codes.shape, dtype)
    _cpp.dequantize_e4m3(
        codes.data_ptr(),
        rows,
        codes.numel() // rows,
        scale.data_ptr(),
        _dtype(dtype),
        _threads(),
        values.data_ptr(),
    )
    return values


def gram(
    x: Tensor,
    accumulator: Tensor,
    kernel_size: tuple[int, int] | None,
    stride: tuple[int, int],
    padding: tuple[int, int],
    dilation: tuple[int, int],
) -> Tensor:
    if kernel_size is None:
        # The input of a Linear is images of one element.
        kernel_size = (1, 1)
        x = x.reshape(-1, x.shape[-1], 1, 1)
    x = x.contiguous()
    images, channels, height, width = x.shape
    rows = _cpp.gram(
        _dtype(x.dtype),
        x.data_ptr(),
        images,
        channels,
        (height, width),
        kernel_size,
        stride,
        padding,
        dilation,
        len(accumulator),
        accumulator.dtype == torch.float64,
        _threads(),
        accumulator.data_ptr(),
    )
    return torch.tensor(rows, dtype=torch.int64, device="cpu")


def round_compensated(w: Tensor, upper: Tensor, scale: Tensor, order: Tensor) -> Tensor:
    rows = len(w)
    scale = scale.expand(rows).contiguous()
    codes = _empty(w.shape, torch.uint8)
    _cpp.round_compensated(
        _dtype(w.dtype),
        w.data_ptr(),
        rows,
        w.numel() // rows,
        upper.data_ptr(),
        scale.data_ptr(),
        order.data_ptr(),
        _threads(),
        codes.data_ptr(),
    )
    return codes


def sweep_codes(slope: Tensor, codes: Tensor, second: Tensor, scale: Tensor) -> Tensor:
    columns, lanes = slope.shape
    scale = scale.expand(lanes).contiguous()
    steps = _empty(slope.shape, torch.float32)
    _cpp.sweep_codes(
        slope.data_ptr(),
        codes.data_ptr(),
        second.data_ptr(),
        columns,
        lanes,
        scale.data_ptr(),
        _threads(),
        steps.data_ptr(),
    )
    return steps


def scaled_matmul(
    x: Tensor,
    codes: Tensor,
    scale: Tensor,
    bias: Tensor | None,
    input_scale: Tensor | None,
    compute: str,
    activation: str | None,
) -> Tensor:
    rows = x.reshape(-1, x.shape[-1])
    inputs, outputs = rows.shape[1], len(codes)
    result = _empty((len(rows), outputs), x.dtype)
    if _fits_bfloat16_units(x, scale, bias, compute, activation):
        _bfloat16_matmul(rows, codes, float(scale), bias, result)
        return result.reshape(*x.shape[:-1], outputs)
    tile = _tile_rows(outputs, inputs, _TILE)
    height = min(len(rows), max(1, _ACTIVATIONS_TILE // max(inputs, tile)))
    # One buffer each: fresh pages would cost as much as the decoding.
    weights = _empty((tile, inputs), torch.float32)
    products = _empty(height * tile, torch.float32)
    for part in _slices(len(rows), height):
        values, input_scales = _inputs(rows[part], input_scale, compute)
        for some in _slices(outputs, tile):
            weight = _decode(codes[some], weights[: some.stop - some.start])
            product = products[: len(values) * len(weight)].view(len(values), len(weight))
            torch.mm(values, weight.mT, out=product)
            _finish(product, input_scales, scale, bias, some)
            result[part, some] = activate(product, activation)
    return result.reshape(*x.shape[:-1], outputs)


def scaled_conv2d(
    x: Tensor,
    codes: Tensor,
    scale: Tensor,
    bias: Tensor | None,
    stride: tuple[int, int],
    padding: tuple[int, int],
    dilation: tuple[int, int],
    groups: int,
    input_scale: Tensor | None,
    compute: str,
    activation: str | None,
) -> Tensor:
    by_group = codes.reshape(groups, -1, *codes.shape[1:])
    channels, outputs = x.shape[1] // groups, by_group.shape[1]
    tile = _tile_rows(outputs, by_group[0, 0].numel(), _TILE)
    weights = _empty((tile, *codes.shape[1:]), torch.float32)
    images = []
    for image in x:
        values, input_scales = _inputs(image.reshape(1, -1), input_scale, compute)
        parts = []
        by_channels = torch.split(values.reshape(1, *image.shape), channels, dim=1)
        for group, group_values in enumerate(by_channels):
            for some in _slices(outputs, tile):
                weight = _decode(by_group[group, some], weights[: some.stop - some.start])
                product = functional.conv2d(group_values, weight, None, stride, padding, dilation)
                first = group * outputs + some.start
                channels_last = product.movedim(1, -1)
                _finish(channels_last, input_scales, scale, bias, slice(first, first + len(weight)))
                parts.append(activate(product, activation).to(x.dtype))
        images.append(torch.cat(parts, dim=1))
    return torch.cat(images)


def _fits_bfloat16_units(
    x: Tensor, scale: Tensor, bias: Tensor | None, compute: str, activation: str | None
) -> bool:
    """Tell whether one product of bfloat16 matrices gives the result, rounded once."""
    return (
        compute == "bf16"
        and x.dtype == torch.bfloat16
        and scale.dim() == 0
        and (bias is None or bias.dtype == torch.bfloat16)
        and activation is None
        and _has_bfloat16_units()
    )


@lru_cache
def _has_bfloat16_units() -> bool:
    """Tell whether this CPU multiplies bfloat16 faster than float32; old torch does not know."""
    if not hasattr(torch.cpu, "get_capabilities"):
        return False
    units = torch.cpu.get_capabilities()
    return bool(units.get("avx512_bf16") or units.get("amx_bf16"))


def _bfloat16_matmul(
    rows: Tensor, codes: Tensor, scale: float, bias: Tensor | None, result: Tensor
) -> None:
    """Write rows [M, K] times codes [O, K], scaled, to result [M, O].

    Codepoints are bfloat16 numbers. Sums, scale and bias are float32 inside the product.
    """
    inputs, outputs = rows.shape[1], len(codes)
    tile = _tile_rows(outputs, inputs, _BFLOAT16_TILE)
    weights = _empty((tile, inputs), torch.bfloat16)
    for some in _slices(outputs, tile):
        weight = _decode(codes[some], weights[: some.stop - some.start])
        part = result[:, some]
        if bias is None:
            torch.addmm(part, rows, weight.mT, beta=0, alpha=scale, out=part)
        else:
            torch.addmm(bias[some], rows, weight.mT, alpha=scale, out=part)


def _tile_rows(rows: int, row_size: int, tile: int) -> int:
    """Return how many rows of a weight are decoded at a time: about `tile` elements."""
    some = max(1, tile // row_size)
    # MKL loses up to a third of its speed on widths that are no multiple of its own blocks.
    return min(rows, some - some % 64 if some > 64 else some)


def _decode(codes: Tensor, values: Tensor) -> Tensor:
    """Write the values of codes to a tensor of their shape, and return it."""
    _cpp.dequantize_e4m3(
        codes.data_ptr(),
        1,
        codes.numel(),
        _ONE.data_ptr(),
        _dtype(values.dtype),
        _threads(),
        values.data_ptr(),
    )
    return values


def _inputs(rows: Tensor, input_scale: Tensor | None, compute: str) -> tuple[Tensor, Tensor | None]:
    """Return activations [M, K] in float32 as `compute` rounds them, and scales [M or 1, 1]."""
    if compute == "fp8":
        return quantize_rows(rows, input_scale)
    return rows.to(COMPUTE[compute]).float(), None


def _finish(
    product: Tensor, input_scales: Tensor | None, scale: Tensor, bias: Tensor | None, some: slice
) -> None:
    """Apply scales and bias to a product [..., some of the outputs] in place."""
    if input_scales is not None:
        product.mul_(input_scales)
    product.mul_(scale if scale.dim() == 0 else scale[some])
    if bias is not None:
        product.add_(bias[some].float())


def _slices(size: int, step: int) -> Iterator[slice]:
    for start in range(0, size, step):
        yield slice(start, min(start + step, size))


def _empty(shape: int | Sequence[int], dtype: torch.dtype) -> Tensor:
    """Return memory whose address the extension may have.

    It lies on the CPU whatever the caller's default device is. What is large comes in huge pages,
    if the system has any.
    """
    result = torch.empty(shape, dtype=dtype, device="cpu")
    if result.nbytes >= _HUGE_FROM:
        _cpp.prefer_huge_pages(result.data_ptr(), result.nbytes)
    return result


def _dtype(dtype: torch.dtype) -> Any:
    """Return the extension's name for a float dtype."""
    return _DTYPES[dtype]


def _channel_layout(x: Tensor, dim: int) -> tuple[int, int, int]:
    """Return the sizes before, along and after an axis that is counted from the end."""
    shape = x.shape
    after = math.prod(shape[dim + 1 :]) if dim < -1 else 1
    return math.prod(shape[:dim]), shape[dim], after


def _threads() -> int:
    """Return how many threads to use.

    Raises:
        OptionError: HSWQ_NUM_THREADS is no whole number between 1 and _MOST_THREADS.
    """
    text = os.environ.get("HSWQ_NUM_THREADS")
    if text is None:
        return torch.get_num_threads()
    # Not compared as a number first: int() refuses thousands of digits with an error of its own.
    if not text.isdecimal() or len(text) > 9 or not 1 <= int(text) <= _MOST_THREADS:
        raise OptionError(
            f"HSWQ_NUM_THREADS is {text[:40]!r}; it must be a whole number between 1 and "
            f"{_MOST_THREADS}, or unset."
        )
    return int(text)


OPS: Mapping[str, Callable[..., Any]] = {
    function.__name__: function
    for function in (
        moments,
        channel_abs_mean,
        monitor,
        weighted_histogram,
        clip_mse,
        search_amax,
        quantize_e4m3,
        dequantize_e4m3,
        gram,
        round_compensated,
        sweep_codes,
        scaled_matmul,
        scaled_conv2d,
    )
}
