"""Calibration: Dual Monitor hooks, mergeable statistics and the sampling run."""

from __future__ import annotations

from hswq.calibration.calls import Call, Recorder
from hswq.calibration.codes import Codes, CodesWriter, codes_path, find_codes
from hswq.calibration.embeddings import (
    Embeddings,
    check_embeddings,
    encode_prompts,
    load_embeddings,
    save_embeddings,
)
from hswq.calibration.gram import Gram, GramLayer, gather_grams, gram_groups, gram_layers
from hswq.calibration.impact import Impact
from hswq.calibration.observer import observe
from hswq.calibration.prompts import load_prompts, prompts_hash
from hswq.calibration.run import (
    SamplingRun,
    check_calibration,
    sampling_settings,
)
from hswq.calibration.statistics import Calibration, LayerStatistics, is_statistics

__all__ = [
    "Calibration",
    "Call",
    "Codes",
    "CodesWriter",
    "Embeddings",
    "Gram",
    "GramLayer",
    "Impact",
    "LayerStatistics",
    "Recorder",
    "SamplingRun",
    "check_calibration",
    "check_embeddings",
    "codes_path",
    "encode_prompts",
    "find_codes",
    "gather_grams",
    "gram_groups",
    "gram_layers",
    "is_statistics",
    "load_embeddings",
    "load_prompts",
    "observe",
    "prompts_hash",
    "sampling_settings",
    "save_embeddings",
]
