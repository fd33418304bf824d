"""Files are the same whatever the caller made torch's default dtype and device."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import hswq
from hswq.driver import bench_files, compare_files
from tests.driver.started import files_of
from tests.driver.test_bench import config as bench_config
from tests.tiny import Tiny, tiny_calibration_config
from tests.torch_defaults import DEFAULTS

LEVERS = {"preset": "best", "scaled": True, "container": "hswq"}


def made(tiny: Tiny, folder: Path) -> dict[str, bytes | str]:
    """Calibrate, quantize, convert, restore, compare and paint; return files and figures."""
    folder.mkdir()
    stats, output = folder / "stats.safetensors", folder / "fp8.safetensors"
    calibration = tiny_calibration_config(tiny.pipeline, **LEVERS)
    hswq.calibrate_checkpoint(tiny.checkpoint, calibration, stats)
    config = hswq.QuantizeConfig(**LEVERS, stats=str(stats), pipeline=str(tiny.pipeline))
    hswq.quantize_checkpoint(tiny.checkpoint, output, config)
    hswq.convert_checkpoint(output, folder / "comfy.safetensors", "comfy", requantize=True)
    hswq.dequantize_checkpoint(output, folder / "fp32.safetensors", "fp32")
    unet = hswq.load_unet(output, pipeline=tiny.pipeline)
    prompts = folder / "prompts.txt"
    prompts.write_text("a red fox in the snow\n")
    painted = bench_files(tiny.checkpoint, [output], bench_config(tiny, prompts, samples=1))
    return {
        **files_of(folder),
        "unet": str({(value.dtype, value.device) for value in unet.state_dict().values()}),
        "compared": str(compare_files(output, folder / "comfy.safetensors")),
        "painted": str([float(entry.values["latent_mse"].mean()) for entry in painted.entries]),
    }


@pytest.fixture(scope="module")
def expected(tiny: Tiny, tmp_path_factory) -> dict[str, bytes | str]:
    return made(tiny, tmp_path_factory.mktemp("plain") / "made")


@pytest.mark.parametrize("name", ["float16", "meta"])
def test_files(name: str, tiny: Tiny, expected: dict[str, bytes | str], tmp_path: Path) -> None:
    with DEFAULTS[name]():
        before = torch.get_default_dtype(), torch.get_default_device()
        found = made(tiny, tmp_path / "made")
        assert (torch.get_default_dtype(), torch.get_default_device()) == before
    assert found == expected
