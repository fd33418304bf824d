"""The work folder: what an unfinished run has done, kept beside its output until it is complete."""

from __future__ import annotations

import contextlib
import fcntl
import json
import logging
import os
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

from hswq.errors import FormatError, InputError, Interrupted
from hswq.formats.writer import remove_abandoned, write_whole

logger = logging.getLogger(__name__)

_JOB = "job.json"
_LOCK = ".lock"
# What a run that was killed before it noted its options may have left.
_BEFORE_JOB = (_LOCK, ".hswq-")


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
        InputError: on entry: the folder cannot be made, is none of ours, or another run uses it.
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
            self._check_ours()
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
        # At the end every process removes what it can see: nodes may have folders of their own,
        # in which nobody has locked anything.
        own = self._owner or not (self.path / _LOCK).exists()
        if done or (not kept and own):
            self._remove()
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
            InputError: one of the facts is another in the folder or not known there, or its list
                is damaged.
        """
        wanted = json.loads(json.dumps(dict(facts)))
        path = self.path / _JOB
        known: dict[str, Any] = {}
        # Without parts nothing depends on what another run noted.
        if self.parts("*"):
            try:
                known = dict(json.loads(path.read_text(encoding="utf-8")))
            except (OSError, ValueError, TypeError) as error:
                raise InputError(
                    f"{path} is damaged ({error}), which tells what the parts beside it were made "
                    f"with: delete {self.path} to start anew."
                ) from error
            if differing := [name for name in wanted if known.get(name, _Unknown) != wanted[name]]:
                listed = "; ".join(
                    f"{name} is {known[name]!r} there and {wanted[name]!r} here"
                    if name in known
                    else f"{name} is not known there and {wanted[name]!r} here"
                    for name in differing
                )
                raise InputError(
                    f"{self.path} holds an unfinished run with other options: {listed}. Give those "
                    "options to go on with it, or delete the folder to start anew."
                )
        elif path.is_file():
            # The same run notes its facts in two steps.
            with contextlib.suppress(ValueError, TypeError):
                known = dict(json.loads(path.read_text(encoding="utf-8")))
        self.write(_JOB, json.dumps({**known, **wanted}, indent=1))

    def clear(self) -> None:
        """Remove all parts."""
        for path in self.parts("*"):
            path.unlink(missing_ok=True)

    def drop_damaged(self, pattern: str, check: Callable[[Path], object]) -> None:
        """Remove parts that cannot be read, after a power cut for example: they are made again.

        Args:
            pattern: of their names.
            check: called with each; raises FormatError where it is damaged.
        """
        for path in self.parts(pattern):
            try:
                check(path)
            except (FormatError, UnicodeDecodeError) as error:
                logger.warning("%s is damaged and is made again: %s", path, error)
                path.unlink(missing_ok=True)
            except InputError:
                # Another process of the run may have removed it.
                if path.exists():
                    raise

    def write(self, name: str, text: str) -> None:
        """Write a small part, which appears only when it is complete and on the disk.

        Raises:
            InputError: the disk refuses.
        """
        write_whole(self.path / name, text.encode())

    def _check_ours(self) -> None:
        """Refuse a folder that another program, or its user, has filled.

        Raises:
            InputError: it has.
        """
        names = os.listdir(self.path)
        others = sorted(name for name in names if not name.startswith(_BEFORE_JOB))
        if others and _JOB not in names:
            raise InputError(
                f"{self.path} holds {others[0]!r} and no {_JOB}, by which a work folder of hswq is "
                "known: it is left as it is. Move it away, or choose another output."
            )

    def _remove(self) -> None:
        """Remove the folder, and last what tells whose parts are in it: a kill may come between."""
        with contextlib.suppress(OSError):
            for path in list(self.path.iterdir()):
                if path.name not in (_JOB, _LOCK):
                    path.unlink(missing_ok=True)
            (self.path / _JOB).unlink(missing_ok=True)
            shutil.rmtree(self.path)

    def _unlock(self) -> None:
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None


class _Unknown:
    """Differs from every fact."""


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
