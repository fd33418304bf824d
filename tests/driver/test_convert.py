"""Containers into each other, and FP8 files back into 16 or 32 bit."""

from __future__ import annotations

import hashlib
import json
import math
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import hswq
from hswq.errors import FormatError, InputError
from hswq.formats.quantized import (
    container_keys,
    dequantize,
    detect_container,
    quantized_weights,
    read_scale,
)
from hswq.formats.reader import Checkpoint
from tests.tiny import Tiny

SOURCES = [
    (False, "comfy"),
    (False, "plain"),
    (False, "hswq"),
    (True, "comfy"),
    (True, "legacy"),
    (True, "hswq"),
]
CONTAINERS = ("comfy", "plain", "legacy", "hswq")
# What a container lacks for a file of another, by FORMATS: no scaled convolutions in comfy, no
# scales in plain, no FP8 convolutions in legacy.
LACKS = {
    (False, "comfy", "legacy"): "FP8 weights of conv2d",
    (False, "plain", "legacy"): "FP8 weights of conv2d",
    (False, "hswq", "legacy"): "FP8 weights of conv2d",
    (True, "comfy", "plain"): "scales of linear",
    (True, "comfy", "legacy"): "FP8 weights of conv2d",
    (True, "legacy", "plain"): "scales of linear",
    (True, "hswq", "comfy"): "scales of conv2d",
    (True, "hswq", "plain"): "scales of",
    (True, "hswq", "legacy"): "FP8 weights of conv2d",
}


def raw(value: Tensor) -> Tensor:
    return value.reshape(-1).view(torch.uint8)


@pytest.fixture(scope="module")
def files(tiny: Tiny, tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[bool, str], Path]:
    folder = tmp_path_factory.mktemp("files")
    found = {}
    for scaled, container in SOURCES:
        path = folder / f"{scaled}-{container}.safetensors"
        # Below 448 / amax no bit of a V1 weight survives; the V2 scales are other than 1.
        hswq.quantize_checkpoint(
            tiny.checkpoint, path, tiny.config(scaled=scaled, container=container)
        )
        found[scaled, container] = path
    return found


@pytest.mark.parametrize("target", CONTAINERS)
@pytest.mark.parametrize(("scaled", "container"), SOURCES)
def test_conversion_keeps_every_bit_or_refuses(
    files: dict[tuple[bool, str], Path], tmp_path: Path, scaled: bool, container: str, target: str
) -> None:
    """Codes and scales are the work of hours: a conversion must not touch them."""
    source, output = files[scaled, container], tmp_path / "out.safetensors"
    lack = LACKS.get((scaled, container, target))
    if lack is not None:
        with pytest.raises(InputError, match=rf"{lack}.*it has \d+: model\.diffusion_model"):
            hswq.convert_checkpoint(source, output, target)
        assert not output.exists()
        return
    report = hswq.convert_checkpoint(source, output, target)
    assert report.requantized == {}
    with Checkpoint.open(source) as before, Checkpoint.open(output) as after:
        assert detect_container(after) == target
        bases = quantized_weights(before)
        assert bases.keys() == quantized_weights(after).keys()
        for base in bases:
            key = f"{base}.weight"
            assert torch.equal(raw(before.read(key)), raw(after.read(key)))
            assert torch.equal(read_scale(before, base), read_scale(after, base))
        ours = before.tensors.keys() - container_keys(before)
        assert after.tensors.keys() - container_keys(after) == ours
        for key in ours:
            assert before.tensors[key].dtype == after.tensors[key].dtype
            assert torch.equal(raw(before.read(key)), raw(after.read(key)))
        # The plan and the calibration are still what the codes came from.
        assert after.metadata["hswq.plan"] == before.metadata["hswq.plan"]
        if target == container:
            found, expected = (
                {key: json.loads(text) if key[0] == "_" else text for key, text in it.items()}
                for it in (after.metadata, before.metadata)
            )
            assert found == expected
            assert after.tensors.keys() == before.tensors.keys()


@pytest.mark.parametrize(("scaled", "container", "target"), sorted(LACKS))
def test_requantized_layers_come_with_their_error(
    files: dict[tuple[bool, str], Path], tmp_path: Path, scaled: bool, container: str, target: str
) -> None:
    """Only what the container cannot hold is encoded anew, and the report says how well."""
    source, output = files[scaled, container], tmp_path / "out.safetensors"
    report = hswq.convert_checkpoint(source, output, target, requantize=True)
    assert report.requantized
    with Checkpoint.open(source) as before, Checkpoint.open(output) as after:
        assert detect_container(after) == target
        for base in quantized_weights(before):
            exact = dequantize(before, base)
            key = f"{base}.weight"
            written = (
                dequantize(after, base)
                if base in quantized_weights(after)
                else after.read(key).float()
            )
            if base not in report.requantized:
                assert torch.equal(exact, written)
                continue
            noise = float((exact.double() - written.double()).square().sum())
            found = report.requantized[base]
            if found is None:
                assert noise == 0.0
            else:
                snr = 10 * math.log10(float(exact.double().square().sum()) / noise)
                assert found == pytest.approx(snr)
                # Tiny weights without their scale are subnormal codes.
                assert snr > (60.0 if target == "legacy" else 15.0)
        if target == "legacy":
            kinds = {len(after.tensors[f"{base}.weight"].shape) for base in report.requantized}
            assert kinds == {4}
            assert {after.tensors[f"{b}.weight"].dtype for b in report.requantized} == {"F16"}


