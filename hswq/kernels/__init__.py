"""The contract of kernels: thirteen ops that every backend implements under these names.

The docstrings here are normative. Exact ops give the same bits on every backend, instruction set
and number of threads; the others are sums within the bound stated, whose order a backend may choose
but never varies: no float atomics, equal inputs give equal outputs. Every function takes `backend`,
the name of a backend, or None for HSWQ_BACKEND or the default of the tensors' device; it can always
raise BackendError where that backend cannot run. No function records gradients or is affected by
autocast.

Where the caller has set torch.set_flush_denormal(True), float32 numbers below 2**-126 (not those of
float16) may count as 0; nothing else changes.

float16, bfloat16 and float32 are the dtypes of weights and activations. u is 2**-53 in bounds of
float64 sums and 2**-24 in those of float32 sums.
"""

from __future__ import annotations

import contextlib
import math
from typing import Any

import torch
from torch import Tensor

from hswq.errors import InputError
from hswq.kernels import contract, dispatch
from hswq.kernels.contract import CONTRACT, FLOATS, Op
from hswq.kernels.dispatch import BACKENDS, BackendStatus, backend_report
from hswq.kernels.fixed_point import MonitorAccumulators, importance_to_fixed
from hswq.kernels.reference import tree_sum

__all__ = [
    "BACKENDS",
    "CONTRACT",
    "BackendStatus",
    "MonitorAccumulators",
    "Op",
    "backend_report",
    "channel_abs_mean",
    "clip_mse",
    "dequantize_e4m3",
    "gram",
    "moments",
    "monitor",
    "quantize_e4m3",
    "round_compensated",
    "scaled_conv2d",
    "scaled_matmul",
    "search_amax",
    "sweep_codes",
    "tree_sum",
    "weighted_histogram",
]

Pair = int | tuple[int, int]


def _run(op: str, backend: str | None, device: torch.device, *args: Any) -> Any:
    implementation = dispatch.select(op, backend, device)
    grad, autocast = torch.is_grad_enabled(), torch.is_autocast_enabled(device.type)
    # Entering what is not on would cost as much as a small op.
    if not (grad or autocast):
        return implementation(*args)
    with contextlib.ExitStack() as modes:
        if grad:
            modes.enter_context(torch.no_grad())
        if autocast:
            modes.enter_context(torch.autocast(device.type, enabled=False))
        return implementation(*args)


def moments(y: Tensor, *, backend: str | None = None) -> Tensor:
    """Count, sum and sum of squares of all elements, in float64.

    Squares are exact in float64; the sums are off by at most numel * u * sum |y| and
    numel * u * sum y^2. NaN and Inf propagate.

    Args:
        y: floating point, any shape and strides, also empty.
    Returns:
        float64 [3]: count, sum y, sum y^2.
    Raises:
        InputError: y has another dtype.
    """
    contract.check_dtype("moments", "y", y, FLOATS)
    result: Tensor = _run("moments", backend, y.device, y.detach())
    return result


def channel_abs_mean(x: Tensor, dim: int, *, backend: str | None = None) -> Tensor:
    """Mean magnitude of each channel, in float64.

    mean_c = sum |x| over all elements with index c on axis dim, divided by their number n; off by
    at most (n + 1) * u * mean_c. NaN and Inf propagate to their channel; without elements it is
    NaN.

    Args:
        x: floating point, any rank >= 1 and strides.
        dim: the channel axis: -3 for the input of a Conv2d, -1 for that of a Linear.
    Returns:
        float64 [C].
    Raises:
        InputError: x has another dtype, or dim is none of its axes.
    """
    contract.check_dtype("channel_abs_mean", "x", x, FLOATS)
    axis = contract.channel_axis("channel_abs_mean", x, dim)
    result: Tensor = _run("channel_abs_mean", backend, x.device, x.detach(), axis)
    return result


