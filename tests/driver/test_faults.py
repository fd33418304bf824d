"""Disks that fill up, reads that fail, folders that vanish: an error, and nothing lost."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import hswq
from hswq.driver import bench_files, compensate, job, plan_checkpoint
from hswq.driver.work import WorkFolder
from hswq.errors import HswqError, InputError
from hswq.models import pipeline
from hswq.quality import images
from tests.tiny import Tiny, tiny_calibration_config

OLD = b"the file that was there before"
WRITES = ("posix_fallocate", "pwrite", "fsync", "replace", "link")


class Faults:
    """Lets the n-th of some calls of the os module fail, n counted over all of them."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self._patch = monkeypatch
        self.calls = 0

    def fail(self, names: tuple[str, ...], number: int, error: int) -> None:
        self.calls = 0
        for name in names:
            self._patch.setattr(os, name, self._failing(getattr(os, name), number, error))

    def mend(self) -> None:
        self._patch.undo()

    def _failing(self, call: Callable[..., Any], number: int, error: int) -> Callable[..., Any]:
        def run(*args: Any, **kwargs: Any) -> Any:
            self.calls += 1
            # A full disk stays full.
            if self.calls >= number and number:
                raise OSError(error, os.strerror(error))
            return call(*args, **kwargs)

        return run


@pytest.fixture
def faults(monkeypatch: pytest.MonkeyPatch) -> Iterator[Faults]:
    found = Faults(monkeypatch)
    yield found
    found.mend()


