"""Sums whose order is fixed: tl.sum follows the layout, which follows alignment, warps and GPU."""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.standard import _sum_combine


@triton.jit
def tree_sum(values):
    """Sum of each row, in the order of hswq.kernels.tree_sum: upper half added to lower half.

    Each level is a sum of two elements, which has one order only.

    Args:
        values: float [rows, columns]; at most 2**20 columns, as always a power of two.
    Returns:
        float [rows].
    """
    for _ in tl.static_range(20):
        # Decided by the compiler. tl.sum, itself a jit function, would take the interpreter longer.
        if values.shape[1] > 1:
            halves = tl.reshape(values, [values.shape[0], 2, values.shape[1] // 2])
            values = tl.reduce(halves, 1, _sum_combine)
    return tl.reshape(values, [values.shape[0]])
