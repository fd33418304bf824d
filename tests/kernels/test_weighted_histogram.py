"""Histogram of weight magnitudes, weighted by channel importance; exact to the last bit."""

from __future__ import annotations

import math
from dataclasses import fields

import numpy as np
import pytest
import torch
from torch import Tensor

from hswq import kernels
from hswq.config import QuantizeConfig
from hswq.errors import InputError
from tests import oracle
from tests.conftest import Backend
from tests.kernels import cases

OP = "weighted_histogram"
SMALLEST = 2.0**-149


def check(w: Tensor, importance: Tensor | None, bins: int, backend: Backend) -> list[float]:
    hist, max_abs = kernels.weighted_histogram(
        w.to(backend.device), importance, bins, backend=backend.name
    )
    matrix = w if w.dim() >= 2 else w.reshape(1, -1)
    weights = None if importance is None else importance.numpy()
    expected, largest = oracle.weighted_histogram(cases.to_numpy(matrix), weights, bins)
    assert (hist.dtype, max_abs.dtype, max_abs.shape) == (torch.float64, torch.float32, ())
    assert float(max_abs) == largest
    # Tensors, since a difference of long lists takes minutes to print where nothing is cut off.
    assert torch.equal(hist.cpu(), torch.tensor(expected, dtype=torch.float64))
    return expected


def importance_of(kind: str, channels: int) -> Tensor | None:
    uniform = torch.rand(channels, generator=cases.generator(7))
    return {
        "none": None,
        "random": uniform * 3,
        "zeros": torch.zeros(channels),
        "some zeros": uniform * (torch.arange(channels) % 3 == 1),
        "wide": torch.exp2(uniform * 50 - 30),
        "power of two": torch.full((channels,), 4.0),
        "subnormal": torch.full((channels,), 3 * SMALLEST),
    }[kind]


KINDS = ("none", "random", "zeros", "some zeros", "wide", "power of two", "subnormal")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", cases.DTYPES)
def test_every_importance_is_summed_exactly(
    dtype: torch.dtype, kind: str, backend: Backend
) -> None:
    """Floating point sums, a dropped tail or an ignored importance change the bits."""
    for shape, bins in (((31, 37), 128), ((7, 5, 3, 3), 61), ((1, 2), 16), ((3, 127, 1), 4096)):
        w = cases.normal(*shape, sigma=0.02, dtype=dtype)
        check(w, importance_of(kind, shape[1]), bins, backend)


@pytest.mark.parametrize("dtype", cases.DTYPES)
def test_groups_of_rows_have_their_own_importance(dtype: torch.dtype, backend: Backend) -> None:
    """A grouped convolution's rows see only the channels of their group."""
    w = cases.normal(12, 5, 3, 3, dtype=dtype)
    importance = torch.rand(4, 5, generator=cases.generator(3)).square()
    check(w, importance, 64, backend)
    check(w, importance[:1], 64, backend)


@pytest.mark.parametrize("dtype", cases.DTYPES)
def test_extreme_magnitudes_find_their_bin(dtype: torch.dtype, backend: Backend) -> None:
    """Zeros, subnormals and the largest finite values lie in one tensor at times."""
    info = torch.finfo(dtype)
    values = [0.0, -0.0, info.smallest_normal, -info.smallest_normal / 2, info.max, -info.max, 1.0]
    w = torch.tensor(values, dtype=dtype).repeat(3).reshape(3, 7)
    check(w, torch.arange(1.0, 8.0), 100, backend)
    check(w[:, :4], None, 33, backend)


@pytest.mark.parametrize("dtype", cases.DTYPES)
def test_all_zero_weights_fill_the_first_bin(dtype: torch.dtype, backend: Backend) -> None:
    """Dead layers exist; a division by their maximum of zero must not make NaN."""
    w = torch.tensor([[0.0, -0.0, 0.0]], dtype=dtype)
    assert check(w, None, 5, backend) == [1.0, 0.0, 0.0, 0.0, 0.0]
    assert check(w, torch.tensor([0.5, 1.0, 2.0]), 2, backend) == [1.0, 0.0]


def test_one_element_lies_in_the_last_bin(backend: Backend) -> None:
    """max|w| itself belongs to the last bin, not to one beyond the end."""
    for value in (0.3, -448.0, SMALLEST, 3.4e38):
        hist = check(torch.tensor([[value]]), None, 7, backend)
        assert hist == [0.0] * 6 + [1.0]


def test_vectors_are_taken(backend: Backend) -> None:
    """The weight of a normalisation is a vector, weighted by its own length."""
    w = cases.normal(97, dtype=torch.float16)
    check(w, None, 32, backend)
    check(w, torch.rand(97, generator=cases.generator(1)), 32, backend)


