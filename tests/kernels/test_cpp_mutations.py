"""The suite of the C++ extension: one wrong line of csrc/ must fail it.

A mutation whose line is no longer found fails too, so that none of them rots.
"""

from __future__ import annotations

import shutil
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from queue import SimpleQueue

import pytest

from tests.kernels import builds

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("extension")]


@dataclass(frozen=True)
class Mutation:
    """One line that is replaced.

    Attributes:
        mistake: what the line then does.
        file: of csrc/.
        old: occurs once in it.
        new: replaces it.
        tests: files of tests/kernels, one of which must fail.
    """

    mistake: str
    file: str
    old: str
    new: str
    tests: str

    def __str__(self) -> str:
        return self.mistake


MUTATIONS = [
    Mutation(*fields)
    for fields in (
        (
            "codes are rounded toward zero",
            "e4m3.h",
            "(magnitude + below_half + odd) >> kDropped",
            "magnitude >> kDropped",
            "quantize_e4m3",
        ),
        (
            "ties go away from zero",
            "e4m3.h",
            "magnitude + below_half + odd",
            "magnitude + below_half + 1",
            "quantize_e4m3",
        ),
        (
            "subnormal codes are rounded toward zero",
            "e4m3.h",
            "BitsOf(FloatOf(magnitude) + FloatOf(kUnitBits)) - kUnitBits",
            "static_cast<uint32_t>(FloatOf(magnitude) * FloatOf((253u << 23) - kUnitBits + "
            "(24u << 23)))",
            "quantize_e4m3",
        ),
        (
            "saturation ends at 480",
            "e4m3.h",
            "kE4m3MaxBits = 0x43e00000",
            "kE4m3MaxBits = 0x43f00000",
            "quantize_e4m3",
        ),
        (
            "NaN saturates",
            "e4m3.h",
            "magnitude > kFloatInfinity ? kE4m3NaN : rounded",
            "rounded",
            "quantize_e4m3",
        ),
        (
            "NaN loses its sign",
            "e4m3.h",
            "((bits >> 24) & 0x80) | (magnitude > kFloatInfinity ? kE4m3NaN : rounded)",
            "magnitude > kFloatInfinity ? kE4m3NaN : ((bits >> 24) & 0x80) | rounded",
            "quantize_e4m3",
        ),
        (
            "the quotient is a product with the reciprocal",
            "quantize.inl",
            "clipped / scale",
            "clipped * (1.0f / scale)",
            "quantize_e4m3",
        ),
        (
            "negative weights are not clipped",
            "quantize.inl",
            "value < -amax ? -amax : value",
            "value",
            "quantize_e4m3",
        ),
        (
            "the tail of the look-up of codes is dropped",
            "quantize.inl",
            "for (; i < count; ++i) codes[i] = table[weights[i]];",
            "",
            "quantize_e4m3",
        ),
        (
            "the tail of the arithmetic of codes is dropped",
            "quantize.inl",
            "for (size_t i = 0; i < count; ++i) {\n    const float value",
            "for (size_t i = 0; i < count / 8 * 8; ++i) {\n    const float value",
            "quantize_e4m3",
        ),
        (
            "the tail of the look-up of values is dropped",
            "quantize.inl",
            "for (size_t i = 0; i < count; ++i) values[i] = table[codes[i]];",
            "for (size_t i = 0; i < count / 8 * 8; ++i) values[i] = table[codes[i]];",
            "dequantize_e4m3",
        ),
        (
            "the largest subnormal codes become the next normal bfloat16",
            "quantize.inl",
            "magnitude >= 4 ? upper : magnitude >= 2 ? lower : least",
            "magnitude >= 2 ? lower : least",
            "dequantize_e4m3",
        ),
        (
            "bfloat16 ties go away from zero",
            "floats.inl",
            "bits + 0x7fff + ((bits >> 16) & 1)",
            "bits + 0x8000",
            "cpp_extension",
        ),
        (
            "float16 overflows past infinity",
            "floats.inl",
            "rounded < 0x7c00 ? rounded : 0x7c00",
            "rounded",
            "dequantize_e4m3",
        ),
        (
            "float16 subnormals are read as normal numbers",
            "floats.inl",
            "magnitude < 0x400 ? subnormal : normal",
            "normal",
            "quantize_e4m3",
        ),
        (
            "the last block is dropped",
            "blocks.h",
            "return (count + kBlock - 1) / kBlock;",
            "return count < kBlock ? 1 : count / kBlock;",
            "moments",
        ),
        (
            "an element is lost where two blocks meet",
            "blocks.h",
            "std::min(count, (block + 1) * kBlock)",
            "std::min(count, (block + 1) * kBlock - 1)",
            "cpp_extension",
        ),
        (
            "a block starts one element early",
            "blocks.h",
            "static_cast<const char*>(elements) + count *",
            "static_cast<const char*>(elements) + (count == kBlock ? count - 1 : count) *",
            "moments",
        ),
        (
            "a row takes the first element of the next",
            "blocks.h",
            "std::min(end, (row + 1) * row_size)",
            "std::min(end, (row + 1) * row_size + 1)",
            "quantize_e4m3",
        ),
        (
            "importance is ignored for 16-bit weights",
            "histogram.inl",
            "& 0x7fff] += importance[c]",
            "& 0x7fff] += importance[0]",
            "weighted_histogram",
        ),
        (
            "importance starts again with every chunk",
            "histogram.inl",
            "importance[begin + i]",
            "importance[i]",
            "weighted_histogram",
        ),
        (
            "weights lie one bin too high",
            "histogram.inl",
            "index < last ? index : last",
            "index + 1 < last ? index + 1 : last",
            "weighted_histogram",
        ),
        (
            "the division by the bin width is a product with its reciprocal",
            "histogram.inl",
            "Magnitude(Format::ToFloat(weights[begin + i])) / width",
            "Magnitude(Format::ToFloat(weights[begin + i])) * (1.0f / width)",
            "weighted_histogram",
        ),
        (
            "every group has the importance of the first",
            "histogram.cpp",
            "group * weights_.channels + column / weights_.taps",
            "column / weights_.taps",
            "weighted_histogram",
        ),
        (
            "a row that was cut starts with the first importance",
            "histogram.cpp",
            "group * weights_.channels + column / weights_.taps",
            "group * weights_.channels",
            "weighted_histogram cpp_extension",
        ),
        (
            "a cut kernel starts with its first element",
            "histogram.cpp",
            "weights_.taps - column % weights_.taps",
            "weights_.taps",
            "weighted_histogram cpp_extension",
        ),
        (
            "a block of rows takes the importance of its first group",
            "histogram.cpp",
            "std::min(end, (group + 1) * group_rows)",
            "end",
            "weighted_histogram cpp_extension",
        ),
        (
            "the last rows are dropped",
            "histogram.cpp",
            "(rows + tile_rows_ - 1) / tile_rows_",
            "std::max<size_t>(1, rows / tile_rows_)",
            "weighted_histogram cpp_extension",
        ),
        (
            "the last columns are dropped",
            "histogram.cpp",
            "(row_size_ + tile_columns_ - 1) / tile_columns_",
            "row_size_ / tile_columns_",
            "weighted_histogram cpp_extension",
        ),
        (
            "a finite maximum hides what is damaged",
            "histogram.cpp",
            "std::isfinite(largest) && !(found <= largest)",
            "!(found <= largest)",
            "weighted_histogram cpp_extension",
        ),
        (
            "the largest magnitudes are not binned",
            "histogram.cpp",
            "largest, exceeds) - all)",
            "largest, exceeds) - all - 1)",
            "weighted_histogram",
        ),
        (
            "sums of the call before are left",
            "histogram.cpp",
            "std::fill_n(tables, used, int64_t{0});",
            "",
            "weighted_histogram cpp_extension",
        ),
        (
            "sums of another worker's call before are left",
            "histogram.cpp",
            "std::fill_n(table, used, int64_t{0});",
            "",
            "weighted_histogram cpp_extension",
        ),
        (
            "damaged weights pass",
            "histogram.cpp",
            "return std::isfinite(value);",
            "return !std::isnan(value);",
            "weighted_histogram",
        ),
        (
            "the objective rounds ties to even",
            "search.inl",
            "bits + (kDroppedMask >> 1)",
            "bits + (kDroppedMask >> 1) + ((bits >> 49) & 1)",
            "cpp_extension",
        ),
        (
            "the objective rounds subnormal ties up",
            "search.inl",
            "steps - whole > 0.5",
            "steps - whole >= 0.5",
            "cpp_extension",
        ),
        (
            "centres lie at the left edge of their bins",
            "search.inl",
            "static_cast<double>(b) + 0.5",
            "static_cast<double>(b)",
            "clip_mse",
        ),
        (
            "refinements reach 1.25 times the maximum",
            "search.cpp",
            "1.2 * max_abs_",
            "1.25 * max_abs_",
            "search_amax",
        ),
        (
            "refinements look half as far",
            "search.cpp",
            "(high - low) / 4",
            "(high - low) / 8",
            "search_amax",
        ),
        (
            "the last of equal candidates wins",
            "search.cpp",
            "error < *mse",
            "error <= *mse",
            "search_amax",
        ),
        (
            "the ranking by sums over codepoints decides",
            "search.cpp",
            "0x1p-42 * histogram_.power",
            "0.0",
            "cpp_extension",
        ),
        (
            "the tail of the moments is dropped",
            "monitor.inl",
            "for (size_t lane = 0; i + lane < count; ++lane) {",
            "for (size_t lane = 0; i + lane + 1 < count; ++lane) {",
            "moments",
        ),
        (
            "the tail of a channel is dropped",
            "monitor.inl",
            "for (size_t lane = 0; i + lane < count; ++lane) sum[lane] += ",
            "for (size_t lane = 0; i + lane + 1 < count; ++lane) sum[lane] += ",
            "channel_abs_mean",
        ),
        (
            "the first of two neighbours is dropped",
            "monitor.inl",
            "*first = FloatOf(word << 16);",
            "*first = FloatOf(word & 0xffff0000);",
            "moments",
        ),
        (
            "the last channels are dropped",
            "monitor.inl",
            "for (; c < channels; ++c) add(c);",
            "",
            "channel_abs_mean",
        ),
        (
            "channel means keep the sign",
            "monitor.inl",
            "static_cast<double>(Magnitude(Format::ToFloat(value)))",
            "static_cast<double>(Format::ToFloat(value))",
            "channel_abs_mean",
        ),
        (
            "the last rows of eight are dropped",
            "monitor.inl",
            "for (; row < outer; ++row)",
            "for (; row + 8 <= outer; ++row)",
            "channel_abs_mean",
        ),
        (
            "the last channels are dropped",
            "monitor.cpp",
            "columns_ = (channels + tile_channels_ - 1) / tile_channels_",
            "columns_ = channels < tile_channels_ ? 1 : channels / tile_channels_",
            "channel_abs_mean",
        ),
        (
            "the carry from the low part is dropped",
            "monitor.cpp",
            "low < 0 ? -1 : low / step",
            "0",
            "cpp_extension",
        ),
        (
            "the mean is cut instead of rounded to its step",
            "monitor.cpp",
            "std::nearbyint((scaled - whole) * 0x1p48)",
            "std::floor((scaled - whole) * 0x1p48)",
            "cpp_extension",
        ),
        (
            "mean squares out of range are counted",
            "monitor.cpp",
            "mean_square <= kMeanLimit &&",
            "mean_square <= 0x1p60 &&",
            "monitor",
        ),
        (
            "a tap left of the image reads its first column",
            "gram.inl",
            "inside && column_x < patches.size[1]",
            "inside",
            "gram",
        ),
        (
            "the other triangle is left out",
            "gram.inl",
            "if (first_i == first_j) return;",
            "return;",
            "gram",
        ),
        (
            "the last rows of a panel are left out",
            "gram.inl",
            "rows - row < kDepth ? rows - row : kDepth",
            "rows - row < kDepth ? (rows - row) / 4 * 4 : kDepth",
            "gram",
        ),
        (
            "inputs above the limit are counted",
            "gram.cpp",
            "value <= kValueLimit",
            "value <= 2 * kValueLimit",
            "gram",
        ),
        (
            "errors are those of values in float64",
            "rounding.inl",
            "FloatOf(DecodeE4m3(code)) * scale[lane])",
            "FloatOf(DecodeE4m3(code))) * static_cast<double>(scale[lane])",
            "cpp_extension",
        ),
        (
            "errors of a block do not reach the next",
            "rounding.inl",
            "first = begin + size; first < columns;",
            "first = begin + size; first + kRoundedColumns < columns;",
            "round_compensated",
        ),
        (
            "codes stay in the order of rounding",
            "rounding.inl",
            "static_cast<size_t>(order[begin + k])",
            "begin + k",
            "round_compensated",
        ),
        (
            "the last columns of a block get no steps",
            "rounding.inl",
            "for (size_t l = 0; l < columns; ++l) {",
            "for (size_t l = 0; l < columns / 4 * 4; ++l) {",
            "sweep_codes",
        ),
        (
            "equally near codes move",
            "rounding.inl",
            "Magnitude(other - best) < Magnitude(value - best)",
            "Magnitude(other - best) <= Magnitude(value - best)",
            "sweep_codes",
        ),
        (
            "a caller's flushing of subnormals reaches the kernels",
            "parallel.h",
            "std::fesetenv(FE_DFL_ENV);",
            "",
            "cpp_extension",
        ),
    )
]


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[int, str]]:
    """Exit status and output of the tests that belong to each mutation."""
    folder = tmp_path_factory.mktemp("mutations")
    whole = builds.Build(builds.ROOT / "csrc", folder / "objects", ["-O1"])
    whole.compile(whole.sources())
    trees: SimpleQueue[Path] = SimpleQueue()
    for number in range(builds.JOBS):
        trees.put(builds.copy_tree(folder / f"tree{number}"))

    def run(build: builds.Build, tests: str) -> tuple[int, str]:
        tree = trees.get()
        build.link(tree / builds.EXTENSION, build.sources(), "-shared")
        files = [f"tests/kernels/test_{name}.py" for name in tests.split()]
        outcome = builds.run_tests(
            tree, *files, "-k", "cpp", "-m", "not slow", HSWQ_ISA="baseline", HSWQ_NUM_THREADS="3"
        )
        trees.put(tree)
        return outcome.returncode, outcome.stdout

    def run_mutation(number: int) -> tuple[int, str]:
        mutation = MUTATIONS[number]
        place = folder / f"mutant{number}"
        try:
            build = whole.mutant(place, mutation.file, mutation.old, mutation.new)
        except LookupError as error:
            return 2, str(error)
        result = run(build, mutation.tests)
        shutil.rmtree(place)
        return result

    every_test = " ".join(sorted({name for m in MUTATIONS for name in m.tests.split()}))
    with ThreadPoolExecutor(builds.JOBS) as pool:
        unchanged = pool.submit(run, whole, every_test)
        results = pool.map(run_mutation, range(len(MUTATIONS)))
        found = dict(zip(map(str, MUTATIONS), results, strict=True))
        return {"": unchanged.result(), **found}


def test_unchanged_sources_pass(outcomes: dict[str, tuple[int, str]]) -> None:
    """Tests that fail anyway would find every mutation."""
    status, output = outcomes[""]
    assert status == 0, output


@pytest.mark.parametrize("mutation", MUTATIONS, ids=str)
def test_mutation_is_found(mutation: Mutation, outcomes: dict[str, tuple[int, str]]) -> None:
    """A line that may be wrong without a failing test is not tested."""
    status, output = outcomes[str(mutation)]
    # What cannot even be loaded fails every test and says nothing of them.
    assert "cannot be imported" not in output, output[-2000:]
    # 1 is pytest's word for failed tests, a negative status a crash.
    assert status == 1 or status < 0, output[-2000:]
