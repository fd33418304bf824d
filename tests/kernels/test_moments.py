"""Sums over a layer's output."""

from __future__ import annotations

import math

import pytest
import torch

from hswq import kernels
from hswq.errors import InputError, OptionError
from hswq.kernels import cpp_backend
from tests import oracle
from tests.conftest import Backend
from tests.kernels import cases

OP = "moments"
# Around the widths of vector registers, and above the pieces that large tensors are cut into.
SIZES = (0, 1, 31, 127, 4097, (1 << 20) + 5)


def check(y: torch.Tensor, backend: Backend) -> None:
    count, total, squares = kernels.moments(y.to(backend.device), backend=backend.name).tolist()
    values = [float(value) for value in y.reshape(-1).tolist()]
    assert count == len(values)
    # n additions of exact terms in any order; fsum is the correctly rounded sum.
    bound = (len(values) + 1) * oracle.UNIT64
    assert abs(total - math.fsum(values)) <= bound * math.fsum(map(abs, values))
    terms = [value * value for value in values]
    assert abs(squares - math.fsum(terms)) <= bound * math.fsum(terms)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("dtype", cases.DTYPES)
def test_sums_are_within_their_bound(dtype: torch.dtype, size: int, backend: Backend) -> None:
    """A dropped tail, float32 squares or float32 sums would be far outside the bound."""
    check(cases.normal(size, sigma=3.0, dtype=dtype) + 1, backend)


def test_every_element_counts_once(backend: Backend) -> None:
    """Sums of small integers are exact, so a single lost or doubled element shows."""
    for size in (1, 2, 63, 64, 65, 1000, 4097):
        y = torch.arange(1, size + 1, dtype=torch.float32)
        result = kernels.moments(y.to(backend.device), backend=backend.name).tolist()
        assert result == [size, size * (size + 1) // 2, size * (size + 1) * (2 * size + 1) // 6]


def test_fp16_squares_do_not_overflow(backend: Backend) -> None:
    """60000 squared is infinite in float16, where the seed project kept its mean."""
    y = torch.full((1000,), 60000.0, dtype=torch.float16, device=backend.device)
    assert kernels.moments(y, backend=backend.name).tolist() == [1000.0, 6e7, 3.6e12]


def test_strided_outputs_are_read_in_place(backend: Backend) -> None:
    """Layers hand out transposed and sliced tensors."""
    y = cases.normal(6, 40, 10)
    check(y.transpose(0, 2)[:, 3:37:2], backend)
    check(y[None].contiguous(memory_format=torch.channels_last), backend)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_values_that_are_not_finite_propagate(value: float, backend: Backend) -> None:
    """monitor finds bad calls by their sums."""
    y = torch.ones(100, device=backend.device)
    y[50] = value
    assert not kernels.moments(y, backend=backend.name)[1:].isfinite().any()


def test_integers_are_refused(backend: Backend) -> None:
    """A tensor of codes handed in by mistake has no moments."""
    with pytest.raises(InputError, match="y is int64; it must be float16"):
        kernels.moments(torch.ones(3, dtype=torch.int64), backend=backend.name)


@pytest.mark.host_threads
@pytest.mark.parametrize("dtype", cases.DTYPES)
def test_number_of_threads_changes_no_bit(dtype: torch.dtype, backend: Backend) -> None:
    """A library's sum is split among its threads; statistics would depend on the machine."""
    y = cases.wide((3 << 20) + 5, dtype=dtype).to(backend.device)
    assert len(set(cases.on_threads(lambda: kernels.moments(y, backend=backend.name)))) == 1


@pytest.mark.parametrize("threads", ["1025", "9" * 30, "9" * 5000])
def test_absurd_number_of_threads_is_refused(threads: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Passed on it would be a TypeError of the binding, or gigabytes of tables."""
    monkeypatch.setenv("HSWQ_NUM_THREADS", threads)
    with pytest.raises(OptionError, match="it must be a whole number between 1 and 1024"):
        cpp_backend._threads()
