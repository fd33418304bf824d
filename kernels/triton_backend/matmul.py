"""Triton kernels of scaled_matmul and scaled_conv2d: products with weights that stay FP8.

Weights are read as bytes and decoded in registers; there is no 16-bit copy and, for convolutions,
no matrix of patches. One kernel serves all ways to compute: what changes is the type of the
operands.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable

import torch
import triton
import triton.language as tl
from torch import Tensor

from hswq.kernels import reference
from hswq.kernels.contract import COMPUTE
from hswq.kernels.triton_backend._configs import (
    FLOAT_TYPES,
    LAYER_TILES,
    QUANTIZE_ROWS,
    Config,
    Kernel,
    convolution_tile,
    matmul_tile,
)
from hswq.kernels.triton_backend._e4m3 import encode_magnitude, sign_code
from hswq.kernels.triton_backend._floats import narrow, widen
from hswq.kernels.triton_backend._launch import launch
from hswq.kernels.triton_backend._layers import (
    ACTIVATIONS,
    OPERANDS,
    activate,
    input_operand,
    multiply_add,
    unit,
    weight_operand,
)
from hswq.kernels.triton_backend._patches import load_patches, patch_columns
from hswq.kernels.triton_backend.quantize import launch_tiles, quantize_e4m3_kernel

# Programs that are neighbours in time share rows of x or of the weight in the cache.
_GROUP = tl.constexpr(8)
_MAX = tl.constexpr(448.0)


@triton.jit(do_not_specialize=["rows"])
def quantize_rows_kernel(x_ptr, codes_ptr, scale_ptr, rows, columns, BLOCK_C: tl.constexpr):
    """Round each row to codepoints with a scale of its own: float32(max |x| / 448), 1 for zeros."""
    row = tl.program_id(0).to(tl.int64) * columns
    largest = tl.zeros([BLOCK_C], dtype=tl.float32)
    for start in range(0, columns, BLOCK_C):
        column = start + tl.arange(0, BLOCK_C)
        x = tl.load(x_ptr + row + column, mask=column < columns, other=0.0)
        largest = tl.maximum(largest, tl.abs(widen(x)), propagate_nan=tl.PropagateNan.ALL)
    # The largest by its bits, which order like the magnitudes, NaN above all.
    top = tl.max(largest.to(tl.int32, bitcast=True), axis=0).to(tl.float32, bitcast=True)
    scale = tl.div_rn(top, _MAX)
    scale = tl.where(scale > 0.0, scale, 1.0)
    for start in range(0, columns, BLOCK_C):
        column = start + tl.arange(0, BLOCK_C)
        x = tl.load(x_ptr + row + column, mask=column < columns, other=0.0)
        magnitude = tl.div_rn(tl.abs(widen(x)), tl.zeros([BLOCK_C], dtype=tl.float32) + scale)
        codes = encode_magnitude(magnitude) | sign_code(x)
        tl.store(codes_ptr + row + column, codes, mask=column < columns)
    tl.store(scale_ptr + tl.program_id(0), scale)


@triton.jit
def finish(
    total,
    row,
    column,
    x_scale_ptr,
    scale_ptr,
    bias_ptr,
    rows,
    outputs,
    TYPE: tl.constexpr,
    X_SCALE: tl.constexpr,
    PER_ROW: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    ACTIVATION: tl.constexpr,
):
    """Scales, bias and activation of a tile of products; row and column broadcast against it.

    X_SCALE: 0 none, 1 one for all, 2 one for each index of row.
    """
    value = total * unit(TYPE)
    if X_SCALE == 2:
        value *= tl.load(x_scale_ptr + row, mask=row < rows, other=1.0)
    elif X_SCALE == 1:
        value *= tl.load(x_scale_ptr)
    if PER_ROW:
        value *= tl.load(scale_ptr + column, mask=column < outputs, other=1.0)
    else:
        value *= tl.load(scale_ptr)
    if HAS_BIAS:
        value += widen(tl.load(bias_ptr + column, mask=column < outputs, other=0.0))
    return activate(value, ACTIVATION)


@triton.jit(do_not_specialize=["rows", "outputs"])
def scaled_matmul_kernel(
    x_ptr,
    codes_ptr,
    scale_ptr,
    bias_ptr,
    x_scale_ptr,
    y_ptr,
    rows,
    outputs,
    inputs,
    TYPE: tl.constexpr,
    X_SCALE: tl.constexpr,
    PER_ROW: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    ACTIVATION: tl.constexpr,
    WIDE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """y[m, n] = activation(sum_k x[m, k] W[n, k] * x_scale[m] * scale[n] + bias[n])."""
    program = tl.program_id(0)
    tiles_m, tiles_n = tl.cdiv(rows, BLOCK_M), tl.cdiv(outputs, BLOCK_N)
    first = program // (_GROUP * tiles_n) * _GROUP
    group = tl.minimum(tiles_m - first, _GROUP)
    row = (first + program % (_GROUP * tiles_n) % group) * BLOCK_M + tl.arange(0, BLOCK_M)
    column = program % (_GROUP * tiles_n) // group * BLOCK_N + tl.arange(0, BLOCK_N)
    # What lies outside is computed from the last row or column and not stored: no masks inside.
    x_row = tl.minimum(row, rows - 1).to(tl.int64) * inputs
    w_row = tl.minimum(column, outputs - 1).to(tl.int64) * inputs
    # Weights come first: Hopper's matrix units take their first operand from the registers it was
    # decoded in, their second from shared memory only.
    total = tl.zeros([BLOCK_N, BLOCK_M], dtype=tl.float32)
    for start in range(0, inputs, BLOCK_K):
        k = start + tl.arange(0, BLOCK_K)
        inside = k < inputs
        codes = tl.load(codes_ptr + w_row[:, None] + k[None, :], mask=inside[None, :], other=0)
        x = tl.load(x_ptr + x_row[None, :] + k[:, None], mask=inside[:, None], other=0)
        total = multiply_add(weight_operand(codes, TYPE), input_operand(x, TYPE), total, TYPE, WIDE)
    value = finish(
        total,
        row[None, :],
        column[:, None],
        *(x_scale_ptr, scale_ptr, bias_ptr, rows, outputs),
        *(TYPE, X_SCALE, PER_ROW, HAS_BIAS, ACTIVATION),
    )
    place = row.to(tl.int64)[:, None] * outputs + column[None, :]
    inside = (row < rows)[:, None] & (column < outputs)[None, :]
    y = tl.trans(narrow(value, y_ptr.dtype.element_ty))
    tl.store(y_ptr + place, y, mask=inside)


@triton.jit(
    do_not_specialize=[
        *("rows", "outputs", "width", "channels", "height", "length", "out_h", "out_w"),
        *("kernel_h", "kernel_w", "stride_h", "stride_w", "padding_h", "padding_w"),
        *("dilation_h", "dilation_w"),
    ]
)
def scaled_conv2d_kernel(
    x_ptr,
    codes_ptr,
    scale_ptr,
    bias_ptr,
    x_scale_ptr,
    y_ptr,
    rows,
    outputs,
    width,
    groups,
    channels,
    height,
    length,
    out_h,
    out_w,
    kernel_h,
    kernel_w,
    stride_h,
    stride_w,
    padding_h,
    padding_w,
    dilation_h,
    dilation_w,
    TYPE: tl.constexpr,
    X_SCALE: tl.constexpr,
    PER_ROW: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    ACTIVATION: tl.constexpr,
    WIDE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """The same for the patches of images: rows are positions, width is the size of a patch.

    The tile is [outputs, positions], since positions lie side by side in x and y.
    """
    program = tl.program_id(0)
    size = outputs // groups
    tiles_n = tl.cdiv(size, BLOCK_N)
    channel_group = program % groups
    # Programs side by side read the same patches.
    tile_n, tile_m = program // groups % tiles_n, program // groups // tiles_n
    place = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
    column = channel_group * size + place
    row = tile_m * BLOCK_M + tl.arange(0, BLOCK_M)
    image = row // (out_h * out_w)
    y = row // out_w % out_h * stride_h - padding_h
    x = row % out_w * stride_w - padding_w
    w_row = tl.where(place < size, column, 0).to(tl.int64) * width
    total = tl.zeros([BLOCK_N, BLOCK_M], dtype=tl.float32)
    for start in range(0, width, BLOCK_K):
        k = start + tl.arange(0, BLOCK_K)
        channel, shift_y, shift_x, inside_k = patch_columns(
            k, channel_group * width, width, kernel_h, kernel_w, dilation_h, dilation_w
        )
        patches = load_patches(
            x_ptr,
            *(image, y, x, row < rows),
            *(channel, shift_y, shift_x, inside_k),
            *(channels, height, length),
        )
        codes = tl.load(codes_ptr + w_row[:, None] + k[None, :], mask=(k < width)[None, :], other=0)
        total = multiply_add(
            weight_operand(codes, TYPE), input_operand(patches, TYPE), total, TYPE, WIDE
        )
    stop = (channel_group + 1) * size
    value = finish(
        total,
        image[None, :],
        column[:, None],
        *(x_scale_ptr, scale_ptr, bias_ptr, rows, stop),
        *(TYPE, X_SCALE, PER_ROW, HAS_BIAS, ACTIVATION),
    )
    positions = out_h * out_w
    target = image.to(tl.int64)[None, :] * outputs + column[:, None]
    target = target * positions + (row % positions)[None, :]
    inside = (place < size)[:, None] & (row < rows)[None, :]
    tl.store(y_ptr + target, narrow(value, y_ptr.dtype.element_ty), mask=inside)


def scaled_matmul(
    x: Tensor,
    codes: Tensor,
    scale: Tensor,
    bias: Tensor | None,
    input_scale: Tensor | None,
    compute: str,
    activation: str | None,
) -> Tensor:
    """Multiply with an FP8 weight as hswq.kernels.scaled_matmul says.

    Args:
        x: float16, bfloat16 or float32 [..., I].
        codes: uint8 [O, I], contiguous.
        scale: float32 [] or [O].
        bias: floating point [O] or None.
        input_scale: float32 [] or None.
        compute: fp32, bf16, fp16 or fp8.
        activation: None, gelu, gelu_tanh or silu.
    Returns:
        dtype of x, [..., O].
    Equals: hswq.kernels.reference.scaled_matmul, within the bound of float32 sums; with FP8 matrix
        units within 2**-13 of the largest partial sum.
    Moves: the weight once for every 128 rows, a byte an element.
    """
    outputs, inputs = codes.shape
    flat = x.reshape(-1, inputs).contiguous()
    rows = len(flat)
    y = torch.empty(rows, outputs, dtype=x.dtype, device=x.device)
    x_scale = input_scale
    if compute == "fp8":
        flat, x_scale = quantize_rows(flat, input_scale)
    config = layer_config(
        matmul_tile(rows, compute),
        operand_type(compute, x.device),
        0 if x_scale is None else min(2, 1 + x_scale.dim()),
        scale.dim() > 0,
        bias is not None,
        activation,
    )
    programs = triton.cdiv(rows, config.constants["BLOCK_M"])
    programs *= triton.cdiv(outputs, config.constants["BLOCK_N"])
    # What is absent is not read: any pointer will do.
    pointers = flat, codes, scale, *(scale if it is None else it for it in (bias, x_scale)), y
    launch(scaled_matmul_kernel, programs, x.device, config, *pointers, rows, outputs, inputs)
    return y.reshape(*x.shape[:-1], outputs)


def scaled_conv2d(
    x: Tensor,
    codes: Tensor,
    scale: Tensor,
    bias: Tensor | None,
    stride: tuple[int, int],
    padding: tuple[int, int],
    dilation: tuple[int, int],
    groups: int,
    input_scale: Tensor | None,
    compute: str,
    activation: str | None,
) -> Tensor:
    """Convolve with an FP8 weight as hswq.kernels.scaled_conv2d says; no patches are copied.

    Args:
        x: float16, bfloat16 or float32 [B, C, H, W].
        codes: uint8 [O, C / groups, kh, kw], contiguous.
        scale: float32 [] or [O].
        bias: floating point [O] or None.
        stride, padding, dilation, groups: of the convolution.
        input_scale: float32 [] or None.
        compute: fp32, bf16, fp16 or fp8.
        activation: None, gelu, gelu_tanh or silu.
    Returns:
        dtype of x, [B, O, H', W'], contiguous.
    Equals: hswq.kernels.reference.scaled_conv2d, as `scaled_matmul` does its own.
    """
    if x[0].numel() >= 1 << 31:
        # The kernel counts in 32 bits within an image.
        y: Tensor = reference.scaled_conv2d(
            *(x, codes, scale, bias, stride, padding, dilation, groups),
            *(input_scale, compute, activation),
        )
        return y
    images, channels, *size = x.shape
    kernel = tuple(codes.shape[2:])
    out = [
        (edge + 2 * pad - step * (taps - 1) - 1) // jump + 1
        for edge, pad, step, taps, jump in zip(size, padding, dilation, kernel, stride, strict=True)
    ]
    y = torch.empty(images, len(codes), *out, dtype=x.dtype, device=x.device)
    values = x.contiguous()
    x_scale = input_scale
    if compute == "fp8":
        flat, x_scale = quantize_rows(values.reshape(images, -1), input_scale)
        values = flat.reshape(x.shape)
    config = layer_config(
        convolution_tile(compute),
        operand_type(compute, x.device),
        0 if x_scale is None else min(2, 1 + x_scale.dim()),
        scale.dim() > 0,
        bias is not None,
        activation,
    )
    rows, outputs, width = images * out[0] * out[1], len(codes), codes[0].numel()
    programs = triton.cdiv(rows, config.constants["BLOCK_M"]) * groups
    programs *= triton.cdiv(outputs // groups, config.constants["BLOCK_N"])
    pointers = values, codes, scale, *(scale if it is None else it for it in (bias, x_scale)), y
    sizes = rows, outputs, width, groups, channels, *size, *out
    geometry = *kernel, *stride, *padding, *dilation
    launch(scaled_conv2d_kernel, programs, x.device, config, *pointers, *sizes, *geometry)
    return y


def quantize_rows(rows: Tensor, input_scale: Tensor | None) -> tuple[Tensor, Tensor]:
    """Round activations [M, K] to codepoints.

    Returns:
        uint8 [M, K], and their scale, float32 [M], or [] where input_scale is given.
    """
    codes = torch.empty(rows.shape, dtype=torch.uint8, device=rows.device)
    if input_scale is not None:
        limit = torch.full_like(input_scale, torch.inf)
        launch_tiles(quantize_e4m3_kernel, rows, codes, limit, input_scale)
        return codes, input_scale
    scale = torch.empty(len(rows), dtype=torch.float32, device=rows.device)
    launch(
        quantize_rows_kernel, len(rows), rows.device, QUANTIZE_ROWS, rows, codes, scale, *rows.shape
    )
    return codes, scale


def operand_type(compute: str, device: torch.device) -> str:
    """Choose the type of the operands: codes where the GPU multiplies FP8, else what holds them."""
    if compute in COMPUTE:
        return compute
    return "codes" if multiplies_fp8(device) else "halves"


@functools.cache
def multiplies_fp8(device: torch.device) -> bool:
    """Tell whether a GPU's matrix units know OCP's E4M3: NVIDIA's do from 8.9 on."""
    if device.type != "cuda" or torch.version.hip is not None:
        return False
    return torch.cuda.get_device_capability(device) >= (8, 9)


