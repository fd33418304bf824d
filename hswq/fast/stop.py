"""Ctrl-C and SIGTERM: the first asks a long step to stop where it is safe, the second insists."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NoReturn

from hswq.errors import Interrupted, RankError
from hswq.progress import Progress

EXIT_INTERRUPTED = 130

_SIGNALS = (signal.SIGINT, signal.SIGTERM)
_STDERR = 2


class Stop:
    """What the user has asked for.

    Attributes:
        asked: whether a signal has come.
    """

    def __init__(self) -> None:
        self.asked = False

    def checked(self, progress: Progress) -> Progress:
        """Return the progress with a safe point before and after every report.

        Raises:
            KeyboardInterrupt: from the report, when a stop was asked for.
        """

        def report(phase: str, done: int, total: int) -> None:
            self._check()
            progress(phase, done, total)
            self._check()

        return report

    def ask(self, number: int, frame: Any) -> None:
        """Handle a signal, in the main thread and between two steps of Python."""
        if self.asked:
            _leave()
        self.asked = True

    def _check(self) -> None:
        if self.asked:
            raise KeyboardInterrupt


@contextmanager
def stopping_safely() -> Iterator[Stop]:
    """Handle both signals inside the block.

    Raises:
        KeyboardInterrupt: after a signal, in the place of what it does to others: Ctrl-C also ends
            the program that a pipe leads to, and other ranks stop at their own safe points.
    """
    stop = Stop()
    with _watching():
        previous = [signal.signal(number, stop.ask) for number in _SIGNALS]
        try:
            yield stop
        except BrokenPipeError as error:
            if not stop.asked:
                raise
            raise KeyboardInterrupt from error
        except RankError as error:
            if not stop.asked:
                raise
            raise Interrupted(f"interrupted: {error}") from error
        finally:
            for number, handler in zip(_SIGNALS, previous, strict=True):
                signal.signal(number, handler)


@contextmanager
def _watching() -> Iterator[None]:
    """Answer signals from a thread, at once.

    Python runs handlers in its main thread only, which may wait for hours in C code: for another
    rank, or for a kernel. What a wakeup descriptor gets is written by the signal itself.
    """
    reading, writing = os.pipe()
    os.set_blocking(writing, False)
    watcher = threading.Thread(target=_watch, args=(reading,), name="signals", daemon=True)
    watcher.start()
    previous = signal.set_wakeup_fd(writing, warn_on_full_buffer=False)
    try:
        yield
    finally:
        signal.set_wakeup_fd(previous)
        os.close(writing)
        watcher.join()
        os.close(reading)


def _watch(descriptor: int) -> None:
    asked = False
    while number := os.read(descriptor, 1):
        if number[0] not in _SIGNALS:
            continue
        if asked:
            _leave()
        asked = True
        # A print may be under way. The reader of a pipe may be gone, by the same Ctrl-C.
        with contextlib.suppress(OSError):
            os.write(_STDERR, b"\nstopping at the next safe point; once more to stop at once\n")


def _leave() -> NoReturn:
    """End the process without waiting for the threads of pools, as Python would.

    Files appear under their names only when they are complete, and stderr is written line by line:
    nothing is lost. Another flush could wait for a print of the main thread.
    """
    os._exit(EXIT_INTERRUPTED)
