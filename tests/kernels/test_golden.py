"""The seed's own answers, through the kernels of every backend."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from hswq import kernels
from tests.conftest import Backend

GOLDEN = Path(__file__).parent.parent / "golden"
ANSWERS = json.loads((GOLDEN / "search_golden.json").read_text())
TENSORS = load_file(GOLDEN / "search_golden.safetensors")


@pytest.mark.parametrize("case", sorted(ANSWERS))
def test_golden_answers_are_met(case: str, backend: Backend) -> None:
    """METHOD section 4's tolerances; the FP8 bytes are exact."""
    answer = ANSWERS[case]
    tensor = case.rsplit(".", 2)[0]
    w = TENSORS[f"{tensor}.weight"].to(backend.device)
    importance = TENSORS.get(f"{tensor}.importance")
    scaled = answer["scaled"]

    hist, max_abs = kernels.weighted_histogram(w, importance, answer["bins"], backend=backend.name)
    assert float(max_abs) == answer["max_val"]
    found, mse = kernels.search_amax(
        hist, max_abs, scaled, answer["candidates"], answer["refinements"], backend=backend.name
    )
    golden = torch.tensor([answer["optimal_amax"]], device=backend.device)
    golden_mse = kernels.clip_mse(hist, max_abs, golden, scaled, backend=backend.name)
    if scaled:
        near = abs(float(found) - answer["optimal_amax"]) <= 1e-6 * answer["max_val"]
        assert near or float(mse) <= float(golden_mse) * (1 + 1e-9)
    # The seed rounds in float32; its error is good to 1e-6.
    assert float(mse) == pytest.approx(answer["estimated_mse"], rel=1e-6, abs=0)

    # Bytes follow from the seed's threshold, which may differ from ours by less than matters.
    amax = answer["optimal_amax"] if scaled else 448.0
    scale = float(torch.tensor(amax / 448, dtype=torch.float32)) if scaled else 1.0
    codes = kernels.quantize_e4m3(w, amax, scale, backend=backend.name)
    assert torch.equal(codes.cpu(), TENSORS[f"{case}.fp8"])