def monitor(
    x: Tensor,
    y: Tensor,
    dim: int,
    accumulators: MonitorAccumulators,
    abs_mean: Tensor | None = None,
    *,
    backend: str | None = None,
) -> Tensor:
    """Add one call of a layer to its accumulators, without waiting for the device.

    calls += 1; mean_y += mean(y); mean_y2 += mean(y^2); abs_mean += channel_abs_mean(x, dim), each
    rounded to its fixed-point step (kernels/fixed_point.py). If one of the means is not finite, a
    mean of y is above 2**40 in magnitude or an abs_mean above 2**20, the call adds 1 to skipped and
    nothing else. The sums are integers: the order of calls and the merging of accumulators change
    no bit. The means themselves are bounded as those of `moments` and `channel_abs_mean`.

    Args:
        x: the layer's input; not read where abs_mean is given.
        y: the layer's output, any shape.
        dim: the channel axis of x: -3 for a Conv2d, -1 for a Linear.
        accumulators: changed in place; they hold 2**11 - 1 calls. Two threads must not add to one
            set at once: give each its own and add the sets.
        abs_mean: what an earlier call returned for the same x and dim, so that it is reduced once.
    Returns:
        float64 [C]: the abs_mean of x, also for a skipped call.
    Raises:
        InputError: another dtype, a dim that x lacks, another number of channels than the
            accumulators have, or tensors on several devices.
    Source: Dual Monitor of the HSWQ method.
    """
    for name, value in (("x", x), ("y", y)):
        contract.check_dtype("monitor", name, value, FLOATS)
    axis = contract.channel_axis("monitor", x, dim)
    device = contract.check_devices(
        "monitor", x=x, y=y, accumulators=accumulators.abs_mean, abs_mean=abs_mean
    )
    if abs_mean is not None:
        contract.check_dtype("monitor", "abs_mean", abs_mean, (torch.float64,))
    sums = {"accumulators.abs_mean": accumulators.abs_mean, "abs_mean": abs_mean}
    for name, means in sums.items():
        # Put into words only where it is wrong: hooks are called thousands of times.
        if means is not None and means.shape != (x.shape[axis],):
            why = f"axis {axis} of x {list(x.shape)}"
            contract.check_shape("monitor", name, means, [x.shape[axis]], why)
    result: Tensor = _run("monitor", backend, device, x, y, axis, accumulators, abs_mean)
    return result


def weighted_histogram(
    w: Tensor, importance: Tensor | None, bins: int, *, backend: str | None = None
) -> tuple[Tensor, Tensor]:
    """Importance-weighted histogram of the magnitudes of a weight. Exact.

    H(b) = sum of I_c over the weights with |w| in bin b, divided by the sum over all bins. The bin
    is floor(|w| / width) with width = float32(max|w| / bins), the quotient in float64 and rounded
    once; |w| / width is an IEEE float32 division; clamped to bins - 1. Where width underflows to 0,
    any |w| > 0 belongs to the last bin. Importances are summed as the integers of
    fixed_point.importance_to_fixed, whose float64 values are divided at the end.

    Args:
        w: floating point [O, I, ...] or a vector, not empty.
        importance: float32 per input channel, finite and >= 0: [I], or [G, I] for the weight
            [O, I, ...] of a convolution of G groups, whose rows form G equal blocks; for a vector
            its own length. None, or all zero, weighs all weights alike.
        bins: number of equal bins on [0, max|w|], at most 2**20.
    Returns:
        hist float64 [bins] of sum 1, and max|w| float32 []. With NaN or Inf in w both are NaN: the
        caller knows the tensor's name and raises. An all-zero w gives hist [1, 0, ...] and 0.
    Raises:
        InputError: w is empty, another dtype, bins out of range, or importance has another length,
            dtype or a value that is negative or not finite.
    """
    op = "weighted_histogram"
    contract.check_dtype(op, "w", w, FLOATS)
    contract.check_not_empty(op, "w", w)
    contract.check_count(op, "bins", bins, 1, contract.MAX_BINS)
    shape = w.shape if w.dim() >= 2 else torch.Size([1, w.numel()])
    if importance is not None:
        importance = _checked_importance(op, importance, shape)
    weights = w.detach().reshape(*shape[:2], -1).contiguous()
    fixed = None
    if importance is not None:
        # Where the importance is, which spares an accelerator some launches. Pageable memory is
        # read before `to` returns, and nothing waits for the device.
        fixed = importance_to_fixed(importance, w.numel()).to(w.device, non_blocking=True)
    hist, max_abs = _run(op, backend, w.device, weights, fixed, bins)
    return hist, max_abs


