"""The place of a program in a matrix."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def tile(rows, columns, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr):
    """Place of this program in a contiguous [rows, columns] tensor.

    Returns:
        row int64 [BLOCK_R], column int64 [BLOCK_C], offset int64 and inside bool
        [BLOCK_R, BLOCK_C].
    """
    blocks = tl.cdiv(columns, BLOCK_C)
    # Neighbouring programs work on neighbouring columns; int64 because a tensor may hold more
    # than 2**31 elements.
    program = tl.program_id(0).to(tl.int64)
    row = program // blocks * BLOCK_R + tl.arange(0, BLOCK_R)
    column = program % blocks * BLOCK_C + tl.arange(0, BLOCK_C)
    offset = row[:, None] * columns + column[None, :]
    inside = (row < rows)[:, None] & (column < columns)[None, :]
    return row, column, offset, inside


def tile_programs(rows: int, columns: int, block_r: int, block_c: int) -> int:
    """Return how many programs cover the tensor."""
    return triton.cdiv(rows, block_r) * triton.cdiv(columns, block_c)
