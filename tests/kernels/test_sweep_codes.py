"""Sweeps over codes: the order of float32 operations decides bytes."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from hswq import kernels
from hswq.errors import InputError
from tests import oracle
from tests.conftest import Backend
from tests.kernels import cases

OP = "sweep_codes"


def problem(columns: int, lanes: int, scale: Tensor, seed: int = 0) -> tuple[Tensor, ...]:
    """Return slopes a few steps of their codes large, codes, and H of correlated inputs."""
    x = cases.normal(3 * columns, columns, seed=seed).cumsum(1)
    second = x.T @ x / len(x)
    weights = cases.normal(columns, lanes, sigma=0.05, seed=seed + 1)
    codes = kernels.quantize_e4m3(weights, 448.0, 1.0, backend="reference")
    slope = cases.normal(columns, lanes, sigma=0.01, seed=seed + 2)
    return slope * scale * second.diagonal()[:, None], codes, second


def swept(backend: Backend, slope: Tensor, codes: Tensor, second: Tensor, scale) -> list[Tensor]:
    """Return codes, slopes and steps; the arguments stay as they are."""
    given = [it.to(backend.device, copy=True) for it in (slope, codes)]
    scale = scale.to(backend.device) if isinstance(scale, Tensor) else scale
    moved = second.to(backend.device)
    steps = kernels.sweep_codes(*given, moved, scale, backend=backend.name)
    return [it.cpu() for it in (given[1], given[0], steps)]


def check(backend: Backend, slope: Tensor, codes: Tensor, second: Tensor, scale) -> list[Tensor]:
    found = swept(backend, slope, codes, second, scale)
    scales = [np.float32(it) for it in torch.as_tensor(scale).expand(slope.shape[1]).tolist()]
    expected = oracle.sweep_codes(slope.numpy(), codes.numpy(), second.numpy(), scales)
    for one, other in zip(found, expected, strict=True):
        np.testing.assert_array_equal(one.numpy(), other)
    return found


@pytest.mark.parametrize("columns", [1, 17, 64])
@pytest.mark.parametrize("lanes", [1, 33, 65])
def test_every_result_equals_the_plain_loop(columns: int, lanes: int, backend: Backend) -> None:
    """A fused multiply-add, another order or an edge of a block moves codepoints."""
    codes, _, steps = check(backend, *problem(columns, lanes, torch.ones(())), 1.0)
    assert lanes * columns < 10 or ((steps != 0.0).any() and (steps == 0.0).any())
    assert codes.dtype == torch.uint8


def test_lanes_have_their_own_scale(backend: Backend) -> None:
    """Rows of a weight never meet: neither their slopes nor their scales."""
    scale = torch.rand(70, generator=cases.generator(2)) * 1e-3 + 1e-4
    slope, codes, second = problem(20, 70, scale)
    together = check(backend, slope, codes, second, scale)
    last = slope[:, 69:].contiguous(), codes[:, 69:].contiguous()
    alone = swept(backend, *last, second, float(scale[69]))
    for one, other in zip(alone, together, strict=True):
        assert torch.equal(one[:, 0], other[:, 69])


def test_wide_weights_equal_the_reference(backend: Backend) -> None:
    """Rows that lie a power of two apart, over several blocks of lanes."""
    arguments = problem(64, 512, torch.ones(()), seed=5)
    expected = swept(Backend("reference", torch.device("cpu")), *arguments, 1.0)
    for one, other in zip(swept(backend, *arguments, 1.0), expected, strict=True):
        assert torch.equal(one, other)


def test_product_and_difference_are_rounded_separately(backend: Backend) -> None:
    """A compiler that contracts them into a fused multiply-add changes bytes between machines."""
    step, factor = 1.0 + 2.0**-3, 1.0 + 2.0**-12 + 2.0**-23
    # The first code goes from 0 to 1.125; of the product 1.125 * factor the lowest bits are lost.
    second = torch.tensor([[1.0, factor], [factor, 1.0]])
    product = np.float32(step) * np.float32(factor)
    assert float(product) != float(np.float32(factor)) * step
    slope = torch.tensor([[step], [float(product)]])
    codes = torch.zeros(2, 1, dtype=torch.uint8)
    codes, slope, steps = swept(backend, slope, codes, second, 1.0)
    assert steps.flatten().tolist() == [step, 0.0]
    # Fused, what is left would be the rounding error of the product.
    assert slope[1].tolist() == [0.0]
    assert codes.flatten().tolist() == [0x39, 0]


def test_terms_are_subtracted_in_the_order_of_columns(backend: Backend) -> None:
    """Terms that are added up first, or backwards, leave another slope.

    The last slope loses 2**30 and gains it back, which leaves 0 of its 1, and gains 4.
    """
    second = torch.eye(64) * 2.0
    for source, term in ((3, 2.0**30), (30, -(2.0**30)), (62, -4.0)):
        second[source, 63] = term
    slope, codes = torch.zeros(64, 2), torch.zeros(64, 2, dtype=torch.uint8)
    slope[[3, 30, 62]] = 2.0
    slope[63] = 1.0
    codes, slope, steps = swept(backend, slope, codes, second, 1.0)
    assert steps[[3, 30, 62]].tolist() == [[1.0, 1.0]] * 3
    assert steps[63].tolist() == [2.0, 2.0]
    assert slope[63].tolist() == [0.0, 0.0]


def test_equally_near_codes_stay(backend: Backend) -> None:
    """A tie that moved would move back in the next sweep, without end."""
    # Halfway between the codes of 1 and 1.125, from either of them.
    slope = torch.tensor([[0.0625, -0.0625]])
    given = torch.tensor([[0x38, 0x39]], dtype=torch.uint8)
    codes, left, steps = swept(backend, slope, given, torch.ones(1, 1), 1.0)
    assert torch.equal(codes, given)
    assert torch.equal(left, slope)
    assert not steps.any()


def test_large_values_saturate_and_nan_changes_nothing(backend: Backend) -> None:
    """448 is the end without a scale, and a slope that overflowed decides nothing."""
    slope = torch.tensor([[1e3, -1e3, torch.nan, torch.inf, 1.0]])
    given = torch.tensor([[0x38, 0x38, 0x39, 0x38, 0x00]], dtype=torch.uint8)
    codes, _, steps = swept(backend, slope, given, torch.ones(1, 1), 1.0)
    assert codes.tolist() == [[0x7E, 0xFE, 0x39, 0x38, 0x38]]
    assert steps.tolist() == [[447.0, -449.0, 0.0, 0.0, 1.0]]


def test_slopes_stay_those_of_the_codes(backend: Backend) -> None:
    """After many calls the slope of every column is still H (w - q)."""
    columns, scale = 40, 1e-4
    x = cases.normal(200, columns, seed=9).cumsum(1)
    second = x.T @ x / len(x)
    weights = cases.normal(columns, 50, sigma=0.02, seed=10)
    codes = kernels.quantize_e4m3(weights, 1.0, scale, backend="reference")
    values = kernels.dequantize_e4m3(codes, scale, backend="reference")
    slope = second @ (weights - values)
    errors = []
    # What was added up in all, and by how many roundings.
    added, count = (weights - values).abs(), columns
    for _ in range(5):
        codes, slope, steps = swept(backend, slope, codes, second, scale)
        delta = (weights - kernels.dequantize_e4m3(codes, scale, backend="reference")).double()
        added, count = added + steps.abs(), count + 2 * columns
        exact = second.double() @ delta
        assert ((slope - exact).abs() <= count * 2.0**-24 * (second.abs() @ added)).all()
        errors.append(float((delta * exact).sum()))
    assert errors == sorted(errors, reverse=True)
    assert errors[0] > errors[-1]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"slope": torch.ones(3, 4).double()}, "slope is float64; it must be float32"),
        ({"codes": torch.zeros(3, 4)}, "codes is float32; it must be uint8"),
        ({"codes": torch.zeros(4, 3, dtype=torch.uint8)}, r"codes has shape \[4, 3\]"),
        ({"second": torch.eye(4)}, r"second has shape \[4, 4\]"),
        ({"slope": torch.ones(4, 3).T}, "slope is not contiguous"),
        ({"slope": torch.ones(65, 4)}, r"slope has shape \[65, 4\].*at most 64"),
        ({"slope": torch.ones(0, 4)}, "slope"),
        ({"scale": torch.ones(3)}, "scale"),
    ],
)
def test_bad_arguments_are_refused(
    change: dict[str, Tensor], message: str, backend: Backend
) -> None:
    """A kernel that trusted them would write beyond its tensors."""
    arguments = {
        "slope": torch.ones(3, 4),
        "codes": torch.zeros(3, 4, dtype=torch.uint8),
        "second": torch.eye(3),
        "scale": 1.0,
    }
    with pytest.raises(InputError, match=message):
        kernels.sweep_codes(**{**arguments, **change}, backend=backend.name)
