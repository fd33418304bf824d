"""Calibration: Dual Monitor hooks, mergeable statistics and the sampling run."""

from __future__ import annotations

from hswq.calibration.observer import observe
from hswq.calibration.prompts import (
    Embeddings,
    load_embeddings,
    load_prompts,
    prompts_hash,
    save_embeddings,
)
from hswq.calibration.run import run_calibration
from hswq.calibration.statistics import Calibration, LayerStatistics, is_statistics

__all__ = [
    "Calibration",
    "Embeddings",
    "LayerStatistics",
    "is_statistics",
    "load_embeddings",
    "load_prompts",
    "observe",
    "prompts_hash",
    "run_calibration",
    "save_embeddings",
]
