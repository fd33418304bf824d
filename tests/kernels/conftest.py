"""Fixtures of the tests of kernels."""

from __future__ import annotations

from pathlib import Path

import pytest

from hswq.kernels import cpp_backend
from tests.conftest import required_backends
from tests.kernels import builds


@pytest.fixture(scope="session")
def extension(request: pytest.FixtureRequest) -> None:
    """Needs the extension: absent, it fails where --require-backends names cpp."""
    if (reason := cpp_backend.unusable_reason()) is not None:
        complain = pytest.fail if "cpp" in required_backends(request.config) else pytest.skip
        complain(f"backend cpp: {reason}")


@pytest.fixture
def source_tree(tmp_path: Path) -> Path:
    """A copy of what a build and its tests read, without anything that was built."""
    return builds.copy_tree(tmp_path / "tree")
