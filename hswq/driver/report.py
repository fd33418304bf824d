"""What a run reports when it is done."""

from __future__ import annotations

import contextlib
import resource
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hswq.plan import Plan


class Stopwatch:
    """Seconds by phase, in the order in which the phases first ran."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Add the time spent inside to the phase `name`."""
        start = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - start


def peak_memory_bytes() -> int:
    """Return the largest resident memory of this process so far."""
    # What getrusage tells on Linux counts the process that started this one, too.
    with contextlib.suppress(OSError, LookupError):
        lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
        status = dict(line.split(":", 1) for line in lines)
        return int(status["VmHWM"].split()[0]) * 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


@dataclass(frozen=True)
class Report:
    """Summary of one quantized file.

    Attributes:
        source: path read.
        output: path written.
        plan: every layer with its decision and search result.
        container: file layout.
        scaled: V2 (True) or V1.
        source_bytes: size read.
        output_bytes: size written.
        sha256: of the file written, 64 hexadecimal digits.
        seconds: wall time by phase.
        peak_memory_bytes: largest resident memory of the process.
        warnings: what the user should know about this file.
    """

    source: str
    output: str
    plan: Plan
    container: str
    scaled: bool
    source_bytes: int
    output_bytes: int
    sha256: str
    seconds: dict[str, float]
    peak_memory_bytes: int
    warnings: tuple[str, ...] = field(default=())

    def to_dict(self) -> dict[str, Any]:
        """Return the report as JSON-ready data."""
        return {
            "source": self.source,
            "output": self.output,
            "container": self.container,
            "scaled": self.scaled,
            "layers": len(self.plan.layers),
            "quantized": len(self.plan.quantized),
            "kept": [layer.name for layer in self.plan.kept],
            "source_bytes": self.source_bytes,
            "output_bytes": self.output_bytes,
            "sha256": self.sha256,
            "seconds": {name: round(value, 3) for name, value in self.seconds.items()},
            "peak_memory_bytes": self.peak_memory_bytes,
            "warnings": list(self.warnings),
        }
