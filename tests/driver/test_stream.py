"""The stream between file and work: order, reuse of buffers, and what happens on errors."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from hswq.driver.stream import Piece, Stream
from hswq.errors import FormatError
from hswq.formats.reader import Checkpoint


@pytest.fixture
def checkpoint(tmp_path: Path) -> Checkpoint:
    """Ten tensors of different sizes, all visible where one replaces another."""
    tensors = {f"t{i}": torch.full((10 - i, 5), float(i)) for i in range(10)}
    save_file(tensors, tmp_path / "x.safetensors")
    return Checkpoint.open(tmp_path / "x.safetensors")


def test_pieces_arrive_whole_and_in_order(checkpoint: Checkpoint) -> None:
    """More pieces than buffers: a buffer that is reused too early shows a later tensor's values."""
    pieces = [Piece.whole(info) for info in checkpoint.tensors.values()]
    names = []
    with checkpoint, Stream(checkpoint, pieces) as stream:
        for loan in stream:
            info = loan.piece.info
            assert torch.equal(loan.tensor, checkpoint.read(info.name))
            names.append(info.name)
            loan.release()
    assert names == [f"t{i}" for i in range(10)]


def test_cut_pieces_cover_every_byte(checkpoint: Checkpoint) -> None:
    info = checkpoint.tensors["t0"]
    with checkpoint, Stream(checkpoint, list(Piece.cut(info, 16))) as stream:
        parts = []
        for loan in stream:
            assert loan.piece.nbytes <= 16
            parts.append(bytes(loan.view))
            loan.release()
        assert b"".join(parts) == checkpoint.read_bytes("t0", 0, info.nbytes)


def test_a_loan_stays_valid_until_background_work_released_it(checkpoint: Checkpoint) -> None:
    """Slow writes must hold the reader up, not see their bytes replaced."""
    pieces = [Piece.whole(info) for info in checkpoint.tensors.values()]
    written: list[bytes] = []
    gate = threading.Event()

    def write(view: memoryview) -> None:
        gate.wait(timeout=60)
        written.append(bytes(view))

    with checkpoint, Stream(checkpoint, pieces) as stream:
        loans = iter(stream)
        for _ in range(3):
            loan = next(loans)
            stream.behind(write, loan.view)
            stream.behind(loan.release)
        reader = threading.Thread(target=lambda: written.append(bytes(next(loans).view)))
        reader.start()
        # The fourth piece has no buffer to go to until a write is done.
        reader.join(timeout=0.2)
        assert reader.is_alive()
        assert written == []
        gate.set()
        reader.join(timeout=60)
        stream.flush()
        expected = [checkpoint.read_bytes(p.info.name, 0, p.nbytes) for p in pieces[:4]]
        assert sorted(written) == sorted(expected)


def test_errors_of_background_work_come_up(checkpoint: Checkpoint) -> None:
    def fail() -> None:
        raise FormatError("disk on fire")

    with checkpoint, Stream(checkpoint, []) as stream:
        stream.behind(fail)
        with pytest.raises(FormatError, match="on fire"):
            stream.flush()


def test_leaving_early_ends_a_reader_that_waits_for_a_buffer(checkpoint: Checkpoint) -> None:
    """An error in the work keeps its loan; the thread must not wait for it for ever."""
    pieces = [Piece.whole(info) for info in checkpoint.tensors.values()]
    before = threading.active_count()

    def fail() -> None:
        with checkpoint, Stream(checkpoint, pieces) as stream:
            held = [loan for _, loan in zip(range(3), stream, strict=False)]
            raise ZeroDivisionError(f"{len(held)} loans held")

    with pytest.raises(ZeroDivisionError, match="3 loans"):
        fail()
    assert threading.active_count() == before


def test_errors_of_the_reader_come_up(checkpoint: Checkpoint) -> None:
    pieces = [Piece.whole(info) for info in checkpoint.tensors.values()]
    path = checkpoint.path
    path.write_bytes(path.read_bytes()[:-40])

    def read_all() -> None:
        with checkpoint, Stream(checkpoint, pieces) as stream:
            for loan in stream:
                loan.release()

    with pytest.raises(FormatError, match="ends"):
        read_all()
