"""What only the C++ extension has: instruction sets, threads, blocks, and a build without it.

That its ops compute what they should is the business of the suite that all backends share.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest
import torch
from torch import Tensor

from hswq import kernels
from hswq.errors import OptionError
from hswq.kernels import MonitorAccumulators, cpp_backend
from tests.conftest import required_backends
from tests.kernels.cases import DTYPES, all_patterns, normal

ROOT = Path(__file__).parents[2]
# Elements that one thread takes at a time (csrc/blocks.h).
BLOCK = 1 << 15


@pytest.fixture
def extension(request: pytest.FixtureRequest) -> None:
    """Needs the extension: absent, it fails where --require-backends names cpp."""
    if (reason := cpp_backend.unusable_reason()) is not None:
        complain = pytest.fail if "cpp" in required_backends(request.config) else pytest.skip
        complain(f"backend cpp: {reason}")


def monitored(x: Tensor, y: Tensor, dim: int) -> list[Tensor]:
    sums = MonitorAccumulators.zeros(x.shape[dim])
    abs_mean = kernels.monitor(x, y, dim, sums, backend="cpp")
    kernels.monitor(x, -y, dim, sums, abs_mean, backend="cpp")
    return [abs_mean, sums.calls, sums.mean_y, sums.mean_y2, sums.abs_mean]


def digest() -> str:
    """Hash what every native op returns, on tensors of several blocks cut at odd places."""
    results: list[Tensor] = []
    for seed, dtype in enumerate(DTYPES):
        w = normal(6, 107, 11, 35, sigma=0.02, dtype=dtype, seed=seed)
        importance = normal(2, 107, seed=seed + 10).abs()
        hists, largest = zip(
            kernels.weighted_histogram(w, importance, 4097, backend="cpp"),
            kernels.weighted_histogram(w, None, 4097, backend="cpp"),
            strict=True,
        )
        hist, max_abs = torch.stack(hists), torch.stack(largest)
        results += [hist, max_abs]
        for scaled in (False, True):
            results += kernels.search_amax(hist, max_abs, scaled, 100, 2, backend="cpp")
            candidates = torch.linspace(0.1, 1.2, 77) * max_abs[0]
            results.append(kernels.clip_mse(hist[0], max_abs[0], candidates, scaled, backend="cpp"))
        amax = normal(6, sigma=0.02, seed=seed + 20).abs()
        codes = kernels.quantize_e4m3(w, amax, amax / 448, backend="cpp")
        results += [codes, kernels.dequantize_e4m3(codes, amax, dtype, backend="cpp")]
        if dtype != torch.float32:
            patterns = all_patterns(dtype)
            results.append(kernels.quantize_e4m3(patterns, 448.0, 0.37, backend="cpp"))
        results += [
            kernels.moments(w, backend="cpp"),
            kernels.channel_abs_mean(w, -3, backend="cpp"),
        ]
        results += monitored(w, w, -3) + monitored(w, w, -1)
    sha = hashlib.sha256()
    for result in results:
        sha.update(result.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return sha.hexdigest()


@pytest.mark.usefixtures("extension")
@pytest.mark.parametrize("isa", ["baseline", "avx2", "avx512", "mmx"])
def test_forced_instruction_set_changes_no_bit_or_is_refused(isa: str) -> None:
    """Bits that follow the instruction set would make files depend on the machine that wrote them;
    one that the CPU lacks would crash instead of being refused by name."""
    environment = {**os.environ, "HSWQ_ISA": isa, "PYTHONPATH": str(ROOT)}
    supported = cpp_backend._cpp.supported_isas()
    output = subprocess.run(
        [sys.executable, __file__], env=environment, capture_output=True, text=True, check=True
    ).stdout
    if isa in supported:
        assert output.split() == [isa, digest()]
    else:
        assert f"'{isa}'" in output
        assert ", ".join(supported) in output


@pytest.mark.usefixtures("extension")
def test_number_of_threads_changes_no_bit(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sums that follow the number of threads would make files depend on the machine's load."""
    digests = {}
    for threads in (1, 2, 3, 7):
        monkeypatch.setenv("HSWQ_NUM_THREADS", str(threads))
        digests[threads] = digest()
    assert len(set(digests.values())) == 1, digests


