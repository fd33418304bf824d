"""A disk that is really full: the kernel refuses, at each write of each command."""

from __future__ import annotations

import contextlib
import errno
import os
import resource
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import hswq
from hswq.errors import InputError
from tests.driver.test_faults import OLD, spread
from tests.tiny import Tiny, tiny_calibration_config

Run = Callable[[Path], Any]
SIZE = "24m"


class Disk:
    """A folder that gets full before the n-th write into it, and stays full until it is freed.

    Space cannot be reserved on it, as on network disks: what is reserved is there when it is
    written, and no write could fail.

    Args:
        path: the folder.
        limited: the size of files is limited instead, where the test may mount no disk.
    """

    def __init__(self, path: Path, monkeypatch: pytest.MonkeyPatch, *, limited: bool) -> None:
        self.path = path
        self.writes = 0
        self._full_at = 0
        self._limited = limited
        self._pwrite = os.pwrite
        monkeypatch.setattr(os, "pwrite", self._write)
        monkeypatch.setattr(os, "posix_fallocate", self._refuse)

    def fill_at(self, number: int) -> None:
        """Let the disk be full from the n-th write on; 0: never."""
        self.writes, self._full_at = 0, number

    def free(self) -> None:
        """Make room again."""
        self._full_at = 0
        (self.path / "filler").unlink(missing_ok=True)

    def _refuse(self, *_: Any) -> None:
        raise OSError(errno.EOPNOTSUPP, os.strerror(errno.EOPNOTSUPP))

    def _write(self, descriptor: int, data: Any, offset: int) -> int:
        self.writes += 1
        if not self._full_at or self.writes < self._full_at:
            return self._pwrite(descriptor, data, offset)
        if not self._limited:
            self._fill()
            return self._pwrite(descriptor, data, offset)
        limits = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (offset, limits[1]))
        try:
            return self._pwrite(descriptor, data, offset)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)

    def _fill(self) -> None:
        with (
            contextlib.suppress(OSError),
            (self.path / "filler").open("ab", buffering=0) as filler,
        ):
            while True:
                filler.write(bytes(4096))


@pytest.fixture(params=["mounted", "limited"])
def disk(
    request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Disk]:
    path = tmp_path / "disk"
    path.mkdir()
    if request.param == "limited":
        yield Disk(path, monkeypatch, limited=True)
        return
    command = ["mount", "-t", "tmpfs", "-o", f"size={SIZE}", "tmpfs", str(path)]
    mounted = subprocess.run(command, capture_output=True, text=True, check=False)
    if mounted.returncode:
        pytest.skip(f"no disk can be mounted here, sizes are limited: {mounted.stderr.strip()}")
    try:
        yield Disk(path, monkeypatch, limited=False)
    finally:
        subprocess.run(["umount", "--lazy", str(path)], check=True)


def try_out(disk: Disk, numbers: Callable[[int], list[int]], run: Run) -> None:
    """Fill the disk before some of the writes: an error, and nothing lost or left over."""
    place = disk.path / "place"
    place.mkdir()
    disk.fill_at(0)
    run(place)
    count = disk.writes
    expected = {path.name: path.read_bytes() for path in place.iterdir()}
    assert count > 2
    for number in numbers(count):
        shutil.rmtree(place)
        place.mkdir()
        for name in expected:
            (place / name).write_bytes(OLD)
        disk.fill_at(number)
        with pytest.raises(InputError, match=r"does not fit on the disk|No space left"):
            run(place)
        disk.free()
        for name, content in expected.items():
            # What was complete before the disk was full may stand: statistics beside their codes.
            assert (place / name).read_bytes() in (OLD, content), (number, name)
        assert OLD in [(place / name).read_bytes() for name in expected], number
        assert not list(disk.path.rglob("*.partial")), number
        run(place)
        assert {path.name: path.read_bytes() for path in place.iterdir()} == expected, number


@pytest.mark.slow
def test_quantize(tiny: Tiny, disk: Disk) -> None:
    """The output is gigabytes, and the disk of a rented machine is small."""
    try_out(
        disk,
        lambda count: spread(count, 3),
        lambda place: hswq.quantize_checkpoint(
            tiny.checkpoint, place / "o.safetensors", tiny.config()
        ),
    )


@pytest.mark.slow
def test_convert(tiny: Tiny, disk: Disk, tmp_path: Path) -> None:
    """The same for another container."""
    source = tmp_path / "source.safetensors"
    hswq.quantize_checkpoint(tiny.checkpoint, source, tiny.config())
    try_out(
        disk,
        lambda count: spread(count, 3),
        lambda place: hswq.convert_checkpoint(source, place / "o.safetensors", "plain"),
    )


@pytest.mark.slow
def test_calibrate(tiny: Tiny, disk: Disk) -> None:
    """Statistics and codes are what took hours."""
    config = tiny_calibration_config(tiny.pipeline, rounding="compensated")
    try_out(
        disk,
        lambda count: sorted({1, count // 2, count}),
        lambda place: hswq.calibrate_checkpoint(tiny.checkpoint, config, place / "s.safetensors"),
    )
