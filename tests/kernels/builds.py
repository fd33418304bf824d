"""Building the extension in other ways than setup.py does: mutated, or watched by a sanitizer."""

from __future__ import annotations

import os
import runpy
import shutil
import signal
import subprocess
import sys
import sysconfig
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pybind11
import pytest

ROOT = Path(__file__).parents[2]
EXTENSION = Path("hswq", "kernels", "_cpp" + sysconfig.get_config_var("EXT_SUFFIX"))
# Compilers and test runs at a time.
JOBS = 2
# Far beyond what any run of Python takes here.
LONGEST_SECONDS = 1800


def copy_tree(tree: Path) -> Path:
    """Copy what a build and its tests read, without anything that was built."""
    ignore = shutil.ignore_patterns("*.so", "__pycache__")
    for name in ("hswq", "csrc", "kernels", "tests", "benchmarks"):
        shutil.copytree(ROOT / name, tree / name, ignore=ignore)
    for name in ("pyproject.toml", "setup.py", "README.md", "LICENSE", "NOTICE"):
        shutil.copy(ROOT / name, tree)
    return tree


def run_python(tree: Path, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run Python on a copied tree; standard error comes with standard output.

    What does not end counts as killed.
    """
    command = [sys.executable, *arguments]
    try:
        return subprocess.run(
            command,
            cwd=tree,
            env={**os.environ, "PYTHONPATH": str(tree), **environment},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            check=False,
            timeout=LONGEST_SECONDS,
        )
    except subprocess.TimeoutExpired:
        message = f"still running after {LONGEST_SECONDS} s"
        return subprocess.CompletedProcess(command, -signal.SIGKILL, message)


def run_tests(tree: Path, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run tests of a copied tree on its extension alone."""
    options = ("-q", "-x", "-p", "no:cacheprovider", "--tb=short", "--require-backends=cpp")
    # Plugins of the installation take longer to load than some of these tests to run.
    environment["PYTEST_DISABLE_PLUGIN_AUTOLOAD"] = "1"
    return run_python(tree, "-m", "pytest", *options, *arguments, **environment)


def compiler() -> list[str]:
    """Return the command of the C++ compiler that setup.py would use."""
    return str(os.environ.get("CXX") or sysconfig.get_config_var("CXX")).split()


def complain_without(missing: str | None) -> None:
    """Skip the test where something is missing, and fail it in continuous integration."""
    if missing is not None:
        (pytest.fail if os.environ.get("CI") else pytest.skip)(missing)


def mutate(csrc: Path, file: str, old: str, new: str) -> None:
    """Replace what occurs exactly once in a source.

    Raises:
        LookupError: it occurs never or more often; the sources have moved on.
    """
    text = (csrc / file).read_text()
    if (count := text.count(old)) != 1:
        raise LookupError(f"csrc/{file} holds {old!r} {count} times, not once; adapt the mutation.")
    (csrc / file).write_text(text.replace(old, new))


class Build:
    """Objects of one csrc folder, compiled with setup.py's flags and more.

    Attributes:
        csrc: folder of the sources.
        objects: folder of what was compiled from them.
        flags: of compiler and linker; they win over those of setup.py.
    """

    def __init__(self, csrc: Path, objects: Path, flags: Sequence[str]) -> None:
        self.csrc = csrc
        self.objects = objects
        self.flags = flags
        self._setup: dict[str, Any] = runpy.run_path(str(ROOT / "setup.py"))
        objects.mkdir(exist_ok=True)

    def sources(self) -> list[Path]:
        """Return what setup.py would compile."""
        return [
            source
            for source in sorted(self.csrc.glob("*.cpp"))
            if not source.stem.startswith("isa_") or self._isa(source) in self._setup["ISA_FLAGS"]
        ]

    def compile(self, sources: Iterable[Path]) -> None:
        with ThreadPoolExecutor(JOBS) as pool:
            list(pool.map(self._compile, sources))

    def link(self, target: Path, sources: Iterable[Path], *flags: str) -> None:
        target.unlink(missing_ok=True)
        objects = [str(self._object(source)) for source in sources]
        self._run(*objects, *self.flags, *flags, "-pthread", "-o", str(target))

    def _object(self, source: Path) -> Path:
        return self.objects / f"{source.stem}.o"

    def mutant(self, folder: Path, file: str, old: str, new: str) -> Build:
        """Return this build, which is complete, with one mutation in a folder of its own.

        Of the instruction sets only the baseline is compiled again: HSWQ_ISA must choose it.
        """
        csrc = shutil.copytree(self.csrc, folder / "csrc")
        mutate(csrc, file, old, new)
        objects = shutil.copytree(self.objects, folder / "objects")
        build = Build(csrc, objects, self.flags)
        stems = [
            rule.stem
            for rule in sorted(objects.glob("*.d"))
            if f"/{file}" in rule.read_text() and rule.stem not in ("isa_avx2", "isa_avx512")
        ]
        build.compile(csrc / f"{stem}.cpp" for stem in stems)
        return build

    @staticmethod
    def _isa(source: Path) -> str:
        return source.stem.removeprefix("isa_")

    def _compile(self, source: Path) -> None:
        self._run(
            *self._setup["FLAGS"],
            *self._setup["ISA_FLAGS"].get(self._isa(source), []),
            *(["-DHSWQ_X86=1"] if self._setup["IS_X86"] else []),
            *self.flags,
            *("-isystem", pybind11.get_include()),
            *("-isystem", sysconfig.get_path("include")),
            *("-I", str(self.csrc)),
            *("-fPIC", "-MMD", "-c", str(source), "-o", str(self._object(source))),
        )

    def _run(self, *arguments: str) -> None:
        done = subprocess.run(
            [*compiler(), *arguments], capture_output=True, text=True, check=False
        )
        if done.returncode != 0:
            raise RuntimeError(f"{' '.join(arguments)}\n{done.stderr}")
