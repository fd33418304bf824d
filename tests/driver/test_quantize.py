"""The main job on a tiny SDXL checkpoint: bytes, loading, determinism."""

from __future__ import annotations

import hashlib
import json
import shutil
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

import hswq
from hswq.formats.e4m3 import e4m3_values
from hswq.formats.quantized import dequantize, quantized_weights
from hswq.formats.reader import Checkpoint
from tests.tiny import Tiny, tiny_calibration_config

VARIANTS = [
    (False, "comfy"),
    (False, "plain"),
    (False, "hswq"),
    (True, "comfy"),
    (True, "legacy"),
    (True, "hswq"),
]


def saturating_cast(weight: Tensor) -> Tensor:
    """The plain cast of any FP8 writer, on weights inside +-448."""
    assert float(weight.abs().max()) <= 448.0
    return weight.float().to(torch.float8_e4m3fn).view(torch.uint8)


def raw(tensors: dict[str, Tensor], name: str) -> bytes:
    return tensors[name].contiguous().view(-1).view(torch.uint8).numpy().tobytes()


def fp8_names(tensors: dict[str, Tensor]) -> set[str]:
    return {
        name
        for name, tensor in tensors.items()
        if tensor.dtype == torch.float8_e4m3fn and not name.endswith("scaled_fp8")
    }


@pytest.mark.parametrize(("scaled", "container"), VARIANTS)
def test_what_is_not_quantized_is_byte_identical(
    tiny: Tiny, tmp_path: Path, scaled: bool, container: str
) -> None:
    """Norms, biases, text encoders, VAE and kept layers must come through untouched."""
    output = tmp_path / "out.safetensors"
    report = hswq.quantize_checkpoint(
        tiny.checkpoint, output, tiny.config(scaled=scaled, container=container, verify="full")
    )
    source, written = load_file(tiny.checkpoint), load_file(output)
    fp8 = fp8_names(written)
    assert len(fp8) == len(report.plan.quantized) > 10
    assert set(source) <= set(written)
    for name in set(source) - fp8:
        assert written[name].dtype == source[name].dtype
        assert raw(written, name) == raw(source, name), name
    kept = {f"model.diffusion_model.{layer.name}.weight" for layer in report.plan.kept}
    assert kept <= set(source) - fp8
    with safe_open(tiny.checkpoint, "pt") as file:
        before = file.metadata() or {}
    with safe_open(output, "pt") as file:
        after = file.metadata()
    assert {key: after[key] for key in before} == before
    assert len(json.loads(after["hswq.plan"])["layers"]) == len(report.plan.layers)


@pytest.mark.parametrize("container", ["comfy", "plain", "hswq"])
def test_unscaled_codes_are_the_plain_saturating_cast(
    tiny: Tiny, tmp_path: Path, container: str
) -> None:
    """V1 must never differ from the cast: its searched amax can only do harm."""
    output = tmp_path / "out.safetensors"
    hswq.quantize_checkpoint(tiny.checkpoint, output, tiny.config(container=container))
    source, written = load_file(tiny.checkpoint), load_file(output)
    for name in fp8_names(written):
        assert torch.equal(written[name].view(torch.uint8), saturating_cast(source[name])), name


def test_unscaled_codes_keep_a_maximum_that_is_a_midpoint(tiny: Tiny, tmp_path: Path) -> None:
    """0.10546875 lies midway between two codepoints; applying the searched amax would clip it."""
    tensors = load_file(tiny.checkpoint)
    name = max(
        (key for key in tensors if "diffusion_model" in key and tensors[key].ndim == 2),
        key=lambda key: tensors[key].numel(),
    )
    weight = tensors[name].clamp(-0.1, 0.1)
    weight.view(-1)[0] = 0.10546875
    tensors[name] = weight
    source, output = tmp_path / "midpoint.safetensors", tmp_path / "out.safetensors"
    save_file(tensors, source)
    calibration = tiny.calibration
    calibration.fingerprint = None
    config = tiny.config(keep_ratio=0.0, stats=None)
    hswq.quantize_checkpoint(source, output, config, calibration)
    codes = load_file(output)[name].view(torch.uint8)
    assert torch.equal(codes, saturating_cast(weight))
    assert float(e4m3_values()[int(codes.view(-1)[0])]) == 0.109375


def test_scaled_weights_lie_within_half_a_codepoint_step(tiny: Tiny, tmp_path: Path) -> None:
    """V2 dequantized: every weight rounds to its nearest codepoint, none further away."""
    output = tmp_path / "out.safetensors"
    config = tiny.config(scaled=True, container="hswq", keep_ratio=0.0)
    report = hswq.quantize_checkpoint(tiny.checkpoint, output, config)
    amax = {f"model.diffusion_model.{it.name}": it.amax for it in report.plan.layers}
    values = e4m3_values()[:127].double()
    with Checkpoint.open(tiny.checkpoint) as source, Checkpoint.open(output) as written:
        quantized = quantized_weights(written)
        assert len(quantized) == len(report.plan.layers)
        for base, weight in quantized.items():
            scale = float(written.read(weight.scale_key))
            assert scale == float(torch.tensor(amax[base] / 448, dtype=torch.float32))
            exact = source.read(weight.weight_key).double().clamp(-amax[base], amax[base])
            error = (exact - dequantize(written, base).double()).abs()
            upper = torch.searchsorted(values, exact.abs() / scale).clamp(1, 126)
            half_step = (values[upper] - values[upper - 1]) / 2 * scale
            # float32 rounding of the division and of the product: 2^-24 relative each.
            assert bool((error <= half_step + exact.abs() * 2.0**-22).all()), base


