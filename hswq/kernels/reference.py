"""The contract in plain torch: what every other backend must equal.

Exact ops, and the sums of the monitor, use only integer sums and single IEEE operations per
element, whose bits depend neither on the number of threads nor on the instruction set: torch's own
float sums depend on both. Two of its shortcuts are avoided on purpose: number / tensor multiplies
by a reciprocal, and so does tensor / number on CUDA, so both operands of a division are tensors.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import numpy
import torch
from torch import Tensor
from torch.nn import functional

from hswq.formats.e4m3 import E4M3_MAX, decode, e4m3_magnitudes, encode
from hswq.kernels.contract import COMPUTE
from hswq.kernels.fixed_point import (
    ABS_MEAN_BITS,
    ABS_MEAN_LIMIT,
    MEAN_LIMIT,
    MonitorAccumulators,
    to_fixed,
    to_pair,
)

# Elements worked on at once: keeps temporaries below 100 MB and mostly in cache.
_CHUNK = 1 << 20
# Sums that `moments` keeps side by side, in cache.
_LANES = 1 << 16
_MAGNITUDE_PATTERNS = 1 << 15
_FLOAT32_MAX = torch.finfo(torch.float32).max


def unusable_reason() -> str | None:
    """Return None: plain torch runs wherever torch does."""
    return None


def moments(y: Tensor) -> Tensor:
    y = y.reshape(-1)
    lanes = torch.zeros(2, min(_LANES, y.numel()), dtype=torch.float64, device=y.device)
    for part in torch.split(y, _LANES):
        values = part.double()
        lanes[0, : len(part)] += values
        lanes[1, : len(part)] += values * values
    count = torch.full((1,), y.numel(), dtype=torch.float64, device=y.device)
    return torch.cat((count, tree_sum(lanes)))


def channel_abs_mean(x: Tensor, dim: int) -> Tensor:
    channels, inner = x.shape[dim], x.shape[dim + 1 :].numel() if dim < -1 else 1
    x = x.reshape(-1, channels, inner) if x.numel() else x.reshape(0, channels, 1)
    parts = list(_row_chunks(x))
    rows = len(x[parts[0]]) if parts else 0
    lanes = torch.zeros(rows, *x.shape[1:], dtype=torch.float64, device=x.device)
    for part in parts:
        values = x[part].abs().double()
        lanes[: len(values)] += values
    total = tree_sum(lanes.movedim(1, 0).flatten(1))
    # 0 / 0 for an empty tensor: NaN, which a monitor counts as a skipped call.
    return total / torch.full_like(total, x.shape[0] * x.shape[2])


def monitor(
    x: Tensor, y: Tensor, dim: int, accumulators: MonitorAccumulators, abs_mean: Tensor | None
) -> Tensor:
    if abs_mean is None:
        abs_mean = channel_abs_mean(x, dim)
    count, *sums = moments(y).unbind()
    means = torch.stack(sums) / count
    # A comparison with NaN is false, so this finds NaN, Inf and values out of range.
    counted = (means.abs() <= MEAN_LIMIT).all() & (abs_mean <= ABS_MEAN_LIMIT).all()
    mean_y, mean_y2 = to_pair(torch.where(counted, means, 0.0)).unbind()
    accumulators.calls.add_(counted)
    accumulators.skipped.add_(~counted)
    accumulators.mean_y.add_(mean_y)
    accumulators.mean_y2.add_(mean_y2)
    accumulators.abs_mean.add_(to_fixed(torch.where(counted, abs_mean, 0.0), ABS_MEAN_BITS))
    return abs_mean


def weighted_histogram(w: Tensor, importance: Tensor | None, bins: int) -> tuple[Tensor, Tensor]:
    pieces: Iterable[tuple[Tensor, Tensor]]
    if w.dtype == torch.float32:
        parts = torch.split(w.reshape(-1), _CHUNK)
        largest = torch.stack([part.abs().amax() for part in parts]).amax()
        pieces = ((part.abs(), weights) for part, weights in _weighted_chunks(w, importance))
    else:
        magnitudes, sums, largest = _magnitude_histogram(w, importance)
        pieces = [(magnitudes, sums)]
    finite = torch.isfinite(largest)
    safe_largest = torch.where(finite, largest, 0.0)
    hist = torch.zeros(bins, dtype=torch.int64, device=w.device)
    for part, weights in pieces:
        hist.index_add_(0, _bin_index(part, safe_largest, bins), weights)
    normalised = hist.double() / hist.sum().double()
    return torch.where(finite, normalised, torch.nan), torch.where(finite, largest, torch.nan)


def _magnitude_histogram(w: Tensor, importance: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """Sum the weights of each of the 2**15 magnitudes that a 16-bit float can have.

    Returns:
        The magnitudes in float32 (Inf and NaN among them), their int64 sums, and the largest
        magnitude that occurs.
    """
    sums = torch.zeros(_MAGNITUDE_PATTERNS, dtype=torch.int64, device=w.device)
    tops = []
    for part, weights in _weighted_chunks(w, importance):
        patterns = (part.view(torch.int16) & 0x7FFF).int()
        sums.index_add_(0, patterns, weights)
        tops.append(patterns.amax())
    # Patterns rise with the magnitudes, and NaN come last.
    magnitudes = torch.arange(_MAGNITUDE_PATTERNS, dtype=torch.int16, device=w.device)
    magnitudes = magnitudes.view(w.dtype).float()
    return magnitudes, sums, magnitudes.take(torch.stack(tops).amax().long())


def _weighted_chunks(w: Tensor, importance: Tensor | None) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield flat pieces of w [O, I, K] with the integer weight of each element."""
    if importance is None:
        one = torch.ones(1, dtype=torch.int64, device=w.device)
        for part in torch.split(w.reshape(-1), _CHUNK):
            yield part, one.expand(part.numel())
        return
    _, columns, kernel = w.shape
    for rows, weights in zip(w.chunk(len(importance)), importance, strict=True):
        weights_of_row = weights[:, None].expand(columns, kernel).reshape(1, -1)
        for some in _row_chunks(rows):
            piece = rows[some]
            yield piece.reshape(-1), weights_of_row.expand(len(piece), -1).reshape(-1)


