"""What a plan says of sizes and of codes is what the file has."""

from __future__ import annotations

import json
import logging
import math
from dataclasses import replace
from pathlib import Path

import pytest

import hswq
from hswq.calibration import Codes, CodesWriter
from hswq.driver import compare_files, plan_checkpoint
from hswq.errors import PlanError
from hswq.fast.render import render_comparison, render_plan, render_report
from hswq.formats.reader import Checkpoint
from tests.tiny import Tiny, tiny_calibration_config

COMPENSATED = {"rounding": "compensated", "bias_correction": True}


@pytest.fixture(scope="module")
def compensated(tiny: Tiny, tmp_path_factory) -> Path:
    """Statistics with compensated codes of V1 beside them."""
    path = tmp_path_factory.mktemp("compensated") / "s.safetensors"
    config = tiny_calibration_config(tiny.pipeline, **COMPENSATED)
    hswq.calibrate_checkpoint(tiny.checkpoint, config, path)
    return path


@pytest.mark.parametrize("options", [{}, {"scaled": True, "container": "comfy"}], ids=["V1", "V2"])
def test_target_size_is_exact(tiny: Tiny, tmp_path: Path, options) -> None:
    """The size of the file without a kept layer is no size that cannot be met."""
    output = tmp_path / "out.safetensors"
    config = tiny.config(keep_bytes=0.0, **options)
    nothing_kept = hswq.quantize_checkpoint(tiny.checkpoint, output, config).output_bytes
    # The option itself is written into the file: some more bytes than 0.0 takes, in steps of 8.
    size = nothing_kept
    while True:
        config = tiny.config(target_size=str(size), **options)
        try:
            report = hswq.quantize_checkpoint(tiny.checkpoint, output, config)
            break
        except PlanError as error:
            larger = int(str(error).split(" bytes larger")[0].rsplit(" ", 1)[1])
            size += larger
    assert size - nothing_kept <= 24
    assert report.output_bytes == size == output.stat().st_size
    config = tiny.config(target_size=str(size - 1), **options)
    with pytest.raises(PlanError, match="the file is 1 bytes larger"):
        plan_checkpoint(tiny.checkpoint, config)


@pytest.mark.parametrize("extra", [1_000, 400_000])
def test_target_size_leaves_no_room_for_a_layer(tiny: Tiny, tmp_path: Path, extra: int) -> None:
    """Bytes that were paid for and hold nothing."""
    output = tmp_path / "out.safetensors"
    config = tiny.config(keep_bytes=0.0)
    size = plan_checkpoint(tiny.checkpoint, config).predicted_bytes + 24 + extra
    config = tiny.config(target_size=str(size))
    report = hswq.quantize_checkpoint(tiny.checkpoint, output, config)
    assert report.output_bytes == report.plan.predicted_bytes <= size
    # Of float16 weights one byte each; headers grow in steps of 8.
    smallest = min(layer.numel for layer in report.plan.quantized)
    assert size - report.output_bytes < smallest + 8


def test_plan_and_file_tell_the_error_of_their_codes(
    tiny: Tiny, compensated: Path, tmp_path: Path
) -> None:
    """Users would be told the error of nearest codes, which the file does not have."""
    output = tmp_path / "out.safetensors"
    config = tiny.config(stats=str(compensated), keep_bytes=0.1)
    report = hswq.quantize_checkpoint(tiny.checkpoint, output, config)
    with Codes(compensated.with_suffix(".codes.safetensors")) as codes:
        units = {key.removeprefix("model.diffusion_model."): it for key, it in codes.units.items()}
    told = set()
    for layer in report.plan.layers:
        if not layer.quantized:
            assert layer.rounding is layer.output_sqnr_db is None
            continue
        unit = units[f"{layer.name}.weight"]
        assert layer.rounding == ("compensated" if unit.compensated else "nearest")
        told.add(layer.rounding)
        if unit.signal:
            expected = 10 * math.log10(unit.signal / unit.error)
            assert layer.output_sqnr_db == pytest.approx(expected)
    assert "compensated" in told
    with Checkpoint.open(output) as written:
        content = json.loads(written.metadata["hswq.plan"])
    assert hswq.Plan.from_dict(content, "file") == report.plan
    known = sorted(it.output_sqnr_db for it in report.plan.quantized)
    range_text = f"output SQNR {known[0]:.1f} dB worst, {known[len(known) // 2]:.1f} dB median"
    assert range_text in render_report(report)
    assert "layers compensated" in render_report(report)
    table = render_plan(report.plan)
    assert "output SQNR dB" in table
    assert "e4m3, compensated" in table
    assert f"{known[0]:.2f}" in table
    assert "weighted" not in table + render_report(report)


