"""One tiny SDXL checkpoint with statistics, shared by the tests of driver and command line."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pytest

import hswq
from hswq.calibration import Calibration


@dataclass(frozen=True)
class Tiny:
    """Paths of a tiny checkpoint, its pipeline folder and its statistics."""

    checkpoint: Path
    pipeline: Path
    stats: Path

    @property
    def calibration(self) -> Calibration:
        return Calibration.load(self.stats)

    def config(self, **options: object) -> hswq.QuantizeConfig:
        return hswq.QuantizeConfig(
            **{"stats": str(self.stats), "pipeline": str(self.pipeline), **options}
        )


def tiny_calibration_config(pipeline: Path, **options: object) -> hswq.CalibrationConfig:
    """The least sampling that reaches every layer."""
    return hswq.CalibrationConfig(
        **{"preset": "seed", "samples": 1, "steps": 2, "latent": 8, "pipeline": str(pipeline)}
        | options
    )


@pytest.fixture(scope="session")
def tiny(tmp_path_factory) -> Tiny:
    # Imports diffusers, for which the tests of kernels, often started alone, need not wait.
    from tests.checkpoints import write_tiny_pipeline, write_tiny_sdxl

    folder = tmp_path_factory.mktemp("tiny")
    checkpoint, pipeline = folder / "tiny.safetensors", folder / "pipeline"
    write_tiny_pipeline(pipeline)
    write_tiny_sdxl(checkpoint)
    stats = folder / "tiny.stats.safetensors"
    hswq.calibrate_checkpoint(checkpoint, tiny_calibration_config(pipeline)).save(stats)
    return Tiny(checkpoint, pipeline, stats)
