"""No kernel is used before it has proved right, once for each GPU, Triton and state of the code."""

from __future__ import annotations

import functools
import hashlib
import json
import logging
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import triton

from hswq.errors import BackendError
from hswq.kernels.self_test import find_failure

logger = logging.getLogger(__name__)


class Guarded:
    """An op that is tested at its first use on a device.

    The result of a passed test is kept in a file (`record_path`), so that a machine tests once;
    a failed one is not, since its cause may go away.
    """

    def __init__(self, op: str, function: Callable[..., Any]) -> None:
        self._op = op
        self._function = function
        self._trusted: set[torch.device] = set()

    def __call__(self, *arguments: Any) -> Any:
        device = arguments[0].device
        if device not in self._trusted:
            self._establish_trust(device)
        return self._function(*arguments)

    def _establish_trust(self, device: torch.device) -> None:
        """Test the op on a device unless that was done before.

        Raises:
            BackendError: the test failed.
        """
        # A test waits for its results, which nothing may while a CUDA graph is captured.
        if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
            return
        where = describe(device)
        if self._op not in read_record(where):
            logger.info("testing %s on %s, once", self._op, where)
            if (failure := self.find_failure(device)) is not None:
                raise BackendError(
                    f"the Triton kernels of {self._op} failed their self-test on {where}: "
                    f"{failure}. Set HSWQ_BACKEND=reference, which is slower, or update Triton and "
                    "the driver; and please report it."
                )
            add_to_record(where, self._op)
        self._trusted.add(device)

    def find_failure(self, device: torch.device) -> str | None:
        """Run the test and return what is wrong, if anything."""
        try:
            return find_failure(self._op, self._function, device)
        except Exception as error:
            # Whatever a compiler or driver raises: the kernel is not usable.
            return f"{type(error).__name__}: {error}"

    def result(self, device: torch.device) -> str:
        """Return 'passed', or 'failed' and why, testing where that was not done before."""
        try:
            self._establish_trust(device)
        except BackendError as error:
            return f"failed: {error}"
        return "passed"


def describe(device: torch.device) -> str:
    """Name everything that a result depends on."""
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        # AMD's architecture has a name, NVIDIA's a number.
        gpu = f"{properties.name} {getattr(properties, 'gcnArchName', '')}".strip()
        gpu += f" (compute capability {properties.major}.{properties.minor})"
    else:
        gpu = "Triton's interpreter"
    return f"{gpu}, triton {triton.__version__}, torch {torch.__version__}, code {_code_digest()}"


@functools.cache
def _code_digest() -> str:
    digest = hashlib.sha256()
    for path in sorted(Path(__file__).parent.glob("*.py")):
        digest.update(path.read_bytes())
    return digest.hexdigest()[:12]


def record_path() -> Path:
    """Return the file of passed tests: hswq/self_tests.json in the user's cache folder."""
    cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(cache) / "hswq" / "self_tests.json"


def read_record(where: str) -> list[str]:
    """Return the ops that have passed there; none where the file is absent or damaged."""
    passed = _read_all().get(where, [])
    return passed if isinstance(passed, list) else []


def _read_all() -> dict[str, Any]:
    try:
        record = json.loads(record_path().read_text(encoding="utf-8"))
    except (OSError, RuntimeError, ValueError):
        return {}
    return record if isinstance(record, dict) else {}


def add_to_record(where: str, op: str) -> None:
    """Note a passed test. Where nothing can be written, the next process tests again."""
    record = _read_all() | {where: sorted({*read_record(where), op})}
    try:
        path = record_path()
        path.parent.mkdir(parents=True, exist_ok=True)
        # Another process may do the same: the file changes in one step.
        with tempfile.NamedTemporaryFile(
            "w", encoding="utf-8", dir=path.parent, delete=False
        ) as file:
            json.dump(record, file, indent=1)
        os.replace(file.name, path)
    except (OSError, RuntimeError) as error:
        logger.info("the self-test's result cannot be kept: %s", error)
