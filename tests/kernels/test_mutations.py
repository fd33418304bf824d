"""The suite itself: kernels with typical mistakes must fail it."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from hswq.formats.e4m3 import decode, encode
from hswq.kernels import fixed_point, reference
from tests.conftest import Backend
from tests.kernels import (
    cases,
    fake_backend,
    test_channel_abs_mean,
    test_clip_mse,
    test_dequantize_e4m3,
    test_gram,
    test_moments,
    test_monitor,
    test_quantize_e4m3,
    test_round_compensated,
    test_scaled_conv2d,
    test_scaled_matmul,
    test_search_amax,
    test_sweep_codes,
    test_weighted_histogram,
)

Kernel = Callable[..., Any]
Check = Callable[[Backend], None]


def columns(value: Tensor, w: Tensor) -> Tensor:
    return value if value.dim() == 0 else value.reshape(-1, *[1] * (w.dim() - 1))


def truncating_quantize(w: Tensor, amax: Tensor, scale: Tensor) -> Tensor:
    limit, divisor = columns(amax, w), columns(scale, w)
    values = torch.where(w.float().abs() > limit, torch.copysign(limit, w.float()), w.float())
    codes = encode(values / divisor)
    beyond = decode(codes).abs() > (values / divisor).abs()
    return torch.where(beyond, codes - 1, codes)


def reciprocal_quantize(w: Tensor, amax: Tensor, scale: Tensor) -> Tensor:
    limit = columns(amax, w)
    values = torch.where(w.float().abs() > limit, torch.copysign(limit, w.float()), w.float())
    return encode(values * (1 / columns(scale, w)))


def unclipped_quantize(w: Tensor, amax: Tensor, scale: Tensor) -> Tensor:
    return encode(w.float() / columns(scale, w))


def overflowing_quantize(w: Tensor, amax: Tensor, scale: Tensor) -> Tensor:
    codes = reference.quantize_e4m3(w, amax, scale)
    return torch.where(w.float().abs() / columns(scale, w) > 464, codes | 0x7F, codes)


def tailless_quantize(w: Tensor, amax: Tensor, scale: Tensor) -> Tensor:
    codes = reference.quantize_e4m3(w, amax, scale)
    whole = codes.numel() // 16 * 16
    codes.reshape(-1)[whole:] = 0
    return codes


def half_dequantize(codes: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    return decode(codes).to(dtype) * columns(scale, codes).to(dtype)


def unweighted_histogram(w: Tensor, importance: Tensor | None, bins: int) -> tuple[Tensor, Tensor]:
    return reference.weighted_histogram(w, None, bins)


def tailless_histogram(w: Tensor, importance: Tensor | None, bins: int) -> tuple[Tensor, Tensor]:
    hist, max_abs = reference.weighted_histogram(w, importance, bins)
    if w.shape[0] > 1:
        hist, _ = reference.weighted_histogram(w[:-1].contiguous(), importance, bins)
    return hist, max_abs


def float_histogram(w: Tensor, importance: Tensor | None, bins: int) -> tuple[Tensor, Tensor]:
    """Sum importances in float32."""
    _, max_abs = reference.weighted_histogram(w, importance, bins)
    weights = torch.ones(1, w.shape[1]) if importance is None else importance.float()
    weights = weights.repeat_interleave(w.shape[0] // len(weights), 0)[:, :, None].expand(w.shape)
    index = reference._bin_index(w.float().abs(), max_abs, bins).reshape(-1)
    hist = torch.zeros(bins).index_add_(0, index, weights.reshape(-1)).double()
    return hist / hist.sum(), max_abs


def float64_index_histogram(
    w: Tensor, importance: Tensor | None, bins: int
) -> tuple[Tensor, Tensor]:
    """Divide in float64, so that weights at bin edges change their bin."""
    _, max_abs = reference.weighted_histogram(w, importance, bins)
    index = (w.double().abs() / (max_abs.double() / bins)).floor().clamp(max=bins - 1)
    hist = torch.bincount(index.long().reshape(-1), minlength=bins).double()
    return hist / hist.sum(), max_abs


def first_group_histogram(w: Tensor, importance: Tensor | None, bins: int) -> tuple[Tensor, Tensor]:
    first = None if importance is None else importance[:1]
    return reference.weighted_histogram(w, first, bins)


def search_with(**changes: Any) -> Kernel:
    """Return a search with other settings than asked for, or on other histograms."""

    def search(
        hists: Tensor, max_abs: Tensor, scaled: bool, candidates: int, refinements: int
    ) -> tuple[Tensor, Tensor]:
        refinements = max(0, refinements + changes.get("refinements", 0))
        candidates = max(2, candidates + changes.get("candidates", 0))
        amax, mse = reference.search_amax(hists, max_abs, scaled, candidates, refinements)
        if changes.get("float32"):
            mse = mse.float().double()
        return amax, mse

    return search


def even_ties_clip_mse(hist: Tensor, max_abs: Tensor, amax: Tensor, scaled: bool) -> Tensor:
    centres = reference.bin_centres(float(max_abs), hist.numel())
    clip = amax.double().clamp(max=448)[:, None]
    scale = (448 / clip) if scaled else torch.ones_like(clip)
    rounded = decode(encode((torch.minimum(centres, clip) * scale).float())).double() / scale
    return (hist * (rounded - centres) ** 2).sum(1)


def tailless_moments(y: Tensor) -> Tensor:
    return reference.moments(y.reshape(-1)[: y.numel() // 8 * 8]).index_fill(
        0, torch.tensor([0]), y.numel()
    )


def float32_moments(y: Tensor) -> Tensor:
    y = y.float()
    return torch.stack((torch.tensor(float(y.numel())), y.sum(), (y * y).sum())).double()


def axis_by_rank_abs_mean(x: Tensor, dim: int) -> Tensor:
    """Take the axis from the rank of the tensor instead of the layer, as the seed does."""
    return reference.channel_abs_mean(x, -3 if x.dim() == 4 else -1)


def signed_mean(x: Tensor, dim: int) -> Tensor:
    return x.double().movedim(dim, 0).reshape(x.shape[dim], -1).mean(1)


def monitor_that_counts_everything(
    x: Tensor,
    y: Tensor,
    dim: int,
    accumulators: fixed_point.MonitorAccumulators,
    abs_mean: Tensor | None,
) -> Tensor:
    return reference.monitor(x.nan_to_num(), y.nan_to_num(), dim, accumulators, abs_mean)


def monitor_that_reads_twice(
    x: Tensor,
    y: Tensor,
    dim: int,
    accumulators: fixed_point.MonitorAccumulators,
    abs_mean: Tensor | None,
) -> Tensor:
    return reference.monitor(x, y, dim, accumulators, None)


def monitor_that_waits(
    x: Tensor,
    y: Tensor,
    dim: int,
    accumulators: fixed_point.MonitorAccumulators,
    abs_mean: Tensor | None,
) -> Tensor:
    if not math.isfinite(float(y.sum())):
        accumulators.skipped.add_(1)
    return reference.monitor(x, y, dim, accumulators, abs_mean)


def gram_without_dilation(x: Tensor, accumulator: Tensor, *geometry: Any) -> Tensor:
    return reference.gram(x, accumulator, *geometry[:-1], (1, 1))


def gram_in_16_bits(x: Tensor, accumulator: Tensor, *geometry: Any) -> Tensor:
    return reference.gram(x.bfloat16(), accumulator, *geometry)


def gram_with_bad_values(x: Tensor, accumulator: Tensor, *geometry: Any) -> Tensor:
    return reference.gram(x.nan_to_num().clamp(-10, 10), accumulator, *geometry)


def uncompensated(w: Tensor, upper: Tensor, scale: Tensor, order: Tensor) -> Tensor:
    return encode(w.float() / columns(scale, w))


def compensated_in_order(w: Tensor, upper: Tensor, scale: Tensor, order: Tensor) -> Tensor:
    return reference.round_compensated(w, upper, scale, torch.arange(len(order)))


def compensated_with_fma(w: Tensor, upper: Tensor, scale: Tensor, order: Tensor) -> Tensor:
    """Keep the product's low bits in the subtraction, as a fused multiply-add does."""
    rest = w[:, order].double().numpy().astype(np.longdouble)
    factor = upper.numpy().astype(np.longdouble)
    codes = torch.zeros(w.shape, dtype=torch.uint8)
    for k, column in enumerate(order.tolist()):
        value = torch.from_numpy(rest[:, k].astype(np.float64))
        codes[:, column] = encode(value.float() / scale)
        nearest = (decode(codes[:, column]) * scale).double()
        error = ((value - nearest) / upper[k, k]).numpy().astype(np.longdouble)
        later = rest[:, k + 1 :] - error[:, None] * factor[k, k + 1 :]
        rest[:, k + 1 :] = later.astype(np.float64)
    return codes


