"""What only the C++ extension has: threads, blocks, workspaces, the float environment.

That its ops compute what they should is the business of the suite that all backends share.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from hswq import kernels
from hswq.errors import OptionError
from hswq.kernels import MonitorAccumulators, contract, cpp_backend
from tests.kernels import builds
from tests.kernels.cases import DTYPES, normal

pytestmark = pytest.mark.usefixtures("extension")

# Elements that one thread takes at a time (csrc/blocks.h).
BLOCK = 1 << 15


def test_columns_of_a_sweep_fit_into_their_buffer() -> None:
    """The contract lets so many pass, and the kernel has no other bound."""
    assert cpp_backend._cpp.SWEPT_COLUMNS == contract.MAX_SWEPT


@pytest.mark.parametrize("threads", ["0", "-1", "two", ""])
def test_bad_number_of_threads_is_refused(threads: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Passed on, it would start no thread or any number of them."""
    monkeypatch.setenv("HSWQ_NUM_THREADS", threads)
    with pytest.raises(OptionError, match="HSWQ_NUM_THREADS"):
        kernels.moments(torch.ones(3), backend="cpp")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("row", [1, 31, BLOCK - 1, BLOCK, BLOCK + 1])
def test_rows_meet_their_own_values_across_blocks(row: int, dtype: torch.dtype) -> None:
    """A row that ends inside a block, or spans several, must not shift scales or importances."""
    w = normal(2 * BLOCK // row // 8 * 4 + 4, row, dtype=dtype)
    amax = normal(len(w), seed=1).abs() + 0.1
    codes, expected_codes = (
        kernels.quantize_e4m3(w, amax, amax / 300, backend=name) for name in ("cpp", "reference")
    )
    assert torch.equal(codes, expected_codes)
    values, expected_values = (
        kernels.dequantize_e4m3(codes, amax, dtype, backend=name) for name in ("cpp", "reference")
    )
    assert torch.equal(values, expected_values)
    importance = normal(4, row, seed=2).abs()
    hist, expected_hist = (
        kernels.weighted_histogram(w, importance, 100, backend=name)[0]
        for name in ("cpp", "reference")
    )
    assert torch.equal(hist, expected_hist)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("shape", "groups"),
    [
        ((66, 115, 3, 3), 1),
        ((66, 115, 3, 3), 6),
        ((3, 2003), 3),
        ((5, 1, 7, 300), 5),
        ((1, 70_003), 1),
    ],
)
def test_tiles_of_a_histogram_keep_their_importance(
    shape: tuple[int, ...], groups: int, dtype: torch.dtype
) -> None:
    """Tiles end inside kernels, rows and groups."""
    w = normal(*shape, dtype=dtype)
    importance = normal(groups, shape[1], seed=2).abs()
    found, expected = (
        kernels.weighted_histogram(w, importance, 333, backend=name)
        for name in ("cpp", "reference")
    )
    assert torch.equal(found[0], expected[0])
    assert torch.equal(found[1], expected[1])


@pytest.mark.parametrize("damage", [float("nan"), float("inf")])
def test_damage_in_one_group_shows(damage: float) -> None:
    """The groups of a tile are looked at one after the other."""
    w = normal(6, 4)
    for row in range(6):
        damaged = w.clone()
        damaged[row, 1] = damage
        hist, max_abs = kernels.weighted_histogram(damaged, torch.ones(3, 4), 9, backend="cpp")
        assert hist.isnan().all()
        assert max_abs.isnan()


def test_layers_of_one_search_do_not_meet() -> None:
    """Workspace left over from the layer before would change the answer of the next."""
    weights = [normal(64, 48, sigma=sigma, seed=i) for i, sigma in enumerate((1.0, 0.01, 500.0))]
    weights.insert(1, torch.zeros(3, 5))
    found = [kernels.weighted_histogram(w, None, 4096, backend="cpp") for w in weights]
    hists, max_abs = (torch.stack(parts) for parts in zip(*found, strict=True))
    for scaled in (False, True):
        together = kernels.search_amax(hists, max_abs, scaled, 50, 3, backend="cpp")
        alone = [
            kernels.search_amax(hist, largest, scaled, 50, 3, backend="cpp")
            for hist, largest in zip(hists, max_abs, strict=True)
        ]
        for all_at_once, one_by_one in zip(together, zip(*alone, strict=True), strict=True):
            assert torch.equal(all_at_once, torch.stack(one_by_one))


