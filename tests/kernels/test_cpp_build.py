"""The build of the C++ extension, and a package built without it."""

from __future__ import annotations

import os
import subprocess
import sys
import sysconfig
from pathlib import Path

from tests.kernels import builds


def run_setup(tree: Path, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return builds.run_python(tree, "setup.py", "-q", *arguments, **environment)


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
    assert outcome.returncode == 0, outcome.stdout
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
    assert "'no-such-compiler' was not found" in outcome.stdout
    assert "HSWQ_BUILD_CPP=0" in outcome.stdout