def _bin_index(magnitudes: Tensor, largest: Tensor, bins: int) -> Tensor:
    """Return floor(|w| / float32(max / bins)), at most bins - 1; 0 / 0 is 0."""
    width = (largest.double() / torch.full_like(largest, bins, dtype=torch.float64)).float()
    ratio = (magnitudes / width).clamp(max=bins - 1)
    return torch.where(magnitudes > 0.0, ratio, 0.0).int()


def clip_mse(hist: Tensor, max_abs: Tensor, candidates: Tensor, scaled: bool) -> Tensor:
    largest = float(max_abs)
    if largest == 0.0:
        return torch.zeros(candidates.shape, dtype=torch.float64, device=candidates.device)
    centres = bin_centres(largest, hist.numel())
    errors = _direct_errors(hist.cpu(), centres, candidates.cpu().double(), scaled)
    return errors.to(candidates.device)


def search_amax(
    hists: Tensor, max_abs: Tensor, scaled: bool, candidates: int, refinements: int
) -> tuple[Tensor, Tensor]:
    found = [
        _search_layer(hist, largest, scaled, candidates, refinements)
        for hist, largest in zip(hists.cpu(), max_abs.tolist(), strict=True)
    ]
    amax, mse = zip(*found, strict=True)
    return (
        torch.tensor(amax, dtype=torch.float32, device=hists.device),
        torch.tensor(mse, dtype=torch.float64, device=hists.device),
    )


def _search_layer(
    hist: Tensor, largest: float, scaled: bool, candidates: int, refinements: int
) -> tuple[float, float]:
    if largest == 0.0 or not math.isfinite(largest):
        return (0.0, 0.0) if largest == 0.0 else (math.nan, math.nan)
    centres = bin_centres(largest, hist.numel())
    steps = torch.arange(candidates, dtype=torch.float64, device="cpu")
    best_amax, best_mse = math.nan, math.inf
    low, high = 0.5 * largest, largest
    for _ in range(refinements + 1):
        amax = (low + steps * ((high - low) / (candidates - 1))).float().double()
        errors = (_scaled_errors if scaled else _unscaled_errors)(hist, centres, amax)
        # argmin takes the first of equal minima; later stages win only when strictly better.
        index = int(errors.argmin())
        if float(errors[index]) < best_mse:
            best_amax, best_mse = float(amax[index]), float(errors[index])
        width = (high - low) / 4
        low = max(0.1 * largest, best_amax - width)
        high = min(1.2 * largest, best_amax + width, _FLOAT32_MAX)
    # Only a histogram that holds NaN or Inf beats no candidate.
    return (best_amax, best_mse) if math.isfinite(best_mse) else (math.nan, math.nan)