def test_nearest_codes_are_told_as_before(tiny: Tiny) -> None:
    """Files without codes of the calibration must not change by a byte of metadata."""
    plan = plan_checkpoint(tiny.checkpoint, tiny.config(keep_bytes=0.1))
    assert not any({"rounding", "output_sqnr_db"} & set(it) for it in plan.to_dict()["layers"])
    assert "weighted SQNR" in render_plan(plan)


def test_layers_that_are_not_compensated_are_told_by_every_run(
    tiny: Tiny, compensated: Path, tmp_path: Path, caplog
) -> None:
    """The run that made the codes may have been interrupted, or another day's."""
    stats = tmp_path / "s.safetensors"
    stats.write_bytes(compensated.read_bytes())
    with Codes(compensated.with_suffix(".codes.safetensors")) as codes:
        keys = sorted(key for key, unit in codes.units.items() if unit.compensated)
        shapes = {key: tuple(codes.read(key).shape) for key in codes.units}
        biases = [key for key in codes.units if codes.bias(key) is not None]
        changed = {
            keys[0]: replace(codes.units[keys[0]], compensated=False),
            keys[1]: replace(
                codes.units[keys[1]], compensated=False, error=0.0, nearest_error=0.0, signal=0.0
            ),
        }
        with CodesWriter(
            stats.with_suffix(".codes.safetensors"),
            shapes,
            biases,
            codes.fingerprint,
            codes.settings,
            codes.options,
        ) as writer:
            for key, unit in codes.units.items():
                figures = changed.get(key, unit)
                writer.write(key, codes.read(key), codes.scale(key), codes.bias(key), figures)
            writer.commit()
    names = [key.removeprefix("model.diffusion_model.").removesuffix(".weight") for key in keys[:2]]
    with caplog.at_level(logging.WARNING):
        plan = plan_checkpoint(tiny.checkpoint, tiny.config(stats=str(stats), keep_bytes=0.0))
    not_better = [it for it in caplog.messages if "compensated codes were not better" in it]
    unusable = [it for it in caplog.messages if "no usable Gram matrix" in it]
    assert len(not_better) == len(unusable) == 1
    assert names[0] in not_better[0]
    assert names[1] in unusable[0]
    layers = {layer.name: layer for layer in plan.layers}
    assert layers[names[0]].rounding == layers[names[1]].rounding == "nearest"
    assert layers[names[0]].output_sqnr_db is not None
    assert layers[names[1]].output_sqnr_db is None


def test_compare_tells_the_measured_error_of_the_codes(
    tiny: Tiny, compensated: Path, tmp_path: Path
) -> None:
    """An estimate without the correlations makes compensated codes look worse than nearest ones."""
    files = {name: tmp_path / f"{name}.safetensors" for name in ("nearest", "compensated")}
    for rounding, output in files.items():
        config = tiny.config(stats=str(compensated), keep_bytes=0.1, rounding=rounding)
        report = hswq.quantize_checkpoint(tiny.checkpoint, output, config)
    told = {layer.name: layer.output_sqnr_db for layer in report.plan.quantized}
    comparison = compare_files(tiny.checkpoint, files["compensated"], compensated)
    assert {layer.name: layer.output_sqnr_db for layer in comparison.layers} == told
    text = render_comparison(comparison)
    assert "importance-weighted SQNR dB  output SQNR dB" in text
    # Of other codes, and between two files, the statistics say nothing of the kind.
    nearest = compare_files(tiny.checkpoint, files["nearest"], compensated)
    with Codes(compensated.with_suffix(".codes.safetensors")) as codes:
        same = {
            key.removeprefix("model.diffusion_model.").removesuffix(".weight")
            for key, unit in codes.units.items()
            if not unit.compensated and codes.bias(key) is None
        }
    found = {layer.name for layer in nearest.layers if layer.output_sqnr_db is not None}
    assert found <= same
    assert all(layer.weighted_sqnr_db is not None for layer in nearest.layers)
    both = compare_files(files["nearest"], files["compensated"], compensated)
    assert all(layer.output_sqnr_db is None for layer in both.layers)
    assert " output SQNR" not in render_comparison(both)
