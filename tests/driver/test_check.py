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
from tests.tiny import Tiny

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
    for key, tensor, words in (
        (norm, tensors[norm] + 0.01, f"'{norm}' differs from the source's"),
        (norm, None, f"'{norm}' of the source is missing"),
        ("extra", torch.zeros(3), "'extra' is not in the source"),
        (weight, -tensors[weight].float(), "is no rounding of the source's weight"),
    ):
        if tensor is not None and key == weight:
            tensor = tensor.to(torch.float8_e4m3fn)
        with pytest.raises(FormatError, match=words):
            check_file(changed(path, copy, {key: tensor}), tiny.checkpoint)
    other = tmp_path / "other.safetensors"
    write_tiny_sdxl(other, seed=5)
    with pytest.raises(FormatError, match=r"and [0-9]+ more"):
        check_file(path, other)


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
