"""The script for GPUs runs small everywhere, so that it is not rotten when a GPU is at hand."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
def test_every_part_runs_small(tmp_path: Path) -> None:
    """An error in a part would be found when the GPU is paid for."""
    before = sorted((ROOT / "benchmarks" / "results").iterdir())
    result = subprocess.run(
        [sys.executable, "-m", "benchmarks.gpu", "--small"],
        cwd=ROOT,
        env={**os.environ, "XDG_CACHE_HOME": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=1800,
    )
    assert result.returncode == 0, result.stdout[-4000:] + result.stderr[-4000:]
    rows = [json.loads(line) for line in result.stdout.splitlines()]
    assert {row["op"] for row in rows} == {
        *("tests", "self_test", "quantize_e4m3", "dequantize_e4m3", "monitor"),
        *("weighted_histogram", "search", "gram", "round_compensated", "sweep_codes", "observe"),
        *("scaled_matmul", "scaled_conv2d", "step"),
    }
    assert sorted((ROOT / "benchmarks" / "results").iterdir()) == before
