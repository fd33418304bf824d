"""Triton kernels of clip_mse and search_amax: the objective over all codepoints per candidate.

One program searches one layer, all its stages, so that the layers of a model take one launch and
nothing waits. Candidates are ranked with one visit per codepoint: suffix sums of H and H x tell
what each boundary between codepoints separates. Those that rank as well as the best, within the
error of ranks, are evaluated by the definition, whose order of additions is the contract's, and the
first of the least of these wins: the answer is that of evaluating all by the definition.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from hswq.kernels.triton_backend._configs import (
    SEARCH_SCALED,
    SEARCH_UNSCALED,
    Config,
    Kernel,
)
from hswq.kernels.triton_backend._launch import launch
from hswq.kernels.triton_backend._sums import tree_sum

_CODES = tl.constexpr(128)
_LAST_CODE = tl.constexpr(126)
_LARGEST = tl.constexpr(448.0)
_FLOAT32_MAX = tl.constexpr(3.4028234663852886e38)
_INFINITY = tl.constexpr(float("inf"))
_NAN = tl.constexpr(float("nan"))
_SMALLEST_NORMAL = tl.constexpr(2.0**-6)
_SUBNORMAL_STEP = tl.constexpr(2.0**-9)
_SUBNORMAL_STEPS = tl.constexpr(2.0**9)
# float64 has 49 mantissa bits more than E4M3.
_DROPPED = tl.constexpr((1 << 49) - 1)
_BELOW_HALF = tl.constexpr(((1 << 49) - 1) >> 1)
_ROUNDING_UNIT = tl.constexpr(2.0**-53)


@triton.jit
def magnitude_of(code):
    """float64 value of an int64 code 0 ... 127, as if 127 were a number."""
    exponent = tl.maximum(code >> 3, 1)
    power = ((exponent + (1023 - 10)) << 52).to(tl.float64, bitcast=True)
    digits = tl.where(code < 8, code, 8 + (code & 7))
    return digits.to(tl.float64) * power


@triton.jit
def ladder():
    """Midpoint above each code and step to the next one, float64 [128]; steps of 0 at the end."""
    code = tl.arange(0, _CODES).to(tl.int64)
    lower = magnitude_of(code)
    upper = magnitude_of(code + 1)
    inside = code < _LAST_CODE
    return (lower + upper) / 2, tl.where(inside, upper - lower, 0.0)


@triton.jit
def round_ties_down(value):
    """Nearest E4M3 magnitude of a float64 in 0 ... 448, ties to the smaller one."""
    bits = value.to(tl.int64, bitcast=True)
    normal = ((bits + _BELOW_HALF) & ~_DROPPED).to(tl.float64, bitcast=True)
    steps = value * _SUBNORMAL_STEPS
    # Small enough for an integer wherever it is used.
    whole = tl.minimum(steps, 8.0).to(tl.int32).to(tl.float64)
    subnormal = tl.where(steps - whole > 0.5, whole + 1.0, whole) * _SUBNORMAL_STEP
    return tl.where(value < _SMALLEST_NORMAL, subnormal, normal)


@triton.jit
def sum_above(hist_ptr, mass_ptr, moment_ptr, bins, width, BLOCK: tl.constexpr):
    """Store sums of H and of H x over the bins from each bin on, and return the sum of H x^2.

    mass and moment: float64 [bins + 1].
    """
    lanes = tl.arange(0, BLOCK)
    mass = tl.full([], 0.0, tl.float64)
    moment = tl.full([], 0.0, tl.float64)
    power = tl.full([], 0.0, tl.float64)
    tl.store(mass_ptr + bins, mass)
    tl.store(moment_ptr + bins, moment)
    chunks = tl.cdiv(bins, BLOCK)
    for number in range(0, chunks):
        b = (chunks - 1 - number) * BLOCK + lanes
        hist = tl.load(hist_ptr + b, mask=b < bins, other=0.0)
        centre = (b.to(tl.float64) + 0.5) * width
        product = hist * centre
        tl.store(mass_ptr + b, mass + tl.cumsum(hist, axis=0, reverse=True), mask=b < bins)
        tl.store(moment_ptr + b, moment + tl.cumsum(product, axis=0, reverse=True), mask=b < bins)
        mass += tl.sum(hist, axis=0)
        moment += tl.sum(product, axis=0)
        power += tl.sum(product * centre, axis=0)
    # Other threads read them.
    tl.debug_barrier()
    return power


@triton.jit
def rank(amax, mass_ptr, moment_ptr, bins, width, power, SCALED: tl.constexpr):
    """J of each threshold, from what lies above each boundary M_k between codepoints u m_k:

    J = sum H x^2 - 2 u sum step_k T1_k + 2 u^2 sum step_k midpoint_k T0_k,
    T0_k and T1_k the sums of H and H x over the bins with x > M_k = u midpoint_k, u = amax / 448
    or 1 (summation by parts).

    Args:
        amax: float64 [N].
    Returns:
        float64 [N], >= 0 or NaN.
    """
    midpoint, step = ladder()
    if SCALED:
        unit = amax / _LARGEST
        height = tl.zeros([amax.shape[0], _CODES], dtype=tl.float64) + step[None, :]
    else:
        unit = tl.full([amax.shape[0]], 1.0, tl.float64)
        height = tl.where(midpoint[None, :] < amax[:, None], step[None, :], 0.0)
    # The first bin whose centre lies above the boundary; comparisons with NaN are false.
    place = midpoint[None, :] * (unit / width)[:, None] + 0.5
    first = tl.where(place < bins.to(tl.float64), place, bins.to(tl.float64)).to(tl.int32)
    moment = tl.sum(height * tl.load(moment_ptr + first), axis=1)
    mass = tl.sum(height * midpoint[None, :] * tl.load(mass_ptr + first), axis=1)
    error = power - 2.0 * unit * moment + 2.0 * unit * unit * mass
    return tl.where(error < 0.0, 0.0, error)


@triton.jit
def evaluate(
    hist_ptr, terms_ptr, amax, bins, padded, width, SCALED: tl.constexpr, BLOCK: tl.constexpr
):
    """J of one threshold by its definition: every bin rounded, the sum that of hswq's tree_sum.

    Args:
        terms_ptr: float64 [padded], written; padded is a power of two, at least BLOCK and bins.
        amax: float64 scalar.
    """
    if SCALED:
        scale = _LARGEST / amax
        limit = tl.full([], 448.0, tl.float64)
    else:
        scale = tl.full([], 1.0, tl.float64)
        limit = tl.minimum(amax, _LARGEST)
    lanes = tl.arange(0, BLOCK)
    for start in range(0, padded, BLOCK):
        b = start + lanes
        hist = tl.load(hist_ptr + b, mask=b < bins, other=0.0)
        centre = (b.to(tl.float64) + 0.5) * width
        position = centre * scale
        clipped = tl.where(position < limit, position, limit)
        error = round_ties_down(clipped) / scale - centre
        tl.store(terms_ptr + b, tl.where(b < bins, hist * (error * error), 0.0))
    tl.debug_barrier()
    half = padded // 2
    while half >= BLOCK:
        for start in range(0, half, BLOCK):
            place = terms_ptr + start + lanes
            tl.store(place, tl.load(place) + tl.load(place + half))
        tl.debug_barrier()
        half = half // 2
    total = tree_sum(tl.load(terms_ptr + lanes)[None, :])
    # The next threshold's terms must not come before these were read.
    tl.debug_barrier()
    return tl.sum(total, axis=0)


# Not specialised for the place in memory either: another layout would add in another order.
@triton.jit(
    do_not_specialize=["bins", "padded", "candidates", "refinements"],
    do_not_specialize_on_alignment=["hists_ptr", "work_ptr"],
)
def search_amax_kernel(
    hists_ptr,
    max_abs_ptr,
    work_ptr,
    amax_ptr,
    mse_ptr,
    bins,
    padded,
    candidates,
    refinements,
    SCALED: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    layer = tl.program_id(0).to(tl.int64)
    hist_ptr = hists_ptr + layer * bins
    # float64: sums of H and H x above each bin, terms of J, ranks.
    mass_ptr = work_ptr + layer * (2 * (bins + 1) + padded + candidates)
    moment_ptr = mass_ptr + bins + 1
    terms_ptr = moment_ptr + bins + 1
    ranks_ptr = terms_ptr + padded
    largest = tl.load(max_abs_ptr + layer).to(tl.float64)
    width = largest / bins.to(tl.float64)
    power = sum_above(hist_ptr, mass_ptr, moment_ptr, bins, width, BLOCK)
    # A rank and a direct J of one threshold differ by at most 10 (bins + 160) 2^-53 power. In
    # units of e = 2^-53 and power P, with n bins: 2 u sum step T1 and 2 u^2 sum step midpoint T0
    # are at most 4 P each, all of their terms >= 0 and off by at most (n + 28) e of themselves in
    # any order of additions: 8 (n + 28) P. A bin within rounding of a boundary may be counted on
    # its other side: 72 P. P itself: (n + 3) P. The last additions: 18 P. The direct sum: 48 P.
    # In all (9 n + 365) e P. So whatever wins ranks within twice that of the best rank.
    reach = 20.0 * (bins.to(tl.float64) + 160.0) * _ROUNDING_UNIT * power

    midpoint, _ = ladder()
    lanes = tl.arange(0, BLOCK_N)
    code = tl.arange(0, _CODES)
    best_amax = tl.full([], _NAN, tl.float64)
    best_mse = tl.full([], _INFINITY, tl.float64)
    low = 0.5 * largest
    high = largest
    # Nothing to search where the maximum is 0 or not finite.
    stages = tl.where((largest > 0.0) & (largest < _INFINITY), refinements + 1, 0)
    for stage in range(0, stages):
        if stage > 0:
            quarter = (high - low) / 4.0
            low = tl.maximum(0.1 * largest, best_amax - quarter)
            high = tl.minimum(tl.minimum(1.2 * largest, best_amax + quarter), _FLOAT32_MAX)
        step = (high - low) / (candidates - 1).to(tl.float64)
        least = tl.full([], _INFINITY, tl.float64)
        for start in range(0, candidates, BLOCK_N):
            i = start + lanes
            amax = (low + i.to(tl.float64) * step).to(tl.float32).to(tl.float64)
            ranks = rank(amax, mass_ptr, moment_ptr, bins, width, power, SCALED)
            tl.store(ranks_ptr + i, ranks, mask=i < candidates)
            # Not tl.min: NaN must not hide the other ranks.
            ranks = tl.where((ranks < _INFINITY) & (i < candidates), ranks, _INFINITY)
            least = tl.minimum(least, tl.min(ranks, axis=0))
        tl.debug_barrier()
        evaluated = tl.full([], -1, tl.int32)
        for start in range(0, candidates, BLOCK_N):
            i = start + lanes
            ranks = tl.load(ranks_ptr + i, mask=i < candidates, other=_NAN)
            near = ranks <= least + reach
            place = tl.min(tl.where(near, i, candidates), axis=0)
            while place < candidates:
                amax32 = (low + place.to(tl.float64) * step).to(tl.float32)
                threshold = amax32.to(tl.float64)
                fresh = place >= 0
                if not SCALED:
                    # Thresholds that round to one codepoint have one J; the first of them wins.
                    below = (midpoint < threshold) & (code < _LAST_CODE)
                    codepoint = tl.sum(below.to(tl.int32), axis=0)
                    fresh = codepoint != evaluated
                    evaluated = codepoint
                if fresh:
                    mse = evaluate(
                        hist_ptr, terms_ptr, threshold, bins, padded, width, SCALED, BLOCK
                    )
                    better = mse < best_mse
                    best_amax = tl.where(better, threshold, best_amax)
                    best_mse = tl.where(better, mse, best_mse)
                place = tl.min(tl.where(near & (i > place), i, candidates), axis=0)
        # The ranks of the next stage take their place.
        tl.debug_barrier()
    # Only a histogram that holds NaN or infinity beats no candidate.
    found = best_mse < _INFINITY
    empty = largest == 0.0
    amax_found = tl.where(empty, 0.0, tl.where(found, best_amax, _NAN))
    tl.store(amax_ptr + layer, amax_found.to(tl.float32))
    tl.store(mse_ptr + layer, tl.where(empty, 0.0, tl.where(found, best_mse, _NAN)))


@triton.jit(
    do_not_specialize=["bins", "candidates"],
    do_not_specialize_on_alignment=["hist_ptr", "work_ptr", "candidates_ptr"],
)
def clip_mse_kernel(
    hist_ptr,
    max_abs_ptr,
    candidates_ptr,
    work_ptr,
    mse_ptr,
    bins,
    candidates,
    SCALED: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    # Each program makes the suffix sums for itself.
    mass_ptr = work_ptr + tl.program_id(0).to(tl.int64) * 2 * (bins + 1)
    moment_ptr = mass_ptr + bins + 1
    largest = tl.load(max_abs_ptr).to(tl.float64)
    width = largest / bins.to(tl.float64)
    power = sum_above(hist_ptr, mass_ptr, moment_ptr, bins, width, BLOCK)
    lanes = tl.arange(0, BLOCK_N)
    for start in range(tl.program_id(0) * BLOCK_N, candidates, tl.num_programs(0) * BLOCK_N):
        i = start + lanes
        amax = tl.load(candidates_ptr + i, mask=i < candidates, other=0.0).to(tl.float64)
        ranks = rank(amax, mass_ptr, moment_ptr, bins, width, power, SCALED)
        # The maximum is 0 or NaN: so is J.
        ranks = tl.where(largest > 0.0, ranks, largest)
        tl.store(mse_ptr + i, ranks, mask=i < candidates)


def padded_bins(bins: int, config: Config) -> int:
    """Return the number of terms of a direct sum: a power of two, at least a block."""
    return max(triton.next_power_of_2(bins), config.constants["BLOCK"])


def search_amax(
    hists: Tensor, max_abs: Tensor, scaled: bool, candidates: int, refinements: int
) -> tuple[Tensor, Tensor]:
    """Find the threshold of least J of every layer, all stages in one launch, without a wait.

    As hswq.kernels.search_amax says.

    Args:
        hists: float64 [L, bins], contiguous.
        max_abs: float32 [L], contiguous.
        scaled: True for V2, False for V1.
        candidates: thresholds a stage.
        refinements: further stages.
    Returns:
        amax float32 [L] and J float64 [L].
    Equals: hswq.kernels.reference.search_amax, bit for bit.
    Moves: 8 bytes a bin; a workspace of about 32 bytes a bin and layer stays in the caches.
    """
    layers, bins = hists.shape
    config = SEARCH_SCALED if scaled else SEARCH_UNSCALED
    padded = padded_bins(bins, config)
    size = layers * (2 * (bins + 1) + padded + candidates)
    work = torch.empty(size, dtype=torch.float64, device=hists.device)
    amax = torch.empty(layers, dtype=torch.float32, device=hists.device)
    mse = torch.empty(layers, dtype=torch.float64, device=hists.device)
    pointers = hists, max_abs, work, amax, mse
    sizes = bins, padded, candidates, refinements
    launch(search_amax_kernel, layers, hists.device, config, *pointers, *sizes)
    return amax, mse


def clip_mse(hist: Tensor, max_abs: Tensor, candidates: Tensor, scaled: bool) -> Tensor:
    """J of given thresholds, without a wait.

    As hswq.kernels.clip_mse says, by ranks: within 10 (bins + 160) 2^-53 sum H x^2.

    Args:
        hist: float64 [bins], contiguous.
        max_abs: float32 [].
        candidates: float32 [N], contiguous.
        scaled: True for V2, False for V1.
    Returns:
        float64 [N].
    Equals: hswq.kernels.reference.clip_mse, within the bound.
    Moves: 8 bytes a bin and program.
    """
    config = SEARCH_SCALED if scaled else SEARCH_UNSCALED
    # More would spend their time on suffix sums.
    programs = min(16, triton.cdiv(candidates.numel(), config.constants["BLOCK_N"]))
    work = torch.empty(
        programs * 2 * (hist.numel() + 1), dtype=torch.float64, device=candidates.device
    )
    mse = torch.empty(candidates.shape, dtype=torch.float64, device=candidates.device)
    pointers = hist, max_abs, candidates, work, mse
    sizes = hist.numel(), candidates.numel()
    launch(clip_mse_kernel, programs, candidates.device, config, *pointers, *sizes)
    return mse


KERNELS = (
    Kernel(
        search_amax_kernel,
        (
            {"hists_ptr": "*fp64", "max_abs_ptr": "*fp32:16", "work_ptr": "*fp64"}
            | {"amax_ptr": "*fp32:16", "mse_ptr": "*fp64:16"}
            | {"bins": "i32", "padded": "i32", "candidates": "i32", "refinements": "i32"},
        ),
        (SEARCH_SCALED, SEARCH_UNSCALED),
    ),
    Kernel(
        clip_mse_kernel,
        (
            {"hist_ptr": "*fp64", "max_abs_ptr": "*fp32:16", "candidates_ptr": "*fp32"}
            | {"work_ptr": "*fp64", "mse_ptr": "*fp64:16", "bins": "i32", "candidates": "i32"},
        ),
        (SEARCH_SCALED, SEARCH_UNSCALED),
    ),
)
