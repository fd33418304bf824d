"""Ctrl-C and SIGTERM: the first asks a long step to stop where it is safe, the second insists."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from hswq.progress import Progress

_SIGNALS = (signal.SIGINT, signal.SIGTERM)
_STDERR = 2


class Stop:
    """What the user has asked for."""

    def __init__(self) -> None:
        self._asked = False

    def checked(self, progress: Progress) -> Progress:
        """Return the progress with a safe point after every report.

        Raises:
            KeyboardInterrupt: from the report, when a stop was asked for.
        """

        def report(phase: str, done: int, total: int) -> None:
            progress(phase, done, total)
            if self._asked:
                raise KeyboardInterrupt

        return report

    def ask(self, number: int, frame: Any) -> None:
        """Handle a signal."""
        if self._asked:
            raise KeyboardInterrupt
        self._asked = True
        # A handler may run inside a print, and must not print itself.
        os.write(_STDERR, b"\nstopping at the next safe point; once more to stop at once\n")


@contextmanager
def stopping_safely() -> Iterator[Stop]:
    """Handle both signals inside the block."""
    stop = Stop()
    previous = [signal.signal(number, stop.ask) for number in _SIGNALS]
    try:
        yield stop
    finally:
        for number, handler in zip(_SIGNALS, previous, strict=True):
            signal.signal(number, handler)
