"""The one place where Triton kernels are launched."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
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
    with _place(device):
        kernel[(programs,)](
            *arguments, **config.constants, num_warps=config.num_warps, enable_fp_fusion=False
        )


def _place(device: torch.device) -> AbstractContextManager[Any]:
    """Return the context that a launch needs: mostly none, since contexts take time as well."""
    if device.type != "cuda":
        # numpy, which computes in the interpreter, warns where a GPU yields Inf or NaN in silence.
        return np.errstate(all="ignore")
    if device.index == torch.cuda.current_device():
        return nullcontext()
    return torch.cuda.device(device.index)
