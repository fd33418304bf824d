"""Mean input magnitude per channel."""

from __future__ import annotations

import math

import pytest
import torch

from hswq import kernels
from hswq.errors import InputError
from tests import oracle
from tests.conftest import Backend
from tests.kernels import cases

OP = "channel_abs_mean"
LAYOUTS = [
    ((2, 5, 7, 3), -3),
    ((2, 5, 7, 3), 1),
    ((5, 7, 3), -3),
    ((1, 33, 17, 31), -3),
    ((4, 9, 37), -1),
    ((37,), -1),
    ((127, 65), 1),
    ((2, 3, 2, 2, 19), -1),
    ((3, 1, 1, 1), -3),
    ((4097, 3), -1),
    ((2048, 600), -1),
]


def check(x: torch.Tensor, dim: int, backend: Backend) -> None:
    means = kernels.channel_abs_mean(x.to(backend.device), dim, backend=backend.name)
    channels = x.float().movedim(dim, 0).reshape(x.shape[dim], -1).abs().tolist()
    assert means.dtype == torch.float64
    assert means.shape == (x.shape[dim],)
    for mean, values in zip(means.tolist(), channels, strict=True):
        # n - 1 additions of exact terms and one division.
        bound = (len(values) + 1) * oracle.UNIT64
        expected = math.fsum(values) / len(values)
        assert abs(mean - expected) <= bound * expected


@pytest.mark.parametrize(("shape", "dim"), LAYOUTS)
@pytest.mark.parametrize("dtype", cases.DTYPES)
def test_means_are_within_their_bound(
    dtype: torch.dtype, shape: tuple[int, ...], dim: int, backend: Backend
) -> None:
    """The importance of a channel must come from that channel, for any rank of a Linear's input."""
    check(cases.normal(*shape, sigma=5.0, dtype=dtype), dim, backend)


def test_strided_inputs_keep_their_channels(backend: Backend) -> None:
    """channels_last is how convolutions run on GPUs; q, k and v are often slices."""
    x = cases.normal(2, 12, 5, 6)
    check(x.contiguous(memory_format=torch.channels_last), -3, backend)
    check(x.transpose(1, 3), -1, backend)
    check(x[:, 2:9:3], -3, backend)
    check(x[0, 0].expand(3, 5, 6), -1, backend)


def test_bad_values_stay_in_their_channel(backend: Backend) -> None:
    """monitor must see them, and the message names the layer, not the whole model."""
    x = torch.ones(4, 3, device=backend.device)
    x[1, 0], x[2, 2] = math.nan, -math.inf
    means = kernels.channel_abs_mean(x, -1, backend=backend.name).tolist()
    assert math.isnan(means[0])
    assert means[1:] == [1.0, math.inf]


def test_no_elements_give_nan(backend: Backend) -> None:
    """An empty batch has no mean; monitor skips such a call."""
    x = torch.ones(0, 7, 3, device=backend.device)
    means = kernels.channel_abs_mean(x, -1, backend=backend.name)
    assert means.shape == (3,)
    assert means.isnan().all()


def test_wrong_axis_is_refused(backend: Backend) -> None:
    """A convolution's axis on a vector would read another layer's channels."""
    with pytest.raises(InputError, match=r"dim -3 is no axis of x \[5, 6\]"):
        kernels.channel_abs_mean(torch.ones(5, 6), -3, backend=backend.name)


@pytest.mark.host_threads
@pytest.mark.parametrize(
    ("shape", "dim"), [((1, 1, 2000, 1500), -3), ((4, 3, 500, 701), -3), ((4099, 513), -1)]
)
def test_number_of_threads_changes_no_bit(
    shape: tuple[int, ...], dim: int, backend: Backend
) -> None:
    """A library's sum is split among its threads; importances would depend on the machine."""
    x = cases.wide(*shape).to(backend.device)
    results = cases.on_threads(lambda: kernels.channel_abs_mean(x, dim, backend=backend.name))
    assert len(set(results)) == 1
