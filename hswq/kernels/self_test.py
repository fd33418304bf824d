"""Small known answers for the ops: whether a backend's kernels are right on the device at hand.

A compiler or a driver can be wrong where its interpreter and its other targets are right. A few
small calls of each op are compared with hswq.kernels.reference on the CPU: exact ops bit for bit,
the others within 2**-30, which sums of these sizes keep with ease.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from hswq.kernels import reference
from hswq.kernels.contract import COMPUTE, CONTRACT, FLOATS
from hswq.kernels.fixed_point import MonitorAccumulators, importance_to_fixed

_TOLERANCE = 2.0**-30
_SIXTEEN_BIT = (torch.float16, torch.bfloat16)

Arguments = tuple[Any, ...]


def find_failure(op: str, function: Callable[..., Any], device: torch.device) -> str | None:
    """Compare an op's implementation with the reference.

    Args:
        op: name in the contract; one of OPS_WITH_CASES.
        function: the implementation, with the arguments that hswq.kernels.contract describes.
        device: where it runs.
    Returns:
        What is wrong, as the end of a sentence, or None.
    """
    for number, arguments in enumerate(_CASES[op]()):
        expected = copy.deepcopy(arguments)
        wanted = [reference.OPS[op](*expected), *_changed(expected)]
        given = tuple(_moved(argument, device) for argument in arguments)
        found = [function(*given), *_changed(given)]
        for place, (one, other) in enumerate(zip(_tensors(found), _tensors(wanted), strict=True)):
            one = one.cpu()
            if one.dtype != other.dtype or one.shape != other.shape:
                return (
                    f"result {place} of case {number} is {one.dtype} {list(one.shape)}, not "
                    f"{other.dtype} {list(other.shape)}"
                )
            if wrong := int((~_same(one, other, CONTRACT[op].exact)).sum()):
                return (
                    f"{wrong} of {one.numel()} values of result {place} of case {number} differ "
                    "from the reference"
                )
    return None


def _same(one: Tensor, other: Tensor, exact: bool) -> Tensor:
    if not one.is_floating_point():
        return one == other
    if exact:
        same = (one == other) & (one.signbit() == other.signbit())
    else:
        same = (one == other) | ((one - other).abs() <= _TOLERANCE * other.abs())
    return same | (one.isnan() & other.isnan())


def _moved(value: Any, device: torch.device) -> Any:
    if isinstance(value, MonitorAccumulators):
        return MonitorAccumulators(*(part.to(device, copy=True) for part in vars(value).values()))
    # A copy on the CPU too: some ops change their arguments.
    return value.to(device, copy=True) if isinstance(value, Tensor) else value


def _changed(arguments: Arguments) -> list[Any]:
    """Return the arguments that an op may change, which are results as well."""
    return [value for value in arguments if isinstance(value, Tensor | MonitorAccumulators)]


def _tensors(values: Any) -> Iterator[Tensor]:
    for value in values:
        if isinstance(value, MonitorAccumulators):
            yield from vars(value).values()
        elif isinstance(value, Tensor):
            yield value
        else:
            yield from _tensors(value)


def _normal(*shape: int, sigma: float = 0.02) -> Tensor:
    generator = torch.Generator("cpu").manual_seed(0)
    return torch.randn(shape, generator=generator, dtype=torch.float32, device="cpu") * sigma


def _whole(*shape: int) -> Tensor:
    """Return small integers, whose sums are exact in any order."""
    return (_normal(*shape, sigma=8.0)).round()


def _patterns(dtype: torch.dtype) -> Tensor:
    """Return every value of a 16-bit float, NaN and Inf included."""
    numbers = torch.arange(-(1 << 15), 1 << 15, dtype=torch.int32, device="cpu")
    return numbers.to(torch.int16).view(dtype)


def _float(value: float) -> Tensor:
    return torch.tensor(value, dtype=torch.float32, device="cpu")


def _moments() -> Iterator[Arguments]:
    for dtype in FLOATS:
        yield (_whole(3, 1000).to(dtype),)


def _channel_abs_mean() -> Iterator[Arguments]:
    for dtype in FLOATS:
        yield _whole(2, 5, 48).to(dtype), -1
        yield _whole(2, 48, 6, 5).to(dtype), -3


def _monitor() -> Iterator[Arguments]:
    for x, axis in ((_whole(4, 16, 48), -1), (_whole(2, 48, 8, 4), -3)):
        y, empty = _whole(4, 32), MonitorAccumulators.zeros(48)
        yield x.half(), y.half(), axis, empty, None
        yield x.bfloat16(), y.bfloat16(), axis, empty, reference.channel_abs_mean(x, axis)
        # A call that does not count.
        yield x, y / 0.0, axis, empty, None


def _weighted_histogram() -> Iterator[Arguments]:
    w = _normal(8, 6, 9)
    importance = importance_to_fixed(_normal(2, 6, sigma=1.0).abs(), w.numel())
    for dtype in FLOATS:
        yield w.to(dtype), importance, 256
        yield w.to(dtype), None, 100
    yield torch.full_like(w, torch.nan).half(), None, 16


def _histograms() -> tuple[Tensor, Tensor]:
    layers = [_normal(8, 6, 9, sigma=sigma).half() for sigma in (0.02, 0.5, 0.0)]
    found = [reference.weighted_histogram(layer, None, 300) for layer in layers]
    hists, max_abs = zip(*found, strict=True)
    return torch.stack(hists), torch.stack(max_abs)


def _clip_mse() -> Iterator[Arguments]:
    hists, max_abs = _histograms()
    steps = torch.linspace(0.5, 1.2, 40, dtype=torch.float32, device="cpu")
    for scaled in (False, True):
        yield hists[0], max_abs[0], max_abs[0] * steps, scaled


def _search_amax() -> Iterator[Arguments]:
    hists, max_abs = _histograms()
    for scaled in (False, True):
        yield hists, max_abs, scaled, 40, 2


def _quantize_e4m3() -> Iterator[Arguments]:
    for dtype in _SIXTEEN_BIT:
        yield _patterns(dtype), _float(1.0), _float(1.0 / 448)
        yield _patterns(dtype).reshape(256, 256), _float(448.0), _float(1.0)
    yield _normal(40, 300), _normal(40).abs() + 0.01, _normal(40).abs() + 1e-4


def _dequantize_e4m3() -> Iterator[Arguments]:
    codes = torch.arange(256, dtype=torch.int32, device="cpu").to(torch.uint8)
    for dtype in FLOATS:
        yield codes, _float(0.0123), dtype
        yield codes.expand(3, -1).contiguous(), _normal(3).abs() + 1e-4, dtype


def _gram() -> Iterator[Arguments]:
    point = (1, 1), (0, 0), (1, 1)
    for dtype, summed in zip(
        (*FLOATS, torch.float32), (*(torch.float32,) * 3, torch.float64), strict=True
    ):
        sums = torch.zeros(2, 20, 20, dtype=summed, device="cpu")
        yield _whole(70, 40).to(dtype), sums, None, *point
        sums = torch.zeros(1, 36, 36, dtype=summed, device="cpu")
        yield _whole(2, 4, 5, 6).to(dtype), sums, (3, 3), (2, 2), (1, 1), (1, 1)
    sums = torch.ones(1, 40, 40, dtype=torch.float32, device="cpu")
    yield _whole(70, 40) / 0.0, sums, None, *point


def _round_compensated() -> Iterator[Arguments]:
    columns = 50
    upper = _normal(columns, columns, sigma=0.3).double().triu()
    upper.diagonal().abs_().add_(0.5)
    order = torch.arange(columns - 1, -1, -1, device="cpu")
    for dtype in FLOATS:
        w = _normal(9, columns).to(dtype)
        yield w, upper, _float(0.05 / 448), order
        yield w, upper, _normal(9).abs() + 1e-5, order


def _sweep_codes() -> Iterator[Arguments]:
    for columns, lanes in ((64, 80), (23, 45)):
        second = _normal(columns, columns)
        second = second @ second.mT + torch.eye(columns, dtype=torch.float32, device="cpu")
        for scale in (_float(1e-4), _normal(lanes).abs() + 1e-3):
            codes = reference.quantize_e4m3(_normal(columns, lanes), _float(448.0), _float(1.0))
            # Values that the scale makes of codes, and slopes a few of their steps large.
            slope = _normal(columns, lanes) * scale * second.diagonal()[:, None]
            yield slope, codes, second, scale


def _few_values(*shape: int) -> Tensor:
    """Return numbers from -2 to 2: FP8 matrix units hold their sums exactly too."""
    return _normal(*shape, sigma=2.0).round().clamp(-2, 2)


def _codes(*shape: int) -> Tensor:
    """Return codepoints of such numbers."""
    return reference.quantize_e4m3(_few_values(*shape), _float(448.0), _float(1.0))


def _layers() -> Iterator[tuple[torch.dtype, str, Tensor | None]]:
    """Yield each way to compute, with a dtype of the inputs and their static scale."""
    for compute, dtype in COMPUTE.items():
        yield dtype, compute, None
    yield torch.float16, "fp8", _float(1.0)


def _scaled_matmul() -> Iterator[Arguments]:
    every_code = torch.arange(256, device="cpu").to(torch.uint8)
    every_code = every_code[every_code & 0x7F < 0x7F]
    for dtype, compute, static in _layers():
        # One row of x picks one codepoint, so that a wrong decoding shows, whatever it is of.
        x, bias = torch.eye(len(every_code), dtype=dtype, device="cpu"), _whole(24).to(dtype)
        scale = 2.0 ** _few_values(24)
        # As few kinds of arguments as tell all: each has to be compiled.
        yield x, every_code[None], scale[:1], torch.zeros_like(bias[:1]), static, compute, None
        for rows in (3, 40, 130):
            x = _few_values(rows, 80).to(dtype)
            yield x, _codes(24, 80), scale, bias, static, compute, None
    yield x, _codes(24, 80), _float(0.125), None, None, "fp8", None


def _scaled_conv2d() -> Iterator[Arguments]:
    geometry = (2, 1), (1, 0), (1, 2)
    for dtype, compute, static in _layers():
        x, bias = _few_values(2, 6, 7, 8).to(dtype), _whole(8).to(dtype)
        for groups in (1, 2):
            codes = _codes(8, 6 // groups, 3, 2)
            yield x, codes, _float(0.5), bias, *geometry, groups, static, compute, None


_CASES: Mapping[str, Callable[[], Iterator[Arguments]]] = {
    case.__name__.removeprefix("_"): case
    for case in (
        _moments,
        _channel_abs_mean,
        _monitor,
        _weighted_histogram,
        _clip_mse,
        _search_amax,
        _quantize_e4m3,
        _dequantize_e4m3,
        _gram,
        _round_compensated,
        _sweep_codes,
        _scaled_matmul,
        _scaled_conv2d,
    )
}
OPS_WITH_CASES = tuple(_CASES)
