"""FP8 layers on a GPU: right, without waits, inside graphs and compiled modules."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from hswq import kernels
from hswq.loader.modules import fp8_layer

pytestmark = pytest.mark.gpu

DTYPES = [torch.float16, torch.bfloat16]


def fp8_model(dtype: torch.dtype, compute: str = "auto") -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(16, 64, 3, padding=1), nn.SiLU(), nn.Flatten(2), nn.Linear(256, 320)
    )
    for number in (0, 3):
        weight = model[number].weight.detach()
        scale = weight.abs().max() / 448
        codes = kernels.quantize_e4m3(weight, scale * 448, scale)
        model[number] = fp8_layer(model[number], codes, scale, model[number].bias, None, compute)
    return model.to("cuda", dtype)


def inputs(dtype: torch.dtype) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(2, 16, 16, 16, generator=generator).to("cuda", dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@torch.no_grad()
def test_output_is_that_of_the_cpu(dtype: torch.dtype) -> None:
    """The same file must show the same image everywhere."""
    model, x = fp8_model(dtype), inputs(dtype)
    exact = copy.deepcopy(model).to("cpu", torch.float32)(x.cpu().float())
    error = (model(x).cpu().float() - exact).norm() / exact.norm()
    assert float(error) <= 4 * torch.finfo(dtype).eps


@torch.no_grad()
def test_fp8_activations_keep_28_db() -> None:
    """What the matrix units of Ada and Hopper drop of a sum must not show."""
    model, x = fp8_model(torch.bfloat16, "fp8"), inputs(torch.bfloat16)
    exact = copy.deepcopy(model)
    for number in (0, 3):
        exact[number].compute = "auto"
    wanted = exact(x).float()
    error = model(x).float() - wanted
    assert float(10 * torch.log10(wanted.square().sum() / error.square().sum())) >= 28.0


@pytest.mark.parametrize("compute", ["auto", "fp8"])
@torch.no_grad()
def test_forward_never_waits(compute: str) -> None:
    """A wait a layer leaves the GPU idle between them."""
    model, x = fp8_model(torch.float16, compute), inputs(torch.float16)
    model(x)
    torch.cuda.set_sync_debug_mode("error")
    try:
        model(x)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("compute", ["auto", "fp8"])
@torch.no_grad()
def test_graphs_and_compiled_modules_compute_the_same(compute: str) -> None:
    """Both are how quick pipelines run."""
    model, x = fp8_model(torch.float16, compute), inputs(torch.float16)
    expected = model(x)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = model(x)
    graph.replay()
    assert torch.equal(captured, expected)
    compiled = torch.compile(model, fullgraph=True)(x)
    torch.testing.assert_close(compiled, expected, rtol=2e-3, atol=2e-3)
