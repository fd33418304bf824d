"""Error-compensated rounding: the order of float64 operations decides bytes."""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import pytest
import torch
from torch import Tensor

from hswq import kernels
from hswq.errors import InputError
from tests import oracle
from tests.conftest import Backend
from tests.kernels import cases

OP = "round_compensated"


def factor(columns: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Return U and the column order of strongly correlated inputs, made as in the method."""
    x = cases.normal(3 * columns, columns, seed=seed).double().cumsum(1)
    gram = x.T @ x / len(x)
    gram.diagonal().add_(0.01 * gram.diagonal().mean())
    order = gram.diagonal().argsort(descending=True, stable=True)
    inverse = torch.linalg.inv(gram[order][:, order])
    return torch.linalg.cholesky(inverse, upper=True), order


def check(w: Tensor, scale: float | Tensor, backend: Backend, seed: int = 0) -> np.ndarray:
    rows = len(w)
    upper, order = factor(w.numel() // rows, seed)
    codes = kernels.round_compensated(
        w.to(backend.device),
        upper.to(backend.device),
        scale,
        order.to(backend.device),
        backend=backend.name,
    )
    scales = [np.float32(value) for value in torch.as_tensor(scale).expand(rows).tolist()]
    values = w.reshape(rows, -1).double().tolist()
    expected = oracle.round_compensated(values, upper.tolist(), scales, order.tolist())
    assert (codes.dtype, codes.shape) == (torch.uint8, w.shape)
    np.testing.assert_array_equal(codes.cpu().numpy().reshape(rows, -1), expected)
    return expected


@pytest.mark.parametrize(
    "shape", [(1, 1), (3, 2), (5, 17), (37, 33), (2, 3, 3, 3), (3, 65), (9, 40)]
)
@pytest.mark.parametrize("dtype", cases.DTYPES)
def test_every_code_equals_the_plain_loop(
    dtype: torch.dtype, shape: tuple[int, ...], backend: Backend
) -> None:
    """A fused multiply-add, float32 state or another order of subtraction moves codepoints."""
    w = cases.normal(*shape, sigma=0.02, dtype=dtype)
    check(w, 0.07 / 448, backend)
    check(w, 1.0, backend, seed=1)


def check_against_reference(w: Tensor, scale: float | Tensor, backend: Backend) -> None:
    upper, order = factor(w.shape[1], seed=3)
    order = order[torch.randperm(len(order), generator=cases.generator(4))]
    expected = kernels.round_compensated(w, upper, scale, order, backend="reference")
    codes = kernels.round_compensated(
        w.to(backend.device),
        upper.to(backend.device),
        scale,
        order.to(backend.device),
        backend=backend.name,
    )
    assert torch.equal(codes.cpu(), expected)


@pytest.mark.parametrize("columns", [4, 5, 63, 64, 65, 127, 128, 129, 131, 257])
def test_order_of_subtraction_survives_blocks_of_columns(columns: int, backend: Backend) -> None:
    """Errors summed before they are subtracted, or an edge column of a block left out, change
    bytes only where a block ends."""
    check_against_reference(cases.normal(11, columns, sigma=0.02), 0.07 / 448, backend)


@pytest.mark.parametrize("rows", [1, 7, 8, 9, 63, 64, 65, 130])
def test_rows_survive_blocks_of_rows(rows: int, backend: Backend) -> None:
    """A row at the edge of a block keeps its scale and its place."""
    scale = torch.rand(rows, generator=cases.generator(2)) * 1e-3 + 1e-4
    check_against_reference(cases.normal(rows, 37, sigma=0.3, dtype=torch.float16), scale, backend)


@pytest.mark.parametrize("steepness", [1.0, 1e30, 1e200])
def test_wild_factors_give_the_reference_codes(steepness: float, backend: Backend) -> None:
    """A nearly singular matrix drives values past float32; they saturate alike everywhere."""
    upper, order = factor(70)
    upper = upper + torch.full_like(upper, steepness).triu(1).tril(1)
    w = cases.normal(9, 70, sigma=0.02)
    expected, codes = (
        kernels.round_compensated(
            w.to(device), upper.to(device), 1e-4, order.to(device), backend=name
        ).cpu()
        for name, device in (("reference", torch.device("cpu")), (backend.name, backend.device))
    )
    # NaN, where infinities met, has no sign to agree on.
    assert torch.equal(codes & 0x7F == 0x7F, expected & 0x7F == 0x7F)
    assert torch.equal(codes[codes & 0x7F != 0x7F], expected[expected & 0x7F != 0x7F])


def fused_case() -> tuple[Tensor, Tensor]:
    """Return w [1, 2] and U where a fused multiply-add moves the second code.

    The second weight is 2**20. Once the error of the first is subtracted, it lies half a float32
    step above the midpoint 1.0625 of two codes and goes to the lower one, if the product is
    rounded first; the exact product is smaller, by less than float64 can tell, and leaves more.
    """
    target = 2.0**20 - 1.0625 - 2.0**-24
    for step in range(1, 100):
        first = 1 + step * 2.0**-20
        # The code of `first` is 1, the diagonal 3: an error with a long mantissa.
        error = (first - 1.0) / 3.0
        factor = target / error
        if error * factor == target and Fraction(error) * Fraction(factor) < Fraction(target):
            w = torch.tensor([[first, 2.0**20]], dtype=torch.float32)
            return w, torch.tensor([[3.0, factor], [0.0, 1.0]], dtype=torch.float64)
    raise AssertionError("no case found")


def test_product_and_difference_are_rounded_separately(backend: Backend) -> None:
    """A compiler that contracts them into a fused multiply-add changes bytes between machines."""
    w, upper = fused_case()
    codes = kernels.round_compensated(
        w.to(backend.device),
        upper.to(backend.device),
        1.0,
        torch.arange(2, device=backend.device),
        backend=backend.name,
    )
    assert codes.tolist() == [[0x38, 0x38]]


@pytest.mark.parametrize(
    ("sources", "target"),
    [
        ((0, 1, 2), 3),
        ((0, 1, 6), 7),
        ((1, 6, 90), 101),
        ((3, 5, 63), 64),
        ((0, 1, 2), 140),
        ((5, 126, 127), 128),
        ((0, 127, 128), 130),
        ((2, 130, 259), 260),
    ],
)
def test_terms_are_subtracted_in_the_order_of_columns(
    sources: tuple[int, int, int], target: int, backend: Backend
) -> None:
    """A blocked kernel that adds up its terms first, or goes backwards, moves codepoints.

    The target's 1 loses 2**60, gains it back, which leaves 0, and gains 3. Backwards it ends at 0;
    with the terms added up first, at 4.
    """
    columns = 261
    upper = torch.eye(columns, dtype=torch.float64)
    w = torch.ones(9, columns)
    for source, term in zip(sources, (2.0**60, -(2.0**60), -3.0), strict=True):
        # 1 / 32 is lost to rounding.
        w[:, source] = 1 + 2.0**-5
        upper[source, target] = 32 * term
    codes = kernels.round_compensated(
        w.to(backend.device),
        upper.to(backend.device),
        1.0,
        torch.arange(columns, device=backend.device),
        backend=backend.name,
    )
    expected = torch.full((9, columns), 0x38, dtype=torch.uint8)
    expected[:, target] = 0x44
    assert torch.equal(codes.cpu(), expected)


def test_rows_have_their_own_scale(backend: Backend) -> None:
    """Rows never meet: neither their errors nor their scales."""
    w = cases.normal(21, 19, sigma=0.02, dtype=torch.bfloat16)
    together = check(w, torch.rand(21, generator=cases.generator(2)) * 1e-4 + 1e-5, backend)
    upper, order = factor(19)
    scale = float((torch.rand(21, generator=cases.generator(2)) * 1e-4 + 1e-5)[20])
    alone = kernels.round_compensated(
        w[20:].to(backend.device),
        upper.to(backend.device),
        scale,
        order.to(backend.device),
        backend=backend.name,
    )
    assert alone[0].tolist() == together[20].tolist()


def test_large_values_saturate(backend: Backend) -> None:
    """Without a scale 448 is the end; the error of the clip is passed on like any other."""
    codes = check(cases.normal(4, 12, sigma=600.0), 1.0, backend)
    assert (codes == 0x7E).any()


def test_uncorrelated_inputs_give_the_nearest_codes(backend: Backend) -> None:
    """With a diagonal factor nothing can be compensated."""
    w = cases.normal(10, 24, sigma=0.02, dtype=torch.float16)
    order = torch.randperm(24, generator=cases.generator())
    upper = torch.diag(torch.rand(24, generator=cases.generator()).double() + 0.5)
    codes = kernels.round_compensated(
        w.to(backend.device),
        upper.to(backend.device),
        1e-4,
        order.to(backend.device),
        backend=backend.name,
    )
    nearest = oracle.quantize(cases.to_numpy(w), np.float32(1), np.float32(1e-4))
    np.testing.assert_array_equal(codes.cpu().numpy(), nearest)


def test_compensation_lowers_the_error_of_outputs(backend: Backend) -> None:
    """That is what it is for: the same bytes, a better layer."""
    upper, order = factor(48)
    inverse = torch.empty_like(upper)
    inverse[order[:, None], order] = upper.T @ upper
    gram = torch.linalg.inv(inverse)
    w = cases.normal(16, 48, sigma=0.02)
    scale = 0.07 / 448
    codes = kernels.round_compensated(
        w.to(backend.device),
        upper.to(backend.device),
        scale,
        order.to(backend.device),
        backend=backend.name,
    )
    errors = []
    for chosen in (codes.cpu(), kernels.quantize_e4m3(w, 1.0, scale, backend="reference")):
        values = kernels.dequantize_e4m3(chosen, scale, backend="reference")
        difference = (values - w).double()
        errors.append(float(((difference @ gram) * difference).sum()))
    assert errors[0] < 0.5 * errors[1]


def test_lower_triangle_is_not_read(backend: Backend) -> None:
    """Factorisations leave garbage below the diagonal."""
    w = cases.normal(6, 20, sigma=0.02).to(backend.device)
    upper, order = (tensor.to(backend.device) for tensor in factor(20))
    below = torch.ones_like(upper, dtype=torch.bool).tril(-1)
    dirty = upper.masked_fill(below, torch.nan)
    codes = [
        kernels.round_compensated(w, matrix, 1e-4, order, backend=backend.name)
        for matrix in (upper, dirty)
    ]
    assert torch.equal(*codes)


@pytest.mark.parametrize(
    ("upper", "order", "message"),
    [
        (torch.eye(4), torch.arange(4), "upper is float32; it must be float64"),
        (torch.eye(3).double(), torch.arange(4), r"upper has shape \[3, 3\]"),
        (torch.eye(4).double(), torch.arange(3), r"order has shape \[3\]"),
        (torch.eye(4).double(), torch.tensor([0, 1, 1, 3]), "each of the 4 column numbers once"),
    ],
)
def test_bad_arguments_are_refused(
    upper: Tensor, order: Tensor, message: str, backend: Backend
) -> None:
    """A factor of another layer, or an order with a hole, leaves columns without a code."""
    with pytest.raises(InputError, match=message):
        kernels.round_compensated(torch.ones(2, 4), upper, 1.0, order, backend=backend.name)
