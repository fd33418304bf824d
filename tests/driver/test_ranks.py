"""Calibrations that several processes share: equal bytes, one job, and who ended them."""

from __future__ import annotations

import errno
import os
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch.distributed import TCPStore

import hswq
from hswq.driver import roll
from hswq.driver.ranks import Ranks, _read_into
from hswq.driver.roll import Roll
from hswq.errors import InputError, Interrupted, RankError
from hswq.fast.__main__ import main
from hswq.search.compensated import one_thread
from tests.driver.started import (
    arguments,
    files_of,
    interrupt_at,
    started,
    started_ranks,
    wait_for,
)
from tests.tiny import Tiny, tiny_calibration_config


@pytest.fixture(scope="module")
def one_process(tiny: Tiny, tmp_path_factory) -> dict[str, bytes]:
    """Statistics and codes of a run in a process of its own, by name."""
    folder = tmp_path_factory.mktemp("one")
    command = arguments(tiny, folder / "s.safetensors", 3, "--preset", "best", "--calls", "2")
    with started(["hswq.fast", *command]) as process:
        assert process.communicate() == (None, "")
    return files_of(folder)


@pytest.mark.slow
@pytest.mark.parametrize("count", [2, 4])
def test_processes_give_the_same_bytes(
    tiny: Tiny, one_process: dict[str, bytes], tmp_path: Path, count: int
) -> None:
    """Statistics of four GPUs must be those of one, and the files made from them too."""
    command = arguments(tiny, tmp_path / "s.safetensors", 3, "--preset", "best", "--calls", "2")
    launcher = ["torch.distributed.run", "--standalone", "--nproc-per-node", str(count)]
    with started([*launcher, "-m", "hswq.fast", *command]) as process:
        _, errors = process.communicate(timeout=600)
    assert process.returncode == 0, errors
    assert files_of(tmp_path) == one_process


@pytest.mark.slow
def test_machines_without_a_shared_disk(
    tiny: Tiny, one_process: dict[str, bytes], tmp_path: Path
) -> None:
    """Parts of the other machine come over the network; only the first one writes the output."""
    folders = [tmp_path / "first", tmp_path / "second"]
    for folder in folders:
        folder.mkdir()
    options = ["--preset", "best", "--calls", "2"]
    commands = [arguments(tiny, folder / "s.safetensors", 3, *options) for folder in folders]
    with started_ranks(commands, 29573) as ranks:
        for process in ranks:
            assert process.communicate(timeout=600) == (None, "")
            assert process.returncode == 0
    assert files_of(folders[0]) == one_process
    assert files_of(folders[1]) == {}


@pytest.mark.slow
def test_lost_process_is_named_and_parts_are_kept(tiny: Tiny, tmp_path: Path) -> None:
    """Of eight processes on two machines one must know which one to look after."""
    path = tmp_path / "s.safetensors"
    command = arguments(tiny, path, 24, "--preset", "seed")
    with started_ranks([command] * 3, 29571) as ranks:
        wait_for(tmp_path, "s.hswq-work/sample-*", ranks[1])
        ranks[1].kill()
        for rank in (0, 2):
            _, errors = ranks[rank].communicate(timeout=300)
            assert ranks[rank].returncode == 1
            assert "RankError: rank 1 of 3 ended before the others" in errors
    kept = len(list(tmp_path.glob("s.hswq-work/sample-*")))
    assert 16 <= kept < 24
    assert not path.exists()


