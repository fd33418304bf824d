"""Times of several sides in one interleaved run, and what a row says of them.

The machine changes its speed during a run. Therefore every round calls each side once, in turn
(A B C, B C A, ...), a ratio is the median over the rounds of the ratio within a round, and a first
round is not counted.
"""

from __future__ import annotations

import argparse
import gc
import os
import statistics
import time
from collections.abc import Callable, Iterable, Mapping
from typing import Any, TypeVar

import torch

from hswq.kernels import backend_report

Side = Callable[[], object]
Times = dict[str, list[float]]
_Item = TypeVar("_Item")


def add_run_options(parser: argparse.ArgumentParser, rounds: int | None = None) -> None:
    """Declare the options that every benchmark has; with rounds, --rounds too."""
    parser.add_argument("--threads", type=int, default=2, help="of torch and of hswq's kernels")
    if rounds is not None:
        parser.add_argument("--rounds", type=int, default=rounds, help="how often a side is timed")
    parser.add_argument("--seed", type=int, default=0)


def start_run(threads: int) -> dict[str, Any]:
    """Give all sides the same number of threads; return what rows say of the run.

    Raises:
        SystemExit: the extension is missing, or HSWQ_NUM_THREADS gives our side other threads.
    """
    if "HSWQ_NUM_THREADS" in os.environ:
        raise SystemExit("HSWQ_NUM_THREADS is set: unset it, both sides take --threads.")
    cpp = next(status for status in backend_report() if status.name == "cpp")
    if not cpp.usable:
        raise SystemExit(f"backend cpp cannot be measured: {cpp.reason}")
    torch.set_num_threads(threads)
    torch.set_grad_enabled(False)
    from hswq.kernels import _cpp

    return {"threads": threads, "isa": _cpp.active_isa()}


def backend_of(op: str) -> str:
    """Return the backend that runs an op on CPU tensors: the extension, or the reference for it."""
    cpp = next(status for status in backend_report() if status.name == "cpp")
    return "cpp" if op in cpp.native_ops else "reference"


def time_once(side: Side) -> float:
    """Return the seconds of one call; freeing its result is not counted."""
    start = time.perf_counter()
    result = side()
    seconds = time.perf_counter() - start
    del result
    return seconds


def in_turn(sides: Mapping[str, _Item], start: int) -> Iterable[tuple[str, _Item]]:
    """Return the sides in their order, beginning with number `start`."""
    items = list(sides.items())
    start %= len(items)
    return items[start:] + items[:start]


def interleave(sides: Mapping[str, Side], rounds: int) -> Times:
    """Time every side once a round, after one round that is not counted."""
    times: Times = {name: [] for name in sides}
    for side in sides.values():
        side()
    # The collector's pauses would fall on whichever side fills its threshold.
    gc.collect()
    gc.disable()
    try:
        for number in range(rounds):
            for name, side in in_turn(sides, number):
                times[name].append(time_once(side))
    finally:
        gc.enable()
    return times


def summary(times: Times, ratios: Iterable[tuple[str, str]]) -> dict[str, Any]:
    """Return a row's fields: medians in seconds, ratios of pairs of sides, number of rounds."""
    return {
        "rounds": len(next(iter(times.values()))),
        "median_s": {name: rounded(statistics.median(each)) for name, each in times.items()},
        "ratio": {f"{over}/{under}": ratio(times, over, under) for over, under in ratios},
    }


def ratio(times: Times, over: str, under: str) -> float:
    """Return the median over the rounds of the ratio of two sides."""
    pairs = zip(times[over], times[under], strict=True)
    return rounded(statistics.median(first / second for first, second in pairs))


def rounded(value: float) -> float:
    """Round to four significant digits: no clock here is better."""
    return float(f"{value:.4g}")
