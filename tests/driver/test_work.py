"""The work folder: whose parts it holds, what is removed when, and what a power cut leaves."""

from __future__ import annotations

import errno
import os
import shutil
from pathlib import Path

import pytest
import torch

import hswq
from hswq.calibration import CodesWriter
from hswq.driver import calibrate, compensate
from hswq.driver.compensate import _Rounding
from hswq.driver.sampling import resolve_device
from hswq.driver.work import WorkFolder
from hswq.errors import InputError, Interrupted
from hswq.search.compensated import factors_bytes
from tests.driver.started import files_of, interrupt_at
from tests.tiny import Tiny, tiny_calibration_config

BEST = {"preset": "best", "samples": 1, "calls": 1, "gram_memory": "8MB"}


@pytest.fixture(scope="module")
def whole(tiny: Tiny, tmp_path_factory) -> dict[str, bytes]:
    """Statistics and codes of a run that nobody interrupted, by name."""
    folder = tmp_path_factory.mktemp("whole")
    config = tiny_calibration_config(tiny.pipeline, **BEST)
    hswq.calibrate_checkpoint(tiny.checkpoint, config, folder / "s.safetensors")
    return files_of(folder)


@pytest.fixture(scope="module")
def interrupted(tiny: Tiny, tmp_path_factory) -> Path:
    """The work folder of a run that was interrupted while impact was measured."""
    folder = tmp_path_factory.mktemp("interrupted")
    config = tiny_calibration_config(tiny.pipeline, **BEST)
    progress, _ = interrupt_at("impact", 10)
    with pytest.raises(Interrupted):
        hswq.calibrate_checkpoint(
            tiny.checkpoint, config, folder / "s.safetensors", progress=progress
        )
    return folder / "s.hswq-work"


def make_folder(folder: Path, facts: dict[str, object]) -> Path:
    """Leave a part of a run that is not complete, and return its folder."""
    with WorkFolder(folder / "s.safetensors") as work:
        work.agree(facts)
        (work.path / "sample-00000.safetensors").write_bytes(b"part")
        work.keep = True
    return work.path


def test_parts_without_their_facts_are_refused(tmp_path: Path) -> None:
    """What nobody knows the options of must not become part of a file."""
    path = make_folder(tmp_path, {"--steps": 1})
    with WorkFolder(tmp_path / "s.safetensors") as work:
        work.keep = True
        with pytest.raises(InputError, match="--seed is not known there and 0 here"):
            work.agree({"--steps": 1, "--seed": 0})
    (path / "job.json").unlink()
    with (
        pytest.raises(InputError, match=r"holds 'sample-00000.safetensors' and no job\.json"),
        WorkFolder(tmp_path / "s.safetensors"),
    ):
        pass
    assert (path / "sample-00000.safetensors").read_bytes() == b"part"


def test_folder_of_another_program_is_left_alone(tmp_path: Path) -> None:
    """A name that happens to be taken must not cost its owner the files."""
    path = tmp_path / "s.hswq-work"
    path.mkdir()
    (path / "thesis.tex").write_bytes(b"years")
    with (
        pytest.raises(InputError, match=r"'thesis\.tex' and no job\.json.*it is left as it is"),
        WorkFolder(tmp_path / "s.safetensors"),
    ):
        pass
    assert [it.name for it in path.iterdir()] == ["thesis.tex"]


