"""The ops that the C++ extension implements, on CPU tensors.

Each function has the meaning of its namesake in hswq.kernels and equals hswq.kernels.reference: bit
for bit where the contract says exact. Here are only layouts, outputs and addresses; the work is in
csrc/. Results depend neither on the number of threads (HSWQ_NUM_THREADS, else torch's own setting)
nor on the instruction set (the best of the CPU; HSWQ_ISA forces baseline, avx2 or avx512).
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from hswq.errors import OptionError
from hswq.kernels.fixed_point import MonitorAccumulators, importance_to_fixed

_import_error: ImportError | None = None
try:
    import hswq.kernels._cpp as _cpp
except ImportError as error:
    _import_error = error


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
    sums = torch.empty(3, dtype=torch.float64)
    _cpp.moments(_dtype(y.dtype), y.data_ptr(), y.numel(), _threads(), sums.data_ptr())
    return sums


def channel_abs_mean(x: Tensor, dim: int) -> Tensor:
    x = x.contiguous()
    means = torch.empty(x.shape[dim], dtype=torch.float64)
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
        abs_mean = torch.empty(x.shape[dim], dtype=torch.float64)
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
    rows, _, kernel = w.shape
    fixed = None
    if importance is not None:
        fixed = importance_to_fixed(importance, w.numel()).repeat_interleave(kernel, dim=1)
    hist = torch.empty(bins, dtype=torch.float64)
    max_abs = _cpp.weighted_histogram(
        _dtype(w.dtype),
        w.data_ptr(),
        rows,
        w.numel() // rows,
        0 if fixed is None else fixed.data_ptr(),
        1 if fixed is None else len(fixed),
        bins,
        _threads(),
        hist.data_ptr(),
    )
    return hist, torch.tensor(max_abs, dtype=torch.float32)


def clip_mse(hist: Tensor, max_abs: Tensor, candidates: Tensor, scaled: bool) -> Tensor:
    hist, candidates = hist.contiguous(), candidates.contiguous()
    mse = torch.empty(candidates.shape, dtype=torch.float64)
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
    amax = torch.empty(layers, dtype=torch.float32)
    mse = torch.empty(layers, dtype=torch.float64)
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
    codes = torch.empty(w.shape, dtype=torch.uint8)
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
    values = torch.empty(codes.shape, dtype=dtype)
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
    return torch.tensor(rows, dtype=torch.int64)


def round_compensated(w: Tensor, upper: Tensor, scale: Tensor, order: Tensor) -> Tensor:
    rows = len(w)
    scale = scale.expand(rows).contiguous()
    codes = torch.empty(w.shape, dtype=torch.uint8)
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


def _dtype(dtype: torch.dtype) -> Any:
    """Return the extension's name for a float dtype."""
    return getattr(_cpp.DType, str(dtype).removeprefix("torch."))


def _channel_layout(x: Tensor, dim: int) -> tuple[int, int, int]:
    """Return the sizes before, along and after an axis that is counted from the end."""
    axis = x.dim() + dim
    return x.shape[:axis].numel(), x.shape[axis], x.shape[axis + 1 :].numel()


def _threads() -> int:
    """Return how many threads to use.

    Raises:
        OptionError: HSWQ_NUM_THREADS is not a positive whole number.
    """
    text = os.environ.get("HSWQ_NUM_THREADS")
    if text is None:
        return torch.get_num_threads()
    if not text.isdecimal() or int(text) == 0:
        raise OptionError(
            f"HSWQ_NUM_THREADS is {text!r}; it must be a whole number of at least 1, or unset."
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
    )
}
