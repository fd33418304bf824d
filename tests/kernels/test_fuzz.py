"""The C++ extension against the reference on inputs that hypothesis makes up.

Shapes around the sizes of blocks and vectors, views of every kind, and bit patterns of every kind.
The examples are the same in every run; `make test-slow` tries many more of them.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from hswq import kernels
from hswq.errors import HswqError
from hswq.kernels import MonitorAccumulators, fixed_point
from tests.conftest import poisoned
from tests.kernels.cases import DTYPES, generator, significand_unit
from tests.oracle import UNIT64

FAST, MANY = 25, 300
BLOCK = 1 << 15
SIZES = st.sampled_from((0, 1, 2, 3, 5, 7, 8, 16, 31, 33, 64))
LARGE = st.sampled_from(
    (BLOCK - 1, BLOCK, BLOCK + 1, 2 * BLOCK + 31, 4 * (1 << 16) - 1, 4 * (1 << 16) + 1)
)
SEEDS = st.integers(0, 1 << 20)
LARGEST = torch.finfo(torch.float32).max
# Magnitudes where float32 changes its ways, and where E4M3 does.
EXTREMES = (2.0**-149, 2.0**-140, 2.0**-126, 2.0**-127, 1e-9, 1 / 448, 0.0371 / 448, 1.0, 448.0)
HUGE = (464.0, 1e30, 2.0**126, LARGEST)
FIELDS = ("calls", "skipped", "mean_y", "mean_y2", "abs_mean")


@pytest.fixture(scope="module", autouse=True)
def poisoned_outputs(extension: None) -> Iterator[None]:
    """Elements that an op forgets to write become visible."""
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setenv("HSWQ_NUM_THREADS", "3")
        for maker in ("empty", "empty_like"):
            monkeypatch.setattr(torch, maker, poisoned(getattr(torch, maker)))
        yield


def fuzz(*strategies: Any) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Run a check on a few examples, and as a slow test on many."""

    def decorate(check: Callable[..., None]) -> Callable[..., None]:
        @pytest.mark.parametrize("count", [FAST, pytest.param(MANY, marks=pytest.mark.slow)])
        @functools.wraps(check)
        def test(count: int) -> None:
            options = settings(
                max_examples=count,
                derandomize=True,
                deadline=None,
                database=None,
                suppress_health_check=list(HealthCheck),
            )
            options(given(*strategies)(check))()

        del test.__wrapped__  # type: ignore[attr-defined]
        return test

    return decorate


def elements(kind: str, count: int, dtype: torch.dtype, seed: int) -> Tensor:
    """Return a vector of one kind of bit patterns."""
    random = generator(seed)
    if kind == "bits":
        # Every pattern may occur: subnormals, infinities and all NaN.
        integers = {1: torch.uint8, 2: torch.int16, 4: torch.int32}[dtype.itemsize]
        limits = torch.iinfo(integers)
        bits = torch.randint(limits.min, limits.max + 1, (count,), generator=random)
        return bits.to(integers).view(dtype)
    if kind == "specials":
        info = torch.finfo(dtype)
        smallest = info.smallest_normal * info.eps
        values = (0.0, smallest, info.smallest_normal, 1.0, 1.0625, 448.0, 464.0, info.max)
        chosen = torch.tensor(values)[torch.randint(0, len(values), (count,), generator=random)]
        signs = torch.randint(0, 2, (count,), generator=random) * 2 - 1
        return (chosen * signs).to(dtype)
    if kind == "steps":
        return (torch.randint(-64, 65, (count,), generator=random) / 16).to(dtype)
    if kind == "zeros":
        return torch.zeros(count, dtype=dtype)
    return (torch.randn(count, generator=random) * 0.02).to(dtype)


KINDS = st.sampled_from(("bits", "specials", "steps", "zeros", "normal"))
FINITE_KINDS = st.sampled_from(("specials", "steps", "zeros", "normal"))


