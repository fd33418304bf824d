"""Products of input columns for compensated rounding."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from hswq import kernels
from hswq.errors import InputError
from tests import oracle
from tests.conftest import Backend
from tests.kernels import cases

OP = "gram"
Pair = tuple[int, int]
UNITS = {torch.float32: oracle.UNIT32, torch.float64: oracle.UNIT64}
# kernel, stride, padding, dilation
GEOMETRIES = [
    ((1, 1), (1, 1), (0, 0), (1, 1)),
    ((3, 3), (1, 1), (1, 1), (1, 1)),
    ((3, 3), (2, 2), (1, 1), (1, 1)),
    ((2, 3), (2, 1), (0, 2), (1, 2)),
    ((3, 1), (1, 3), (4, 0), (2, 1)),
]


def check_rows(rows: np.ndarray, accumulator: Tensor, before: Tensor) -> None:
    """Compare with sums of exact products, rounded once."""
    blocks, width, _ = accumulator.shape
    unit = (len(rows) + 2) * UNITS[accumulator.dtype]
    for block in range(blocks):
        columns = rows[:, block * width : (block + 1) * width].astype(np.float64).T
        for i in range(width):
            for j in range(width):
                products = columns[i] * columns[j]
                start = float(before[block, i, j])
                bound = unit * (math.fsum(abs(products)) + abs(start))
                exact = math.fsum([*products, start])
                assert abs(float(accumulator[block, i, j]) - exact) <= bound


@pytest.mark.parametrize("accumulator_dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("dtype", cases.DTYPES)
@pytest.mark.parametrize(
    ("shape", "blocks"), [((9,), 1), ((3, 5, 8), 1), ((37, 12), 3), ((1, 1), 1)]
)
def test_linear_inputs_are_within_their_bound(
    shape: tuple[int, ...],
    blocks: int,
    dtype: torch.dtype,
    accumulator_dtype: torch.dtype,
    backend: Backend,
) -> None:
    """Products in 16 bits, or TF32, would spoil the factorisation that follows."""
    x = cases.normal(*shape, sigma=3.0, dtype=dtype) + 1
    width = shape[-1] // blocks
    before = cases.normal(blocks, width, width, seed=1).to(accumulator_dtype)
    accumulator = before.to(backend.device, copy=True)
    rows = kernels.gram(x.to(backend.device), accumulator, backend=backend.name)
    assert (rows.dtype, rows.shape) == (torch.int64, ())
    assert int(rows) == x.numel() // shape[-1]
    check_rows(cases.to_numpy(x).reshape(-1, shape[-1]), accumulator.cpu(), before)


@pytest.mark.parametrize("blocks", [1, 2, 4])
@pytest.mark.parametrize(("kernel", "stride", "padding", "dilation"), GEOMETRIES)
def test_convolutions_follow_their_geometry(
    kernel: Pair, stride: Pair, padding: Pair, dilation: Pair, blocks: int, backend: Backend
) -> None:
    """Swapped axes, a lost border or a foreign column order compensate the wrong weights."""
    x = cases.normal(2, 4, 7, 6, dtype=torch.float16)
    rows = oracle.patches(cases.to_numpy(x), kernel, stride, padding, dilation)
    rows = rows.reshape(-1, rows.shape[-1])
    width = rows.shape[1] // blocks
    accumulator = torch.zeros(blocks, width, width, device=backend.device)
    count = kernels.gram(
        x.to(backend.device),
        accumulator,
        kernel_size=kernel,
        stride=stride,
        padding=padding,
        dilation=dilation,
        backend=backend.name,
    )
    assert int(count) == len(rows)
    check_rows(rows, accumulator.cpu(), torch.zeros_like(accumulator).cpu())


def whole_numbers(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    """Values whose sums of up to 2**20 products are exact in float32, in any order."""
    return torch.randint(-3, 5, shape, generator=cases.generator(seed)).to(dtype)


def check_whole_numbers(
    x: Tensor, rows: Tensor, before: Tensor, backend: Backend, **geometry: Pair
) -> None:
    blocks, width, _ = before.shape
    accumulator = before.to(backend.device, copy=True)
    count = kernels.gram(x.to(backend.device), accumulator, backend=backend.name, **geometry)
    by_block = rows.double().reshape(len(rows), blocks, width).movedim(1, 0)
    assert int(count) == len(rows)
    assert torch.equal(accumulator.cpu().double(), before.double() + by_block.mT @ by_block)


@pytest.mark.parametrize("accumulator_dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(
    ("rows", "columns", "blocks"),
    [
        *((rows, 19, 1) for rows in (31, 32, 33, 127, 128, 129, 1023, 1024, 1025, 2100)),
        *((35, columns, 1) for columns in (1, 7, 8, 9, 15, 16, 17, 127, 128, 129, 144, 257)),
        *((35, blocks * width, blocks) for blocks, width in ((23, 1), (5, 9), (3, 17), (2, 131))),
    ],
)
def test_sums_are_exact_wherever_tiles_end(
    rows: int, columns: int, blocks: int, accumulator_dtype: torch.dtype, backend: Backend
) -> None:
    """A row lost or counted twice at a seam, or a tile mirrored to another place, shows in whole
    numbers; what the accumulator held before need not be symmetric."""
    width = columns // blocks
    x = whole_numbers(rows, columns, dtype=torch.float16)
    before = whole_numbers(blocks, width, width, seed=1).to(accumulator_dtype)
    check_whole_numbers(x, x, before, backend)


@pytest.mark.parametrize(
    ("size", "kernel", "stride", "padding", "dilation"),
    [
        ((5, 7), (1, 1), (1, 1), (0, 0), (1, 1)),
        ((6, 6), (1, 1), (3, 2), (1, 0), (1, 1)),
        ((9, 8), (2, 2), (5, 3), (0, 0), (1, 1)),
        ((3, 4), (2, 3), (1, 1), (7, 5), (1, 1)),
        ((7, 9), (3, 3), (1, 1), (2, 2), (3, 4)),
        ((4, 5), (4, 5), (1, 1), (0, 0), (1, 1)),
        ((4, 5), (4, 5), (1, 1), (0, 1), (1, 1)),
        ((4, 5), (4, 5), (2, 2), (4, 4), (1, 1)),
        ((1, 40), (1, 3), (1, 2), (0, 1), (1, 1)),
        ((40, 1), (3, 1), (1, 1), (1, 0), (1, 1)),
        ((34, 33), (3, 3), (1, 1), (1, 1), (1, 1)),
    ],
)
def test_extreme_geometries_are_exact(
    size: Pair, kernel: Pair, stride: Pair, padding: Pair, dilation: Pair, backend: Backend
) -> None:
    """Strides that skip values, paddings wider than the kernel and kernels as large as the image
    each have their own way to read a neighbour's row."""
    x = whole_numbers(2, 3, *size, dtype=torch.bfloat16)
    patches = oracle.patches(cases.to_numpy(x), kernel, stride, padding, dilation)
    rows = torch.from_numpy(patches.reshape(-1, patches.shape[-1]))
    for blocks in (1, 3):
        width = rows.shape[1] // blocks
        before = whole_numbers(blocks, width, width, seed=1)
        geometry = {"stride": stride, "padding": padding, "dilation": dilation}
        check_whole_numbers(x, rows, before, backend, kernel_size=kernel, **geometry)


