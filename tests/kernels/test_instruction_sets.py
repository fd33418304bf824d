"""Instruction sets and threads change no bit of any op of the C++ extension.

The instruction set is chosen once per process, so each is tested in its own.
"""

from __future__ import annotations

import json

import pytest

from hswq.kernels import cpp_backend
from tests.kernels import builds, digests

pytestmark = pytest.mark.usefixtures("extension")


@pytest.mark.parametrize("isa", ["baseline", "avx2", "avx512"])
def test_every_thread_count_gives_the_bits_of_the_reference(isa: str) -> None:
    """Bits that follow the machine or its load would make files depend on who wrote them."""
    outcome = builds.run_python(builds.ROOT, digests.__file__, HSWQ_ISA=isa)
    assert outcome.returncode == 0, outcome.stdout
    found = json.loads(outcome.stdout)
    assert found["isa"] == isa
    expected_sums = digests.sums("cpp")
    for threads, by_kind in found["digests"].items():
        for kind, expected in (("exact", digests.of_reference()), ("sums", expected_sums)):
            other = {case for case in expected if by_kind[kind].get(case) != expected[case]}
            assert not other, f"{threads} threads"
            assert len(by_kind[kind]) == len(expected)


# One that was refused may be followed by another choice.
CHOICES = """
import json, os, sys
from hswq.kernels import cpp_backend
answers = {}
for name in ("mmx", "AVX2", "baseline ", "avx2 avx512", *sys.argv[1:], ""):
    os.environ["HSWQ_ISA"] = name
    answers[name] = cpp_backend.unusable_reason() or cpp_backend._cpp.active_isa()
json.dump(answers, sys.stdout)
"""


def test_instruction_set_that_is_not_here_is_refused_by_name() -> None:
    """The CPU would stop the process at the first unknown instruction; none means the best."""
    supported = cpp_backend._cpp.supported_isas()
    absent = {"avx2", "avx512"} - set(supported)
    outcome = builds.run_python(builds.ROOT, "-c", CHOICES, *absent)
    assert outcome.returncode == 0, outcome.stdout
    answers = json.loads(outcome.stdout)
    assert answers.pop("") == supported[-1]
    assert answers.keys() > absent
    for name, answer in answers.items():
        assert f"HSWQ_ISA is '{name}'" in answer
        assert f"offer only: {', '.join(supported)}." in answer
