"""How the parts of benchmarks.gpu measure."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

BACKEND = "triton"
Row = dict[str, Any]


class Bench(NamedTuple):
    """Where and how much is measured.

    Attributes:
        device: of all tensors.
        small: a few numbers instead of real sizes.
        rounds: calls a median is taken of.
        flush: memory that is overwritten before each call, larger than any cache.
    """

    device: torch.device
    small: bool
    rounds: int
    flush: Tensor

    def seconds(self, side: Callable[[], object]) -> float:
        """Return the median time of a call, after one that is not counted."""
        side()
        times = []
        for _ in range(self.rounds):
            self.flush.zero_()
            if self.device.type == "cuda":
                start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
                start.record()
                side()
                end.record()
                end.synchronize()
                times.append(start.elapsed_time(end) / 1e3)
            else:
                begin = time.perf_counter()
                side()
                times.append(time.perf_counter() - begin)
        return statistics.median(times)

    def wait(self) -> None:
        """Wait until the device has nothing left to do."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def noise(self, *shape: int, dtype: torch.dtype, deviation: float = 0.02) -> Tensor:
        """Return normal numbers."""
        values = torch.randn(shape, device=self.device, dtype=torch.float32) * deviation
        return values.to(dtype)