@pytest.mark.parametrize("dtype", cases.DTYPES)
def test_long_sums_are_within_their_bound(dtype: torch.dtype, backend: Backend) -> None:
    """Sums over several panels of rows keep the bound of one plain sum."""
    x = cases.normal(2500, 40, sigma=2.0, dtype=dtype) + 1
    accumulator = torch.zeros(1, 40, 40, device=backend.device)
    kernels.gram(x.to(backend.device), accumulator, backend=backend.name)
    values = x.double()
    difference = accumulator[0].cpu().double() - values.T @ values
    # The float64 product is itself off by less than one in 2500 * 2**-53.
    bound = (len(x) + 1 + 1e-4) * oracle.UNIT32 * (values.abs().T @ values.abs())
    assert bool((difference.abs() <= bound).all())


def test_strided_inputs_are_read_by_their_strides(backend: Backend) -> None:
    """A view read as if it were dense adds other columns' products."""
    dense = whole_numbers(3, 40, 22)
    for x in (dense[:, ::3, 1::2], dense.mT, dense[1:].expand(2, 40, 22)[:, :, :5]):
        rows = x.reshape(-1, x.shape[-1])
        width = x.shape[-1]
        check_whole_numbers(x, rows, torch.zeros(1, width, width), backend)


def test_columns_are_those_of_the_weight(backend: Backend) -> None:
    """w G w^T must be the squared output of the layer whose weight is w, whatever the layout."""
    x = torch.randint(-4, 5, (2, 3, 5, 5), generator=cases.generator()).float()
    w = torch.randint(-4, 5, (1, 3, 3, 3), generator=cases.generator(1)).float()
    accumulator = torch.zeros(1, 27, 27, device=backend.device)
    for image in x.contiguous(memory_format=torch.channels_last).to(backend.device):
        kernels.gram(image, accumulator, kernel_size=3, stride=2, padding=1, backend=backend.name)
    y = torch.nn.functional.conv2d(x, w, stride=2, padding=1)
    row = w.reshape(1, -1)
    assert float(row @ accumulator[0].cpu() @ row.T) == float((y * y).sum())


