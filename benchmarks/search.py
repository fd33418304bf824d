"""Histogram and search over SDXL's 794 layers, against the maximum alone and the seed's algorithm.

    python -m benchmarks.search                # all layers; with the seed some minutes a round
    python -m benchmarks.search --layers 20    # every 20th layer
    python -m benchmarks.search --brute        # the seed's rounding by all distances as well

Every layer is searched as `quantize` searches it: one call of hswq.search.search_amax a layer. Each
timed call gets a weight of its own, which no cache holds. Layer by layer the sides take turns; a
round's time is their sum over the layers. Sides: `amax` is `w.abs().amax()`, `histogram` ours alone
with the default number of bins, `default` and `high` the presets, v1 and v2 unscaled and scaled.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from benchmarks import seed_algorithm
from benchmarks.cases import DTYPES, Pool, noise, sdxl_layers
from benchmarks.record import record
from benchmarks.timing import Times, add_run_options, in_turn, start_run, summary, time_once
from hswq import kernels
from hswq.config import SEARCH_PRESETS
from hswq.search import search_amax

MODES = {"v1": False, "v2": True}
Search = Callable[[Tensor, Tensor], object]


def ours(preset: str, scaled: bool) -> Search:
    """Return our search of one weight and its importance."""
    bins, candidates, refinements = SEARCH_PRESETS[preset]
    settings = {"bins": bins, "candidates": candidates, "refinements": refinements}
    return partial(search_amax, scaled=scaled, backend="cpp", **settings)


def of_seed(rounding: seed_algorithm.Rounding, scaled: bool) -> Search:
    """Return the seed's search of one weight and its importance, preset default."""
    bins, candidates, refinements = SEARCH_PRESETS["default"]
    settings = {"bins": bins, "candidates": candidates, "refinements": refinements}
    return partial(seed_algorithm.search_amax, scaled=scaled, rounding=rounding, **settings)


def all_sides(seed: bool, brute: bool) -> dict[str, Search]:
    """Return every side by name."""
    bins = SEARCH_PRESETS["default"][0]
    sides: dict[str, Search] = {
        "amax": lambda weight, importance: weight.abs().amax(),
        "histogram": lambda weight, importance: kernels.weighted_histogram(
            weight, importance, bins, backend="cpp"
        ),
    }
    for mode, scaled in MODES.items():
        for preset in SEARCH_PRESETS:
            sides[f"{preset}-{mode}"] = ours(preset, scaled)
        if seed:
            sides[f"seed-{mode}"] = of_seed(seed_algorithm.round_by_bisection, scaled)
        if brute:
            sides[f"seed-brute-{mode}"] = of_seed(seed_algorithm.round_by_distance, scaled)
    return sides


def main() -> None:
    """Time all layers in every round and record one row."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", type=int, default=1, metavar="N", help="take every N-th layer")
    parser.add_argument("--dtype", choices=tuple(DTYPES), default="fp16")
    parser.add_argument("--no-seed", action="store_true", help="leave out the seed's algorithm")
    parser.add_argument("--brute", action="store_true", help="add the seed's slower rounding")
    add_run_options(parser, rounds=3)
    options = parser.parse_args()
    run = start_run(options.threads)
    shapes = [layer.shape for layer in sdxl_layers()[:: options.layers]]
    pool = Pool(noise(DTYPES[options.dtype], options.seed))
    widest = max(shape[1] for shape in shapes)
    generator = torch.Generator().manual_seed(options.seed)
    importance = torch.rand(widest, generator=generator) + 0.01

    sides = all_sides(not options.no_seed, options.brute)
    for side in sides.values():
        side(pool.take(shapes[-1]), importance[: shapes[-1][1]])
    times: Times = {name: [0.0] * options.rounds for name in sides}
    for round_number in range(options.rounds):
        for number, shape in enumerate(shapes):
            for name, side in in_turn(sides, round_number + number):
                call = partial(side, pool.take(shape), importance[: shape[1]])
                times[name][round_number] += time_once(call)
    ratios = []
    for mode in MODES:
        ratios += [(f"default-{mode}", "amax"), (f"high-{mode}", f"default-{mode}")]
        seeds = (f"seed-{mode}", f"seed-brute-{mode}")
        ratios += [(seed, f"default-{mode}") for seed in seeds if seed in sides]
    record(
        {
            "op": "search",
            "case": "sdxl" if options.layers == 1 else f"sdxl, every layer of {options.layers}",
            "layers": len(shapes),
            "weights": sum(torch.Size(shape).numel() for shape in shapes),
            "dtype": options.dtype,
            "backend": "cpp",
            **run,
            **summary(times, ratios),
        }
    )


if __name__ == "__main__":
    main()
