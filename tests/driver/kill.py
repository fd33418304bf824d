"""Kill calibrations and quantizations with SIGKILL, start them again, and compare the files.

    python -m tests.driver.kill --points 200

Half of the points lie at random times of a run, half at random calls by which files are made,
written, renamed and removed: those take no time and would hardly ever be hit. After some kills
another option is tried first: it is refused, or is a run of its own. Every start is a fork of this
process, which has imported everything, so that the kills fall into the work.
"""

from __future__ import annotations

import argparse
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.record import print_row, record

OLD = b"the file that was there before"
# Calls that change what lies on the disk.
CALLS = ("open", "pwrite", "fsync", "replace", "rename", "link", "unlink", "rmdir", "mkdir")


class Harness:
    """A tiny checkpoint, and commands that read it and write files into a folder.

    Args:
        folder: for everything.
        seed: of the random points.
    """

    def __init__(self, folder: Path, seed: int) -> None:
        from tests.checkpoints import write_tiny_pipeline, write_tiny_sdxl

        self.random = random.Random(seed)
        checkpoint, pipeline = folder / "tiny.safetensors", folder / "pipeline"
        write_tiny_pipeline(pipeline)
        write_tiny_sdxl(checkpoint)
        self.output = folder / "out"
        given = ["--input", str(checkpoint), "--pipeline", str(pipeline), "--quiet"]
        sampling = ["--samples", "2", "--steps", "2", "--latent", "8", "--calls", "1"]
        sampling += ["--gram-memory", "8MB"]
        statistics, file = (str(self.output / name) for name in ("s.safetensors", "q.safetensors"))
        kept = str(folder / "kept.safetensors")
        self.commands = {
            "calibrate": ["calibrate", *given, *sampling, "--output", statistics],
            "quantize": ["quantize", *given, *sampling, "--output", file],
            "quantize --stats": ["quantize", *given, "--stats", kept, "--output", file],
        }
        # Another option of each, and what is written with it.
        self.changed = {
            "calibrate": [*self.commands["calibrate"], "--seed", "1"],
            "quantize": [*self.commands["quantize"], "--seed", "1"],
            "quantize --stats": [*self.commands["quantize --stats"], "--keep-ratio", "0.5"],
        }
        self.expected: dict[str, dict[str, bytes]] = {}
        self.otherwise: dict[str, dict[str, bytes]] = {}
        self.refused = 0
        self.seconds: dict[str, float] = {}
        self.calls: dict[str, int] = {}
        for name, command in self.commands.items():
            self._clear()
            begun = time.monotonic()
            assert self._wait(self._start(command)) == 0, f"{name} fails without any kill"
            self.seconds[name] = time.monotonic() - begun
            self.expected[name] = self._written()
            self._clear()
            self.calls[name] = self._count(command)
            if name == "calibrate":
                for path in self.expected[name]:
                    (folder / path.replace("s.", "kept.", 1)).write_bytes(self.expected[name][path])
            self._clear()
            assert self._wait(self._start(self.changed[name])) == 0
            self.otherwise[name] = self._written()
            assert self.otherwise[name] != self.expected[name]

    def kill(self, name: str, at_call: bool) -> int:
        """Kill a command once or more, let it end, and return the kills.

        Raises:
            AssertionError: a file is incomplete, or another than without kills, or one is left
                over.
        """
        self._clear()
        for path in self.expected[name]:
            (self.output / path).write_bytes(OLD)
        command, kills = self.commands[name], 0
        while kills == 0 or self.random.random() < 0.5:
            if at_call:
                number = self.random.randint(1, self.calls[name])
                status = self._wait(self._start(command, number))
            else:
                process = self._start(command)
                time.sleep(self.random.uniform(0.0, self.seconds[name]))
                os.kill(process, signal.SIGKILL)
                status = self._wait(process)
            if status == 0:
                break
            assert status == -signal.SIGKILL, status
            kills += 1
            for path, whole in self.expected[name].items():
                found = (self.output / path).read_bytes()
                known = (OLD, whole, self.otherwise[name].get(path))
                assert found in known, f"{name}: {path} is incomplete after a kill"
            if self.random.random() < 0.3:
                self._try_changed(name)
        assert self._wait(self._start(command)) == 0
        assert self._written() == self.expected[name], f"{name}: other files after {kills} kills"
        return kills

    def _try_changed(self, name: str) -> None:
        """Start with another option: it is refused, or writes what it writes in an empty folder."""
        before = {path: (self.output / path).read_bytes() for path in self.expected[name]}
        status = self._wait(self._start(self.changed[name]))
        if status == 0:
            assert self._written() == self.otherwise[name], f"{name}: parts of two runs are mixed"
            return
        assert status == 1, status
        self.refused += 1
        for path, content in before.items():
            assert (self.output / path).read_bytes() == content, f"{name}: {path} was refused"

    def _clear(self) -> None:
        shutil.rmtree(self.output, ignore_errors=True)
        self.output.mkdir()

    def _written(self) -> dict[str, bytes]:
        return {path.name: path.read_bytes() for path in sorted(self.output.iterdir())}

    def _start(self, command: list[str], at_call: int | None = None) -> int:
        def work() -> int:
            from hswq.fast.__main__ import main

            if at_call is not None:
                _count_calls(lambda number: number == at_call and _die())
            return main(command)

        return _fork(work)

    def _count(self, command: list[str]) -> int:
        """Return how many calls a run makes that change the disk."""
        path = self.output.parent / "calls"

        def work() -> int:
            from hswq.fast.__main__ import main

            last = [0]
            _count_calls(lambda number: last.__setitem__(0, number))
            code = main(command)
            path.write_text(str(last[0]))
            return code

        assert self._wait(_fork(work)) == 0
        return int(path.read_text())

    @staticmethod
    def _wait(process: int) -> int:
        return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])


def _fork(work: Callable[[], int]) -> int:
    process = os.fork()
    if process == 0:
        code = 70
        try:
            code = work()
        finally:
            sys.stderr.flush()
            os._exit(code)
    return process


def _die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def _count_calls(then: Callable[[int], Any]) -> None:
    """Call `then` with the number of each call that may change the disk, before it."""
    number = [0]

    def counted(call: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any, **kwargs: Any) -> Any:
            number[0] += 1
            then(number[0])
            return call(*args, **kwargs)

        return run

    for name in CALLS:
        setattr(os, name, counted(getattr(os, name)))


def main() -> None:
    """Kill at so many points, and print what was found as a line of JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--points", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--record", action="store_true", help="append it to benchmarks/results too")
    options = parser.parse_args()
    # Threads of the parent would not live on in its forks.
    os.environ["OMP_NUM_THREADS"] = "1"
    import torch

    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        harness = Harness(Path(folder), options.seed)
        found: dict[str, int] = {}
        while sum(found.values()) < options.points:
            for name in harness.commands:
                for at_call in (False, True):
                    what = f"{name}, at {'calls' if at_call else 'times'}"
                    found[what] = found.get(what, 0) + harness.kill(name, at_call)
            print(f"{sum(found.values())} of {options.points}", file=sys.stderr)
        told = {
            "op": "kill",
            "kills": sum(found.values()),
            "kills_by_point": found,
            "refused": harness.refused,
            "calls": harness.calls,
            "seed": options.seed,
        }
    (record if options.record else print_row)(told)


if __name__ == "__main__":
    main()
