"""Progress bars with an estimate, on stderr."""

from __future__ import annotations

import sys
from typing import Any

from tqdm import tqdm

# Phases whose counts are bytes; the others count steps or layers.
_BYTE_PHASES = frozenset({"quantize", "convert"})


class Bars:
    """One bar a phase, drawn from the library's progress calls."""

    def __init__(self) -> None:
        self._bars: dict[str, tqdm[Any]] = {}

    def __call__(self, phase: str, done: int, total: int) -> None:
        """Move the bar of `phase` to `done` of `total`; a full bar is closed."""
        if phase not in self._bars:
            in_bytes = phase in _BYTE_PHASES
            self._bars[phase] = tqdm(
                total=total,
                desc=phase,
                file=sys.stderr,
                unit="B" if in_bytes else " steps",
                unit_scale=in_bytes,
                dynamic_ncols=True,
            )
        bar = self._bars[phase]
        bar.update(done - bar.n)
        if done >= total:
            bar.close()
            # The phase may come again, for the next file.
            del self._bars[phase]

    def close(self) -> None:
        """Close what is still open, so that an error is printed on a line of its own."""
        for bar in self._bars.values():
            bar.close()
