"""Signals to a real process: the first stops at a safe point, the second at once."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

import pytest

from tests.tiny import Tiny

NUMBERS = [signal.SIGINT, signal.SIGTERM]
FIRST = "stopping at the next safe point; once more to stop at once"

# Each prints "ready" to stderr when it is where signals are to reach it.
ROUNDING = """
import sys, threading
from hswq.driver.compensate import _Rounding
from hswq.fast.__main__ import main

def round_for_hours(*_):
    print("ready", file=sys.stderr)
    threading.Event().wait()

_Rounding._round_shared = round_for_hours
sys.exit(main(sys.argv[1:]))
"""
COMMAND = """
from hswq.fast import __main__ as fast

fast._COMMANDS["backends"] = lambda arguments: fast._with_bars(arguments, work)
sys.exit(fast.main(["backends", *sys.argv[1:]]))
"""
# Without the GIL, and without a look at signals: as gloo waits for another rank. The thread gets
# the GIL, and is ready, when the main thread is in C code.
WAITING = """
import ctypes, sys, threading

def work(progress):
    lock = ctypes.create_string_buffer(64)
    libc = ctypes.CDLL(None)
    libc.pthread_mutex_lock(lock)
    left = threading.Event()
    threading.Thread(target=lambda: left.wait() and print("ready", file=sys.stderr)).start()
    sys.setswitchinterval(100.0)
    left.set()
    libc.pthread_mutex_lock(lock)
"""
# As compensated rounding waits for its threads.
POOLED = """
import sys, threading
from concurrent.futures import ThreadPoolExecutor

def busy():
    print("ready", file=sys.stderr)
    threading.Event().wait()

def work(progress):
    with ThreadPoolExecutor(1) as pool:
        pool.submit(busy).result()
"""
# Bars, until the signal comes.
DRAWING = """
import sys

def work(progress):
    print("ready", file=sys.stderr)
    done = 0
    while True:
        done += 1
        progress("sample", done, 1 << 40)
"""
WRITING_PAST_THE_SAFE_POINT = """
import sys

def work(progress):
    print("ready", file=sys.stderr)
    try:
        while True:
            progress("sample", 1, 2)
    finally:
        while True:
            print("cleaning up", file=sys.stderr)
"""
# Another rank has stopped by the same Ctrl-C, and gloo says so before the next safe point.
DESERTED = """
import os, sys
from hswq.errors import RankError

def work(progress):
    print("ready", file=sys.stderr)
    os.kill(os.getpid(), 15)
    raise RankError("rank 1 of 2 ended before the others")
"""


@contextmanager
def started(script: str, *arguments: str) -> Iterator[subprocess.Popen[str]]:
    """Start a script, read its stderr up to "ready", and let it not outlive the test."""
    process = subprocess.Popen(
        [sys.executable, "-c", script, *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "2", "MKL_NUM_THREADS": "2"},
    )
    # What never comes would be waited for without an end.
    guard = threading.Timer(300, process.kill)
    guard.start()
    try:
        with process:
            try:
                assert process.stderr is not None
                read_until(process.stderr, "ready")
                yield process
            finally:
                process.kill()
    finally:
        guard.cancel()


def read_until(stream: IO[str], text: str) -> None:
    seen = []
    for line in stream:
        seen.append(line)
        if text in line:
            return
    raise AssertionError(f"{text!r} never came: {''.join(seen)}")


@pytest.mark.slow
def test_second_signal_ends_a_calibration_that_rounds(tiny: Tiny, tmp_path: Path) -> None:
    """Python waits for the threads of pools before it ends: minutes, with the largest layers."""
    output = tmp_path / "s.safetensors"
    output.write_bytes(b"the file that was there before")
    options = ["--preset", "best", "--samples", "1", "--steps", "1", "--latent", "8", "--quiet"]
    paths = ["--input", str(tiny.checkpoint), "--pipeline", str(tiny.pipeline)]
    command = ["calibrate", *paths, "--output", str(output), *options, "--calls", "1"]
    with started(ROUNDING, *command) as process:
        process.send_signal(signal.SIGINT)
        read_until(process.stderr, FIRST)
        process.send_signal(signal.SIGINT)
        assert process.wait(60) == 130
    assert output.read_bytes() == b"the file that was there before"
    assert list(tmp_path.glob("s.hswq-work/sample-*"))


@pytest.mark.parametrize("script", [WAITING, POOLED], ids=["C code", "pool"])
@pytest.mark.parametrize("number", NUMBERS)
def test_second_signal_ends_a_process_that_waits(number: signal.Signals, script: str) -> None:
    """Python runs no handler while C code waits for other ranks, and waits for pools as it ends:
    such a process ended by SIGKILL alone."""
    with started(script + COMMAND, "--quiet") as process:
        process.send_signal(number)
        read_until(process.stderr, FIRST)
        process.send_signal(number)
        assert process.wait(60) == 130


@pytest.mark.parametrize("quiet", [[], ["--quiet"]])
@pytest.mark.parametrize("number", NUMBERS)
def test_broken_pipe_does_not_change_the_exit_code(
    number: signal.Signals, quiet: list[str]
) -> None:
    """`2>&1 | tee log`: Ctrl-C ends tee as well, and whatever is printed then fails."""
    with started(DRAWING + COMMAND, *quiet) as process:
        process.stderr.close()
        process.send_signal(number)
        assert process.wait(60) == 130


def test_broken_pipe_at_cleaning_up_does_not_change_the_exit_code() -> None:
    """What is printed after the safe point, to a reader that is gone, is not the reason."""
    with started(WRITING_PAST_THE_SAFE_POINT + COMMAND, "--quiet") as process:
        process.send_signal(signal.SIGINT)
        read_until(process.stderr, "cleaning up")
        process.stderr.close()
        assert process.wait(60) == 130


def test_interrupted_run_says_what_is_always_true() -> None:
    """Interrupted after its file had taken its name, it must not say that nothing was written."""
    with started(DRAWING + COMMAND, "--quiet") as process:
        process.send_signal(signal.SIGINT)
        read_until(process.stderr, FIRST)
        read_until(process.stderr, "interrupted: under the output's name is the old file or the ")
        assert process.wait(60) == 130


def test_rank_that_others_have_left_was_interrupted_too() -> None:
    """All ranks get the signal: those that wait for one that has stopped have not failed."""
    with started(DESERTED + COMMAND, "--quiet") as process:
        read_until(process.stderr, "interrupted: rank 1 of 2 ended before the others")
        assert process.wait(60) == 130
