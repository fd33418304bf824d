"""Files of one model compared by what they paint."""

from __future__ import annotations

import json
import re
import socket
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import hswq
from hswq.calibration import Recorder, save_embeddings
from hswq.config import BenchConfig
from hswq.driver import bench_files
from hswq.driver.sampling import prepare_sampling
from hswq.driver.source import open_source
from hswq.errors import InputError, OptionError
from hswq.fast.__main__ import main
from hswq.fast.render import render_bench
from hswq.formats.reader import Checkpoint
from hswq.formats.writer import CheckpointWriter, TensorSpec
from hswq.quality.bench import METRICS, Trajectory
from hswq.quality.report import write_report
from tests.checkpoints import flux_shapes, write_random
from tests.tiny import Tiny

PROMPTS = ["a photo of a cat", "<script>alert(1)</script> & a dog"]


@pytest.fixture(autouse=True)
def no_network(monkeypatch):
    """LPIPS would fetch its network."""

    def refuse(*arguments, **options):
        raise AssertionError(f"the network was used: {arguments}")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)


@pytest.fixture(scope="module")
def files(tiny: Tiny, tmp_path_factory) -> dict[str, Path]:
    """All kept, all quantized, and quantized with scales."""
    folder = tmp_path_factory.mktemp("files")
    for name, options in (
        ("kept", {"keep_ratio": 1.0, "container": "plain"}),
        ("cast", {"keep_ratio": 0.0, "container": "plain"}),
        ("half", {"keep_ratio": 0.5, "scaled": True, "container": "hswq"}),
    ):
        output = folder / f"{name}.safetensors"
        hswq.quantize_checkpoint(tiny.checkpoint, output, tiny.config(**options))
    return {name: folder / f"{name}.safetensors" for name in ("kept", "cast", "half")}


