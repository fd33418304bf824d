"""Time of histogram, search and rounding against the number of weights.

    python -m benchmarks.cost                     # 1 M to 1 G weights; 3.5 GB of memory
    python -m benchmarks.cost --plot docs/cost.svg  # draws this machine's latest rows

Weights are rows of 1,024 columns with an importance for each column; the sizes take turns. `search`
is hswq.search.search_amax (preset default, scaled), `quantize` is quantize_e4m3.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.cases import DTYPES, Pool, noise
from benchmarks.record import RESULTS, machine_name, record
from benchmarks.timing import Side, Times, add_run_options, interleave, rounded, start_run
from hswq import kernels
from hswq.quality.plots import pyplot, save
from hswq.search import search_amax

COLUMNS = 1024
SIZES = tuple(1 << power for power in (20, 22, 24, 26, 28, 30))
PHASES = ("search", "quantize")


def sides_of(weight: Tensor, importance: Tensor) -> dict[str, Side]:
    """Return the two phases of one weight."""
    found = search_amax(weight, importance, scaled=True, backend="cpp")
    return {
        "search": partial(search_amax, weight, importance, scaled=True, backend="cpp"),
        "quantize": partial(kernels.quantize_e4m3, weight, found.amax, found.scale, backend="cpp"),
    }


def measure(options: argparse.Namespace) -> None:
    """Time all sizes, in turn, and record a row for each."""
    run = start_run(options.threads)
    pool = Pool(noise(DTYPES[options.dtype], options.seed), numel=max(options.sizes))
    generator = torch.Generator().manual_seed(options.seed)
    importance = torch.rand(COLUMNS, generator=generator) + 0.01
    sides: dict[str, Side] = {}
    for size in options.sizes:
        weight = pool.take((size // COLUMNS, COLUMNS))
        for phase, side in sides_of(weight, importance).items():
            sides[f"{phase} {size}"] = side
    times = interleave(sides, options.rounds)
    for size in options.sizes:
        phases: Times = {phase: times[f"{phase} {size}"] for phase in PHASES}
        total = [sum(seconds) for seconds in zip(*phases.values(), strict=True)]
        median = statistics.median(total)
        record(
            {
                "op": "cost",
                "weights": size,
                "dtype": options.dtype,
                "backend": "cpp",
                **run,
                "rounds": options.rounds,
                "median_s": {
                    **{phase: rounded(statistics.median(each)) for phase, each in phases.items()},
                    "total": rounded(median),
                },
                "ns_per_weight": rounded(1e9 * median / size),
            }
        )


def latest_rows() -> list[dict[str, Any]]:
    """Return this machine's last row of every size, by size.

    Raises:
        SystemExit: there are not two of them.
    """
    path = RESULTS / f"{machine_name()}.jsonl"
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    rows = {row["weights"]: row for row in map(json.loads, lines) if row["op"] == "cost"}
    if len(rows) < 2:
        raise SystemExit(f"{path} has {len(rows)} sizes: run `python -m benchmarks.cost` first.")
    return [rows[size] for size in sorted(rows)]


def fitted_line(sizes: list[int], seconds: list[float]) -> tuple[float, float]:
    """Return slope and intercept of log seconds over log weights, by least squares."""
    slope, intercept = statistics.linear_regression(
        [math.log(size) for size in sizes], [math.log(value) for value in seconds]
    )
    return slope, intercept


def plot(path: Path) -> None:
    """Draw seconds against weights, both logarithmic, with the fitted line."""
    rows = latest_rows()
    sizes = [row["weights"] for row in rows]
    totals = [row["median_s"]["total"] for row in rows]
    slope, intercept = fitted_line(sizes, totals)
    figure, axes = pyplot().subplots(figsize=(6.4, 4.4), layout="constrained")
    for phase, marker in zip(PHASES, "sd", strict=True):
        axes.plot(sizes, [row["median_s"][phase] for row in rows], marker, ms=4, label=phase)
    axes.plot(sizes, totals, "o", color="black", label="both")
    line = [math.exp(intercept) * size**slope for size in sizes]
    axes.plot(sizes, line, color="black", lw=1, label=f"fit of both: slope {slope:.3f}")
    axes.set(xscale="log", yscale="log", xlabel="weights", ylabel="seconds")
    axes.set_title(f"{rows[0]['dtype']}, {rows[0]['threads']} threads, {machine_name()}", size=10)
    axes.grid(visible=True, which="major", alpha=0.3)
    axes.legend(frameon=False)
    save(figure, path, path.suffix[1:])


def main() -> None:
    """Measure, or plot what was measured."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--plot", type=Path, metavar="FILE", help="draw recorded rows instead")
    parser.add_argument("--sizes", type=int, nargs="+", default=list(SIZES), metavar="WEIGHTS")
    parser.add_argument("--dtype", choices=tuple(DTYPES), default="fp16")
    add_run_options(parser, rounds=9)
    options = parser.parse_args()
    if options.plot is not None:
        plot(options.plot)
    else:
        measure(options)


if __name__ == "__main__":
    main()
