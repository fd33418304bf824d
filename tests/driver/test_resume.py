"""Interrupted calibrations: kept parts, equal results, one run at a time."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest

import hswq
from hswq.calibration import SamplingRun
from hswq.driver.work import WorkFolder
from hswq.errors import InputError, Interrupted, RankError
from hswq.fast.__main__ import main
from tests.tiny import Tiny, tiny_calibration_config

BEST = {"preset": "best", "samples": 2, "calls": 2, "gram_memory": "8MB"}


def files_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


@pytest.fixture(scope="module")
def whole(tiny: Tiny, tmp_path_factory) -> dict[str, bytes]:
    """Statistics and codes of a run that nobody interrupted, by name."""
    folder = tmp_path_factory.mktemp("whole")
    config = tiny_calibration_config(tiny.pipeline, **BEST)
    hswq.calibrate_checkpoint(tiny.checkpoint, config, folder / "s.safetensors")
    found = files_of(folder)
    assert sorted(found) == ["s.codes.safetensors", "s.safetensors"]
    return found


def interrupt_at(wanted: str, count: int):
    """Return a progress that is interrupted at a report, and what it saw."""
    seen: list[str] = []

    def report(phase: str, done: int, total: int) -> None:
        seen.append(phase)
        if phase.startswith(wanted) and seen.count(phase) == count:
            raise KeyboardInterrupt

    return report, seen


@pytest.mark.parametrize(
    ("phase", "count", "again"),
    [
        # Two samples of two steps: the first is finished.
        ("calibrate", 3, {"calibrate": 2}),
        ("gram 2", 1, {"calibrate": 0}),
        ("round", 100, {"calibrate": 0}),
        ("impact", 10, {"calibrate": 0, "round": 0}),
    ],
)
def test_interrupted_run_goes_on(
    tiny: Tiny, whole: dict[str, bytes], tmp_path: Path, phase: str, count: int, again: dict
) -> None:
    """Hours of a rented GPU are not run twice, and the files are those of one run."""
    path = tmp_path / "s.safetensors"
    path.write_bytes(b"an older file")
    config = tiny_calibration_config(tiny.pipeline, **BEST)
    progress, _ = interrupt_at(phase, count)
    with pytest.raises(Interrupted, match=r"kept in .*s\.hswq-work; the same command goes on"):
        hswq.calibrate_checkpoint(tiny.checkpoint, config, path, progress=progress)
    assert path.read_bytes() == b"an older file"
    progress, seen = interrupt_at("never", 1)
    hswq.calibrate_checkpoint(tiny.checkpoint, config, path, progress=progress)
    assert files_of(tmp_path) == whole
    assert {name: seen.count(name) for name in again} == again


def test_quantize_goes_on_with_other_plans(tiny: Tiny, tmp_path: Path) -> None:
    """A budget chosen otherwise after an interruption needs no other calibration."""
    output = tmp_path / "out.safetensors"
    config = hswq.QuantizeConfig(
        pipeline=str(tiny.pipeline), latent=8, steps=2, samples=1, preset="seed"
    )
    progress, _ = interrupt_at("quantize", 2)
    with pytest.raises(Interrupted):
        hswq.quantize_checkpoint(tiny.checkpoint, output, config, progress=progress)
    assert [path.name for path in tmp_path.iterdir()] == ["out.hswq-work"]
    other = hswq.QuantizeConfig(
        pipeline=str(tiny.pipeline), latent=8, steps=2, samples=1, preset="seed", keep_bytes=0.5
    )
    progress, seen = interrupt_at("never", 1)
    hswq.quantize_checkpoint(tiny.checkpoint, output, other, progress=progress)
    assert "calibrate" not in seen
    assert [path.name for path in tmp_path.iterdir()] == [output.name]
    expected = tmp_path / "expected.safetensors"
    hswq.quantize_checkpoint(
        tiny.checkpoint, expected, tiny.config(keep_bytes=0.5, sensitivity="variance")
    )
    assert output.read_bytes() == expected.read_bytes()


def test_other_options_are_named(tiny: Tiny, tmp_path: Path) -> None:
    """Parts of two runs in one file would be statistics of neither."""
    path = tmp_path / "s.safetensors"
    progress, _ = interrupt_at("calibrate", 3)
    config = tiny_calibration_config(tiny.pipeline, samples=2)
    with pytest.raises(Interrupted):
        hswq.calibrate_checkpoint(tiny.checkpoint, config, path, progress=progress)
    kept = files_of(tmp_path / "s.hswq-work")
    other = tiny_calibration_config(tiny.pipeline, samples=2, steps=5, latent=16)
    with pytest.raises(InputError, match="--steps is 2 there and 5 here; --latent is 8 there"):
        hswq.calibrate_checkpoint(tiny.checkpoint, other, path)
    assert files_of(tmp_path / "s.hswq-work") == kept
    # Equal options, and another checkpoint under the name.
    job = tmp_path / "s.hswq-work" / "job.json"
    facts = json.loads(job.read_text())
    job.write_text(json.dumps({**facts, "checkpoint": "0" * 64}))
    with pytest.raises(InputError, match="other options: checkpoint is '000000"):
        hswq.calibrate_checkpoint(tiny.checkpoint, config, path)
    job.write_text("[")
    with pytest.raises(InputError, match=r"job\.json is damaged"):
        hswq.calibrate_checkpoint(tiny.checkpoint, config, path)


def test_run_of_nan_leaves_no_parts(tiny: Tiny, tmp_path: Path, monkeypatch) -> None:
    """The cure is another dtype, which parts of the old one must not stand in the way of."""
    monkeypatch.setattr(SamplingRun, "_sample", lambda *_: False)
    config = tiny_calibration_config(tiny.pipeline)
    with pytest.raises(InputError, match="all 1 samples ended in NaN or Inf"):
        hswq.calibrate_checkpoint(tiny.checkpoint, config, tmp_path / "s.safetensors")
    assert not list(tmp_path.iterdir())


def test_two_runs_with_one_output_are_refused(tmp_path: Path) -> None:
    """Each would overwrite the other's parts."""
    with (
        WorkFolder(tmp_path / "s.safetensors"),
        pytest.raises(InputError, match="another run with this output is under way"),
        WorkFolder(tmp_path / "s.safetensors"),
    ):
        pass
    assert not list(tmp_path.iterdir())