def test_both_triangles_are_equal(backend: Backend) -> None:
    """Cholesky reads one triangle, users and tests the other."""
    accumulator = torch.zeros(1, 33, 33, device=backend.device)
    kernels.gram(cases.normal(65, 33).to(backend.device), accumulator, backend=backend.name)
    assert torch.equal(accumulator, accumulator.mT)


@pytest.mark.parametrize("value", [math.nan, math.inf, 2.0**41])
@pytest.mark.parametrize("dtype", cases.DTYPES)
def test_bad_calls_add_nothing(dtype: torch.dtype, value: float, backend: Backend) -> None:
    """One overflow in a calibration run must not cost the whole layer's matrix."""
    accumulator = torch.ones(1, 8, 8, device=backend.device)
    x = cases.normal(5, 8, dtype=dtype).to(backend.device)
    x[3, 2] = value
    assert int(kernels.gram(x, accumulator, backend=backend.name)) == 0
    assert torch.equal(accumulator, torch.ones_like(accumulator))


@pytest.mark.parametrize("place", [0, 1 << 15, -1])
@pytest.mark.parametrize("value", [-math.inf, math.nan, -(2.0**40), 2.0**41])
def test_bad_values_are_found_anywhere(value: float, place: int, backend: Backend) -> None:
    """The last value of a large input counts as much as the first; 2**40 itself is allowed."""
    x = torch.zeros(1, 5, 97, 93)
    x.view(-1)[place] = value
    accumulator = torch.ones(5, 1, 1, dtype=torch.float64, device=backend.device)
    rows = kernels.gram(
        x.to(backend.device), accumulator, kernel_size=1, stride=1, backend=backend.name
    )
    allowed = value == -(2.0**40)
    assert int(rows) == (97 * 93 if allowed else 0)
    assert float(accumulator.sum()) == (5 + 2.0**80 if allowed else 5)


@pytest.mark.parametrize(
    ("x", "accumulator", "message"),
    [
        (torch.ones(2, 6), torch.zeros(1, 5, 5), r"accumulator has shape \[1, 5, 5\]"),
        (torch.ones(2, 6), torch.zeros(6, 6), r"accumulator has shape \[6, 6\]"),
        (torch.ones(2, 6), torch.zeros(4, 1, 1), "blocks that divide the 6 columns"),
        (torch.ones(2, 6), torch.zeros(1, 6, 6).half(), "accumulator is float16"),
        (torch.ones(0, 6), torch.zeros(1, 6, 6), r"x \[0, 6\] is empty"),
        (torch.ones(2, 6), torch.zeros(6, 6, 6).mT[:1], "must be contiguous"),
    ],
)
def test_bad_arguments_are_refused(
    x: Tensor, accumulator: Tensor, message: str, backend: Backend
) -> None:
    """Sums of other columns would be added without a trace."""
    with pytest.raises(InputError, match=message):
        kernels.gram(x, accumulator, backend=backend.name)


def test_bad_geometry_is_refused(backend: Backend) -> None:
    """A stride of 0 never ends, and a vector has no image."""
    accumulator = torch.zeros(1, 9, 9)
    with pytest.raises(InputError, match="stride is 0; it must be at least 1"):
        kernels.gram(
            torch.ones(1, 1, 4, 4), accumulator, kernel_size=3, stride=0, backend=backend.name
        )
    with pytest.raises(InputError, match=r"padding is 4\d+; it must be at most 65536"):
        kernels.gram(
            torch.ones(1, 1, 4, 4),
            accumulator,
            kernel_size=3,
            padding=1 << 62,
            backend=backend.name,
        )
    with pytest.raises(InputError, match=r"convolution needs \[B, C, H, W\]"):
        kernels.gram(torch.ones(4, 4), accumulator, kernel_size=3, backend=backend.name)
