"""Time and memory of `quantize --stats` on a checkpoint, each run in a process of its own.

The baseline is what the job's input and output cost at least: the input is read with preadv into
one buffer while as many bytes as the output has are written to a new file in the same folder, whose
space is reserved first and which is synced at the end, as hswq does. A plain copy of the input is
timed beside it, and the start-up: a process that imports what `quantize --stats` imports. The runs
take turns, --rounds times. `over_io` is (seconds - start-up) / baseline, both of the same round.
Example, with a full-size random SDXL checkpoint (5.1 GB) and statistics from two sampler steps on a
small latent:

    python -m benchmarks.make_checkpoint big.safetensors --unet-only
    python -m benchmarks.make_embeddings --output embeddings.safetensors
    python -m hswq.fast calibrate --input big.safetensors --output stats.safetensors \
        --embeddings embeddings.safetensors --latent 16 --samples 1 --steps 2 --preset seed
    python -m benchmarks.quantize --input big.safetensors --stats stats.safetensors
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.record import record
from benchmarks.timing import rounded, time_once

VARIANTS = {
    "v1-comfy": [],
    "v2-comfy": ["--scaled"],
    "v2-hswq": ["--scaled", "--container", "hswq"],
}
IMPORTS = "import hswq.fast.__main__, hswq.driver, hswq.kernels.cpp_backend"
BUFFER_BYTES = 16 << 20


class Run(NamedTuple):
    """One process that ended.

    Attributes:
        seconds: wall time from start to end.
        peak_bytes: VmHWM, its largest resident memory; 0 where /proc does not tell.
        output: what it printed.
    """

    seconds: float
    peak_bytes: int
    output: str


def run_process(command: list[str]) -> Run:
    """Run a command and watch its memory.

    VmHWM is read as long as the process lives: what the system reports of an ended child counts the
    memory of the parent, from which it was forked.
    """
    start = time.perf_counter()
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        peaks = [0]
        watcher = threading.Thread(target=watch_peak, args=(process.pid, peaks))
        watcher.start()
        output, _ = process.communicate()
        seconds = time.perf_counter() - start
        watcher.join()
    if process.returncode:
        raise SystemExit(f"{' '.join(command)} ended with {process.returncode}")
    return Run(seconds, max(peaks), output)


def watch_peak(pid: int, peaks: list[int]) -> None:
    """Append VmHWM of a process until it is gone."""
    status = Path(f"/proc/{pid}/status")
    while True:
        try:
            found = re.search(r"^VmHWM:\s+(\d+) kB", status.read_text(), re.M)
        except OSError:
            return
        # A process that ended and was not waited for has no memory.
        if found is None:
            return
        peaks.append(int(found[1]) * 1024)
        time.sleep(0.02)


def move_bytes(source: Path, target: Path, output_bytes: int) -> tuple[float, float]:
    """Read a file and write another of `output_bytes`; return seconds without and with the sync."""
    buffer = memoryview(bytearray(BUFFER_BYTES))
    input_bytes = source.stat().st_size
    start = time.perf_counter()
    reader = os.open(source, os.O_RDONLY)
    writer = os.open(target, os.O_WRONLY | os.O_CREAT | os.O_EXCL)
    os.posix_fallocate(writer, 0, output_bytes)
    done = written = 0
    while done < input_bytes:
        done += os.preadv(reader, [buffer], done)
        due = output_bytes * done // input_bytes
        while written < due:
            part = buffer[: min(due - written, BUFFER_BYTES)]
            written += os.pwrite(writer, part, written)
    unsynced_s = time.perf_counter() - start
    os.fsync(writer)
    synced_s = time.perf_counter() - start
    os.close(reader)
    os.close(writer)
    return unsynced_s, synced_s


def median(values: list[float]) -> float:
    """Return the median, rounded."""
    return rounded(statistics.median(values))


class Variant:
    """The runs of one variant and of its baseline."""

    def __init__(self, name: str, command: list[str]) -> None:
        self.name = name
        self._command = command
        self._runs: list[Run] = []
        self._reports: list[dict[str, Any]] = []
        self._io: list[tuple[float, float]] = []

    def run(self, source: Path, target: Path) -> None:
        """Quantize once, then move as many bytes once."""
        os.sync()
        self._runs.append(run_process([*self._command, "--output", str(target)]))
        self._reports.append(json.loads(self._runs[-1].output))
        target.unlink()
        os.sync()
        self._io.append(move_bytes(source, target, self._reports[-1]["output_bytes"]))
        target.unlink()

    def row(self, startup: list[float]) -> dict[str, Any]:
        """Return what the runs say, given the seconds of start-up of each round."""
        report = self._reports[-1]
        rounds = list(zip(self._runs, startup, self._io, strict=True))
        phases = {
            name: median([each["seconds"].get(name, 0.0) for each in self._reports])
            for name in report["seconds"]
        }
        return {
            "case": self.name,
            "layers": report["layers"],
            "quantized": report["quantized"],
            "input_bytes": report["source_bytes"],
            "output_bytes": report["output_bytes"],
            "rounds": len(rounds),
            "median_s": {
                "wall": median([run.seconds for run in self._runs]),
                "startup": median(startup),
                "io": median([synced for _, synced in self._io]),
                "io_unsynced": median([unsynced for unsynced, _ in self._io]),
            },
            "ratio": {
                "over_io": median([(run.seconds - start) / io[1] for run, start, io in rounds]),
                "over_io_unsynced": median(
                    [(run.seconds - start) / io[0] for run, start, io in rounds]
                ),
            },
            "phases_s": phases,
            "vm_hwm_bytes": max(run.peak_bytes for run in self._runs),
            "reported_peak_bytes": max(each["peak_memory_bytes"] for each in self._reports),
        }


def main() -> None:
    """Run start-up, copy, every variant and its baseline in turn; record a row for each."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--input", required=True, type=Path)
    parser.add_argument("--stats", required=True, type=Path)
    parser.add_argument("--backend", choices=("reference", "cpp"), default="cpp")
    parser.add_argument("--variants", nargs="+", choices=tuple(VARIANTS), default=list(VARIANTS))
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    quantize = [
        *(sys.executable, "-m", "hswq.fast", "quantize", "--json", "--quiet"),
        *("--input", str(options.input), "--stats", str(options.stats)),
        *("--backend", options.backend),
    ]
    variants = [Variant(name, [*quantize, *VARIANTS[name]]) for name in options.variants]
    import_all = [sys.executable, "-c", IMPORTS]
    startup: list[Run] = []
    copies: list[float] = []
    # Into the system's cache, and the imports with it.
    run_process(import_all)
    with tempfile.TemporaryDirectory(dir=options.input.parent) as folder:
        target = Path(folder) / "output.safetensors"
        for _ in range(options.rounds):
            startup.append(run_process(import_all))
            os.sync()
            copies.append(time_once(partial(shutil.copyfile, options.input, target)))
            target.unlink()
            for variant in variants:
                variant.run(options.input, target)
    input_bytes = options.input.stat().st_size
    seconds = [run.seconds for run in startup]
    record({"op": "startup", "rounds": options.rounds, "median_s": {"wall": median(seconds)}})
    record(
        {
            "op": "copy",
            "input_bytes": input_bytes,
            "rounds": options.rounds,
            "median_s": {"wall": median(copies)},
        }
    )
    run = {"op": "quantize", "backend": options.backend, "device": "cpu", "cores": os.cpu_count()}
    for variant in variants:
        record({**run, **variant.row(seconds)})


if __name__ == "__main__":
    main()