def compensated_in_float32(w: Tensor, upper: Tensor, scale: Tensor, order: Tensor) -> Tensor:
    return reference.round_compensated(w, upper.float().double(), scale, order)


def swept_with_fma(slope: Tensor, codes: Tensor, second: Tensor, scale: Tensor) -> Tensor:
    """Keep the product's low bits in the subtraction, as a fused multiply-add does."""
    steps = torch.empty_like(slope)
    for k in range(len(slope)):
        own, row = slope[k : k + 1].clone(), codes[k : k + 1]
        steps[k] = reference.sweep_codes(own, row, second[k : k + 1, k : k + 1], scale)
        left = slope.double() - second[k, :, None].double() * steps[k].double()
        slope.copy_(left.float())
    return steps


def swept_backwards(slope: Tensor, codes: Tensor, second: Tensor, scale: Tensor) -> Tensor:
    flipped = slope.flip(0), codes.flip(0)
    steps = reference.sweep_codes(*flipped, second.flip((0, 1)).contiguous(), scale)
    slope.copy_(flipped[0].flip(0))
    codes.copy_(flipped[1].flip(0))
    return steps.flip(0)


def swept_to_equally_near_codes(
    slope: Tensor, codes: Tensor, second: Tensor, scale: Tensor
) -> Tensor:
    steps = torch.empty_like(slope)
    for k in range(len(slope)):
        value = decode(codes[k]) * scale
        codes[k] = encode((value + slope[k] / second[k, k]) / scale)
        steps[k] = decode(codes[k]) * scale - value
        slope -= second[k, :, None] * steps[k]
    return steps


