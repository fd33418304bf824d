"""Compensated rounding of one weight: the definition, and never worse than nearest."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from hswq import kernels
from hswq.calibration import Gram
from hswq.search.compensated import Factors, round_weight
from tests.conftest import Backend


def inputs(rows: int = 400, columns: int = 24, mean: float = 0.0) -> torch.Tensor:
    """Correlated inputs with different powers of their columns."""
    generator = torch.Generator().manual_seed(3)
    mix = torch.randn(columns, columns, generator=generator) + 2.0
    x = torch.randn(rows, columns, generator=generator) @ mix
    return x * torch.linspace(0.1, 2.0, columns) + mean


def gram_of(x: torch.Tensor, blocks: int = 1) -> Gram:
    parts = x.float().chunk(blocks, 1)
    matrix = torch.stack([part.T @ part for part in parts])
    return Gram(matrix, x.double().sum(0), len(x))


def weight(rows: int = 16, columns: int = 24, scale: float = 0.05) -> torch.Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(4)) * scale


def by_definition(w: torch.Tensor, second: np.ndarray, damping: float) -> torch.Tensor:
    """METHOD's text in numpy: H^-1 inverted in full, its upper Cholesky factor by numpy's own."""
    order = np.argsort(-np.diag(second), kind="stable")
    damped = second[np.ix_(order, order)] + damping * np.diag(second).mean() * np.eye(len(second))
    upper = np.linalg.cholesky(np.linalg.inv(damped)).T
    values = w.double().numpy()[:, order].copy()
    codes = np.zeros(values.shape, dtype=np.uint8)
    for k in range(len(second)):
        column = torch.from_numpy(values[:, k]).float()
        code = kernels.quantize_e4m3(column.contiguous(), 448.0, 1.0)
        rounded = kernels.dequantize_e4m3(code, 1.0).double().numpy()
        codes[:, k] = code.numpy()
        error = (values[:, k] - rounded) / upper[k, k]
        values[:, k + 1 :] -= np.outer(error, upper[k, k + 1 :])
    result = np.zeros_like(codes)
    result[:, order] = codes
    return torch.from_numpy(result)


def test_codes_are_those_of_the_definition():
    """A wrong factor, order or sign still gives codes that look right."""
    x, w = inputs(), weight()
    rounded = round_weight(w, Factors(gram_of(x), False, 0.01), 448.0, 1.0)
    second = gram_of(x).matrix[0].double().numpy() / len(x)
    expected = by_definition(w, second, 0.01)
    assert rounded.compensated
    # Factors by two ways agree to rounding: a value at the border of two codes may fall either way.
    assert float((rounded.codes != expected).double().mean()) < 0.01


@pytest.mark.parametrize(("amax", "scale"), [(448.0, 1.0), (0.2, 0.2 / 448)])
def test_errors_are_those_of_the_outputs(amax, scale):
    """What is compared and reported must be what the layer gives."""
    x, w = inputs(), weight()
    rounded = round_weight(w, Factors(gram_of(x), False, 0.01), amax, scale)

    def output_error(codes: torch.Tensor) -> float:
        delta = w.double() - kernels.dequantize_e4m3(codes, scale).double()
        return float((x.double() @ delta.T).square().mean(0).sum())

    nearest = kernels.quantize_e4m3(w, amax, scale)
    assert rounded.error == pytest.approx(output_error(rounded.codes), rel=1e-3)
    assert rounded.nearest_error == pytest.approx(output_error(nearest), rel=1e-3)
    assert rounded.power == pytest.approx(
        float((x @ w.T).double().square().mean(0).sum()), rel=1e-3
    )
    assert rounded.error < 0.5 * rounded.nearest_error


def test_correction_of_the_bias_takes_the_mean_error_away():
    """With it only the spread of the error is left, and the codes are chosen for that."""
    x, w = inputs(mean=5.0), weight()
    plain = round_weight(w, Factors(gram_of(x), False, 0.01), 448.0, 1.0)
    centred = round_weight(w, Factors(gram_of(x), True, 0.01), 448.0, 1.0)

    def left(rounded, corrected: bool) -> float:
        delta = w.double() - kernels.dequantize_e4m3(rounded.codes, 1.0).double()
        errors = x.double() @ delta.T
        if corrected:
            assert torch.allclose(rounded.shift, errors.mean(0), rtol=1e-4, atol=1e-9)
            errors = errors - rounded.shift
        return float(errors.square().mean(0).sum())

    assert left(centred, True) == pytest.approx(centred.error, rel=2e-2)
    assert left(centred, True) < left(plain, True) <= left(plain, False)


def test_never_worse_than_nearest_on_the_calibration():
    """Inputs without correlation leave nothing to compensate; V1's clip can make it worse."""
    generator = torch.Generator().manual_seed(0)
    worse = 0
    for number in range(30):
        x = torch.randn(200, 8, generator=generator)
        w = torch.randn(4, 8, generator=generator) * (400.0 if number % 3 == 0 else 0.02)
        rounded = round_weight(w, Factors(gram_of(x), False, 0.01), 448.0, 1.0)
        assert rounded.error <= rounded.nearest_error
        nearest = kernels.quantize_e4m3(w, 448.0, 1.0)
        worse += not rounded.compensated
        assert rounded.compensated or torch.equal(rounded.codes, nearest)
    assert worse > 0


