"""Results as text for a terminal."""

from __future__ import annotations

import math
from decimal import Decimal
from typing import TYPE_CHECKING, Any

from hswq.fast.terminal import escape
from hswq.plan.curve import thinned

if TYPE_CHECKING:
    from collections.abc import Sequence

    from hswq.driver import ConvertReport, Outcome, Report
    from hswq.driver.demo import DemoResult
    from hswq.kernels import BackendStatus
    from hswq.plan import Plan
    from hswq.quality.bench import Bench
    from hswq.quality.compare import Comparison


def gigabytes(size: float) -> str:
    """Return a size in the unit that reads best (decimal, as disks and hubs count)."""
    for unit, factor in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if size >= factor:
            return f"{size / factor:.2f} {unit}"
    return f"{size:.0f} B"


def render_report(report: Report) -> str:
    """Return the closing summary of `quantize`."""
    plan = report.plan
    scaled = sum(layer.scaled for layer in plan.layers)
    kept_bytes = sum(layer.numel for layer in plan.kept)
    all_bytes = sum(layer.numel for layer in plan.layers)
    lines = [
        f"{report.output}: {'V2' if report.scaled else 'V1'}, container {report.container}",
        f"  size     {gigabytes(report.source_bytes)} -> {gigabytes(report.output_bytes)} "
        f"({report.output_bytes / report.source_bytes:.0%})",
        f"  layers   {len(plan.layers)}: {len(plan.quantized)} to e4m3 ({scaled} scaled), "
        f"{len(plan.kept)} kept ({kept_bytes / max(all_bytes, 1):.1%} of the weights)",
        f"  error    {_sqnr_range(plan)}",
        "  seconds  " + ", ".join(f"{name} {value:.1f}" for name, value in report.seconds.items()),
        f"  memory   {gigabytes(report.peak_memory_bytes)} at most",
        f"  sha256   {report.sha256}",
    ]
    return "\n".join(lines)


def render_batch(outcomes: Sequence[Outcome]) -> str:
    """Return the summary of several checkpoints: the reports, then a line on each."""
    lines = [render_report(it.report) for it in outcomes if it.report is not None]
    for it in outcomes:
        what = f"FAILED: {it.error}" if it.error is not None else "done"
        lines.append(f"{it.source}: {what if it.report or it.error else 'done before'}")
    return "\n".join(lines)


def render_conversion(report: ConvertReport) -> str:
    """Return the summary of `convert` and `dequantize`, with the error of what was encoded anew."""
    lines = [
        f"{report.output}: container {report.container}",
        f"  size     {gigabytes(report.source_bytes)} -> {gigabytes(report.output_bytes)}",
        f"  layers   {report.layers} FP8, {len(report.requantized)} of them encoded anew",
    ]
    lines += [
        f"  {escape(name)}: SQNR {'infinite' if error is None else f'{error:.2f} dB'}"
        for name, error in report.requantized.items()
    ]
    lines.append(f"  sha256   {report.sha256}")
    return "\n".join(lines)


def render_plan(plan: Plan) -> str:
    """Return the table and the totals of `plan`."""
    lines = [
        plan.table(),
        "",
        f"{len(plan.layers)} layers: {len(plan.quantized)} to e4m3, {len(plan.kept)} kept; "
        f"{gigabytes(plan.source_bytes)} -> {gigabytes(plan.predicted_bytes)}; "
        f"{_sqnr_range(plan)}",
    ]
    if plan.predicted_error is not None and plan.curve:
        lines += [
            f"predicted error of the denoiser's output: {plan.predicted_error:.3g} (relative, "
            "squared)",
            "",
            "other budgets, kept by impact per weight"
            + (":" if plan.options.get("sensitivity") == "impact" else " (--sensitivity impact):"),
            "  --keep-bytes   layers kept        file   predicted error",
        ]
        # All decimals: fewer would keep other layers.
        lines += [
            f"  {Decimal(repr(point.kept_bytes)):12f}   {point.kept:11d}  "
            f"{gigabytes(point.file_bytes):>10}   {point.error:15.3g}"
            for point in thinned(plan.curve)
        ]
    return "\n".join(lines)


