"""Time of `calibrate` against the number of torchrun's processes, and whether the files are equal.

    python -m benchmarks.processes                                  # the demo checkpoint; minutes
    python -m benchmarks.processes --processes 1 2 4 --samples 32 --steps 25

Every process has one thread, as torchrun gives it, so that the arithmetic is the same and only the
number of processes differs: on a machine with fewer cores than processes the time does not fall any
further. The seconds are those of the whole command; torchrun's own start-up is timed beside it
with `--help`; `calibration` holds what is left, every process's imports among it, with the ratios
of one process to so many. Statistics and codes of every number must be those of one process, byte
for byte.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import subprocess
import sys
import tempfile
from functools import partial
from pathlib import Path

from benchmarks.record import record
from benchmarks.timing import Times, in_turn, summary, time_once
from hswq.driver.demo import demo_folder


def command(processes: int, words: list[str]) -> list[str]:
    """Return the command line of a run in so many processes."""
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    return [sys.executable, *launcher, "-m", "hswq.fast", "calibrate", *words]


def start(words: list[str]) -> None:
    """Run a command to its end, each of its processes on one thread.

    Raises:
        CalledProcessError: it fails.
    """
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    subprocess.run(words, check=True, stdout=subprocess.DEVNULL, env=environment)


def digests(folder: Path) -> dict[str, str]:
    """Return the SHA-256 of every file of a folder by name."""
    return {it.name: hashlib.sha256(it.read_bytes()).hexdigest() for it in folder.iterdir()}


def main() -> None:
    """Time every number of processes in turn and record one row."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--samples", type=int, default=8)
    parser.add_argument("--steps", type=int, default=10)
    options = parser.parse_args()
    demo = demo_folder()
    sampling = ["--samples", str(options.samples), "--steps", str(options.steps), "--latent", "16"]
    given = ["--input", str(demo / "demo.safetensors"), "--pipeline", str(demo), "--quiet"]
    given += ["--calib-file", str(demo / "prompts.txt"), *sampling]

    names = {str(count): count for count in options.processes}
    one = next(iter(names))
    runs: Times = {name: [0.0] * options.rounds for name in names}
    startups: Times = {name: [0.0] * options.rounds for name in names}
    first: dict[str, str] = {}
    for number in range(options.rounds):
        for name, count in in_turn(names, number):
            startups[name][number] = time_once(partial(start, command(count, ["--help"])))
            with tempfile.TemporaryDirectory() as folder:
                words = [*given, "--output", str(Path(folder, "s.safetensors"))]
                runs[name][number] = time_once(partial(start, command(count, words)))
                found = digests(Path(folder))
            first = first or found
            if found != first:
                raise SystemExit(f"{count} processes give other files: {found}, not {first}")
    left = {
        name: [run - begun for run, begun in zip(runs[name], startups[name], strict=True)]
        for name in names
    }
    record(
        {
            "op": "processes",
            "case": f"demo, preset best, {options.samples} samples of {options.steps} steps",
            "cores": os.cpu_count(),
            "rounds": options.rounds,
            "median_s": summary(runs, [])["median_s"],
            "startup_s": summary(startups, [])["median_s"],
            "calibration": summary(left, [(one, name) for name in names if name != one]),
            "equal_files": sorted(first),
        }
    )


if __name__ == "__main__":
    main()
