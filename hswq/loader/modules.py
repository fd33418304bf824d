"""nn.Linear and nn.Conv2d on FP8 weights: codepoints and scales as buffers, no 16-bit copy."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from hswq import kernels
from hswq.errors import InputError
from hswq.loader import ops

COMPUTE = ("auto", "fp32", "bf16", "fp16", "fp8")
# Below so many rows a product is bound by reading the weights, which are FP8 in any case: there
# 16-bit activations cost nothing. Time embeddings, modulation and pooled text have a row an image.
FP8_LEAST_ROWS = 32

_CODES = torch.float8_e4m3fn


def check_compute(compute: str) -> None:
    """Raise InputError unless this is one of COMPUTE."""
    if compute not in COMPUTE:
        raise InputError(f"compute is {compute!r}; it must be one of {', '.join(COMPUTE)}.")


class _Fp8Weight(nn.Module):
    """What Linear and Conv2d share.

    Attributes:
        weight: float8_e4m3fn codepoints in the shape of the original weight; a buffer.
        scale: float32 [1], or [O] with one a row; a buffer. w = decode(weight) * scale.
        input_scale: float32 [] for static FP8 activations, or None; a buffer.
        bias: parameter without gradient, or None.
        compute: 'auto' (the input's dtype), 'fp32', 'bf16', 'fp16', or 'fp8' activations.
        compute_dtype: the dtype that the weight would have; what adapters are made in.
    """

    weight: Tensor
    scale: Tensor
    input_scale: Tensor | None
    bias: Any
    compute: str

    def _hold(
        self,
        codes: Tensor,
        scale: Tensor,
        bias: Tensor | None,
        input_scale: Tensor | None,
        compute: str,
        dtype: torch.dtype,
    ) -> None:
        """Put buffers and bias in the place of what nn.Linear or nn.Conv2d made on meta."""
        check_compute(compute)
        del self.weight, self.bias
        self.register_buffer("weight", codes.view(_CODES))
        self.register_buffer("scale", scale)
        self.register_buffer("input_scale", input_scale)
        self.bias = None if bias is None else nn.Parameter(bias.detach(), requires_grad=False)
        self.compute = compute
        # Without elements, it goes through every conversion that the module goes through.
        self._dtype_of_weight = torch.empty(0, dtype=dtype, device=codes.device)

    @property
    def compute_dtype(self) -> torch.dtype:
        """The dtype of the 16- or 32-bit weight that this layer stands for."""
        return self._dtype_of_weight.dtype

    def dequantize(self) -> Tensor:
        """Return the weight, float32: decode(weight) * scale."""
        scale = self.scale if self.scale.numel() > 1 else self.scale.reshape(())
        return kernels.dequantize_e4m3(self.weight, scale, torch.float32)

    def to_float(self) -> nn.Linear | nn.Conv2d:
        """Return nn.Linear or nn.Conv2d with the dequantized weight in `compute_dtype`."""
        weight = self.dequantize().to(self.compute_dtype)
        bias = self.bias is not None
        layer: nn.Linear | nn.Conv2d
        if isinstance(self, nn.Linear):
            layer = nn.Linear(self.in_features, self.out_features, bias, device="meta")
        else:
            assert isinstance(self, nn.Conv2d)
            layer = nn.Conv2d(
                self.in_channels,
                self.out_channels,
                self.kernel_size,  # type: ignore[arg-type]
                self.stride,  # type: ignore[arg-type]
                self.padding,  # type: ignore[arg-type]
                self.dilation,  # type: ignore[arg-type]
                self.groups,
                bias,
                self.padding_mode,
                device="meta",
            )
        layer.weight = nn.Parameter(weight, requires_grad=False)
        layer.bias = self.bias
        return layer.train(self.training)

    def _codes(self) -> Tensor:
        # As bytes: few operations of torch, its own checks of operators included, know FP8.
        return self.weight.view(torch.uint8)

    def _compute_for(self, rows: int) -> str:
        return "auto" if self.compute == "fp8" and rows < FP8_LEAST_ROWS else self.compute

    def _static_scale(self, compute: str) -> Tensor | None:
        return self.input_scale if compute == "fp8" else None

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        held = {id(buffer): buffer for buffer in self._buffers.values() if buffer is not None}

        def keeping_dtype(tensor: Tensor) -> Tensor:
            return _moved(fn, tensor) if id(tensor) in held else fn(tensor)

        super()._apply(keeping_dtype, recurse)  # type: ignore[no-untyped-call]
        self._dtype_of_weight = fn(self._dtype_of_weight)
        return self

    def __getstate__(self) -> dict[str, Any]:
        # pickle knows no FP8 storage; bytes it does.
        state = self.__dict__.copy()
        state["_buffers"] = {**self._buffers, "weight": self._codes()}
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        self._buffers["weight"] = self.weight.view(_CODES)

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, metadata: Any, *rest: Any
    ) -> None:
        errors: list[str] = rest[-1]
        codes = state_dict.get(prefix + "weight")
        if codes is not None and codes.dtype not in (_CODES, torch.uint8):
            errors.append(
                f"{prefix}weight is {codes.dtype}: this layer holds FP8 codepoints. Use "
                "hswq.load_quantized, or hswq.quantize_module on a 16-bit module."
            )
            return
        # One scale or one a row, a static input scale or none: the state dict's own form counts.
        for name in ("scale", "input_scale"):
            value, held = state_dict.get(prefix + name), self._buffers[name]
            if value is not None and (held is None or held.shape != value.shape):
                self._buffers[name] = torch.ones_like(value, device=self.weight.device)
        if prefix + "input_scale" not in state_dict:
            self.input_scale = None
        super()._load_from_state_dict(state_dict, prefix, metadata, *rest)


class Linear(_Fp8Weight, nn.Linear):
    """Linear layer on FP8 weights: y = x W^T + bias with W = decode(weight) * scale.

    Made by `hswq.load_quantized` and `hswq.quantize_module`. State dict keys are those of the hswq
    container: weight, scale, bias and, where there is one, input_scale. `.to()` and `.half()` move
    weight and scales but never change their dtype. It has no gradient; adapters on top may.

    Args:
        in_features: as in nn.Linear.
        out_features: as in nn.Linear.
        bias: as in nn.Linear; zeros until one is loaded.
        device: where buffers and bias lie.
        dtype: of the bias, and `compute_dtype`.
        compute: see `hswq.load_quantized`.
    Raises:
        InputError: compute is no such name.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        device: Any = None,
        dtype: torch.dtype | None = None,
        *,
        compute: str = "auto",
    ) -> None:
        super().__init__(in_features, out_features, bias, device="meta")
        self._hold(*_blank((out_features, in_features), bias, device, dtype, compute))

    def forward(self, input: Tensor) -> Tensor:
        """Apply the layer.

        Args:
            input: floating point [..., in_features].
        Returns:
            dtype of the input, [..., out_features].
        """
        compute = self._compute_for(input.numel() // max(1, self.in_features))
        result: Tensor = ops.scaled_linear(
            input, self._codes(), self.scale, self.bias, self._static_scale(compute), compute
        )
        return result


class Conv2d(_Fp8Weight, nn.Conv2d):
    """Convolution on FP8 weights; otherwise as `hswq.Linear`. Arguments are those of nn.Conv2d."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: Any,
        stride: Any = 1,
        padding: Any = 0,
        dilation: Any = 1,
        groups: int = 1,
        bias: bool = True,
        padding_mode: Any = "zeros",
        device: Any = None,
        dtype: torch.dtype | None = None,
        *,
        compute: str = "auto",
    ) -> None:
        super().__init__(
            in_channels,
            out_channels,
            kernel_size,
            stride,
            padding,
            dilation,
            groups,
            bias,
            padding_mode,
            device="meta",
        )
        shape = (out_channels, in_channels // groups, *self.kernel_size)
        self._hold(*_blank(shape, bias, device, dtype, compute))

    def forward(self, input: Tensor) -> Tensor:
        """Apply the layer.

        Args:
            input: floating point [B, C, H, W] or [C, H, W].
        Returns:
            dtype of the input, [B, O, H', W'] or [O, H', W'], contiguous.
        """
        padding = self.padding
        if self.padding_mode != "zeros" or isinstance(padding, str):
            mode = "constant" if self.padding_mode == "zeros" else self.padding_mode
            input = functional.pad(input, self._reversed_padding_repeated_twice, mode=mode)
            padding = (0, 0)
        compute = self._compute_for(input.numel() // max(1, self.in_channels))
        result: Tensor = ops.scaled_conv2d(
            input,
            self._codes(),
            self.scale,
            self.bias,
            self._static_scale(compute),
            compute,
            self.stride,
            padding,
            self.dilation,
            self.groups,
        )
        return result


def fp8_layer(
    layer: nn.Module,
    codes: Tensor,
    scale: Tensor,
    bias: Tensor | None,
    input_scale: Tensor | None = None,
    compute: str = "auto",
) -> Linear | Conv2d:
    """Return the FP8 layer that takes the place of an nn.Linear or nn.Conv2d.

    Args:
        layer: the layer; its weight may lie on meta.
        codes: uint8 or float8_e4m3fn, shape of its weight.
        scale: float32 [] or [1], or [O].
        bias: as the new layer has it; None for none.
        input_scale: float32 [], or None.
        compute: one of COMPUTE.
    """
    found: Linear | Conv2d
    if isinstance(layer, nn.Linear):
        found = Linear(layer.in_features, layer.out_features, device="meta", compute=compute)
    elif isinstance(layer, nn.Conv2d):
        found = Conv2d(
            layer.in_channels,
            layer.out_channels,
            layer.kernel_size,
            layer.stride,
            layer.padding,
            layer.dilation,
            layer.groups,
            padding_mode=layer.padding_mode,
            device="meta",
            compute=compute,
        )
    else:
        raise InputError(f"{type(layer).__name__} is neither nn.Linear nor nn.Conv2d.")
    dtype = layer.compute_dtype if isinstance(layer, _Fp8Weight) else layer.weight.dtype
    if bias is not None:
        dtype = bias.dtype
    found._hold(codes, scale.reshape(-1), bias, input_scale, compute, dtype)
    return found.train(layer.training)


def _blank(
    shape: tuple[int, ...],
    bias: bool,
    device: Any,
    dtype: torch.dtype | None,
    compute: str,
) -> tuple[Tensor, Tensor, Tensor | None, None, str, torch.dtype]:
    dtype = torch.get_default_dtype() if dtype is None else dtype
    codes = torch.zeros(shape, dtype=torch.uint8, device=device)
    scale = torch.ones(1, dtype=torch.float32, device=device)
    zeros = torch.zeros(shape[0], dtype=dtype, device=device) if bias else None
    return codes, scale, zeros, None, compute, dtype


def _moved(fn: Callable[[Tensor], Tensor], tensor: Tensor) -> Tensor:
    """Apply a conversion of a module to a tensor whose dtype must stay: only its device may change.

    Seen as integers it passes all that Module.half() and .to(dtype) do to floating point tensors.
    """
    as_integers = torch.uint8 if tensor.dtype == _CODES else torch.int32
    moved = fn(tensor.view(as_integers))
    if moved.dtype != as_integers:
        # Module.type() converts integers too.
        return tensor.to(moved.device)
    # In another memory format the codes would be brought back into order at every call.
    return moved.contiguous().view(tensor.dtype)
