"""Which backend runs an op.

backend= argument > HSWQ_BACKEND > device of the tensors (CUDA and HIP: triton, CPU: cpp, otherwise
or where that one is not usable: reference). A choice is made once per backend and device and logged
once. A backend that was named and cannot run is an error, never a silent replacement; ops that it
does not implement come from the reference, as `backend_report` says.
"""

from __future__ import annotations

import functools
import importlib
import importlib.metadata
import importlib.util
import logging
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from hswq.errors import BackendError
from hswq.kernels.contract import CONTRACT

logger = logging.getLogger(__name__)

ENVIRONMENT_VARIABLE = "HSWQ_BACKEND"

# Each module has OPS, the ops it implements natively, and unusable_reason().
_MODULES = {
    "reference": "hswq.kernels.reference",
    "cpp": "hswq.kernels.cpp_backend",
    "triton": "hswq.kernels.triton_backend",
}
BACKENDS = tuple(_MODULES)
# Their modules have self_test() besides.
_SELF_TESTED = ("triton",)
_DEFAULTS = {"cpu": "cpp", "cuda": "triton"}
# What an installation brings for a backend: the module, and how the installed metadata list it.
_INSTALLED_PARTS = {
    "cpp": ("hswq.kernels._cpp", "hswq/kernels/_cpp."),
    "triton": ("hswq.kernels.triton_backend", "hswq/kernels/triton_backend/"),
}


@dataclass(frozen=True)
class BackendStatus:
    """Whether a backend can run here.

    Attributes:
        name: reference, cpp or triton.
        usable: whether it can run.
        reason: why not; None where it can.
        native_ops: ops that it implements itself; the others come from the reference.
        self_tests: 'passed', or 'failed' and why, by op; empty where none was asked for or needed.
    """

    name: str
    usable: bool
    reason: str | None
    native_ops: tuple[str, ...]
    self_tests: Mapping[str, str] = field(default_factory=dict)


def backend_report(self_test: bool = False) -> tuple[BackendStatus, ...]:
    """Return the status of every backend.

    Args:
        self_test: also test what depends on the GPU and has not been tested there yet: seconds to
            minutes, once.
    """
    report = []
    for name in BACKENDS:
        ops, reason = _load(name)
        tests = {}
        if self_test and reason is None and name in _SELF_TESTED:
            tests = importlib.import_module(_MODULES[name]).self_test()
        report.append(BackendStatus(name, reason is None, reason, tuple(ops), tests))
    return tuple(report)


def select(op: str, backend: str | None, device: torch.device) -> Callable[..., Any]:
    """Return the function that runs an op on tensors of a device.

    Args:
        op: name in the contract.
        backend: a backend's name, or None for HSWQ_BACKEND or the default of the device.
        device: where the op's tensors are.
    Raises:
        BackendError: the named backend is unknown, cannot run or does not take the device; or
            the default one was installed and is missing.
    """
    if backend is not None:
        return _named(backend, "backend=", device.type)[op]
    if name := os.environ.get(ENVIRONMENT_VARIABLE):
        return _named(name, ENVIRONMENT_VARIABLE, device.type)[op]
    return _default(device.type)[op]


@functools.cache
def _load(name: str) -> tuple[Mapping[str, Callable[..., Any]], str | None]:
    """Return a backend's native ops and why it cannot run, if so."""
    if missing := _missing_part(name):
        return {}, missing
    try:
        module = importlib.import_module(_MODULES[name])
    except ImportError as error:
        return {}, f"{_MODULES[name]} cannot be imported: {error}"
    reason: str | None = module.unusable_reason()
    ops: Mapping[str, Callable[..., Any]] = module.OPS
    return (ops, None) if reason is None else ({}, reason)


def _missing_part(name: str) -> str | None:
    """Say what of a backend the installed metadata list and the running package lacks."""
    if name not in _INSTALLED_PARTS:
        return None
    module, listed_as = _INSTALLED_PARTS[name]
    try:
        files = importlib.metadata.files("hswq") or ()
    except importlib.metadata.PackageNotFoundError:
        return None
    if importlib.util.find_spec(module) is not None:
        return None
    if not any(str(file).startswith(listed_as) for file in files):
        return None
    return (
        f"{module} was installed with hswq but is missing from the package that was imported, "
        f"{os.path.dirname(__file__)}: python was started in a source tree. Start it elsewhere, "
        "install the tree with `pip install -e .`, or choose backend 'reference' explicitly"
    )


def _named(name: str, source: str, device_type: str) -> Mapping[str, Callable[..., Any]]:
    if name not in BACKENDS:
        raise BackendError(
            f"backend {name!r} was requested ({source}) and does not exist; "
            f"choose one of {', '.join(BACKENDS)}."
        )
    _, reason = _load(name)
    if reason is not None:
        raise BackendError(
            f"backend {name!r} was requested ({source}) but is not usable: {reason}. "
            f"Install it, or choose another of {', '.join(BACKENDS)}."
        )
    devices = _devices(name)
    if devices and device_type not in devices:
        raise BackendError(
            f"backend {name!r} was requested ({source}) for tensors on {device_type!r}; it takes "
            f"tensors on {' or '.join(devices)}. Move them, or let the dispatcher choose."
        )
    return _complete(name, device_type)


@functools.cache
def _default(device_type: str) -> Mapping[str, Callable[..., Any]]:
    name = _DEFAULTS.get(device_type, "reference")
    # Turning slow silently is worse than stopping.
    if missing := _missing_part(name):
        raise BackendError(f"backend {name!r} cannot run: {missing}.")
    _, reason = _load(name)
    if reason is not None:
        logger.info("backend %s is not usable for %s tensors: %s", name, device_type, reason)
        name = "reference"
    return _complete(name, device_type)


def _devices(name: str) -> tuple[str, ...]:
    """Return the device types a backend takes; () is any."""
    if name == "triton" and os.environ.get("TRITON_INTERPRET") == "1":
        return ("cuda", "cpu")
    return {"cpp": ("cpu",), "triton": ("cuda",)}.get(name, ())


@functools.cache
def _complete(name: str, device_type: str) -> Mapping[str, Callable[..., Any]]:
    """Return all ops of the contract, the backend's own where it has them."""
    native, _ = _load(name)
    reference, _ = _load("reference")
    borrowed = [op for op in CONTRACT if op not in native]
    logger.info(
        "backend %s for %s tensors%s",
        name,
        device_type,
        f" ({', '.join(borrowed)} from the reference)" if borrowed else "",
    )
    return {op: native.get(op, reference[op]) for op in CONTRACT}
