"""Equal inputs write equal files, whatever the number of threads and torch's instruction set."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

from hswq import kernels
from tests.conftest import Backend
from tests.kernels.cases import DTYPES

ROOT = Path(__file__).parents[2]


def pseudo_random(*shape: int, seed: int) -> Tensor:
    """Return bell-shaped values made of integers: torch's own generators may follow the ISA."""
    count = torch.Size(shape).numel()
    total = torch.zeros(count, dtype=torch.int64)
    state = torch.arange(count, dtype=torch.int64) * 2654435761 + seed
    for _ in range(4):
        state = (state * 6364136223846793005 + 1442695040888963407) ^ (state >> 29)
        total += (state >> 33) & 0xFFFF
    return ((total - 2 * 0xFFFF).double() / (8 * 0xFFFF)).float().reshape(shape)


def digest(backend: str, device: str) -> str:
    """Hash the results of every op that is exact, on tensors larger than any piece of work."""
    results: list[Tensor] = []
    for seed, dtype in enumerate(DTYPES):
        w = pseudo_random(1100, 1021, seed=seed).to(device, dtype)
        importance = pseudo_random(1021, seed=seed + 10).abs()
        hist, max_abs = kernels.weighted_histogram(w, importance, 4096, backend=backend)
        results += [hist, max_abs]
        for scaled in (False, True):
            results += kernels.search_amax(hist, max_abs, scaled, 200, 3, backend=backend)
        amax = float(results[-2])
        codes = kernels.quantize_e4m3(w, amax, amax / 448, backend=backend)
        results += [codes, kernels.dequantize_e4m3(codes, 0.0123, dtype, backend=backend)]
        rows = pseudo_random(16, 64, seed=seed + 20).to(device, dtype)
        upper = (torch.eye(64) + pseudo_random(64, 64, seed=seed + 30)).double()
        upper.diagonal().abs_().add_(0.5)
        order = torch.arange(63, -1, -1, device=device)
        results.append(
            kernels.round_compensated(rows, upper.to(device), 0.5 / 448, order, backend=backend)
        )
    sha = hashlib.sha256()
    for result in results:
        plain = result.cpu().contiguous().reshape(-1)
        sha.update(plain.view(torch.uint8).numpy().tobytes())
    return sha.hexdigest()


@pytest.mark.slow
def test_threads_and_instruction_set_change_no_bit() -> None:
    """A float sum whose order follows the vector width would make files depend on the machine."""
    native = torch.backends.cpu.get_cpu_capability().lower()
    digests = set()
    for capability, threads in (("default", "1"), (native, "2")):
        environment = {
            **os.environ,
            "ATEN_CPU_CAPABILITY": capability,
            "OMP_NUM_THREADS": threads,
            "PYTHONPATH": str(ROOT),
        }
        output = subprocess.run(
            [sys.executable, __file__], env=environment, check=True, capture_output=True, text=True
        ).stdout
        seen_capability, seen_threads, value = output.split()
        assert (seen_capability.lower(), seen_threads) == (capability, threads)
        digests.add(value)
    assert len(digests) == 1


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_place_in_memory_changes_no_sum(dtype: torch.dtype, backend: Backend) -> None:
    """A sum whose order follows the alignment of its input would change from run to run."""
    shape = (3, 70, 5, 61)
    values = pseudo_random(*shape, seed=1).to(backend.device, dtype)
    found = set()
    for offset in (0, 1, 3, 8, 17):
        y = torch.zeros(values.numel() + offset, dtype=dtype, device=backend.device)[offset:]
        y = y.copy_(values.reshape(-1)).reshape(shape)
        total = kernels.MonitorAccumulators.zeros(70, backend.device)
        results = [
            kernels.moments(y, backend=backend.name),
            kernels.channel_abs_mean(y, -1, backend=backend.name),
            kernels.monitor(y, y, -3, total, backend=backend.name),
            *(total.calls, total.mean_y, total.mean_y2, total.abs_mean),
        ]
        found.add(str([result.tolist() for result in results]))
    assert len(found) == 1


def test_every_backend_gives_the_bits_of_the_reference(backend: Backend) -> None:
    """Float atomics, racing threads or a sum in another order would write another file."""
    expected = digest("reference", "cpu")
    assert digest(backend.name, str(backend.device)) == expected


if __name__ == "__main__":
    capability = torch.backends.cpu.get_cpu_capability()
    sys.stdout.write(f"{capability} {torch.get_num_threads()} {digest('reference', 'cpu')}")
