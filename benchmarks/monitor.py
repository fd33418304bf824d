"""What watching costs: the hooks alone, and a forward of SDXL's UNet with and without them.

    python -m benchmarks.monitor hooks
    python -m benchmarks.monitor forward              # 10.3 GB of random float32 weights
    python -m benchmarks.monitor forward --width tiny # a quick check of the script

`hooks` takes the shapes that one forward shows its hooks from a run without memory, makes tensors
of them and runs `ours` (kernels.monitor, an input that feeds several layers reduced once) and
`seed` (the seed's hook) over all calls, in turn. `forward` times the real UNet, in turn `unhooked`,
with `ours` (hswq.observe) and with the `seed`'s hooks.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from benchmarks.cases import DTYPES, Pool, noise, sdxl_unet
from benchmarks.make_checkpoint import WIDTHS, configuration, filled_module
from benchmarks.record import record
from benchmarks.seed_algorithm import DualMonitor
from benchmarks.timing import (
    Times,
    add_run_options,
    in_turn,
    interleave,
    start_run,
    summary,
    time_once,
)
from hswq import kernels, observe
from hswq.kernels import MonitorAccumulators

TOKENS = 77


class Call(NamedTuple):
    """What one hook sees.

    Attributes:
        dim: channel axis of the input, counted from the end.
        channels: its size.
        x: the input; calls that are fed by the same tensor share the object.
        y: the output.
    """

    dim: int
    channels: int
    x: Tensor
    y: Tensor


def layers_of(module: nn.Module) -> list[nn.Module]:
    """Return every Linear and Conv2d."""
    return [each for each in module.modules() if isinstance(each, nn.Linear | nn.Conv2d)]


def unet_inputs(
    config: dict[str, Any], batch: int, latent: int, make: Callable[[tuple[int, ...]], Tensor]
) -> dict[str, Any]:
    """Return the arguments of one forward; `make` gives a tensor of a shape."""
    pooled = config["projection_class_embeddings_input_dim"] - 6 * config["addition_time_embed_dim"]
    return {
        "sample": make((batch, config["in_channels"], latent, latent)),
        "timestep": make((batch,)).abs(),
        "encoder_hidden_states": make((batch, TOKENS, config["cross_attention_dim"])),
        "added_cond_kwargs": {"text_embeds": make((batch, pooled)), "time_ids": make((batch, 6))},
    }


def calls_of(batch: int, latent: int, dtype: torch.dtype, seed: int) -> list[Call]:
    """Return the calls of one forward of SDXL's UNet, with tensors of their own."""
    unet = sdxl_unet()
    shown: list[tuple[int, Tensor, Tensor]] = []
    for layer in layers_of(unet):
        dim = -3 if isinstance(layer, nn.Conv2d) else -1
        layer.register_forward_hook(
            lambda layer, inputs, output, dim=dim: shown.append((dim, inputs[0], output))
        )
    config = configuration("unet", "sdxl")
    unet(**unet_inputs(config, batch, latent, lambda shape: torch.empty(shape, device="meta")))
    pool = Pool(noise(dtype, seed, deviation=1.0))
    # The list keeps every tensor alive: one identity is one tensor.
    inputs = {id(x): pool.take(x.shape).clone() for _, x, _ in shown}
    return [
        Call(dim, x.shape[dim], inputs[id(x)], pool.take(y.shape).clone()) for dim, x, y in shown
    ]


def watch_calls(calls: list[Call], accumulators: list[MonitorAccumulators]) -> None:
    """Do what hswq.observe does at every call of a forward."""
    reduced: dict[tuple[int, int], Tensor] = {}
    for call, sums in zip(calls, accumulators, strict=True):
        key = id(call.x), call.dim
        reduced[key] = kernels.monitor(
            call.x, call.y, call.dim, sums, reduced.get(key), backend="cpp"
        )


def watch_calls_as_seed(calls: list[Call], monitors: list[DualMonitor]) -> None:
    """Call the seed's hooks."""
    for call, monitor in zip(calls, monitors, strict=True):
        monitor(None, (call.x,), call.y)


