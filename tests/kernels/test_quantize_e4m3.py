"""Rounding weights to codepoints: every byte counts."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from hswq import kernels
from hswq.errors import InputError
from tests import oracle
from tests.conftest import Backend
from tests.kernels import cases

OP = "quantize_e4m3"
# A plain FP8 file, a common scale, no power of two, quotients that overflow or become subnormal.
SCALES = (1.0, 0.07 / 448, 3.0, 2.0**-12, 1e30, 1e-38)


def column(value: float | Tensor, w: Tensor) -> np.ndarray:
    """Return amax or scale so that numpy broadcasts it against w."""
    if isinstance(value, float) or value.numel() == 1:
        return np.float32(value)
    return value.numpy().reshape(-1, *[1] * (w.dim() - 1))


def check(w: Tensor, amax: float | Tensor, scale: float | Tensor, backend: Backend) -> None:
    codes = kernels.quantize_e4m3(w.to(backend.device), amax, scale, backend=backend.name)
    expected = oracle.quantize(cases.to_numpy(w), column(amax, w), column(scale, w))
    assert codes.dtype == torch.uint8
    np.testing.assert_array_equal(codes.cpu().numpy(), expected)


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("dtype", cases.SIXTEEN_BIT)
def test_every_16_bit_value_rounds_to_the_nearest_code(
    dtype: torch.dtype, scale: float, backend: Backend
) -> None:
    """All 65,536 patterns: zeros, subnormals, ties, overflow, Inf and NaN."""
    check(cases.all_patterns(dtype), cases.FLOAT32_MAX, scale, backend)
    check(cases.all_patterns(dtype), 300.0 * min(scale, 1.0), scale, backend)


@pytest.mark.parametrize("scale", [1.0, 0.25, 0.07 / 448])
def test_midpoints_go_to_the_even_code(scale: float, backend: Backend) -> None:
    """Half of all ties would move by one code if they were rounded away from zero or truncated."""
    midpoints = torch.tensor(oracle.MIDPOINTS, dtype=torch.float32) * scale
    around = [
        midpoints,
        torch.nextafter(midpoints, torch.zeros(1)),
        torch.nextafter(midpoints, torch.full((1,), math.inf)),
    ]
    values = torch.cat([*around, *(-part for part in around)])
    check(values, cases.FLOAT32_MAX, scale, backend)


@pytest.mark.parametrize("scale", [*SCALES, 3e-40])
def test_random_float32_bits_round_to_the_nearest_code(scale: float, backend: Backend) -> None:
    """Division or clipping could differ anywhere in float32's range: all exponents occur here."""
    w = cases.random_bits(1 << 13)
    check(w, cases.FLOAT32_MAX, scale, backend)
    check(w, 1e-3, scale, backend)


def test_overflow_saturates_and_nan_keeps_its_sign(backend: Backend) -> None:
    """torch's own cast gave NaN above 464 in older releases; a file must not depend on that."""
    w = torch.tensor([448.0, 463.9, 464.0, 465.0, 1e4, math.inf, math.nan], device=backend.device)
    nan = torch.tensor([-1], dtype=torch.int32).view(torch.float32).to(backend.device)
    codes = kernels.quantize_e4m3(
        torch.cat((w, -w[:6], nan)), cases.FLOAT32_MAX, 1.0, backend=backend.name
    )
    assert codes.tolist() == [0x7E] * 6 + [0x7F] + [0xFE] * 6 + [0xFF]


@pytest.mark.parametrize("numel", [1, 3, 17])
def test_every_float16_nan_keeps_its_sign(numel: int, backend: Backend) -> None:
    """Torch's conversion drops it where a tensor ends between its vectors."""
    for bits, code in ((-511, 0xFF), (-1, 0xFF), (0x7E01, 0x7F), (0x7FFF, 0x7F)):
        w = torch.full((numel,), bits, dtype=torch.int16).view(torch.float16).to(backend.device)
        codes = kernels.quantize_e4m3(w, 1.0, 1.0, backend=backend.name)
        assert codes.tolist() == [code] * numel


def test_clip_keeps_values_at_amax(backend: Backend) -> None:
    """A weight equal to amax is not clipped away: it is the largest codepoint that survives."""
    w = torch.tensor([-3.5, 3.5, 3.6, 100.0], device=backend.device)
    codes = kernels.quantize_e4m3(w, 3.5, 1.0, backend=backend.name)
    assert codes.tolist() == [0xC6, 0x46, 0x46, 0x46]


def test_amax_of_zero_leaves_the_sign(backend: Backend) -> None:
    """An all-zero tensor gets amax 0; its -0 must stay what the source file says."""
    w = torch.tensor([0.0, -0.0, 5.0, -5.0, 1e-45, -math.inf], device=backend.device)
    codes = kernels.quantize_e4m3(w, 0.0, 1.0, backend=backend.name)
    assert codes.tolist() == [0x00, 0x80, 0x00, 0x80, 0x00, 0x80]