def layer_with(kernel: Kernel, mistake: str) -> Kernel:
    """Return a layer that forgets something."""

    def layer(x: Tensor, codes: Tensor, scale: Tensor, bias: Tensor | None, *rest: Any) -> Tensor:
        if mistake == "bias":
            bias = None
        if mistake == "bf16 scale":
            scale = scale.bfloat16().float()
        if mistake == "bf16 sums":
            return kernel(x.bfloat16(), codes, scale, bias, *rest).to(x.dtype)
        if mistake == "first scale" and scale.dim() == 1:
            scale = scale[0]
        if mistake == "padding":
            rest = (rest[0], rest[1][::-1], *rest[2:])
        if mistake == "activation":
            rest = (*rest[:-1], "gelu" if rest[-1] == "gelu_tanh" else rest[-1])
        return kernel(x, codes, scale, bias, *rest)

    return layer


def checks(check: Callable[..., None], **arguments: Any) -> Check:
    return lambda backend: check(backend=backend, **arguments)


FLOAT16, BFLOAT16, FLOAT32 = cases.DTYPES
MUTANTS: list[tuple[str, Kernel, Check]] = [
    (
        "quantize_e4m3",
        truncating_quantize,
        checks(test_quantize_e4m3.test_odd_shapes_keep_every_element, dtype=BFLOAT16, shape=(127,)),
    ),
    (
        "quantize_e4m3",
        reciprocal_quantize,
        test_quantize_e4m3.test_scale_divides,
    ),
    (
        "quantize_e4m3",
        unclipped_quantize,
        test_quantize_e4m3.test_clip_keeps_values_at_amax,
    ),
    (
        "quantize_e4m3",
        overflowing_quantize,
        test_quantize_e4m3.test_overflow_saturates_and_nan_keeps_its_sign,
    ),
    (
        "quantize_e4m3",
        tailless_quantize,
        checks(test_quantize_e4m3.test_odd_shapes_keep_every_element, dtype=FLOAT16, shape=(3, 5)),
    ),
    (
        "dequantize_e4m3",
        half_dequantize,
        checks(test_dequantize_e4m3.test_all_codes_have_their_value, dtype=BFLOAT16, scale=0.0123),
    ),
    (
        "weighted_histogram",
        unweighted_histogram,
        checks(
            test_weighted_histogram.test_every_importance_is_summed_exactly,
            dtype=FLOAT16,
            kind="random",
        ),
    ),
    (
        "weighted_histogram",
        float_histogram,
        checks(
            test_weighted_histogram.test_every_importance_is_summed_exactly,
            dtype=FLOAT32,
            kind="wide",
        ),
    ),
    (
        "weighted_histogram",
        tailless_histogram,
        test_weighted_histogram.test_large_weights_lose_no_element,
    ),
    (
        "weighted_histogram",
        float64_index_histogram,
        test_weighted_histogram.test_bin_edges_follow_float32,
    ),
    (
        "weighted_histogram",
        first_group_histogram,
        checks(
            test_weighted_histogram.test_groups_of_rows_have_their_own_importance, dtype=FLOAT16
        ),
    ),
    (
        "search_amax",
        search_with(refinements=-1),
        checks(
            test_search_amax.test_search_equals_brute_force,
            scaled=True,
            kind="gaussian",
            max_abs=0.0847,
        ),
    ),
    (
        "search_amax",
        search_with(candidates=-1),
        checks(
            test_search_amax.test_search_equals_brute_force,
            scaled=True,
            kind="random",
            max_abs=1.0,
        ),
    ),
    (
        "search_amax",
        search_with(float32=True),
        checks(
            test_search_amax.test_search_equals_brute_force,
            scaled=True,
            kind="uniform",
            max_abs=37.7,
        ),
    ),
    ("clip_mse", even_ties_clip_mse, test_clip_mse.test_ties_go_to_the_smaller_magnitude),
    ("moments", tailless_moments, test_moments.test_every_element_counts_once),
    (
        "moments",
        float32_moments,
        checks(test_moments.test_sums_are_within_their_bound, dtype=FLOAT32, size=4097),
    ),
    (
        "channel_abs_mean",
        axis_by_rank_abs_mean,
        checks(
            test_channel_abs_mean.test_means_are_within_their_bound,
            dtype=FLOAT32,
            shape=(5, 7, 3),
            dim=-3,
        ),
    ),
    (
        "channel_abs_mean",
        signed_mean,
        checks(
            test_channel_abs_mean.test_means_are_within_their_bound,
            dtype=FLOAT32,
            shape=(37,),
            dim=-1,
        ),
    ),
    (
        "monitor",
        monitor_that_counts_everything,
        checks(
            test_monitor.test_bad_calls_are_counted_and_add_nothing, x_value=1.0, y_value=math.nan
        ),
    ),
    ("monitor", monitor_that_reads_twice, test_monitor.test_shared_input_is_reduced_once),
    ("monitor", monitor_that_waits, test_monitor.test_no_value_is_brought_to_the_host),
    (
        "gram",
        gram_without_dilation,
        checks(
            test_gram.test_convolutions_follow_their_geometry,
            kernel=(2, 3),
            stride=(2, 1),
            padding=(0, 2),
            dilation=(1, 2),
            blocks=1,
        ),
    ),
    (
        "gram",
        gram_in_16_bits,
        checks(
            test_gram.test_linear_inputs_are_within_their_bound,
            shape=(37, 12),
            blocks=3,
            dtype=FLOAT32,
            accumulator_dtype=torch.float32,
        ),
    ),
    (
        "gram",
        gram_with_bad_values,
        checks(test_gram.test_bad_calls_add_nothing, dtype=FLOAT32, value=math.nan),
    ),
    (
        "round_compensated",
        uncompensated,
        checks(
            test_round_compensated.test_every_code_equals_the_plain_loop,
            dtype=FLOAT32,
            shape=(5, 17),
        ),
    ),
    (
        "round_compensated",
        compensated_in_order,
        checks(
            test_round_compensated.test_every_code_equals_the_plain_loop,
            dtype=FLOAT32,
            shape=(5, 17),
        ),
    ),
    (
        "round_compensated",
        compensated_with_fma,
        test_round_compensated.test_product_and_difference_are_rounded_separately,
    ),
    (
        "round_compensated",
        compensated_in_float32,
        test_round_compensated.test_product_and_difference_are_rounded_separately,
    ),
    (
        "sweep_codes",
        swept_with_fma,
        test_sweep_codes.test_product_and_difference_are_rounded_separately,
    ),
    (
        "sweep_codes",
        swept_backwards,
        test_sweep_codes.test_terms_are_subtracted_in_the_order_of_columns,
    ),
    (
        "sweep_codes",
        swept_to_equally_near_codes,
        test_sweep_codes.test_equally_near_codes_stay,
    ),
    *(
        (
            "scaled_matmul",
            layer_with(reference.scaled_matmul, mistake),
            checks(
                test_scaled_matmul.test_outputs_are_within_their_bound,
                shape=(2, 5, 37),
                outputs=7,
                dtype=FLOAT32,
                compute="auto",
            ),
        )
        for mistake in ("bias", "bf16 scale", "bf16 sums")
    ),
    (
        "scaled_matmul",
        layer_with(reference.scaled_matmul, "first scale"),
        test_scaled_matmul.test_rows_of_the_weight_have_their_own_scale,
    ),
    (
        "scaled_matmul",
        layer_with(reference.scaled_matmul, "activation"),
        checks(test_scaled_matmul.test_activations_are_the_named_ones, activation="gelu_tanh"),
    ),
    (
        "scaled_conv2d",
        layer_with(reference.scaled_conv2d, "padding"),
        checks(
            test_scaled_conv2d.test_geometry_is_that_of_conv2d,
            kernel=(2, 3),
            stride=(2, 1),
            padding=(0, 2),
            dilation=(1, 2),
            groups=1,
        ),
    ),
    (
        "scaled_conv2d",
        layer_with(reference.scaled_conv2d, "first scale"),
        test_scaled_conv2d.test_scales_and_activation_are_applied,
    ),
]


@pytest.mark.parametrize("number", range(len(MUTANTS)))
def test_mistake_is_found(number: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """A check that a wrong kernel passes protects nothing."""
    op, mutant, check = MUTANTS[number]
    check(fake_backend.install(monkeypatch, {op: reference.OPS[op]}))
    with pytest.raises(AssertionError):
        check(fake_backend.install(monkeypatch, {op: mutant}))
