"""Files checked byte by byte, and against their source."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import hswq
from hswq.driver import check_file
from hswq.errors import FormatError
from hswq.fast.__main__ import main
from tests.checkpoints import write_tiny_sdxl
from tests.tiny import Tiny, tiny_calibration_config

PREFIX = "model.diffusion_model."


@pytest.fixture(scope="module")
def files(tiny: Tiny, tmp_path_factory) -> dict[str, Path]:
    """A file of every container."""
    folder = tmp_path_factory.mktemp("files")
    found = {}
    for name, options in (
        ("plain", {"container": "plain"}),
        ("comfy", {}),
        ("comfy-scaled", {"scaled": True}),
        ("legacy", {"scaled": True, "container": "legacy"}),
        ("hswq", {"scaled": True, "container": "hswq"}),
    ):
        found[name] = folder / f"{name}.safetensors"
        hswq.quantize_checkpoint(tiny.checkpoint, found[name], tiny.config(**options))
    return found


def changed(path: Path, target: Path, changes: dict[str, torch.Tensor | None]) -> Path:
    """A copy with other tensors, None for none, and the same metadata."""
    tensors = load_file(path)
    for key, tensor in changes.items():
        assert key in tensors or tensor is not None
        tensors.pop(key, None)
        if tensor is not None:
            tensors[key] = tensor
    with safe_open(path, "pt") as handle:
        save_file(tensors, target, handle.metadata())
    return target


@pytest.mark.parametrize("name", ["plain", "comfy", "comfy-scaled", "legacy", "hswq"])
def test_files_of_every_container_are_in_order(tiny, files, name):
    """What hswq writes must pass its own check; the digest is the file's."""
    found = check_file(files[name], tiny.checkpoint)
    assert found.sha256 == {str(files[name]): hashlib.sha256(files[name].read_bytes()).hexdigest()}
    assert found.quantized_layers > 100
    assert found.corrected_biases == 0
    assert found.equal_tensors > 100
    assert found.worst_sqnr_db > 10.0
    check_file(tiny.checkpoint)


def first(path: Path, dtype: torch.dtype, ending: str) -> str:
    tensors = load_file(path).items()
    return next(key for key, it in tensors if it.dtype == dtype and key.endswith(ending))


def test_damage_is_told(tiny, files, tmp_path):
    """Each is something that a faulty disk, a cut download or another tool leaves behind."""
    path, copy = files["hswq"], tmp_path / "copy.safetensors"
    weight = first(path, torch.float8_e4m3fn, ".weight")
    scale = weight.removesuffix("weight") + "scale"
    norm = PREFIX + "out.0.weight"
    tensors = load_file(path)
    bad = tensors[weight].clone()
    bad.view(torch.uint8)[0] = 0xFF
    infinite = tensors[norm].clone()
    infinite[0] = torch.inf
    for key, tensor, words in (
        (weight, bad, f"'{weight}' .F8_E4M3. holds NaN or Inf"),
        (norm, infinite, f"'{norm}' .F16. holds NaN or Inf"),
        (scale, torch.tensor(0.0), "one finite number above 0 is needed"),
        (weight, tensors[weight].half(), "is planned FP8 and is F16"),
        (weight, None, "of its plan is missing"),
    ):
        with pytest.raises(FormatError, match=words):
            check_file(changed(path, copy, {key: tensor}))


def test_other_tensors_than_the_sources_are_told(tiny, files, tmp_path):
    """A file that paints well and is not what its name says."""
    path, copy = files["plain"], tmp_path / "copy.safetensors"
    weight = first(path, torch.float8_e4m3fn, ".weight")
    norm = PREFIX + "out.0.weight"
    tensors = load_file(path)
    ids = first(path, torch.int64, "position_ids")
    for key, tensor, words in (
        (norm, tensors[norm] + 0.01, f"'{norm}' differs from the source's"),
        (norm, None, f"'{norm}' of the source is missing"),
        ("extra", torch.zeros(3), "'extra' is not in the source"),
        (weight, -tensors[weight].float(), "is no rounding of the source's weight"),
        (ids, None, f"'{ids}' of the source is missing"),
        (ids, tensors[ids] + 1, f"'{ids}' differs from the source's"),
        (ids, torch.zeros(3, dtype=torch.int64), f"'{ids}' differs from the source's"),
        ("bytes", torch.zeros(3, dtype=torch.uint8), "'bytes' is not in the source"),
        (weight.removesuffix("weight") + "junk", torch.zeros(2), "junk' is not in the source"),
        ("mask", torch.ones(2, dtype=torch.bool), "'mask' is not in the source"),
    ):
        if tensor is not None and key == weight:
            tensor = tensor.to(torch.float8_e4m3fn)
        with pytest.raises(FormatError, match=words):
            check_file(changed(path, copy, {key: tensor}), tiny.checkpoint)
    other = tmp_path / "other.safetensors"
    write_tiny_sdxl(other, seed=5)
    with pytest.raises(FormatError, match=r"and [0-9]+ more"):
        check_file(path, other)


