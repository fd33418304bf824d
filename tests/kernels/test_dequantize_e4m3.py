"""Codepoints back to values."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from hswq import kernels
from hswq.errors import InputError
from tests import oracle
from tests.conftest import Backend
from tests.kernels import cases

OP = "dequantize_e4m3"
ALL_CODES = torch.arange(256, dtype=torch.uint8)


def check(codes: Tensor, scale: float | Tensor, dtype: torch.dtype, backend: Backend) -> None:
    values = kernels.dequantize_e4m3(codes.to(backend.device), scale, dtype, backend=backend.name)
    column = np.float32(scale)
    if isinstance(scale, Tensor) and scale.numel() > 1:
        column = scale.numpy().reshape(-1, *[1] * (codes.dim() - 1))
    with np.errstate(all="ignore"):
        product = oracle.decode(codes.view(torch.uint8).numpy()) * column
    product = torch.from_numpy(product).to(dtype)
    nan = product.isnan()
    assert values.dtype == dtype
    assert torch.equal(values.cpu().isnan(), nan)
    # As integers, so that -0 and 0 differ; which NaN it is does not matter.
    bits = torch.int32 if dtype == torch.float32 else torch.int16
    assert torch.equal(values.cpu().view(bits)[~nan], product.view(bits)[~nan])


@pytest.mark.parametrize("scale", [1.0, 0.07 / 448, 3.0, 1e36, 1e-40])
@pytest.mark.parametrize("dtype", cases.DTYPES)
def test_all_codes_have_their_value(dtype: torch.dtype, scale: float, backend: Backend) -> None:
    """A product in 16 bits, or a wrong subnormal, changes what a loader computes with."""
    check(ALL_CODES, scale, dtype, backend)


@pytest.mark.parametrize("shape", [(1,), (31,), (127, 3), (17, 5, 3, 3), (1030, 1023)])
def test_shapes_and_row_scales(shape: tuple[int, ...], backend: Backend) -> None:
    """A dropped tail or a neighbour's scale is a wrong weight."""
    codes = torch.randint(0, 256, shape, dtype=torch.uint8, generator=cases.generator())
    check(codes, 0.0123, torch.bfloat16, backend)
    check(codes, torch.rand(shape[0], generator=cases.generator(1)) + 0.01, torch.float32, backend)


@pytest.mark.parametrize("dtype", cases.DTYPES)
def test_products_round_to_the_nearest_value(dtype: torch.dtype, backend: Backend) -> None:
    """From float16's subnormals to beyond its largest value: truncated or flushed, it is wrong."""
    codes = ALL_CODES.expand(64, -1)
    check(codes, torch.logspace(-12, 6, 64, dtype=torch.float32), dtype, backend)


def test_float8_tensors_and_strides_are_taken(backend: Backend) -> None:
    """Loaders hold the weights as float8_e4m3fn, some of them transposed."""
    codes = ALL_CODES.reshape(16, 16)
    check(codes.view(torch.float8_e4m3fn), 0.5, torch.float32, backend)
    check(codes.T, torch.linspace(0.1, 2, 16), torch.float16, backend)


def test_quantizing_values_of_codes_returns_the_codes(backend: Backend) -> None:
    """Reading a file and writing it again must not move a codepoint."""
    for scale in (1.0, 0.07 / 448, 3.7e-5):
        codes = ALL_CODES[(ALL_CODES & 0x7F) != 0x7F].to(backend.device)
        values = kernels.dequantize_e4m3(codes, scale, backend=backend.name)
        again = kernels.quantize_e4m3(values, 1e9, scale, backend=backend.name)
        assert torch.equal(again, codes)


def test_empty_codes_give_no_values(backend: Backend) -> None:
    """A layer of no rows has no values; it is no error."""
    values = kernels.dequantize_e4m3(ALL_CODES[:0], 1.0, backend=backend.name)
    assert values.shape == (0,)


def test_bad_arguments_are_refused(backend: Backend) -> None:
    """int8 tensors come from other formats; their bytes mean something else."""
    with pytest.raises(InputError, match="codes is int8; it must be uint8, float8_e4m3fn"):
        kernels.dequantize_e4m3(ALL_CODES.view(torch.int8), 1.0, backend=backend.name)
    with pytest.raises(InputError, match="scale is 0"):
        kernels.dequantize_e4m3(ALL_CODES, 0.0, backend=backend.name)
    with pytest.raises(InputError, match=r"dtype is torch\.float64"):
        kernels.dequantize_e4m3(ALL_CODES, 1.0, torch.float64, backend=backend.name)
