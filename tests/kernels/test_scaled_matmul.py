"""Linear layers on FP8 weights."""

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

OP = "scaled_matmul"


def random_codes(*shape: int, seed: int = 0) -> Tensor:
    """Return finite codes of all magnitudes."""
    codes = torch.randint(0, 127, shape, dtype=torch.uint8, generator=cases.generator(seed))
    signs = torch.randint(0, 2, shape, dtype=torch.uint8, generator=cases.generator(seed + 1))
    return codes | (signs << 7)


def check(
    x: Tensor,
    codes: Tensor,
    scale: float | Tensor,
    bias: Tensor | None,
    backend: Backend,
    *,
    input_scale: float | None = None,
    compute: str = "auto",
    activation: str | None = None,
) -> None:
    y = kernels.scaled_matmul(
        x.to(backend.device),
        codes.to(backend.device),
        scale,
        None if bias is None else bias.to(backend.device),
        input_scale=input_scale,
        compute=compute,
        activation=activation,
        backend=backend.name,
    )
    outputs = len(codes)
    assert (y.dtype, y.shape) == (x.dtype, (*x.shape[:-1], outputs))
    layers.check_outputs(
        y.cpu().reshape(-1, outputs),
        layers.used_inputs(x.reshape(-1, x.shape[-1]), compute, input_scale),
        oracle.decode(codes.view(torch.uint8).numpy()).astype(np.float64),
        np.broadcast_to(np.float32(scale), outputs),
        np.zeros(outputs) if bias is None else cases.to_numpy(bias),
        activation,
        fp8_units=compute == "fp8" and backend.device.type == "cuda",
    )


@pytest.mark.parametrize("compute", ["auto", "fp32", "bf16", "fp16", "fp8"])
@pytest.mark.parametrize("dtype", cases.DTYPES)
@pytest.mark.parametrize(
    ("shape", "outputs"), [((3, 16), 16), ((1,), 1), ((2, 5, 37), 7), ((33, 127), 5), ((4, 64), 31)]
)
def test_outputs_are_within_their_bound(
    shape: tuple[int, ...], outputs: int, dtype: torch.dtype, compute: str, backend: Backend
) -> None:
    """16-bit sums, a scale rounded to 16 bits or a lost tail would be outside."""
    x = cases.normal(*shape, sigma=2.0, dtype=dtype)
    bias = cases.normal(outputs, dtype=dtype, seed=2)
    codes = random_codes(outputs, shape[-1])
    check(x, codes, 0.0123 / 448, bias, backend, compute=compute)


def test_rows_of_the_weight_have_their_own_scale(backend: Backend) -> None:
    """Files with one scale per row exist; a neighbour's scale is a wrong row."""
    x, codes = cases.normal(5, 40, dtype=torch.bfloat16), random_codes(23, 40)
    scale = torch.rand(23, generator=cases.generator()) * 1e-3 + 1e-5
    check(x, codes, scale, None, backend)
    check(x, codes, scale, None, backend, compute="fp8")


@pytest.mark.parametrize("activation", ["gelu", "gelu_tanh", "silu"])
def test_activations_are_the_named_ones(activation: str, backend: Backend) -> None:
    """The two GELUs differ by 1e-3; models are trained with one of them."""
    x, codes = cases.normal(9, 32), random_codes(17, 32)
    bias = torch.linspace(-9, 9, 17)
    check(x, codes, 1e-3, bias, backend, activation=activation)


@pytest.mark.parametrize("dtype", cases.DTYPES)
def test_fp8_activations_use_the_given_or_their_own_scale(
    dtype: torch.dtype, backend: Backend
) -> None:
    """Without a scale of its own, a row of outliers or of tiny values clips or vanishes."""
    x = cases.normal(6, 32, dtype=dtype) * torch.logspace(-3, 3, 6)[:, None].to(dtype)
    x[2] = 0.0
    codes = random_codes(8, 32)
    check(x, codes, 0.01, None, backend, compute="fp8")
    check(x, codes, 0.01, None, backend, compute="fp8", input_scale=0.05)


def test_strided_inputs_and_float8_weights_are_taken(backend: Backend) -> None:
    """Loaders hold float8_e4m3fn, and attention hands on transposed activations."""
    x, codes = cases.normal(12, 4, 20, dtype=torch.float16), random_codes(6, 20)
    check(x.transpose(0, 1), codes.view(torch.float8_e4m3fn), 0.01, None, backend)
    check(x[::3, 1:, :], random_codes(20, 6).T, 0.01, None, backend)


def test_empty_batch_gives_an_empty_output(backend: Backend) -> None:
    """Some pipelines run a layer on no tokens."""
    y = kernels.scaled_matmul(torch.ones(2, 0, 5), random_codes(3, 5), 1.0, backend=backend.name)
    assert y.shape == (2, 0, 3)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"compute": "fp4"}, "compute is 'fp4'; it must be one of auto, fp32, bf16, fp16, fp8"),
        ({"activation": "relu"}, "activation is 'relu'; it must be one of None, gelu"),
        ({"input_scale": 1.0}, "input_scale is for compute 'fp8', not 'fp32'"),
        ({"compute": "fp8", "input_scale": 0.0}, "input_scale is 0"),
        ({"bias": torch.ones(5)}, r"bias has shape \[5\]"),
        ({"codes": random_codes(3, 5)}, r"x \[2, 4\] and codes \[3, 5\] do not fit"),
        ({"codes": torch.ones(3, 4)}, "codes is float32; it must be uint8"),
        ({"x": torch.ones(2, 4).double()}, "x is float64"),
        ({"scale": torch.ones(2)}, r"scale has shape \[2\]"),
    ],
)
def test_bad_arguments_are_refused(
    options: dict[str, object], message: str, backend: Backend
) -> None:
    """A silent broadcast or a default would compute something else."""
    arguments = {"x": torch.ones(2, 4), "codes": random_codes(3, 4), "scale": 1.0, **options}
    with pytest.raises(InputError, match=message):
        kernels.scaled_matmul(**arguments, backend=backend.name)