def test_what_tells_the_options_goes_last(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A kill while the folder is removed must not leave parts that nobody knows the options of."""
    removed: list[str] = []
    unlink = os.unlink

    def note(path: object, *args: object, **kwargs: object) -> None:
        removed.append(os.path.basename(os.fspath(path)))
        unlink(path, *args, **kwargs)

    monkeypatch.setattr(os, "unlink", note)
    with WorkFolder(tmp_path / "s.safetensors") as work:
        work.agree({"--steps": 1})
        for name in ("a-part", "sample-00000", "z-part"):
            (work.path / name).write_bytes(b"")
        removed.clear()
    assert sorted(removed[:3]) == ["a-part", "sample-00000", "z-part"]
    assert removed[3] == "job.json"
    assert not list(tmp_path.iterdir())


def test_killed_before_its_options_were_noted(tmp_path: Path) -> None:
    """Such a folder holds nothing, and is no reason to refuse the next run."""
    path = tmp_path / "s.hswq-work"
    path.mkdir()
    for name in (".lock", ".hswq-01234567-89abcdef.partial"):
        (path / name).write_bytes(b"")
    with WorkFolder(tmp_path / "s.safetensors") as work:
        work.agree({"--steps": 1})
    assert not list(tmp_path.iterdir())


def test_text_part_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A disk full of forgotten temporaries stays full; and names come after the bytes."""
    calls: list[str] = []
    fsync, replace = os.fsync, os.replace

    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with WorkFolder(tmp_path / "s.safetensors") as work:
        monkeypatch.setattr(os, "fsync", lambda it: (calls.append("fsync"), fsync(it)))
        monkeypatch.setattr(os, "replace", lambda *it: (calls.append("replace"), replace(*it)))
        work.write("impact-00000.json", "{}")
        assert calls == ["fsync", "replace"]
        monkeypatch.setattr(os, "fsync", full)
        with pytest.raises(InputError, match=r"impact-00001\.json does not fit on the disk"):
            work.write("impact-00001.json", "{}")
        names = {path.name for path in work.path.iterdir()}
        assert names == {".lock", "impact-00000.json"}


def test_temporaries_of_containers_differ(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In containers every process is number 1: the one would replace the other's text."""
    monkeypatch.setattr(os, "getpid", lambda: 1)
    seen: list[Path] = []
    replace = os.replace
    monkeypatch.setattr(os, "replace", lambda old, new: (seen.append(old), replace(old, new)))
    with WorkFolder(tmp_path / "s.safetensors") as work:
        work.agree({})
        work.agree({})
    assert len(set(seen)) == 2


def test_damaged_parts_are_made_again(
    tiny: Tiny, whole: dict[str, bytes], interrupted: Path, tmp_path: Path, caplog
) -> None:
    """A power cut leaves empty files, and must not end in an error that names none."""
    work = tmp_path / "s.hswq-work"
    shutil.copytree(interrupted, work)
    damaged = ["codes.safetensors", "impact-00000.json", "sample-00000.safetensors"]
    for name in damaged:
        assert (work / name).is_file()
        (work / name).write_bytes(b"")
    config = tiny_calibration_config(tiny.pipeline, **BEST)
    hswq.calibrate_checkpoint(tiny.checkpoint, config, tmp_path / "s.safetensors")
    assert files_of(tmp_path) == whole
    for name in damaged:
        assert f"{name} is damaged and is made again" in caplog.text


def test_codes_of_another_run_are_not_joined(tiny: Tiny, interrupted: Path, tmp_path: Path) -> None:
    """A part that came from elsewhere would make codes of two checkpoints one file."""
    work = tmp_path / "s.hswq-work"
    shutil.copytree(interrupted, work)
    (work / "codes.safetensors").unlink()
    with CodesWriter(work / "codes-00000.safetensors", {}, [], "0" * 64, {}, {}) as part:
        part.commit()
    config = tiny_calibration_config(tiny.pipeline, **BEST)
    with pytest.raises(
        InputError, match=r"codes-00000\.safetensors was made from another checkpoint"
    ):
        hswq.calibrate_checkpoint(tiny.checkpoint, config, tmp_path / "s.safetensors")


def test_samples_of_another_checkpoint_are_not_merged(
    tiny: Tiny, interrupted: Path, tmp_path: Path
) -> None:
    """Samples say themselves which checkpoint they are of."""
    work = tmp_path / "s.hswq-work"
    shutil.copytree(interrupted, work)
    part = hswq.Calibration.load(work / "sample-00000.safetensors")
    part.fingerprint = "0" * 64
    part.save(work / "sample-00000.safetensors")
    config = tiny_calibration_config(tiny.pipeline, **BEST)
    with pytest.raises(InputError, match="holds samples of another checkpoint"):
        hswq.calibrate_checkpoint(tiny.checkpoint, config, tmp_path / "s.safetensors")


def test_machine_is_a_fact(
    tiny: Tiny, interrupted: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With other threads or another device sums are added in another order, to other bytes."""
    shutil.copytree(interrupted, tmp_path / "s.hswq-work")
    config = tiny_calibration_config(tiny.pipeline, **BEST)
    before = torch.get_num_threads()
    torch.set_num_threads(before + 1)
    try:
        with pytest.raises(InputError, match=r"threads \(OMP_NUM_THREADS\) is \d+ there and \d+"):
            hswq.calibrate_checkpoint(tiny.checkpoint, config, tmp_path / "s.safetensors")
    finally:
        torch.set_num_threads(before)
    facts = {"device": "cuda (another GPU)"}
    monkeypatch.setattr(calibrate, "machine_facts", lambda _: facts)
    with pytest.raises(InputError, match=r"device is 'cpu \(.*\)' there and 'cuda \(another"):
        hswq.calibrate_checkpoint(tiny.checkpoint, config, tmp_path / "s.safetensors")


def test_embeddings_count_by_their_bytes(tiny: Tiny, tmp_path: Path, monkeypatch) -> None:
    """A text encoder exchanged under its name gives other embeddings of equal prompts."""
    path = tmp_path / "s.safetensors"
    config = tiny_calibration_config(tiny.pipeline, samples=2)
    progress, _ = interrupt_at("calibrate", 3)
    with pytest.raises(Interrupted):
        hswq.calibrate_checkpoint(tiny.checkpoint, config, path, progress=progress)
    from hswq.driver import sampling

    encode = sampling.encode_prompts

    def other(*args: object) -> object:
        found = encode(*args)
        found.prompt_embeds.add_(0.5)
        return found

    monkeypatch.setattr(sampling, "encode_prompts", other)
    with pytest.raises(InputError, match="other options: embeddings is '"):
        hswq.calibrate_checkpoint(tiny.checkpoint, config, path)


def test_ranks_use_their_own_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """diffusers takes "cuda" for the first GPU, where all ranks would meet."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 3)
    assert {str(resolve_device(name)) for name in ("auto", "cuda")} == {"cuda:3"}
    assert resolve_device("cpu") == torch.device("cpu")


def test_gram_groups_are_halved_where_memory_ends(
    tiny: Tiny, whole: dict[str, bytes], tmp_path: Path, monkeypatch, caplog
) -> None:
    """Another program takes memory meanwhile: more sampling runs, and the same codes."""
    gather = compensate.gather_grams

    def limited(module: object, layers: list[object], *rest: object, **options: object) -> object:
        if len(layers) > 40:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        return gather(module, layers, *rest, **options)

    monkeypatch.setattr(compensate, "gather_grams", limited)
    config = tiny_calibration_config(tiny.pipeline, **{**BEST, "gram_memory": "1GB"})
    hswq.calibrate_checkpoint(tiny.checkpoint, config, tmp_path / "s.safetensors")
    assert "Gram matrices are too many for the GPU" in caplog.text
    assert files_of(tmp_path) == whole


def test_gram_memory_counts_matrices_and_factors(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A whole group of matrices with factors beside it took twice what --gram-memory allows."""
    config = tiny_calibration_config(tiny.pipeline, rounding="compensated", gram_memory="8MB")
    held: dict[int, int] = {}
    working: dict[int, int] = {}
    seen: list[int] = []
    sharing, round_shared = _Rounding._sharing, _Rounding._round_shared

    def note(self: object, *args: object) -> object:
        tasks = sharing(self, *args)
        held.update({id(gram): gram.matrix.nbytes for gram, _ in tasks if gram is not None})
        return tasks

    def work(self: object, gram: object, units: list[object]) -> object:
        if gram is None:
            return round_shared(self, gram, units)
        working[id(units)] = factors_bytes(gram)
        if len(working) > 1:
            seen.append(sum(held.values()) + sum(working.values()))
        found = round_shared(self, gram, units)
        del working[id(units)]
        held.pop(id(gram), None)
        return found

    monkeypatch.setattr(_Rounding, "_sharing", note)
    monkeypatch.setattr(_Rounding, "_round_shared", work)
    before = torch.get_num_threads()
    torch.set_num_threads(4)
    try:
        hswq.calibrate_checkpoint(tiny.checkpoint, config, tmp_path / "s.safetensors")
    finally:
        torch.set_num_threads(before)
    assert seen
    assert max(seen) <= config.gram_bytes
