"""Plots, drawn by matplotlib (extra `bench`)."""

from __future__ import annotations

import io
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hswq.errors import InputError
from hswq.formats.writer import write_whole
from hswq.plan import CurvePoint

SUFFIXES = (".png", ".svg")


def check_plot_path(path: str | os.PathLike[str]) -> Path:
    """Return the path of a plot, or refuse it before any work is done.

    Raises:
        InputError: its name ends in neither .png nor .svg, its folder is missing, or matplotlib is.
    """
    target = Path(path)
    if target.suffix not in SUFFIXES or not target.parent.is_dir():
        raise InputError(
            f"plot {str(target)!r}: a file in an existing folder is needed whose name ends in "
            f"{' or '.join(SUFFIXES)}."
        )
    pyplot()
    return target


def pyplot() -> Any:
    """Return matplotlib.pyplot, which draws equal data to equal files and needs no display.

    Raises:
        InputError: matplotlib is not installed.
    """
    try:
        import matplotlib as mpl
    except ImportError as error:
        raise InputError("plots need matplotlib: pip install 'hswq[bench]'.") from error
    mpl.use("agg")
    mpl.rcParams.update({"svg.hashsalt": "hswq", "svg.fonttype": "none"})
    from matplotlib import pyplot as found

    return found


def save(figure: Any, target: Any, kind: str) -> None:
    """Write a figure without the date and the program's name, and close it."""
    metadata = {"Date": None, "Creator": None} if kind == "svg" else {"Software": None}
    figure.savefig(target, format=kind, metadata=metadata, dpi=150)
    pyplot().close(figure)


def plot_curve(
    curve: Sequence[CurvePoint], chosen: tuple[int, float] | None, path: str | os.PathLike[str]
) -> None:
    """Draw predicted error against file size.

    Args:
        curve: of a plan, see hswq.plan.error_curve.
        chosen: size in bytes and predicted error of the plan itself.
        path: .png or .svg.
    Raises:
        InputError: see `check_plot_path`; or the file cannot be written.
    """
    target = check_plot_path(path)
    figure, axes = pyplot().subplots(figsize=(6.4, 4.2), layout="constrained")
    shown = [point for point in curve if point.error > 0.0]
    unit, factor = ("GB", 1e9) if curve[-1].file_bytes >= 1e9 else ("MB", 1e6)
    axes.plot([point.file_bytes / factor for point in shown], [point.error for point in shown])
    if chosen is not None and chosen[1] > 0.0:
        axes.plot([chosen[0] / factor], [chosen[1]], "o", color="black", label="this plan")
        axes.legend(frameon=False)
    axes.set(yscale="log", xlabel=f"file, {unit}", ylabel="predicted relative squared error")
    axes.grid(visible=True, alpha=0.3)
    drawn = io.BytesIO()
    save(figure, drawn, target.suffix[1:])
    write_whole(target, drawn.getvalue())
