"""The one place where Triton kernels are launched."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from hswq.kernels.triton_backend._configs import Config


def launch(
    kernel: Any, programs: int, device: torch.device, config: Config, *arguments: torch.Tensor | int
) -> None:
    """Run `kernel` on a one-dimensional grid.

    Products and sums are never contracted to fused multiply-adds: the reference rounds each of
    them, and the bytes must be equal.

    Args:
        kernel: what triton.jit returned.
        programs: size of the grid, >= 1.
        device: where the tensors live; Triton itself would take the current device.
        config: compile-time values and warps.
        arguments: run-time arguments in the kernel's order.
    """
    # A device of any other type than CUDA or HIP changes nothing here. numpy, which computes in
    # the interpreter, warns where a GPU yields Inf or NaN in silence.
    index = device.index if device.type == "cuda" else -1
    with torch.cuda.device(index), np.errstate(all="ignore"):
        kernel[(programs,)](
            *arguments, **config.constants, num_warps=config.num_warps, enable_fp_fusion=False
        )
