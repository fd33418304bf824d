"""The command line: flags from the config, exit codes, JSON, streams."""

from __future__ import annotations

import dataclasses
import json
import logging
import os
import signal
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from hswq.config import CalibrationConfig, QuantizeConfig
from hswq.errors import InputError
from hswq.fast.__main__ import main
from hswq.fast.arguments import config_from, make_parser
from hswq.fast.bars import Bars
from tests.tiny import Tiny


def quantize_arguments(tiny: Tiny, output: Path) -> list[str]:
    return [
        *("quantize", "--input", str(tiny.checkpoint), "--output", str(output)),
        *("--stats", str(tiny.stats), "--pipeline", str(tiny.pipeline)),
    ]


def parse(*flags: str) -> QuantizeConfig:
    paths = ["--input", "in", "--output", "out.safetensors"]
    config = config_from(make_parser().parse_args(["quantize", *paths, *flags]), QuantizeConfig)
    assert isinstance(config, QuantizeConfig)
    return config


def test_every_option_is_a_flag_and_defaults_live_in_the_config() -> None:
    """A flag with a default of its own would overrule the library's."""
    assert parse() == QuantizeConfig()
    texts = make_parser()._subparsers._group_actions[0].choices  # type: ignore[union-attr]
    for command, config in (("quantize", QuantizeConfig), ("calibrate", CalibrationConfig)):
        text = texts[command].format_help()
        for spec in dataclasses.fields(config):
            assert f"--{spec.name.replace('_', '-')}" in text


def test_flags_reach_the_config_with_their_types() -> None:
    """A number parsed as text, or one of several patterns lost, changes the file silently."""
    config = parse(
        *("--scaled", "--keep-ratio", "0", "--keep", "a", "--keep", "b", "--search", "high"),
        *("--bins", "512", "--container", "hswq", "--steps", "3"),
    )
    assert config == QuantizeConfig(
        scaled=True,
        keep_ratio=0.0,
        keep=("a", "b"),
        search="high",
        bins=512,
        container="hswq",
        steps=3,
    )
    assert config.search_settings == (512, 1000, 10)


def test_flag_names_of_the_seed_work() -> None:
    """Users' scripts for the seed project go on working."""
    config = parse(
        *("--calib_file", "p.txt", "--num_calib_samples", "4", "--num_inference_steps", "7"),
        *("--keep_ratio", "0.25"),
    )
    expected = QuantizeConfig(calib_file="p.txt", samples=4, steps=7, keep_ratio=0.25)
    assert config == expected


