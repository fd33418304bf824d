"""Convolutions on FP8 weights."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from hswq import kernels
from hswq.errors import InputError
from tests import oracle
from tests.conftest import Backend
from tests.kernels import cases, layers
from tests.kernels.test_gram import GEOMETRIES, Pair
from tests.kernels.test_scaled_matmul import random_codes

OP = "scaled_conv2d"


def check(
    x: Tensor,
    codes: Tensor,
    backend: Backend,
    *,
    scale: float | Tensor = 0.0123 / 448,
    geometry: tuple[Pair, Pair, Pair] = ((1, 1), (0, 0), (1, 1)),
    groups: int = 1,
    input_scale: float | None = None,
    compute: str = "auto",
    activation: str | None = None,
) -> None:
    outputs, _, *kernel = codes.shape
    stride, padding, dilation = geometry
    bias = cases.normal(outputs, dtype=x.dtype, seed=3)
    y = kernels.scaled_conv2d(
        x.to(backend.device),
        codes.to(backend.device),
        scale,
        bias.to(backend.device),
        stride=stride,
        padding=padding,
        dilation=dilation,
        groups=groups,
        input_scale=input_scale,
        compute=compute,
        activation=activation,
        backend=backend.name,
    )
    images = x if x.dim() == 4 else x[None]
    patches = oracle.patches(
        layers.used_inputs(images, compute, input_scale), tuple(kernel), stride, padding, dilation
    )
    batch, height, width, _ = patches.shape
    assert y.dtype == x.dtype
    assert y.shape == (*x.shape[:-3], outputs, height, width)
    rows = y.cpu().reshape(batch, outputs, -1).mT.reshape(-1, outputs)
    weights = oracle.decode(codes.numpy()).astype(np.float64).reshape(outputs, -1)
    scales = np.broadcast_to(np.float32(scale), outputs)
    columns = patches.reshape(len(rows), groups, -1)
    size = outputs // groups
    for group in range(groups):
        part = slice(group * size, (group + 1) * size)
        layers.check_outputs(
            rows[:, part],
            columns[:, group],
            weights[part],
            scales[part],
            cases.to_numpy(bias)[part],
            activation,
            fp8_units=compute == "fp8" and backend.device.type == "cuda",
        )


@pytest.mark.parametrize(("kernel", "stride", "padding", "dilation"), GEOMETRIES)
@pytest.mark.parametrize("groups", [1, 2])
def test_geometry_is_that_of_conv2d(
    groups: int, kernel: Pair, stride: Pair, padding: Pair, dilation: Pair, backend: Backend
) -> None:
    """A shifted border or swapped axis keeps the shape and ruins the image."""
    x = cases.normal(2, 4, 7, 6, dtype=torch.float16)
    codes = random_codes(6, 4 // groups, *kernel)
    check(x, codes, backend, geometry=(stride, padding, dilation), groups=groups)


@pytest.mark.parametrize("compute", ["auto", "fp32", "bf16", "fp16", "fp8"])
@pytest.mark.parametrize("dtype", cases.DTYPES)
def test_outputs_are_within_their_bound(dtype: torch.dtype, compute: str, backend: Backend) -> None:
    """16-bit sums or a scale rounded to 16 bits would be outside."""
    x = (
        cases.normal(2, 5, 4, 5, sigma=2.0, dtype=dtype)
        * torch.tensor([1, 50])[:, None, None, None]
    )
    x = x.to(dtype)
    geometry = ((1, 1), (1, 1), (1, 1))
    check(x, random_codes(7, 5, 3, 3), backend, geometry=geometry, compute=compute)


def test_scales_and_activation_are_applied(backend: Backend) -> None:
    """One scale per row, a static input scale and the epilogue are as in scaled_matmul."""
    x, codes = cases.normal(1, 3, 5, 5, dtype=torch.bfloat16), random_codes(4, 3, 1, 1)
    scale = torch.tensor([1e-3, 2e-4, 5e-3, 7e-5])
    check(x, codes, backend, scale=scale, activation="silu")
    check(x, codes, backend, scale=scale, compute="fp8", input_scale=0.01)


def test_strided_and_single_images_are_taken(backend: Backend) -> None:
    """channels_last is the fast layout on GPUs; nn.Conv2d takes an image without a batch."""
    x, codes = cases.normal(2, 8, 5, 6, dtype=torch.float16), random_codes(3, 8, 3, 3)
    check(x.contiguous(memory_format=torch.channels_last), codes, backend)
    check(x[1], codes, backend)


def test_bad_arguments_are_refused(backend: Backend) -> None:
    """Channels that do not fit would be read from beyond the weight."""
    codes = random_codes(4, 2, 3, 3)
    with pytest.raises(InputError, match=r"codes \[4, 2, 3, 3\] and groups 1 do not fit"):
        kernels.scaled_conv2d(torch.ones(1, 3, 5, 5), codes, 1.0, backend=backend.name)
    with pytest.raises(InputError, match="groups 3 do not fit"):
        kernels.scaled_conv2d(torch.ones(1, 6, 5, 5), codes, 1.0, groups=3, backend=backend.name)
    with pytest.raises(InputError, match=r"kernel \[3, 3\] .* does not fit into an image \[2, 5\]"):
        kernels.scaled_conv2d(torch.ones(1, 2, 2, 5), codes, 1.0, backend=backend.name)
    with pytest.raises(InputError, match="padding is -1; it must be at least 0"):
        kernels.scaled_conv2d(torch.ones(1, 2, 5, 5), codes, 1.0, padding=-1, backend=backend.name)