def spread(count: int, points: int) -> list[int]:
    """Return numbers of calls from the first to the last, the first and last few among them."""
    chosen = {1, 2, 3, count - 2, count - 1, count}
    chosen |= {1 + number * (count - 1) // points for number in range(points)}
    return sorted(number for number in chosen if 1 <= number <= count)


def try_out(
    folder: Path,
    faults: Faults,
    names: tuple[str, ...],
    error: int,
    points: int,
    run: Callable[[Path], Any],
) -> None:
    """Run with every fault of some, and check each time that nothing is lost or left over."""
    whole = folder / "whole"
    whole.mkdir()
    faults.fail(names, 0, error)
    run(whole)
    count = faults.calls
    faults.mend()
    expected = {path.name: path.read_bytes() for path in whole.iterdir()}
    assert count > 10
    for number in spread(count, points):
        place = folder / str(number)
        place.mkdir()
        for name in expected:
            (place / name).write_bytes(OLD)
        faults.fail(names, number, error)
        told = ""
        try:
            run(place)
        except HswqError as raised:
            told = str(raised)
        faults.mend()
        # The last call only makes sure that the folder's entry is on the disk.
        assert number == count or os.strerror(error) in told or "cannot be" in told, number
        for name, content in expected.items():
            assert (place / name).read_bytes() in (OLD, content), (number, name)
        assert not list(place.rglob("*.partial")), number
        # Mended, the same run ends as if nothing had been.
        run(place)
        assert {path.name: path.read_bytes() for path in place.iterdir()} == expected, number
        shutil.rmtree(place)


def test_disk_full_while_the_file_is_written(tiny: Tiny, tmp_path: Path, faults: Faults) -> None:
    """A 12-GB file that fails at its end must leave the older one and no remains."""
    config = tiny.config()
    try_out(
        *(tmp_path, faults, WRITES, errno.ENOSPC, 12),
        lambda place: hswq.quantize_checkpoint(tiny.checkpoint, place / "o.safetensors", config),
    )


def test_disk_full_while_another_container_is_written(
    tiny: Tiny, faults: Faults, tmp_path: Path
) -> None:
    """`convert` writes as carefully as `quantize`."""
    source = tmp_path / "source.safetensors"
    hswq.quantize_checkpoint(tiny.checkpoint, source, tiny.config())
    try_out(
        *(tmp_path, faults, WRITES, errno.ENOSPC, 6),
        lambda place: hswq.convert_checkpoint(source, place / "o.safetensors", "plain"),
    )


@pytest.mark.slow
def test_disk_full_while_parts_are_written(tiny: Tiny, tmp_path: Path, faults: Faults) -> None:
    """Statistics and codes of hours stay, and are gone on with when there is room again."""
    config = tiny_calibration_config(
        tiny.pipeline, preset="best", samples=2, calls=1, gram_memory="8MB"
    )
    try_out(
        *(tmp_path, faults, WRITES, errno.EDQUOT, 2),
        lambda place: hswq.calibrate_checkpoint(tiny.checkpoint, config, place / "s.safetensors"),
    )


def test_disk_that_cannot_be_read(tiny: Tiny, tmp_path: Path, faults: Faults) -> None:
    """A dying disk under the source is named, and no guess of its bytes is written."""
    config = tiny.config()
    try_out(
        *(tmp_path, faults, ("preadv",), errno.EIO, 8),
        lambda place: hswq.quantize_checkpoint(tiny.checkpoint, place / "o.safetensors", config),
    )


def test_text_parts_on_a_full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Notes of the work folder are files too."""

    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with WorkFolder(tmp_path / "s.safetensors") as work:
        monkeypatch.setattr(os, "fsync", full)
        with pytest.raises(InputError, match=r"job\.json does not fit on the disk: it needs "):
            work.agree({"--steps": 1})


@pytest.mark.parametrize("phase", ["calibrate", "quantize"])
def test_output_folder_removed(tiny: Tiny, tmp_path: Path, phase: str) -> None:
    """Somebody tidies up while the run goes on."""
    folder = tmp_path / "gone"
    folder.mkdir()
    config = hswq.QuantizeConfig(
        pipeline=str(tiny.pipeline), latent=8, steps=2, samples=2, preset="seed"
    )

    def remove(current: str, done: int, total: int) -> None:
        if current == phase:
            shutil.rmtree(folder, ignore_errors=True)

    with pytest.raises(InputError, match="its folder does not exist: create it"):
        hswq.quantize_checkpoint(tiny.checkpoint, folder / "o.safetensors", config, progress=remove)
    assert not folder.exists()


def test_permission_lost(tiny: Tiny, tmp_path: Path, faults: Faults) -> None:
    """A folder made read-only at the end of the run keeps its old file."""
    output = tmp_path / "o.safetensors"
    output.write_bytes(OLD)
    faults.fail(("replace",), 1, errno.EACCES)
    with pytest.raises(InputError, match="its folder is not writable: change the permissions"):
        hswq.quantize_checkpoint(tiny.checkpoint, output, tiny.config())
    assert output.read_bytes() == OLD
    assert [path.name for path in tmp_path.iterdir()] == [output.name]


def test_gpu_without_enough_memory(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Finished samples stay, and the error says what needs less memory."""

    def full(*_: object, **__: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    path = tmp_path / "s.safetensors"
    config = tiny_calibration_config(tiny.pipeline, rounding="compensated")
    monkeypatch.setattr(compensate, "round_weight", full)
    with pytest.raises(InputError, match=r"too little memory.*2\.00 GiB.*smaller --latent"):
        hswq.calibrate_checkpoint(tiny.checkpoint, config, path)
    assert list((tmp_path / "s.hswq-work").glob("sample-*"))
    assert not path.exists()


@pytest.mark.parametrize("command", ["calibrate", "plan", "bench"])
def test_gpu_full_while_models_load(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: str
) -> None:
    """The commonest fault of a small card is no internal error, and its cures are the command's."""
    options: dict[str, Any] = {"pipeline": str(tiny.pipeline), "latent": 8, "steps": 1}
    runs: dict[str, Callable[[], Any]] = {
        "calibrate": lambda: hswq.calibrate_checkpoint(
            tiny.checkpoint, hswq.CalibrationConfig(**options), tmp_path / "s.safetensors"
        ),
        "plan": lambda: plan_checkpoint(
            tiny.checkpoint, hswq.QuantizeConfig(**options, sequential_offload=True)
        ),
        "bench": lambda: bench_files(
            tiny.checkpoint, [], hswq.config.BenchConfig(**options, batch=4)
        ),
    }

    def full(*_: object, **__: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    monkeypatch.setattr(pipeline, "build_pipeline", full)
    with pytest.raises(InputError, match=r"too little memory.*2\.00 GiB") as raised:
        runs[command]()
    told = str(raised.value)
    assert ("--batch" in told) == (command == "bench")
    # `bench` has no such option, and this plan has used it.
    assert ("--sequential-offload" in told) == (command == "calibrate")
    # Of a plan nothing is kept, and parts made with another latent are of no use.
    kept = "of use with a smaller --gram-memory and --sequential-offload."
    assert (kept in told) == (command == "calibrate")
    assert "--latent" not in told.partition("What was finished")[2]


def test_gpu_full_without_sampling(tiny: Tiny, tmp_path: Path, monkeypatch) -> None:
    """With --stats the sampler's options are refused, and must not be the cure."""

    def full(*_: object, **__: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory.")

    monkeypatch.setattr(job, "search_amax", full)
    with pytest.raises(InputError, match=r"programs on it, or use --device cpu\.$"):
        hswq.quantize_checkpoint(tiny.checkpoint, tmp_path / "o.safetensors", tiny.config())


def test_batches_are_halved_where_memory_ends(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog
) -> None:
    """A batch that a smaller card cannot paint is painted in halves, to the same images."""
    output = tmp_path / "o.safetensors"
    hswq.quantize_checkpoint(tiny.checkpoint, output, tiny.config())
    joined = images._joined
    config = hswq.config.BenchConfig(
        pipeline=str(tiny.pipeline), samples=3, steps=1, latent=8, batch=3
    )
    whole = bench_files(tiny.checkpoint, [output], config)

    def limited(given: list[dict[str, Any]]) -> dict[str, Any]:
        if len(given) > 1:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return joined(given)

    monkeypatch.setattr(images, "_joined", limited)
    halved = bench_files(tiny.checkpoint, [output], config)
    assert "3 images are too many for the GPU: they are halved" in caplog.text
    torch.testing.assert_close(halved.exact.images, whole.exact.images)
