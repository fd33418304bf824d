"""Parts of benchmarks.gpu that concern FP8 layers: products, convolutions, steps of whole models.

`fp16/ours` above 1 means that ours is quicker than torch's product of 16-bit weights.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from benchmarks.gpu_bench import BACKEND, Bench, Row
from benchmarks.make_checkpoint import configuration, filled_module
from benchmarks.monitor import unet_inputs
from benchmarks.timing import rounded
from hswq import kernels
from hswq.formats.e4m3 import E4M3_MAX
from hswq.loader.modules import fp8_layer

# SDXL's large linear layers, and those of Flux.
LINEARS = {
    "sdxl": ((1280, 1280), (10240, 1280), (1280, 5120), (1280, 2048)),
    "flux": ((3072, 3072), (9216, 3072), (12288, 3072), (3072, 12288), (3072, 15360)),
}
ROWS = (1, 16, 64, 1024, 4096)
CONVOLUTIONS = ((320, 320, 128), (640, 640, 64), (1280, 1280, 32), (1280, 2560, 32))
E4M3 = torch.float8_e4m3fn


def quantized(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Return codes and one scale of a weight."""
    scale = weight.abs().max().float() / E4M3_MAX
    codes = kernels.quantize_e4m3(weight, scale * E4M3_MAX, scale, backend=BACKEND)
    return codes, scale


def compare(bench: Bench, sides: dict[str, Callable[[], object]], base: str) -> Row:
    """Time several sides and give each one's ratio to `base`."""
    seconds = {name: bench.seconds(side) for name, side in sides.items()}
    return {
        "median_us": {name: rounded(value * 1e6) for name, value in seconds.items()},
        "ratio": {
            f"{base}/{name}": rounded(seconds[base] / value)
            for name, value in seconds.items()
            if name != base
        },
    }


def fp8_units(bench: Bench) -> bool:
    """Tell whether torch multiplies FP8 here."""
    if bench.device.type != "cuda" or torch.version.hip is not None:
        return False
    return torch.cuda.get_device_capability(bench.device) >= (8, 9)


def products(bench: Bench) -> Iterator[Row]:
    """scaled_matmul, weight-only and with FP8 activations, against F.linear and _scaled_mm."""
    shapes = {"small": ((32, 48),)} if bench.small else LINEARS
    for dtype in (torch.float16, torch.bfloat16):
        for model, layers in shapes.items():
            for outputs, inputs in layers:
                weight = bench.noise(outputs, inputs, dtype=dtype)
                codes, scale = quantized(weight)
                bias = bench.noise(outputs, dtype=dtype)
                for rows in (3,) if bench.small else ROWS:
                    x = bench.noise(rows, inputs, dtype=dtype, deviation=1.0)
                    op = partial(kernels.scaled_matmul, x, codes, scale, bias, backend=BACKEND)
                    sides: dict[str, Callable[[], object]] = {
                        "torch": partial(functional.linear, x, weight, bias),
                        "ours": op,
                        "ours-fp8": partial(op, compute="fp8"),
                    }
                    if fp8_units(bench) and rows >= 16:
                        sides |= scaled_mm_sides(x, codes, scale, bias)
                    yield {
                        "op": "scaled_matmul",
                        "case": f"{model} {rows}x{inputs} by {outputs}",
                        "dtype": str(dtype).removeprefix("torch."),
                        **compare(bench, sides, "torch"),
                    }


def scaled_mm_sides(
    x: Tensor, codes: Tensor, scale: Tensor, bias: Tensor
) -> dict[str, Callable[[], object]]:
    """Return torch's own FP8 product: one scale a tensor, alone and with the rounding of x."""
    weight = codes.view(E4M3).t()

    def rounded_input() -> tuple[Tensor, Tensor]:
        x_scale = x.abs().amax().float() / E4M3_MAX
        return (x / x_scale).clamp(-E4M3_MAX, E4M3_MAX).to(E4M3), x_scale

    x8, x_scale = rounded_input()

    def multiply(x8: Tensor, x_scale: Tensor) -> Tensor:
        y: Tensor = torch._scaled_mm(
            x8, weight, scale_a=x_scale, scale_b=scale, bias=bias, out_dtype=x.dtype
        )
        return y

    return {
        "scaled_mm": partial(multiply, x8, x_scale),
        "scaled_mm+rounding": lambda: multiply(*rounded_input()),
    }


def convolutions(bench: Bench) -> Iterator[Row]:
    """scaled_conv2d against F.conv2d, images contiguous and channels last."""
    dtype = torch.float16
    for channels, outputs, edge in ((8, 8, 4),) if bench.small else CONVOLUTIONS:
        weight = bench.noise(outputs, channels, 3, 3, dtype=dtype)
        codes, scale = quantized(weight)
        x = bench.noise(2, channels, edge, edge, dtype=dtype, deviation=1.0)
        last = {"memory_format": torch.channels_last}
        sides = {
            "torch": partial(functional.conv2d, x, weight, padding=1),
            "torch-channels-last": partial(
                functional.conv2d, x.contiguous(**last), weight.contiguous(**last), padding=1
            ),
            "ours": partial(kernels.scaled_conv2d, x, codes, scale, padding=1, backend=BACKEND),
        }
        yield {
            "op": "scaled_conv2d",
            "case": f"2x{channels}x{edge}x{edge} by {outputs}x{channels}x3x3",
            "dtype": "float16",
            **compare(bench, sides, "torch"),
        }


