"""The C++ extension watched by gcc's sanitizers while its own tests run."""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.kernels import builds

pytestmark = pytest.mark.usefixtures("extension")

ADDRESS_FLAGS = (
    "-O1",
    "-g1",
    "-fno-omit-frame-pointer",
    "-fsanitize=address,undefined",
    "-fno-sanitize-recover=all",
)
THREAD_FLAGS = ("-O1", "-g1", "-fsanitize=thread")
CHECK_THREADS = Path(__file__).parent / "native" / "check_threads.cpp"
# They test the build or mutate it, or belong to another backend.
OTHER_TESTS = ("cpp_build", "cpp_mutations", "cpp_sanitizers", "triton_interpreter")


def runtime(library: str) -> Path:
    """Return the path of a sanitizer's library; without one the test is skipped, or fails in CI."""
    command = [*builds.compiler(), f"-print-file-name={library}"]
    found = subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    if not Path(found).is_absolute():
        builds.complain_without(f"the C++ compiler has no {library}; install it")
    return Path(found)


@dataclass(frozen=True)
class Watched:
    """A tree whose extension is built with AddressSanitizer and UndefinedBehaviorSanitizer."""

    tree: Path
    build: builds.Build
    preload: str

    def run_tests(self, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
        return builds.run_tests(
            self.tree,
            *arguments,
            LD_PRELOAD=self.preload,
            # Python itself leaks on purpose.
            ASAN_OPTIONS="detect_leaks=0",
            UBSAN_OPTIONS="print_stacktrace=1:halt_on_error=1",
            **environment,
        )


@pytest.fixture(scope="module")
def watched(tmp_path_factory: pytest.TempPathFactory) -> Watched:
    # Exceptions need a libstdc++ that is there before the sanitizer looks for it.
    preload = f"{runtime('libasan.so')} {runtime('libstdc++.so.6')}"
    folder = tmp_path_factory.mktemp("address")
    build = builds.Build(builds.ROOT / "csrc", folder / "objects", ADDRESS_FLAGS)
    build.compile(build.sources())
    return Watched(builds.copy_tree(folder / "tree"), build, preload)


@pytest.mark.slow
def test_suite_meets_no_bad_address_and_no_undefined_behaviour(watched: Watched) -> None:
    """Reading past a weight gives right answers until the day its page ends there."""
    watched.build.link(watched.tree / builds.EXTENSION, watched.build.sources(), "-shared")
    ignored = [f"--ignore=tests/kernels/test_{name}.py" for name in OTHER_TESTS]
    outcome = watched.run_tests(
        "tests/kernels", *ignored, "-m", "not slow", "-k", "cpp or fuzz or instruction_sets"
    )
    assert outcome.returncode == 0, outcome.stdout[-6000:]
    passed = re.search(r"(\d+) passed", outcome.stdout)
    assert passed is not None
    assert int(passed[1]) > 400, "most of the suite was left out"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("file", "old", "new", "report"),
    [
        (
            "quantize.inl",
            "for (; i < count; ++i) codes[i] = table[weights[i]];",
            "for (; i <= count; ++i) codes[i] = table[weights[i]];",
            "AddressSanitizer: heap-buffer-overflow",
        ),
        (
            "quantize.inl",
            "codes[i] = static_cast<uint8_t>(EncodeE4m3(BitsOf(clipped / scale)));",
            "codes[i] = static_cast<uint8_t>(1 << (32 + static_cast<int>(i)));",
            "runtime error: shift exponent",
        ),
    ],
    ids=["one element too many", "undefined shift"],
)
def test_defect_is_reported(
    file: str, old: str, new: str, report: str, watched: Watched, tmp_path: Path
) -> None:
    """A sanitizer that is not loaded, or goes on after a report, finds nothing."""
    mutant = watched.build.mutant(tmp_path, file, old, new)
    mutant.link(watched.tree / builds.EXTENSION, mutant.sources(), "-shared")
    outcome = watched.run_tests(
        *("tests/kernels/test_quantize_e4m3.py", "-k", "cpp and odd_shapes"),
        "--capture=no",
        HSWQ_ISA="baseline",
    )
    assert outcome.returncode != 0
    assert report in outcome.stdout, outcome.stdout[-6000:]


def test_program_of_threads_calls_every_op() -> None:
    """An op that it does not know is not watched."""
    declared = re.findall(
        r"^\w+ (\w+)\(", (builds.ROOT / "csrc" / "ops.h").read_text(), re.MULTILINE
    )
    assert len(declared) >= 8
    program = CHECK_THREADS.read_text()
    assert [name for name in declared if f"hswq::{name}(" not in program] == []


def fixed_addresses() -> list[str]:
    """Return a command that runs another at fixed addresses, where that is allowed.

    The sanitizer's map of the address space allows for less randomness than some kernels add;
    containers may forbid to change it.
    """
    command = ["setarch", "--addr-no-randomize"]
    if (
        shutil.which("setarch") is None
        or subprocess.run([*command, "true"], check=False).returncode
    ):
        return []
    return command


@pytest.fixture(scope="module")
def check_threads(
    tmp_path_factory: pytest.TempPathFactory,
) -> Callable[..., subprocess.CompletedProcess[str]]:
    """Run the program that calls every op from several threads, with a mutation or without."""
    runtime("libtsan.so")
    folder = tmp_path_factory.mktemp("threads")
    build = builds.Build(builds.ROOT / "csrc", folder / "objects", THREAD_FLAGS)
    sources = [source for source in build.sources() if source.stem != "bindings"]
    build.compile([*sources, CHECK_THREADS])

    def run(*mutation: str) -> subprocess.CompletedProcess[str]:
        mutant = build
        if mutation:
            mutant = build.mutant(folder / "mutant", *mutation)
        program = folder / "check_threads"
        mutant.link(program, [*sources, CHECK_THREADS])
        return subprocess.run(
            [*fixed_addresses(), str(program)],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            check=False,
        )

    return run


@pytest.mark.slow
def test_threads_of_every_op_race_for_nothing(
    check_threads: Callable[..., subprocess.CompletedProcess[str]],
) -> None:
    """A race may change a bit once in a million files."""
    outcome = check_threads()
    assert outcome.returncode == 0, outcome.stdout[-6000:]
    assert len(outcome.stdout.splitlines()) > 18


@pytest.mark.slow
def test_race_is_reported(
    check_threads: Callable[..., subprocess.CompletedProcess[str]],
) -> None:
    """A thread sanitizer that is not linked in finds nothing."""
    outcome = check_threads("parallel.h", "std::atomic<size_t> next{0};", "size_t next{0};")
    assert outcome.returncode != 0
    assert "WARNING: ThreadSanitizer: data race" in outcome.stdout
