"""Triton kernels of quantize_e4m3 and dequantize_e4m3.

Equal to hswq.kernels.reference bit for bit: the division is IEEE float32, rounding works on the
bits, and no multiply-add is fused.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from hswq.kernels.triton_backend._configs import (
    ELEMENTWISE,
    FLOAT_TYPES,
    Kernel,
    elementwise_config,
    elementwise_signatures,
)
from hswq.kernels.triton_backend._e4m3 import decode, encode_magnitude, sign_code
from hswq.kernels.triton_backend._floats import narrow, widen
from hswq.kernels.triton_backend._launch import launch
from hswq.kernels.triton_backend._tiles import tile, tile_programs


# `rows` only bounds the grid; specialised, it would cost one more compilation for a single row and
# one for each kind of row count.
@triton.jit(do_not_specialize=["rows"])
def quantize_e4m3_kernel(
    w_ptr,
    amax_ptr,
    scale_ptr,
    codes_ptr,
    rows,
    columns,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    row, _, offset, inside = tile(rows, columns, BLOCK_R, BLOCK_C)
    amax = tl.load(amax_ptr + row, mask=row < rows, other=0.0)  # [BLOCK_R]
    scale = tl.load(scale_ptr + row, mask=row < rows, other=1.0)  # [BLOCK_R]
    w = tl.load(w_ptr + offset, mask=inside, other=0.0)  # [BLOCK_R, BLOCK_C]
    clipped = tl.minimum(tl.abs(widen(w)), amax[:, None], propagate_nan=tl.PropagateNan.ALL)
    codes = encode_magnitude(tl.div_rn(clipped, scale[:, None])) | sign_code(w)
    tl.store(codes_ptr + offset, codes, mask=inside)


@triton.jit(do_not_specialize=["rows"])
def dequantize_e4m3_kernel(
    codes_ptr, scale_ptr, w_ptr, rows, columns, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr
):
    row, _, offset, inside = tile(rows, columns, BLOCK_R, BLOCK_C)
    scale = tl.load(scale_ptr + row, mask=row < rows, other=1.0)  # [BLOCK_R]
    codes = tl.load(codes_ptr + offset, mask=inside, other=0)  # [BLOCK_R, BLOCK_C]
    w = decode(codes) * scale[:, None]
    tl.store(w_ptr + offset, narrow(w, w_ptr.dtype.element_ty), mask=inside)


def launch_tiles(
    kernel: Any, source: torch.Tensor, output: torch.Tensor, *factors: torch.Tensor
) -> None:
    """Run an element-wise kernel that takes source, factors, output, rows, columns.

    Args:
        kernel: what triton.jit returned.
        source: contiguous, any shape with at least one element.
        output: contiguous, shape of source.
        factors: float32 [] or [O], one for each index of dim 0. Where all are [], the whole tensor
            is one row.
    """
    rows = source.shape[0] if any(factor.dim() for factor in factors) else 1
    columns = source.numel() // rows
    config = elementwise_config(columns)
    block_r, block_c = config.constants["BLOCK_R"], config.constants["BLOCK_C"]
    programs = tile_programs(rows, columns, block_r, block_c)
    by_row = [factor.expand(rows).contiguous() for factor in factors]
    launch(kernel, programs, source.device, config, source, *by_row, output, rows, columns)


def quantize_e4m3(w: torch.Tensor, amax: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """Round each element to its nearest E4M3 codepoint after clipping to +-amax.

    code = encode(clamp(float32(w), -amax, amax) / scale); the division is IEEE float32, ties go
    to the even code, what exceeds 448 saturates, NaN becomes 0x7F plus its sign.

    Args:
        w: float16, bfloat16 or float32, any shape, contiguous, not empty.
        amax: float32 [] or [O] (per row of dim 0), >= 0. 0 writes zeros with the signs of w.
        scale: float32 [] or [O], > 0. 1.0 writes plain FP8 (the loader needs no scale).
    Returns:
        uint8 codepoints, shape of w.
    Equals: hswq.kernels.reference.quantize_e4m3, bit for bit.
    Moves: reads numel * itemsize bytes, writes numel bytes.
    Needs: all tensors on one CUDA or HIP device (any device in Triton's interpreter), and arguments
        as hswq.kernels.contract describes them.
    Source: OCP 8-bit Floating Point Specification 1.0, section 5 (E4M3).
    """
    codes = torch.empty(w.shape, dtype=torch.uint8, device=w.device)
    launch_tiles(quantize_e4m3_kernel, w, codes, amax, scale)
    return codes


def dequantize_e4m3(codes: torch.Tensor, scale: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Give each codepoint its real value.

    w = float32(value of the codepoint) * scale in float32, rounded once more where dtype has 16
    bits; 0x7F and 0xFF give NaN.

    Args:
        codes: uint8 codepoints, any shape, contiguous, not empty.
        scale: float32 [] or [O] (per row of dim 0), > 0.
        dtype: float16, bfloat16 or float32.
    Returns:
        Tensor of dtype, shape of codes.
    Equals: hswq.kernels.reference.dequantize_e4m3, bit for bit but for sign and payload of NaN.
    Moves: reads numel bytes, writes numel * itemsize bytes.
    Needs: all tensors on one CUDA or HIP device (any device in Triton's interpreter), and arguments
        as hswq.kernels.contract describes them.
    Source: OCP 8-bit Floating Point Specification 1.0, section 5 (E4M3).
    """
    w = torch.empty(codes.shape, dtype=dtype, device=codes.device)
    launch_tiles(dequantize_e4m3_kernel, codes, w, scale)
    return w


KERNELS = (
    Kernel(
        quantize_e4m3_kernel,
        elementwise_signatures(
            {"w_ptr": f"*{dtype}", "amax_ptr": "*fp32", "scale_ptr": "*fp32", "codes_ptr": "*u8"}
            for dtype in FLOAT_TYPES
        ),
        ELEMENTWISE,
    ),
    Kernel(
        dequantize_e4m3_kernel,
        elementwise_signatures(
            {"codes_ptr": "*u8", "scale_ptr": "*fp32", "w_ptr": f"*{dtype}"}
            for dtype in FLOAT_TYPES
        ),
        ELEMENTWISE,
    ),
)
