"""Compensated codes of a checkpoint: made once, chosen by plans, written to files."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

import hswq
from hswq.calibration import Calibration, Codes
from hswq.driver import compensate, plan_checkpoint
from hswq.driver.compensate import bias_key, gram_memory
from hswq.errors import FormatError, InputError, OptionError
from hswq.fast.__main__ import main
from hswq.formats.quantized import dequantize, quantized_weights
from hswq.formats.reader import Checkpoint
from tests.tiny import Tiny, tiny_calibration_config

COMPENSATED = {"rounding": "compensated", "bias_correction": True}


@pytest.fixture(scope="module")
def statistics(tiny: Tiny, tmp_path_factory) -> Path:
    """Statistics with compensated codes of V1 beside them, gathered in several groups."""
    path = tmp_path_factory.mktemp("compensated") / "s.safetensors"
    phases = []
    hswq.calibrate_checkpoint(
        tiny.checkpoint,
        tiny_calibration_config(tiny.pipeline, **COMPENSATED, gram_memory="3MB"),
        path,
        progress=lambda phase, *_: phases.append(phase),
    )
    runs = {phase for phase in phases if phase.startswith("gram")}
    assert len(runs) > 2
    assert f"gram {len(runs)}/{len(runs)}" in runs
    return path


def test_gram_matrices_leave_room_on_a_gpu(monkeypatch):
    """Eight gigabytes beside the denoiser are more than most cards have."""
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (6_000, 24_000))
    assert gram_memory(8_000, torch.device("cuda:0")) == 3_000
    assert gram_memory(2_000, torch.device("cuda:0")) == 2_000
    assert gram_memory(8_000, torch.device("cpu")) == 8_000


@pytest.mark.parametrize(("guidance", "expected"), [(None, 5.0), (7.5, 7.5), (1.0, None)])
def test_gram_matrices_count_what_guidance_combines(
    tiny, tmp_path, monkeypatch, guidance, expected
):
    """The sampler's own scale, and none where it does not run the halves."""
    seen = []

    def gather(*arguments, **options):
        seen.append(options["guidance"])
        raise InterruptedError

    monkeypatch.setattr(compensate, "gather_grams", gather)
    config = tiny_calibration_config(tiny.pipeline, **COMPENSATED, guidance=guidance)
    with pytest.raises(InterruptedError):
        hswq.calibrate_checkpoint(tiny.checkpoint, config, tmp_path / "s.safetensors")
    assert seen == [expected]


def test_groups_do_not_change_the_codes(tiny, statistics, tmp_path):
    """Who has less memory would get another model."""
    path = tmp_path / "s.safetensors"
    config = tiny_calibration_config(tiny.pipeline, **COMPENSATED)
    hswq.calibrate_checkpoint(tiny.checkpoint, config, path)
    codes = "s.codes.safetensors"
    assert (path.parent / codes).read_bytes() == (statistics.parent / codes).read_bytes()


def test_interrupted_run_does_not_sample_its_statistics_again(tiny, statistics, tmp_path):
    """Each group of Gram matrices takes as long as the statistics."""
    path = tmp_path / "s.safetensors"
    config = tiny_calibration_config(tiny.pipeline, **COMPENSATED)

    def interrupt(phase, done, total):
        if phase == "round" and done == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        hswq.calibrate_checkpoint(tiny.checkpoint, config, path, progress=interrupt)
    assert [file.name for file in tmp_path.iterdir()] == ["s.hswq-work"]
    phases = set()
    hswq.calibrate_checkpoint(
        tiny.checkpoint, config, path, progress=lambda phase, *_: phases.add(phase)
    )
    assert "calibrate" not in phases
    codes = "s.codes.safetensors"
    assert (tmp_path / codes).read_bytes() == (statistics.parent / codes).read_bytes()
    # What lies there from another run is none of a run with nearest codes.
    nearest = {"sensitivity": "impact", "calls": 1}
    expected = hswq.calibrate_checkpoint(
        tiny.checkpoint, tiny_calibration_config(tiny.pipeline, **nearest)
    )
    found = hswq.calibrate_checkpoint(
        tiny.checkpoint, tiny_calibration_config(tiny.pipeline, **nearest), path
    )
    assert found.impact.values == expected.impact.values


