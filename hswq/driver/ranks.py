"""The processes of one run that torchrun has started, and what they tell each other.

Only bytes of finished parts pass between them, by gloo and never pickled: kernels and denoisers
run on each process's own device.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

import torch
from torch.distributed.rendezvous import rendezvous

from hswq.driver.roll import Roll
from hswq.errors import InputError, Interrupted, RankError
from hswq.processes import rank_of_environment

_Item = TypeVar("_Item")
_Result = TypeVar("_Result")

# Of a file that is sent: one piece is in memory.
_PIECE_BYTES = 1 << 20
# One waits at most so long for the slowest: shares of a long run are not equally long.
_PATIENCE = timedelta(days=7)
# Machines that are to join start within a few minutes of each other, or not at all.
_JOINING = timedelta(minutes=10)
# Facts that name files: each machine has its own folders, and their contents count elsewhere.
_PATHS = ("--pipeline", "--calib-file", "--embeddings", "--text-encoder")


@dataclass(frozen=True)
class Ranks:
    """The processes of a run.

    Attributes:
        rank: number of this one.
        size: how many there are.
    """

    rank: int = 0
    size: int = 1
    _group: Any = None
    _roll: Roll | None = None

    @property
    def is_first(self) -> bool:
        """Whether this is the process that writes the output."""
        return self.rank == 0

    def share(self, items: Sequence[_Item]) -> list[_Item]:
        """Return this process's part of some items."""
        return list(items[self.rank :: self.size])

    def exchange(self, folder: Path, pattern: str) -> None:
        """Let every process have all files of a name in its folder.

        Processes of one machine, or with a shared disk, see them all already.

        Raises:
            RankError: a process has ended.
            InputError: a file cannot be copied.
        """
        if self.size == 1:
            return
        # All are done writing when all have listed.
        self._gather(b"")
        mine = sorted(path.name for path in folder.glob(pattern))
        listed: list[list[str]] = [json.loads(text) for text in self._gather(_bytes(mine))]
        for name in sorted({name for names in listed for name in names}):
            having = [rank for rank, names in enumerate(listed) if name in names]
            if len(having) == self.size:
                continue
            self._send_file(folder / name, having[0])

    def agree(self, facts: Mapping[str, Any]) -> None:
        """Let all make sure that they do one job.

        Args:
            facts: JSON values that must be equal, by the names by which a user knows them; those
                that name files are passed over.
        Raises:
            InputError: one is another in one of the processes.
            RankError: a process has ended.
        """
        if self.size == 1:
            return
        mine = {name: value for name, value in facts.items() if name not in _PATHS}
        told: list[dict[str, Any]] = [json.loads(text) for text in self._gather(_bytes(mine))]
        for rank, theirs in enumerate(told):
            for name in sorted(told[0].keys() | theirs.keys()):
                first, other = told[0].get(name), theirs.get(name)
                if first != other:
                    raise InputError(
                        f"rank {rank} does another job than rank 0: {name} is {other!r} there and "
                        f"{first!r} on rank 0. Start all ranks with the same command, checkpoint "
                        "and kind of machine."
                    )

    def least(self, value: int) -> int:
        """Return the least of what all processes give.

        Raises:
            RankError: a process has ended.
        """
        if self.size == 1:
            return value
        return min(int(json.loads(text)) for text in self._gather(_bytes(value)))

    def wait(self) -> None:
        """Return when all processes have come here.

        Raises:
            RankError: a process has ended.
        """
        if self.size > 1:
            self._gather(b"")

    def _gather(self, data: bytes) -> list[bytes]:
        """Return what each process gives, in the order of the processes."""

        def collect() -> list[bytes]:
            length = torch.tensor([len(data)])
            lengths = [torch.zeros_like(length) for _ in range(self.size)]
            torch.distributed.all_gather(lengths, length, group=self._group)
            longest = max(int(it) for it in lengths)
            mine = torch.zeros(longest, dtype=torch.uint8)
            mine[: len(data)] = _tensor(data)
            parts = [torch.zeros_like(mine) for _ in range(self.size)]
            if longest:
                torch.distributed.all_gather(parts, mine, group=self._group)
            return [
                part[: int(it)].numpy().tobytes() for part, it in zip(parts, lengths, strict=True)
            ]

        return self._guarded(collect)

    def _send_file(self, path: Path, source: int) -> None:
        """Let the processes that lack a file receive it, piece by piece.

        Raises:
            InputError: the disk refuses.
        """
        is_source, lacks = self.rank == source, not path.is_file()
        temporary = path.with_name(f".{path.name}.{self.rank}")

        def send() -> None:
            size = torch.tensor([path.stat().st_size if is_source else 0])
            torch.distributed.broadcast(size, source, group=self._group)
            with ExitStack() as opened:
                file = opened.enter_context(path.open("rb")) if is_source else None
                copy = opened.enter_context(temporary.open("wb")) if lacks else None
                for offset in range(0, int(size), _PIECE_BYTES):
                    piece = torch.zeros(min(_PIECE_BYTES, int(size) - offset), dtype=torch.uint8)
                    if file is not None:
                        _read_into(file, piece.numpy().data)
                    torch.distributed.broadcast(piece, source, group=self._group)
                    if copy is not None:
                        copy.write(piece.numpy().data)
                if copy is not None:
                    copy.flush()
                    os.fsync(copy.fileno())

        try:
            self._guarded(send)
            if lacks:
                temporary.replace(path)
        except OSError as error:
            raise InputError(
                f"{path} cannot be copied between the ranks: {error.strerror or error}. Free disk "
                "space, or look after the disk; the same command goes on."
            ) from error
        finally:
            if lacks:
                temporary.unlink(missing_ok=True)

    def _guarded(self, work: Callable[[], _Result]) -> _Result:
        """Turn the failure of a transfer into an error that names who is missing."""
        try:
            return work()
        except RuntimeError as error:
            cause = "" if self._roll is None else self._roll.cause()
            raise RankError(
                f"{cause or f'a rank of {self.size} ended before the others'}; its own output says "
                "why. What was finished is kept: start all ranks again to go on."
            ) from error


