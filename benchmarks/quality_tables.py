"""What `benchmarks.quality` has recorded, as tables and a plot."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import torch

import hswq
from benchmarks.record import RESULTS
from hswq.models.families import FAMILIES
from hswq.quality.images import mean_interval
from hswq.quality.plots import pyplot, save

BUDGETS = (0.0, 0.001, 0.05, 0.10, 0.25)
# Levers: sensitivity, rounding, bias correction; the first is the seed's, the last `best`.
LEVERS = {
    "seed": ("variance", "nearest", False),
    "impact": ("impact", "nearest", False),
    "compensated": ("variance", "compensated", False),
    "compensated, bias": ("variance", "compensated", True),
    "impact, compensated, no bias": ("impact", "compensated", False),
    "best": ("impact", "compensated", True),
}
# What a lever comes to where no layer is kept.
TWINS = {
    "impact": "seed",
    "impact, compensated, no bias": "compensated",
    "best": "compensated, bias",
}
# Relative change of `--noise`: half a step of float16 at most.
NOISE = 2.0**-12
KINDS = {"V1": {"container": "comfy"}, "V2": {"scaled": True, "container": "hswq"}}
# What the tables show: calibrations of the product's defaults, and what is painted.
CALIBRATION = {name: getattr(hswq.CalibrationConfig(), name) for name in ("samples", "calls")}
PAINTED = {"prompts": 32, "seeds": 2}
# Models and their families.
MODELS = {"demo": "sdxl", "other": "sdxl", "flux": "flux", "z-image": "z-image"}


def recorded_rows(**conditions: Any) -> list[dict[str, Any]]:
    """Return the rows of every machine by date; those of before there were dates come first.

    Args:
        conditions: entries that the rows must have.
    """
    paths = sorted(RESULTS.glob("*.jsonl"))
    lines = [line for path in paths for line in path.read_text(encoding="utf-8").splitlines()]
    wanted = {"op": "quality", **conditions}.items()
    rows = [row for row in map(json.loads, lines) if wanted <= row.items()]
    return sorted(rows, key=lambda row: row.get("date", ""))


def painted_as(model: str) -> dict[str, Any]:
    """Return the conditions under which the tables' images of a model are painted."""
    return {"model": model, "steps": FAMILIES[MODELS[model]].sampler.steps, **PAINTED}


def latest_rows(model: str, **painted: int) -> dict[tuple[str, str, float], dict[str, Any]]:
    """Return the last row of every variant of a model, calibrated as by default.

    Args:
        model: one of MODELS.
        painted: prompts, seeds and steps, if others than those of the tables.
    """
    return {
        (row["kind"], row["lever"], row["keep_bytes"]): row
        for row in recorded_rows(**{**painted_as(model), **CALIBRATION, **painted})
        if "varied" not in row
    }


def variant(
    rows: dict[tuple[str, str, float], dict[str, Any]], kind: str, lever: str, share: float
) -> dict[str, Any] | None:
    """Return the row of a variant, where no layer is kept that of its twin."""
    row = rows.get((kind, lever, share))
    return row if row or share else rows.get((kind, TWINS.get(lever, lever), share))


def error(row: dict[str, Any] | None) -> str:
    """Return the error of a row and its interval."""
    return "-" if row is None else f"{row['latent_mse']:.1e} ± {row['latent_mse_ci95']:.0e}"


def times(seed: dict[str, Any] | None, best: dict[str, Any] | None, name: str) -> str:
    """Return how many times as large a figure of the first row is."""
    return f"{seed[name] / best[name]:.3g}" if seed and best else "-"


def paired_ratio(
    seed: dict[str, Any] | None, best: dict[str, Any] | None
) -> tuple[float, float, float] | None:
    """Return the geometric mean of the prompts' ratios of latent MSE, and its 95 % interval.

    By Student's t over the logarithms; None where a row holds no values of its prompts, or one of
    them is 0.
    """
    columns = [(row or {}).get("latent_mse_per_prompt", []) for row in (seed, best)]
    if len(columns[0]) != len(columns[1]) or len(columns[0]) < 2 or not all(map(all, columns)):
        return None
    first, second = (torch.tensor(column, dtype=torch.float64).log() for column in columns)
    mean, width = mean_interval(first - second, len(first))
    return math.exp(mean), math.exp(mean - width), math.exp(mean + width)