def test_files_of_other_tools_are_converted(files: dict, tmp_path: Path) -> None:
    """A scale a row, as compressed-tensors and others write it, goes only where it is read."""
    tensors = {
        "a.weight": (torch.arange(12.0).reshape(4, 3) + 1).to(torch.float8_e4m3fn),
        "a.weight_scale": torch.tensor([0.5, 0.25, 0.125, 2.0]).reshape(4, 1),
        "a.bias": torch.ones(4, dtype=torch.bfloat16),
    }
    source, output = tmp_path / "other.safetensors", tmp_path / "out.safetensors"
    save_file(tensors, source, {"modelspec.title": "x"})
    with pytest.raises(InputError, match="scales of rows"):
        hswq.convert_checkpoint(source, output, "comfy")
    hswq.convert_checkpoint(source, output, "hswq")
    written = load_file(output)
    assert torch.equal(written["a.scale"], tensors["a.weight_scale"].reshape(4))
    assert torch.equal(raw(written["a.weight"]), raw(tensors["a.weight"]))
    report = hswq.convert_checkpoint(source, output, "comfy", requantize=True)
    with Checkpoint.open(source) as before, Checkpoint.open(output) as after:
        assert after.metadata["modelspec.title"] == "x"
        exact, other = dequantize(before, "a"), dequantize(after, "a")
        # One scale: half a step of the largest magnitudes at most.
        assert float((exact - other).abs().max()) <= float(exact.max()) / 448 * 16
    assert report.requantized["a"] > 25.0


def test_input_scales_are_carried_or_named(tmp_path: Path) -> None:
    """A calibrated input scale that vanishes changes how ComfyUI computes."""
    marker = b'{"format":"float8_e4m3fn"}'
    tensors = {
        "a.weight": torch.ones(4, 3).to(torch.float8_e4m3fn),
        "a.weight_scale": torch.tensor(1.0),
        "a.input_scale": torch.tensor(0.125),
        "a.comfy_quant": torch.tensor(list(marker), dtype=torch.uint8),
    }
    source, output = tmp_path / "x.safetensors", tmp_path / "out.safetensors"
    save_file(tensors, source)
    hswq.convert_checkpoint(source, output, "hswq")
    assert float(load_file(output)["a.input_scale"]) == 0.125
    back = tmp_path / "back.safetensors"
    hswq.convert_checkpoint(output, back, "comfy")
    again = load_file(back)
    assert again.keys() == tensors.keys()
    assert all(torch.equal(raw(again[key]), raw(tensors[key])) for key in tensors)
    with Checkpoint.open(back) as checkpoint:
        layers = json.loads(checkpoint.metadata["_quantization_metadata"])["layers"]
    assert layers == {"a": json.loads(marker)}
    for container in ("plain", "legacy"):
        with pytest.raises(InputError, match=r"input scales \(it has 1: a\)"):
            hswq.convert_checkpoint(source, output, container)


def test_input_scale_of_a_convolution_goes_only_where_it_is_read(tmp_path: Path) -> None:
    """ComfyUI does not know the key: it has no scaled convolution."""
    tensors = {
        "a.weight": torch.ones(4, 3, 1, 1).to(torch.float8_e4m3fn),
        "a.scale": torch.ones(1),
        "a.input_scale": torch.tensor(0.125),
    }
    source, output = tmp_path / "x.safetensors", tmp_path / "out.safetensors"
    save_file(tensors, source)
    with pytest.raises(InputError, match=r"input scales \(it has 1: a\)"):
        hswq.convert_checkpoint(source, output, "comfy")
    assert hswq.convert_checkpoint(source, output, "comfy", requantize=True).requantized == {}
    assert load_file(output).keys() == {"a.weight"}


@pytest.mark.parametrize("dtype", ["fp16", "bf16", "fp32"])
@pytest.mark.parametrize(("scaled", "container"), SOURCES)
def test_dequantized_file_holds_code_times_scale(
    tiny: Tiny,
    files: dict[tuple[bool, str], Path],
    tmp_path: Path,
    scaled: bool,
    container: str,
    dtype: str,
) -> None:
    """Exact in float32, rounded once otherwise; everything else byte for byte, no marker left."""
    output = tmp_path / "out.safetensors"
    hswq.dequantize_checkpoint(files[scaled, container], output, dtype)
    written, source = load_file(output), load_file(tiny.checkpoint)
    assert written.keys() == source.keys()
    torch_dtype = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}[dtype]
    with Checkpoint.open(files[scaled, container]) as checkpoint:
        bases = quantized_weights(checkpoint)
        for key, value in written.items():
            base = key.removesuffix(".weight")
            expected = (
                dequantize(checkpoint, base).to(torch_dtype) if base in bases else source[key]
            )
            assert value.dtype == expected.dtype
            assert torch.equal(raw(value), raw(expected)), key
    with Checkpoint.open(output) as plain:
        assert detect_container(plain) == "none"
        assert not any(key.startswith("hswq.") for key in plain.metadata)