@pytest.mark.parametrize(
    "flags",
    [
        ["--keep-ratio", "1.5"],
        ["--keep-ratio", "many"],
        ["--container", "zip"],
        ["--scaled", "--container", "plain"],
        ["--stats", "s.safetensors", "--steps", "3"],
        ["--no-such-flag"],
    ],
)
def test_wrong_usage_exits_with_two(
    flags: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Scripts tell a wrong flag (2) from a refused file (1)."""
    command = ["quantize", "--input", "x", "--output", str(tmp_path / "o.safetensors"), *flags]
    try:
        code = main(command)
    except SystemExit as stop:
        code = int(stop.code or 0)
    assert code == 2
    assert "--" in capsys.readouterr().err


@pytest.mark.parametrize("command", ["quantize", "plan"])
def test_sampling_options_with_given_statistics_are_refused_by_name(
    command: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Nothing is sampled: who asks for other prompts or steps would get a file without them."""
    sampling = {
        "--samples": ["3"],
        "--steps": ["3"],
        "--latent": ["64"],
        "--guidance": ["1"],
        "--seed": ["1"],
        "--calib-file": ["p.txt"],
        "--embeddings": ["e.safetensors"],
        "--allow-download": [],
        "--calib-dtype": ["bf16"],
    }
    arguments = [command, "--input", "x", "--stats", "s.safetensors"]
    if command == "quantize":
        arguments += ["--output", str(tmp_path / "o.safetensors")]
    for flag, values in sampling.items():
        assert main([*arguments, flag, *values]) == 2
        error = capsys.readouterr().err
        assert error.startswith("OptionError: ")
        assert {found for found in sampling if found in error} == {flag}
    assert main([*arguments, "--steps", "3", "--guidance", "1"]) == 2
    error = capsys.readouterr().err
    assert "--steps" in error
    assert "--guidance" in error


def test_options_that_conversion_reads_go_with_given_statistics() -> None:
    """The folder describes the model, and device and backend run the search."""
    config = parse("--stats", "s", "--pipeline", "p", "--device", "cpu", "--backend", "reference")
    assert config.stats == "s"


def test_refused_input_exits_with_one(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The message goes to stderr; stdout stays empty for pipes."""
    output = tmp_path / "o.safetensors"
    assert main(["quantize", "--input", str(tmp_path / "no"), "--output", str(output)]) == 1
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("InputError: ")
    assert not output.exists()


def test_backend_that_cannot_run_exits_with_three(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A named backend is never replaced by another."""
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    output = tmp_path / "o.safetensors"
    assert main([*quantize_arguments(tiny, output), "--backend", "triton", "--quiet"]) == 3
    assert not output.exists()


def test_json_is_all_that_stdout_holds(
    tiny: Tiny, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Programs read stdout; bars and warnings belong to stderr."""
    output = tmp_path / "o.safetensors"
    assert main([*quantize_arguments(tiny, output), "--json"]) == 0
    captured = capsys.readouterr()
    report = json.loads(captured.out)
    assert report["output_bytes"] == output.stat().st_size
    assert report["quantized"] + len(report["kept"]) == report["layers"]
    assert "quantize" in captured.err


def test_summary_plan_and_inspect_tell_the_same(
    tiny: Tiny, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Three views of one file must agree on its layers."""
    output = tmp_path / "o.safetensors"
    assert main([*quantize_arguments(tiny, output), "--quiet"]) == 0
    assert capsys.readouterr().out == ""
    assert main(["inspect", str(output), "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    arguments = quantize_arguments(tiny, output)
    arguments[0] = "plan"
    del arguments[3:5]
    assert main([*arguments, "--json", "--quiet"]) == 0
    plan = json.loads(capsys.readouterr().out)
    kept = [layer["name"] for layer in plan["layers"] if not layer["quantized"]]
    assert facts["container"] == "comfy"
    assert facts["kept_layers"] == kept
    assert facts["quantized_layers"] == len(plan["layers"]) - len(kept)
    assert facts["file_bytes"] == plan["predicted_bytes"]
    for path, word in ((output, "container"), (tiny.stats, "samples"), (tiny.checkpoint, "sdxl")):
        assert main(["inspect", str(path)]) == 0
        assert word in capsys.readouterr().out


def test_conversion_prints_the_error_of_what_it_encodes_anew(
    tiny: Tiny, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Losses are refused, or done on request and shown; the way back to 16 bit is one command."""
    fp8, output = tmp_path / "fp8.safetensors", tmp_path / "out.safetensors"
    options = ["--scaled", "--container", "hswq", "--quiet"]
    assert main([*quantize_arguments(tiny, fp8), *options]) == 0
    command = ["convert", "--input", str(fp8), "--output", str(output), "--container", "comfy"]
    assert main(command) == 1
    assert "--requantize" in capsys.readouterr().err
    assert not output.exists()
    assert main([*command, "--requantize", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["container"] == "comfy"
    assert report["output_bytes"] == output.stat().st_size
    assert all(error > 15.0 for error in report["requantized"].values())
    assert main([*command, "--requantize"]) == 0
    lines = capsys.readouterr().out
    assert f"{len(report['requantized'])} of them encoded anew" in lines
    assert "input_blocks.2.0.in_layers.2: SQNR" in lines
    plain = tmp_path / "plain.safetensors"
    command = ["dequantize", "--input", str(output), "--output", str(plain), "--dtype", "bf16"]
    assert main([*command, "--quiet"]) == 0
    assert main(["inspect", str(plain), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["container"] == "none"


def test_calibrate_never_overwrites_its_input(
    tiny: Tiny, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """One mixed-up path must not turn a checkpoint into statistics."""
    checkpoint = tmp_path / "model.safetensors"
    checkpoint.write_bytes(tiny.checkpoint.read_bytes())
    assert main(["calibrate", "--input", str(checkpoint), "--output", str(checkpoint)]) == 1
    assert "an input of this run" in capsys.readouterr().err
    assert checkpoint.read_bytes() == tiny.checkpoint.read_bytes()


def test_backends_lists_every_backend_with_reason(capsys: pytest.CaptureFixture[str]) -> None:
    """A user must see why the quick backend is not used."""
    assert main(["backends", "--json"]) == 0
    report = {entry["name"]: entry for entry in json.loads(capsys.readouterr().out)}
    assert set(report) == {"reference", "cpp", "triton"}
    assert report["reference"]["usable"] is True
    assert report["triton"]["usable"] or report["triton"]["reason"]


def test_terminated_run_exits_with_130_and_leaves_nothing(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """SIGTERM from a scheduler cleans up as Ctrl-C does."""
    reached = []

    def terminate(bars: Bars, phase: str, done: int, total: int) -> None:
        reached.append(phase)
        os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(Bars, "__call__", terminate)
    before = signal.getsignal(signal.SIGTERM)
    assert main(quantize_arguments(tiny, tmp_path / "o.safetensors")) == 130
    assert signal.getsignal(signal.SIGTERM) is before
    assert reached == ["quantize"]
    assert not list(tmp_path.iterdir())
    assert "interrupted" in capsys.readouterr().err


def write_sharded(folder: Path, index: str) -> Path:
    """A checkpoint of one shard and its index, as diffusers names them."""
    shard = "diffusion_pytorch_model.fp16-00001-of-00001.safetensors"
    save_file({"w": torch.ones(2)}, folder / shard)
    path = folder / index
    path.write_text(json.dumps({"metadata": {}, "weight_map": {"w": shard}}))
    return path


@pytest.mark.parametrize("variant", ["", ".fp16"])
def test_inspect_knows_an_index_of_shards(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], variant: str
) -> None:
    """An index ends in .json as plans do; taken for one, it would be refused as damaged."""
    path = write_sharded(tmp_path, f"diffusion_pytorch_model.safetensors.index{variant}.json")
    assert main(["inspect", str(path), "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert (facts["kind"], facts["tensors"]) == ("checkpoint", 1)


HOSTILE = "\x1b]0;title\x07\x1b[2J\x9b1m\u202e\r\ud800\nfamily  sdxl"


def test_inspect_prints_no_control_characters_of_a_file(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A downloaded file's metadata could clear the screen, set its title or forge a line."""
    path = tmp_path / "x.safetensors"
    text = HOSTILE.replace("\ud800", "")
    save_file({f"w{text}": torch.ones(2)}, path, {f"key{text}": f"value{text}"})
    assert main(["inspect", str(path)]) == 0
    shown = capsys.readouterr().out
    assert all(character.isprintable() for character in shown.replace("\n", ""))
    assert r"key\x1b]0;title\x07" in shown
    assert r"value\x1b]0;title\x07" in shown
    assert "family  sdxl" not in shown.splitlines()
    assert main(["inspect", str(path), "--json"]) == 0
    metadata = json.loads(capsys.readouterr().out)["metadata"]
    assert metadata[f"key{text}"] == f"value{text}"


def test_inspect_shows_a_hostile_plan(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Layer names of a stranger's plan are text of theirs too, half surrogate pairs included."""
    layer = {"name": HOSTILE, "kind": HOSTILE, "shape": [1], "quantized": False}
    layer |= {"scaled": False, "reason": HOSTILE}
    plan = {"plan_version": 1, "options": {HOSTILE: HOSTILE}, "source_bytes": 1}
    plan |= {"predicted_bytes": 1, "layers": [layer]}
    path = tmp_path / "plan.json"
    path.write_text(json.dumps(plan))
    assert main(["inspect", str(path)]) == 0
    shown = capsys.readouterr().out
    assert r"\x1b[2J\x9b1m\u202e\r\ud800\nfamily" in shown
    assert all(character.isprintable() for character in shown.replace("\n", ""))


def test_errors_and_log_lines_print_no_control_characters(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Errors and warnings quote names from files as well."""
    from hswq.fast import __main__ as fast

    def refuse(*_: object) -> None:
        logging.getLogger("hswq.test").warning("layer %s", HOSTILE)
        raise InputError(f"layer {HOSTILE}\nand more")

    monkeypatch.setitem(fast._COMMANDS, "inspect", refuse)
    root = logging.getLogger()
    monkeypatch.setattr(root, "handlers", [])
    assert main(["inspect", "x"]) == 1
    shown = capsys.readouterr().err
    assert shown.count(r"layer \x1b]0;title\x07\x1b[2J\x9b1m\u202e\r\ud800") == 2
    assert "WARNING hswq.test: layer" in shown
    assert "\nand more" in shown
    assert all(character.isprintable() for character in shown.replace("\n", ""))


@pytest.mark.parametrize("verbose", [[], ["--verbose"]])
def test_main_leaves_the_logger_as_it_was(tmp_path: Path, verbose: list[str]) -> None:
    """A program that calls main would lose, or gain, hswq's log lines from then on."""
    logger = logging.getLogger("hswq")
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        assert main(["inspect", str(tmp_path / "no"), *verbose]) == 1
        assert logger.level == logging.ERROR
    finally:
        logger.setLevel(before)


@pytest.mark.parametrize("quiet", [[], ["--quiet"], ["--verbose"]])
@pytest.mark.parametrize(("failure", "code"), [("option", 2), ("input", 1), ("bug", 4)])
def test_failing_run_with_json_prints_nothing_on_stdout(
    tiny: Tiny,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    quiet: list[str],
    failure: str,
    code: int,
) -> None:
    """Half a document, or text among it, would break the program that reads the output."""
    arguments = [*quantize_arguments(tiny, tmp_path / "o.safetensors"), "--json", *quiet]
    if failure == "option":
        arguments += ["--keep", "("]
    elif failure == "input":
        arguments += ["--keep", "no such layer"]
    else:
        from hswq.driver import quantize

        # As late as can be: everything but the last step was done.
        monkeypatch.setattr(quantize, "verify_output", lambda *_: 1 // 0)
    assert main(arguments) == code
    captured = capsys.readouterr()
    assert captured.out == ""
    kind = {2: "OptionError: ", 1: "PlanError: ", 4: "ZeroDivisionError: "}[code]
    assert any(line.startswith(kind) for line in captured.err.splitlines())
    assert not list(tmp_path.iterdir())
