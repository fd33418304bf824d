"""Reading ahead and writing behind: the disk works while the processor does."""

from __future__ import annotations

import queue
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from types import TracebackType
from typing import Any

import torch
from torch import Tensor

from hswq.formats.reader import Checkpoint, TensorInfo

# One buffer is worked on, one is being read, one is full or still being written.
_BUFFERS = 3
_READS_AHEAD = 2
_CALLS_BEHIND = 8


@dataclass(frozen=True)
class Piece:
    """A run of bytes of one tensor.

    Attributes:
        info: the tensor.
        offset: first byte in it.
        nbytes: number of bytes.
    """

    info: TensorInfo
    offset: int
    nbytes: int

    @classmethod
    def whole(cls, info: TensorInfo) -> Piece:
        """Return all bytes of a tensor as one piece."""
        return cls(info, 0, info.nbytes)

    @classmethod
    def cut(cls, info: TensorInfo, nbytes: int) -> Iterator[Piece]:
        """Yield a tensor in pieces of at most so many bytes."""
        for offset in range(0, info.nbytes, nbytes):
            yield cls(info, offset, min(nbytes, info.nbytes - offset))


class Loan:
    """A piece's bytes in a borrowed buffer, which goes back with `release`."""

    def __init__(self, piece: Piece, buffer: Tensor, free: queue.SimpleQueue[Tensor | None]):
        self.piece = piece
        self._data = buffer[: piece.nbytes]
        self._buffer = buffer
        self._free = free

    @property
    def view(self) -> memoryview:
        """The bytes."""
        view: memoryview = self._data.numpy().data
        return view

    @property
    def tensor(self) -> Tensor:
        """The tensor of a whole piece."""
        info = self.piece.info
        return self._data.view(info.torch_dtype).reshape(info.shape)

    def release(self) -> None:
        """Give the buffer back; the bytes are void from now on."""
        self._free.put(self._buffer)


class Stream:
    """Pieces of a checkpoint in order, each read while the one before is worked on.

    Reading and what `behind` is given have a thread each. Buffers are used again and again: fresh
    pages for every weight would cost as much as reading it. Used in `with`, which ends the threads.

    Args:
        checkpoint: where the pieces lie.
        pieces: what to read, in this order; each must be released in time.
    """

    def __init__(self, checkpoint: Checkpoint, pieces: Sequence[Piece]) -> None:
        self._checkpoint = checkpoint
        self._pieces = pieces
        self._free: queue.SimpleQueue[Tensor | None] = queue.SimpleQueue()
        self._pending: deque[Future[Any]] = deque()
        self._ahead = ThreadPoolExecutor(max_workers=1)
        self._behind = ThreadPoolExecutor(max_workers=1)

    def __enter__(self) -> Stream:
        largest = max((piece.nbytes for piece in self._pieces), default=0)
        for _ in range(_BUFFERS):
            self._free.put(torch.empty(largest, dtype=torch.uint8, device="cpu"))
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        # Wakes readers that wait for a buffer which nobody gives back any more.
        for _ in range(_READS_AHEAD):
            self._free.put(None)
        self._ahead.shutdown(cancel_futures=True)
        self._behind.shutdown(cancel_futures=True)

    def __iter__(self) -> Iterator[Loan]:
        remaining = iter(self._pieces)
        reads: deque[Future[Loan]] = deque()
        while True:
            while len(reads) < _READS_AHEAD and (piece := next(remaining, None)) is not None:
                reads.append(self._ahead.submit(self._read, piece))
            if not reads:
                return
            yield reads.popleft().result()

    def _read(self, piece: Piece) -> Loan:
        buffer = self._free.get()
        if buffer is None:
            raise RuntimeError("the stream was closed while it was read")
        loan = Loan(piece, buffer, self._free)
        self._checkpoint.read_into(piece.info.name, piece.offset, loan.view)
        return loan

    def behind(self, function: Callable[..., Any], *args: Any) -> None:
        """Call a function in the background, after those of earlier calls.

        Raises:
            What an earlier function raised.
        """
        while len(self._pending) >= _CALLS_BEHIND:
            self._pending.popleft().result()
        self._pending.append(self._behind.submit(function, *args))

    def flush(self) -> None:
        """Wait until all background calls are done.

        Raises:
            What one of them raised.
        """
        while self._pending:
            self._pending.popleft().result()
