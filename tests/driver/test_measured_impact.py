"""Impact measured on a checkpoint: saved, gone on with, and planned by."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import hswq
from hswq.calibration import Calibration
from hswq.fast.__main__ import main
from tests.tiny import Tiny, tiny_calibration_config


@pytest.fixture(scope="module")
def measured(tiny: Tiny, tmp_path_factory) -> Path:
    """Statistics with impact, made by the command line."""
    path = tmp_path_factory.mktemp("impact") / "s.safetensors"
    arguments = ["calibrate", "--input", str(tiny.checkpoint), "--output", str(path)]
    arguments += ["--pipeline", str(tiny.pipeline), "--samples", "2", "--steps", "2"]
    arguments += ["--latent", "8", "--preset", "seed", "--sensitivity", "impact"]
    arguments += ["--calls", "2", "--quiet"]
    assert main(arguments) == 0
    return path


def test_impact_does_not_change_the_other_statistics(tiny, measured):
    """The replays must not be counted as calls of the sampler."""
    config = tiny_calibration_config(tiny.pipeline, samples=2)
    plain = hswq.calibrate_checkpoint(tiny.checkpoint, config)
    found = Calibration.load(measured)
    for name in plain.modules:
        assert found.calls(name) == plain.calls(name)
        assert found.sensitivity(name) == plain.sensitivity(name)
    # One call of each sample, one of each step.
    steps = [float(call.args[1]) for call in found.records]
    assert len(steps) == 2
    assert steps[0] > steps[1]


def test_files_by_impact(tiny, measured, tmp_path, capfd):
    """The kept layers are those of largest impact per weight."""
    output = tmp_path / "out.safetensors"
    arguments = ["--input", str(tiny.checkpoint), "--stats", str(measured), "--json", "--quiet"]
    arguments += ["--sensitivity", "impact", "--keep-bytes", "0.05"]
    assert main(["quantize", "--output", str(output), *arguments]) == 0
    report = json.loads(capfd.readouterr().out)
    assert main(["plan", *arguments]) == 0
    plan = json.loads(capfd.readouterr().out)
    kept = {layer["name"] for layer in plan["layers"] if not layer["quantized"]}
    assert kept == set(report["kept"])
    worth = {
        layer["name"]: layer["impact"] / (layer["shape"][0] * layer["shape"][1])
        for layer in plan["layers"]
        if len(layer["shape"]) == 2
    }
    most = max(worth, key=lambda name: worth[name])
    assert most in kept
    assert plan["options"]["keep_bytes"] == 0.05
    assert "keep_ratio" not in plan["options"]


def test_interrupted_measurement_goes_on(tiny, measured, tmp_path):
    """Neither the sampler nor the units already measured run again."""
    path = tmp_path / "s.safetensors"
    config = tiny_calibration_config(tiny.pipeline, samples=2, sensitivity="impact", calls=2)
    runs = 2 * len(Calibration.load(measured).model_map.units())

    def interrupt(phase, done, total):
        if phase == "impact" and done == 300:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        hswq.calibrate_checkpoint(tiny.checkpoint, config, path, progress=interrupt)
    seen = []
    hswq.calibrate_checkpoint(
        tiny.checkpoint, config, path, progress=lambda *step: seen.append(step)
    )
    assert "calibrate" not in {phase for phase, *_ in seen}
    counted = [done for phase, done, _ in seen if phase == "impact"]
    assert len(counted) == runs - 300
    assert path.read_bytes() == measured.read_bytes()
    assert [file.name for file in tmp_path.iterdir()] == [path.name]
    # A complete measurement, and another run, begin anew.
    for other in (config, tiny_calibration_config(tiny.pipeline, samples=1, sensitivity="impact")):
        seen.clear()
        hswq.calibrate_checkpoint(
            tiny.checkpoint, other, path, progress=lambda *step: seen.append(step)
        )
        assert "calibrate" in {phase for phase, *_ in seen}