def _checked_importance(op: str, importance: Tensor, shape: torch.Size) -> Tensor | None:
    """Return importance as contiguous [G, I], or None where it is all zero."""
    contract.check_dtype(op, "importance", importance, (torch.float32,))
    channels = importance.shape[-1] if importance.dim() else 0
    if importance.dim() not in (1, 2) or channels != shape[1]:
        raise InputError(
            f"{op}: importance {list(importance.shape)} has {channels} channels but the weight "
            f"{list(shape)} has {shape[1]} input channels; the calibration was made for another "
            "layer or checkpoint."
        )
    importance = importance.detach().reshape(-1, channels).contiguous()
    groups = len(importance)
    if groups == 0 or shape[0] % groups:
        raise InputError(
            f"{op}: importance has {groups} groups; the {shape[0]} rows of the weight do not form "
            "that many equal blocks."
        )
    least, largest = (float(value) for value in torch.aminmax(importance))
    if not (least >= 0.0 and math.isfinite(largest)):
        raise InputError(
            f"{op}: importance lies between {least} and {largest}; it must be finite and >= 0. "
            "Calibrate again."
        )
    return importance if largest > 0.0 else None


def clip_mse(
    hist: Tensor,
    max_abs: Tensor,
    candidates: Tensor,
    scaled: bool,
    *,
    backend: str | None = None,
) -> Tensor:
    """Weighted squared error of clipping at each candidate.

    J(amax) = sum_b H(b) * (q(x_b) - x_b)^2 with x_b = (b + 1/2) * (max / bins) and, for
    scaled=False, q(x) = round(min(x, amax, 448)); for scaled=True, q(x) = round(min(x * s, 448)) /
    s, s = 448 / amax, all in float64; round is to the nearest codepoint, ties to the smaller one.
    Off from the exact sum by at most 10 * (bins + 160) * u * sum H x^2, which prefix sums keep as
    well.

    Args:
        hist: float64 [bins] of sum 1, bins at most 2**20.
        max_abs: float32 [], finite and >= 0, or NaN: right edge of the last bin. 0 gives J = 0, NaN
            gives NaN, and any other maximum of a hist that holds NaN or Inf gives no finite J.
        candidates: float32 [N], finite and >= 0; 0 clips everything to 0.
        scaled: True for V2, False for V1.
    Returns:
        float64 [N].
    Raises:
        InputError: another dtype, shape or several devices, too many bins, or a number out of range
            (tensors on an accelerator are not looked at).
    """
    op = "clip_mse"
    device = contract.check_devices(op, hist=hist, max_abs=max_abs, candidates=candidates)
    _check_histograms(op, hist, max_abs, 1)
    contract.check_dtype(op, "candidates", candidates, (torch.float32,))
    contract.check_not_empty(op, "candidates", candidates)
    contract.check_shape(op, "candidates", candidates, [candidates.numel()], "a list of thresholds")
    contract.check_range(op, "candidates", candidates)
    args = hist.contiguous(), max_abs.reshape(()), candidates.contiguous(), scaled
    result: Tensor = _run(op, backend, device, *args)
    return result