def in_fp8(module: nn.Module, compute: str) -> nn.Module:
    """Replace every Linear and Conv2d by an FP8 layer with one scale."""
    for name, part in list(module.named_modules()):
        if isinstance(part, nn.Linear | nn.Conv2d):
            codes, scale = quantized(part.weight)
            module.set_submodule(name, fp8_layer(part, codes, scale, part.bias, None, compute))
    return module


def in_layerwise_casting(module: Any) -> nn.Module:
    """Let diffusers keep the weights in FP8 and cast them before each use."""
    module.enable_layerwise_casting(storage_dtype=E4M3, compute_dtype=module.dtype)
    result: nn.Module = module
    return result


SIDES: dict[str, Callable[[Any], nn.Module]] = {
    "16-bit": lambda module: module,
    "layerwise casting": in_layerwise_casting,
    "ours": partial(in_fp8, compute="auto"),
    "ours-fp8": partial(in_fp8, compute="fp8"),
}


def steps(bench: Bench) -> Iterator[Row]:
    """One forward of SDXL's UNet and of Flux's transformer: weights in 16 bits and in FP8."""
    models: dict[str, tuple[Callable[[], nn.Module], dict[str, Any]]] = {
        "sdxl": sdxl(bench),
        "flux": flux(bench),
    }
    for name, (build, inputs) in models.items():
        rows: dict[str, Row] = {}
        for side, change in SIDES.items():
            module = change(build())
            rows[side] = {
                "weight_bytes": sum(it.nbytes for it in [*module.parameters(), *module.buffers()]),
                **forward_times(bench, module, inputs),
            }
            del module
            if bench.device.type == "cuda":
                torch.cuda.empty_cache()
        yield {
            "op": "step",
            "case": name,
            "sides": rows,
            "ratio": {
                f"16-bit/{side} {way}": rounded(rows["16-bit"][way] / row[way])
                for side, row in rows.items()
                for way in ("eager_ms", "graph_ms")
                if side != "16-bit" and way in row and way in rows["16-bit"]
            },
        }


def sdxl(bench: Bench) -> tuple[Callable[[], nn.Module], dict[str, Any]]:
    """Return how SDXL's UNet is built, and inputs: latent 128, batch 2, float16."""
    width, latent = ("tiny", 8) if bench.small else ("sdxl", 128)
    dtype = torch.float32 if bench.small else torch.float16
    inputs = unet_inputs(
        configuration("unet", width),
        2,
        latent,
        lambda shape: torch.randn(shape, device=bench.device).to(dtype),
    )

    def build() -> nn.Module:
        unet = filled_module("unet", width, dtype, seed=0).requires_grad_(False).eval()
        return unet.to(bench.device)

    return build, inputs


def flux(bench: Bench) -> tuple[Callable[[], nn.Module], dict[str, Any]]:
    """Return how Flux.1-dev's transformer is built, and inputs: 1024 pixels, bfloat16."""
    from diffusers import FluxTransformer2DModel

    small = {
        **{"num_layers": 1, "num_single_layers": 1, "attention_head_dim": 16},
        **{"num_attention_heads": 2, "joint_attention_dim": 32, "pooled_projection_dim": 32},
        **{"in_channels": 16, "axes_dims_rope": (4, 4, 8)},
    }
    options = {**(small if bench.small else {}), "guidance_embeds": True}
    dtype = torch.float32 if bench.small else torch.bfloat16
    image, text = (4, 3) if bench.small else (4096, 512)

    def build() -> nn.Module:
        before = torch.get_default_dtype()
        torch.set_default_dtype(dtype)
        try:
            with torch.device(bench.device):
                model: nn.Module = FluxTransformer2DModel(**options)
        finally:
            torch.set_default_dtype(before)
        return model.requires_grad_(False).eval()

    def noise(*shape: int) -> Tensor:
        return bench.noise(*shape, dtype=dtype, deviation=1.0)

    inputs = {
        "hidden_states": noise(1, image, small["in_channels"] if bench.small else 64),
        "encoder_hidden_states": noise(1, text, 32 if bench.small else 4096),
        "pooled_projections": noise(1, 32 if bench.small else 768),
        "timestep": torch.tensor([0.5], device=bench.device, dtype=dtype),
        "guidance": torch.tensor([3.5], device=bench.device, dtype=dtype),
        "txt_ids": torch.zeros(text, 3, device=bench.device),
        "img_ids": torch.zeros(image, 3, device=bench.device),
    }
    return build, inputs


def forward_times(bench: Bench, module: nn.Module, inputs: dict[str, Any]) -> Row:
    """Time forwards, eager and, on CUDA, as replays of a graph, which the host does not slow."""
    seconds = []
    for number in range(2 if bench.small else 6):
        bench.wait()
        begin = time.perf_counter()
        module(**inputs)
        bench.wait()
        if number:
            seconds.append(time.perf_counter() - begin)
    row = {"eager_ms": rounded(statistics.median(seconds) * 1e3)}
    if bench.device.type == "cuda":
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            module(**inputs)
        row["graph_ms"] = rounded(bench._replace(rounds=5).seconds(graph.replay) * 1e3)
    return row
