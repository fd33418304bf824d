"""Pytest plugin: which Triton kernels the tests of each op launched, as JSON.

A test that passes says nothing of a kernel if the reference gave the answers.
"""

from __future__ import annotations

import json
import os
from collections import Counter, defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

# Names the file to write.
ENVIRONMENT_VARIABLE = "HSWQ_TEST_LAUNCHES"

_launches: Counter[str] = Counter()
_by_op: defaultdict[str, Counter[str]] = defaultdict(Counter)


def _count(name: str) -> Any:
    def hook(*arguments: Any, **constants: Any) -> None:
        _launches[name] += 1

    return hook


def pytest_configure(config: pytest.Config) -> None:
    from hswq.kernels.triton_backend import KERNELS

    for function in {kernel.function for kernel in KERNELS}:
        function.add_pre_run_hook(_count(function.__name__))


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Iterator[None]:
    _launches.clear()
    try:
        return (yield)
    finally:
        op = getattr(getattr(item, "module", None), "OP", "")
        _by_op[op].update(_launches)


def pytest_sessionfinish(session: pytest.Session) -> None:
    Path(os.environ[ENVIRONMENT_VARIABLE]).write_text(json.dumps(_by_op), encoding="utf-8")
