"""What the tests of scaled_matmul and scaled_conv2d share: the inputs as used, and the bound."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from tests import oracle
from tests.kernels import cases

COMPUTE = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
ACTIVATIONS: dict[str | None, Callable[[float], float]] = {
    None: lambda v: v,
    "gelu": lambda v: v * 0.5 * (1 + math.erf(v / math.sqrt(2))),
    "gelu_tanh": lambda v: (
        v * 0.5 * (1 + math.tanh(math.sqrt(2 / math.pi) * (v + 0.044715 * v**3)))
    ),
    "silu": lambda v: v / (1 + math.exp(-v)),
}


def used_inputs(x: Tensor, compute: str, input_scale: float | None) -> np.ndarray:
    """Return the float64 values that a layer computes with; x is [rows or images, ...]."""
    if compute == "auto":
        return cases.to_numpy(x).astype(np.float64)
    if compute != "fp8":
        return cases.to_numpy(x.to(COMPUTE[compute])).astype(np.float64)
    values = cases.to_numpy(x)
    largest = np.abs(values).max(axis=tuple(range(1, values.ndim)), keepdims=True)
    scale = largest / np.float32(448)
    scale = np.where(scale > 0, scale, np.float32(1))
    if input_scale is not None:
        scale = np.float32(input_scale)
    codes = oracle.encode(values / scale)
    return oracle.decode(codes).astype(np.float64) * np.asarray(scale, dtype=np.float64)


def check_outputs(
    outputs: Tensor,
    rows: np.ndarray,
    weights: np.ndarray,
    scale: np.ndarray,
    bias: np.ndarray,
    activation: str | None,
    *,
    fp8_units: bool = False,
) -> None:
    """Compare outputs [rows, O] with exact sums of float64 inputs [rows, n] and weights [O, n]."""
    assert outputs.shape == (len(rows), len(weights))
    unit = (weights.shape[1] + 8) * oracle.UNIT32 + (2.0**-12 if fp8_units else 0.0)
    info = torch.finfo(outputs.dtype)
    for r, row in enumerate(rows):
        for o, weight in enumerate(weights):
            products = row * weight * float(scale[o])
            exact = math.fsum([*products, float(bias[o])])
            bound = unit * (math.fsum(abs(products)) + abs(float(bias[o])))
            expected = ACTIVATIONS[activation](exact)
            if activation is not None:
                # The slopes are at most 1.13; 1 + erf and the like are good to 2**-22 absolutely.
                bound = 1.13 * bound + 8 * oracle.UNIT32 * abs(exact)
            rounding = info.eps / 2 * (abs(expected) + bound) + info.smallest_normal * info.eps
            assert abs(float(outputs[r, o]) - expected) <= bound + rounding
