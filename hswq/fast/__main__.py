"""Entry point: `python -m hswq.fast COMMAND`."""

from __future__ import annotations

import argparse
import dataclasses
import json
import logging
import os
import signal
import sys
from collections.abc import Callable, Sequence
from contextlib import closing
from typing import Any, cast

from hswq.config import BenchConfig, CalibrationConfig, QuantizeConfig
from hswq.errors import BackendError, HswqError, InputError, OptionError
from hswq.fast.arguments import config_from, make_parser
from hswq.fast.stop import EXIT_INTERRUPTED, stopping_safely
from hswq.fast.terminal import EscapingFormatter, escape_lines
from hswq.processes import rank_of_environment
from hswq.progress import Progress, no_progress

EXIT_REFUSED, EXIT_USAGE, EXIT_BACKEND, EXIT_INTERNAL = 1, 2, 3, 4

# Commands that do nothing but read, work and write.
_STREAMING = ("quantize", "convert", "dequantize", "inspect", "compare")

logger = logging.getLogger(__name__)


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code."""
    arguments = make_parser().parse_args(argv)
    handler = logging.StreamHandler()
    handler.setFormatter(EscapingFormatter("%(levelname)s %(name)s: %(message)s"))
    logging.basicConfig(handlers=[handler])
    # Only hswq's own lines: other libraries tell their own users.
    ours = logging.getLogger("hswq")
    level = ours.level
    ours.setLevel(logging.DEBUG if arguments.verbose else logging.WARNING)
    # A terminated run cleans up like an interrupted one.
    previous = signal.signal(signal.SIGTERM, signal.default_int_handler)
    _set_waiting(arguments)
    try:
        _check_processes(arguments)
        _COMMANDS[arguments.command](arguments)
    except OptionError as error:
        return _fail(error, EXIT_USAGE)
    except BackendError as error:
        return _fail(error, EXIT_BACKEND)
    except (HswqError, OSError) as error:
        return _fail(error, EXIT_REFUSED)
    except KeyboardInterrupt as error:
        _tell(
            str(error)
            or "interrupted: under the output's name is the old file or the whole new one, or none"
        )
        return EXIT_INTERRUPTED
    except Exception as error:
        logger.exception("internal error")
        return _fail(error, EXIT_INTERNAL)
    finally:
        signal.signal(signal.SIGTERM, previous)
        ours.setLevel(level)
    return 0


def _set_waiting(arguments: argparse.Namespace) -> None:
    """Let OpenMP's threads sleep while they wait, where others read and write meanwhile.

    Spinning they are quicker at hand, which pays between the many small steps of a sampler, and
    take the cores from everybody else. OpenMP reads this as it is loaded, with torch.
    """
    samples = arguments.command == "quantize" and getattr(arguments, "stats", None) is None
    if arguments.command in _STREAMING and not samples and "torch" not in sys.modules:
        os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")


def _check_processes(arguments: argparse.Namespace) -> None:
    """Let only the first of several processes speak, and only where they share the work."""
    rank, size = rank_of_environment()
    if size == 1:
        return
    if arguments.command != "calibrate":
        raise OptionError(
            f"{arguments.command} runs in one process, and torchrun has started {size}: share out "
            "`calibrate` alone, and give its statistics to the other commands with --stats."
        )
    arguments.quiet = arguments.quiet or rank > 0


def _fail(error: BaseException, code: int) -> int:
    _tell(f"{type(error).__name__}: {error}")
    return code


def _tell(text: str) -> None:
    """Print on stderr, where it is still read."""
    try:
        print(escape_lines(text), file=sys.stderr, flush=True)
    except BrokenPipeError:
        # The program behind the pipe has ended. What is left in the buffer goes nowhere: at exit
        # Python would try again, fail, and change the exit code.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stderr.fileno())


def _with_bars(arguments: argparse.Namespace, work: Callable[[Progress], Any]) -> Any:
    with stopping_safely() as stop:
        if arguments.quiet:
            return work(stop.checked(no_progress))
        from hswq.fast.bars import Bars

        with closing(Bars()) as bars:
            return work(stop.checked(bars))


def _show(arguments: argparse.Namespace, data: Any, text: str) -> None:
    """Print the result: JSON when asked, else the text unless quiet."""
    if arguments.json:
        print(json.dumps(data, indent=1))
    elif not arguments.quiet:
        print(escape_lines(text))


def _keep_inputs(
    arguments: argparse.Namespace,
    config: CalibrationConfig,
    outputs: Sequence[Any],
    files: Sequence[str] = (),
) -> None:
    """Refuse outputs that are files which the command reads.

    Raises:
        InputError: one is, whatever name leads to it.
    """
    from hswq.driver.paths import files_read, refuse_overwriting

    read = files_read(arguments.input, config)
    for file in files:
        read |= files_read(file, config)
    refuse_overwriting(read, outputs)


def _quantize(arguments: argparse.Namespace) -> None:
    config = cast(QuantizeConfig, config_from(arguments, QuantizeConfig))
    from hswq.driver import quantize_checkpoint, quantize_checkpoints
    from hswq.fast.render import render_batch, render_report

    if arguments.output_dir is not None:
        outcomes = _with_bars(
            arguments,
            lambda progress: quantize_checkpoints(
                arguments.input, arguments.output_dir, config, progress=progress
            ),
        )
        _show(arguments, [it.to_dict() for it in outcomes], render_batch(outcomes))
        failed = [it.source for it in outcomes if it.error is not None]
        if failed:
            raise InputError(
                f"{len(failed)} of {len(outcomes)} failed: {', '.join(failed)}. The same command "
                "tries these again."
            )
        return
    if len(arguments.input) > 1:
        raise OptionError("--output is one file: give --output-dir for several checkpoints.")
    report = _with_bars(
        arguments,
        lambda progress: quantize_checkpoint(
            arguments.input[0], arguments.output, config, progress=progress
        ),
    )
    _show(arguments, report.to_dict(), render_report(report))


def _calibrate(arguments: argparse.Namespace) -> None:
    config = config_from(arguments, CalibrationConfig)
    from hswq.driver import calibrate_checkpoint, inspect_path
    from hswq.fast.render import render_facts

    _with_bars(
        arguments,
        lambda progress: calibrate_checkpoint(
            arguments.input, config, arguments.output, progress=progress
        ),
    )
    # Other nodes need not see the first one's disk.
    if rank_of_environment()[0] == 0:
        facts = inspect_path(arguments.output)
        _show(arguments, facts, render_facts(facts))


def _plan(arguments: argparse.Namespace) -> None:
    config = cast(QuantizeConfig, config_from(arguments, QuantizeConfig))
    from hswq.driver import plan_checkpoint
    from hswq.fast.render import render_plan

    if arguments.plot is not None:
        from hswq.quality.plots import check_plot_path, plot_curve

        check_plot_path(arguments.plot)
        _keep_inputs(arguments, config, [arguments.plot])
    plan = _with_bars(
        arguments, lambda progress: plan_checkpoint(arguments.input, config, progress=progress)
    )
    if arguments.plot is not None:
        if not plan.curve or plan.predicted_error is None:
            raise InputError(
                "--plot draws predicted errors, and the statistics hold no measured impact: "
                "calibrate with --sensitivity impact."
            )
        plot_curve(plan.curve, (plan.predicted_bytes, plan.predicted_error), arguments.plot)
    _show(arguments, plan.to_dict(), render_plan(plan))


def _compare(arguments: argparse.Namespace) -> None:
    from hswq.driver import compare_files
    from hswq.fast.render import render_comparison

    comparison = _with_bars(
        arguments,
        lambda progress: compare_files(
            arguments.first, arguments.second, arguments.stats, progress=progress
        ),
    )
    _show(arguments, comparison.to_dict(), render_comparison(comparison))


def _inspect(arguments: argparse.Namespace) -> None:
    from hswq.driver import check_file, inspect_path
    from hswq.fast.render import render_facts

    if arguments.against is not None and not arguments.verify:
        raise OptionError("--against SOURCE is for --verify: give both.")
    facts = inspect_path(arguments.path)
    if arguments.verify:
        if facts["kind"] != "checkpoint":
            raise InputError(f"--verify checks checkpoints, and this is a {facts['kind']} file.")
        check = _with_bars(
            arguments,
            lambda progress: check_file(arguments.path, arguments.against, progress=progress),
        )
        facts["verified"] = dataclasses.asdict(check)
    _show(arguments, facts, render_facts(facts))


def _bench(arguments: argparse.Namespace) -> None:
    config = cast(BenchConfig, config_from(arguments, BenchConfig))
    from hswq.driver import bench_files
    from hswq.fast.render import render_bench

    if config.html is not None:
        from hswq.quality.plots import pyplot
        from hswq.quality.report import data_path

        pyplot()
        reports = [config.html, data_path(config.html)]
        _keep_inputs(arguments, config, reports, arguments.files)
    if config.write_metadata:
        _keep_inputs(arguments, config, arguments.files)
    bench = _with_bars(
        arguments,
        lambda progress: bench_files(arguments.input, arguments.files, config, progress=progress),
    )
    if config.html is not None:
        from hswq.quality.report import write_report

        write_report(bench, config.html)
    _show(arguments, bench.to_dict(), render_bench(bench))


def _convert(arguments: argparse.Namespace) -> None:
    from hswq.driver import convert_checkpoint
    from hswq.fast.render import render_conversion

    report = _with_bars(
        arguments,
        lambda progress: convert_checkpoint(
            arguments.input,
            arguments.output,
            arguments.container,
            requantize=arguments.requantize,
            progress=progress,
        ),
    )
    _show(arguments, report.to_dict(), render_conversion(report))


def _dequantize(arguments: argparse.Namespace) -> None:
    from hswq.driver import dequantize_checkpoint
    from hswq.fast.render import render_conversion

    report = _with_bars(
        arguments,
        lambda progress: dequantize_checkpoint(
            arguments.input, arguments.output, arguments.dtype, progress=progress
        ),
    )
    _show(arguments, report.to_dict(), render_conversion(report))


def _demo(arguments: argparse.Namespace) -> None:
    from hswq.driver.demo import run_demo
    from hswq.fast.render import render_demo

    result = _with_bars(
        arguments,
        lambda progress: run_demo(arguments.output, arguments.preset, progress=progress),
    )
    _show(arguments, result.to_dict(), render_demo(result))


def _backends(arguments: argparse.Namespace) -> None:
    from hswq.fast.render import render_backends
    from hswq.kernels import backend_report

    report = backend_report(self_test=True)
    _show(arguments, [dataclasses.asdict(entry) for entry in report], render_backends(report))


_COMMANDS: dict[str, Callable[[argparse.Namespace], None]] = {
    "quantize": _quantize,
    "calibrate": _calibrate,
    "plan": _plan,
    "inspect": _inspect,
    "compare": _compare,
    "bench": _bench,
    "convert": _convert,
    "dequantize": _dequantize,
    "demo": _demo,
    "backends": _backends,
}

if __name__ == "__main__":
    sys.exit(main())