@functools.cache
def layer_config(
    tile: str,
    operands: str,
    x_scale: int,
    per_row: bool,
    has_bias: bool,
    activation: str | None,
) -> Config:
    """Return a tile's configuration with everything that is known at compile time."""
    constants = {
        "TYPE": OPERANDS[operands],
        "X_SCALE": x_scale,
        "PER_ROW": int(per_row),
        "HAS_BIAS": int(has_bias),
        "ACTIVATION": ACTIVATIONS[activation],
        # The interpreter rounds the sums of 16-bit operands.
        "WIDE": int(not isinstance(scaled_matmul_kernel, triton.JITFunction)),
    }
    base = LAYER_TILES[tile]
    name = f"{tile}-{operands}" + (f"-{activation}" if activation else "")
    return Config(name, {**base.constants, **constants}, base.num_warps)


_POINTERS = {"codes_ptr": "*u8:16", "scale_ptr": "*fp32:16"}
_SIZES = ("rows", "outputs", "width", "channels", "height", "length", "out_h", "out_w")
_STEPS = ("kernel_h", "kernel_w", "stride_h", "stride_w", "padding_h", "padding_w")


def _signature(x: str, y: str, rest: dict[str, str]) -> dict[str, str]:
    return {
        "x_ptr": f"*{x}:16",
        **_POINTERS,
        "bias_ptr": f"*{y}:16",
        "x_scale_ptr": "*fp32:16",
        "y_ptr": f"*{y}:16",
        **rest,
    }


