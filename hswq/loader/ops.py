"""The layers' products as operators of torch: traced by torch.compile, refused by autograd.

A plain inference call goes to the kernels directly: a model makes hundreds of them a step.
"""

from __future__ import annotations

from typing import Any, NoReturn

import torch
from torch import Tensor

from hswq import kernels
from hswq.errors import InputError

_LINEAR = (
    "(Tensor x, Tensor codes, Tensor scale, Tensor? bias, Tensor? input_scale, str compute) "
    "-> Tensor"
)
_CONV2D = (
    "(Tensor x, Tensor codes, Tensor scale, Tensor? bias, Tensor? input_scale, str compute, "
    "int[] stride, int[] padding, int[] dilation, int groups) -> Tensor"
)


def _linear(
    x: Tensor,
    codes: Tensor,
    scale: Tensor,
    bias: Tensor | None,
    input_scale: Tensor | None,
    compute: str,
) -> Tensor:
    return kernels.scaled_matmul(x, codes, scale, bias, input_scale=input_scale, compute=compute)


def _conv2d(
    x: Tensor,
    codes: Tensor,
    scale: Tensor,
    bias: Tensor | None,
    input_scale: Tensor | None,
    compute: str,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
) -> Tensor:
    return kernels.scaled_conv2d(
        x,
        codes,
        scale,
        bias,
        stride=(stride[0], stride[1]),
        padding=(padding[0], padding[1]),
        dilation=(dilation[0], dilation[1]),
        groups=groups,
        input_scale=input_scale,
        compute=compute,
    )


def _fake_linear(x: Tensor, codes: Tensor, *_: Any) -> Tensor:
    return x.new_empty(*x.shape[:-1], codes.shape[0])


def _fake_conv2d(
    x: Tensor,
    codes: Tensor,
    scale: Tensor,
    bias: Tensor | None,
    input_scale: Tensor | None,
    compute: str,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
) -> Tensor:
    size = [
        (x.shape[axis - 2] + 2 * padding[axis] - dilation[axis] * (codes.shape[axis + 2] - 1) - 1)
        // stride[axis]
        + 1
        for axis in (0, 1)
    ]
    return x.new_empty(*x.shape[:-3], codes.shape[0], *size)


def _no_gradient(*_: Any) -> NoReturn:
    raise InputError(
        "an FP8 layer of hswq has no gradient: it is for inference. Run the model under "
        "torch.no_grad(), or train on the 16-bit checkpoint."
    )


for _name, _schema, _function, _fake in (
    ("hswq::scaled_linear", _LINEAR, _linear, _fake_linear),
    ("hswq::scaled_conv2d", _CONV2D, _conv2d, _fake_conv2d),
):
    torch.library.define(_name, _schema)
    torch.library.impl(_name, "default", _function)
    torch.library.register_fake(_name, _fake)
    torch.library.register_autograd(_name, _no_gradient)


def scaled_linear(x: Tensor, *arguments: Any) -> Tensor:
    """Apply hswq::scaled_linear."""
    if _needs_operator(x):
        result: Tensor = torch.ops.hswq.scaled_linear.default(x, *arguments)
        return result
    return _linear(x, *arguments)


def scaled_conv2d(x: Tensor, *arguments: Any) -> Tensor:
    """Apply hswq::scaled_conv2d."""
    if _needs_operator(x):
        result: Tensor = torch.ops.hswq.scaled_conv2d.default(x, *arguments)
        return result
    return _conv2d(x, *arguments)


def _needs_operator(x: Tensor) -> bool:
    """Tell whether somebody traces or differentiates this call.

    Otherwise the dispatcher's way through Python would cost as much as a small product.
    """
    return torch.compiler.is_compiling() or torch.is_grad_enabled() or type(x) is not Tensor
