"""Runs that are interrupted, and processes of the command line that tests start."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from tests.tiny import Tiny


def files_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def interrupt_at(wanted: str, count: int):
    """Return a progress that is interrupted at a report, and what it saw."""
    seen: list[str] = []

    def report(phase: str, done: int, total: int) -> None:
        seen.append(phase)
        if phase.startswith(wanted) and seen.count(phase) == count:
            raise KeyboardInterrupt

    return report, seen


def arguments(tiny: Tiny, output: Path, samples: int, *options: str) -> list[str]:
    sampling = ["--samples", str(samples), "--steps", "2", "--latent", "8", "--quiet"]
    paths = ["--input", str(tiny.checkpoint), "--pipeline", str(tiny.pipeline)]
    return ["calibrate", *paths, "--output", str(output), *sampling, *options]


@contextmanager
def started(
    command: list[str], *, stdout: bool = False, **environment: str
) -> Iterator[subprocess.Popen[str]]:
    """Start a process of the command line; it does not outlive the test.

    It has one thread, as torchrun gives it: several of more threads than cores wait for each other
    at every operation.
    """
    process = subprocess.Popen(
        [sys.executable, "-m", *command],
        stdout=subprocess.PIPE if stdout else None,
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
