"""The examples run as their docstrings say."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from hswq.driver.demo import demo_folder, run_demo

EXAMPLES = Path(__file__).parents[1] / "examples"


@pytest.mark.slow
def test_sdxl_in_diffusers_paints(tmp_path: Path) -> None:
    """An example that does not run is the first thing that a new user meets."""
    run_demo(tmp_path, "seed")
    output = tmp_path / "image.png"
    arguments = [tmp_path / "demo.v2.safetensors", "a red circle", output, demo_folder()]
    subprocess.run(
        [sys.executable, EXAMPLES / "sdxl_diffusers.py", *arguments], check=True, timeout=600
    )
    with Image.open(output) as image:
        assert image.width == image.height >= 64
        darkest, brightest = image.convert("L").getextrema()
        assert brightest - darkest > 32
