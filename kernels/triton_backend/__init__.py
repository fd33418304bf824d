"""Triton backend: the operations of hswq.kernels as fused GPU kernels (CUDA and HIP).

Importing this package needs neither triton nor a GPU; `unusable_reason` says what is missing.
With TRITON_INTERPRET=1 set before the import, the same kernels run in Triton's interpreter and
accept CPU tensors.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch

# Older ones lack options of triton.jit that keep a result from following alignment.
OLDEST_TRITON = (3, 2)

try:
    import triton

    if tuple(map(int, triton.__version__.split(".")[:2])) < OLDEST_TRITON:
        needed = ".".join(map(str, OLDEST_TRITON))
        raise ImportError(f"it is {triton.__version__}, and {needed} is the oldest that will do")
except ImportError as error:
    _import_error: ImportError | None = error
    OPS: Mapping[str, Callable[..., Any]] = {}
    KERNELS: tuple[Any, ...] = ()
else:
    from hswq.kernels.triton_backend import (
        gram,
        histogram,
        matmul,
        monitor,
        quantize,
        rounding,
        search,
    )
    from hswq.kernels.triton_backend._guard import Guarded

    _import_error = None
    # What this backend implements natively; the dispatcher takes the other operations from the
    # reference. Every op is tested at its first use on a GPU.
    OPS = {
        function.__name__: Guarded(function.__name__, function)
        for function in (
            monitor.moments,
            monitor.channel_abs_mean,
            monitor.monitor,
            histogram.weighted_histogram,
            search.clip_mse,
            search.search_amax,
            quantize.quantize_e4m3,
            quantize.dequantize_e4m3,
            gram.gram,
            rounding.round_compensated,
            rounding.sweep_codes,
            matmul.scaled_matmul,
            matmul.scaled_conv2d,
        )
    }
    # Every kernel with the signatures and configurations it is launched with: what the
    # compilation test and benchmarks/triton_resources.py go through.
    KERNELS = tuple(
        kernel
        for module in (monitor, histogram, search, quantize, gram, rounding, matmul)
        for kernel in module.KERNELS
    )

__all__ = ["KERNELS", "OPS", "self_test", "unusable_reason"]


def unusable_reason() -> str | None:
    """Say why the kernels cannot run in this process, or None where they can.

    Returns:
        The reason as the end of a sentence, without a full stop.
    """
    if _import_error is not None:
        return f"module 'triton' cannot be used: {_import_error}"
    if not _on_gpu():
        # triton.jit read TRITON_INTERPRET when this package was imported and made an
        # interpreted function, which runs wherever torch runs.
        return None
    if not torch.cuda.is_available():
        return (
            "torch finds no CUDA or HIP device, and TRITON_INTERPRET=1 was not set when the "
            "backend was first imported"
        )
    return None


def self_test() -> dict[str, str]:
    """Test what has not been tested yet on the current GPU, or in the interpreter.

    Returns:
        'passed', or 'failed' and why, by op.
    """
    device = torch.device("cuda", torch.cuda.current_device()) if _on_gpu() else torch.device("cpu")
    return {op: guarded.result(device) for op, guarded in OPS.items()}


def _on_gpu() -> bool:
    return isinstance(quantize.quantize_e4m3_kernel, triton.JITFunction)