def test_failed_run_without_parts_leaves_nothing(tmp_path: Path) -> None:
    """A mistyped option must not litter the folder, and finished parts must stay."""

    def fail(part: bool) -> None:
        with WorkFolder(tmp_path / "s.safetensors") as work:
            work.agree({"--steps": 1})
            if part:
                (work.path / "sample-00000.safetensors").write_bytes(b"")
            raise ValueError("no")

    with pytest.raises(ValueError, match="no"):
        fail(part=False)
    assert not list(tmp_path.iterdir())
    with pytest.raises(ValueError, match="no"):
        fail(part=True)
    assert [path.name for path in tmp_path.iterdir()] == ["s.hswq-work"]


def arguments(tiny: Tiny, output: Path, samples: int, *options: str) -> list[str]:
    sampling = ["--samples", str(samples), "--steps", "2", "--latent", "8", "--quiet"]
    paths = ["--input", str(tiny.checkpoint), "--pipeline", str(tiny.pipeline)]
    return ["calibrate", *paths, "--output", str(output), *sampling, *options]


@contextmanager
def started(command: list[str], **environment: str) -> Iterator[subprocess.Popen[str]]:
    """Start a process of the command line; it does not outlive the test.

    It has one thread, as torchrun gives it: several of more threads than cores wait for each other
    at every operation.
    """
    process = subprocess.Popen(
        [sys.executable, "-m", *command],
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
    )
    with process:
        try:
            yield process
        finally:
            process.kill()


@contextmanager
def started_ranks(commands: list[list[str]], port: int) -> Iterator[list[subprocess.Popen[str]]]:
    """Start one process a command, which find each other without torchrun."""
    address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    with ExitStack() as stack:
        yield [
            stack.enter_context(
                started(
                    ["hswq.fast", *command],
                    **address,
                    WORLD_SIZE=str(len(commands)),
                    RANK=str(rank),
                    LOCAL_RANK=str(rank),
                )
            )
            for rank, command in enumerate(commands)
        ]


def wait_for(paths: Path, pattern: str, process: subprocess.Popen[str]) -> None:
    until = time.monotonic() + 300
    while not list(paths.glob(pattern)):
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < until
        time.sleep(0.02)


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signal_stops_where_it_is_safe(tiny: Tiny, tmp_path: Path, number: signal.Signals) -> None:
    """Ctrl-C in a run of hours: exit code 130, how to go on, and nothing half written."""
    path = tmp_path / "s.safetensors"
    command = arguments(tiny, path, 200, "--preset", "seed")
    with started(["hswq.fast", *command]) as process:
        wait_for(tmp_path, "s.hswq-work/sample-00001*", process)
        process.send_signal(number)
        _, errors = process.communicate(timeout=120)
    assert process.returncode == 130, errors
    assert "stopping at the next safe point" in errors
    assert f"kept in {tmp_path / 's.hswq-work'}; the same command goes on" in errors
    assert not path.exists()


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