def test_blocks_are_rounded_each_by_itself():
    """Weights beyond 8192 columns get one factor a block."""
    x, w = inputs(), weight()
    whole = round_weight(w, Factors(gram_of(x, blocks=3), False, 0.01), 448.0, 1.0)
    parts = [
        round_weight(part, Factors(gram_of(some), False, 0.01), 448.0, 1.0)
        for part, some in zip(w.chunk(3, 1), x.chunk(3, 1), strict=True)
    ]
    assert torch.equal(whole.codes, torch.cat([part.codes for part in parts], 1))
    assert whole.error == pytest.approx(sum(part.error for part in parts), rel=1e-5)


@pytest.mark.parametrize(
    ("gram", "problem"),
    [
        (Gram(torch.zeros(1, 24, 24), torch.zeros(24).double(), 0), "no call had finite inputs"),
        (Gram(torch.zeros(1, 24, 24), torch.zeros(24).double(), 9), "all zero or not finite"),
        (Gram(torch.eye(24)[None] * torch.inf, torch.zeros(24).double(), 9), "not finite"),
        (
            Gram(-torch.ones(1, 24, 24) + 1.5 * torch.eye(24), torch.zeros(24).double(), 9),
            "not pos",
        ),
    ],
)
def test_unusable_gram_falls_back_to_nearest(gram, problem):
    """One bad layer must not end an hour's run, nor pass unseen."""
    rounded = round_weight(weight(), Factors(gram, False, 0.01), 448.0, 1.0)
    assert problem in rounded.problem
    assert not rounded.compensated
    assert torch.equal(rounded.codes, kernels.quantize_e4m3(weight(), 448.0, 1.0))


def test_codes_do_not_depend_on_the_number_of_threads():
    """The bytes are the product."""
    x, w = inputs(columns=96), weight(columns=96)
    threads = torch.get_num_threads()
    found = []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            rounded = round_weight(w, Factors(gram_of(x), False, 0.01), 448.0, 1.0)
            assert torch.get_num_threads() == count
            found.append(rounded.codes)
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_shapes_and_dtypes_of_layers(dtype):
    """Convolutions' weights have four dimensions, and all are 16-bit."""
    x = inputs(columns=27)
    w = weight(columns=27).reshape(16, 3, 3, 3).to(dtype)
    rounded = round_weight(w, Factors(gram_of(x), False, 0.01), 448.0, 1.0)
    assert rounded.codes.shape == w.shape
    assert rounded.codes.dtype == torch.uint8
    assert rounded.shift.shape == (16,)
    assert math.isfinite(rounded.error)


def quadratic(delta: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
    """d_o^T H d_o of every row, float64."""
    return (delta @ second * delta).sum(1)


@pytest.mark.parametrize(("scale", "size"), [(1.0, 0.05), (0.2 / 448, 0.05), (1.0, 200.0)])
@pytest.mark.parametrize("centred", [False, True])
def test_sweeps_end_where_no_single_code_is_better(scale, size, centred):
    """A wrong slope or step would leave codes that another one beats; saturation included."""
    x, w = inputs(rows=60, mean=1.0), weight(scale=size)
    factors = Factors(gram_of(x), centred, 0.01)
    rounded = round_weight(w, factors, 448.0 * scale, scale, sweeps=1000)
    assert rounded.compensated
    (block,) = factors.blocks
    second = torch.empty_like(block.second)
    second[block.order[:, None], block.order[None]] = block.second
    second.diagonal().add_(block.added)
    second = second.double()
    values = kernels.dequantize_e4m3(torch.arange(127, dtype=torch.uint8), scale).double()
    values = torch.cat((values, -values))
    delta = w.double() - kernels.dequantize_e4m3(rounded.codes, scale).double()
    least = quadratic(delta, second)
    for column in range(w.shape[1]):
        for value in values:
            other = delta.clone()
            other[:, column] = w[:, column].double() - value
            assert (quadratic(other, second) > least * (1.0 - 1e-5)).all()


def test_sweeps_gain_in_each_of_the_blocks():
    """A block whose codes went elsewhere would lose what compensation has gained."""
    x, w = inputs(columns=150), weight(rows=64, columns=150).half()
    factors = Factors(gram_of(x, blocks=2), True, 0.01)
    plain, swept = (round_weight(w, factors, 448.0, 1.0, sweeps=sweeps) for sweeps in (0, 100))
    for rows in (slice(0, 75), slice(75, 150)):
        centred = (x[:, rows] - x[:, rows].mean(0)).double()
        errors = []
        for rounded in (plain, swept):
            delta = w.double() - kernels.dequantize_e4m3(rounded.codes, 1.0).double()
            errors.append(float((centred @ delta[:, rows].T).square().sum()))
        assert errors[1] < errors[0]


def test_swept_codes_do_not_depend_on_backend_and_threads(backend: Backend):
    """One calibration gives one file of codes."""
    # More columns than are brought up to date together.
    x, w = inputs(columns=150), weight(rows=70, columns=150)
    found = []
    before = torch.get_num_threads()
    for name, threads in (("reference", 1), (backend.name, 1), (backend.name, 3)):
        torch.set_num_threads(threads)
        try:
            factors = Factors(gram_of(x), False, 0.01)
            rounded = round_weight(
                *(w.to(backend.device), factors, 448.0, 1.0), sweeps=2, backend=name
            )
        finally:
            torch.set_num_threads(before)
        found.append(rounded.codes)
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])


def test_autocast_changes_no_code_and_no_figure():
    """Pipelines run in it; 16-bit slopes would choose other codes."""
    factors, w = Factors(gram_of(inputs()), False, 0.01), weight().half()
    expected = round_weight(w, factors, 448.0, 1.0, sweeps=4)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = round_weight(w, factors, 448.0, 1.0, sweeps=4)
    assert torch.equal(found.codes, expected.codes)
    assert (found.error, found.power) == (expected.error, expected.power)
    assert torch.equal(found.shift, expected.shift)
