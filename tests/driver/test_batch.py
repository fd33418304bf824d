"""Several checkpoints in one command: shared prompts, failures that stay alone, going on."""

from __future__ import annotations

import json
import logging
import os
import shutil
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

import hswq
from hswq.driver import batch, quantize_checkpoints
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


def split(source: Path, folder: Path) -> Path:
    """Write a checkpoint as two shards, the second of the name that a batch gives to "a"."""
    tensors = load_file(source)
    half = len(tensors) // 2
    names = ["model-00001-of-00002.safetensors", "a-fp8.safetensors"]
    parts = [dict(list(tensors.items())[:half]), dict(list(tensors.items())[half:])]
    for name, part in zip(names, parts, strict=True):
        save_file(part, folder / name)
    weight_map = {key: name for name, part in zip(names, parts, strict=True) for key in part}
    index = folder / "b.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return index


@pytest.mark.parametrize("link", ["none", "symbolic", "hard", "shard", "broken", "option"])
def test_no_output_is_an_input_of_another_checkpoint(tiny: Tiny, tmp_path: Path, link: str) -> None:
    """The first output would replace the second input, which is then quantized as a copy of it."""
    sources = [tmp_path / "a.safetensors", tmp_path / "b.safetensors"]
    shutil.copyfile(tiny.checkpoint, sources[0])
    output = tmp_path / "a-fp8.safetensors"
    options = {}
    if link == "shard":
        sources[1] = split(tiny.checkpoint, tmp_path)
    elif link == "option":
        shutil.copyfile(tiny.checkpoint, output)
        options = {"text_encoder": (str(output),)}
        sources.pop()
    else:
        content = b"GGUF" if link == "broken" else tiny.checkpoint.read_bytes()
        sources[1].write_bytes(content)
        if link == "symbolic":
            output.symlink_to("b.safetensors")
        elif link == "hard":
            os.link(sources[1], output)
        else:
            sources[1] = sources[1].rename(output)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    config = hswq.QuantizeConfig(pipeline=str(tiny.pipeline), **SAMPLING, **options)
    with pytest.raises(InputError, match=r"a-fp8\.safetensors' is an input of this run"):
        quantize_checkpoints(sources, tmp_path, config)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_two_names_of_one_output(models: list[Path], tmp_path: Path) -> None:
    """A link left in the folder would let the second file take the place of the first."""
    (tmp_path / "first-fp8.safetensors").symlink_to("second-fp8.safetensors")
    with pytest.raises(OptionError, match="two checkpoints would be written as"):
        quantize_checkpoints([models[0], models[2]], tmp_path, hswq.QuantizeConfig())


class Calls:
    """Stands in for the work on one checkpoint: writes a file, or fails as it is told."""

    def __init__(self, **failures: BaseException) -> None:
        self.failures = failures
        self.done: list[str] = []

    def __call__(self, source: str, output: Path, *_: object) -> None:
        name = Path(source).stem
        if name in self.failures:
            raise self.failures[name]
        output.write_bytes(name.encode())
        self.done.append(name)


@pytest.fixture
def sources(tiny: Tiny, tmp_path: Path) -> list[Path]:
    paths = [tmp_path / f"{name}.safetensors" for name in ("one", "two", "three")]
    for path in paths:
        shutil.copyfile(tiny.checkpoint, path)
    (tmp_path / "out").mkdir()
    return paths


def run(sources: list[Path], monkeypatch, calls: Calls, **options: object) -> list[str | None]:
    monkeypatch.setattr(batch, "quantize_one", calls)
    config = hswq.QuantizeConfig(**SAMPLING, **options)
    outcomes = quantize_checkpoints(sources, sources[0].parent / "out", config)
    return [outcome.error for outcome in outcomes]


@pytest.mark.parametrize(
    "failure", [RuntimeError("odd"), MemoryError("much"), KeyError("k"), ValueError("v")]
)
def test_a_defect_does_not_end_the_others(
    sources: list[Path], monkeypatch, caplog, failure: Exception
) -> None:
    """An error that nobody foresaw must not cost the other checkpoints of a night."""
    calls = Calls(one=failure)
    with caplog.at_level(logging.ERROR, logger="hswq"):
        errors = run(sources, monkeypatch, calls)
    assert errors[0] is not None
    assert errors[0].startswith(f"{type(failure).__name__}: ")
    assert "internal error; the log has its traceback" in errors[0]
    assert errors[1:] == [None, None]
    assert calls.done == ["two", "three"]
    assert f"{sources[0]} failed" in caplog.text
    assert "Traceback" in caplog.text
    # What is done stays done.
    calls = Calls()
    assert run(sources, monkeypatch, calls) == [None, None, None]
    assert calls.done == ["one"]


def test_a_note_that_cannot_be_written_costs_nothing(
    sources: list[Path], monkeypatch, caplog
) -> None:
    """The file is complete: a full disk at its note is no failure, and does not end the others."""

    def refuse(self: object, name: str, text: str) -> None:
        if name.startswith("done-"):
            raise InputError("no space")

    monkeypatch.setattr(batch.WorkFolder, "write", refuse)
    assert run(sources, monkeypatch, calls := Calls()) == [None, None, None]
    assert calls.done == ["one", "two", "three"]
    assert "one-fp8.safetensors is done and would be written again: no space" in caplog.text


@pytest.mark.parametrize("changed", ["source", "prompts", "encoder", "output", "note"])
def test_what_a_file_was_made_from_counts(
    tiny: Tiny, sources: list[Path], tmp_path: Path, monkeypatch, changed: str
) -> None:
    """A fine-tune that was trained on, or other prompts, would keep yesterday's file."""
    prompts, encoder = tmp_path / "prompts.txt", tmp_path / "encoder.safetensors"
    prompts.write_text("a fox")
    shutil.copyfile(tiny.checkpoint, encoder)
    options = {"calib_file": str(prompts), "text_encoder": (str(encoder),)}
    run(sources, monkeypatch, Calls(three=OSError("gone")), **options)
    path = {
        "source": sources[1],
        "prompts": prompts,
        "encoder": encoder,
        "output": tmp_path / "out" / "two-fp8.safetensors",
        "note": tmp_path / "out" / "batch.hswq-work" / "done-two-fp8.safetensors",
    }[changed]
    if changed == "note":
        path.write_bytes(b"\xff")
    else:
        # The size stays.
        os.utime(path, ns=(1, 1))
    assert run(sources, monkeypatch, calls := Calls(), **options) == [None, None, None]
    all_of_them = ["one", "two", "three"]
    assert calls.done == (all_of_them if changed in ("prompts", "encoder") else ["two", "three"])


def test_checkpoints_are_dropped_and_added(sources: list[Path], monkeypatch) -> None:
    """Without its broken file, or with one more, a batch goes on where it was."""
    assert run(sources[:2], monkeypatch, Calls(two=InputError("broken")))[0] is None
    assert run([sources[0], sources[2]], monkeypatch, calls := Calls()) == [None, None]
    assert calls.done == ["three"]
    assert not list(sources[0].parent.glob("out/*work*"))
