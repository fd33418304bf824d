"""Bad input gets a clear error, and nothing is written or lost."""

from __future__ import annotations

import errno
import os
import pickle
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file

import hswq
from hswq.errors import FormatError, HswqError, InputError, PlanError
from tests.tiny import Tiny, tiny_calibration_config

OLD = b"the file that was there before"


@pytest.fixture
def output(tmp_path: Path) -> Path:
    """An output name under which an older file lies."""
    folder = tmp_path / "out"
    folder.mkdir()
    path = folder / "out.safetensors"
    path.write_bytes(OLD)
    return path


def assert_untouched(output: Path) -> None:
    assert output.read_bytes() == OLD
    assert [path.name for path in output.parent.iterdir()] == [output.name]


def refuse(
    source: Path, output: Path, config: hswq.QuantizeConfig, kind: type[HswqError], words: str
) -> None:
    with pytest.raises(kind, match=words):
        hswq.quantize_checkpoint(source, output, config)
    assert_untouched(output)


def test_truncated_file(tiny: Tiny, tmp_path: Path, output: Path) -> None:
    """A download cut short would else be quantized up to the cut."""
    source = tmp_path / "cut.safetensors"
    source.write_bytes(tiny.checkpoint.read_bytes()[:-1000])
    refuse(source, output, tiny.config(), FormatError, "cut.safetensors")


@pytest.mark.parametrize("content", [b"", b"hello", b"GGUF" + bytes(100), os.urandom(4096)])
def test_file_that_is_no_safetensors(
    tiny: Tiny, tmp_path: Path, output: Path, content: bytes
) -> None:
    """Any other bytes are refused by name, not with a traceback."""
    source = tmp_path / "other.safetensors"
    source.write_bytes(content)
    refuse(source, output, tiny.config(), HswqError, "other.safetensors")


def test_pickle_is_refused_and_never_run(tiny: Tiny, tmp_path: Path, output: Path) -> None:
    """Unpickling a stranger's checkpoint runs its code."""
    ran = tmp_path / "ran"

    class Trap:
        def __reduce__(self) -> tuple[object, tuple[str]]:
            return os.mkdir, (str(ran),)

    plain, zipped = tmp_path / "model.ckpt", tmp_path / "model.safetensors"
    plain.write_bytes(pickle.dumps({"w": Trap()}))
    torch.save({"w": torch.ones(2)}, zipped)
    for source in (plain, zipped):
        refuse(source, output, tiny.config(), HswqError, "[Pp]ickle")
    assert not ran.exists()


@pytest.mark.parametrize(
    ("scaled", "container"), [(False, "comfy"), (False, "plain"), (True, "hswq")]
)
def test_already_quantized_input(
    tiny: Tiny, tmp_path: Path, output: Path, scaled: bool, container: str
) -> None:
    """Quantizing twice only loses quality."""
    once = tmp_path / "once.safetensors"
    hswq.quantize_checkpoint(tiny.checkpoint, once, tiny.config(scaled=scaled, container=container))
    refuse(once, output, tiny.config(), InputError, "already quantized")


def test_byte_matrices_outside_the_denoiser_are_copied(tiny: Tiny, tmp_path: Path) -> None:
    """A thumbnail or an 8-bit text encoder is no reason to refuse a 16-bit denoiser."""
    tensors = load_file(tiny.checkpoint)
    bytes_ = torch.arange(16, dtype=torch.uint8).reshape(4, 4)
    tensors |= {"thumbnail": bytes_, "conditioner.lookup.weight": bytes_.clone().view(torch.int8)}
    source, written = tmp_path / "source.safetensors", tmp_path / "written.safetensors"
    save_file(tensors, source)
    hswq.quantize_checkpoint(source, written, tiny.config())
    found = load_file(written)
    assert torch.equal(found["thumbnail"], bytes_)
    assert torch.equal(found["conditioner.lookup.weight"], bytes_.view(torch.int8))


def test_one_quantized_layer_of_the_denoiser_is_enough(
    tiny: Tiny, tmp_path: Path, output: Path
) -> None:
    """An int8 layer among 16-bit ones would be copied as if its codes were its values."""
    tensors = load_file(tiny.checkpoint)
    name = "model.diffusion_model.out.2.weight"
    tensors[name] = tensors[name].to(torch.int8)
    source = tmp_path / "int8.safetensors"
    save_file(tensors, source)
    refuse(source, output, tiny.config(), InputError, r"already quantized \(1 tensors of I8\)")


def test_unknown_architecture(tiny: Tiny, tmp_path: Path, output: Path) -> None:
    """A file of something else is told from a damaged SDXL file."""
    source = tmp_path / "other.safetensors"
    save_file({"encoder.layer.0.weight": torch.ones(2, 2)}, source)
    refuse(source, output, tiny.config(), InputError, "encoder.layer.0.weight")