def table(model: str) -> str:
    """Return the rows of a model as a table: budgets down, levers across.

    The last column is the ratio of the means and, where they are recorded, of the medians; then,
    of prompts paired, the geometric mean of the ratios and its 95 % interval.
    """
    rows = latest_rows(model)
    lines = []
    for kind in sorted({kind for kind, _, _ in rows}):
        levers = [it for it in LEVERS if any(key[:2] == (kind, it) for key in rows)]
        lines += [
            f"| {model}, {kind}: bytes kept | {' | '.join(levers)} | seed / best |",
            "|---|" + "---|" * (len(levers) + 1),
        ]
        for share in BUDGETS:
            found = {it: variant(rows, kind, it, share) for it in levers}
            seed, best = found.get("seed"), found.get("best")
            ratio = times(seed, best, "latent_mse")
            if seed and best and "latent_mse_median" in seed and "latent_mse_median" in best:
                ratio += f" ({times(seed, best, 'latent_mse_median')})"
            if paired := paired_ratio(seed, best):
                ratio += "; paired {:.3g} [{:.3g}, {:.3g}]".format(*paired)
            cells = " | ".join(error(row) for row in found.values())
            lines.append(f"| {100 * share:g}% | {cells} | {ratio} |")
        lines.append("")
    return "\n".join(lines)


def variations() -> str:
    """Return the rows of calibrations that were varied, below the default's of equal images.

    Without a default's row there is nothing to compare them with.
    """
    lines = ["| model, kind, lever, kept | images | varied | latent MSE |", "|---|---|---|---|"]
    groups: dict[tuple[Any, ...], dict[str, dict[str, Any]]] = {}
    for row in recorded_rows():
        if "varied" in row:
            names = ("model", "kind", "lever", "keep_bytes", "prompts", "seeds", "steps")
            text = ", ".join(f"{name} {value}" for name, value in row["varied"].items())
            groups.setdefault(tuple(row[name] for name in names), {})[text] = row
    for (model, kind, lever, share, prompts, seeds, steps), rows in sorted(groups.items()):
        known = latest_rows(model, prompts=prompts, seeds=seeds, steps=steps)
        if (default := variant(known, kind, lever, share)) is None:
            continue
        images = f"{prompts} x {seeds}, {steps} steps"
        lines.append(f"| {model}, {kind}, {lever}, {share:.1%} | {images} | - | {error(default)} |")
        lines += [f"| | | {text} | {error(rows[text])} |" for text in sorted(rows)]
    return "\n".join(lines)


def noises() -> str:
    """Return what each model's images move by when its weights change at random."""
    lines = ["| weights changed by 2^-12 at most | latent MSE | median |", "|---|---|---|"]
    for model in MODELS:
        for row in recorded_rows(lever="noise", relative_change=NOISE, **painted_as(model))[-1:]:
            lines.append(f"| {model} | {error(row)} | {row['latent_mse_median']:.1e} |")
    return "\n".join(lines)


def plot(path: Path) -> None:
    """Draw latent error against file size: a panel for each model and kind, a line a lever."""
    found = {model: latest_rows(model) for model in MODELS}
    found = {model: rows for model, rows in found.items() if rows}
    if not found:
        raise SystemExit(f"nothing to draw: {RESULTS} holds no rows of {CALIBRATION | PAINTED}.")
    figure, panels = pyplot().subplots(
        len(KINDS),
        len(found),
        figsize=(3.4 * len(found), 3.2 * len(KINDS)),
        sharex="col",
        sharey="col",
        squeeze=False,
        layout="constrained",
    )
    for column, (model, rows) in enumerate(found.items()):
        for axes, kind in zip(panels[:, column], KINDS, strict=True):
            for lever, marker in zip(LEVERS, "osD^Pv", strict=True):
                line = [row for key, row in sorted(rows.items()) if key[:2] == (kind, lever)]
                axes.errorbar(
                    [row["file_bytes"] / 1e6 for row in line],
                    [row["latent_mse"] for row in line],
                    [row["latent_mse_ci95"] for row in line],
                    marker=marker,
                    ms=4,
                    lw=1,
                    capsize=2,
                    label=lever,
                )
            axes.set(yscale="log", title=f"{model}, {kind}")
            axes.grid(visible=True, alpha=0.3)
        panels[-1, column].set_xlabel("file, MB")
    for row_of_axes in panels:
        row_of_axes[0].set_ylabel("latent MSE")
    panels[0, 0].legend(frameon=False, fontsize="small")
    save(figure, path, path.suffix[1:])