def test_scale_divides(backend: Backend) -> None:
    """Multiplying by the reciprocal moves codepoints: peers' backends disagree by up to 6 %."""
    scale = np.float32(0.0371 / 448)
    midpoints = np.array(oracle.MIDPOINTS, dtype=np.float32) * scale
    w = np.concatenate([midpoints, np.nextafter(midpoints, np.float32(1))])
    product = oracle.encode(w * (np.float32(1) / scale))
    assert (product != oracle.encode(w / scale)).any(), "the case shows no difference"
    check(torch.from_numpy(w), 1.0, float(scale), backend)


def test_16_bit_weights_are_divided_in_float32(backend: Backend) -> None:
    """The seed project multiplies in float16 and so rounds twice."""
    w = cases.normal(4096, sigma=0.02, dtype=torch.float16)
    scale = 0.0843 / 448
    twice = oracle.encode(cases.to_numpy(w * (1 / scale)))
    once = oracle.quantize(cases.to_numpy(w), np.float32(1), np.float32(scale))
    assert (twice != once).any(), "the case shows no difference"
    check(w, 1.0, scale, backend)


@pytest.mark.parametrize(
    "shape", [(), (1,), (31,), (127,), (4097,), (3, 5), (65, 129), (7, 5, 3, 3), (1030, 1023)]
)
@pytest.mark.parametrize("dtype", cases.DTYPES)
def test_odd_shapes_keep_every_element(
    dtype: torch.dtype, shape: tuple[int, ...], backend: Backend
) -> None:
    """Tails of vectors, blocks and pieces are where elements are lost."""
    w = cases.normal(*shape, sigma=0.02, dtype=dtype)
    check(w, 0.05, 0.05 / 448, backend)


@pytest.mark.parametrize("shape", [(1, 7), (5,), (37, 21), (9, 4, 3, 3), (700, 1600)])
def test_each_row_has_its_own_scale(shape: tuple[int, ...], backend: Backend) -> None:
    """A row quantized with its neighbour's scale is lost."""
    w = cases.normal(*shape, sigma=0.02, dtype=torch.bfloat16)
    amax = torch.rand(shape[0], generator=cases.generator(1)) * 0.05
    scale = amax.flip(0) / 448 + 1e-6
    check(w, amax, scale, backend)
    check(w, amax, 1e-4, backend)
    check(w, 0.03, scale, backend)


def test_strided_weights_are_read_in_order(backend: Backend) -> None:
    """Transposed weights come out of model surgery."""
    w = cases.normal(20, 30, 4)
    check(w.transpose(0, 2), 2.0, 0.01, backend)
    check(w[::2, 3:17:5], 2.0, 0.01, backend)
    check(w[:, :, 0].expand(20, 30), 2.0, torch.linspace(0.01, 0.1, 20), backend)


def test_empty_weights_give_no_codes(backend: Backend) -> None:
    """A layer of no rows has no bytes; it is no error."""
    codes = kernels.quantize_e4m3(torch.ones(0, 3), 1.0, 1.0, backend=backend.name)
    assert codes.shape == (0, 3)


@pytest.mark.parametrize(
    ("amax", "scale", "message"),
    [
        (-1.0, 1.0, "amax is -1.0; it must be finite and >= 0"),
        (math.nan, 1.0, "amax is nan"),
        (math.inf, 1.0, "amax is inf"),
        (1.0, 0.0, "scale is 0.0; it must be finite and > 0"),
        (1.0, torch.tensor([1.0, -2.0]), "scale is -2.0"),
        (1.0, "1", "scale is '1'; it must be a number or a float32 tensor"),
        (torch.ones(3), 1.0, r"amax has shape \[3\]; one value per row of 2 rows needs \[2\]"),
        (1.0, torch.ones(2, dtype=torch.float64), "scale is float64; it must be float32"),
    ],
)
def test_bad_arguments_are_refused(
    amax: float | Tensor, scale: float | Tensor, message: str, backend: Backend
) -> None:
    """They would write a tensor of zeros, NaN or another row's codes."""
    with pytest.raises(InputError, match=message):
        kernels.quantize_e4m3(torch.ones(2, 3), amax, scale, backend=backend.name)


def test_integer_weights_are_refused(backend: Backend) -> None:
    """Already quantized bytes must not be quantized again."""
    with pytest.raises(InputError, match="w is uint8"):
        kernels.quantize_e4m3(torch.ones(3, dtype=torch.uint8), 1.0, 1.0, backend=backend.name)