def test_values_beyond_float16_are_refused(tmp_path: Path) -> None:
    """Infinities in a weight turn images black."""
    source, output = tmp_path / "x.safetensors", tmp_path / "out.safetensors"
    tensors = {
        "a.weight": torch.full((4, 3), 448.0).to(torch.float8_e4m3fn),
        "a.weight_scale": torch.tensor(1e3),
    }
    save_file(tensors, source)
    with pytest.raises(InputError, match=r"'a\.weight'.*beyond the range of fp16.*bf16"):
        hswq.dequantize_checkpoint(source, output, "fp16")
    assert not output.exists()
    hswq.dequantize_checkpoint(source, output, "bf16")
    assert float(load_file(output)["a.weight"][0, 0]) == pytest.approx(448e3, rel=2.0**-8)


def test_scales_of_blocks_are_refused(tmp_path: Path) -> None:
    """Taken for unscaled, such weights would be wrong by orders of magnitude."""
    tensors = {
        "a.weight": torch.ones(256, 128).to(torch.float8_e4m3fn),
        "a.weight_scale_inv": torch.full((2, 1), 1e-3),
    }
    source, output = tmp_path / "x.safetensors", tmp_path / "out.safetensors"
    save_file(tensors, source)
    for function, option in (
        (hswq.convert_checkpoint, "hswq"),
        (hswq.dequantize_checkpoint, "fp16"),
    ):
        with pytest.raises(FormatError, match=r"'a\.weight' .*'a\.weight_scale_inv'"):
            function(source, output, option)
    assert not output.exists()


def test_other_sources_are_refused(tiny: Tiny, tmp_path: Path) -> None:
    """A 16-bit file, or int8 codes, would be copied as if something had been done."""
    output = tmp_path / "out.safetensors"
    for function, option in (
        (hswq.convert_checkpoint, "hswq"),
        (hswq.dequantize_checkpoint, "fp16"),
    ):
        with pytest.raises(InputError, match="holds no FP8 weight"):
            function(tiny.checkpoint, output, option)
        save_file({"a.weight": torch.ones(4, 3, dtype=torch.int8)}, tmp_path / "x.safetensors")
        with pytest.raises(FormatError, match="only F8_E4M3"):
            function(tmp_path / "x.safetensors", output, option)
    with pytest.raises(InputError, match="container 'gguf' is not one of"):
        hswq.convert_checkpoint(tiny.checkpoint, output, "gguf")
    assert not output.exists()


JOBS = [(hswq.convert_checkpoint, "hswq"), (hswq.dequantize_checkpoint, "fp32")]


@pytest.mark.parametrize(("function", "option"), JOBS)
def test_report_has_the_digest_of_the_file(files: dict, tmp_path: Path, function, option) -> None:
    """Who passes a converted file on needs the same proof as for a quantized one."""
    output = tmp_path / "out.safetensors"
    report = function(files[True, "comfy"], output, option)
    assert report.sha256 == hashlib.sha256(output.read_bytes()).hexdigest()
    assert report.to_dict()["sha256"] == report.sha256


@pytest.mark.parametrize(
    ("function", "option", "damaged"),
    [
        *((*JOBS[0], name) for name in ("a.weight", "a.scale", "b")),
        *((*JOBS[1], name) for name in ("a.weight", "b")),
    ],
)
def test_what_the_disk_damages_never_takes_the_name(
    tmp_path: Path, monkeypatch, function, option, damaged: str
) -> None:
    """The header is right, one byte of a tensor is not: nobody would ever know why."""
    codes = torch.arange(1, 13, dtype=torch.uint8).view(torch.float8_e4m3fn).reshape(4, 3)
    tensors = {"a.weight": codes, "a.weight_scale": torch.tensor(0.5), "b": torch.arange(5.0)}
    source, output = tmp_path / "x.safetensors", tmp_path / "out.safetensors"
    save_file(tensors, source)
    function(source, output, option)
    with Checkpoint.open(output) as checkpoint:
        place = checkpoint.tensors[damaged].begin
    before = output.read_bytes()
    real = os.fsync

    def flip(descriptor: int) -> None:
        real(descriptor)
        if os.fstat(descriptor).st_size == len(before):
            byte = os.pread(descriptor, 1, place)
            os.pwrite(descriptor, bytes([byte[0] ^ 1]), place)

    monkeypatch.setattr(os, "fsync", flip)
    with pytest.raises(FormatError, match=rf"reading back the new file failed.*'{damaged}'"):
        function(source, output, option)
    assert output.read_bytes() == before
    assert sorted(path.name for path in tmp_path.iterdir()) == [output.name, source.name]
