"""How long steps report how far they are.

The library calls `progress(phase, done, total)`; only `hswq.fast` draws bars from it.
"""

from __future__ import annotations

from collections.abc import Callable

Progress = Callable[[str, int, int], None]


def no_progress(phase: str, done: int, total: int) -> None:
    """Report nothing."""