def test_width_that_underflows_uses_the_last_bin(backend: Backend) -> None:
    """max / bins rounds to 0 for subnormal weights; |w| / 0 must not become a wild index."""
    w = torch.tensor([[0.0, SMALLEST, -3 * SMALLEST, 5 * SMALLEST]])
    assert oracle.bin_width(5 * SMALLEST, 4096) == 0.0
    assert check(w, None, 4096, backend)[-1] == 0.75
    # Here the width does not vanish but is rounded by a quarter.
    check(torch.arange(0, 40).reshape(1, -1) * SMALLEST, None, 16, backend)


def test_bin_edges_follow_float32(backend: Backend) -> None:
    """A float64 index moves weights to the next bin and misses the golden answers."""
    bins, largest = 4096, np.float32(0.0847)
    width = oracle.bin_width(float(largest), bins)
    w = np.append(np.arange(bins, dtype=np.float32) * width, largest)
    in_float64 = np.floor(w.astype(np.float64) / (float(largest) / bins))
    assert (in_float64 != np.floor(w / width)).any(), "the case shows no difference"
    check(torch.from_numpy(w)[None], None, bins, backend)


def test_large_weights_lose_no_element(backend: Backend) -> None:
    """More elements than any piece that a backend cuts a tensor into, and an odd remainder."""
    rows, columns, bins = 1300, 1021, 512
    w = cases.normal(rows, columns, sigma=0.02, dtype=torch.bfloat16)
    importance = torch.rand(2, columns, generator=cases.generator(5))
    hist, _ = kernels.weighted_histogram(
        w.to(backend.device), importance, bins, backend=backend.name
    )
    values = np.abs(cases.to_numpy(w))
    index = np.floor(values / oracle.bin_width(float(values.max()), bins)).astype(np.int64)
    integers = oracle.importance_integers(importance.numpy(), w.numel())
    sums = np.zeros(bins, dtype=np.int64)
    weights = np.repeat(np.array(integers), rows // 2, axis=0)
    np.add.at(sums, np.minimum(index, bins - 1), weights)
    expected = [float(value) / float(int(sums.sum())) for value in sums.tolist()]
    assert torch.equal(hist.cpu(), torch.tensor(expected, dtype=torch.float64))


def test_strided_weights_keep_their_channels(backend: Backend) -> None:
    """A transposed view has its importance along the other axis of memory."""
    w = cases.normal(12, 20)
    importance = torch.rand(12, generator=cases.generator(2))
    check(w.T, importance, 16, backend)
    check(w[::3], None, 16, backend)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("dtype", cases.DTYPES)
def test_damaged_weights_give_nan(dtype: torch.dtype, value: float, backend: Backend) -> None:
    """The caller, who knows the tensor's name, raises; a finite answer would hide the damage."""
    w = cases.normal(9, 31, dtype=dtype)
    w[4, 17] = value
    for importance in (None, torch.ones(31) * (torch.arange(31) != 17)):
        hist, max_abs = kernels.weighted_histogram(
            w.to(backend.device), importance, 64, backend=backend.name
        )
        assert hist.shape == (64,)
        assert hist.isnan().all()
        assert max_abs.isnan()


@pytest.mark.parametrize(
    ("importance", "message"),
    [
        (torch.ones(4), r"importance \[4\] has 4 channels but the weight \[6, 3, 2\] has 3 input"),
        (torch.ones(4, 3), "importance has 4 groups; the 6 rows"),
        (torch.ones(3, dtype=torch.float64), "importance is float64; it must be float32"),
        (torch.tensor([1.0, -1.0, 0.0]), "importance lies between -1.0 and 1.0"),
        (torch.tensor([1.0, math.nan, 0.0]), "importance lies between nan"),
        (torch.tensor([1.0, math.inf, 0.0]), "importance lies between 0.0 and inf"),
    ],
)
def test_bad_importance_is_refused(importance: Tensor, message: str, backend: Backend) -> None:
    """The seed project pads a wrong length with 1, which hides statistics of another model."""
    with pytest.raises(InputError, match=message):
        kernels.weighted_histogram(torch.ones(6, 3, 2), importance, 8, backend=backend.name)


def test_empty_weights_and_impossible_bins_are_refused(backend: Backend) -> None:
    """There is no histogram of nothing, and the option --bins ends where the kernels do."""
    with pytest.raises(InputError, match=r"w \[0, 3\] is empty"):
        kernels.weighted_histogram(torch.ones(0, 3), None, 8, backend=backend.name)
    with pytest.raises(InputError, match="bins is 0; it must be at least 1"):
        kernels.weighted_histogram(torch.ones(2, 3), None, 0, backend=backend.name)
    largest = next(f for f in fields(QuantizeConfig) if f.name == "bins").metadata["maximum"]
    hist, _ = kernels.weighted_histogram(torch.ones(2, 3), None, largest, backend=backend.name)
    assert hist[-1] == 1.0
    with pytest.raises(InputError, match=f"bins is {largest + 1}; it must be at most {largest}"):
        kernels.weighted_histogram(torch.ones(2, 3), None, largest + 1, backend=backend.name)
