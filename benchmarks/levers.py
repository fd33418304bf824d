"""What the levers of `--preset best` cost on SDXL's full-width UNet.

    python -m benchmarks.levers impact                # 10.3 GB of random float32 weights
    python -m benchmarks.levers impact --width tiny   # a quick check of the script
    python -m benchmarks.levers compensate            # every shape once, the rest by their number

`impact` measures every eighth unit (--every) on one recorded call and compares the time with one
forward a unit.
`compensate` gathers, factorizes and rounds one layer of each shape, on inputs (patches of images
for convolutions) that are correlated as an autoregressive process, and adds up: a call's Gram
matrices, all factors, all roundings, without sweeps and with them. Layers with shared inputs share
matrix and factors. Factors take one thread each, several at a time in a calibration; calls under
classifier-free guidance give half as many rows again.
"""

from __future__ import annotations

import argparse
import math
import resource
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

import hswq
from benchmarks.cases import DTYPES, Pool, noise, sdxl_unet
from benchmarks.make_checkpoint import WIDTHS, configuration, filled_module
from benchmarks.monitor import layers_of, unet_inputs
from benchmarks.record import record
from benchmarks.timing import add_run_options, start_run, time_once
from hswq.calibration import Gram, Impact, gram_groups, gram_layers
from hswq.calibration.gram import ROWS_PER_CALL, GramLayer
from hswq.config import PRESETS
from hswq.formats.e4m3 import E4M3_MAX
from hswq.plan import measure_impact
from hswq.plan.impact import impact_options
from hswq.search.compensated import Factors, round_weight

SWEEPS = PRESETS["best"]["sweeps"]
# Correlation of neighbouring columns: activations of real models are far from independent.
_CORRELATION = 0.9


def peak_bytes() -> int:
    """Return the most memory that this process has held."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def time_impact(options: argparse.Namespace, run: dict[str, Any]) -> None:
    """Measure the impact of every layer on one call."""
    dtype = DTYPES[options.dtype]
    unet = filled_module("unet", options.width, dtype, options.seed).requires_grad_(False).eval()
    generator = torch.Generator().manual_seed(options.seed)
    inputs = unet_inputs(
        configuration("unet", options.width),
        options.batch,
        options.latent,
        lambda shape: torch.randn(shape, generator=generator).to(dtype),
    )
    with hswq.observe(unet, record=1) as calibration:
        unet(**inputs)
    forwards = [time_once(lambda: unet(**inputs)) for _ in range(options.rounds)]
    loaded = peak_bytes()
    config = hswq.CalibrationConfig(preset="seed", sensitivity="impact")
    layers = [name for name, part in unet.named_modules() if part in set(layers_of(unet))]
    measured = layers[:: options.every]
    # The others pass for measured.
    calibration.impact = Impact({}, impact_options(config.settled()), 1)
    calibration.impact.partial = dict.fromkeys(set(layers) - set(measured), (0.0,))
    started = time.perf_counter()
    measure_impact(unet, calibration, config)
    seconds = time.perf_counter() - started
    forwards += [time_once(lambda: unet(**inputs)) for _ in range(options.rounds)]
    forward = sorted(forwards)[len(forwards) // 2]
    record(
        {
            "op": "impact",
            "case": f"{options.width}, latent {options.latent}, batch {options.batch}, one call",
            "units": len(layers),
            "units_measured": len(measured),
            "dtype": options.dtype,
            **run,
            "seconds": round(seconds, 2),
            "forward_seconds": round(forward, 3),
            "of_one_forward_a_unit": round(seconds / len(measured) / forward, 3),
            "peak_bytes": peak_bytes(),
            "peak_bytes_before": loaded,
        }
    )


def autoregressive(rows: int, columns: int, seed: int) -> Tensor:
    """Return float32 [rows, columns], neighbouring columns correlated."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, columns, generator=generator)
    for column in range(1, columns):
        x[:, column].mul_(math.sqrt(1 - _CORRELATION**2)).add_(x[:, column - 1], alpha=_CORRELATION)
    return x


def seconds_of(work: Callable[[], Any]) -> tuple[float, Any]:
    """Return how long some work took, and its result."""
    started = time.perf_counter()
    result = work()
    return time.perf_counter() - started, result