def test_near_tie_is_settled_by_the_definition() -> None:
    """Here sums over codepoints rank a candidate first that the direct sum does not: without the
    error bound between them, later stages would search around the wrong threshold."""
    hist = torch.zeros(16, dtype=torch.float64)
    hist[6], hist[8] = 0.00043714154991197587, 0.999562858450088
    max_abs = torch.tensor(float.fromhex("0x1.929452p-1"))
    found, expected = (
        kernels.search_amax(hist, max_abs, True, 200, 18, backend=name)
        for name in ("cpp", "reference")
    )
    assert torch.equal(found[0], expected[0])
    assert torch.equal(found[1], expected[1])


# Codes and scales whose products lie in the middle of two float16 or bfloat16.
@pytest.mark.parametrize(
    ("dtype", "scale"),
    [
        (torch.bfloat16, 1 + 2.0**-8),
        (torch.bfloat16, 1 + 3 * 2.0**-8),
        (torch.float16, 1 + 2.0**-11),
        (torch.float16, 1 + 3 * 2.0**-11),
        (torch.float16, 2.0**-17 * 1.5),
        (torch.bfloat16, 2.0**-126 * (1 + 2.0**-8)),
    ],
)
def test_values_at_ties_are_cast_to_the_even_one(dtype: torch.dtype, scale: float) -> None:
    """Half of all ties would lie one step too high if they were rounded up."""
    codes = torch.arange(256, dtype=torch.uint8)
    codes = codes[(codes & 0x7F) != 0x7F].repeat(9)[3:]
    found, expected = (
        kernels.dequantize_e4m3(codes, scale, dtype, backend=name) for name in ("cpp", "reference")
    )
    products = kernels.dequantize_e4m3(codes, scale, torch.float32, backend="reference")
    mantissa = 16 if dtype == torch.bfloat16 else 13
    ties = (products.view(torch.int32) & ((1 << mantissa) - 1)) == 1 << (mantissa - 1)
    assert bool(ties.any()) or scale < 1, "the case shows no tie"
    assert torch.equal(found.view(torch.int16), expected.view(torch.int16))


def test_compensated_errors_are_those_of_float32_values() -> None:
    """What a loader computes with is the rounded product of code and scale. Here the second column
    is what the first one's error takes from it, magnified: only its last bits are left."""
    scale = normal(200, seed=2).abs() * 1e-4 + 1e-5
    first = normal(200, sigma=0.02)
    codes = kernels.quantize_e4m3(first[:, None], 1e3, scale, backend="reference")
    values = kernels.dequantize_e4m3(codes, scale, backend="reference")[:, 0]
    upper = torch.tensor([[1.0, 2.0**20], [0.0, 1.0]], dtype=torch.float64)
    second = (first.double() - values.double()) * upper[0, 1]
    w = torch.stack((first, second.float()), 1)
    found, expected = (
        kernels.round_compensated(w, upper, scale, torch.arange(2), backend=name)
        for name in ("cpp", "reference")
    )
    assert torch.equal(found, expected)


# Bins whose centre lies between two codepoints, normal or subnormal, at the second of two
# thresholds; the last bin makes sure that it is chosen.
@pytest.mark.parametrize(
    ("max_abs", "bins", "tie", "share"),
    [("0x1.484402p+0", 28, 11, 0.5), ("0x1.62ff88p-1", 32768, 0, 1 - 2.0**-30)],
)
def test_ties_of_the_objective_go_down(max_abs: str, bins: int, tie: int, share: float) -> None:
    """Rounded up, the error has other last bits than the reference's."""
    hist = torch.zeros(bins, dtype=torch.float64)
    hist[tie], hist[-1] = share, 1 - share
    largest = torch.tensor(float.fromhex(max_abs))
    found, expected = (
        kernels.search_amax(hist, largest, True, 2, 0, backend=name)
        for name in ("cpp", "reference")
    )
    assert float(expected[0]) == float(largest)
    assert torch.equal(found[0], expected[0])
    assert torch.equal(found[1], expected[1])


