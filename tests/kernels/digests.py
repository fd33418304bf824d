"""What every op returns for hard inputs, as hashes: one a case, so that a difference has a name.

As a program it prints the hashes of the C++ backend for several numbers of threads, since the
instruction set is chosen once per process.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
import sys
from collections.abc import Iterator

import torch
from torch import Tensor

from hswq import kernels
from hswq.formats.e4m3 import e4m3_magnitudes
from hswq.kernels import MonitorAccumulators, cpp_backend
from tests.kernels.cases import DTYPES, FLOAT32_MAX, SIXTEEN_BIT, all_patterns, generator, normal

Digests = dict[str, str]
THREADS = (1, 2, 3, 7, 200)
# A plain FP8 file, a common scale, no power of two, quotients that overflow, become subnormal or
# come from subnormal scales.
SCALES = (1.0, 0.07 / 448, 3.0, 2.0**-12, 1e30, 1e-38, 1e-40, 2.0**-149)
# More than any piece of work, and more than it takes for a table of codes to pay.
MANY = 5 * (1 << 16) + 77


def sha(*results: Tensor) -> str:
    """Hash the bits of tensors, all NaN being one."""
    state = hashlib.sha256()
    for result in results:
        plain = result.contiguous().reshape(-1)
        if plain.is_floating_point():
            plain = torch.where(plain.isnan(), torch.nan, plain)
        state.update(plain.view(torch.uint8).numpy().tobytes())
    return state.hexdigest()[:16]


def values_around_midpoints(scale: float) -> Tensor:
    """Return float32 whose quotients by the scale are the midpoints between codepoints, and near.

    Five neighbours on either side, since the rounded product need not be the tie itself.
    """
    magnitudes = e4m3_magnitudes()
    ties = torch.cat(((magnitudes[1:] + magnitudes[:-1]) / 2, magnitudes)) * scale
    bits = ties.float().view(torch.int32)[:, None] + torch.arange(-5, 6, dtype=torch.int32)
    values = bits.clamp(min=0).view(torch.float32).reshape(-1)
    return torch.cat((values, -values))


def random_scales(count: int, seed: int) -> Tensor:
    """Return positive finite float32 of any exponent, subnormals included."""
    bits = torch.randint(1, 0x7F800000, (count,), dtype=torch.int32, generator=generator(seed))
    return bits.view(torch.float32)


def exact(backend: str) -> Digests:
    """Hash the results of the ops whose every bit the contract fixes."""
    found: Digests = {}
    for scale in SCALES:
        for amax in (FLOAT32_MAX, 300.0 * min(scale, 1.0), 0.0):
            for dtype in SIXTEEN_BIT:
                patterns = all_patterns(dtype)
                found[f"quantize all {dtype} / {scale}, amax {amax}"] = sha(
                    kernels.quantize_e4m3(patterns, amax, scale, backend=backend)
                )
            found[f"quantize midpoints / {scale}, amax {amax}"] = sha(
                kernels.quantize_e4m3(values_around_midpoints(scale), amax, scale, backend=backend)
            )
    every_code = torch.arange(256, dtype=torch.uint8)
    for seed, dtype in enumerate(DTYPES):
        scales = random_scales(1200, seed)
        bits = torch.randint(-(1 << 31), 1 << 31, (1200, 251), generator=generator(seed + 10))
        rows = bits.int().view(torch.float32).to(dtype)
        found[f"quantize {dtype} by rows"] = sha(
            kernels.quantize_e4m3(rows, random_scales(1200, seed + 20), scales, backend=backend)
        )
        found[f"dequantize every code by rows to {dtype}"] = sha(
            kernels.dequantize_e4m3(every_code.expand(1200, 256), scales, dtype, backend=backend)
        )
        for scale in SCALES:
            found[f"dequantize many codes to {dtype} * {scale}"] = sha(
                kernels.dequantize_e4m3(every_code.repeat(200)[7:], scale, dtype, backend=backend)
            )
        many = all_patterns(dtype).repeat(6)[:MANY] if dtype in SIXTEEN_BIT else normal(MANY)
        found[f"quantize many {dtype}"] = sha(
            kernels.quantize_e4m3(many, 3.3, 0.0071, backend=backend)
        )
        found.update(search(dtype, seed, backend))
        found.update(rounded_rows(dtype, seed, backend))
        found.update(swept_codes(seed, backend))
    return found


def search(dtype: torch.dtype, seed: int, backend: str) -> Digests:
    found: Digests = {}
    w = normal(6, 107, 11, 35, sigma=0.02, dtype=dtype, seed=seed)
    importance = normal(2, 107, seed=seed + 10).abs()
    hists, largest = zip(
        kernels.weighted_histogram(w, importance, 4097, backend=backend),
        kernels.weighted_histogram(w, None, 4097, backend=backend),
        strict=True,
    )
    hist, max_abs = torch.stack(hists), torch.stack(largest)
    found[f"weighted_histogram {dtype}"] = sha(hist, max_abs)
    for scaled in (False, True):
        found[f"search_amax {dtype}, scaled {scaled}"] = sha(
            *kernels.search_amax(hist, max_abs, scaled, 100, 2, backend=backend)
        )
    if dtype in SIXTEEN_BIT:
        patterns = all_patterns(dtype)
        finite = patterns[patterns.isfinite()]
        found[f"weighted_histogram all {dtype}"] = sha(
            *kernels.weighted_histogram(finite, None, 8191, backend=backend)
        )
    return found


def rounded_rows(dtype: torch.dtype, seed: int, backend: str) -> Digests:
    """Round weights that span several blocks of rows and columns, cut at odd places."""
    w = normal(133, 271, sigma=0.02, dtype=dtype, seed=seed)
    upper = normal(271, 271, sigma=0.05, seed=seed + 1).double().triu()
    upper.diagonal().copy_(torch.linspace(0.7, 1.9, 271, dtype=torch.float64) / 3)
    order = torch.randperm(271, generator=generator(seed))
    scales = (1.7e-4, torch.rand(133, generator=generator(seed)) * 1e-3 + 1e-5)
    return {
        f"round_compensated {dtype}, {kind}": sha(
            kernels.round_compensated(w, upper, scale, order, backend=backend)
        )
        for kind, scale in zip(("one scale", "scales by rows"), scales, strict=True)
    }


def swept_codes(seed: int, backend: str) -> Digests:
    """Sweep over blocks of several sizes, cut at odd places."""
    found = {}
    for columns, lanes in ((64, 333), (37, 128)):
        second = normal(columns, columns, sigma=0.3, seed=seed)
        second = second + second.mT
        second.diagonal().copy_(torch.linspace(0.7, 1.9, columns))
        scale = torch.rand(lanes, generator=generator(seed)) * 1e-3 + 1e-4
        codes = kernels.quantize_e4m3(
            normal(columns, lanes, seed=seed + 1), 448.0, 1.0, backend=backend
        )
        slope = normal(columns, lanes, seed=seed + 2) * scale
        steps = kernels.sweep_codes(slope, codes, second, scale, backend=backend)
        found[f"sweep_codes {columns}x{lanes}, {seed}"] = sha(codes, slope, steps)
    return found


def sums(backend: str) -> Digests:
    """Hash the results of the ops that add in an order of the backend's choice."""
    return dict(_sums(backend))


