"""One hook call: means rounded to fixed point and added."""

from __future__ import annotations

import copy
import itertools
import math
from fractions import Fraction

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from hswq import kernels
from hswq.errors import InputError
from hswq.kernels.fixed_point import pair_to_fraction
from tests import oracle
from tests.conftest import Backend
from tests.kernels import cases

OP = "monitor"
FIELDS = ("calls", "skipped", "mean_y", "mean_y2", "abs_mean")


def watch(
    calls: list[tuple[Tensor, Tensor]], dim: int, backend: Backend
) -> kernels.MonitorAccumulators:
    sums = kernels.MonitorAccumulators.zeros(calls[0][0].shape[dim], backend.device)
    for x, y in calls:
        x, y = x.to(backend.device), y.to(backend.device)
        kernels.monitor(x, y, dim, sums, backend=backend.name)
    return sums


def bits(sums: kernels.MonitorAccumulators) -> list[list[int]]:
    return [getattr(sums, field).tolist() for field in FIELDS]


def random_calls(count: int, dtype: torch.dtype = torch.float32) -> list[tuple[Tensor, Tensor]]:
    inputs = [cases.normal(3, 5, 7, sigma=2.0, dtype=dtype, seed=i) for i in range(count)]
    return [(x, cases.normal(3, 5, 11, seed=100 + i)) for i, x in enumerate(inputs)]


@pytest.mark.parametrize(
    ("x_shape", "dim"), [((2, 3, 4, 4), -3), ((3, 4, 4), -3), ((8, 3), -1), ((3,), -1)]
)
@pytest.mark.parametrize("dtype", cases.DTYPES)
def test_exact_means_give_exact_sums(
    dtype: torch.dtype, x_shape: tuple[int, ...], dim: int, backend: Backend
) -> None:
    """Means of small binary fractions over 2**n elements are exact: every bit is then known."""
    step = torch.randint(-64, 65, (2, *x_shape), generator=cases.generator())
    calls = [((part / 16).to(dtype), (part.reshape(-1)[:2] / 8).to(dtype)) for part in step]
    sums = watch(calls, dim, backend)
    mean_y = mean_y2 = Fraction(0)
    abs_mean = [Fraction(0)] * x_shape[dim]
    for x, y in calls:
        values = [Fraction(value) for value in y.float().tolist()]
        mean_y += sum(values) / len(values)
        mean_y2 += sum(value * value for value in values) / len(values)
        for channel, row in enumerate(x.float().movedim(dim, 0).reshape(x.shape[dim], -1).tolist()):
            abs_mean[channel] += Fraction(math.fsum(map(abs, row))) / len(row)
    assert pair_to_fraction(*sums.mean_y.tolist()) == mean_y
    assert pair_to_fraction(*sums.mean_y2.tolist()) == mean_y2
    assert sums.abs_mean.tolist() == [oracle.round_to_step(mean, 32) for mean in abs_mean]
    assert (sums.calls.tolist(), sums.skipped.tolist()) == ([2], [0])


@pytest.mark.parametrize("dtype", cases.DTYPES)
def test_random_means_are_within_their_bound(dtype: torch.dtype, backend: Backend) -> None:
    """A fused kernel may sum in its own order, but only within the bound of float64 sums."""
    ((x, y),) = random_calls(1, dtype)
    sums = watch([(x, y)], -1, backend)
    values = [Fraction(value) for value in y.reshape(-1).tolist()]
    unit = Fraction(len(values) + 2, 2**53)
    for pair, terms in (
        (sums.mean_y, values),
        (sums.mean_y2, [value * value for value in values]),
    ):
        exact, size = sum(terms) / len(terms), sum(map(abs, terms)) / len(terms)
        error = abs(pair_to_fraction(*pair.tolist()) - exact)
        assert error <= unit * size + Fraction(1, 2**57)
    columns = x.float().reshape(-1, x.shape[-1]).T.abs().tolist()
    for steps, column in zip(sums.abs_mean.tolist(), columns, strict=True):
        exact = sum(map(Fraction, column)) / len(column)
        assert abs(Fraction(steps, 2**32) - exact) <= unit * exact + Fraction(1, 2**33)


def test_order_of_calls_changes_no_bit(backend: Backend) -> None:
    """Floating point sums would depend on the order of samples; files would differ."""
    orders = itertools.permutations(random_calls(4))
    assert len({str(bits(watch(list(calls), -1, backend))) for calls in orders}) == 1


def test_merging_is_exact_for_every_split(backend: Backend) -> None:
    """Processes that share the samples must end with the bits of one that ran them all."""
    calls = random_calls(5)
    whole = watch(calls, -1, backend)
    for cut in range(1, 5):
        first, second = watch(calls[:cut], -1, backend), watch(calls[cut:], -1, backend)
        merged = [(getattr(first, f) + getattr(second, f)).tolist() for f in FIELDS]
        assert merged == bits(whole)


def test_copies_have_sums_of_their_own(backend: Backend) -> None:
    """Addresses that were kept would lead to the memory of the original."""
    calls = random_calls(2)
    original = watch(calls[:1], -1, backend)
    copied = copy.deepcopy(original)
    original.calls.data = original.calls.clone()
    (x, y) = (value.to(backend.device) for value in calls[1])
    for sums in (original, copied):
        kernels.monitor(x, y, -1, sums, backend=backend.name)
    assert bits(original) == bits(copied) == bits(watch(calls, -1, backend))