def _kernels() -> Iterable[Kernel]:
    """List each way to compute with the tiles that it is launched with."""
    matmul = dict.fromkeys(("rows", "outputs"), "i32") | {"inputs": "i32:16"}
    convolution = dict.fromkeys((*_SIZES, *_STEPS, "dilation_h", "dilation_w"), "i32")
    convolution |= {"groups": "i32:1"}
    for operands, x, y in (
        ("fp16", "fp16", "fp16"),
        ("bf16", "bf16", "bf16"),
        ("fp32", "fp32", "fp32"),
        ("halves", "u8", "fp16"),
        ("codes", "u8", "bf16"),
    ):
        compute = operands if operands in COMPUTE else "fp8"
        x_scale = 2 if compute == "fp8" else 0
        tiles = {matmul_tile(rows, compute) for rows in (1, 32, 1024)}
        for kernel, rest, used in (
            (scaled_matmul_kernel, matmul, sorted(tiles)),
            (scaled_conv2d_kernel, convolution, [convolution_tile(compute)]),
        ):
            configs = tuple(
                layer_config(tile, operands, x_scale, per_row=False, has_bias=True, activation=None)
                for tile in used
            )
            yield Kernel(
                kernel,
                (_signature(x, y, rest),),
                configs,
                least_capability=89 if operands == "codes" else 0,
            )
    activated = layer_config("many", "fp16", 0, True, False, "gelu")
    yield Kernel(scaled_matmul_kernel, (_signature("fp16", "fp16", matmul),), (activated,))
    yield Kernel(
        quantize_rows_kernel,
        tuple(
            {"x_ptr": f"*{kind}:16", "codes_ptr": "*u8:16", "scale_ptr": "*fp32:16"}
            | {"rows": "i32", "columns": "i32:16"}
            for kind in FLOAT_TYPES
        ),
        (QUANTIZE_ROWS,),
    )


KERNELS = tuple(_kernels())
