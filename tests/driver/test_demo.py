"""The shipped demo checkpoint through the whole job, and its files in diffusers."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from hswq.driver.demo import DemoResult, demo_folder, run_demo
from hswq.formats.e4m3 import e4m3_values
from hswq.formats.quantized import dequantize
from hswq.formats.reader import Checkpoint

pytestmark = pytest.mark.slow

MINIMUM_SQNR_DB = 28.0


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, DemoResult]:
    folder = tmp_path_factory.mktemp("demo")
    return folder, run_demo(folder, "seed")


def test_checkpoint_is_small_enough_to_be_committed() -> None:
    """The demo must stay a light part of the package: 16 MB in all, 10 MB of it the UNet."""
    checkpoint = demo_folder() / "demo.safetensors"
    unet = [
        tensor.nbytes
        for name, tensor in load_file(checkpoint).items()
        if name.startswith("model.diffusion_model.")
    ]
    assert checkpoint.stat().st_size <= 16e6
    assert sum(unet) <= 10e6


def test_scaled_file_reaches_the_sqnr_of_e4m3(demo: tuple[Path, DemoResult]) -> None:
    """A layer far below E4M3's 31.6 dB would have a wrong scale or wrong codes."""
    (_, _), (report, errors) = demo[1].files
    assert report.scaled
    assert len(errors) == len(report.plan.quantized) > 100
    assert min(error.sqnr_db for error in errors) >= MINIMUM_SQNR_DB


def test_scaled_weights_lie_within_half_a_codepoint_step(demo: tuple[Path, DemoResult]) -> None:
    """Every weight of the V2 file is the codepoint nearest to the clipped weight."""
    folder, result = demo
    report, _ = result.files[1]
    values = e4m3_values()[:127].double()
    source = demo_folder() / "demo.safetensors"
    with Checkpoint.open(source) as exact, Checkpoint.open(folder / "demo.v2.safetensors") as file:
        for layer in report.plan.quantized:
            assert layer.amax is not None
            base = f"model.diffusion_model.{layer.name}"
            scale = float(file.read(f"{base}.scale"))
            weight = exact.read(f"{base}.weight").double().clamp(-layer.amax, layer.amax)
            error = (weight - dequantize(file, base).double()).abs()
            upper = torch.searchsorted(values, weight.abs() / scale).clamp(1, 126)
            half_step = (values[upper] - values[upper - 1]) / 2 * scale
            # float32 rounding of the division and of the product: 2^-24 relative each.
            assert bool((error <= half_step + weight.abs() * 2.0**-22).all()), base


def paint(path: Path) -> np.ndarray:
    """Paint with diffusers alone, as a program does that knows nothing of hswq."""
    from diffusers import StableDiffusionXLPipeline

    pipeline = StableDiffusionXLPipeline.from_single_file(
        str(path), config=str(demo_folder()), local_files_only=True, torch_dtype=torch.float32
    )
    pipeline.set_progress_bar_config(disable=True)
    prompt = (demo_folder() / "prompts.txt").read_text(encoding="utf-8").splitlines()[0]
    image: np.ndarray = pipeline(
        prompt,
        height=64,
        width=64,
        num_inference_steps=10,
        generator=torch.Generator().manual_seed(0),
        output_type="np",
    ).images[0]
    return image


def test_unscaled_file_paints_what_the_source_paints(demo: tuple[Path, DemoResult]) -> None:
    """The default V1 file loads in stock diffusers, markers ignored, and shows the same image."""
    exact = paint(demo_folder() / "demo.safetensors")
    rounded = paint(demo[0] / "demo.v1.safetensors")
    assert 0.0 < np.square(exact - rounded).mean() < 0.1 * exact.var()


def test_default_paints_nearer_at_the_same_size(
    demo: tuple[Path, DemoResult], tmp_path: Path
) -> None:
    """Its calibration takes longer, and must be worth that in programs that know nothing of it."""
    ours, theirs = (result.files[0][0] for result in (run_demo(tmp_path), demo[1]))
    assert ours.plan.options["rounding"] == "compensated"
    assert ours.output_bytes <= 1.03 * theirs.output_bytes
    exact, found, seed = map(
        paint,
        (
            demo_folder() / "demo.safetensors",
            tmp_path / "demo.v1.safetensors",
            demo[0] / "demo.v1.safetensors",
        ),
    )
    assert np.square(exact - found).mean() < 0.3 * np.square(exact - seed).mean()


def test_scaled_file_needs_a_reader_that_scales(demo: tuple[Path, DemoResult]) -> None:
    """The README warns of V2 in stock diffusers: the warning must be true, and only as long."""
    exact = paint(demo_folder() / "demo.safetensors")
    wrong = paint(demo[0] / "demo.v2.safetensors")
    assert not np.square(exact - wrong).mean() < 0.5 * exact.var()