@pytest.mark.parametrize(
    ("x_value", "y_value"),
    [
        (math.nan, 1.0),
        (1.0, math.nan),
        (math.inf, 1.0),
        (1.0, -math.inf),
        (2.0**21, 1.0),
        (1.0, 2.0**21),
        (1.0, 2.0**80),
    ],
)
def test_bad_calls_are_counted_and_add_nothing(
    x_value: float, y_value: float, backend: Backend
) -> None:
    """One NaN or overflow must not spoil the statistics of a whole run."""
    x, y = torch.ones(4, 3), torch.ones(4, 2)
    good = (x, y)
    bad_x, bad_y = x.clone(), y.clone()
    bad_x[:, 1], bad_y[:, 1] = x_value, y_value
    expected = bits(watch([good], -1, backend))
    expected[1] = [1]
    assert bits(watch([good, (bad_x, bad_y)], -1, backend)) == expected
    assert bits(watch([(bad_x, bad_y), good], -1, backend)) == expected


def test_largest_contributions_are_counted(backend: Backend) -> None:
    """The range includes its ends: mean |x| of 2**20, mean y^2 of 2**40."""
    x, y = torch.full((4, 2), -(2.0**20)), torch.full((8,), -(2.0**20))
    sums = watch([(x, y)], -1, backend)
    assert sums.calls.tolist() == [1]
    assert sums.abs_mean.tolist() == [2**52, 2**52]
    assert sums.mean_y.tolist() == [-(2**28), 0]
    assert sums.mean_y2.tolist() == [2**48, 0]


def test_low_part_that_rounds_up_is_carried(backend: Backend) -> None:
    """A low part of 2**48 is no low part: equal sums would be saved as different files."""
    # The mean is half a last place of the high part's step below that step.
    y = torch.tensor([2.0**-7, -(2.0**-60)])
    for sign in (1, -1):
        sums = watch([(torch.ones(1, 1), y * sign)], -1, backend)
        assert sums.mean_y.tolist() == [sign, 0]


def test_given_means_cost_nothing_for_the_input(backend: Backend) -> None:
    """Workspace for an x that is not read is lost time; for this one there is no such memory."""
    x = torch.ones(1, 1).expand(1 << 60, 1)
    sums = kernels.MonitorAccumulators.zeros(1, backend.device)
    abs_mean = torch.ones(1, dtype=torch.float64, device=backend.device)
    kernels.monitor(
        x.to(backend.device),
        torch.ones(2, device=backend.device),
        -1,
        sums,
        abs_mean,
        backend=backend.name,
    )
    assert sums.abs_mean.tolist() == [1 << 32]


def test_empty_output_is_skipped(backend: Backend) -> None:
    """A mean over no elements does not exist."""
    assert bits(watch([(torch.ones(2, 3), torch.ones(0))], -1, backend))[:2] == [[0], [1]]


def test_shared_input_is_reduced_once(backend: Backend) -> None:
    """q, k and v pass on what the first of them returned; x is then not read again."""
    ((x, y),) = random_calls(1)
    x, y = x.to(backend.device), y.to(backend.device)
    alone = kernels.MonitorAccumulators.zeros(7, backend.device)
    shared = kernels.MonitorAccumulators.zeros(7, backend.device)
    abs_mean = kernels.monitor(x, y, -1, alone, backend=backend.name)
    assert abs_mean.dtype == torch.float64
    unread = torch.full_like(x, math.nan)
    again = kernels.monitor(unread, y, -1, shared, abs_mean, backend=backend.name)
    assert bits(shared) == bits(alone)
    assert torch.equal(again, abs_mean)


class NoHostSync(TorchDispatchMode):
    """Fails where a value is brought to Python, which on a GPU waits for all work before it."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        assert func is not torch.ops.aten._local_scalar_dense.default, "host synchronisation"
        assert func is not torch.ops.aten.nonzero.default, "host synchronisation"
        return func(*args, **(kwargs or {}))


def test_no_value_is_brought_to_the_host(backend: Backend) -> None:
    """635,000 calls of an SDXL run may not wait for the GPU each."""
    ((x, y),) = random_calls(1)
    sums = kernels.MonitorAccumulators.zeros(7, backend.device)
    x, y = x.to(backend.device), y.to(backend.device)
    with NoHostSync():
        abs_mean = kernels.monitor(x, y, -1, sums, backend=backend.name)
        kernels.monitor(x, y, -1, sums, abs_mean, backend=backend.name)
    assert sums.calls.tolist() == [2]


def test_gradients_and_autocast_do_not_matter(backend: Backend) -> None:
    """Users observe models whose parameters require gradients, some under autocast."""
    ((x, y),) = random_calls(1)
    expected = bits(watch([(x, y)], -1, backend))
    with torch.autocast(backend.device.type, dtype=torch.bfloat16):
        calls = [(x.requires_grad_(), y.requires_grad_())]
        assert bits(watch(calls, -1, backend)) == expected


def test_wrong_channels_are_refused(backend: Backend) -> None:
    """Adding to another layer's sums would mix their importances."""
    sums = kernels.MonitorAccumulators.zeros(4)
    x = torch.ones(2, 3)
    with pytest.raises(InputError, match=r"accumulators.abs_mean has shape \[4\]"):
        kernels.monitor(x, x, -1, sums, backend=backend.name)
    with pytest.raises(InputError, match=r"abs_mean has shape \[3\]"):
        kernels.monitor(
            torch.ones(2, 4),
            x,
            -1,
            sums,
            torch.ones(3, dtype=torch.float64),
            backend=backend.name,
        )
