"""Several checkpoints in one command: shared prompts, failures that stay alone, going on."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

import hswq
from hswq.driver import quantize_checkpoints
from hswq.errors import InputError, Interrupted, OptionError
from hswq.fast.__main__ import main
from tests.tiny import Tiny

SAMPLING = {"preset": "seed", "samples": 2, "steps": 2, "latent": 8}


@pytest.fixture(scope="module")
def models(tiny: Tiny, tmp_path_factory) -> list[Path]:
    """Two fine-tunes with the same text encoders, and a file that is none."""
    folder = tmp_path_factory.mktemp("models")
    paths = [folder / f"{name}.safetensors" for name in ("first", "broken", "second")]
    shutil.copyfile(tiny.checkpoint, paths[0])
    paths[1].write_bytes(b"GGUF")
    tensors = load_file(tiny.checkpoint)
    name = "model.diffusion_model.out.2.weight"
    save_file({**tensors, name: tensors[name] * 2}, paths[2])
    return paths


def test_one_failure_does_not_end_the_others(
    tiny: Tiny, models: list[Path], tmp_path: Path, capsys
) -> None:
    """A night's run must not end at its second file, nor with exit code 0."""
    options = ["--preset", "seed", "--samples", "2", "--steps", "2", "--latent", "8"]
    given = ["--pipeline", str(tiny.pipeline), "--output-dir", str(tmp_path), *options]
    paths = list(map(str, models))
    assert main(["quantize", "--input", *paths, *given, "--json", "--quiet"]) == 1
    printed = capsys.readouterr()
    outcomes = json.loads(printed.out)
    assert [outcome["source"] for outcome in outcomes] == paths
    assert [outcome["error"] is None for outcome in outcomes] == [True, False, True]
    assert "GGUF" in outcomes[1]["error"]
    assert f"1 of 3 failed: {paths[1]}. The same command tries" in printed.err
    # Tried again, the others are done before.
    written = tmp_path / "first-fp8.safetensors"
    before = written.stat().st_mtime_ns
    assert main(["quantize", "--input", *paths, *given, "--quiet"]) == 1
    assert written.stat().st_mtime_ns == before
    alone = tmp_path / "alone.safetensors"
    config = hswq.QuantizeConfig(pipeline=str(tiny.pipeline), **SAMPLING)
    hswq.quantize_checkpoint(models[2], alone, config)
    assert (tmp_path / "second-fp8.safetensors").read_bytes() == alone.read_bytes()


def test_prompts_are_encoded_once(tiny: Tiny, models: list[Path], tmp_path: Path) -> None:
    """Text encoders are half of the memory and, for T5, much of the time."""
    seen: list[str] = []
    config = hswq.QuantizeConfig(pipeline=str(tiny.pipeline), **SAMPLING)
    sources = [models[0], models[2]]
    outcomes = quantize_checkpoints(
        sources, tmp_path, config, progress=lambda phase, *_: seen.append(phase)
    )
    assert all(outcome.report is not None for outcome in outcomes)
    assert seen.count("encode") == SAMPLING["samples"]
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "first-fp8.safetensors",
        "second-fp8.safetensors",
    ]
    # Another text encoder gives other embeddings.
    tensors = load_file(models[0])
    name = next(key for key in tensors if key.startswith("conditioner.embedders.0."))
    other = tmp_path / "other.safetensors"
    save_file({**tensors, name: tensors[name] + 1}, other)
    seen.clear()
    quantize_checkpoints(
        [models[0], other], tmp_path, config, progress=lambda phase, *_: seen.append(phase)
    )
    assert seen.count("encode") == 2 * SAMPLING["samples"]


def test_interrupted_batch_goes_on(tiny: Tiny, models: list[Path], tmp_path: Path) -> None:
    """The files of an evening are not made again in the morning, unless the options differ."""
    config = hswq.QuantizeConfig(pipeline=str(tiny.pipeline), **SAMPLING)
    sources = [models[0], models[2]]
    phases: list[str] = []

    def interrupt(phase: str, done: int, total: int) -> None:
        phases.append(phase)
        if phase == "quantize" and (tmp_path / "first-fp8.safetensors").exists():
            raise KeyboardInterrupt

    with pytest.raises(Interrupted, match=r"batch\.hswq-work; the same command goes on"):
        quantize_checkpoints(sources, tmp_path, config, progress=interrupt)
    other = hswq.QuantizeConfig(pipeline=str(tiny.pipeline), scaled=True, **SAMPLING)
    with pytest.raises(InputError, match="--scaled is False there and True here"):
        quantize_checkpoints(sources, tmp_path, other)
    phases.clear()
    outcomes = quantize_checkpoints(
        sources, tmp_path, config, progress=lambda phase, *_: phases.append(phase)
    )
    assert [outcome.report is None for outcome in outcomes] == [True, False]
    assert "calibrate" not in phases
    assert not list(tmp_path.glob("*work*"))


def test_refusals(models: list[Path], tmp_path: Path, capsys) -> None:
    """What cannot be done for several files is said before the first."""
    config = hswq.QuantizeConfig(stats="s.safetensors")
    with pytest.raises(OptionError, match="--stats is of one checkpoint, and 2 are given"):
        quantize_checkpoints(models[:2], tmp_path, config)
    twice = [models[0], models[0].parent.parent / models[0].name]
    with pytest.raises(OptionError, match="two checkpoints would be written as"):
        quantize_checkpoints(twice, tmp_path, hswq.QuantizeConfig())
    with pytest.raises(InputError, match="does not exist"):
        quantize_checkpoints(models[:1], tmp_path / "nowhere", hswq.QuantizeConfig())
    assert main(["quantize", "--input", "a", "b", "--output", "c.safetensors"]) == 2
    assert "give --output-dir for several" in capsys.readouterr().err