@pytest.mark.usefixtures("extension")
@pytest.mark.parametrize("threads", ["0", "-1", "two", ""])
def test_bad_number_of_threads_is_refused(threads: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Passed on, it would start no thread or any number of them."""
    monkeypatch.setenv("HSWQ_NUM_THREADS", threads)
    with pytest.raises(OptionError, match="HSWQ_NUM_THREADS"):
        kernels.moments(torch.ones(3), backend="cpp")


@pytest.mark.usefixtures("extension")
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


@pytest.mark.usefixtures("extension")
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


@pytest.mark.usefixtures("extension")
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


@pytest.mark.usefixtures("extension")
@pytest.mark.parametrize("value", [-0.3, 0.3, -7.0, -(2.0**-60), 0.0, -0.0, 1e12])
def test_mean_is_split_into_the_parts_of_the_reference(value: float) -> None:
    """A low part outside [0, 2**48) would overflow after fewer calls than accumulators promise."""
    y = torch.tensor([value])
    sums = {name: MonitorAccumulators.zeros(1) for name in ("cpp", "reference")}
    for name, accumulators in sums.items():
        kernels.monitor(torch.ones(1), y, -1, accumulators, backend=name)
    for part in ("calls", "skipped", "mean_y", "mean_y2", "abs_mean"):
        assert torch.equal(getattr(sums["cpp"], part), getattr(sums["reference"], part))


@pytest.mark.usefixtures("extension")
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


@pytest.fixture
def source_tree(tmp_path: Path) -> Path:
    """A copy of what a build reads, without anything that was built."""
    tree = tmp_path / "tree"
    ignore = shutil.ignore_patterns("*.so", "__pycache__")
    for name in ("hswq", "csrc", "kernels"):
        shutil.copytree(ROOT / name, tree / name, ignore=ignore)
    for name in ("pyproject.toml", "setup.py", "README.md", "LICENSE", "NOTICE"):
        shutil.copy(ROOT / name, tree)
    return tree


def run_setup(tree: Path, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "setup.py", "-q", *arguments],
        cwd=tree,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=False,
    )


WITHOUT_EXTENSION = """
import torch
from hswq import kernels
report = {status.name: status for status in kernels.backend_report()}
assert not report["cpp"].usable
assert "HSWQ_BUILD_CPP" in report["cpp"].reason, report["cpp"].reason
assert kernels.quantize_e4m3(torch.tensor([-3.5, 3.6]), 3.5, 1.0).tolist() == [0xC6, 0x46]
import hswq.kernels.triton_backend
"""


def test_build_without_extension_computes_with_the_reference(
    source_tree: Path, tmp_path: Path
) -> None:
    """HSWQ_BUILD_CPP=0 must leave a package that works, with its data and the Triton package."""
    built = tmp_path / "built"
    outcome = run_setup(source_tree, "build", f"--build-lib={built}", HSWQ_BUILD_CPP="0")
    assert outcome.returncode == 0, outcome.stderr
    assert not list(built.rglob("_cpp*"))
    for data in ("calibration/prompts.txt", "models/assets/sdxl/unet/config.json"):
        assert (built / "hswq" / data).is_file()
    # Without site, whose editable finder would offer the extension of the tree under test.
    packages = {sysconfig.get_path("purelib"), sysconfig.get_path("platlib")}
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(built), *packages])}
    environment.pop("HSWQ_BACKEND", None)
    outcome = subprocess.run(
        [sys.executable, "-S", "-c", WITHOUT_EXTENSION],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert outcome.returncode == 0, outcome.stderr


def test_build_without_compiler_names_the_cure(source_tree: Path) -> None:
    """A build that quietly left the extension out would give a package many times slower."""
    outcome = run_setup(source_tree, "build_ext", CXX="no-such-compiler", HSWQ_BUILD_CPP="1")
    assert outcome.returncode != 0
    assert "'no-such-compiler' was not found" in outcome.stderr
    assert "HSWQ_BUILD_CPP=0" in outcome.stderr


if __name__ == "__main__":
    reason = cpp_backend.unusable_reason()
    sys.stdout.write(reason or f"{cpp_backend._cpp.active_isa()} {digest()}")