def test_file_has_the_codes_and_biases(tiny, statistics, tmp_path):
    """Every FP8 layer has its compensated codes, every other tensor the source's bytes."""
    output = tmp_path / "out.safetensors"
    config = tiny.config(stats=str(statistics), **COMPENSATED, verify="full", keep_bytes=0.1)
    report = hswq.quantize_checkpoint(tiny.checkpoint, output, config)
    changed = 0
    with (
        Checkpoint.open(tiny.checkpoint) as source,
        Checkpoint.open(output) as written,
        Codes(statistics.with_suffix(".codes.safetensors")) as codes,
    ):
        fp8 = {weight.weight_key for weight in quantized_weights(written).values()}
        assert len(fp8) == len(report.plan.quantized)
        for key in fp8:
            assert torch.equal(written.read(key).view(torch.uint8), codes.read(key))
        for key in source.tensors:
            if key in fp8:
                continue
            ours, theirs = written.read(key), source.read(key)
            bias = codes.bias(key.removesuffix(".bias") + ".weight")
            if key.endswith(".bias") and bias is not None and key[:-4] + "weight" in fp8:
                assert torch.equal(ours, bias.half())
                changed += not torch.equal(ours, theirs)
            else:
                assert torch.equal(ours, theirs), key
    assert changed > 50


def test_statistics_decide_where_nothing_is_asked_for(tiny, statistics, tmp_path, caplog):
    """Who calibrated with codes and forgets to say so again would get the nearest ones."""
    asked = tiny.config(stats=str(statistics), **COMPENSATED)
    hswq.quantize_checkpoint(tiny.checkpoint, tmp_path / "asked.safetensors", asked)
    silent = tiny.config(stats=str(statistics))
    hswq.quantize_checkpoint(tiny.checkpoint, tmp_path / "silent.safetensors", silent)
    both = [(tmp_path / f"{name}.safetensors").read_bytes() for name in ("asked", "silent")]
    assert both[0] == both[1]
    with pytest.raises(InputError, match="or round to the nearest codes with --rounding nearest"):
        plan_checkpoint(tiny.checkpoint, replace(silent, scaled=True))
    nearest = replace(silent, scaled=True, rounding="nearest")
    assert plan_checkpoint(tiny.checkpoint, nearest).options["rounding"] == "nearest"
    # Codes of an earlier run that lie beside new statistics.
    path = tmp_path / "new.safetensors"
    config = tiny_calibration_config(tiny.pipeline, steps=1)
    hswq.calibrate_checkpoint(tiny.checkpoint, config, path)
    codes = statistics.with_suffix(".codes.safetensors").read_bytes()
    path.with_suffix(".codes.safetensors").write_bytes(codes)
    plan = plan_checkpoint(tiny.checkpoint, replace(silent, stats=str(path)))
    assert plan.options["rounding"] == "nearest"
    assert "belongs to another calibration and is not used" in caplog.text


def test_errors_of_the_layers_fall(statistics):
    """The figures beside the codes are what plans and users are told."""
    with Codes(statistics.with_suffix(".codes.safetensors")) as codes:
        units = list(codes.units.values())
    assert all(unit.error <= unit.nearest_error for unit in units)
    assert sum(unit.compensated for unit in units) > 0.9 * len(units)


def test_file_without_statistics_is_the_same(tiny, statistics, tmp_path):
    """One command for those who need one file; what it made on the way is gone."""
    first, second = tmp_path / "first.safetensors", tmp_path / "second.safetensors"
    hswq.quantize_checkpoint(
        tiny.checkpoint, first, tiny.config(stats=str(statistics), **COMPENSATED)
    )
    config = hswq.QuantizeConfig(
        preset="seed", samples=1, steps=2, latent=8, pipeline=str(tiny.pipeline), **COMPENSATED
    )
    hswq.quantize_checkpoint(tiny.checkpoint, second, config)
    assert second.read_bytes() == first.read_bytes()
    assert {path.name for path in tmp_path.iterdir()} == {first.name, second.name}


def test_scaled_codes_go_with_their_scales(tiny, tmp_path):
    """V2: codes of one scale read with another are noise."""
    stats, output = tmp_path / "s.safetensors", tmp_path / "out.safetensors"
    arguments = ["--input", str(tiny.checkpoint), "--pipeline", str(tiny.pipeline), "--quiet"]
    v2 = ["--rounding", "compensated", "--scaled", "--container", "hswq"]
    sampling = ["--samples", "1", "--steps", "2", "--latent", "8", "--sensitivity", "variance"]
    assert main(["calibrate", "--output", str(stats), *arguments, *v2, *sampling]) == 0
    given = ["--stats", str(stats), "--output", str(output)]
    assert main(["quantize", *arguments, *v2, *given]) == 0
    nearest = tmp_path / "nearest.safetensors"
    given[-1] = str(nearest)
    assert main(["quantize", *arguments, *v2, *given, "--rounding", "nearest"]) == 0
    with (
        Checkpoint.open(tiny.checkpoint) as source,
        Checkpoint.open(output) as ours,
        Checkpoint.open(nearest) as theirs,
    ):
        for base in quantized_weights(ours):
            exact = source.read(f"{base}.weight").float()
            error = (dequantize(ours, base) - exact).square().mean()
            # Compensated weights are further away, but by less than a few steps.
            assert error <= 9 * (dequantize(theirs, base) - exact).square().mean()


