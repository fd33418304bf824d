"""The main job on the checkpoint that hswq ships."""

from __future__ import annotations

import os
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

from hswq.config import QuantizeConfig
from hswq.driver.quantize import quantize_checkpoint
from hswq.driver.report import Report
from hswq.errors import InputError
from hswq.formats.reader import Checkpoint
from hswq.progress import Progress, no_progress
from hswq.quality import LayerError, weight_errors

DEMO_SAMPLES, DEMO_STEPS = 8, 10


@dataclass(frozen=True)
class DemoResult:
    """The files that the demo wrote, each with the weight error of its FP8 layers."""

    files: tuple[tuple[Report, tuple[LayerError, ...]], ...]

    def to_dict(self) -> list[dict[str, Any]]:
        """Return the result as JSON-ready data."""
        return [
            {
                **report.to_dict(),
                "weight_sqnr_db": {error.name: round(error.sqnr_db, 3) for error in errors},
            }
            for report, errors in self.files
        ]


def demo_folder() -> Path:
    """Return the folder with demo.safetensors, its configurations and prompts.txt."""
    return Path(str(resources.files("hswq.models"))) / "assets" / "demo"


def run_demo(
    folder: str | os.PathLike[str], preset: str = "best", *, progress: Progress = no_progress
) -> DemoResult:
    """Calibrate the demo checkpoint and write its V1 and V2 files into `folder`.

    Writes demo.v1.safetensors (container comfy), demo.v2.safetensors (container hswq), and beside
    each its statistics and codes. `preset` is that of QuantizeConfig.

    Raises:
        The errors of `quantize_checkpoint`.
    """
    target, assets = Path(folder), demo_folder()
    if target.exists() and not target.is_dir():
        raise InputError(f"{str(target)!r} is a file: give a folder for the demo's files.")
    target.mkdir(parents=True, exist_ok=True)
    source = assets / "demo.safetensors"
    files = []
    for name, scaled, container in (("v1", False, "comfy"), ("v2", True, "hswq")):
        config = QuantizeConfig(
            preset=preset,
            samples=DEMO_SAMPLES,
            steps=DEMO_STEPS,
            latent=16,
            calib_file=str(assets / "prompts.txt"),
            pipeline=str(assets),
            scaled=scaled,
            container=container,
            save_stats=str(target / f"demo.{name}.stats.safetensors"),
        )
        output = target / f"demo.{name}.safetensors"
        report = quantize_checkpoint(source, output, config, progress=progress)
        with Checkpoint.open(source) as exact, Checkpoint.open(output) as written:
            files.append((report, tuple(weight_errors(exact, written))))
    return DemoResult(tuple(files))
