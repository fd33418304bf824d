"""Who of the processes of a run lives, told through torch's store while they work."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterable
from typing import Any

from hswq.errors import RankError

# A living process counts up so often.
_BEAT_S = 2.0
# How long the living have to do so, after one of them was lost. torchrun gives those that are left
# half a minute.
_ROLL_CALL_S = 20.0
_POLL_S = 0.25
_CAUSE = "hswq/cause"


class Roll:
    """Lets a process be heard of by the others, whatever it works on.

    A thread counts up in the store; who does not while another one calls the roll has ended. The
    first to know why the run ends writes it into the store, and all others repeat that: processes
    that gave up since another had ended are not taken for the cause.

    Args:
        store: torch's.
        rank: number of this process.
        size: how many there are.
        hosted: whether the store ends with rank 0, and not with torchrun.
    """

    def __init__(self, store: Any, rank: int, size: int, *, hosted: bool) -> None:
        self._store = store
        self._rank, self._size, self._hosted = rank, size, hosted
        self._cause: dict[str, Any] = {}
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._beat, name="hswq-roll", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """Be heard of no more."""
        self._stopped.set()
        self._thread.join()

    def cause(self) -> str:
        """Return what ended the run, after a transfer has failed; empty where nobody knows."""
        try:
            silent = self._call()
            if silent and not self._cause:
                self._tell(f"{_listed(silent)} of {self._size} ended before the others", silent)
        except RuntimeError:
            # The store went with the process that it lived in.
            if self._hosted and self._rank and not self._cause:
                self._cause = {"told": f"rank 0 of {self._size} ended before the others"}
        return str(self._cause.get("told", ""))

    def leave(self, error: BaseException) -> str:
        """Say that this process ends by an error; return what had ended the run before."""
        before = ""
        interrupted = isinstance(error, KeyboardInterrupt)
        # Whoever has started the processes stops them all when it has lost one.
        if interrupted and self.cause() and not self._cause.get("interrupted"):
            before = str(self._cause["told"])
        who = f"rank {self._rank} of {self._size}"
        try:
            if interrupted:
                self._tell(f"{who} was interrupted", interrupted=True)
            elif not isinstance(error, RankError):
                self._tell(f"{who} ended before the others ({type(error).__name__}: {error})")
            if self._hosted and self._rank == 0:
                self._wait_until_known()
        except RuntimeError:
            pass
        return before

    def _beat(self) -> None:
        try:
            while not self._cause:
                self._store.add(_beats(self._rank), 1)
                self._look()
                if self._stopped.wait(_BEAT_S):
                    return
        except RuntimeError:
            # The store has gone, and the next transfer tells.
            return

    def _look(self) -> None:
        if self._store.check([_CAUSE]):
            self._learn(self._store.get(_CAUSE))

    def _learn(self, text: bytes) -> None:
        self._cause = json.loads(text)
        self._store.set(_knows(self._rank), "yes")

    def _tell(self, told: str, silent: Iterable[int] = (), *, interrupted: bool = False) -> None:
        cause = {"told": told, "silent": sorted(silent), "interrupted": interrupted}
        # That of the first stays.
        self._learn(self._store.compare_set(_CAUSE, "", json.dumps(cause)))

    def _call(self) -> set[int]:
        """Return who does not count; nobody where the cause is known."""
        silent = set(range(self._size)) - {self._rank}
        before = {rank: self._store.add(_beats(rank), 0) for rank in silent}
        until = time.monotonic() + _ROLL_CALL_S
        while silent and time.monotonic() < until:
            self._look()
            if self._cause:
                return set()
            time.sleep(_POLL_S)
            silent = {rank for rank in silent if self._store.add(_beats(rank), 0) == before[rank]}
        return silent

    def _wait_until_known(self) -> None:
        """Keep the store, which lives in this process, until the living have read the cause."""
        silent = {0, *self._cause.get("silent", ())}
        keys = [_knows(rank) for rank in range(self._size) if rank not in silent]
        until = time.monotonic() + _ROLL_CALL_S
        while keys and time.monotonic() < until and not self._store.check(keys):
            time.sleep(_POLL_S)


def _listed(ranks: Iterable[int]) -> str:
    return f"rank {', '.join(map(str, sorted(ranks)))}"


def _beats(rank: int) -> str:
    return f"hswq/beats/{rank}"


def _knows(rank: int) -> str:
    return f"hswq/knows/{rank}"