def time_hooks(options: argparse.Namespace, run: dict[str, Any]) -> None:
    """Time the hooks of one forward without the forward."""
    calls = calls_of(options.batch, options.latent, DTYPES[options.dtype], options.seed)
    accumulators = [MonitorAccumulators.zeros(call.channels) for call in calls]
    monitors = [DualMonitor() for _ in calls]
    times = interleave(
        {
            "ours": lambda: watch_calls(calls, accumulators),
            "seed": lambda: watch_calls_as_seed(calls, monitors),
        },
        options.rounds,
    )
    once = {id(call.x): call.x.nbytes for call in calls}
    record(
        {
            "op": "monitor",
            "case": f"sdxl, latent {options.latent}, batch {options.batch}",
            "calls": len(calls),
            "distinct_inputs": len(once),
            "input_bytes": sum(call.x.nbytes for call in calls),
            "distinct_input_bytes": sum(once.values()),
            "output_bytes": sum(call.y.nbytes for call in calls),
            "dtype": options.dtype,
            "backend": "cpp",
            **run,
            **summary(times, [("seed", "ours")]),
        }
    )


def seed_hooks(unet: nn.Module, stack: ExitStack) -> None:
    """Hang the seed's hooks on a module until the stack is left."""
    for layer in layers_of(unet):
        stack.callback(layer.register_forward_hook(DualMonitor()).remove)


def hooked(unet: nn.Module, side: str) -> ExitStack:
    """Return a context in which the module carries a side's hooks."""
    stack = ExitStack()
    if side == "ours":
        stack.enter_context(observe(unet, backend="cpp"))
    elif side == "seed":
        seed_hooks(unet, stack)
    return stack


def time_forward(options: argparse.Namespace, run: dict[str, Any]) -> None:
    """Time forwards of a UNet with random weights."""
    dtype = DTYPES[options.dtype]
    unet = filled_module("unet", options.width, dtype, options.seed).requires_grad_(False).eval()
    generator = torch.Generator().manual_seed(options.seed)
    config = configuration("unet", options.width)
    inputs = unet_inputs(
        config,
        options.batch,
        options.latent,
        lambda shape: torch.randn(shape, generator=generator).to(dtype),
    )
    sides = dict.fromkeys(("unhooked", "ours", "seed"), lambda: unet(**inputs))
    times: Times = {name: [] for name in sides}
    for number in range(-1, options.rounds):
        for name, forward in in_turn(sides, number):
            with hooked(unet, name):
                # Hooks stay for all steps of a sample: the first makes the sums, and is not timed.
                forward()
                seconds = time_once(forward)
            if number >= 0:
                times[name].append(seconds)
    row = summary(times, [("ours", "unhooked"), ("seed", "unhooked")])
    overhead = {
        name: round(100 * (row["ratio"][f"{name}/unhooked"] - 1), 2) for name in ("ours", "seed")
    }
    record(
        {
            "op": "observe",
            "case": f"{options.width}, latent {options.latent}, batch {options.batch}",
            "layers": len(layers_of(unet)),
            "dtype": options.dtype,
            "backend": "cpp",
            **run,
            **row,
            "overhead_percent": overhead,
        }
    )


def main() -> None:
    """Run one of the two measurements."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True)
    for name, measure, dtype, rounds in (
        ("hooks", time_hooks, "bf16", 15),
        ("forward", time_forward, "fp32", 7),
    ):
        command = commands.add_parser(name, help=measure.__doc__)
        command.set_defaults(measure=measure)
        command.add_argument("--dtype", choices=tuple(DTYPES), default=dtype)
        command.add_argument("--latent", type=int, default=32)
        command.add_argument("--batch", type=int, default=2)
        add_run_options(command, rounds=rounds)
        if name == "forward":
            command.add_argument("--width", choices=WIDTHS, default="sdxl")
    options = parser.parse_args()
    options.measure(options, start_run(options.threads))


if __name__ == "__main__":
    main()