@pytest.fixture(scope="module")
def prompts(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("prompts") / "prompts.txt"
    path.write_text("\n".join(PROMPTS))
    return path


def config(tiny: Tiny, prompts: Path, **options) -> BenchConfig:
    settings = {"samples": 2, "seeds": 2, "steps": 2, "latent": 8, "calls": 3, **options}
    return BenchConfig(pipeline=str(tiny.pipeline), calib_file=str(prompts), **settings)


@pytest.fixture(scope="module")
def bench(tiny, files, prompts):
    return bench_files(tiny.checkpoint, list(files.values()), config(tiny, prompts))


def test_kept_file_paints_the_same_and_cast_file_is_the_naive_cast(bench):
    """The baseline must be what a naive user gets, and no error must come from loading."""
    naive, kept, cast, half = bench.entries
    assert [entry.name for entry in bench.entries] == [
        *("naive cast", "kept.safetensors", "cast.safetensors", "half.safetensors")
    ]
    for name in ("noise_error", "latent_mse", "image_mse"):
        assert float(kept.values[name].max()) == 0.0
        assert torch.equal(naive.values[name], cast.values[name])
        assert 0.0 < float(half.values[name].mean()) < float(naive.values[name].mean())
    assert float(kept.values["ssim"].min()) == 1.0
    assert len(naive.values["noise_error"]) == 3
    assert len(naive.values["latent_mse"]) == 4
    assert "lpips" not in naive.values
    assert half.options["container"] == "hswq"
    assert naive.options == {}


def test_naive_cast_has_the_size_of_its_file(bench, files, tmp_path):
    """Figures without sizes cannot be compared at equal size."""
    naive, _, cast, _ = bench.entries
    with Checkpoint.open(files["cast"]) as checkpoint:
        tensors = checkpoint.tensors.values()
        specs = [TensorSpec(info.name, info.dtype, info.shape) for info in tensors]
    assert naive.file_bytes == CheckpointWriter.predict_file_bytes(specs, 0)
    assert 0 < cast.file_bytes - naive.file_bytes < 200_000
    assert (naive.has_file, cast.has_file) == (False, True)
    size = f"≈ {naive.file_bytes / 1e6:,.1f} MB"
    write_report(bench, tmp_path / "report.html")
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert size in page
    assert "its size is predicted" in page
    assert f"≈ {naive.file_bytes / 1e6:.2f} MB" in render_bench(bench)
    assert bench.to_dict()["entries"][0]["file_bytes"] == naive.file_bytes


def test_noise_error_is_the_relative_squared_change():
    """By hand: (y - y0)^2 = 1 + 0 + 4 over y0^2 = 1 + 4 + 4, and 0.25 of the power for half."""
    layer = torch.nn.Linear(3, 3, bias=False)
    recorder = Recorder(2)
    handle = recorder.attach(layer)
    with torch.no_grad():
        layer.weight.copy_(torch.eye(3))
        for x in ([1.0, 2.0, 2.0], [0.0, 3.0, 0.0]):
            layer(torch.tensor([x]))
        handle.remove()
        calls = tuple(recorder.records())
        answers = tuple(layer(call.args[0]).double() for call in calls)
        trajectory = Trajectory(calls, answers)
        device = torch.device("cpu")
        assert trajectory.errors(layer, device).tolist() == [0.0, 0.0]
        layer.weight.copy_(torch.diag(torch.tensor([2.0, 1.0, 2.0])))
        assert trajectory.errors(layer, device).tolist() == pytest.approx([5 / 9, 0.0])
        layer.weight.copy_(torch.eye(3) / 2)
        assert trajectory.errors(layer, device).tolist() == pytest.approx([0.25, 0.25])


def test_sequential_offload_is_refused(tiny, files, prompts):
    """Its weights lie nowhere, which an error deep in diffusers would tell an hour later."""
    with pytest.raises(InputError, match=r"cannot be compared with sequential_offload.*'cpu'"):
        bench_files(
            tiny.checkpoint, [files["half"]], config(tiny, prompts, sequential_offload=True)
        )


def test_other_models_of_the_family_are_told_before_anything_is_painted(
    tiny, files, prompts, tmp_path
):
    """The unquantized model would paint for an hour first."""

    def fail(phase, done, total):
        assert phase == "encode", f"{phase} ran"

    for name in ("missing", "shape"):
        tensors = load_file(files["cast"])
        key = next(key for key in tensors if key.endswith("ff.net.2.weight"))
        if name == "missing":
            del tensors[key]
        else:
            tensors[key] = tensors[key][:, :-1].contiguous()
        path = tmp_path / f"{name}.safetensors"
        save_file(tensors, path)
        with pytest.raises(InputError, match=r"is of another model than .*ff\.net\.2\.weight"):
            bench_files(tiny.checkpoint, [path], config(tiny, prompts), progress=fail)


def test_pairs_are_prompts_with_noises(tiny, files, prompts, bench):
    """Painting in batches must not change which noise goes with which prompt."""
    batched = bench_files(tiny.checkpoint, [files["half"]], config(tiny, prompts, batch=3))
    assert torch.allclose(batched.exact.images, bench.exact.images, atol=1e-4)
    assert not torch.allclose(bench.exact.latents[0], bench.exact.latents[1], atol=1e-2)
    single = bench_files(tiny.checkpoint, [files["half"]], config(tiny, prompts, seeds=1))
    assert torch.equal(single.exact.images, bench.exact.images[::2])


def test_report_is_complete_and_safe(bench, tmp_path):
    """A prompt is somebody's text: it must not become part of the page."""
    data = write_report(bench, tmp_path / "report.html")
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert "<script>" not in page
    assert "&lt;script&gt;" in page
    assert page.count("<img ") == 2 * (1 + 2 * 4)
    assert page.count("<svg") == 2
    for entry in bench.entries:
        assert entry.name in page
    assert not re.search(r"(src|href)=\"(?!data:|#)", page)
    content = json.loads(data.read_text())
    assert data.name == "report.json"
    assert set(content["entries"][0]["mean"]) == set(METRICS) - {"lpips"}
    assert len(content["entries"][0]["per_prompt"]["latent_mse"]) == 2
    # Equal images have no finite PSNR.
    assert content["entries"][1]["mean"]["psnr_db"] is None


def test_command_line_writes_page_and_metadata(tiny, files, prompts, tmp_path, capfd):
    """The figures of a published file travel with it; its tensors must not change."""
    copy = tmp_path / "copy.safetensors"
    copy.write_bytes(files["half"].read_bytes())
    html = tmp_path / "report.html"
    arguments = ["bench", "--input", str(tiny.checkpoint), str(copy), "--html", str(html)]
    arguments += ["--pipeline", str(tiny.pipeline), "--calib-file", str(prompts)]
    arguments += ["--samples", "1", "--steps", "1", "--latent", "8", "--calls", "1"]
    assert main([*arguments, "--write-metadata"]) == 0
    captured = capfd.readouterr()
    assert "copy.safetensors" in captured.out
    assert "naive cast" in captured.err
    assert html.is_file()
    assert json.loads(html.with_suffix(".json").read_text())["settings"]["steps"] == 1
    ours, theirs = load_file(copy), load_file(files["half"])
    assert ours.keys() == theirs.keys()
    assert all(
        torch.equal(ours[key].view(torch.uint8), theirs[key].view(torch.uint8))
        for key in ours
        if ours[key].dim()
    )
    with Checkpoint.open(copy) as checkpoint:
        figures = json.loads(checkpoint.metadata["hswq.bench"])
        assert "hswq.plan" in checkpoint.metadata
    assert figures["mean"]["latent_mse"] > 0.0
    hswq.load_unet(copy, pipeline=tiny.pipeline)


def test_files_of_other_models_are_told(tiny, prompts, files, tmp_path):
    """Before the unquantized model has painted for an hour."""

    def fail(*step):
        raise AssertionError("something was painted")

    other = write_random(tmp_path / "flux.safetensors", flux_shapes())
    with pytest.raises(InputError, match="is of the family flux"):
        bench_files(tiny.checkpoint, [other], config(tiny, prompts), progress=fail)
    with pytest.raises(InputError, match="nowhere"):
        bench_files(tiny.checkpoint, [tmp_path / "nowhere.safetensors"], config(tiny, prompts))


def test_options_that_make_no_sense_are_told():
    """Before anything is loaded."""
    with pytest.raises(OptionError, match=r"ends in \.html"):
        BenchConfig(html="report.pdf")


def test_embeddings_take_the_place_of_prompts(tiny, files, prompts, bench, tmp_path):
    """Text encoders are large, and those of the statistics' run may be gone."""
    settings = {"samples": 2, "seeds": 2, "steps": 2, "latent": 8, "calls": 3}
    with open_source(tiny.checkpoint) as source:
        sampling = prepare_sampling(source, config(tiny, prompts), lambda *step: None)
    path = tmp_path / "embeddings.safetensors"
    save_embeddings(path, sampling.conditioning)
    given = BenchConfig(pipeline=str(tiny.pipeline), embeddings=str(path), **settings)
    found = bench_files(tiny.checkpoint, [files["half"]], given)
    assert torch.equal(found.exact.images, bench.exact.images)
    assert found.prompts == ["embedding 0", "embedding 1"]
    assert torch.equal(
        found.entries[-1].values["latent_mse"], bench.entries[-1].values["latent_mse"]
    )