def test_impact_of_compensated_codes_is_theirs(tiny, statistics, tmp_path):
    """A ranking by nearest codes would keep layers that compensation has mended."""
    path = tmp_path / "s.safetensors"
    config = tiny_calibration_config(tiny.pipeline, **COMPENSATED, sensitivity="impact", calls=1)
    compensated = hswq.calibrate_checkpoint(tiny.checkpoint, config, path)
    nearest = hswq.calibrate_checkpoint(
        tiny.checkpoint, tiny_calibration_config(tiny.pipeline, sensitivity="impact", calls=1)
    )
    assert compensated.impact.options["rounding"] == "compensated"
    ours, theirs = (sum(it.impact.values.values()) for it in (compensated, nearest))
    assert 0 < ours < theirs


def test_codes_of_another_kind_are_told(tiny, statistics, tmp_path):
    """Codes of V1 in a file with scales, or of another calibration, are noise."""
    output = tmp_path / "out.safetensors"
    for options, words in (
        ({"scaled": True}, r"other options \(container, scaled\)"),
        ({"bias_correction": False}, r"other options \(bias_correction\)"),
        ({"bins": 512}, r"other options \(bins\)"),
    ):
        config = tiny.config(stats=str(statistics), **{**COMPENSATED, **options})
        with pytest.raises(InputError, match=words):
            hswq.quantize_checkpoint(tiny.checkpoint, output, config)
    with pytest.raises(InputError, match="come without compensated codes"):
        hswq.quantize_checkpoint(tiny.checkpoint, output, tiny.config(**COMPENSATED))
    foreign = tmp_path / "s.safetensors"
    config = tiny_calibration_config(tiny.pipeline, seed=7)
    hswq.calibrate_checkpoint(tiny.checkpoint, config, foreign)
    codes = foreign.with_suffix(".codes.safetensors")
    codes.write_bytes(statistics.with_suffix(".codes.safetensors").read_bytes())
    config = tiny.config(stats=str(foreign), **COMPENSATED)
    with pytest.raises(InputError, match="does not belong to these statistics"):
        hswq.quantize_checkpoint(tiny.checkpoint, output, config)
    codes.write_bytes(tiny.stats.read_bytes())
    with pytest.raises(FormatError, match="is no file of codes"):
        hswq.quantize_checkpoint(tiny.checkpoint, output, config)
    assert not output.exists()


def test_codes_need_a_place_and_corrections_need_codes(tiny):
    """Codes without a file, and a correction without mean inputs, are told at once."""
    with pytest.raises(InputError, match="compensated codes need a file"):
        hswq.calibrate_checkpoint(
            tiny.checkpoint, tiny_calibration_config(tiny.pipeline, rounding="compensated")
        )
    with pytest.raises(OptionError, match="add --rounding compensated"):
        hswq.CalibrationConfig(bias_correction=True, rounding="nearest")


def test_bias_of_a_unit_is_found_by_its_rows(tiny):
    """A correction in the wrong rows is worse than none."""
    model_map = Calibration.load(tiny.stats).model_map
    found = {unit.key: bias_key(model_map, unit) for unit in model_map.units()}
    with Checkpoint.open(tiny.checkpoint) as checkpoint:
        for key, bias in found.items():
            expected = key.removesuffix("weight") + "bias"
            assert bias == (expected if expected in checkpoint.tensors else None)
    assert any(found.values())
    assert not all(found.values())


def test_module_in_memory_is_rounded_as_the_file_is(tiny, statistics):
    """A loop of one's own must give what the command line gives."""
    torch.manual_seed(0)
    module = torch.nn.Sequential(
        torch.nn.Conv2d(3, 8, 3, padding=1), torch.nn.Flatten(2), torch.nn.Linear(64, 5)
    )
    x = [torch.randn(4, 3, 8, 8) + 1.0 for _ in range(3)]
    with torch.no_grad(), hswq.observe(module, gram=True) as calibration:
        exact = [module(sample) for sample in x]
    errors = {}
    for name, options in (
        ("nearest", {"rounding": "nearest"}),
        ("compensated", {"rounding": "compensated", "bias_correction": False}),
        ("corrected", {}),
    ):
        config = hswq.QuantizeConfig(keep_ratio=0.0, container="hswq", **options)
        plan = hswq.make_plan(module, calibration, config)
        copy = torch.nn.Sequential(*module)
        quantized = hswq.quantize_module(copy, plan, calibration)
        with torch.no_grad():
            errors[name] = sum(
                float((quantized(sample) - y).square().mean())
                for sample, y in zip(x, exact, strict=True)
            )
    assert errors["corrected"] < errors["compensated"] < errors["nearest"]
    with pytest.raises(InputError, match="observed with gram=True"):
        hswq.quantize_module(module, plan)
