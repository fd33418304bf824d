"""Triton backend: the operations of hswq.kernels as fused GPU kernels (CUDA and HIP).

Importing this package needs neither triton nor a GPU; `unusable_reason` says what is missing.
With TRITON_INTERPRET=1 set before the import, the same kernels run in Triton's interpreter and
accept CPU tensors.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

try:
    import triton
except ImportError as error:
    _import_error: ImportError | None = error
    OPS: dict[str, Callable[..., Any]] = {}
    KERNELS: tuple[Any, ...] = ()
else:
    from hswq.kernels.triton_backend import quantize

    _import_error = None
    # What this backend implements natively; the dispatcher takes the other operations from the
    # reference.
    OPS = {
        "quantize_e4m3": quantize.quantize_e4m3,
        "dequantize_e4m3": quantize.dequantize_e4m3,
    }
    # Every kernel with the signatures and configurations it is launched with: what the
    # compilation test and benchmarks/triton_resources.py go through.
    KERNELS = quantize.KERNELS

__all__ = ["KERNELS", "OPS", "unusable_reason"]


def unusable_reason() -> str | None:
    """Say why the kernels cannot run in this process, or None where they can.

    Returns:
        The reason as the end of a sentence, without a full stop.
    """
    if _import_error is not None:
        return f"module 'triton' cannot be imported: {_import_error}"
    if not isinstance(quantize.quantize_e4m3_kernel, triton.JITFunction):
        # triton.jit read TRITON_INTERPRET when this package was imported and made an
        # interpreted function, which runs wherever torch runs.
        return None
    if not torch.cuda.is_available():
        return (
            "torch finds no CUDA or HIP device, and TRITON_INTERPRET=1 was not set when the "
            "backend was first imported"
        )
    return None