def render_comparison(comparison: Comparison) -> str:
    """Return the table of `compare`, the largest weight error first."""
    measured = any(layer.output_sqnr_db is not None for layer in comparison.layers)
    titles = ("layer", "shape", "first", "second", "codes changed", "SQNR dB")
    rows = [(*titles, "importance-weighted SQNR dB", *(["output SQNR dB"] if measured else []))]
    for layer in sorted(comparison.layers, key=lambda layer: (layer.sqnr_db, layer.name)):
        changed = layer.codes_changed
        rows.append(
            (
                escape(layer.name),
                "x".join(map(str, layer.shape)),
                layer.first,
                layer.second,
                "-" if changed is None else f"{changed:.2%}",
                _decibels(layer.sqnr_db),
                _decibels(layer.weighted_sqnr_db),
                *([_decibels(layer.output_sqnr_db)] if measured else []),
            )
        )
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in rows
    ]
    changed_layers = sum(layer.sqnr_db != math.inf for layer in comparison.layers)
    lines += [
        "",
        f"{len(comparison.layers)} layers hold codes, {changed_layers} of them differ; "
        f"{comparison.others_equal} other tensors are equal, {len(comparison.others_changed)} "
        "are not",
    ]
    for what, names in (
        ("changed", comparison.others_changed),
        ("only in the first", comparison.only_first),
        ("only in the second", comparison.only_second),
    ):
        if names:
            lines.append(f"{what}: {_short(list(names))}")
    return "\n".join(lines)


def render_bench(bench: Bench) -> str:
    """Return the figures of `bench`, a line a file."""
    means = [entry.means(len(bench.prompts)) for entry in bench.entries]
    metrics = list(means[0])
    rows = [("file", "size", *metrics)]
    for entry, found in zip(bench.entries, means, strict=True):
        size = ("" if entry.has_file else "≈ ") + gigabytes(entry.file_bytes)
        cells = (f"{found[name][0]:.3g} ± {found[name][1]:.1g}" for name in metrics)
        rows.append((escape(entry.name), size, *cells))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in rows
    ]
    return "\n".join(
        [
            *lines,
            "",
            f"against the unquantized model: {len(bench.prompts)} prompts, "
            f"{len(bench.seeds)} noises each; mean and half width of the 95 % interval",
        ]
    )


def _decibels(value: float | None) -> str:
    if value is None:
        return "-"
    return "equal" if value == math.inf else f"{value:.2f}"


def render_facts(facts: dict[str, Any]) -> str:
    """Return what `inspect` found, one fact a line, long lists shortened."""
    width = max(map(len, facts))
    lines = []
    for name, value in facts.items():
        if value is None or value == {} or value == []:
            continue
        if isinstance(value, dict):
            lines.append(f"{name}:")
            lines += [f"  {escape(key)}: {_short(entry)}" for key, entry in value.items()]
        else:
            shown = gigabytes(value) if name.endswith("_bytes") else _short(value)
            lines.append(f"{name.ljust(width)}  {shown}")
    return "\n".join(lines)


def render_demo(result: DemoResult) -> str:
    """Return the summaries of the demo's files."""
    parts = []
    for report, errors in result.files:
        worst = min(errors, key=lambda error: error.sqnr_db)
        parts.append(render_report(report))
        parts.append(f"  worst    weight SQNR {worst.sqnr_db:.2f} dB in {worst.name}")
    return "\n".join(parts)


def render_backends(report: tuple[BackendStatus, ...]) -> str:
    """Return a line a backend, usable or why not and what it implements, and failed self-tests."""
    lines = []
    for entry in report:
        if entry.reason is None:
            lines.append(f"{entry.name.ljust(10)} usable      {', '.join(entry.native_ops)}")
            failed = {op: text for op, text in entry.self_tests.items() if text != "passed"}
            if tested := len(entry.self_tests):
                passed = tested - len(failed)
                lines.append(f"{'':10} self-test   {passed} of {tested} ops passed")
            lines += [f"{'':10} {op} {text}" for op, text in failed.items()]
        else:
            lines.append(f"{entry.name.ljust(10)} not usable  {entry.reason}")
    return "\n".join(lines)


def _sqnr_range(plan: Plan) -> str:
    """Say how far the FP8 layers are off: their outputs where that was measured, else weights."""
    ready = [layer for layer in plan.quantized if layer.rounding is not None]
    known = [layer.output_sqnr_db if ready else layer.sqnr_db for layer in plan.quantized]
    found = sorted(sqnr_db for sqnr_db in known if sqnr_db is not None)
    what = "output SQNR" if ready else "weighted SQNR"
    if not found:
        return f"{what} not measured" + ("" if plan.quantized else " (no layer is quantized)")
    text = f"{what} {found[0]:.1f} dB worst, {found[len(found) // 2]:.1f} dB median"
    if ready:
        compensated = sum(layer.rounding == "compensated" for layer in ready)
        text += f"; {compensated} layers compensated, {len(ready) - compensated} nearest"
    return text


def _short(value: Any) -> str:
    """Return a fact as text of one line."""
    if isinstance(value, list):
        shown = escape(", ".join(map(str, value[:10])))
        return f"{len(value)}: {shown}{', …' if len(value) > 10 else ''}"
    if isinstance(value, dict):
        return escape(", ".join(f"{key} {entry}" for key, entry in value.items()))
    if isinstance(value, float) and math.isfinite(value):
        return f"{value:.6g}"
    text = str(value)
    return escape(text if len(text) <= 200 else text[:200] + "…")
