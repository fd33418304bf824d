"""No command writes over a file that it reads, whatever name leads to it."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

import hswq
from hswq.calibration import Calibration
from hswq.driver.calibrate import save_with_codes
from hswq.errors import InputError
from hswq.fast.__main__ import main
from tests.tiny import Tiny, tiny_calibration_config


@dataclass(frozen=True)
class Case:
    """A command that would write over one of its inputs.

    Attributes:
        command: with {name} for files of the folder, and OUT for the output.
        victim: the input that it would write over.
        output: OUT's name beside the victim, where the command makes another name of it.
    """

    command: str
    victim: str
    output: str | None = None


MODEL = "--input {model.safetensors}"
SAMPLING = "--samples 1 --steps 1 --latent 8"
CASES = {
    "checkpoint": Case(f"quantize {MODEL} --output OUT", "model.safetensors"),
    "shard": Case(
        "quantize --input {model.safetensors.index.json} --output OUT", "part-2.safetensors"
    ),
    "statistics": Case(f"quantize {MODEL} --stats {{s.safetensors}} --output OUT", "s.safetensors"),
    "codes": Case(
        f"quantize {MODEL} --stats {{s.safetensors}} --output OUT", "s.codes.safetensors"
    ),
    "text encoder": Case(
        f"quantize {MODEL} --text-encoder {{t.safetensors}} --output OUT", "t.safetensors"
    ),
    "embeddings": Case(
        f"quantize {MODEL} --embeddings {{t.safetensors}} --output OUT", "t.safetensors"
    ),
    "pipeline": Case(
        f"quantize {MODEL} --pipeline {{pipeline}} --output OUT", "pipeline/vae/m.safetensors"
    ),
    "saved statistics": Case(
        f"quantize {MODEL} --output {{new.safetensors}} --save-stats OUT", "model.safetensors"
    ),
    "saved codes": Case(
        "quantize --input {x.codes.safetensors} --output {new.safetensors} --save-stats OUT",
        "x.codes.safetensors",
        "x.safetensors",
    ),
    "calibrate": Case(f"calibrate {MODEL} {SAMPLING} --output OUT", "model.safetensors"),
    "calibrated codes": Case(
        "calibrate --input {x.codes.safetensors} --output OUT",
        "x.codes.safetensors",
        "x.safetensors",
    ),
    "convert": Case(f"convert {MODEL} --container hswq --output OUT", "model.safetensors"),
    "convert shards": Case(
        "convert --input {model.safetensors.index.json} --container hswq --output OUT",
        "part-1.safetensors",
    ),
    "dequantize": Case(f"dequantize {MODEL} --output OUT", "model.safetensors"),
    "plot": Case(f"plan {MODEL} --calib-file {{p.svg}} --plot OUT", "p.svg"),
    "page": Case(f"bench {MODEL} {{t.safetensors}} --calib-file {{p.html}} --html OUT", "p.html"),
    "page over a file": Case(f"bench {MODEL} {{f.html}} --html OUT", "f.html"),
    "figures": Case(
        f"bench {MODEL} {{t.safetensors}} --calib-file {{p.json}} --html OUT", "p.json", "p.html"
    ),
    "index": Case(
        "bench --input {model.safetensors.index.json} {t.safetensors} --html OUT",
        "model.safetensors.index.json",
        "model.safetensors.index.html",
    ),
    "metadata": Case(f"bench {MODEL} OUT --write-metadata", "model.safetensors"),
    "batch": Case(
        f"quantize {MODEL} {{model-fp8.safetensors}} --output-dir OUT",
        "model-fp8.safetensors",
        "",
    ),
}


@pytest.fixture
def folder(tiny: Tiny, tmp_path: Path) -> Path:
    """Every input of the cases."""
    names = ("model", "s", "t", "s.codes", "x.codes", "model-fp8")
    for name in (*(f"{name}.safetensors" for name in names), "f.html"):
        shutil.copyfile(tiny.checkpoint, tmp_path / name)
    for name in ("p.svg", "p.html", "p.json"):
        (tmp_path / name).write_text("a red fox")
    tensors = {key: value for key, value in load_file(tiny.checkpoint).items() if "out.2" in key}
    weight_map = {}
    for number, (key, value) in enumerate(tensors.items(), start=1):
        weight_map[key] = f"part-{number}.safetensors"
        save_file({key: value}, tmp_path / weight_map[key])
    index = {"metadata": {}, "weight_map": weight_map}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    (tmp_path / "pipeline" / "vae").mkdir(parents=True)
    (tmp_path / "pipeline" / "vae" / "m.safetensors").write_bytes(b"weights")
    return tmp_path


def spelled(folder: Path, case: Case, spelling: str) -> str:
    """Return a name of the victim, and where the command makes another of it, one that leads there.

    Links lie in a folder of their own.
    """
    victim = folder / case.victim
    output = victim if case.output is None else folder / case.output
    if spelling == "same":
        return str(output)
    if spelling == "dots":
        return f"./pipeline/../{output.relative_to(folder)}"
    links = folder / "links"
    links.mkdir()
    link = links / victim.name
    if spelling == "symbolic":
        link.symlink_to(victim)
    else:
        link.hardlink_to(victim)
    return str(links / output.relative_to(victim.parent))


def contents(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


@pytest.mark.parametrize("spelling", ["same", "dots", "symbolic", "hard"])
@pytest.mark.parametrize("name", CASES)
def test_no_command_writes_over_what_it_reads(
    folder: Path, monkeypatch, capsys: pytest.CaptureFixture[str], name: str, spelling: str
) -> None:
    """One mixed-up path must not cost a checkpoint, or the prompts of a week."""
    case = CASES[name]
    monkeypatch.chdir(folder)
    output = spelled(folder, case, spelling)
    command = [
        output if word == "OUT" else word.replace("{", f"{folder}/").replace("}", "")
        for word in case.command.split()
    ]
    before = contents(folder)
    assert main([*command, "--quiet"]) == 1
    assert "is an input of this run; what is read is never overwritten" in capsys.readouterr().err
    assert contents(folder) == before


def test_files_that_nothing_reads_are_replaced(tiny: Tiny, tmp_path: Path) -> None:
    """Who keeps results in the folder of a pipeline runs the same command twice."""
    pipeline = tmp_path / "pipeline"
    shutil.copytree(tiny.pipeline, pipeline)
    for output in (pipeline / "out.safetensors", pipeline / "fp8" / "out.safetensors"):
        output.parent.mkdir(exist_ok=True)
        output.write_bytes(b"of the last run")
        config = tiny.config(pipeline=str(pipeline))
        hswq.quantize_checkpoint(tiny.checkpoint, output, config)
        assert output.stat().st_size > 1000


def test_library_never_calibrates_over_its_input(tiny: Tiny, tmp_path: Path) -> None:
    """From Python as from the command line."""
    source = tmp_path / "model.safetensors"
    shutil.copyfile(tiny.checkpoint, source)
    with pytest.raises(InputError, match="is an input of this run"):
        hswq.calibrate_checkpoint(source, tiny_calibration_config(tiny.pipeline), source)
    assert source.read_bytes() == tiny.checkpoint.read_bytes()


def test_codes_lie_beside_the_statistics_that_a_link_leads_to(tiny: Tiny, tmp_path: Path) -> None:
    """Statistics written through a link, and codes beside the link: one by the file's own name
    would come without its codes."""
    link, real = tmp_path / "s.safetensors", tmp_path / "real" / "r.safetensors"
    real.parent.mkdir()
    link.symlink_to(real)
    calibration = tiny.calibration
    calibration.codes = tmp_path / "work"
    calibration.codes.write_bytes(b"codes")
    save_with_codes(calibration, link)
    codes = tmp_path / "real" / "r.codes.safetensors"
    assert codes.read_bytes() == b"codes"
    assert not (tmp_path / "s.codes.safetensors").exists()
    assert Calibration.load(real).codes == Calibration.load(link).codes == codes
    # As hubs keep them: each under its digest, with links side by side.
    hub = tmp_path / "hub"
    hub.mkdir()
    for path, name, digest in ((real, "s", "0a"), (codes, "s.codes", "1b")):
        (hub / f"{name}.safetensors").symlink_to(path.rename(tmp_path / digest))
    assert Calibration.load(hub / "s.safetensors").codes == hub / "s.codes.safetensors"
