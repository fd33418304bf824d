"""The argument parser, made from the config dataclasses."""

from __future__ import annotations

import argparse
import dataclasses
import types
import typing
from typing import Any

import hswq
from hswq.config import (
    COMPENSATION,
    CONTAINERS,
    FLOATS,
    PRESETS,
    BenchConfig,
    CalibrationConfig,
    QuantizeConfig,
)

EPILOG = (
    "exit codes: 0 done, 1 input or output refused, 2 usage, 3 backend, 4 internal error, "
    "130 interrupted"
)
# Options of calibration that painting has no use for.
_NOT_OF_BENCH = (
    *("activations", "scaled", "container", "preset", "sensitivity", "rounding"),
    *(*COMPENSATION, "gram_memory", "search", "bins", "candidates", "refinements"),
    *("cpu_offload", "sequential_offload"),
)


def make_parser() -> argparse.ArgumentParser:
    """Build the parser of all commands."""
    parser = argparse.ArgumentParser(
        prog="python -m hswq.fast",
        description="Quantize diffusion checkpoints to FP8 E4M3.",
        epilog=EPILOG,
    )
    parser.add_argument("--version", action="version", version=f"hswq {hswq.__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    quantize = _command(commands, "quantize", "write the FP8 version of a checkpoint")
    _add_paths(quantize, output=None, several=True)
    outputs = quantize.add_mutually_exclusive_group(required=True)
    outputs.add_argument("--output", metavar="FILE", help="the .safetensors file to write")
    outputs.add_argument(
        "--output-dir",
        metavar="DIR",
        help="folder in which NAME-fp8.safetensors is written for each of several checkpoints",
    )
    add_options(quantize, QuantizeConfig)

    calibrate = _command(commands, "calibrate", "run the sampler and save the statistics")
    _add_paths(calibrate, output="the statistics file to write")
    add_options(calibrate, CalibrationConfig)

    plan = _command(commands, "plan", "show what quantize would do; writes nothing")
    _add_paths(plan, output=None)
    plan.add_argument(
        "--plot", metavar="FILE", help="draw predicted error against size, .png or .svg"
    )
    add_options(plan, QuantizeConfig, without=("save_stats", "verify"))

    compare = _command(commands, "compare", "compare two files of one model, layer by layer")
    compare.add_argument("first", help="file of any container, or of 16 or 32 bits")
    compare.add_argument("second", help="the same")
    compare.add_argument(
        "--stats", metavar="FILE", help="statistics, for an estimate of the outputs' errors"
    )

    inspect = _command(commands, "inspect", "describe a checkpoint, statistics file or plan")
    inspect.add_argument("path", help="file or folder")
    inspect.add_argument(
        "--verify", action="store_true", help="read every byte of a checkpoint and check it"
    )
    inspect.add_argument(
        "--against", metavar="SOURCE", help="with --verify: the checkpoint that it was made from"
    )

    bench = _command(commands, "bench", "compare files of one model by what they paint")
    _add_paths(bench, output=None)
    bench.add_argument("files", nargs="+", help="FP8 files made from the checkpoint")
    add_options(bench, BenchConfig, without=_NOT_OF_BENCH)

    convert = _command(commands, "convert", "write an FP8 file in another container")
    _add_paths(convert, output="the .safetensors file to write")
    convert.add_argument(
        "--container", required=True, choices=CONTAINERS, help="file layout to write"
    )
    convert.add_argument(
        "--requantize",
        action="store_true",
        help="encode anew what the container cannot hold; the error is printed",
    )

    dequantize = _command(commands, "dequantize", "write an FP8 file's weights in 16 or 32 bit")
    _add_paths(dequantize, output="the .safetensors file to write")
    dequantize.add_argument(
        "--dtype", default="fp16", choices=FLOATS, help="dtype of the weights (default: fp16)"
    )

    demo = _command(commands, "demo", "quantize the demo checkpoint that hswq ships")
    demo.add_argument("--output", default="demo", metavar="DIR", help="folder for the files")
    demo.add_argument("--preset", default="best", choices=tuple(PRESETS), help="that of quantize")

    _command(commands, "backends", "list the kernel backends, usable or why not")
    return parser


def add_options(
    parser: argparse.ArgumentParser, config: type[CalibrationConfig], without: tuple[str, ...] = ()
) -> None:
    """Add one flag for each field of a config dataclass."""
    hints = typing.get_type_hints(config)
    groups: dict[str, Any] = {}
    for spec in dataclasses.fields(config):
        if spec.name in without:
            continue
        metadata = spec.metadata
        group = groups.get(metadata["group"])
        if group is None:
            group = groups[metadata["group"]] = parser.add_argument_group(metadata["group"])
        flags = ["--" + spec.name.replace("_", "-"), *metadata["aliases"]]
        kind = _base_type(hints[spec.name])
        arguments: dict[str, Any] = {"dest": spec.name, "help": _help(spec)}
        if kind is bool:
            # What a preset may set can be unset.
            optional = argparse.BooleanOptionalAction if spec.default is None else "store_true"
            arguments["action"] = optional
        elif kind is tuple:
            arguments.update(action="append", metavar=metadata["metavar"])
        else:
            arguments.update(type=kind, metavar=metadata["metavar"] or _metavar(kind, metadata))
        # Absent flags stay absent, so that the dataclass alone holds the defaults.
        group.add_argument(*flags, default=argparse.SUPPRESS, **arguments)


def config_from(
    arguments: argparse.Namespace, config: type[CalibrationConfig]
) -> CalibrationConfig:
    """Build the config from parsed flags.

    Raises:
        OptionError: a value is outside its range, or two options contradict each other.
    """
    known = {spec.name for spec in dataclasses.fields(config)}
    given: dict[str, Any] = {
        name: tuple(value) if isinstance(value, list) else value
        for name, value in vars(arguments).items()
        if name in known
    }
    return config(**given)


def _command(commands: Any, name: str, text: str) -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = commands.add_parser(
        name, help=text, description=text[0].upper() + text[1:] + ".", epilog=EPILOG
    )
    parser.add_argument("--json", action="store_true", help="print the result as JSON")
    parser.add_argument("--quiet", action="store_true", help="no progress and no summary")
    parser.add_argument("--verbose", action="store_true", help="log what is done, layer by layer")
    return parser


def _add_paths(parser: argparse.ArgumentParser, output: str | None, several: bool = False) -> None:
    parser.add_argument(
        "--input",
        required=True,
        metavar="PATH",
        nargs="+" if several else None,
        help="checkpoint: .safetensors file, sharded index, or diffusers folder",
    )
    if output is not None:
        parser.add_argument("--output", required=True, metavar="FILE", help=output)


def _base_type(hint: Any) -> type:
    """Return the type behind `X | None` and `tuple[X, ...]`."""
    if isinstance(hint, types.UnionType):
        hint = next(part for part in typing.get_args(hint) if part is not type(None))
    base: type = typing.get_origin(hint) or hint
    return base


def _metavar(kind: type, metadata: Any) -> str:
    if metadata["choices"] is not None:
        return "{" + ",".join(metadata["choices"]) + "}"
    return {int: "N", float: "X"}.get(kind, "TEXT")


def _help(spec: Any) -> str:
    text: str = spec.metadata["help"]
    if spec.default is None or isinstance(spec.default, (bool, tuple)):
        return text
    return f"{text} (default: {spec.default})"