def time_compensate(options: argparse.Namespace, run: dict[str, Any]) -> None:
    """Gather, factorize and round one layer of each shape of SDXL."""
    unet = sdxl_unet()
    shapes = {
        name: tuple(part.weight.shape)
        for name, part in unet.named_modules()
        if isinstance(part, nn.Linear | nn.Conv2d)
    }
    watched = gram_layers(unet, shared_inputs(unet))
    pool = Pool(noise(torch.float32, options.seed))
    costs: dict[int, tuple[float, float]] = {}
    rounding: dict[tuple[int, ...], tuple[float, float]] = {}
    totals = {"gram": 0.0, "factors": 0.0, "round": 0.0, "swept": 0.0}
    for layer in watched:
        if layer.columns not in costs or any(
            shapes[name] not in rounding for name in layer.sharing
        ):
            measured = _measure(layer, [shapes[name] for name in layer.sharing], pool, options.seed)
            costs.setdefault(layer.columns, measured[0])
            rounding |= {shape: s for shape, s in measured[1].items() if shape not in rounding}
        totals["gram"] += costs[layer.columns][0]
        totals["factors"] += costs[layer.columns][1]
        for name in layer.sharing:
            totals["round"] += rounding[shapes[name]][0]
            totals["swept"] += rounding[shapes[name]][1]
    gram_bytes = sum(layer.nbytes for layer in watched)
    record(
        {
            "op": "compensate",
            "case": "sdxl, one layer of each shape, the rest by their number",
            "layers": len(shapes),
            "gram_matrices": len(watched),
            "gram_bytes": gram_bytes,
            "groups_of_8GB": len(gram_groups(watched, 8_000_000_000)),
            "rows_per_call": ROWS_PER_CALL,
            **run,
            "gram_seconds_per_call": round(totals["gram"], 1),
            "factor_thread_seconds": round(totals["factors"], 1),
            "round_thread_seconds": round(totals["round"], 1),
            "round_and_sweep_thread_seconds": round(totals["swept"], 1),
            "sweeps": SWEEPS,
            "largest": {
                str(columns): [round(gram, 3), round(factors, 3)]
                for columns, (gram, factors) in sorted(costs.items())[-3:]
            },
            "peak_bytes": peak_bytes(),
        }
    )


def shared_inputs(unet: nn.Module) -> dict[str, str]:
    """Return for each layer the first one that gets its inputs."""
    first: dict[int, tuple[Tensor, str]] = {}
    found = {}
    hooks = []

    def hook(name: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        def watch(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            # The tensor is kept, so that its identity stays its own.
            found[name] = first.setdefault(id(inputs[0]), (inputs[0], name))[1]

        return watch

    for name, part in unet.named_modules():
        if isinstance(part, nn.Linear | nn.Conv2d):
            hooks.append(part.register_forward_pre_hook(hook(name)))
    config = configuration("unet", "sdxl")
    unet(**unet_inputs(config, 2, 32, lambda shape: torch.empty(shape, device="meta")))
    for handle in hooks:
        handle.remove()
    return found


def _measure(
    layer: GramLayer, shapes: list[tuple[int, ...]], pool: Pool, seed: int
) -> tuple[tuple[float, float], dict[tuple[int, ...], tuple[float, float]]]:
    width = layer.columns // layer.blocks
    matrix = torch.zeros(layer.blocks, width, width)
    kernel = shapes[0][2:]
    if math.prod(kernel) > 1:
        # Images with ROWS_PER_CALL positions, as the hooks give them to the kernel: padded.
        edge = math.isqrt(ROWS_PER_CALL)
        high, wide = (edge + size - 1 for size in kernel)
        x = autoregressive(high * wide, shapes[0][1], seed).T.reshape(1, -1, high, wide)
        gathering, count = seconds_of(lambda: hswq.kernels.gram(x, matrix, kernel_size=kernel))
        total = nn.functional.unfold(x, kernel).double().sum((0, 2))
    else:
        x = autoregressive(ROWS_PER_CALL, layer.columns, seed)
        gathering, count = seconds_of(lambda: hswq.kernels.gram(x, matrix))
        total = x.double().sum(0)
    gram = Gram(matrix, total, int(count))
    factorizing, factors = seconds_of(lambda: Factors(gram, centred=True, damping=0.01))
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    found = {}
    for shape in dict.fromkeys(shapes):
        weight = pool.take(shape).half()
        plain, swept = (
            seconds_of(lambda n=n, w=weight: round_weight(w, factors, E4M3_MAX, 1.0, sweeps=n))[0]
            for n in (0, SWEEPS)
        )
        found[shape] = plain, swept
    torch.set_num_threads(before)
    return (gathering, factorizing), found


def main() -> None:
    """Run one of the two measurements."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True)
    command = commands.add_parser("impact", help=time_impact.__doc__)
    command.set_defaults(measure=time_impact)
    command.add_argument("--dtype", choices=tuple(DTYPES), default="fp32")
    command.add_argument("--latent", type=int, default=16)
    command.add_argument("--batch", type=int, default=2)
    command.add_argument("--width", choices=WIDTHS, default="sdxl")
    command.add_argument("--every", type=int, default=8, help="measure every n-th unit")
    add_run_options(command, rounds=3)
    command = commands.add_parser("compensate", help=time_compensate.__doc__)
    command.set_defaults(measure=time_compensate)
    add_run_options(command)
    options = parser.parse_args()
    options.measure(options, start_run(options.threads))


if __name__ == "__main__":
    main()
