"""Ops answer alike whatever the caller made torch's default dtype and device.

Model loaders change both. A buffer of another size or place would be written beyond its end.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from hswq import kernels
from hswq.kernels import MonitorAccumulators
from hswq.search import search_amax
from tests.kernels.cases import normal
from tests.torch_defaults import default_dtype

pytestmark = [
    pytest.mark.usefixtures("extension"),
    pytest.mark.parametrize("name", ["reference", "cpp"]),
]
# More than one tile of scaled_matmul, and results in huge pages.
CODES = torch.arange(4_800_000, dtype=torch.int32).remainder(127).to(torch.uint8)


def answers(name: str) -> dict[str, Tensor]:
    """Return what every op of a backend answers."""
    x, w = INPUTS["x"], INPUTS["w"]
    found: dict[str, Tensor] = {
        "moments": kernels.moments(x, backend=name),
        "channel_abs_mean": kernels.channel_abs_mean(x, -1, backend=name),
        "quantize": kernels.quantize_e4m3(w, 0.05, 0.05 / 448, backend=name),
        "dequantize": kernels.dequantize_e4m3(CODES, 0.5, torch.bfloat16, backend=name),
    }
    sums = MonitorAccumulators.zeros(640)
    kernels.monitor(x, x, -1, sums, backend=name)
    found["monitor"] = sums.abs_mean
    hist, max_abs = kernels.weighted_histogram(w, None, 128, backend=name)
    found |= {"hist": hist, "max_abs": max_abs}
    found["clip_mse"] = kernels.clip_mse(hist, max_abs, max_abs[None], True, backend=name)
    found["search"], _ = kernels.search_amax(hist, max_abs, True, 10, 1, backend=name)
    found["gram"] = INPUTS["accumulator"].clone()
    kernels.gram(x, found["gram"], backend=name)
    found["round"] = kernels.round_compensated(
        w, INPUTS["upper"], 0.05 / 448, INPUTS["order"], backend=name
    )
    found["slope"], found["swept"] = INPUTS["slope"].clone(), CODES[: 16 * 640].reshape(16, 640)
    found["swept"] = found["swept"].clone()
    found["steps"] = kernels.sweep_codes(
        found["slope"], found["swept"], INPUTS["second"], 0.05, backend=name
    )
    for dtype in (torch.float32, torch.bfloat16):
        found[f"matmul {dtype}"] = kernels.scaled_matmul(
            x.to(dtype), CODES.reshape(7500, 640), 0.01, backend=name
        )
    found["conv"] = kernels.scaled_conv2d(
        INPUTS["image"], CODES[: 64 * 8 * 9].reshape(64, 8, 3, 3), 0.01, backend=name
    )
    return found


INPUTS = {
    "x": normal(5, 640),
    "w": normal(7, 16, sigma=0.02),
    "accumulator": torch.zeros(1, 640, 640),
    "upper": torch.eye(16, dtype=torch.float64),
    "order": torch.arange(16),
    "image": normal(1, 8, 6, 6),
    "slope": normal(16, 640),
    "second": torch.eye(16) + 0.01,
}


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_default_dtype_changes_nothing(name: str, dtype: torch.dtype) -> None:
    expected = answers(name)
    with default_dtype(dtype):
        found = answers(name)
    for op, value in expected.items():
        assert torch.equal(found[op], value), op


def test_default_device_changes_nothing(name: str) -> None:
    """On 'meta' an address is 0."""
    expected = answers(name)
    with torch.device("meta"):
        found = answers(name)
    for op, value in expected.items():
        assert torch.equal(found[op], value), op


def test_search_ignores_the_default_device(name: str) -> None:
    weight = INPUTS["w"]
    expected = search_amax(weight, scaled=True, backend=name)
    with torch.device("meta"):
        found = search_amax(weight, scaled=True, backend=name)
        assert found.scale == expected.scale
    assert found == expected