def test_keys_that_do_not_map(tiny: Tiny, tmp_path: Path, output: Path) -> None:
    """An unknown denoiser tensor could be a layer that would silently stay 16-bit."""
    tensors = load_file(tiny.checkpoint)
    extra = "model.diffusion_model.input_blocks.1.0.adapter.weight"
    tensors[extra] = torch.ones(2, 2)
    source = tmp_path / "extra.safetensors"
    save_file(tensors, source)
    with pytest.raises(InputError, match=r"adapter\.weight"):
        hswq.calibrate_checkpoint(source, tiny_calibration_config(tiny.pipeline))
    refuse(source, output, tiny.config(), InputError, r"adapter\.weight")


def test_statistics_of_another_checkpoint(tiny: Tiny, tmp_path: Path, output: Path) -> None:
    """A fine-tune of equal shapes has other activations: its statistics do not fit."""
    tensors = load_file(tiny.checkpoint)
    name = "model.diffusion_model.out.2.weight"
    tensors[name] = tensors[name] + 1
    source = tmp_path / "tuned.safetensors"
    save_file(tensors, source)
    refuse(source, output, tiny.config(), InputError, "another checkpoint")


def test_file_that_is_no_statistics(tiny: Tiny, output: Path) -> None:
    """A checkpoint given as statistics is a mix-up of two flags."""
    config = tiny.config(stats=str(tiny.checkpoint))
    refuse(tiny.checkpoint, output, config, HswqError, "statistics")


@pytest.mark.parametrize("kept", [False, True])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_non_finite_weight_is_named(
    tiny: Tiny, tmp_path: Path, output: Path, bad: float, kept: bool
) -> None:
    """A damaged layer is told by name, also where it would be kept."""
    tensors = load_file(tiny.checkpoint)
    name = "model.diffusion_model.out.2.weight"
    tensors[name] = tensors[name].clone()
    tensors[name].view(-1)[3] = bad
    source = tmp_path / "bad.safetensors"
    save_file(tensors, source)
    calibration = tiny.calibration
    calibration.fingerprint = None
    config = tiny.config(stats=None, keep=("^out",) if kept else (), quantize=("^out",))
    with pytest.raises(InputError, match=r"'out\.2'.*NaN or Inf"):
        hswq.quantize_checkpoint(source, output, config, calibration)
    assert_untouched(output)


def test_output_that_is_the_input(tiny: Tiny, tmp_path: Path) -> None:
    """The source must never be overwritten, whatever name leads to it."""
    source = tmp_path / "model.safetensors"
    source.write_bytes(tiny.checkpoint.read_bytes())
    link = tmp_path / "link.safetensors"
    link.symlink_to(source)
    for target in (source, link):
        with pytest.raises(InputError, match="an input of this run"):
            hswq.quantize_checkpoint(source, target, tiny.config())
    assert source.read_bytes() == tiny.checkpoint.read_bytes()


@pytest.mark.parametrize(
    ("output", "save_stats"),
    [
        ("stats", None),
        ("text_encoder", None),
        ("new", "checkpoint"),
        ("new", "new"),
    ],
)
def test_output_over_any_file_of_the_run(
    tiny: Tiny, tmp_path: Path, output: str, save_stats: str | None
) -> None:
    """Statistics, text encoders and the checkpoint itself must survive a mixed-up flag."""
    paths = {
        "checkpoint": tiny.checkpoint,
        "stats": tiny.stats,
        "text_encoder": tiny.pipeline / "text_encoder" / "model.safetensors",
        "new": tmp_path / "new.safetensors",
    }
    before = {name: path.read_bytes() for name, path in paths.items() if path.exists()}
    config = (
        tiny.config()
        if save_stats is None
        else tiny.config(stats=None, save_stats=str(paths[save_stats]))
    )
    with pytest.raises(InputError, match="of this run"):
        hswq.quantize_checkpoint(tiny.checkpoint, paths[output], config)
    assert {name: path.read_bytes() for name, path in paths.items() if path.exists()} == before


def test_tensor_of_another_shape_than_the_statistics_know(
    tiny: Tiny, tmp_path: Path, output: Path
) -> None:
    """A bias cut short must not slip through because the stored map knows its name."""
    tensors = load_file(tiny.checkpoint)
    name = "model.diffusion_model.out.2.bias"
    tensors[name] = tensors[name][:2].clone()
    source = tmp_path / "cut.safetensors"
    save_file(tensors, source)
    refuse(source, output, tiny.config(), InputError, r"out\.2\.bias")