def _sums(backend: str) -> Iterator[tuple[str, str]]:
    for seed, dtype in enumerate(DTYPES):
        w = normal(6, 107, 11, 35, sigma=0.02, dtype=dtype, seed=seed)
        yield f"moments {dtype}", sha(kernels.moments(w, backend=backend))
        for dim in (-3, -1):
            means = kernels.channel_abs_mean(w, dim, backend=backend)
            yield f"channel_abs_mean {dtype}, {dim}", sha(means)
            total = MonitorAccumulators.zeros(w.shape[dim])
            abs_mean = kernels.monitor(w, w, dim, total, backend=backend)
            kernels.monitor(w, -w, dim, total, abs_mean, backend=backend)
            parts = (total.calls, total.skipped, total.mean_y, total.mean_y2, total.abs_mean)
            yield f"monitor {dtype}, {dim}", sha(abs_mean, *parts)
        hist, max_abs = kernels.weighted_histogram(w, None, 4097, backend=backend)
        candidates = torch.linspace(0, 1.3, 77) * max_abs
        for scaled in (False, True):
            errors = kernels.clip_mse(hist, max_abs, candidates, scaled, backend=backend)
            yield f"clip_mse {dtype}, scaled {scaled}", sha(errors)
        yield from _products(dtype, backend)


def _products(dtype: torch.dtype, backend: str) -> Iterator[tuple[str, str]]:
    """Hash sums over several panels of rows and tiles of columns, cut at odd places."""
    linear = normal(1100, 3 * 143, dtype=dtype, seed=1)
    images = normal(2, 33, 31, 29, dtype=dtype, seed=2)
    geometry = {"kernel_size": (3, 2), "stride": (1, 2), "padding": (1, 3), "dilation": (2, 1)}
    for wide in (torch.float32, torch.float64):
        for blocks in (1, 3):
            accumulator = normal(blocks, 429 // blocks, 429 // blocks, seed=3).to(wide)
            kernels.gram(linear, accumulator, backend=backend)
            yield f"gram {dtype} in {wide}, {blocks} blocks", sha(accumulator)
            accumulator = normal(blocks, 198 // blocks, 198 // blocks, seed=4).to(wide)
            kernels.gram(images, accumulator, **geometry, backend=backend)
            yield f"gram of images {dtype} in {wide}, {blocks} blocks", sha(accumulator)


@functools.cache
def of_reference() -> Digests:
    """Return the hashes that every backend must give."""
    return exact("reference")


def main() -> None:
    found = {}
    for threads in THREADS:
        os.environ["HSWQ_NUM_THREADS"] = str(threads)
        found[str(threads)] = {"exact": exact("cpp"), "sums": sums("cpp")}
    json.dump({"isa": cpp_backend._cpp.active_isa(), "digests": found}, sys.stdout)


if __name__ == "__main__":
    main()
