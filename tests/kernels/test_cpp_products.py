"""The C++ ops gram and round_compensated on every instruction set and number of threads.

That they compute what they should is the business of the suite that all backends share.
"""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys

import pytest
import torch
from torch import Tensor

from hswq import kernels
from hswq.kernels import cpp_backend
from tests.kernels.cases import DTYPES, generator, normal
from tests.kernels.test_cpp_build import ROOT, extension

__all__ = ["extension"]


def rounded_codes() -> list[Tensor]:
    """Codes of weights that span several blocks of rows and columns, cut at odd places."""
    results = []
    for seed, dtype in enumerate(DTYPES):
        w = normal(133, 271, sigma=0.02, dtype=dtype, seed=seed)
        upper = normal(271, 271, sigma=0.05, seed=seed + 1).double().triu()
        upper.diagonal().copy_(torch.linspace(0.7, 1.9, 271, dtype=torch.float64) / 3)
        order = torch.randperm(271, generator=generator(seed))
        for scale in (1.7e-4, torch.rand(133, generator=generator(seed)) * 1e-3 + 1e-5):
            results.append(kernels.round_compensated(w, upper, scale, order, backend="cpp"))
    return results


def gram_sums() -> list[Tensor]:
    """Sums over several panels of rows and tiles of columns, cut at odd places."""
    results = []
    for dtype in DTYPES:
        linear = normal(1100, 3 * 143, dtype=dtype, seed=1)
        images = normal(2, 33, 31, 29, dtype=dtype, seed=2)
        for wide in (torch.float32, torch.float64):
            for blocks in (1, 3):
                accumulator = normal(blocks, 429 // blocks, 429 // blocks, seed=3).to(wide)
                kernels.gram(linear, accumulator, backend="cpp")
                results.append(accumulator)
                width = 33 * 6 // blocks
                accumulator = normal(blocks, width, width, seed=4).to(wide)
                kernels.gram(
                    images,
                    accumulator,
                    kernel_size=(3, 2),
                    stride=(1, 2),
                    padding=(1, 3),
                    dilation=(2, 1),
                    backend="cpp",
                )
                results.append(accumulator)
    return results


def digest() -> str:
    sha = hashlib.sha256()
    for result in rounded_codes() + gram_sums():
        sha.update(result.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return sha.hexdigest()


@pytest.mark.usefixtures("extension")
@pytest.mark.parametrize("isa", ["baseline", "avx2", "avx512"])
def test_instruction_set_changes_no_bit(isa: str) -> None:
    """Codes and sums that follow the instruction set make files that depend on the machine."""
    environment = {**os.environ, "HSWQ_ISA": isa, "PYTHONPATH": str(ROOT)}
    output = subprocess.run(
        [sys.executable, __file__], env=environment, capture_output=True, text=True, check=True
    ).stdout
    if isa in cpp_backend._cpp.supported_isas():
        assert output.split() == [isa, digest()]
    else:
        assert f"'{isa}'" in output


@pytest.mark.usefixtures("extension")
def test_number_of_threads_changes_no_bit(monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks of rows follow the number of threads; what they compute must not."""
    digests = {}
    for threads in (1, 2, 3, 7, 200):
        monkeypatch.setenv("HSWQ_NUM_THREADS", str(threads))
        digests[threads] = digest()
    assert len(set(digests.values())) == 1, digests


if __name__ == "__main__":
    reason = cpp_backend.unusable_reason()
    sys.stdout.write(reason or f"{cpp_backend._cpp.active_isa()} {digest()}")
