"""Which backend runs, and what is said when none can."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import inspect
import logging
from pathlib import PurePosixPath
from typing import Any

import pytest
import torch
from torch import Tensor

from hswq import kernels
from hswq.errors import BackendError
from hswq.kernels import dispatch, reference
from tests.kernels import fake_backend

CPU = torch.device("cpu")
MARK = torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64)


def marked(y: Tensor) -> Tensor:
    return MARK


@pytest.fixture(autouse=True)
def _no_wish(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(dispatch.ENVIRONMENT_VARIABLE, raising=False)


def test_argument_names_the_backend(monkeypatch: pytest.MonkeyPatch) -> None:
    """It beats the environment: a test of one backend must not run another."""
    fake = fake_backend.install(monkeypatch, {"moments": marked})
    monkeypatch.setenv(dispatch.ENVIRONMENT_VARIABLE, "reference")
    assert kernels.moments(torch.ones(2), backend=fake.name) is MARK
    assert kernels.moments(torch.ones(2)).tolist() == [2.0, 2.0, 2.0]


def test_environment_names_the_backend(monkeypatch: pytest.MonkeyPatch) -> None:
    """It beats the default of the device."""
    fake = fake_backend.install(monkeypatch, {"moments": marked})
    monkeypatch.setenv(dispatch.ENVIRONMENT_VARIABLE, fake.name)
    assert kernels.moments(torch.ones(2)) is MARK
    monkeypatch.setenv(dispatch.ENVIRONMENT_VARIABLE, "")
    assert kernels.moments(torch.ones(2)).tolist() == [2.0, 2.0, 2.0]


def test_missing_ops_come_from_the_reference(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A backend may grow op by op; what it lacks is said once, not at every call."""
    fake = fake_backend.install(monkeypatch, {"moments": marked})
    with caplog.at_level(logging.INFO, logger="hswq.kernels.dispatch"):
        for _ in range(3):
            codes = kernels.quantize_e4m3(torch.ones(1), 1.0, 1.0, backend=fake.name)
    assert codes.tolist() == [0x38]
    assert len(caplog.messages) == 1
    assert caplog.messages[0].startswith(f"backend {fake.name} for cpu tensors (channel_abs_mean, ")
    assert caplog.messages[0].endswith("scaled_conv2d from the reference)")
    assert "moments" not in caplog.messages[0]


def test_unknown_name_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    """A typing error must not run something else."""
    with pytest.raises(BackendError, match=r"'cuda' was requested \(backend=\) and does not exist"):
        kernels.moments(torch.ones(2), backend="cuda")
    monkeypatch.setenv(dispatch.ENVIRONMENT_VARIABLE, "c++")
    with pytest.raises(BackendError, match=r"\(HSWQ_BACKEND\).*one of reference, cpp, triton"):
        kernels.moments(torch.ones(2))


def test_named_backend_that_cannot_run_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    """Falling back would be slow at best and measure the wrong thing at worst."""
    fake = fake_backend.install(monkeypatch, {"moments": marked}, reason="no flux capacitor")
    with pytest.raises(BackendError, match="is not usable: no flux capacitor"):
        kernels.moments(torch.ones(2), backend=fake.name)
    status = next(s for s in kernels.backend_report() if s.name == fake.name)
    assert (status.usable, status.reason, status.native_ops) == (False, "no flux capacitor", ())


def test_module_that_cannot_be_imported_is_a_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    """A backend whose package is absent is unusable, not a crash of the report."""
    monkeypatch.setitem(dispatch._MODULES, "absent", "hswq_no_such_module")
    monkeypatch.setattr(dispatch, "BACKENDS", (*dispatch.BACKENDS, "absent"))
    with pytest.raises(BackendError, match="hswq_no_such_module cannot be imported: No module"):
        kernels.moments(torch.ones(2), backend="absent")


