"""Fixtures of all tests: one suite runs on every kernel backend.

The tests of a backend that is not usable, or of an instruction set that this CPU lacks, are left
out, counted and named with the reason at the end; --require-backends turns that into failures of
the backend's tests. With TRITON_INTERPRET=1 in the environment the
Triton kernels run without a GPU.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from hswq.kernels import BACKENDS, cpp_backend, dispatch

# The tiny checkpoint of the tests of driver and command line.
pytest_plugins = ["tests.tiny"]

# What could not be tested and why, with the number of tests.
LEFT_OUT = pytest.StashKey[Counter[tuple[str, str]]]()


@dataclass(frozen=True)
class Backend:
    """A backend under test and the device its tensors live on."""

    name: str
    device: torch.device


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--require-backends",
        default="reference",
        metavar="NAMES",
        help="comma-separated backends whose absence fails tests; others may be absent",
    )


def required_backends(config: pytest.Config) -> set[str]:
    names = {name for name in config.getoption("--require-backends").split(",") if name}
    if unknown := names - set(BACKENDS):
        raise pytest.UsageError(
            f"--require-backends names {sorted(unknown)}; there are {', '.join(BACKENDS)}."
        )
    return names


def pytest_report_header(config: pytest.Config) -> list[str]:
    required = required_backends(config)
    return [
        f"backend {status.name}: "
        + (f"{len(status.native_ops)} ops" if status.usable else "not usable")
        + (" (required)" if status.name in required else "")
        for status in dispatch.backend_report()
    ]


def lacking(item: pytest.Item, config: pytest.Config) -> tuple[str, str] | None:
    """Return what a test needs that is neither here nor required, and why it is not here."""
    parameters = item.callspec.params if hasattr(item, "callspec") else {}
    backend, isa = parameters.get("backend"), parameters.get("isa")
    if backend is not None and backend not in required_backends(config):
        reasons = {status.name: status.reason for status in dispatch.backend_report()}
        if (reason := reasons[backend]) is not None:
            return f"backend {backend}", reason
    if item.get_closest_marker("gpu") is not None and not torch.cuda.is_available():
        return "a GPU", "torch finds no CUDA or HIP device"
    # Without the extension such a test stays, and skips or fails by itself.
    if isa is not None and cpp_backend.unusable_reason() is None:
        supported = cpp_backend._cpp.supported_isas()
        if isa not in supported:
            return f"instruction set {isa}", f"this build and CPU offer {', '.join(supported)}"
    return None


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Take the tests that cannot run on this machine out of the run."""
    left_out = []
    counts = config.stash.setdefault(LEFT_OUT, Counter())
    for item in items:
        if (missing := lacking(item, config)) is not None:
            left_out.append(item)
            counts[missing] += 1
    if left_out:
        config.hook.pytest_deselected(items=left_out)
        gone = set(left_out)
        items[:] = [item for item in items if item not in gone]


def pytest_terminal_summary(
    terminalreporter: pytest.TerminalReporter, config: pytest.Config
) -> None:
    for (what, reason), count in config.stash.get(LEFT_OUT, Counter()).items():
        terminalreporter.write_line(f"NOT TESTED: {what}, {count} tests: {reason}")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Run a test of an op on every backend that has it, or that cannot tell.

    A module's OP names the op it tests. On the CPU an op that a backend takes from the reference is
    the reference's, and not tested twice.
    """
    if "backend" not in metafunc.fixturenames:
        return
    op = getattr(metafunc.module, "OP", None)
    on_host = metafunc.definition.get_closest_marker("host_threads") is not None
    names = [
        status.name
        for status in dispatch.backend_report()
        if not (on_host and status.name == "triton")
        and (
            not status.usable
            or op is None
            or op in status.native_ops
            or device_of(status.name).type != "cpu"
        )
    ]
    metafunc.parametrize("backend", names, indirect=True)


def device_of(name: str) -> torch.device:
    on_gpu = name == "triton" and torch.cuda.is_available()
    return torch.device("cuda" if on_gpu else "cpu")


def poisoned(make: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Wrap torch.empty or empty_like: elements that an op forgets to write become visible."""

    def wrapper(*args: Any, **kwargs: Any) -> Tensor:
        fresh = make(*args, **kwargs)
        return fresh.fill_(math.nan if fresh.is_floating_point() else 0x55)

    return wrapper


@pytest.fixture
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Backend:
    """A backend to call by name, whose fresh outputs are poisoned."""
    name: str = request.param
    status = next(status for status in dispatch.backend_report() if status.name == name)
    if not status.usable:
        pytest.fail(f"backend {name} is required and not usable: {status.reason}")
    for maker in ("empty", "empty_like"):
        monkeypatch.setattr(torch, maker, poisoned(getattr(torch, maker)))
    return Backend(name, device_of(name))
