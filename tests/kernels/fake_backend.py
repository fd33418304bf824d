"""A backend made up by a test."""

from __future__ import annotations

import itertools
import sys
from collections.abc import Callable
from types import ModuleType
from typing import Any

import pytest
import torch

from hswq.kernels import dispatch
from tests.conftest import Backend

# The dispatcher remembers backends by name.
_NUMBERS = itertools.count()


def install(
    monkeypatch: pytest.MonkeyPatch,
    ops: dict[str, Callable[..., Any]],
    reason: str | None = None,
) -> Backend:
    """Make the dispatcher know a backend with these ops, for one test."""
    name = f"fake{next(_NUMBERS)}"
    module = ModuleType(name)
    module.OPS = ops  # type: ignore[attr-defined]
    module.unusable_reason = lambda: reason  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setitem(dispatch._MODULES, name, name)
    monkeypatch.setattr(dispatch, "BACKENDS", (*dispatch.BACKENDS, name))
    return Backend(name, torch.device("cpu"))
