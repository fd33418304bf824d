"""The quality benchmark: its baseline is the seed's, and its statistics are those it names."""

from __future__ import annotations

import json
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

import hswq
from benchmarks import quality, quality_tables
from benchmarks.seed_algorithm import DualMonitor, kept_by_variance
from hswq.calibration import SamplingRun
from hswq.driver.sampling import prepare_sampling
from hswq.driver.source import open_source
from hswq.formats.quantized import quantized_weights
from hswq.formats.reader import Checkpoint
from hswq.quality.images import Painted
from tests.tiny import Tiny, tiny_calibration_config


@pytest.fixture(scope="module")
def variances(tiny: Tiny) -> dict[str, float]:
    """Output variances by layer, summed up by the seed's hooks and not by hswq's."""
    config = tiny_calibration_config(tiny.pipeline)
    with open_source(tiny.checkpoint) as source:
        sampling = prepare_sampling(source, config, lambda *step: None)
        monitors = {}
        for name, part in sampling.denoiser.named_modules():
            if isinstance(part, (nn.Linear, nn.Conv2d)):
                monitors[name] = DualMonitor()
                part.register_forward_hook(monitors[name])
        run = SamplingRun(sampling.pipeline, sampling.sampler, config, sampling.conditioning)
        assert run.sample(run.indices, "calibrate") == []
    units = sampling.model_map.units()
    # In the UNet every weight feeds one layer.
    assert all(len(unit.modules) == 1 for unit in units)
    return {unit.name: monitors[unit.modules[0].name].variance for unit in units}


@pytest.mark.parametrize("share", [None, 0.0, 0.05, 0.29])
def test_seed_baseline_is_what_preset_seed_writes(
    tiny: Tiny, variances: dict[str, float], tmp_path: Path, share: float | None
) -> None:
    """The benchmark would compare with something that the seed does not do."""
    output = tmp_path / "out.safetensors"
    budget = {} if share is None else {"keep_bytes": share}
    config = tiny.config(preset="seed", **budget)
    hswq.quantize_checkpoint(tiny.checkpoint, output, config)
    units = tiny.calibration.model_map.units()
    ranking = sorted(variances, key=lambda name: (-variances[name], name))
    if share is None:
        expected = set(ranking[: int(len(ranking) * 0.1)])
    else:
        expected = kept_by_variance(variances, {unit.name: unit.numel for unit in units}, share)
    assert share == 0.0 or expected
    with Checkpoint.open(tiny.checkpoint) as source, Checkpoint.open(output) as written:
        fp8 = {weight.weight_key for weight in quantized_weights(written).values()}
        assert fp8 == {unit.key for unit in units if unit.name not in expected}
        for key in source.tensors:
            exact = source.read(key)
            if key in fp8:
                exact = exact.float().clamp(-448, 448).to(torch.float8_e4m3fn)
            found = written.read(key)
            assert found.dtype == exact.dtype
            ours, theirs = (it.reshape(-1).view(torch.uint8) for it in (found, exact))
            assert torch.equal(ours, theirs), key


@pytest.mark.parametrize("options", quality.KINDS.values(), ids=quality.KINDS)
def test_check_seed_sees_other_layers_and_other_codes(
    tiny: Tiny, tmp_path: Path, options: dict[str, object]
) -> None:
    """A check that passes whatever it is given checks nothing."""
    subject = SimpleNamespace(checkpoint=tiny.checkpoint)
    output = tmp_path / "out.safetensors"
    config = tiny.config(preset="seed", keep_bytes=0.05, **options)
    report = hswq.quantize_checkpoint(tiny.checkpoint, output, config)
    kept = {layer.name for layer in report.plan.kept}
    quality.check_seed(subject, tiny.stats, output, kept, 0.05)
    with pytest.raises(AssertionError):
        quality.check_seed(subject, tiny.stats, output, kept, 0.5)
    with Checkpoint.open(output) as written:
        key = next(iter(quantized_weights(written).values())).weight_key
        begin = written.tensors[key].begin
    content = bytearray(output.read_bytes())
    content[begin] ^= 1
    output.write_bytes(content)
    with pytest.raises(AssertionError):
        quality.check_seed(subject, tiny.stats, output, kept, 0.05)


def test_paired_ratio_is_that_of_the_prompts() -> None:
    """One prompt that goes astray rules a ratio of means; pairs show what is sure."""
    seed = {"latent_mse_per_prompt": [2.0, 8.0, 400.0]}
    best = {"latent_mse_per_prompt": [1.0, 2.0, 50.0]}
    mean, low, high = quality_tables.paired_ratio(seed, best)
    assert mean == pytest.approx(4.0)
    # Logarithms ln 2 * (1, 2, 3): standard deviation ln 2, t(0.975, 2) = 4.30265.
    width = 4.30265 * math.log(2.0) / math.sqrt(3.0)
    assert low == pytest.approx(4.0 * math.exp(-width), rel=1e-5)
    assert high == pytest.approx(4.0 * math.exp(width), rel=1e-5)
    assert quality_tables.paired_ratio(seed, {}) is None
    assert quality_tables.paired_ratio(seed, {"latent_mse_per_prompt": [1.0, 0.0, 1.0]}) is None
    assert quality_tables.paired_ratio(None, best) is None