def _unscaled_errors(hist: Tensor, centres: Tensor, amax: Tensor) -> Tensor:
    """Return the objective of V1 for every candidate.

    q = round(min(x, amax)), so candidates that round to one codepoint round every bin alike, and
    the few distinct ones are evaluated directly.
    """
    _, midpoints = _rounding_tables()
    codes = torch.searchsorted(midpoints, amax.clamp(max=E4M3_MAX))
    distinct, group = torch.unique(codes, return_inverse=True)
    clips = e4m3_magnitudes()[distinct]
    return _direct_errors(hist, centres, clips, scaled=False)[group]


def _scaled_errors(hist: Tensor, centres: Tensor, amax: Tensor) -> Tensor:
    """Return the objective of V2 for candidates that can be the best, infinity for the others.

    Ranking: with s = 448 / amax, codepoints g_k, midpoints m_k between g_{k-1} and g_k, and suffix
    sums S_p(k) = sum of H x^p over the bins with x > m_k / s,
      R = S_2(all) + sum_k (g_k^2 - g_{k-1}^2) / s^2 * S_0(k) - 2 * (g_k - g_{k-1}) / s * S_1(k).
    Each sum has only terms >= 0. With n bins a term passes at most n - 1 additions in its suffix
    sum, 126 in the sum over k and under 10 further roundings, so it is off by at most (n + 140) u
    of itself, u = 2**-53, and their totals are E[q^2], 2 E[q x] and E[x^2]. Since rounding at most
    doubles a value, q <= 2 x, R is off by at most 9 (n + 140) u E[x^2]. The first bin above a
    midpoint comes from a division, so a bin whose x is within 8 u x of the midpoint may be counted
    on the other side, where its error differs by at most 32 u x^2. The direct sum itself is off by
    less than (log2(n) + 12) u E[x^2]. All together stay below the 10 (n + 160) u E[x^2] used here,
    and a candidate whose R is more than twice that above the least R cannot have the least direct
    sum.
    """
    magnitudes, midpoints = _rounding_tables()
    scale = torch.full_like(amax, E4M3_MAX) / amax
    suffix_sums = torch.stack((hist, hist * centres, hist * centres * centres))
    suffix_sums = functional.pad(suffix_sums.flip(-1).cumsum(-1).flip(-1), (0, 1))
    width = 2 * centres[0]
    first_bins = torch.floor(midpoints / (scale[:, None] * width) + 0.5).clamp(max=hist.numel())
    masses, moments_x, _ = suffix_sums.index_select(1, first_bins.long().reshape(-1)).reshape(
        3, *first_bins.shape
    )
    squares = masses @ (magnitudes * magnitudes).diff() / (scale * scale)
    products = moments_x @ magnitudes.diff() / scale
    energy = suffix_sums[2, 0]
    ranked = squares - 2 * products + energy

    bound = 10 * (hist.numel() + 160) * 2.0**-53 * energy
    near = (ranked <= ranked.min() + 2 * bound).nonzero().squeeze(1)
    errors = torch.full_like(amax, torch.inf)
    errors[near] = _direct_errors(hist, centres, amax[near], scaled=True)
    return errors


