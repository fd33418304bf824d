"""Known answers at first use: right kernels pass, wrong ones are refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from hswq import kernels
from hswq.errors import BackendError
from hswq.kernels import cpp_backend, reference, self_test, triton_backend
from hswq.kernels.triton_backend import _guard
from tests.torch_defaults import default_dtype

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def record(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The file of passed tests, in a cache folder of the test's own."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return _guard.record_path()


def counted_moments() -> tuple[list[str], Callable[..., Any]]:
    """Return an op and the list of its calls so far."""
    calls: list[str] = []

    def moments(y: torch.Tensor) -> torch.Tensor:
        calls.append(str(y.dtype))
        return reference.moments(y)

    return calls, moments


def test_every_op_of_the_backend_has_a_self_test() -> None:
    """An op without one would run on a GPU where nobody has seen it right."""
    assert set(triton_backend.OPS) <= set(self_test.OPS_WITH_CASES) <= set(kernels.CONTRACT)


@pytest.mark.parametrize("op", self_test.OPS_WITH_CASES)
def test_right_implementations_pass(op: str, extension: None) -> None:
    """A self-test that is wrong itself would refuse a good GPU."""
    for ops in (reference.OPS, cpp_backend.OPS):
        assert self_test.find_failure(op, ops[op], CPU) is None


def test_callers_defaults_change_no_case() -> None:
    """A user's default dtype or device would make other inputs, and refuse a good GPU."""
    with default_dtype(torch.float64), torch.device("meta"):
        for op in self_test.OPS_WITH_CASES:
            assert self_test.find_failure(op, reference.OPS[op], CPU) is None


def wrong(op: str, value: Any) -> Any:
    """Change one number of a result by the smallest amount that matters."""
    if isinstance(value, tuple):
        return (*value[:-1], wrong(op, value[-1]))
    changed = value.clone().reshape(-1)
    middle = len(changed) // 2
    if not changed.is_floating_point():
        changed[middle] ^= 1
    elif kernels.CONTRACT[op].exact:
        changed[middle] = changed[middle].nextafter(changed.new_tensor(1e9))
    else:
        # The sums of narrower types are rounded to their own last place.
        changed[middle] *= 1 + max(2.0**-29, 2 * torch.finfo(changed.dtype).eps)
    return changed.reshape(value.shape)


@pytest.mark.parametrize("op", self_test.OPS_WITH_CASES)
def test_smallest_error_is_found(op: str) -> None:
    """One wrong bit of an exact op is another file."""

    def off(*arguments: Any) -> Any:
        return wrong(op, reference.OPS[op](*arguments))

    failure = self_test.find_failure(op, off, CPU)
    assert failure is not None
    assert "differ from the reference" in failure


@pytest.mark.parametrize("op", ["monitor", "gram"])
def test_error_in_what_is_changed_in_place_is_found(op: str) -> None:
    """Their result is in the accumulators."""

    def off(*arguments: Any) -> Any:
        result = reference.OPS[op](*arguments)
        sums = arguments[3].abs_mean if op == "monitor" else arguments[1]
        sums.view(-1)[-1] += 1
        return result

    assert self_test.find_failure(op, off, CPU) is not None


def test_result_of_another_form_is_found() -> None:
    def off(y: torch.Tensor) -> torch.Tensor:
        return reference.moments(y).float()

    failure = self_test.find_failure("moments", off, CPU)
    assert failure == "result 0 of case 0 is torch.float32 [3], not torch.float64 [3]"


def test_op_is_tested_once_on_a_machine(record: Path) -> None:
    """Later processes read the result of the first."""
    calls, moments = counted_moments()
    first, later = (_guard.Guarded("moments", moments) for _ in range(2))
    y = torch.ones(2)
    assert first(y).tolist() == [2.0, 2.0, 2.0]
    once = len(calls)
    assert once > 1
    first(y)
    later(y)
    assert len(calls) == once + 2
    assert json.loads(record.read_text()) == {_guard.describe(CPU): ["moments"]}


def test_another_gpu_compiler_or_code_is_tested_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    """What one Triton compiles well, the next may not."""
    calls, moments = counted_moments()
    for where, tested in (("one", True), ("another", True), ("one", False)):
        monkeypatch.setattr(_guard, "describe", lambda device, where=where: where)
        calls.clear()
        _guard.Guarded("moments", moments)(torch.ones(2))
        assert (len(calls) > 1) == tested


def test_wrong_op_is_refused_every_time(record: Path) -> None:
    """Wrong statistics or bytes must not leave the GPU; a new driver may cure it."""

    def off(y: torch.Tensor) -> torch.Tensor:
        return reference.moments(y) + 1

    guarded = _guard.Guarded("moments", off)
    for _ in range(2):
        with pytest.raises(BackendError, match=r"kernels of moments failed their self-test on .*:"):
            guarded(torch.ones(2))
    assert not record.exists()
    assert guarded.result(CPU).startswith("failed: ")


def test_kernel_that_cannot_run_is_refused() -> None:
    """A compiler's error becomes one that names the cure."""

    def off(y: torch.Tensor) -> torch.Tensor:
        raise RuntimeError("PTX was compiled with an unsupported toolchain")

    with pytest.raises(BackendError, match=r"RuntimeError: PTX was .*Set HSWQ_BACKEND=reference"):
        _guard.Guarded("moments", off)(torch.ones(2))


@pytest.mark.parametrize("content", ["", "[]", "{", '{"moments": 3}', "\udcff"])
def test_damaged_record_is_made_anew(content: str, record: Path) -> None:
    """A process that was killed must not keep others from working."""
    record.parent.mkdir(parents=True)
    record.write_bytes(content.encode("utf-8", "surrogateescape"))
    _, moments = counted_moments()
    _guard.Guarded("moments", moments)(torch.ones(2))
    assert _guard.read_record(_guard.describe(CPU)) == ["moments"]


def test_no_place_for_the_record_is_no_error(record: Path) -> None:
    """Read-only homes are common on clusters."""
    record.parent.parent.mkdir(parents=True, exist_ok=True)
    record.parent.write_text("a file where the folder should be")
    _, moments = counted_moments()
    assert _guard.Guarded("moments", moments)(torch.ones(2)).tolist() == [2.0, 2.0, 2.0]