def test_non_finite_weight_is_named_before_sampling(
    tiny: Tiny, tmp_path: Path, output: Path
) -> None:
    """Without given statistics too, and for a bias: not after an hour of sampling NaN."""
    for name in ("model.diffusion_model.out.2.weight", "model.diffusion_model.out.2.bias"):
        tensors = load_file(tiny.checkpoint)
        tensors[name] = tensors[name].clone()
        tensors[name].view(-1)[1] = float("nan")
        source = tmp_path / "bad.safetensors"
        save_file(tensors, source)
        refuse(source, output, tiny.config(stats=None), InputError, f"{name}.*NaN or Inf")
        calibration = tiny.calibration
        calibration.fingerprint = None
        with pytest.raises(InputError, match=f"{name}.*NaN or Inf"):
            hswq.quantize_checkpoint(
                source, output, tiny.config(stats=None, keep_ratio=0.0), calibration
            )
        assert_untouched(output)


def test_wrong_pattern_is_told_before_sampling(tiny: Tiny, output: Path) -> None:
    """A misspelt pattern costs a second, not the calibration."""

    def never(*_: object) -> None:
        raise AssertionError("the sampler ran")

    config = tiny.config(stats=None, keep=("no such layer",))
    with pytest.raises(PlanError, match="no such layer"):
        hswq.quantize_checkpoint(tiny.checkpoint, output, config, progress=never)
    assert_untouched(output)


def test_output_folder_missing_or_name_wrong(tiny: Tiny, tmp_path: Path) -> None:
    """Told before hours of calibration, not after."""
    with pytest.raises(InputError, match="does not exist"):
        hswq.quantize_checkpoint(tiny.checkpoint, tmp_path / "no/out.safetensors", tiny.config())
    with pytest.raises(InputError, match=r"does not end in \.safetensors"):
        hswq.quantize_checkpoint(tiny.checkpoint, tmp_path / "out.fp8", tiny.config())
    assert not list(tmp_path.iterdir())


def test_full_disk(tiny: Tiny, output: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No room is told before work starts, and the old file stays."""

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    refuse(tiny.checkpoint, output, tiny.config(), InputError, "space")


@pytest.mark.parametrize("conv", ["fp8", "16bit"])
def test_full_disk_is_told_before_sampling(
    tiny: Tiny, output: Path, monkeypatch: pytest.MonkeyPatch, conv: str
) -> None:
    """An hour of sampling must not end at a disk that could never hold the smallest output."""

    class SamplerRanError(Exception):
        pass

    def ran(*_: object) -> None:
        raise SamplerRanError

    tensors = load_file(tiny.checkpoint)
    smallest = 0
    for name, tensor in tensors.items():
        layer = "diffusion_model" in name and tensor.ndim in ((2, 4) if conv == "fp8" else (2,))
        smallest += tensor.numel() * (1 if layer else tensor.element_size())

    def with_free(free: int, blocks: int = 1 << 30) -> None:
        found = SimpleNamespace(f_bavail=free, f_frsize=1, f_blocks=blocks)
        monkeypatch.setattr(os, "statvfs", lambda _: found)

    config = tiny.config(stats=None, conv=conv)
    with_free(smallest)
    with pytest.raises(InputError, match=r"does not fit on the disk.* at least \d+ bytes.*free"):
        hswq.quantize_checkpoint(tiny.checkpoint, output, config, progress=ran)
    assert_untouched(output)
    # Room for the smallest output with its header; and a file system that does not tell.
    for free, blocks in ((smallest + 1_000_000, 1 << 30), (0, 0)):
        with_free(free, blocks)
        with pytest.raises(SamplerRanError):
            hswq.quantize_checkpoint(tiny.checkpoint, output, config, progress=ran)
    assert_untouched(output)


def test_empty_prompt_file(tiny: Tiny, tmp_path: Path, output: Path) -> None:
    """Nothing to sample is an error, not statistics of nothing."""
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("\n# only a comment\n\n")
    config = hswq.QuantizeConfig(calib_file=str(prompts), pipeline=str(tiny.pipeline))
    refuse(tiny.checkpoint, output, config, InputError, "prompts.txt")


@pytest.mark.parametrize("reached", [1, 40])
def test_interrupted_run_leaves_the_old_file(tiny: Tiny, output: Path, reached: int) -> None:
    """Ctrl-C in the middle must not leave half a file, nor take the old one."""
    calls = 0

    def interrupt(phase: str, done: int, total: int) -> None:
        nonlocal calls
        calls += 1
        if calls == reached:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        hswq.quantize_checkpoint(tiny.checkpoint, output, tiny.config(), progress=interrupt)
    assert calls == reached
    assert_untouched(output)


def test_failed_verification_leaves_the_old_file(
    tiny: Tiny, output: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A file that does not read back as written must not take the good one's place."""
    from hswq.driver import quantize

    def fail(*_: object) -> None:
        raise FormatError("does not match")

    monkeypatch.setattr(quantize, "verify_output", fail)
    refuse(tiny.checkpoint, output, tiny.config(), FormatError, "does not match")