def search_amax(
    hists: Tensor,
    max_abs: Tensor,
    scaled: bool,
    candidates: int,
    refinements: int,
    *,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """Find the threshold of least J for one layer or a list of layers. Exact.

    Stage 0 takes lo = 0.5 * max, hi = max; each refinement width = (hi - lo) / 4,
    lo = max(0.1 * max, best - width), hi = min(1.2 * max, best + width, the largest float32).
    Candidate i of N is float32(lo + i * ((hi - lo) / (N - 1))), computed in float64. J is that of
    `clip_mse`, summed directly: float64 terms H * (d * d), d = q(x) - x, added by `tree_sum`. The
    first strict minimum wins, within a stage and across stages. Prefix sums may rank the candidates
    as long as all that can be the minimum are then evaluated directly.

    Args:
        hists: float64 [bins] or [L, bins], each of sum 1, bins at most 2**20.
        max_abs: float32 [] or [L], finite and >= 0, or NaN. 0 gives amax 0 and J 0; NaN, and any
            other maximum of a hist that holds NaN or Inf, gives NaN for both.
        scaled: True for V2, False for V1.
        candidates: thresholds a stage, 2 to 100,000.
        refinements: further stages, 0 to 100.
    Returns:
        amax float32 and J float64, both [] or [L].
    Raises:
        InputError: another dtype or shape, several devices, or a number out of range (tensors on an
            accelerator are not looked at).
    """
    op = "search_amax"
    device = contract.check_devices(op, hists=hists, max_abs=max_abs)
    _check_histograms(op, hists, max_abs, 2 if hists.dim() == 2 else 1)
    contract.check_count(op, "candidates", candidates, 2, contract.MAX_CANDIDATES)
    contract.check_count(op, "refinements", refinements, 0, contract.MAX_REFINEMENTS)
    layers = hists.reshape(-1, hists.shape[-1]).contiguous()
    args = layers, max_abs.reshape(-1).contiguous(), scaled, candidates, refinements
    amax, mse = _run(op, backend, device, *args)
    shape = hists.shape[:-1]
    return amax.reshape(shape), mse.reshape(shape)


def _check_histograms(op: str, hists: Tensor, max_abs: Tensor, rank: int) -> None:
    contract.check_dtype(op, "hist", hists, (torch.float64,))
    contract.check_dtype(op, "max_abs", max_abs, (torch.float32,))
    contract.check_not_empty(op, "hist", hists)
    if hists.dim() != rank:
        raise InputError(
            f"{op}: hist has shape {list(hists.shape)}; it must have {rank} "
            f"ax{'is' if rank == 1 else 'es'}, bins last."
        )
    contract.check_count(op, "bins", hists.shape[-1], 1, contract.MAX_BINS)
    contract.check_shape(op, "max_abs", max_abs, hists.shape[:-1], f"hist {list(hists.shape)}")
    contract.check_range(op, "max_abs", max_abs, or_nan=True)


def quantize_e4m3(
    w: Tensor, amax: float | Tensor, scale: float | Tensor, *, backend: str | None = None
) -> Tensor:
    """Round each weight to its nearest E4M3 codepoint after clipping to +-amax. Exact.

    code = encode(clip(float32(w), +-amax) / scale); the division is IEEE float32, ties go to the
    even code, magnitudes above 448 saturate, NaN becomes 0x7F plus its sign. amax 0 leaves the sign
    bit.

    Args:
        w: floating point, any shape.
        amax: largest magnitude kept, >= 0; a number, float32 [] or one per row of axis 0.
        scale: real = code value * scale, > 0; a number, float32 [] or one per row of axis 0.
    Returns:
        uint8 codepoints, shape of w.
    Raises:
        InputError: another dtype or shape, or a number that is out of range (tensors on an
            accelerator are not looked at).
    Source: OCP 8-bit Floating Point Specification 1.0, section 5 (E4M3).
    """
    op = "quantize_e4m3"
    contract.check_dtype(op, "w", w, FLOATS)
    rows = w.shape[0] if w.dim() else 1
    amax = contract.row_values(op, "amax", amax, rows, w.device)
    scale = contract.row_values(op, "scale", scale, rows, w.device)
    if w.numel() == 0:
        return torch.zeros(w.shape, dtype=torch.uint8, device=w.device)
    result: Tensor = _run(op, backend, w.device, w.detach().contiguous(), amax, scale)
    return result


def dequantize_e4m3(
    codes: Tensor,
    scale: float | Tensor,
    dtype: torch.dtype = torch.float32,
    *,
    backend: str | None = None,
) -> Tensor:
    """Value of each codepoint times its scale. Exact.

    float32(value) * float32(scale), rounded to float32, then to dtype.

    Args:
        codes: uint8 or float8_e4m3fn, any shape.
        scale: > 0; a number, float32 [] or one per row of axis 0.
        dtype: floating point dtype of the result.
    Returns:
        dtype, shape of codes; 0x7F and 0xFF give NaN.
    Raises:
        InputError: another dtype or shape, or a number that is out of range.
    """
    op = "dequantize_e4m3"
    plain = contract.codes_of(op, "codes", codes)
    rows = codes.shape[0] if codes.dim() else 1
    scale = contract.row_values(op, "scale", scale, rows, codes.device)
    if dtype not in FLOATS:
        raise InputError(f"{op}: dtype is {dtype}; it must be float16, bfloat16 or float32.")
    if codes.numel() == 0:
        return torch.zeros(codes.shape, dtype=dtype, device=codes.device)
    result: Tensor = _run(op, backend, codes.device, plain, scale, dtype)
    return result


def gram(
    x: Tensor,
    accumulator: Tensor,
    *,
    kernel_size: Pair | None = None,
    stride: Pair = 1,
    padding: Pair = 0,
    dilation: Pair = 1,
    backend: str | None = None,
) -> Tensor:
    """Add the products of a layer's input columns: accumulator[b] += X_b^T X_b.

    X [rows, n] has one row per output position and the columns of the layer's weight in their
    order: x itself for a Linear, its patches (c, kh, kw) for a convolution, zeros where they reach
    into the padding. Columns are cut into the accumulator's equal blocks: one block is the full
    Gram matrix, G blocks fit a convolution of G groups, more make it block-diagonal. If a value is
    not finite or above 2**40 in magnitude, nothing is added.

    Products of 16-bit inputs are exact before they are added, in the accumulator's dtype or better;
    entry (i, j) is off by at most (rows + 1) * u * sum |x_i x_j|. Both triangles are written.

    Args:
        x: floating point, [..., n] for a Linear, [B, C, H, W] or [C, H, W] for a convolution.
        accumulator: float32 or float64 [blocks, n / blocks, n / blocks], contiguous, changed in
            place.
        kernel_size: of the convolution; None for a Linear.
        stride: of the convolution.
        padding: of the convolution, zeros on both sides; other modes: pad x before.
        dilation: of the convolution.
    Returns:
        int64 []: rows added, 0 where nothing was; no wait for the device.
    Raises:
        InputError: another dtype or shape, or several devices.
    Source: Frantar et al., GPTQ, arXiv:2210.17323 (H = E[x x^T]).
    """
    op = "gram"
    contract.check_dtype(op, "x", x, FLOATS)
    contract.check_not_empty(op, "x", x)
    contract.check_dtype(op, "accumulator", accumulator, (torch.float32, torch.float64))
    device = contract.check_devices(op, x=x, accumulator=accumulator)
    kernel = None
    columns = x.shape[-1] if x.dim() else 0
    if kernel_size is not None:
        kernel = contract.pair(op, "kernel_size", kernel_size, 1)
        x = contract.images(op, x)
        columns = x.shape[1] * kernel[0] * kernel[1]
    blocks = accumulator.shape[0] if accumulator.dim() == 3 else 1
    width = columns // max(1, blocks)
    if blocks * width != columns or not accumulator.is_contiguous():
        raise InputError(
            f"{op}: accumulator {list(accumulator.shape)} must be contiguous and have blocks that "
            f"divide the {columns} columns of the layer's weight."
        )
    shape = [blocks, width, width]
    contract.check_shape(op, "accumulator", accumulator, shape, f"a weight of {columns} columns")
    size, taps = ((1, 1), (1, 1)) if kernel is None else (x.shape[2:], kernel)
    geometry = contract.geometry(op, size, taps, stride, padding, dilation)
    result: Tensor = _run(op, backend, device, x.detach(), accumulator, kernel, *geometry)
    return result


def round_compensated(
    w: Tensor, upper: Tensor, scale: float | Tensor, order: Tensor, *, backend: str | None = None
) -> Tensor:
    """Round a weight column by column, each error spread over the columns to come. Exact.

    v = float64(w)[:, order]. For k = 0 ... n - 1: code_k = encode(float32(v_k) / scale),
    q_k = decode(code_k) * scale in float32, e = (v_k - q_k) / U_kk, and v_l -= e * U_kl for all
    l > k. Product and difference are float64 operations rounded separately (no fused multiply-add),
    and v_l loses its terms in the order of k; blocking may change the traffic, not this order.
    Codes return to the columns they came from.

    Args:
        w: floating point [O, ...] with n elements a row, finite.
        upper: float64 [n, n], upper Cholesky factor of the inverse damped Gram matrix, rows and
            columns permuted by order; entries below the diagonal are not read. The diagonal is > 0.
        scale: > 0; a number, float32 [] or one per row.
        order: int64 [n], a permutation: order[k] is the k-th column to be rounded.
    Returns:
        uint8 codepoints, shape of w.
    Raises:
        InputError: another dtype or shape, or order is no permutation.
    Source: Frantar et al., GPTQ, arXiv:2210.17323, on the E4M3 codepoints.
    """
    op = "round_compensated"
    contract.check_dtype(op, "w", w, FLOATS)
    contract.check_not_empty(op, "w", w)
    contract.check_dtype(op, "upper", upper, (torch.float64,))
    contract.check_dtype(op, "order", order, (torch.int64,))
    device = contract.check_devices(op, w=w, upper=upper, order=order)
    rows = w.shape[0] if w.dim() else 1
    columns = w.numel() // rows
    why = f"w {list(w.shape)}"
    contract.check_shape(op, "upper", upper, [columns, columns], why)
    contract.check_shape(op, "order", order, [columns], why)
    if not torch.equal(order.sort().values, torch.arange(columns, device=device)):
        raise InputError(f"{op}: order must hold each of the {columns} column numbers once.")
    scale = contract.row_values(op, "scale", scale, rows, device)
    args = w.detach().contiguous(), upper.contiguous(), scale, order.contiguous()
    result: Tensor = _run(op, backend, device, *args)
    return result


def sweep_codes(
    slope: Tensor,
    codes: Tensor,
    second: Tensor,
    scale: float | Tensor,
    *,
    backend: str | None = None,
) -> Tensor:
    """Choose the codes of some columns anew, one after the other, for a quadratic error. Exact.

    With d = w - q and slopes H d, sum_o d_o^T H d_o is a parabola of each q_k, least at
    best = q_k + slope_k / H_kk. For k = 0 ... B - 1: code = encode(best / scale); its value v =
    decode(code) * scale takes the place of q_k where |v - best| < |q_k - best|. Then slope_l -=
    H_kl * step_k for all l of the block, step_k = v - q_k, or 0 where q_k stays. All in float32,
    each operation rounded by itself (no fused multiply-add), the terms in the order of k. Where
    best is NaN nothing changes.

    Args:
        slope: float32 [B, O], contiguous, B at most 64; changed in place. Rows are columns of the
            weight.
        codes: uint8 [B, O], contiguous; changed in place.
        second: float32 [B, B], H of these columns, damped where it is to be. The diagonal is > 0.
        scale: > 0; a number, float32 [] or one per column of codes.
    Returns:
        The steps, float32 [B, O]: slopes of columns outside the block fall by H^T steps.
    Raises:
        InputError: another dtype or shape, too many columns, or a tensor to change that is not
            contiguous.
    """
    op = "sweep_codes"
    contract.check_dtype(op, "slope", slope, (torch.float32,))
    contract.check_dtype(op, "codes", codes, (torch.uint8,))
    contract.check_dtype(op, "second", second, (torch.float32,))
    contract.check_not_empty(op, "slope", slope)
    device = contract.check_devices(op, slope=slope, codes=codes, second=second)
    if slope.dim() != 2 or len(slope) > contract.MAX_SWEPT:
        raise InputError(
            f"{op}: slope has shape {list(slope.shape)}; [B, O] with B at most "
            f"{contract.MAX_SWEPT} is needed."
        )
    why = f"slope {list(slope.shape)}"
    contract.check_shape(op, "codes", codes, slope.shape, why)
    contract.check_shape(op, "second", second, [len(slope)] * 2, why)
    contract.check_contiguous(op, "slope", slope)
    contract.check_contiguous(op, "codes", codes)
    scale = contract.row_values(op, "scale", scale, slope.shape[1], device)
    args = slope.detach(), codes, second.detach().contiguous(), scale
    result: Tensor = _run(op, backend, device, *args)
    return result


def scaled_matmul(
    x: Tensor,
    codes: Tensor,
    scale: float | Tensor,
    bias: Tensor | None = None,
    *,
    input_scale: float | Tensor | None = None,
    compute: str = "auto",
    activation: str | None = None,
    backend: str | None = None,
) -> Tensor:
    """Linear layer on FP8 weights: y = activation((x' W^T) * scale + bias).

    W = decode(codes). For compute fp32, bf16 and fp16, x' is x rounded to that dtype. For fp8, x'
    is decode(encode(x / s)) * s, with s = input_scale, or where None one s per row of x, its
    float32(max|x| / 448), 1 where that is 0. Products are summed in float32 or better, scale, bias
    and activation applied in float32, and the result is rounded once to x's dtype. Before that
    rounding and the activation it is off by at most (I + 8) * u * (sum |x' W| * scale + |bias|);
    with compute fp8 on GPUs that multiply FP8, whose units keep fewer bits of a sum, by 2^-12 of
    that sum more. CPUs that multiply bfloat16 take its subnormals for 0.

    Args:
        x: floating point [..., I].
        codes: uint8 or float8_e4m3fn [O, I].
        scale: > 0; a number, float32 [] or [O].
        bias: floating point [O].
        input_scale: static scale of the activations for compute fp8; a number or float32 [].
        compute: fp32, bf16, fp16, fp8; auto is the dtype of x.
        activation: None, gelu (exact), gelu_tanh or silu.
    Returns:
        dtype of x, [..., O].
    Raises:
        InputError: another dtype, shape or name, several devices, or input_scale without fp8.
    """
    op = "scaled_matmul"
    _, inputs = codes.shape if codes.dim() == 2 else (0, 0)
    if codes.dim() != 2 or x.dim() == 0 or x.shape[-1] != inputs:
        raise InputError(
            f"{op}: x {list(x.shape)} and codes {list(codes.shape)} do not fit; codes must be "
            "[O, I] and x [..., I]."
        )
    args = contract.layer_arguments(op, x, codes, scale, bias, input_scale, compute, activation)
    if x.numel() == 0:
        return x.new_zeros(*x.shape[:-1], len(codes))
    result: Tensor = _run(op, backend, x.device, x.detach(), *args)
    return result


def scaled_conv2d(
    x: Tensor,
    codes: Tensor,
    scale: float | Tensor,
    bias: Tensor | None = None,
    *,
    stride: Pair = 1,
    padding: Pair = 0,
    dilation: Pair = 1,
    groups: int = 1,
    input_scale: float | Tensor | None = None,
    compute: str = "auto",
    activation: str | None = None,
    backend: str | None = None,
) -> Tensor:
    """Convolution on FP8 weights: y = activation(conv2d(x', W) * scale + bias).

    As `scaled_matmul`, with I replaced by the size of a patch, C / groups * kh * kw; where compute
    is fp8 and input_scale None there is one s per image.

    Args:
        x: floating point [B, C, H, W] or [C, H, W].
        codes: uint8 or float8_e4m3fn [O, C / groups, kh, kw].
        scale: > 0; a number, float32 [] or [O].
        bias: floating point [O].
        stride: of the convolution.
        padding: zeros on both sides; other modes: pad x before.
        dilation: of the convolution.
        groups: of the convolution.
        input_scale: static scale of the activations for compute fp8; a number or float32 [].
        compute: fp32, bf16, fp16, fp8; auto is the dtype of x.
        activation: None, gelu (exact), gelu_tanh or silu.
    Returns:
        dtype of x, [B, O, H', W'] or [O, H', W'].
    Raises:
        InputError: another dtype, shape or name, several devices, or input_scale without fp8.
    """
    op = "scaled_conv2d"
    images = contract.images(op, x)
    contract.check_not_empty(op, "x", x)
    contract.check_count(op, "groups", groups, 1, images.shape[1])
    fits = codes.dim() == 4 and images.shape[1] == codes.shape[1] * groups
    if not fits or codes.shape[0] % groups:
        raise InputError(
            f"{op}: x {list(x.shape)}, codes {list(codes.shape)} and groups {groups} do not fit; "
            "codes must be [O, C / groups, kh, kw] and x [B, C, H, W] or [C, H, W]."
        )
    args = contract.layer_arguments(op, x, codes, scale, bias, input_scale, compute, activation)
    geometry = contract.geometry(op, images.shape[2:], codes.shape[2:], stride, padding, dilation)
    result: Tensor = _run(
        op, backend, x.device, images.detach(), *args[:3], *geometry, groups, *args[3:]
    )
    return result if x.dim() == 4 else result.squeeze(0)
