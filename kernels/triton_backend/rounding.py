"""Triton kernels of round_compensated and sweep_codes: column loops of some rows, fused."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from hswq.kernels.triton_backend._configs import (
    FLOAT_TYPES,
    ROUND_COMPENSATED,
    SWEEP_CODES,
    Kernel,
)
from hswq.kernels.triton_backend._e4m3 import decode, encode_magnitude, sign_code
from hswq.kernels.triton_backend._floats import widen
from hswq.kernels.triton_backend._launch import launch


@triton.jit(do_not_specialize=["rows"])
def round_compensated_kernel(
    w_ptr,
    upper_ptr,
    scale_ptr,
    order_ptr,
    errors_ptr,
    codes_ptr,
    rows,
    columns,
    BLOCK_R: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    program = tl.program_id(0).to(tl.int64)
    lanes = tl.arange(0, BLOCK_R)
    row = program * BLOCK_R + lanes
    in_rows = row < rows
    scale = tl.load(scale_ptr + row, mask=in_rows, other=1.0)  # [BLOCK_R]
    width = tl.full([], columns, tl.int64)
    # e of every column, [columns, BLOCK_R] of this program.
    errors_ptr += program * columns * BLOCK_R + lanes
    for begin in range(0, columns, BLOCK_K):
        column = begin + tl.arange(0, BLOCK_K)
        in_columns = column < columns
        source = tl.load(order_ptr + column, mask=in_columns, other=0)
        inside = in_rows[:, None] & in_columns[None, :]
        w = tl.load(w_ptr + row[:, None] * columns + source[None, :], mask=inside, other=0.0)
        values = widen(w).to(tl.float64)  # [BLOCK_R, BLOCK_K]
        # What the columns before the block leave to it, in their order.
        for k in range(0, begin):
            error = tl.load(errors_ptr + k * BLOCK_R)
            u = tl.load(upper_ptr + k * width + column, mask=in_columns, other=0.0)
            values -= error[:, None] * u[None, :]
        for k in range(begin, tl.minimum(begin + BLOCK_K, columns)):
            # As bits, whose sum with zeros is exact for -0 too.
            bits = tl.where((column == k)[None, :], values.to(tl.int64, bitcast=True), 0)
            value = tl.sum(bits, axis=1).to(tl.float64, bitcast=True)  # [BLOCK_R]
            quotient = tl.div_rn(value.to(tl.float32), scale)
            code = encode_magnitude(tl.abs(quotient)) | sign_code(quotient)
            rounded = (decode(code) * scale).to(tl.float64)
            row_of_upper = upper_ptr + k * width
            error = (value - rounded) / tl.load(row_of_upper + k)
            tl.store(errors_ptr + k * BLOCK_R, error)
            target = tl.load(order_ptr + k)
            tl.store(codes_ptr + row * columns + target, code, mask=in_rows)
            # Columns up to k are not read again, whatever is subtracted from them.
            u = tl.load(row_of_upper + column, mask=in_columns & (column > k), other=0.0)
            values -= error[:, None] * u[None, :]
        # Other threads read the errors.
        tl.debug_barrier()


def round_compensated(w: Tensor, upper: Tensor, scale: Tensor, order: Tensor) -> Tensor:
    """Round a weight column by column, each error spread over the columns to come.

    As hswq.kernels.round_compensated says: float64 products and differences rounded one by one, the
    terms of a value in the order of the columns.

    Args:
        w: float16, bfloat16 or float32 [O, ...] with n elements a row, contiguous.
        upper: float64 [n, n], contiguous.
        scale: float32 [] or [O].
        order: int64 [n], contiguous.
    Returns:
        uint8 codepoints, shape of w.
    Equals: hswq.kernels.reference.round_compensated, bit for bit.
    Moves: each program reads the upper triangle once and the errors of its rows n / 128 times;
        8 bytes a weight of workspace.
    Source: Frantar et al., GPTQ, arXiv:2210.17323, on the E4M3 codepoints.
    """
    rows, columns = len(w), order.numel()
    block_r = ROUND_COMPENSATED.constants["BLOCK_R"]
    programs = triton.cdiv(rows, block_r)
    errors = torch.empty(programs * block_r * columns, dtype=torch.float64, device=w.device)
    codes = torch.empty(w.shape, dtype=torch.uint8, device=w.device)
    scale = scale.expand(rows).contiguous()
    pointers = w, upper, scale, order, errors, codes
    launch(
        round_compensated_kernel, programs, w.device, ROUND_COMPENSATED, *pointers, rows, columns
    )
    return codes


@triton.jit(do_not_specialize=["columns"])
def sweep_codes_kernel(
    slope_ptr,
    codes_ptr,
    second_ptr,
    scale_ptr,
    steps_ptr,
    columns,
    lanes,
    BLOCK_B: tl.constexpr,
    BLOCK_O: tl.constexpr,
):
    lane = tl.program_id(0).to(tl.int64) * BLOCK_O + tl.arange(0, BLOCK_O)
    column = tl.arange(0, BLOCK_B)
    in_lanes = lane < lanes
    in_columns = column < columns
    scale = tl.load(scale_ptr + lane, mask=in_lanes, other=1.0)  # [BLOCK_O]
    stride = tl.full([], lanes, tl.int64)
    places = column[:, None] * stride + lane[None, :]
    inside = in_columns[:, None] & in_lanes[None, :]
    slope = tl.load(slope_ptr + places, mask=inside, other=0.0)  # [BLOCK_B, BLOCK_O]
    for k in range(0, columns):
        # As bits, whose sum with zeros is exact for -0 too.
        bits = tl.where((column == k)[:, None], slope.to(tl.int32, bitcast=True), 0)
        own = tl.sum(bits, axis=0).to(tl.float32, bitcast=True)  # [BLOCK_O]
        before = tl.load(codes_ptr + k * stride + lane, mask=in_lanes, other=0)
        value = decode(before) * scale
        best = value + tl.div_rn(own, tl.load(second_ptr + k * columns + k))
        quotient = tl.div_rn(best, scale)
        code = encode_magnitude(tl.abs(quotient)) | sign_code(quotient)
        other = decode(code) * scale
        nearer = tl.abs(other - best) < tl.abs(value - best)
        step = tl.where(nearer, other - value, 0.0)
        tl.store(codes_ptr + k * stride + lane, tl.where(nearer, code, before), mask=in_lanes)
        tl.store(steps_ptr + k * stride + lane, step, mask=in_lanes)
        row = tl.load(second_ptr + k * columns + column, mask=in_columns, other=0.0)
        slope -= row[:, None] * step[None, :]
    tl.store(slope_ptr + places, slope, mask=inside)


def sweep_codes(slope: Tensor, codes: Tensor, second: Tensor, scale: Tensor) -> Tensor:
    """Choose the codes of some columns anew, one after the other.

    As hswq.kernels.sweep_codes says: float32 operations rounded one by one, the terms of a slope in
    the order of the columns.

    Args:
        slope: float32 [B, O], contiguous; changed in place.
        codes: uint8 [B, O], contiguous; changed in place.
        second: float32 [B, B], contiguous.
        scale: float32 [] or [O].
    Returns:
        float32 [B, O], the steps.
    Equals: hswq.kernels.reference.sweep_codes, bit for bit.
    Moves: 14 bytes a code, and second once a program.
    """
    columns, lanes = slope.shape
    steps = torch.empty_like(slope)
    scale = scale.expand(lanes).contiguous()
    pointers = slope, codes, second, scale, steps
    programs = triton.cdiv(lanes, SWEEP_CODES.constants["BLOCK_O"])
    launch(sweep_codes_kernel, programs, slope.device, SWEEP_CODES, *pointers, columns, lanes)
    return steps


KERNELS = (
    Kernel(
        round_compensated_kernel,
        tuple(
            {"w_ptr": f"*{kind}:16", "upper_ptr": "*fp64:16", "scale_ptr": "*fp32:16"}
            | {"order_ptr": "*i64:16", "errors_ptr": "*fp64:16", "codes_ptr": "*u8:16"}
            | {"rows": "i32", "columns": columns}
            for kind, columns in ((*((kind, "i32:16") for kind in FLOAT_TYPES), ("fp16", "i32")))
        ),
        (ROUND_COMPENSATED,),
    ),
    Kernel(
        sweep_codes_kernel,
        tuple(
            {"slope_ptr": "*fp32:16", "codes_ptr": "*u8:16", "second_ptr": "*fp32:16"}
            | {"scale_ptr": "*fp32:16", "steps_ptr": "*fp32:16", "columns": "i32", "lanes": lanes}
            for lanes in ("i32:16", "i32")
        ),
        (SWEEP_CODES,),
    ),
)
