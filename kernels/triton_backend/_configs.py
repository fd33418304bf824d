"""The launch table of every Triton kernel, and what the ahead-of-time compiler needs to know.

A configuration changes how fast a kernel runs and never what it writes. Element-wise kernels
see a tensor as `rows` rows of `columns` elements, one scale a row; a tensor with a single scale
is one row.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any


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
    """

    function: Any
    signatures: tuple[Mapping[str, str], ...]
    configs: tuple[Config, ...]


# 16 codes a thread: a 16-byte store, and one 16-byte load (codes in) or two (float16 in). Four
# warps keep blocks small, so that the tail of the grid wastes little.
LONG_ROWS = Config("long_rows", {"BLOCK_R": 1, "BLOCK_C": 2048}, num_warps=4)
# The same number of elements over several rows: a row of 320 weights alone would leave most
# threads of a long block without work.
SHORT_ROWS = Config("short_rows", {"BLOCK_R": 8, "BLOCK_C": 256}, num_warps=4)

# The types of weights and activations, in Triton's words.
FLOAT_TYPES = ("fp16", "bf16", "fp32")

ELEMENTWISE = (LONG_ROWS, SHORT_ROWS)


def elementwise_config(columns: int) -> Config:
    """Choose the configuration of an element-wise kernel from the length of a row."""
    return LONG_ROWS if columns >= LONG_ROWS.constants["BLOCK_C"] else SHORT_ROWS


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