@pytest.mark.parametrize("scaled", [False, True])
def test_two_runs_write_identical_files(tiny: Tiny, tmp_path: Path, scaled: bool) -> None:
    """Equal inputs and statistics give equal bytes: no date, path or order of threads inside."""
    outputs = [tmp_path / "a.safetensors", tmp_path / "other name.safetensors"]
    for output in outputs:
        hswq.quantize_checkpoint(tiny.checkpoint, output, tiny.config(scaled=scaled))
    assert outputs[0].read_bytes() == outputs[1].read_bytes()


@pytest.mark.parametrize("scaled", [False, True])
def test_backends_write_identical_files(tiny: Tiny, tmp_path: Path, scaled: bool) -> None:
    """The compiled backend must not change one byte of the file."""
    written = []
    for backend in ("reference", "cpp"):
        output = tmp_path / f"{backend}.safetensors"
        config = tiny.config(scaled=scaled, container="hswq", backend=backend)
        hswq.quantize_checkpoint(tiny.checkpoint, output, config)
        written.append(output.read_bytes())
    assert written[0] == written[1]


def test_calibration_without_given_statistics_writes_the_same_file(
    tiny: Tiny, tmp_path: Path
) -> None:
    """One command and two commands are the same job."""
    given, own = tmp_path / "given.safetensors", tmp_path / "own.safetensors"
    saved = tmp_path / "saved.safetensors"
    hswq.quantize_checkpoint(tiny.checkpoint, given, tiny.config())
    options = {"samples": 1, "steps": 2, "latent": 8, "pipeline": str(tiny.pipeline)}
    config = hswq.QuantizeConfig(preset="seed", save_stats=str(saved), **options)
    hswq.quantize_checkpoint(tiny.checkpoint, own, config)
    assert own.read_bytes() == given.read_bytes()
    assert saved.read_bytes() == tiny.stats.read_bytes()


@pytest.mark.parametrize(("scaled", "container"), [(False, "comfy"), (True, "hswq")])
def test_plan_predicts_the_size_and_writes_nothing(
    tiny: Tiny, tmp_path: Path, scaled: bool, container: str
) -> None:
    """The size that `plan` shows is the size of the file; the decisions are the same."""
    config = tiny.config(scaled=scaled, container=container)
    plan = hswq.driver.plan_checkpoint(tiny.checkpoint, config)
    assert not list(tmp_path.iterdir())
    report = hswq.quantize_checkpoint(tiny.checkpoint, tmp_path / "out.safetensors", config)
    assert plan == report.plan
    assert plan.predicted_bytes == report.output_bytes
    assert report.sha256 == hashlib.sha256(Path(report.output).read_bytes()).hexdigest()


def test_unscaled_comfy_file_loads_through_diffusers(tiny: Tiny, tmp_path: Path) -> None:
    """The default V1 file has right values in a program that knows nothing of markers."""
    from diffusers import UNet2DConditionModel

    output = tmp_path / "out.safetensors"
    report = hswq.quantize_checkpoint(tiny.checkpoint, output, tiny.config())
    config = tiny.pipeline / "unet"

    def load(path: Path) -> dict[str, Tensor]:
        return UNet2DConditionModel.from_single_file(
            str(path), config=str(config), local_files_only=True, torch_dtype=torch.float32
        ).state_dict()

    source, loaded = load(tiny.checkpoint), load(output)
    changed = 0
    for name, tensor in source.items():
        rounded = e4m3_values()[saturating_cast(tensor).long()]
        if torch.equal(loaded[name], tensor):
            continue
        changed += 1
        assert torch.equal(loaded[name], rounded), name
    assert changed == len(report.plan.quantized)