@pytest.mark.slow
def test_machines_without_a_shared_disk_go_on(
    tiny: Tiny, one_process: dict[str, bytes], tmp_path: Path
) -> None:
    """After an interruption both have parts of all names; what is measured now is exchanged too."""
    folders = [tmp_path / "first", tmp_path / "second"]
    folders[0].mkdir()
    config = tiny_calibration_config(tiny.pipeline, preset="best", samples=3, calls=2)
    progress, _ = interrupt_at("impact", 10)
    with one_thread(), pytest.raises(Interrupted):
        hswq.calibrate_checkpoint(
            tiny.checkpoint, config, folders[0] / "s.safetensors", progress=progress
        )
    work = folders[0] / "s.hswq-work"
    shutil.copy(work / "impact-00000.json", work / "impact-00001.json")
    shutil.copytree(folders[0], folders[1])
    options = ["--preset", "best", "--calls", "2"]
    commands = [arguments(tiny, folder / "s.safetensors", 3, *options) for folder in folders]
    with started_ranks(commands, 29575) as ranks:
        for process in ranks:
            assert process.communicate(timeout=600) == (None, "")
    assert files_of(folders[0]) == one_process
    assert files_of(folders[1]) == {}


@pytest.mark.slow
def test_ranks_with_other_options_are_refused(tiny: Tiny, tmp_path: Path) -> None:
    """Samples of two seeds in one file would be statistics of neither."""
    folders = [tmp_path / "first", tmp_path / "second"]
    for folder in folders:
        folder.mkdir()
    commands = [
        arguments(tiny, folder / "s.safetensors", 2, "--seed", str(seed))
        for seed, folder in enumerate(folders)
    ]
    with started_ranks(commands, 29577) as ranks:
        for process in ranks:
            _, errors = process.communicate(timeout=300)
            assert process.returncode == 1
            assert "rank 1 does another job than rank 0: --seed is 1 there and 0 on" in errors
    assert files_of(folders[0]) == files_of(folders[1]) == {}


@pytest.mark.slow
def test_bad_path_on_one_machine_ends_all(tiny: Tiny, tmp_path: Path) -> None:
    """The others must not wait for it until their own patience ends."""
    good = arguments(tiny, tmp_path / "s.safetensors", 2)
    bad = [str(tmp_path / "no.safetensors") if it == str(tiny.checkpoint) else it for it in good]
    with started_ranks([good, bad], 29579) as ranks:
        _, errors = ranks[0].communicate(timeout=300)
        assert ranks[0].returncode == 1
        assert "RankError: rank 1 of 2 ended before the others (InputError: " in errors
        assert "no.safetensors" in errors
    assert files_of(tmp_path) == {}


def children(process: int) -> dict[int, int]:
    """Return the processes that torchrun has started, by their ranks."""
    found = {}
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            parent = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
            environment = (folder / "environ").read_bytes().split(b"\0")
        except OSError:
            continue
        for entry in environment:
            if parent == process and entry.startswith(b"RANK="):
                found[int(entry[5:])] = int(folder.name)
    return found


@pytest.mark.slow
def test_lost_process_is_named_under_torchrun(tiny: Tiny, tmp_path: Path) -> None:
    """torchrun stops the others by SIGTERM; their last words must not be of an interruption."""
    command = arguments(tiny, tmp_path / "s.safetensors", 60, "--preset", "seed")
    launcher = ["torch.distributed.run", "--standalone", "--nproc-per-node", "3"]
    with started([*launcher, "-m", "hswq.fast", *command]) as process:
        wait_for(tmp_path, "s.hswq-work/sample-*", process)
        os.kill(children(process.pid)[1], signal.SIGKILL)
        _, errors = process.communicate(timeout=300)
    assert process.returncode == 1
    # torchrun shows the output of all.
    assert errors.count("rank 1 of 3 ended before the others") == 2
    assert list(tmp_path.glob("s.hswq-work/sample-*"))


@pytest.fixture
def rolls(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Roll]]:
    """Three processes' rolls at one store, which are heard of and called often."""
    monkeypatch.setattr(roll, "_BEAT_S", 0.05)
    monkeypatch.setattr(roll, "_ROLL_CALL_S", 3.0)
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    stores = [store, *(TCPStore("127.0.0.1", store.port) for _ in range(2))]
    found = [Roll(it, rank, 3, hosted=False) for rank, it in enumerate(stores)]
    yield found
    for one in found:
        one.stop()