def _direct_errors(hist: Tensor, centres: Tensor, amax: Tensor, scaled: bool) -> Tensor:
    """Return J = sum H (q - x)^2 of each candidate, every bin rounded by itself."""
    magnitudes, midpoints = _rounding_tables()
    errors = []
    for some in torch.split(amax, max(1, _CHUNK // hist.numel())):
        if scaled:
            scale = (torch.full_like(some, E4M3_MAX) / some)[:, None]
            clipped = (centres * scale).clamp(max=E4M3_MAX)
            rounded = magnitudes[torch.searchsorted(midpoints, clipped)] / scale
        else:
            clipped = torch.minimum(centres, some[:, None].clamp(max=E4M3_MAX))
            rounded = magnitudes[torch.searchsorted(midpoints, clipped)]
        difference = rounded - centres
        errors.append(tree_sum(hist * (difference * difference)))
    return torch.cat(errors)


def tree_sum(values: Tensor) -> Tensor:
    """Sum the last axis in the order that every backend reproduces bit for bit.

    Padded with zeros to a power of two; then the upper half is added to the lower until one value
    is left.

    Args:
        values: [..., n], n >= 1; float64 where the order matters, since all backends sum in it.
    Returns:
        [...], of the same dtype.
    """
    size = 1 << (values.shape[-1] - 1).bit_length()
    if size > values.shape[-1]:
        values = functional.pad(values, (0, size - values.shape[-1]))
    # Equal sums from both libraries; numpy's small operations take a fifth of the time of torch's.
    quick = type(values) is Tensor and values.dtype == torch.float64 and values.device.type == "cpu"
    lanes: Any = values.detach().resolve_neg().numpy() if quick else values
    # NaN and Inf propagate, as in torch without a warning.
    with numpy.errstate(all="ignore"):
        while size > 1:
            size //= 2
            lanes = lanes[..., :size] + lanes[..., size:]
    return torch.as_tensor(lanes[..., 0], device=values.device)


def bin_centres(largest: float, bins: int) -> Tensor:
    """Return (b + 0.5) * (largest / bins), float64 [bins] on the CPU."""
    return (torch.arange(bins, dtype=torch.float64, device="cpu") + 0.5) * (largest / bins)


@functools.cache
def _rounding_tables() -> tuple[Tensor, Tensor]:
    """Return the 127 magnitudes and the 126 midpoints between them, both exact in float64.

    searchsorted on the midpoints counts those below a value: nearest, ties to the smaller.
    """
    magnitudes = e4m3_magnitudes()
    return magnitudes, (magnitudes[1:] + magnitudes[:-1]) / 2


def quantize_e4m3(w: Tensor, amax: Tensor, scale: Tensor) -> Tensor:
    rows = w.reshape(-1, 1) if amax.dim() == scale.dim() == 0 else w.reshape(len(w), -1)
    codes = torch.empty(rows.shape, dtype=torch.uint8, device=w.device)
    for part in _row_chunks(rows):
        values, limit = rows[part].float(), _rows_of(amax, part)
        # Not clamp(): with amax 0 it may return either zero, and the sign must survive.
        clipped = torch.where(values.abs() > limit, torch.copysign(limit, values), values)
        encoded = encode(clipped / _rows_of(scale, part))
        # Torch widens some float16 NaN without their sign.
        nan_codes = torch.where(_sign_bit(rows[part]), 0xFF, 0x7F).to(torch.uint8)
        codes[part] = torch.where(values.isnan(), nan_codes, encoded)
    return codes.reshape(w.shape)


def _sign_bit(values: Tensor) -> Tensor:
    bits = torch.int32 if values.dtype == torch.float32 else torch.int16
    return values.view(bits) < 0


def dequantize_e4m3(codes: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    rows = codes.reshape(-1, 1) if scale.dim() == 0 else codes.reshape(len(codes), -1)
    values = torch.empty(rows.shape, dtype=dtype, device=codes.device)
    for part in _row_chunks(rows):
        values[part] = (decode(rows[part]) * _rows_of(scale, part)).to(dtype)
    return values.reshape(codes.shape)


def _row_chunks(rows: Tensor) -> Iterator[slice]:
    """Yield slices of the first axis with about _CHUNK elements each."""
    step = max(1, _CHUNK // max(1, rows.shape[1:].numel()))
    for start in range(0, len(rows), step):
        yield slice(start, start + step)


def _rows_of(value: Tensor, part: slice) -> Tensor:
    """Return a value of the whole tensor as it is, and a value per row as a column of the part."""
    return value if value.dim() == 0 else value[part, None]


def gram(
    x: Tensor,
    accumulator: Tensor,
    kernel_size: tuple[int, int] | None,
    stride: tuple[int, int],
    padding: tuple[int, int],
    dilation: tuple[int, int],
) -> Tensor:
    # In float32: compared with float16, the limit would itself be infinite.
    counted = (x.abs().float() <= MEAN_LIMIT).all()
    x = torch.where(counted, x, 0.0).to(accumulator.dtype)
    pieces: Iterable[Tensor]
    if kernel_size is None:
        columns = x.shape[-1]
        pieces = torch.split(x.reshape(-1, columns), max(1, _CHUNK // columns))
    else:
        # One image at a time: unfolding multiplies its size by that of the kernel.
        images = torch.split(x, 1)
        unfolded = (functional.unfold(im, kernel_size, dilation, padding, stride) for im in images)
        pieces = (columns_by_rows[0].T for columns_by_rows in unfolded)
    blocks, width, _ = accumulator.shape
    rows = 0
    for piece in pieces:
        rows += len(piece)
        by_block = piece.reshape(-1, blocks, width).movedim(1, 0)
        accumulator.baddbmm_(by_block.mT, by_block)
    return counted * rows


def round_compensated(w: Tensor, upper: Tensor, scale: Tensor, order: Tensor) -> Tensor:
    rows = w.reshape(len(w), -1)
    codes = torch.empty(rows.shape, dtype=torch.uint8, device=w.device)
    # A few rows at a time stay in cache through all columns.
    step = max(1, (1 << 17) // rows.shape[1])
    for start in range(0, len(rows), step):
        part = slice(start, start + step)
        scale_of_rows = scale if scale.dim() == 0 else scale[part]
        rest = rows[part].index_select(1, order).double()
        chosen = torch.empty(rest.shape, dtype=torch.uint8, device=w.device)
        for k in range(rows.shape[1]):
            column = encode(rest[:, k].float() / scale_of_rows)
            error = (rest[:, k] - (decode(column) * scale_of_rows).double()) / upper[k, k]
            # Product and difference are separate operations, each rounded once.
            rest[:, k + 1 :] -= error[:, None] * upper[k, k + 1 :]
            chosen[:, k] = column
        codes[part] = torch.empty_like(chosen).index_copy_(1, order, chosen)
    return codes.reshape(w.shape)


def sweep_codes(slope: Tensor, codes: Tensor, second: Tensor, scale: Tensor) -> Tensor:
    steps = torch.empty_like(slope)
    for k in range(len(slope)):
        value = decode(codes[k]) * scale
        best = value + slope[k] / second[k, k]
        code = encode(best / scale)
        other = decode(code) * scale
        nearer = (other - best).abs() < (value - best).abs()
        steps[k] = torch.where(nearer, other - value, 0.0)
        codes[k] = torch.where(nearer, code, codes[k])
        # Product and difference are separate operations, each rounded once.
        slope -= second[k, :, None] * steps[k]
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
    if compute == "fp8":
        values, input_scales = quantize_rows(rows, input_scale)
        product = functional.linear(values, decode(codes)) * input_scales
    else:
        # Products of 16-bit values and codepoints are exact in float32.
        product = functional.linear(rows.to(COMPUTE[compute]).float(), decode(codes))
    product = product * scale
    if bias is not None:
        product = product + bias.float()
    return activate(product, activation).to(x.dtype).reshape(*x.shape[:-1], len(codes))


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
    if compute == "fp8":
        images, input_scales = quantize_rows(x.reshape(len(x), -1), input_scale)
        values, input_scales = images.reshape(x.shape), input_scales[..., None, None]
    else:
        values, input_scales = x.to(COMPUTE[compute]).float(), None
    product = functional.conv2d(values, decode(codes), None, stride, padding, dilation, groups)
    if input_scales is not None:
        product = product * input_scales
    product = product * (scale if scale.dim() == 0 else scale[:, None, None])
    if bias is not None:
        product = product + bias.float()[:, None, None]
    return activate(product, activation).to(x.dtype)


def quantize_rows(rows: Tensor, input_scale: Tensor | None) -> tuple[Tensor, Tensor]:
    """Round activations for compute fp8.

    Returns:
        Codepoint values float32 [M, K] of the rows [M, K], and their scales [M, 1], or [1, 1] where
        input_scale is given.
    """
    rows = rows.float()
    if input_scale is None:
        largest = rows.abs().amax(1, keepdim=True)
        input_scales = largest / torch.full_like(largest, E4M3_MAX)
        input_scales = torch.where(input_scales > 0.0, input_scales, 1.0)
    else:
        input_scales = input_scale.reshape(1, 1)
    return decode(encode(rows / input_scales)), input_scales


def activate(values: Tensor, activation: str | None) -> Tensor:
    """Apply one of the contract's activation functions."""
    if activation is None:
        return values
    if activation == "silu":
        return functional.silu(values)
    return functional.gelu(values, approximate="tanh" if activation == "gelu_tanh" else "none")


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