@st.composite
def tensors(
    draw: st.DrawFn,
    kinds: st.SearchStrategy[str] = KINDS,
    least_rank: int = 0,
    dtypes: Sequence[torch.dtype] = DTYPES,
) -> Tensor:
    """Draw a tensor of any shape, size and layout."""
    dtype = draw(st.sampled_from(dtypes))
    if draw(st.integers(0, 4)) == 0:
        shape = [draw(LARGE)]
        shape = draw(st.sampled_from(([1, *shape], [*shape, 1], [3, *shape], shape)))
    else:
        shape = draw(st.lists(SIZES, min_size=least_rank, max_size=4))
    if len(shape) < least_rank:
        shape = [1] * (least_rank - len(shape)) + shape
    seed, kind = draw(SEEDS), draw(kinds)
    layout = draw(st.sampled_from(("dense", "transposed", "sliced", "expanded", "offset")))
    count = math.prod(shape)
    if layout == "sliced" and shape:
        wider = [2 * size + 1 for size in shape[-2:]]
        store = elements(kind, math.prod([*shape[:-2], *wider]), dtype, seed)
        return store.reshape(*shape[:-2], *wider)[
            (..., *(slice(1, 2 * size + 1, 2) for size in shape[-2:]))
        ]
    if layout == "transposed" and len(shape) > 1:
        return (
            elements(kind, count, dtype, seed)
            .reshape(*reversed(shape))
            .permute(*reversed(range(len(shape))))
        )
    if layout == "expanded" and len(shape) > 1:
        store = elements(kind, count // max(1, shape[0]), dtype, seed)
        return store.reshape(1, *shape[1:]).expand(shape) if shape[0] else store.new_empty(shape)
    if layout == "offset":
        # Aligned to its element only.
        offset = draw(st.integers(1, 15))
        return elements(kind, count + offset, dtype, seed)[offset:].reshape(shape)
    return elements(kind, count, dtype, seed).reshape(shape)


@st.composite
def row_values(draw: st.DrawFn, rows: int, zero: bool) -> float | Tensor:
    """Draw an amax or a scale: a number, a tensor of one, or one a row."""
    choices = st.sampled_from((*EXTREMES, *HUGE, *((0.0,) if zero else ())))
    form = draw(st.sampled_from(("number", "tensor", "rows")))
    if form == "number":
        return draw(choices)
    if form == "tensor":
        return torch.tensor(draw(choices))
    some = draw(st.lists(choices, min_size=1, max_size=5))
    return torch.tensor((some * (rows // len(some) + 1))[:rows], dtype=torch.float32)


def same(found: Tensor, expected: Tensor) -> bool:
    """Compare bits, except that any NaN equals any other."""
    if found.dtype != expected.dtype or found.shape != expected.shape:
        return False
    if not found.is_floating_point():
        return torch.equal(found, expected)
    bits = {2: torch.int16, 4: torch.int32, 8: torch.int64}[found.element_size()]
    plain = (torch.where(value.isnan(), torch.nan, value) for value in (found, expected))
    return torch.equal(*(value.contiguous().view(bits) for value in plain))


def both(op: str, *arguments: Any) -> Iterator[Any]:
    for backend in ("cpp", "reference"):
        yield getattr(kernels, op)(*arguments, backend=backend)


@st.composite
def quantizations(draw: st.DrawFn) -> tuple[Tensor, float | Tensor, float | Tensor]:
    w = draw(tensors())
    rows = w.shape[0] if w.dim() else 1
    return w, draw(row_values(rows, zero=True)), draw(row_values(rows, zero=False))


@fuzz(quantizations())
def test_codes_equal_the_reference(case: tuple[Any, ...]) -> None:
    """A wrong code is a wrong weight in every image."""
    found, expected = both("quantize_e4m3", *case)
    w, *_ = case
    # The sign of a NaN by its bits: torch loses it in the last elements of a float16 tensor.
    bits = w.contiguous().view(torch.int32 if w.dtype == torch.float32 else torch.int16)
    signed_nan = torch.where(bits < 0, 0xFF, 0x7F).to(torch.uint8)
    assert same(found, torch.where(w.isnan(), signed_nan, expected))


@st.composite
def dequantizations(draw: st.DrawFn) -> tuple[Tensor, float | Tensor, torch.dtype]:
    codes = draw(tensors(st.just("bits"), dtypes=(torch.uint8,)))
    rows = codes.shape[0] if codes.dim() else 1
    return codes, draw(row_values(rows, zero=False)), draw(st.sampled_from(DTYPES))


@fuzz(dequantizations())
def test_values_equal_the_reference(case: tuple[Any, ...]) -> None:
    """A loader computes with these values."""
    found, expected = both("dequantize_e4m3", *case)
    assert same(found, expected)


@st.composite
def histograms(draw: st.DrawFn) -> tuple[Tensor, Tensor | None, int]:
    w = draw(tensors(least_rank=1).filter(lambda w: w.numel() > 0))
    rows, channels = (w.shape[0], w.shape[1]) if w.dim() > 1 else (1, w.numel())
    importance = None
    if draw(st.booleans()):
        groups = draw(st.sampled_from([n for n in (1, 2, 3, 8) if rows % n == 0]))
        bits = torch.randint(0, 0x7F800000, (groups, channels), generator=generator(draw(SEEDS)))
        importance = {
            "bits": bits.int().view(torch.float32),
            "ones": torch.ones(groups, channels),
            "sparse": bits.float() * (bits % 5 == 0),
            "zeros": torch.zeros(groups, channels),
            "subnormal": (bits % 7).float() * 2.0**-149,
        }[draw(st.sampled_from(("bits", "ones", "sparse", "zeros", "subnormal")))]
    return w, importance, draw(st.sampled_from((1, 2, 3, 61, 64, 4096, 70001)))


@fuzz(histograms())
def test_histogram_equals_the_reference(case: tuple[Any, ...]) -> None:
    """One weight in another bin may move the threshold of a whole layer."""
    (hist, max_abs), (expected, expected_max) = both("weighted_histogram", *case)
    assert same(max_abs, expected_max)
    assert same(hist, expected)


@st.composite
def histogram_lists(draw: st.DrawFn) -> tuple[Tensor, Tensor]:
    """Draw normalised histograms [L, bins] with max|w| [L]."""
    layers, bins = draw(st.integers(1, 4)), draw(st.sampled_from((1, 2, 3, 7, 64, 100, 513)))
    mass = torch.rand(layers, bins, dtype=torch.float64, generator=generator(draw(SEEDS)))
    hists = {
        "smooth": mass + 0.5,
        "steep": mass**20,
        "sparse": mass * (mass > 0.9),
        "spike": (mass == mass.amax(1, keepdim=True)).double(),
    }[draw(st.sampled_from(("smooth", "steep", "sparse", "spike")))]
    hists[:, -1] += 2.0**-30
    largest = st.one_of(
        st.sampled_from((0.0, math.nan, *EXTREMES, 464.0, 1e30, 2.0**126)),
        st.floats(2.0**-149, 2.0**126, width=32),
    )
    max_abs = draw(st.lists(largest, min_size=layers, max_size=layers))
    return hists / hists.sum(1, keepdim=True), torch.tensor(max_abs, dtype=torch.float32)


@fuzz(histogram_lists(), st.booleans(), st.sampled_from((2, 3, 9, 40)), st.integers(0, 4))
def test_search_equals_the_reference(
    hists: tuple[Tensor, Tensor], scaled: bool, candidates: int, refinements: int
) -> None:
    """Another threshold is another file."""
    (amax, mse), (expected, expected_mse) = both(
        "search_amax", *hists, scaled, candidates, refinements
    )
    assert same(amax, expected)
    assert same(mse, expected_mse)


@fuzz(histogram_lists(), st.booleans(), st.lists(st.floats(0, 1.5), min_size=1, max_size=9))
def test_objective_is_within_its_bound(
    hists: tuple[Tensor, Tensor], scaled: bool, fractions: list[float]
) -> None:
    """The bound of the contract, once for each side."""
    for hist, max_abs in zip(*hists, strict=True):
        if max_abs.isnan():
            continue
        thresholds = (torch.tensor(fractions) * max_abs).float()
        found, expected = both("clip_mse", hist, max_abs, thresholds, scaled)
        bins = hist.numel()
        centres = (torch.arange(bins, dtype=torch.float64) + 0.5) * (float(max_abs) / bins)
        power = float((hist * centres * centres).sum())
        bound = 2 * 10 * (bins + 160) * UNIT64 * power
        assert bool(((found - expected).abs() <= bound).all())


@fuzz(tensors())
def test_moments_are_within_their_bound(y: Tensor) -> None:
    """The bound of the contract, once for each side; what is not finite is so on both."""
    found, expected = both("moments", y)
    values = y.double()
    sizes = torch.stack((values.abs().sum(), (values * values).sum()))
    assert found[0] == expected[0] == y.numel()
    if sizes.isfinite().all():
        bound = 2 * y.numel() * UNIT64 * (1 + y.numel() * UNIT64) * sizes
        assert bool(((found - expected)[1:].abs() <= bound).all())
    else:
        assert same(found, expected)


@st.composite
def channel_tensors(draw: st.DrawFn) -> tuple[Tensor, int]:
    x = draw(tensors(least_rank=1))
    return x, draw(st.integers(-x.dim(), x.dim() - 1))


@fuzz(channel_tensors())
def test_channel_means_are_within_their_bound(case: tuple[Tensor, int]) -> None:
    """The importance of a channel comes from that channel."""
    x, dim = case
    found, expected = both("channel_abs_mean", x, dim)
    assert found.shape == expected.shape == (x.shape[dim],)
    finite = expected.isfinite()
    assert same(found[~finite], expected[~finite])
    count = x.numel() // max(1, x.shape[dim])
    bound = 2 * (count + 2) * UNIT64 * expected[finite]
    assert bool(((found - expected)[finite].abs() <= bound).all())


@fuzz(channel_tensors(), tensors(), st.booleans())
def test_monitor_adds_its_parts(case: tuple[Tensor, int], y: Tensor, shared: bool) -> None:
    """The fused op is moments and channel_abs_mean, rounded to fixed point; a bad call is only
    counted."""
    x, dim = case
    sums = MonitorAccumulators.zeros(x.shape[dim])
    expected = MonitorAccumulators.zeros(x.shape[dim])
    parts = kernels.channel_abs_mean(x, dim, backend="cpp")
    given_mean = parts.clone() if shared else None
    abs_mean = kernels.monitor(x, y, dim, sums, given_mean, backend="cpp")
    assert same(abs_mean, parts)
    count, *totals = kernels.moments(y, backend="cpp").unbind()
    means = torch.stack(totals) / count
    limits = (fixed_point.MEAN_LIMIT, fixed_point.ABS_MEAN_LIMIT)
    if bool((means.abs() <= limits[0]).all() & (parts <= limits[1]).all()):
        expected.calls.add_(1)
        mean_y, mean_y2 = fixed_point.to_pair(means).unbind()
        expected.mean_y.add_(mean_y)
        expected.mean_y2.add_(mean_y2)
        expected.abs_mean.add_(fixed_point.to_fixed(parts, fixed_point.ABS_MEAN_BITS))
    else:
        expected.skipped.add_(1)
    for field in FIELDS:
        assert torch.equal(getattr(sums, field), getattr(expected, field)), field


@st.composite
def roundings(draw: st.DrawFn) -> tuple[Tensor, Tensor, float | Tensor, Tensor]:
    rows, columns = draw(st.sampled_from((1, 2, 9, 65))), draw(st.sampled_from((1, 2, 31, 64, 67)))
    dtype, seed = draw(st.sampled_from(DTYPES)), draw(SEEDS)
    w = elements(draw(FINITE_KINDS), rows * columns, dtype, seed).reshape(rows, columns)
    random = generator(seed)
    upper = torch.randn(columns, columns, dtype=torch.float64, generator=random) * 0.1
    upper.diagonal().abs_().add_(0.5)
    order = torch.randperm(columns, generator=random)
    return w, upper, draw(row_values(rows, zero=False)), order


@fuzz(roundings())
def test_compensated_codes_equal_the_reference(case: tuple[Any, ...]) -> None:
    """Rounding errors are spread in a fixed order."""
    # Where a value of a code overflows, errors become Inf - Inf: NaN of no particular sign.
    unsigned = [
        torch.where((codes & 0x7F) == 0x7F, codes & 0x7F, codes)
        for codes in both("round_compensated", *case)
    ]
    assert torch.equal(*unsigned)


@st.composite
def sweeps(draw: st.DrawFn) -> tuple[Tensor, Tensor, Tensor, float | Tensor]:
    columns, lanes = draw(st.sampled_from((1, 2, 31, 64))), draw(st.sampled_from((1, 2, 65, 130)))
    random = generator(draw(SEEDS))
    size = draw(st.sampled_from((1e-6, 1.0, 1e3, 1e30)))
    slope = torch.randn(columns, lanes, generator=random) * size
    codes = torch.randint(0, 256, (columns, lanes), generator=random).to(torch.uint8)
    second = torch.randn(columns, columns, generator=random)
    second.diagonal().abs_().add_(draw(st.sampled_from((1e-3, 1.0, 10.0))))
    return slope, codes, second, draw(row_values(lanes, zero=False))


@fuzz(sweeps())
def test_swept_codes_equal_the_reference(case: tuple[Any, ...]) -> None:
    """Codes of NaN among them, and slopes that overflow."""
    slope, codes, second, scale = case
    found = []
    for name in ("reference", "cpp"):
        given = slope.clone(), codes.clone()
        steps = kernels.sweep_codes(*given, second, scale, backend=name)
        found.append((given[1], given[0].nan_to_num(3.0), steps.nan_to_num(3.0)))
    assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))


@st.composite
def gram_inputs(draw: st.DrawFn) -> tuple[Tensor, torch.dtype, int, dict[str, Any]]:
    dtype, seed = draw(st.sampled_from(DTYPES)), draw(SEEDS)
    kind = draw(FINITE_KINDS)
    accumulator_dtype = draw(st.sampled_from((torch.float32, torch.float64)))
    pair = st.tuples(st.integers(1, 3), st.integers(1, 3))
    if draw(st.booleans()):
        images, channels = draw(st.sampled_from((1, 3))), draw(st.sampled_from((1, 2, 6)))
        shape = (images, channels, draw(st.integers(5, 9)), draw(st.integers(5, 9)))
        geometry = {
            "kernel_size": draw(pair),
            "stride": draw(pair),
            "dilation": draw(st.sampled_from(((1, 1), (2, 1)))),
            "padding": draw(st.tuples(st.integers(0, 2), st.integers(0, 2))),
        }
        blocks = draw(st.sampled_from([n for n in (1, 2, 6) if channels % n == 0]))
    else:
        shape = (draw(st.sampled_from((1, 2, 17, 65))), draw(st.sampled_from((1, 6, 30, 66))))
        geometry = {}
        blocks = draw(st.sampled_from([n for n in (1, 2, 6) if shape[-1] % n == 0]))
    x = elements(kind, math.prod(shape), dtype, seed).reshape(shape)
    if draw(st.booleans()):
        x = x.transpose(0, -1).contiguous().transpose(0, -1)
    return x, accumulator_dtype, blocks, geometry


@fuzz(gram_inputs())
def test_gram_is_within_its_bound(case: tuple[Any, ...]) -> None:
    """The bound of the contract, once for each side; sums of magnitudes give its size."""
    x, dtype, blocks, geometry = case
    kernel = geometry.get("kernel_size")
    columns = x.shape[-1] if kernel is None else x.shape[1] * kernel[0] * kernel[1]
    shape = (blocks, columns // blocks, columns // blocks)
    found, expected = (torch.zeros(shape, dtype=dtype) for _ in range(2))
    sizes = torch.zeros(shape, dtype=torch.float64)
    rows = kernels.gram(x, found, **geometry, backend="cpp")
    assert torch.equal(rows, kernels.gram(x, expected, **geometry, backend="reference"))
    if int(rows) == 0:
        assert torch.equal(found, torch.zeros(shape, dtype=dtype))
        return
    kernels.gram(x.abs(), sizes, **geometry, backend="reference")
    bound = 2 * (int(rows) + 1) * significand_unit(dtype) * sizes * (1 + 2.0**-20)
    # Products below the smallest normal number lose more.
    bound = bound + 2 * int(rows) * torch.finfo(dtype).smallest_normal
    assert bool(((found.double() - expected.double()).abs() <= bound).all())


OTHER_DTYPES = (torch.float64, torch.int64, torch.uint8, torch.bool)
ODD_NUMBERS = st.sampled_from((-1, 0, 1, 2, 7, -(1 << 40)))
ODD_FLOATS = st.sampled_from((0.0, -0.0, 1.0, -1.0, math.nan, math.inf, -math.inf, 1e300, 1e-300))


@st.composite
def odd_tensors(draw: st.DrawFn) -> Tensor:
    """Draw a tensor that fits nowhere in particular."""
    shape = draw(st.lists(st.sampled_from((0, 1, 2, 3, 6)), max_size=4))
    dtype = draw(st.sampled_from((*DTYPES, *OTHER_DTYPES)))
    values = elements(draw(KINDS), math.prod(shape), torch.float32, draw(SEEDS)).reshape(shape)
    if dtype in OTHER_DTYPES:
        values = values.nan_to_num().clamp(-9, 9)
    return values.to(dtype)


ODD = st.one_of(odd_tensors(), ODD_FLOATS)
HOSTILE = st.one_of(
    st.tuples(st.just("moments"), odd_tensors()),
    st.tuples(st.just("channel_abs_mean"), odd_tensors(), ODD_NUMBERS),
    st.tuples(st.just("quantize_e4m3"), odd_tensors(), ODD, ODD),
    st.tuples(
        st.just("dequantize_e4m3"),
        odd_tensors(),
        ODD,
        st.sampled_from((torch.float32, torch.float16, torch.float64, torch.int8)),
    ),
    st.tuples(
        st.just("weighted_histogram"),
        odd_tensors(),
        st.one_of(st.none(), odd_tensors()),
        ODD_NUMBERS,
    ),
    st.tuples(st.just("clip_mse"), odd_tensors(), odd_tensors(), odd_tensors(), st.booleans()),
    st.tuples(
        st.just("search_amax"),
        odd_tensors(),
        odd_tensors(),
        st.booleans(),
        ODD_NUMBERS,
        ODD_NUMBERS,
    ),
    st.tuples(st.just("gram"), odd_tensors(), odd_tensors()),
    st.tuples(st.just("round_compensated"), odd_tensors(), odd_tensors(), ODD, odd_tensors()),
    st.tuples(st.just("sweep_codes"), odd_tensors(), odd_tensors(), odd_tensors(), ODD),
    st.tuples(
        st.just("monitor"),
        odd_tensors(),
        odd_tensors(),
        ODD_NUMBERS,
        st.builds(MonitorAccumulators.zeros, st.sampled_from((0, 1, 2, 3, 6))),
        st.one_of(st.none(), odd_tensors()),
    ),
)


@fuzz(HOSTILE)
def test_hostile_arguments_are_refused_or_answered_alike(call: tuple[Any, ...]) -> None:
    """A wrong argument is refused by hswq's own errors, with either backend, and never crashes."""
    op, *arguments = call
    outcomes = []
    for backend in ("cpp", "reference"):
        try:
            getattr(kernels, op)(*arguments, backend=backend)
            outcomes.append("answered")
        except HswqError as error:
            outcomes.append(f"{type(error).__name__}: {error}")
    assert outcomes[0] == outcomes[1]