@contextmanager
def joined_ranks() -> Iterator[Ranks]:
    """Join the other processes that torchrun has started; alone, be the only one.

    Each takes the GPU of its number on its machine, where there are GPUs. A caller that has joined
    them already keeps its group and device.

    Raises:
        RankError: the others cannot be reached.
        OptionError: the environment holds no numbers.
        Interrupted: in place of an interruption, where the loss of another process came before.
    """
    rank, size = rank_of_environment()
    if size == 1:
        yield Ranks()
        return
    if torch.distributed.is_initialized():
        # The caller's own engine, whose group may be of another kind.
        group = torch.distributed.new_group(backend="gloo", timeout=_PATIENCE)
        yield Ranks(rank, size, group)
        return
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")) % torch.cuda.device_count())
    try:
        store, rank, size = next(rendezvous("env://", timeout=_JOINING))
        torch.distributed.init_process_group(
            "gloo", store=store, rank=rank, world_size=size, timeout=_JOINING
        )
        group = torch.distributed.new_group(backend="gloo", timeout=_PATIENCE)
    except (RuntimeError, ValueError) as error:
        raise RankError(f"rank {rank} of {size} cannot join the others: {error}.") from error
    hosted = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
    roll = Roll(store, rank, size, hosted=hosted)
    ranks = Ranks(rank, size, group, roll)
    try:
        yield ranks
        roll.stop()
        # Nobody asks the store any more when it ends with its process.
        ranks.wait()
    except BaseException as error:
        cause = roll.leave(error)
        if cause and isinstance(error, KeyboardInterrupt):
            raise Interrupted(f"{str(error) or 'interrupted'}; before, {cause}") from error
        raise
    finally:
        roll.stop()
        torch.distributed.destroy_process_group()


def _read_into(file: BinaryIO, view: memoryview) -> None:
    """Read as many bytes as are wanted.

    Raises:
        OSError: the file ends before.
    """
    done = 0
    while done < len(view):
        count = file.readinto(view[done:])  # type: ignore[attr-defined]
        if not count:
            raise OSError(f"it ends {len(view) - done} bytes early")
        done += count


def _bytes(value: Any) -> bytes:
    return json.dumps(value).encode()


def _tensor(data: bytes) -> torch.Tensor:
    return torch.frombuffer(bytearray(data), dtype=torch.uint8) if data else torch.zeros(0).byte()