@pytest.mark.parametrize(
    "value", [-0.3, 0.3, -7.0, -(2.0**-60), 0.0, -0.0, 1e12, 0.75 * 2.0**-56, -1.75 * 2.0**-56]
)
def test_mean_is_split_into_the_parts_of_the_reference(value: float) -> None:
    """A low part outside [0, 2**48) would overflow after fewer calls than accumulators promise."""
    y = torch.tensor([value])
    sums = {name: MonitorAccumulators.zeros(1) for name in ("cpp", "reference")}
    for name, accumulators in sums.items():
        kernels.monitor(torch.ones(1), y, -1, accumulators, backend=name)
    for part in ("calls", "skipped", "mean_y", "mean_y2", "abs_mean"):
        assert torch.equal(getattr(sums["cpp"], part), getattr(sums["reference"], part))


def test_flushing_subnormals_elsewhere_changes_no_codepoint() -> None:
    """A caller that lets its thread flush subnormals would otherwise get zeros from that thread."""
    w = torch.linspace(-1e-39, 1e-39, 101)
    expected = kernels.quantize_e4m3(w, 1.0, 1.5e-38, backend="cpp")
    assert expected.unique().numel() > 10
    assert torch.set_flush_denormal(True)
    try:
        codes = kernels.quantize_e4m3(w, 1.0, 1.5e-38, backend="cpp")
    finally:
        torch.set_flush_denormal(False)
    assert torch.equal(codes, expected)


def test_calls_from_several_threads_do_not_wait_for_each_other() -> None:
    """One call at a time has the helper threads; the others must still do all their work."""
    weights = [normal(1_000_003, sigma=0.02, dtype=torch.float16, seed=seed) for seed in range(6)]
    expected = [kernels.quantize_e4m3(w, 0.05, 0.05 / 448, backend="reference") for w in weights]
    with ThreadPoolExecutor(max_workers=6) as pool:
        for _ in range(5):
            found = pool.map(
                lambda w: kernels.quantize_e4m3(w, 0.05, 0.05 / 448, backend="cpp"), weights
            )
            assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_histograms_of_several_callers_do_not_meet(monkeypatch: pytest.MonkeyPatch) -> None:
    """A caller's workers serve the next one while it still reads what they have summed."""
    monkeypatch.setenv("HSWQ_NUM_THREADS", "2")
    weights = [normal(64, 2048, dtype=torch.bfloat16, seed=seed) for seed in range(4)]
    expected = [kernels.weighted_histogram(w, None, 512, backend="reference")[0] for w in weights]

    def wrong(number: int) -> int:
        found = (
            kernels.weighted_histogram(weights[number], None, 512, backend="cpp")[0]
            for _ in range(500)
        )
        return sum(not torch.equal(hist, expected[number]) for hist in found)

    with ThreadPoolExecutor(max_workers=4) as pool:
        assert list(pool.map(wrong, range(4))) == [0, 0, 0, 0]


FORK = """
import os, torch
from hswq import kernels
w = torch.arange(1_000_000, dtype=torch.float32)
expected = kernels.moments(w, backend="cpp")
if os.fork() == 0:
    os._exit(0 if torch.equal(kernels.moments(w, backend="cpp"), expected) else 1)
raise SystemExit(os.waitstatus_to_exitcode(os.wait()[1]))
"""


def test_forked_process_has_threads_of_its_own() -> None:
    """The parent's do not exist there: who waits for them waits for ever."""
    outcome = builds.run_python(builds.ROOT, "-W", "ignore", "-c", FORK, HSWQ_NUM_THREADS="3")
    assert outcome.returncode == 0, outcome.stdout
