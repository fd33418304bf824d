"""Everything that only a GPU can tell: the contract's tests there, then timings.

    python -m benchmarks.gpu           # a CUDA or HIP GPU; under ten minutes
    python -m benchmarks.gpu --small   # anywhere: every part on a few numbers, in Triton's
                                       # interpreter where there is no GPU; no file is written
    python -m benchmarks.gpu --only search --only forward

Each part writes JSON lines to results/, one file a GPU. `share_of_copy` is the bandwidth of a
kernel, its reads and writes counted once, over that of a copy of the same number of bytes in the
same run. Times are medians of `--rounds` calls between two events; before each call a buffer larger
than any cache is overwritten. A part that fails says so in its line, and the script exits with 1.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

if "--small" in sys.argv:
    import torch

    if not torch.cuda.is_available():
        # Triton reads it when the kernels are imported.
        os.environ.setdefault("TRITON_INTERPRET", "1")

import torch
import triton
from torch import nn

from benchmarks import gpu_layers, seed_algorithm
from benchmarks.cases import DTYPES, Pool, noise, sdxl_layers
from benchmarks.gpu_bench import BACKEND, Bench, Row
from benchmarks.make_checkpoint import configuration, filled_module
from benchmarks.monitor import seed_hooks, unet_inputs
from benchmarks.record import RESULTS, commit_name
from benchmarks.timing import rounded
from hswq import kernels, observe
from hswq.config import SEARCH_PRESETS
from hswq.kernels import MonitorAccumulators
from hswq.kernels.contract import MAX_SWEPT
from hswq.search import Layer, search_layers

ROOT = Path(__file__).parents[1]


def share_row(bench: Bench, op: str, case: str, moved: int, side: Callable[[], object]) -> Row:
    """Time an op that moves so many bytes, and a copy that moves as many."""
    source = torch.empty(moved // 2, dtype=torch.uint8, device=bench.device).fill_(1)
    target = torch.empty_like(source)
    copy = bench.seconds(lambda: target.copy_(source))
    ours = bench.seconds(side)
    return {
        "op": op,
        "case": case,
        "moved_bytes": moved,
        "ms": rounded(ours * 1e3),
        "copy_ms": rounded(copy * 1e3),
        "copy_gb_s": rounded(moved / copy / 1e9),
        "share_of_copy": rounded(copy / ours),
    }


def tests(bench: Bench) -> Iterator[Row]:
    """Run the contract's tests with the real compiler, and those that need a GPU."""
    wanted = (
        "triton and test_scale_divides" if bench.small else "(triton or gpu) and not test_triton"
    )
    folders = ("tests/kernels", "tests/search", "tests/loader")
    begin = time.perf_counter()
    result = subprocess.run(
        [
            *(sys.executable, "-m", "pytest", *folders, "-q", "-k", wanted),
            *("--require-backends", BACKEND, "-p", "no:cacheprovider"),
        ],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    summary = result.stdout.strip().splitlines()[-1] if result.stdout.strip() else ""
    row = {"op": "tests", "summary": summary, "seconds": rounded(time.perf_counter() - begin)}
    if result.returncode:
        print(result.stdout[-20000:], result.stderr[-4000:], sep="\n", file=sys.stderr)
        row["error"] = "tests failed"
    yield row


def self_tests(bench: Bench) -> Iterator[Row]:
    """Run the self-test of every op: what a user's first call pays."""
    from hswq.kernels import triton_backend

    begin = time.perf_counter()
    results = triton_backend.self_test()
    failed = {op: text for op, text in results.items() if text != "passed"}
    row = {"op": "self_test", "ops": len(results), "seconds": rounded(time.perf_counter() - begin)}
    if failed:
        row["error"] = json.dumps(failed)
    yield row


def elementwise(bench: Bench) -> Iterator[Row]:
    """quantize_e4m3 and dequantize_e4m3 against a copy."""
    rows, columns = (8, 512) if bench.small else (10240, 16384)
    scale_of_rows = torch.full((rows,), 1e-4, device=bench.device)
    for name, dtype in DTYPES.items():
        w = bench.noise(rows, columns, dtype=dtype)
        moved = w.numel() * (w.element_size() + 1)
        for case, scale in (("one scale", 1e-4), ("a scale per row", scale_of_rows)):
            amax = scale * 448
            yield share_row(
                bench,
                "quantize_e4m3",
                f"{name} {rows}x{columns}, {case}",
                moved,
                lambda w=w, amax=amax, scale=scale: kernels.quantize_e4m3(
                    w, amax, scale, backend=BACKEND
                ),
            )
        codes = kernels.quantize_e4m3(w, 1.0, 1 / 448, backend=BACKEND)
        yield share_row(
            bench,
            "dequantize_e4m3",
            f"{name} {rows}x{columns}, one scale",
            moved,
            lambda codes=codes, dtype=dtype: kernels.dequantize_e4m3(
                codes, 1e-4, dtype, backend=BACKEND
            ),
        )


def monitor(bench: Bench) -> Iterator[Row]:
    """One hook call on large activations against a copy; the host's share of one on small ones."""
    size = (2, 16, 8) if bench.small else (2, 65536, 640)
    for name, dtype in DTYPES.items():
        tokens = bench.noise(*size, dtype=dtype, deviation=1.0)
        side = 4 if bench.small else 256
        image = bench.noise(size[0], size[2], side, side, dtype=dtype, deviation=1.0)
        last = image.contiguous(memory_format=torch.channels_last)
        for case, x, dim in (
            ("tokens", tokens, -1),
            ("images", image, -3),
            ("images, channels last", last, -3),
        ):
            sums = MonitorAccumulators.zeros(x.shape[dim], bench.device)
            # In memory of its own: programs of x and of y would bring each other into the cache.
            y = x.clone()
            yield share_row(
                bench,
                "monitor",
                f"{name} {case} {'x'.join(map(str, x.shape))}",
                2 * x.nbytes,
                lambda x=x, y=y, dim=dim, sums=sums: kernels.monitor(
                    x, y, dim, sums, backend=BACKEND
                ),
            )
    x = bench.noise(2, 77, 64, dtype=torch.float16)
    sums = MonitorAccumulators.zeros(64, bench.device)
    calls = 3 if bench.small else 2000
    kernels.monitor(x, x, -1, sums, backend=BACKEND)
    bench.wait()
    begin = time.perf_counter()
    for _ in range(calls):
        kernels.monitor(x, x, -1, sums, backend=BACKEND)
    bench.wait()
    each = (time.perf_counter() - begin) / calls
    yield {"op": "monitor", "case": "2x77x64, call after call", "us": rounded(each * 1e6)}


def histogram(bench: Bench) -> Iterator[Row]:
    """weighted_histogram of one weight over 64 MB against a copy of as many bytes."""
    shape = (16, 64, 3, 3) if bench.small else (2560, 2560, 3, 3)
    importance = torch.rand(shape[1]) + 0.01
    for name, dtype in DTYPES.items():
        w = bench.noise(*shape, dtype=dtype)
        yield share_row(
            bench,
            "weighted_histogram",
            f"{name} {'x'.join(map(str, shape))}",
            w.nbytes,
            lambda w=w: kernels.weighted_histogram(w, importance, 4096, backend=BACKEND),
        )


def search(bench: Bench) -> Iterator[Row]:
    """Histogram and search of all SDXL layers in one go, against the seed's algorithm."""
    every = 200 if bench.small else 1
    shapes = [layer.shape for layer in sdxl_layers()[::every]]
    if bench.small:
        shapes = [(min(shape[0], 16), min(shape[1], 16), *shape[2:]) for shape in shapes]
    for name in ("fp16", "bf16"):
        pool = Pool(noise(DTYPES[name], seed=0).to(bench.device))
        layers = [
            Layer(str(number), pool.take(shape), torch.rand(shape[1]) + 0.01, True)
            for number, shape in enumerate(shapes)
        ]
        for preset, (bins, candidates, refinements) in SEARCH_PRESETS.items():
            if bench.small and preset != "default":
                continue
            settings = {"bins": bins, "candidates": candidates, "refinements": refinements}
            begin = time.perf_counter()
            search_layers(layers, **settings, backend=BACKEND)
            first = time.perf_counter() - begin
            seconds = []
            for _ in range(bench.rounds):
                bench.wait()
                begin = time.perf_counter()
                search_layers(layers, **settings, backend=BACKEND)
                seconds.append(time.perf_counter() - begin)
            row: Row = {
                "op": "search",
                "case": f"sdxl {name}, {preset}",
                "layers": len(layers),
                "weights": sum(layer.weight.numel() for layer in layers),
                "ms": rounded(statistics.median(seconds) * 1e3),
                "first_ms": rounded(first * 1e3),
            }
            if preset == "default" and name == "fp16":
                row |= seed_search(bench, layers, settings, row["ms"])
            yield row


def seed_search(bench: Bench, layers: list[Layer], settings: dict[str, int], ours_ms: float) -> Row:
    """Time the seed's algorithm on some of the layers and scale it to all."""
    some = layers[:: len(layers)] if bench.small else layers[::100]
    bench.wait()
    begin = time.perf_counter()
    with torch.device(bench.device):
        for layer in some:
            seed_algorithm.search_amax(
                layer.weight,
                layer.importance.to(bench.device) if layer.importance is not None else None,
                scaled=True,
                rounding=seed_algorithm.round_by_bisection,
                **settings,
            )
    seconds = time.perf_counter() - begin
    # Its time is that of launches, which are as many for every layer.
    total = seconds * len(layers) / len(some)
    return {
        "seed_layers_timed": len(some),
        "seed_scaled_ms": rounded(total * 1e3),
        "ratio": {"seed/ours": rounded(total * 1e3 / ours_ms)},
    }


def rounding(bench: Bench) -> Iterator[Row]:
    """gram, round_compensated and sweep_codes of typical layers, against the reference in torch."""
    rows, columns = (8, 32) if bench.small else (1280, 2560)
    for name in ("fp16", "bf16"):
        x = bench.noise(2 * rows, columns, dtype=DTYPES[name], deviation=1.0)
        yield pair_row(
            bench,
            "gram",
            f"{name} {2 * rows}x{columns}",
            lambda backend, x=x: kernels.gram(
                x, torch.zeros(1, columns, columns, device=bench.device), backend=backend
            ),
        )
        w = bench.noise(rows, columns, dtype=DTYPES[name])
        upper = torch.randn(columns, columns, device=bench.device, dtype=torch.float64) / columns
        upper = upper.triu() + torch.eye(columns, device=bench.device, dtype=torch.float64)
        order = torch.arange(columns, device=bench.device)
        yield pair_row(
            bench,
            "round_compensated",
            f"{name} {rows}x{columns}",
            lambda backend, w=w, upper=upper, order=order: kernels.round_compensated(
                w, upper, 1e-4, order, backend=backend
            ),
        )
    # One of the blocks of a sweep; its steps reach the other columns by a product of torch's own.
    block = min(columns, MAX_SWEPT)
    slope = bench.noise(block, rows, dtype=torch.float32)
    codes = torch.zeros(block, rows, dtype=torch.uint8, device=bench.device)
    second = torch.eye(block, device=bench.device)
    yield pair_row(
        bench,
        "sweep_codes",
        f"{block}x{rows}",
        lambda backend: kernels.sweep_codes(slope, codes, second, 1e-4, backend=backend),
    )


def pair_row(bench: Bench, op: str, case: str, side: Callable[[str], object]) -> Row:
    """Time an op on our kernels and on the reference."""
    once = bench._replace(rounds=min(bench.rounds, 3))
    ours, reference = (
        once.seconds(lambda name=name: side(name)) for name in (BACKEND, "reference")
    )
    return {
        "op": op,
        "case": case,
        "ms": rounded(ours * 1e3),
        "reference_ms": rounded(reference * 1e3),
        "ratio": {"reference/ours": rounded(reference / ours)},
    }


def forward(bench: Bench) -> Iterator[Row]:
    """A forward of SDXL's UNet with hooks and without, in turn; eager, and as a CUDA graph."""
    width, latent = ("tiny", 8) if bench.small else ("sdxl", 128)
    dtype = torch.float32 if bench.small else torch.float16
    unet = filled_module("unet", width, dtype, seed=0).requires_grad_(False).eval()
    unet = unet.to(bench.device)
    inputs = unet_inputs(
        configuration("unet", width),
        2,
        latent,
        lambda shape: torch.randn(shape, device=bench.device).to(dtype),
    )
    case = f"{width} {dtype}, latent {latent}, batch 2".replace("torch.", "")
    yield {"op": "observe", "case": f"{case}, eager", **eager_forward(bench, unet, inputs)}
    if bench.device.type == "cuda":
        yield {"op": "observe", "case": f"{case}, graph", **graph_forward(bench, unet, inputs)}


def eager_forward(bench: Bench, unet: nn.Module, inputs: dict[str, Any]) -> Row:
    """Time forwards as every loop in Python runs them."""
    rounds = 1 if bench.small else 7
    times: dict[str, list[float]] = {"unhooked": [], "ours": [], "seed": []}
    for _ in range(rounds):
        for side in times:
            with ExitStack() as stack:
                if side == "ours":
                    stack.enter_context(observe(unet, backend=BACKEND))
                elif side == "seed":
                    seed_hooks(unet, stack)
                if not bench.small:
                    # The first call of a set of hooks makes its sums.
                    unet(**inputs)
                bench.wait()
                begin = time.perf_counter()
                unet(**inputs)
                bench.wait()
                times[side].append(time.perf_counter() - begin)
    return overhead_row(times)


def graph_forward(bench: Bench, unet: nn.Module, inputs: dict[str, Any]) -> Row:
    """Time replays of a captured forward: what the kernels take where the host is no limit."""
    times: dict[str, list[float]] = {}
    for side in ("unhooked", "ours"):
        watching = observe(unet, backend=BACKEND) if side == "ours" else None
        calibration = watching.__enter__() if watching else None
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            unet(**inputs)
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            unet(**inputs)
        times[side] = [bench._replace(rounds=7).seconds(graph.replay)]
        if watching and calibration is not None:
            watching.__exit__(None, None, None)
            # Random weights may overflow float16, and such calls are skipped.
            calls = {layer.calls + layer.skipped for layer in calibration.modules.values()}
            # The warm-up, the replay that is not counted and seven that are.
            if calls != {9}:
                raise RuntimeError(f"replays counted {calls} calls of the layers, not 9")
    return overhead_row(times)


def overhead_row(times: dict[str, list[float]]) -> Row:
    medians = {side: statistics.median(each) for side, each in times.items()}
    return {
        "median_ms": {side: rounded(value * 1e3) for side, value in medians.items()},
        "overhead_percent": {
            side: round(100 * (value / medians["unhooked"] - 1), 2)
            for side, value in medians.items()
            if side != "unhooked"
        },
    }


PARTS: dict[str, Callable[[Bench], Iterator[Row]]] = {
    part.__name__: part
    for part in (
        *(tests, self_tests, elementwise, monitor, histogram, search, rounding, forward),
        *(gpu_layers.products, gpu_layers.convolutions, gpu_layers.steps),
    )
}


def device_name(device: torch.device) -> str:
    """Return the GPU's name, or the processor's."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine()


def main() -> None:
    """Run the parts and write their rows."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--small", action="store_true", help="few numbers; writes no file")
    parser.add_argument("--only", action="append", choices=PARTS, help="a part; may be repeated")
    parser.add_argument("--rounds", type=int, default=None, help="calls a median is taken of")
    options = parser.parse_args()
    on_gpu = torch.cuda.is_available()
    if not (on_gpu or options.small):
        sys.exit("torch finds no CUDA or HIP device: use --small to see that the script works.")
    device = torch.device("cuda", torch.cuda.current_device()) if on_gpu else torch.device("cpu")
    torch.manual_seed(0)
    torch.set_grad_enabled(False)
    flush = torch.empty((1 << 10) if options.small else (512 << 20), dtype=torch.int8)
    rounds = options.rounds or (1 if options.small else 20)
    bench = Bench(device, options.small, rounds, flush.to(device))
    name = device_name(device)
    common = {"gpu": name, "commit": commit_name()}
    common |= {"torch": torch.__version__, "triton": triton.__version__}
    file = RESULTS / f"{name.lower().replace(' ', '-')}.jsonl"
    failed = False
    for part in options.only or PARTS:
        try:
            for row in PARTS[part](bench):
                failed |= "error" in row
                write({**row, **common}, None if options.small else file)
        except Exception:
            # The other parts can still tell something.
            failed = True
            error = {"op": part, "error": traceback.format_exc()}
            write({**error, **common}, None if options.small else file)
    sys.exit(1 if failed else 0)


def write(row: Row, file: Path | None) -> None:
    """Print a row and append it to a file, at once: a run that is cut off keeps what it has."""
    line = json.dumps(row)
    print(line, flush=True)
    if file is not None:
        with open(file, "a", encoding="utf-8") as output:
            output.write(line + "\n")


if __name__ == "__main__":
    main()