@pytest.fixture(scope="module")
def compensated(tiny: Tiny, tmp_path_factory) -> dict[str, Path]:
    """Files of compensated codes and corrected biases."""
    folder = tmp_path_factory.mktemp("compensated")
    options = {"rounding": "compensated", "bias_correction": True}
    found = {}
    for name, more in (("v1", {}), ("v2", {"scaled": True, "container": "hswq"})):
        stats, found[name] = folder / f"{name}.stats.safetensors", folder / f"{name}.safetensors"
        config = tiny_calibration_config(tiny.pipeline, **options, **more)
        hswq.calibrate_checkpoint(tiny.checkpoint, config, stats)
        config = tiny.config(stats=str(stats), **options, **more)
        hswq.quantize_checkpoint(tiny.checkpoint, found[name], config)
    return found


def damaged(kind: str, weight: torch.Tensor) -> torch.Tensor:
    """Codes as a faulty disk or a wrong program leaves them."""
    codes = weight.clone().view(torch.uint8)
    flat = codes.reshape(-1)
    if kind == "one sign in a hundred":
        chosen = torch.randperm(flat.numel(), generator=torch.Generator().manual_seed(0))
        flat[chosen[: max(1, flat.numel() // 100)]] ^= 0x80
    elif kind == "a row of zeros":
        codes[len(codes) // 2] = 0
    elif kind == "two rows changed places":
        codes[:2] = codes[:2].flip(0)
    elif kind == "one exponent":
        flat[int(flat.int().bitwise_and(0x7F).argmax())] ^= 0x20
    return codes.view(torch.float8_e4m3fn)


DAMAGE = ("one sign in a hundred", "a row of zeros", "two rows changed places", "one exponent")


@pytest.mark.parametrize("name", ["v1", "v2"])
def test_damaged_compensated_codes_are_told(tiny, compensated, tmp_path, name):
    """A twelfth of the signs of a layer changed is still 3 dB; what is told is far less."""
    path, copy = compensated[name], tmp_path / "copy.safetensors"
    found = check_file(path, tiny.checkpoint)
    assert found.corrected_biases > 50
    tensors = load_file(path)
    for ending in ("input_blocks.1.0.in_layers.2.weight", "ff.net.0.proj.weight"):
        key = first(path, torch.float8_e4m3fn, ending)
        for kind in DAMAGE:
            changed(path, copy, {key: damaged(kind, tensors[key])})
            with pytest.raises(FormatError, match="is no rounding of the source's weight"):
                check_file(copy, tiny.checkpoint)
    bias = PREFIX + "input_blocks.1.0.in_layers.2.bias"
    for value in (tensors[bias] + 100.0, torch.full_like(tensors[bias], -6e4)):
        changed(path, copy, {bias: value})
        with pytest.raises(FormatError, match="further from the source's than a correction"):
            check_file(copy, tiny.checkpoint)


@pytest.mark.parametrize("name", ["plain", "comfy-scaled", "hswq"])
def test_one_wrong_code_of_nearest_rounding_is_told(tiny, files, tmp_path, name):
    """Which codes are the nearest is known to the bit."""
    path, copy = files[name], tmp_path / "copy.safetensors"
    key = first(path, torch.float8_e4m3fn, "ff.net.0.proj.weight")
    weight = load_file(path)[key]
    weight.view(torch.uint8)[3, 5] ^= 1
    changed(path, copy, {key: weight})
    with pytest.raises(FormatError, match=rf"1 of {weight.numel()} codes are not the nearest"):
        check_file(copy, tiny.checkpoint)


def test_scales_belong_to_their_codes(tiny, files, tmp_path):
    """Codes read with twice their scale are another weight."""
    path, copy = files["hswq"], tmp_path / "copy.safetensors"
    key = first(path, torch.float8_e4m3fn, ".weight").removesuffix("weight") + "scale"
    changed(path, copy, {key: load_file(path)[key] * 1.01})
    with pytest.raises(FormatError, match="codes are not the nearest"):
        check_file(copy, tiny.checkpoint)


def test_command_line_verifies(tiny, files, tmp_path, capfd):
    """The digest is what publishers put beside the file."""
    arguments = ["inspect", str(files["comfy"]), "--verify", "--against", str(tiny.checkpoint)]
    assert main([*arguments, "--json"]) == 0
    verified = json.loads(capfd.readouterr().out)["verified"]
    digest = hashlib.sha256(files["comfy"].read_bytes()).hexdigest()
    assert verified["sha256"] == {str(files["comfy"]): digest}
    assert main(arguments) == 0
    assert digest in capfd.readouterr().out
    assert main(["inspect", str(files["comfy"]), "--against", str(tiny.checkpoint)]) == 2
    assert main(["inspect", str(tiny.stats), "--verify"]) == 1
    assert "--verify checks checkpoints" in capfd.readouterr().err
