"""The launch table of every Triton kernel, and what the ahead-of-time compiler needs to know.

A configuration changes how fast a kernel runs and never what it writes. Element-wise kernels
see a tensor as `rows` rows of `columns` elements, one scale a row; a tensor with a single scale
is one row.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from hswq.kernels.contract import MAX_SWEPT


@dataclass(frozen=True)
class Config:
    """How one kernel is launched.

    Attributes:
        name: key of the configuration in benchmark results.
        constants: compile-time values by parameter name.
        num_warps: warps a program (32 threads each on CUDA, 64 on HIP).
    """

    name: str
    constants: Mapping[str, int]
    num_warps: int


@dataclass(frozen=True)
class Kernel:
    """One jit function with everything it can be launched with.

    Attributes:
        function: what triton.jit returned.
        signatures: argument types by parameter name, without the compile-time values, in the
            notation of Triton's ahead-of-time compiler: '*fp16:16' is a pointer to float16
            aligned to 16 bytes, 'i32:16' an int32 divisible by 16, 'i32:1' the constant 1.
        configs: every configuration the launcher may choose.
        least_capability: for NVIDIA's GPUs from this compute capability on only; 0 for all GPUs.
    """

    function: Any
    signatures: tuple[Mapping[str, str], ...]
    configs: tuple[Config, ...]
    least_capability: int = 0


# 16 codes a thread: a 16-byte store, and one 16-byte load (codes in) or two (float16 in). Four
# warps keep blocks small, so that the tail of the grid wastes little.
LONG_ROWS = Config("long_rows", {"BLOCK_R": 1, "BLOCK_C": 2048}, num_warps=4)
# The same number of elements over several rows: a row of 320 weights alone would leave most
# threads of a long block without work.
SHORT_ROWS = Config("short_rows", {"BLOCK_R": 8, "BLOCK_C": 256}, num_warps=4)

# The types of weights and activations, in Triton's words.
FLOAT_TYPES = ("fp16", "bf16", "fp32")

ELEMENTWISE = (LONG_ROWS, SHORT_ROWS)

# Sums over activations. 16 elements a thread: their float64 sums fill 32 registers (x) or 64 (y),
# and 32 bytes a thread on the way keep the memory busy. Tokens have their channels side by side in
# memory, images their positions, and the long axis of a block follows the memory.
_SUMS = {"SUM_X": 1, "SUM_Y": 1, "COMMIT": 1, "BLOCK_Y": 2048}
_TOKENS = _SUMS | {"BLOCK_C": 128, "BLOCK_N": 16}
_IMAGES = _SUMS | {"BLOCK_C": 4, "BLOCK_N": 512}
MONITOR_TOKENS = Config("tokens", _TOKENS, num_warps=4)
MONITOR_IMAGES = Config("images", _IMAGES, num_warps=4)
# The mean |x| of each channel is known from another layer with the same input.
MONITOR_KNOWN = Config("known", _TOKENS | {"SUM_X": 0}, num_warps=4)
MOMENTS = Config("moments", _TOKENS | {"SUM_X": 0, "COMMIT": 0}, num_warps=4)
CHANNELS_TOKENS = Config("channels_tokens", _TOKENS | {"SUM_Y": 0, "COMMIT": 0}, num_warps=4)
CHANNELS_IMAGES = Config("channels_images", _IMAGES | {"SUM_Y": 0, "COMMIT": 0}, num_warps=4)


def monitor_parts(chunks: int, groups: int) -> int:
    """Choose how many programs share each group of a reduction.

    About 512 in all, whatever the GPU, since the bits depend on it: twice as many, with those of y,
    as fill the largest GPUs once. More would leave more partial sums to the last of them.
    """
    return max(1, min(chunks, 512 // max(1, groups)))


def elementwise_config(columns: int, configs: Sequence[Config] = ELEMENTWISE) -> Config:
    """Choose from a configuration for long rows and one for short ones."""
    long, short = configs
    return long if columns >= long.constants["BLOCK_C"] else short


def extended(configs: Iterable[Config], name: str, **constants: int) -> tuple[Config, ...]:
    """Return configurations with further compile-time values, and so named."""
    return tuple(
        Config(f"{config.name}-{name}", {**config.constants, **constants}, config.num_warps)
        for config in configs
    )


# Histograms: 8 weights a thread, one 16-byte load of 16-bit ones. Each takes an address and a sum
# of 64 bits, for which more would not leave registers enough.
HISTOGRAM = (
    Config("long_rows", {"BLOCK_R": 1, "BLOCK_C": 1024}, num_warps=4),
    Config("short_rows", {"BLOCK_R": 8, "BLOCK_C": 128}, num_warps=4),
)
WEIGHTS_ALIKE = extended(HISTOGRAM, "alike", HAS_IMPORTANCE=0)
WEIGHTS_WITH_IMPORTANCE = extended(HISTOGRAM, "importance", HAS_IMPORTANCE=1)
# What the entries of a table are: bins, or the magnitudes of a 16-bit type.
TABLE_KINDS = {"bins": 0, "fp16": 1, "bf16": 2}
# 32 programs for the 2**15 magnitudes: they add few numbers, and the last of them divides.
FINISH_HISTOGRAM = {
    name: Config(name, {"BLOCK": 1024, "KIND": kind}, num_warps=4)
    for name, kind in TABLE_KINDS.items()
}


def histogram_copies(weights: int) -> int:
    """Choose how many tables share the atomic additions of a weight.

    The magnitudes of a layer crowd in a few hundred entries of a table, which one memory slice
    each serves one after the other. Small weights are not worth the clearing of eight tables.
    """
    return 8 if weights >= 1 << 20 else 1


def elementwise_signatures(
    pointers: Iterable[Mapping[str, str]],
) -> tuple[Mapping[str, str], ...]:
    """List what Triton makes of an element-wise kernel's arguments at launch.

    For each set of pointer types the fast path, aligned tensors whose rows hold a multiple of 16
    elements. For the first set, since the types do not matter there, also tensors that start
    anywhere and may exceed 2**31 elements, and rows of one element, a compile-time value to Triton.
    """
    sets = tuple(pointers)
    fast = [
        {name: f"{kind}:16" for name, kind in types.items()} | {"rows": "i32", "columns": "i32:16"}
        for types in sets
    ]
    return (
        *fast,
        {**sets[0], "rows": "i32", "columns": "i64"},
        {**sets[0], "rows": "i32", "columns": "i32:1"},
    )


# Searches: one program a layer, and a model has more layers than a GPU has processors. 8 warps hold
# 8 or 16 float64 numbers a thread: a block of bins, or as many candidates by 128 codepoints.
_SEARCH = {"BLOCK": 2048, "BLOCK_N": 16}
SEARCH_SCALED = Config("scaled", _SEARCH | {"SCALED": 1}, num_warps=8)
SEARCH_UNSCALED = Config("unscaled", _SEARCH | {"SCALED": 0}, num_warps=8)

# Compensated rounding. Few rows a program, so that even 320 rows make 20 programs; 64 columns, so
# that a step of the loop has 8 products a thread for each pair of vectors it reads.
ROUND_COMPENSATED = Config("rows", {"BLOCK_R": 16, "BLOCK_K": 64}, num_warps=4)

# Sweeps. The columns of a call stay in registers, 16 values a thread; few lanes a program, so that
# 640 rows make 20 programs.
SWEEP_CODES = Config("lanes", {"BLOCK_B": MAX_SWEPT, "BLOCK_O": 32}, num_warps=4)

# Gram matrices. Tiles of 64 columns: a layer of 1,280 makes 210 programs, larger ones more. 8 warps
# because the addresses of patches fill registers.
_GRAM = {"BLOCK_T": 64, "PANEL": 1024}
GRAM_SIXTEEN_BIT = Config("tf32", _GRAM | {"TF32": 1, "BLOCK_P": 32}, num_warps=8)
GRAM_EXACT = Config("ieee", _GRAM | {"TF32": 0, "BLOCK_P": 16}, num_warps=8)

# FP8 layers: tiles of rows, outputs and inputs. Few rows: reading the weight is all the work, so
# narrow tiles that make many programs, each with long runs of a weight's row. Many: the largest
# tiles that 16-bit matrix units and 100 KB of shared memory with three stages allow. float32 has no
# matrix units, and its operands take twice the registers.
LAYER_TILES = {
    name: Config(name, {"BLOCK_M": m, "BLOCK_N": n, "BLOCK_K": k}, num_warps=warps)
    for name, m, n, k, warps in (
        ("few", 16, 32, 256, 4),
        ("some", 64, 64, 128, 4),
        ("many", 128, 128, 64, 8),
        ("many_fp32", 64, 32, 32, 4),
        ("positions", 128, 64, 32, 8),
        ("positions_fp32", 64, 32, 32, 4),
    )
}
QUANTIZE_ROWS = Config("rows", {"BLOCK_C": 2048}, num_warps=4)


def matmul_tile(rows: int, compute: str) -> str:
    """Choose the tile of a matrix product."""
    if compute == "fp32":
        return "many_fp32"
    return "few" if rows <= 16 else "some" if rows <= 64 else "many"


def convolution_tile(compute: str) -> str:
    """Choose the tile of a convolution: positions of images by outputs."""
    return "positions_fp32" if compute == "fp32" else "positions"
