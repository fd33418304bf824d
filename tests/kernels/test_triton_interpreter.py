"""The Triton kernels in Triton's interpreter, on the CPU: the contract's tests pass there too.

Triton reads TRITON_INTERPRET when the kernels are imported, so the tests run in a process of their
own, which counts the launches of every kernel: that proves that the kernels and no substitute gave
the answers.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections import Counter, defaultdict
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from hswq.kernels import triton_backend
from tests.kernels import launch_counter

ROOT = Path(__file__).parents[2]
LONGEST_SECONDS = 3600
# About half of the work: the interpreter has one thread, and machines have two cores.
LONG_MODULES = ("gram", "round_compensated", "search_amax", "clip_mse", "weighted_histogram")


def run_python(arguments: list[str], **environment: str) -> str:
    result = subprocess.run(
        [sys.executable, *arguments],
        env={**os.environ, **environment},
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=LONGEST_SECONDS,
    )
    assert result.returncode == 0, result.stdout[-8000:] + result.stderr[-8000:]
    return result.stdout


def run_suite(folder: Path, *arguments: str) -> dict[str, Counter[str]]:
    """Run some of the contract's tests, which must pass, and return launches by op and kernel."""
    folder.mkdir()
    file = folder / "launches.json"
    run_python(
        [
            # Preset high is preset default with larger numbers, and takes the interpreter minutes.
            *("-m", "pytest", "-q", "-k", "triton and not test_triton and not high"),
            *("--require-backends", "triton"),
            *("-p", launch_counter.__name__, "-p", "no:cacheprovider"),
            *arguments,
        ],
        TRITON_INTERPRET="1",
        XDG_CACHE_HOME=str(folder),
        **{launch_counter.ENVIRONMENT_VARIABLE: str(file)},
    )
    found = json.loads(file.read_text(encoding="utf-8"))
    return {op: Counter(kernels) for op, kernels in found.items()}


@pytest.fixture(scope="module")
def launches(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Counter[str]]:
    """Launches by op and kernel of the contract's tests, all of which have passed."""
    folder = tmp_path_factory.mktemp("interpreter")
    apart = [str(ROOT / "tests" / "kernels" / f"test_{name}.py") for name in LONG_MODULES]
    rest = [str(ROOT / "tests"), *(f"--ignore={file}" for file in apart)]
    with ThreadPoolExecutor() as pool:
        halves = [
            pool.submit(run_suite, folder / str(number), *arguments)
            for number, arguments in enumerate((apart, rest))
        ]
        total: defaultdict[str, Counter[str]] = defaultdict(Counter)
        for half in halves:
            for op, kernels in half.result().items():
                total[op].update(kernels)
    return total


@pytest.mark.slow
def test_contract_holds_in_the_interpreter(launches: dict[str, Counter[str]]) -> None:
    """A kernel that no test of an op reaches could be wrong without anybody seeing it."""
    launched = set().union(*launches.values())
    assert launched == {kernel.function.__name__ for kernel in triton_backend.KERNELS}


@pytest.mark.slow
@pytest.mark.parametrize("op", sorted(triton_backend.OPS))
def test_tests_of_an_op_ran_its_kernels(op: str, launches: dict[str, Counter[str]]) -> None:
    """An op that falls back on the reference would pass every one of its tests."""
    assert launches[op].total() > 0


REASON = "from hswq.kernels import triton_backend as b; import sys; "
REASON += "sys.stdout.write(f'{len(b.OPS)} {b.unusable_reason()}')"


def test_reason_is_given_when_triton_is_not_installed() -> None:
    """The package would fail to import where triton does not exist, on Windows for example."""
    output = run_python(["-c", f"import sys; sys.modules['triton'] = None; {REASON}"])
    assert output.startswith("0 module 'triton' cannot be used: ")


def test_reason_is_given_when_triton_is_too_old() -> None:
    """An old release, which another package holds, would break the dispatcher for the CPU too."""
    old = "import sys, types; sys.modules['triton'] = old = types.ModuleType('triton'); "
    output = run_python(["-c", f"{old} old.__version__ = '3.1.0'; {REASON}"])
    assert output.startswith("0 module 'triton' cannot be used: it is 3.1.0, and 3.2 is the oldest")


@pytest.mark.parametrize(("interpret", "usable"), [("0", torch.cuda.is_available()), ("1", True)])
def test_reason_is_given_when_nothing_can_run_the_kernels(interpret: str, usable: bool) -> None:
    """The dispatcher would choose kernels that then fail, or refuse an interpreter that works."""
    count, reason = run_python(["-c", REASON], TRITON_INTERPRET=interpret).split(" ", 1)
    assert int(count) == len(triton_backend.OPS)
    assert (reason == "None") == usable
    assert usable or "no CUDA or HIP device" in reason


GUARDS = """
import sys, torch
from hswq.kernels.triton_backend.quantize import launch_tiles, quantize_e4m3_kernel
guard, one = 4096, torch.tensor(1.0)
for size in (1, 127, 2047, 2048, 2049):
    for rows in (1, 3):
        memory = torch.full((2 * guard + rows * size,), 0xAA, dtype=torch.uint8)
        codes = memory[guard:-guard].view(rows, size)
        scale = one if rows == 1 else one.expand(rows)
        # 0.25 has the code 0x28, so that every byte inside changes.
        w = torch.full((rows, size), 0.25)
        launch_tiles(quantize_e4m3_kernel, w, codes, torch.tensor(0.5), scale)
        assert (codes == 0x28).all()
        assert (memory[:guard] == 0xAA).all() and (memory[-guard:] == 0xAA).all()
sys.stdout.write("intact")
"""


def test_nothing_is_written_outside() -> None:
    """A tail that is not masked would overwrite memory of another tensor."""
    assert run_python(["-c", GUARDS], TRITON_INTERPRET="1") == "intact"
