"""Interrupted calibrations: kept parts, equal results, one run at a time."""

from __future__ import annotations

import json
import signal
from pathlib import Path

import pytest

import hswq
from hswq.calibration import SamplingRun
from hswq.driver.work import WorkFolder
from hswq.errors import InputError, Interrupted
from tests.driver.started import arguments, files_of, interrupt_at, started, wait_for
from tests.tiny import Tiny, tiny_calibration_config

BEST = {"preset": "best", "samples": 2, "calls": 2, "gram_memory": "8MB"}


@pytest.fixture(scope="module")
def whole(tiny: Tiny, tmp_path_factory) -> dict[str, bytes]:
    """Statistics and codes of a run that nobody interrupted, by name."""
    folder = tmp_path_factory.mktemp("whole")
    config = tiny_calibration_config(tiny.pipeline, **BEST)
    hswq.calibrate_checkpoint(tiny.checkpoint, config, folder / "s.safetensors")
    found = files_of(folder)
    assert sorted(found) == ["s.codes.safetensors", "s.safetensors"]
    return found


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


@pytest.mark.slow
def test_killed_runs_end_in_the_same_files() -> None:
    """SIGKILL at any time or call leaves no half file, and nothing that changes the next run's."""
    with started(["tests.driver.kill", "--points", "8", "--seed", "1"], stdout=True) as process:
        output, errors = process.communicate(timeout=1800)
    assert process.returncode == 0, errors
    assert json.loads(output)["kills"] >= 8