def test_lost_process_is_named_by_all(rolls: list[Roll]) -> None:
    """One that gave up since another was lost must not be taken for the lost one."""
    rolls[1].stop()
    told = "rank 1 of 3 ended before the others"
    assert rolls[0].cause() == told
    rolls[0].leave(RankError(told))
    rolls[0].stop()
    assert rolls[2].cause() == told
    # Stopped by whoever started it.
    assert rolls[2].leave(KeyboardInterrupt()) == told


def test_first_error_is_told_by_all(rolls: list[Roll]) -> None:
    """The full disk of one machine is what the logs of all others should say."""
    assert rolls[2].leave(InputError("the disk is full")) == ""
    rolls[2].stop()
    told = "rank 2 of 3 ended before the others (InputError: the disk is full)"
    assert [rolls[0].cause(), rolls[1].cause()] == [told, told]


def test_interrupted_by_hand_is_no_loss(rolls: list[Roll]) -> None:
    """Ctrl-C reaches all, and none of them is to be looked after."""
    assert rolls[1].leave(KeyboardInterrupt()) == ""
    rolls[1].stop()
    assert rolls[0].leave(KeyboardInterrupt()) == ""
    assert rolls[2].cause() == "rank 1 of 3 was interrupted"


def test_store_gone_with_its_process() -> None:
    """Without torchrun the store is of rank 0; with it nobody may be blamed for its end."""

    class Gone:
        def __getattr__(self, name: str) -> object:
            raise RuntimeError("connection reset")

    assert Roll(Gone(), 1, 2, hosted=True).cause() == "rank 0 of 2 ended before the others"
    assert Roll(Gone(), 1, 2, hosted=False).cause() == ""


def test_copy_of_a_part_that_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A full disk leaves no half copies, and a file cut short is not filled up with zeros."""
    monkeypatch.setattr(torch.distributed, "broadcast", lambda *_, **__: None)
    part = tmp_path / "sample-00000"
    (tmp_path / "short").write_bytes(b"abc")
    with (
        pytest.raises(OSError, match="it ends 2 bytes early"),
        (tmp_path / "short").open("rb") as it,
    ):
        _read_into(it, memoryview(bytearray(5)))

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(InputError, match=r"sample-00000 cannot be copied .*: No space left"):
        Ranks(1, 2)._send_file(part, 0)
    assert [path.name for path in tmp_path.iterdir()] == ["short"]


@pytest.mark.parametrize("command", ["quantize", "plan"])
def test_other_commands_run_in_one_process(monkeypatch, capsys, command: str) -> None:
    """Four processes that write one file would each call it theirs."""
    monkeypatch.setenv("WORLD_SIZE", "4")
    monkeypatch.setenv("RANK", "1")
    output = ["--output", "o.safetensors"] if command == "quantize" else []
    assert main([command, "--input", "x.safetensors", *output]) == 2
    assert f"{command} runs in one process, and torchrun has started 4" in capsys.readouterr().err


def test_ranks_that_cannot_be_reached(tiny: Tiny, tmp_path: Path, monkeypatch) -> None:
    """A variable left over from another program must not end in a traceback."""
    for name, value in (("WORLD_SIZE", "2"), ("RANK", "1"), ("MASTER_PORT", "no")):
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("MASTER_ADDR", raising=False)
    with pytest.raises(RankError, match="rank 1 of 2 cannot join the others"):
        hswq.calibrate_checkpoint(
            tiny.checkpoint, tiny_calibration_config(tiny.pipeline), tmp_path / "s.safetensors"
        )


@pytest.mark.parametrize(("rank", "size"), [("abc", "2"), ("2", "2"), ("0", "")])
def test_environment_without_numbers(monkeypatch, capsys, rank: str, size: str) -> None:
    """A script's mistake is the user's to mend, and no internal error."""
    monkeypatch.setenv("RANK", rank)
    monkeypatch.setenv("WORLD_SIZE", size)
    assert main(["calibrate", "--input", "x.safetensors", "--output", "s.safetensors"]) == 2
    assert f"RANK={rank!r} and WORLD_SIZE={size!r}; numbers" in capsys.readouterr().err
