"""The work folder: what an unfinished run has done, kept beside its output until it is complete."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

from hswq.errors import InputError, Interrupted
from hswq.formats.writer import remove_abandoned

_JOB = "job.json"
_LOCK = ".lock"


class WorkFolder:
    """Context manager that holds a folder of finished parts; one run at a time.

    Leaving without an error removes the folder. After an error or an interruption it stays if it
    holds a part, and the next run with the same options goes on from there.

    Attributes:
        path: NAME.hswq-work beside the output.
        keep: whether the folder stays without an error too, since something is left to do.

    Args:
        output: the file that the run is to write.
        shared: whether other processes of the same run use the folder, and lock and remove it.
    Raises:
        InputError: on entry: the folder cannot be made, or another run uses it.
    """

    def __init__(self, output: Path, *, shared: bool = False) -> None:
        target = Path(os.path.realpath(output))
        self.path = target.with_name(f"{target.stem}.hswq-work")
        self.keep = False
        self._owner = not shared
        self._lock: int | None = None

    def __enter__(self) -> WorkFolder:
        try:
            self.path.mkdir(exist_ok=True)
            if self._owner:
                self._lock = os.open(self.path / _LOCK, os.O_RDWR | os.O_CREAT, mode=0o666)
                _claim(self._lock, self.path)
                remove_abandoned(self.path)
        except OSError as error:
            self._unlock()
            raise InputError(
                f"work folder {self.path} cannot be made: {error.strerror}. Free the name, or "
                "choose another output."
            ) from error
        except BaseException:
            self._unlock()
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        done = error is None and not self.keep
        kept = not done and bool(self.parts("*"))
        # At the end every process removes what it can see: nodes may have folders of their own.
        if done or (not kept and self._owner):
            shutil.rmtree(self.path, ignore_errors=True)
        self._unlock()
        if kept and isinstance(error, KeyboardInterrupt):
            raise Interrupted(
                f"interrupted: what was finished is kept in {self.path}; the same command goes on "
                "from there"
            ) from error

    def parts(self, pattern: str) -> list[Path]:
        """Return the parts whose names match a pattern of shells, sorted by name."""
        return sorted(
            path
            for path in self.path.glob(pattern)
            if path.name != _JOB and not path.name.startswith(".")
        )

    def agree(self, facts: Mapping[str, Any]) -> None:
        """Note what the parts depend on, or refuse to go on with parts that were made otherwise.

        Args:
            facts: JSON values by the names by which a user knows them.
        Raises:
            InputError: one of the facts is another in the folder, or its list is damaged.
        """
        wanted = json.loads(json.dumps(dict(facts)))
        path = self.path / _JOB
        try:
            known = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
            differing = [name for name in wanted if known.get(name, wanted[name]) != wanted[name]]
        except (ValueError, AttributeError) as error:
            raise InputError(
                f"{path} is damaged ({error}): delete {self.path} to start anew."
            ) from error
        if differing and self.parts("*"):
            listed = "; ".join(
                f"{name} is {known[name]!r} there and {wanted[name]!r} here" for name in differing
            )
            raise InputError(
                f"{self.path} holds an unfinished run with other options: {listed}. Give those "
                "options to go on with it, or delete the folder to start anew."
            )
        self.write(_JOB, json.dumps({**known, **wanted}, indent=1))

    def clear(self) -> None:
        """Remove all parts."""
        for path in self.parts("*"):
            path.unlink(missing_ok=True)

    def write(self, name: str, text: str) -> None:
        """Write a small part, which appears only when it is complete.

        Raises:
            InputError: the disk refuses.
        """
        temporary = self.path / f".{name}.{os.getpid()}"
        try:
            temporary.write_text(text, encoding="utf-8")
            temporary.replace(self.path / name)
        except OSError as error:
            raise InputError(
                f"{self.path / name} cannot be written: {error.strerror}. Free disk space, or give "
                "an output on another disk."
            ) from error

    def _unlock(self) -> None:
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None


def _claim(descriptor: int, path: Path) -> None:
    """Lock the folder for this process.

    Raises:
        InputError: another process has.
    """
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise InputError(
            f"another run with this output is under way and works in {path}: wait for it, or "
            "choose another output."
        ) from error