def test_wrong_device_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    """An address on the GPU, read on the CPU, would end the process."""
    monkeypatch.setattr(dispatch, "_load", lambda name: (reference.OPS, None))
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    for name, device, other in (("cpp", "cuda", "cpu"), ("triton", "cpu", "cuda")):
        with pytest.raises(BackendError, match=f"for tensors on '{device}'; .* on {other}"):
            dispatch.select("moments", name, torch.device(device))


def test_default_without_its_backend_is_the_reference(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """hswq works where nothing could be compiled, and says that it is slow and why."""
    fake = fake_backend.install(monkeypatch, {"moments": marked}, reason="not built")
    monkeypatch.setattr(dispatch, "_DEFAULTS", {"cpu": fake.name})
    dispatch._default.cache_clear()
    with caplog.at_level(logging.INFO, logger="hswq.kernels.dispatch"):
        assert dispatch.select("moments", None, CPU) is reference.moments
    dispatch._default.cache_clear()
    assert f"backend {fake.name} is not usable for cpu tensors: not built" in caplog.messages


def test_default_is_the_backend_of_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """The compiled backend is used without being asked for."""
    fake = fake_backend.install(monkeypatch, {"moments": marked})
    monkeypatch.setattr(dispatch, "_DEFAULTS", {"cpu": fake.name})
    dispatch._default.cache_clear()
    assert dispatch.select("moments", None, CPU) is marked
    dispatch._default.cache_clear()


@pytest.mark.parametrize(
    ("name", "listed"),
    [
        ("cpp", "hswq/kernels/_cpp.cpython-311-x86_64-linux-gnu.so"),
        ("triton", "hswq/kernels/triton_backend/__init__.py"),
    ],
)
def test_installed_part_that_is_missing_is_an_error(
    name: str, listed: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Python started in a source tree would silently run without what was installed."""
    find_spec = importlib.util.find_spec
    module = dispatch._INSTALLED_PARTS[name][0]

    def without_part(wanted: str, package: str | None = None) -> Any:
        return None if wanted == module else find_spec(wanted, package)

    monkeypatch.setattr(importlib.util, "find_spec", without_part)
    monkeypatch.setattr(importlib.metadata, "files", lambda _: [PurePosixPath(listed)])
    monkeypatch.setattr(dispatch, "_DEFAULTS", {"cpu": name})
    for cached in (dispatch._default, dispatch._load):
        cached.cache_clear()
    with pytest.raises(BackendError, match="was installed with hswq but is missing"):
        dispatch.select("moments", None, CPU)
    with pytest.raises(BackendError, match="was installed with hswq but is missing"):
        dispatch.select("moments", name, CPU)
    assert dispatch.select("moments", "reference", CPU) is reference.moments

    # The same without a word in the metadata: nothing was promised.
    monkeypatch.setattr(importlib.metadata, "files", lambda _: [])
    assert dispatch._missing_part(name) is None
    for cached in (dispatch._default, dispatch._load):
        cached.cache_clear()


def test_report_tells_of_every_backend() -> None:
    """`python -m hswq.fast backends` prints it."""
    report = {status.name: status for status in kernels.backend_report()}
    assert tuple(report) == kernels.BACKENDS
    assert report["reference"].usable
    assert set(report["reference"].native_ops) == set(kernels.CONTRACT)
    for status in report.values():
        assert status.usable == (status.reason is None)
        assert set(status.native_ops) <= set(kernels.CONTRACT)


@pytest.mark.parametrize("op", sorted(kernels.CONTRACT))
def test_every_op_is_public_and_takes_a_backend(op: str) -> None:
    """Backends are called with the public function's arguments, by position."""
    public = inspect.signature(getattr(kernels, op)).parameters
    assert public["backend"].kind is inspect.Parameter.KEYWORD_ONLY
    assert public["backend"].default is None
    arguments = [name for name in public if name != "backend"]
    assert list(inspect.signature(reference.OPS[op]).parameters) == arguments
    assert op in kernels.__all__