@pytest.mark.parametrize("layout", ["unet-only", "no-prefix", "diffusers"])
def test_other_layouts_quantize_with_statistics_of_the_full_file(
    tiny: Tiny, tmp_path: Path, layout: str
) -> None:
    """The same UNet in another file layout is the same model: statistics fit, codes are equal."""
    tensors = load_file(tiny.checkpoint)
    prefix = "model.diffusion_model."
    unet = {name: tensor for name, tensor in tensors.items() if name.startswith(prefix)}
    source, output = tmp_path / "unet.safetensors", tmp_path / "out.safetensors"
    if layout == "unet-only":
        save_file(unet, source)
    elif layout == "no-prefix":
        save_file({name.removeprefix(prefix): tensor for name, tensor in unet.items()}, source)
    else:
        from diffusers import UNet2DConditionModel

        module = UNet2DConditionModel.from_single_file(
            str(tiny.checkpoint),
            config=str(tiny.pipeline / "unet"),
            local_files_only=True,
            torch_dtype=torch.float16,
        )
        source = tmp_path / "unet"
        module.save_pretrained(source)
    report = hswq.quantize_checkpoint(source, output, tiny.config(keep_ratio=0.0))
    full = tmp_path / "full.safetensors"
    hswq.quantize_checkpoint(tiny.checkpoint, full, tiny.config(keep_ratio=0.0))

    def codes(path: Path) -> list[bytes]:
        tensors = load_file(path)
        return sorted(raw(tensors, name) for name in fp8_names(tensors))

    assert codes(output) == codes(full)
    if layout == "diffusers":
        assert "ComfyUI drops the markers" in " ".join(report.warnings)


def test_pipeline_folder_names_the_prediction_type(tiny: Tiny, tmp_path: Path) -> None:
    """A v-prediction model without a marker would be sampled as epsilon: statistics of noise."""
    folder = tmp_path / "pipeline"
    shutil.copytree(tiny.pipeline, folder)
    path = folder / "scheduler" / "scheduler_config.json"
    scheduler = json.loads(path.read_text()) | {"prediction_type": "v_prediction"}
    path.write_text(json.dumps(scheduler))
    found = hswq.calibrate_checkpoint(tiny.checkpoint, tiny_calibration_config(folder))
    assert found.settings["sampler_config"]["prediction_type"] == "v_prediction"
    assert tiny.calibration.settings["sampler_config"]["prediction_type"] == "epsilon"


def test_calibration_is_deterministic(tiny: Tiny, tmp_path: Path) -> None:
    """The same inputs give the same statistics file, byte for byte."""
    again = tmp_path / "again.safetensors"
    hswq.calibrate_checkpoint(tiny.checkpoint, tiny_calibration_config(tiny.pipeline)).save(again)
    assert again.read_bytes() == tiny.stats.read_bytes()


def test_progress_moves_with_every_tensor(tiny: Tiny, tmp_path: Path) -> None:
    """The bar stood still while hundreds of norms and biases were copied, and then leapt."""
    seen: list[tuple[int, int]] = []
    hswq.quantize_checkpoint(
        tiny.checkpoint,
        tmp_path / "out.safetensors",
        tiny.config(),
        progress=lambda phase, done, total: seen.append((done, total)),
    )
    tensors = load_file(tiny.checkpoint).values()
    sizes = [tensor.numel() * tensor.element_size() for tensor in tensors]
    steps = [after - before for before, after in pairwise([0, *(done for done, _ in seen)])]
    assert sorted(steps) == sorted(sizes)
    assert {total for _, total in seen} == {sum(sizes)}


def test_peers_preset_keeps_sdxls_embeddings_and_ends(tiny: Tiny, tmp_path: Path) -> None:
    """Named by the modules' names, whatever the file's own are."""
    config = tiny.config(keep_ratio=0.0, keep_preset="peers")
    report = hswq.quantize_checkpoint(tiny.checkpoint, tmp_path / "out.safetensors", config)
    kept = {layer.name for layer in report.plan.kept}
    assert {"time_embed.0", "label_emb.0.2", "input_blocks.0.0", "out.2"} <= kept
    assert any(name.endswith("emb_layers.1") for name in kept)
    assert any(name.endswith("skip_connection") for name in kept)
    assert not any("attn" in name for name in kept)
    assert report.plan.options["keep_preset"] == "peers"


def test_target_size_is_met_and_used(tiny: Tiny, tmp_path: Path) -> None:
    """A file one byte too large does not fit the card; one far too small wastes it."""
    output = tmp_path / "out.safetensors"
    smallest = hswq.quantize_checkpoint(tiny.checkpoint, output, tiny.config(keep_ratio=0.0))
    for extra in (0, 40_000, 400_000):
        # The plan's text for kept layers is a little longer than for FP8 ones.
        size = smallest.output_bytes + 60_000 + extra
        report = hswq.quantize_checkpoint(
            tiny.checkpoint, output, tiny.config(target_size=str(size))
        )
        assert report.output_bytes <= size
        free = [layer.numel for layer in report.plan.quantized]
        assert size - report.output_bytes < 60_000 + min(free)
    with pytest.raises(hswq.errors.PlanError, match="cannot be met"):
        hswq.quantize_checkpoint(tiny.checkpoint, output, tiny.config(target_size="100KB"))


def test_peak_memory_is_this_process_alone() -> None:
    """A small job that a large program starts would else report the large program's memory."""
    ballast = bytearray(600 << 20)
    ballast[::4096] = b"x" * len(ballast[::4096])
    code = "from hswq.driver.report import peak_memory_bytes; print(peak_memory_bytes())"
    found = int(subprocess.check_output([sys.executable, "-c", code]))
    assert len(ballast) > found > 10 << 20