def test_rows_keep_the_prompts() -> None:
    """Without them no paired figure can be computed afterwards."""
    generator = torch.Generator().manual_seed(0)
    images = [torch.rand(4, 3, 8, 8, generator=generator) for _ in range(2)]
    latents = [torch.randn(4, 4, 2, 2, generator=generator) for _ in range(2)]
    found = quality.errors(*map(Painted, latents, images), 2)
    assert json.loads(json.dumps(found)) == found
    differences = (latents[0] - latents[1]).double().square().reshape(2, -1).mean(1)
    assert found["latent_mse_per_prompt"] == [float(f"{it:.4g}") for it in differences.tolist()]


def record_rows(folder: Path, monkeypatch, *rows: dict[str, Any]) -> None:
    """Let the results be these rows, of the tables' calibration and images unless they differ."""
    common = {"op": "quality", "model": "demo", "kind": "V1", "latent_mse_ci95": 1e-5, "steps": 25}
    common |= {**quality_tables.CALIBRATION, **quality_tables.PAINTED}
    lines = [json.dumps({**common, **row}) for row in rows]
    (folder / "here.jsonl").write_text("\n".join(lines))
    monkeypatch.setattr(quality_tables, "RESULTS", folder)


def test_table_reports_pairs(tmp_path: Path, monkeypatch) -> None:
    """Rows of earlier runs hold no prompts and must still be shown."""
    rows = [
        {"lever": "seed", "keep_bytes": 0.05, "latent_mse": 4e-3},
        {"lever": "best", "keep_bytes": 0.05, "latent_mse": 1e-3},
        {"lever": "seed", "keep_bytes": 0.1, "latent_mse": 3e-3},
        {"lever": "best", "keep_bytes": 0.1, "latent_mse": 1e-3},
    ]
    rows[0]["latent_mse_per_prompt"] = [2e-3, 8e-3]
    rows[1]["latent_mse_per_prompt"] = [1e-3, 4e-3]
    record_rows(tmp_path, monkeypatch, *rows)
    text = quality_tables.table("demo")
    assert "| 4; paired 2 [2, 2] |" in text
    assert "| 3 |" in text


@pytest.mark.parametrize(
    "other",
    [{"prompts": 8}, {"seeds": 1}, {"steps": 4}, {"samples": 8}, {"calls": 8}, {"varied": {}}],
    ids=str,
)
def test_table_shows_rows_of_its_own_conditions(tmp_path: Path, monkeypatch, other) -> None:
    """A quick look at eight prompts must not take the place of the published figure."""
    row = {"lever": "seed", "keep_bytes": 0.05, "latent_mse": 4e-3}
    record_rows(tmp_path, monkeypatch, row, {**row, "latent_mse": 9e-3, **other})
    assert "4.0e-03" in quality_tables.table("demo")
    assert "9.0e-03" not in quality_tables.table("demo")


def test_later_rows_replace_earlier_ones_of_any_machine(tmp_path: Path, monkeypatch) -> None:
    """Files are read by name, and a machine's name says nothing of when it was used."""
    row = {"lever": "seed", "keep_bytes": 0.05}
    late = {**row, "latent_mse": 1e-3, "date": "2026-02-01T00:00:00+00:00"}
    early = {**row, "latent_mse": 2e-3, "date": "2026-01-01T00:00:00+00:00"}
    record_rows(tmp_path, monkeypatch, late, early, {**row, "latent_mse": 3e-3})
    assert quality_tables.latest_rows("demo")["V1", "seed", 0.05]["latent_mse"] == 1e-3


def test_variations_stand_below_the_default_of_equal_images(tmp_path: Path, monkeypatch) -> None:
    """One noise a prompt is not to be compared with two; no lever is left out."""
    rows = []
    for lever in quality_tables.LEVERS:
        row = {"lever": lever, "keep_bytes": 0.0, "seeds": 1}
        rows += [
            {**row, "latent_mse": 5e-4, "seeds": 2},
            {**row, "latent_mse": 6e-4},
            {**row, "latent_mse": 7e-4, "samples": 8, "varied": {"samples": 8}},
        ]
    record_rows(tmp_path, monkeypatch, *rows)
    lines = quality_tables.variations().splitlines()[2:]
    assert len(lines) == 2 * len(quality_tables.LEVERS)
    assert all("32 x 1, 25 steps | - | 6.0e-04" in line for line in lines[::2])
    assert all("samples 8 | 7.0e-04" in line for line in lines[1::2])


def test_noise_changes_every_weight_by_half_a_step_of_float16_at_most() -> None:
    """More would be no bound for what rounding may be blamed for; none would be no test."""
    module = nn.Sequential(nn.Linear(64, 64), nn.LayerNorm(64), nn.Conv2d(8, 8, 3))
    before = {name: value.clone() for name, value in module.state_dict().items()}
    other = quality.perturbed(module).state_dict()
    for name, value in module.state_dict().items():
        assert torch.equal(value, before[name])
        if name in ("0.weight", "2.weight"):
            relative = ((other[name] - value) / value).abs()
            assert quality_tables.NOISE / 2 < float(relative.max()) <= 1.001 * quality_tables.NOISE
            assert float((other[name] != value).double().mean()) > 0.99
        else:
            assert torch.equal(other[name], value)
