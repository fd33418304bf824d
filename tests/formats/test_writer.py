"""Writing: byte identity with the safetensors package, interruption, full disks, bad targets."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import stat
import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save, save_file

from hswq.errors import InputError
from hswq.formats.dtypes import DTYPE_NAMES, DTYPES
from hswq.formats.header import MAX_HEADER_BYTES
from hswq.formats.reader import Checkpoint
from hswq.formats.writer import (
    CheckpointWriter,
    TensorSpec,
    place_copy,
    remove_abandoned,
    write_whole,
)
from hswq.strict_json import MAX_TEXT_BYTES
from tests.formats.files import random_tensor, raw_bytes


def specs_of(tensors):
    return [TensorSpec(k, DTYPE_NAMES[v.dtype], tuple(v.shape)) for k, v in tensors.items()]


def json_bytes(metadata):
    """Length of metadata as compact JSON, the least that may be reserved."""
    return len(json.dumps(metadata, ensure_ascii=False, separators=(",", ":")).encode())


def write_file(path, tensors, metadata=None, metadata_bytes=None):
    metadata = metadata or {}
    if metadata_bytes is None:
        metadata_bytes = json_bytes(metadata) if metadata else 0
    with CheckpointWriter(path, specs_of(tensors), metadata_bytes) as writer:
        for name, tensor in tensors.items():
            writer.write(name, tensor)
        writer.commit(metadata)
    assert path.stat().st_size == writer.file_bytes
    assert writer.file_bytes == CheckpointWriter.predict_file_bytes(
        specs_of(tensors), metadata_bytes
    )


@pytest.fixture
def two():
    return {"b": torch.arange(6.0).reshape(2, 3), "a": torch.arange(5, dtype=torch.uint8)}


@pytest.mark.parametrize("metadata", [{}, {"format": 'pt "☃" \u2028\n\\'}])
def test_file_equals_the_safetensors_package_byte_for_byte(tmp_path, tensors, metadata):
    """Order of dtypes and names, header text, escapes and padding are the package's own."""
    write_file(tmp_path / "ours.safetensors", tensors, metadata)
    assert (tmp_path / "ours.safetensors").read_bytes() == save(tensors, metadata or None)


@given(
    st.dictionaries(
        st.text(st.characters(exclude_categories=["Cs"]), max_size=4).filter(
            lambda name: name != "__metadata__"
        ),
        st.tuples(st.sampled_from(list(DTYPES)), st.lists(st.integers(0, 3), max_size=3)),
        max_size=6,
    )
)
@settings(max_examples=100, deadline=None)
def test_any_file_equals_the_safetensors_package(tmp_path_factory, plan):
    """The same for any names, dtypes and shapes: equal ranks, empty names, no tensors at all."""
    tensors = {name: random_tensor(dtype, tuple(shape)) for name, (dtype, shape) in plan.items()}
    path = tmp_path_factory.getbasetemp() / "any.safetensors"
    write_file(path, tensors)
    assert path.read_bytes() == save(tensors)


def test_package_reads_a_file_with_reserve_left(tmp_path, tensors):
    """Spaces after the header must not disturb a reader, and the data stand as save_file's do."""
    path = tmp_path / "ours.safetensors"
    write_file(path, tensors, {"k": "v"}, metadata_bytes=1000)
    save_file(tensors, tmp_path / "theirs.safetensors", {"k": "v"})
    loaded = load_file(path)
    assert {name: raw_bytes(value) for name, value in loaded.items()} == {
        name: raw_bytes(value) for name, value in tensors.items()
    }
    with safe_open(path, "pt") as ours, Checkpoint.open(path) as checkpoint:
        assert ours.metadata() == {"k": "v"}
        with Checkpoint.open(tmp_path / "theirs.safetensors") as theirs:
            assert list(checkpoint.tensors) == list(theirs.tensors)
    size = sum(tensor.nbytes for tensor in tensors.values())
    data = path.read_bytes()[-size:]
    assert data == (tmp_path / "theirs.safetensors").read_bytes()[-size:]


def test_order_of_specs_and_of_writes_does_not_show(tmp_path, tensors):
    """Equal contents write equal files, whatever the order in which layers come out."""
    write_file(tmp_path / "a", tensors, {"x": "1", "y": "2"})
    write_file(tmp_path / "b", dict(reversed(tensors.items())), {"y": "2", "x": "1"})
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_source_is_copied_byte_for_byte_in_chunks(tmp_path, tensors):
    """Every tensor that is not quantized passes through, whatever its bits (NaN payloads)."""
    save_file(tensors, tmp_path / "source.safetensors")
    with Checkpoint.open(tmp_path / "source.safetensors") as source:
        specs = [TensorSpec(i.name, i.dtype, i.shape) for i in source.tensors.values()]
        with CheckpointWriter(tmp_path / "copy.safetensors", specs, 0) as writer:
            for info in source.tensors.values():
                for offset in range(0, info.nbytes, 7):
                    length = min(7, info.nbytes - offset)
                    chunk = source.read_bytes(info.name, offset, length)
                    writer.write_chunk(info.name, offset, chunk)
            writer.commit({})
    source_bytes = (tmp_path / "source.safetensors").read_bytes()
    assert (tmp_path / "copy.safetensors").read_bytes() == source_bytes


def test_strided_tensors_codes_and_bytes_are_written_as_values(tmp_path):
    """A transposed view written in memory order, or codes refused for being uint8, would show."""
    weight = torch.arange(6.0).reshape(2, 3).t()
    codes = torch.tensor([[0x38, 0x80], [0x7E, 0x01]], dtype=torch.uint8)
    specs = [
        TensorSpec("w", "F32", (3, 2)),
        TensorSpec("codes", "F8_E4M3", (2, 2)),
        TensorSpec("raw", "BF16", (1,)),
        TensorSpec("scalar", "F32", ()),
    ]
    with CheckpointWriter(tmp_path / "x", specs, 0) as writer:
        writer.write("w", weight)
        writer.write("codes", codes)
        writer.write("raw", memoryview(b"\x80\x3f"))
        writer.write("scalar", torch.tensor(0.5))
        writer.commit({})
    loaded = load_file(tmp_path / "x")
    assert torch.equal(loaded["w"], weight)
    assert torch.equal(loaded["codes"].view(torch.uint8), codes)
    assert loaded["raw"].tolist() == [1.0]
    assert loaded["scalar"].item() == 0.5


def test_wrong_writes_are_refused(tmp_path, two):
    """Each of these would leave a hole, write twice, or write something else under the name."""
    with CheckpointWriter(tmp_path / "x", specs_of(two), 0) as writer:
        with pytest.raises(InputError, match=r"'c' .*is not planned"):
            writer.write("c", two["a"])
        with pytest.raises(InputError, match=r"planned as F32 and was given as torch\.float16"):
            writer.write("b", two["b"].half())
        with pytest.raises(InputError, match=r"planned as \[2, 3\] and was given as \[3, 2\]"):
            writer.write("b", two["b"].t())
        with pytest.raises(InputError, match="takes 24 bytes, 3 were given"):
            writer.write("b", b"abc")
        for offset, data in ((1, b"ab"), (0, bytes(6)), (-1, b"ab")):
            with pytest.raises(InputError, match="the next byte is 0, the last 5"):
                writer.write_chunk("a", offset, data)
        writer.write_chunk("a", 0, b"ab")
        with pytest.raises(InputError, match=r"'a' .*was already written"):
            writer.write("a", two["a"])
        with pytest.raises(InputError, match="the next byte is 2"):
            writer.write_chunk("a", 0, b"ab")
        with pytest.raises(InputError, match=r"2 tensors .* not written completely: b, a"):
            writer.commit({})
    assert os.listdir(tmp_path) == []


def test_metadata_must_be_text_and_fit(tmp_path, two):
    """Metadata longer than their reserve would overwrite the first tensor."""
    with CheckpointWriter(tmp_path / "x", specs_of(two), 10) as writer:
        for name, tensor in two.items():
            writer.write(name, tensor)
        with pytest.raises(InputError, match="bytes larger than what was reserved"):
            writer.commit({"key": "a long value, much longer than reserved"})
        with pytest.raises(InputError, match="only text"):
            writer.commit({"key": 1})
        with pytest.raises(InputError, match="surrogate"):
            writer.commit({"k": "\ud800"})
        writer.commit({"k": "v"})
    with Checkpoint.open(tmp_path / "x") as checkpoint:
        assert checkpoint.metadata == {"k": "v"}
        assert torch.equal(checkpoint.read("b"), two["b"])


@pytest.mark.parametrize("metadata", [{}, {"a": "1"}, {"ä": "☃", "b": '"' * 9}])
def test_reserve_of_exactly_the_metadata_suffices(tmp_path, two, metadata):
    """An off-by-one in the reserve shows only where the padding does not hide it."""
    for length in range(9):
        tensors = {"n" * (length + 1): two["a"], **two}
        write_file(tmp_path / "x", tensors, metadata)
        with Checkpoint.open(tmp_path / "x") as checkpoint:
            assert checkpoint.metadata == metadata


def test_impossible_specs_are_refused_before_anything_is_written(tmp_path):
    """A doubled key would lose a tensor; the others make files that no reader opens."""
    one = TensorSpec("a", "F32", (1,))
    for specs, words in (
        ([one, TensorSpec("a", "F16", (2,))], "twice"),
        ([TensorSpec("a", "F33", (1,))], "has dtype 'F33'"),
        ([TensorSpec("__metadata__", "F32", (1,))], "reserves it"),
        ([TensorSpec("\udfff", "F32", (1,))], "surrogate"),
    ):
        with pytest.raises(InputError, match=words):
            CheckpointWriter(tmp_path / "x", specs, 0)
    with pytest.raises(InputError, match="write fewer tensors or less metadata"):
        CheckpointWriter(tmp_path / "x", [one], MAX_HEADER_BYTES)
    with pytest.raises(InputError, match="are read again: write less metadata"):
        CheckpointWriter(tmp_path / "x", [one], MAX_TEXT_BYTES + 1)
    with pytest.raises(InputError, match="takes 4098 bytes, and at most 4096 are read again"):
        CheckpointWriter(tmp_path / "x", [TensorSpec('"' * 2049, "F32", (1,))], 0)
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, SystemExit, GeneratorExit])
def test_interruption_leaves_the_folder_as_it_was(tmp_path, two, error):
    """Half a checkpoint under the target's name loads as noise, or not at all."""
    target = tmp_path / "x.safetensors"
    target.write_bytes(b"older")
    descriptors = os.listdir("/proc/self/fd")

    def work():
        with CheckpointWriter(target, specs_of(two), 0) as writer:
            assert target.read_bytes() == b"older"
            assert len(os.listdir(tmp_path)) == 2
            writer.write("a", two["a"])
            raise error

    with pytest.raises(error):
        work()
    assert os.listdir(tmp_path) == ["x.safetensors"]
    assert target.read_bytes() == b"older"
    assert len(os.listdir("/proc/self/fd")) == len(descriptors)


def test_leaving_without_commit_writes_nothing(tmp_path, two):
    """A return in the middle is an interruption too."""
    with CheckpointWriter(tmp_path / "x", specs_of(two), 0) as writer:
        writer.write("a", two["a"])
    assert os.listdir(tmp_path) == []
    with pytest.raises(InputError, match="is not open"):
        writer.write("b", two["b"])


def test_temporary_file_is_hidden_and_beside_the_target(tmp_path, two):
    """On another file system the rename would copy, and an open folder would list half a file."""
    long_name = "n" * 240 + ".safetensors"
    with CheckpointWriter(tmp_path / long_name, specs_of(two), 0) as writer:
        (name,) = os.listdir(tmp_path)
        assert name.startswith(".")
        # Reserved in full: the disk cannot fill up halfway.
        assert (tmp_path / name).stat().st_size == writer.file_bytes
        for key, tensor in two.items():
            writer.write(key, tensor)
        writer.commit({})
    assert os.listdir(tmp_path) == [long_name]


def test_result_has_the_permissions_of_any_new_file(tmp_path, two):
    """Files of mode 0600, as temporary files have, cannot be read by the user's other programs."""
    target = tmp_path / "x"
    target.write_bytes(b"older")
    target.chmod(0o600)
    before = os.umask(0o027)
    try:
        write_file(target, two)
    finally:
        os.umask(before)
    assert stat.S_IMODE(target.stat().st_mode) == 0o640


def test_symbolic_link_is_followed(tmp_path, two):
    """Models often lie on another disk behind a link, which must not be replaced by the file."""
    (tmp_path / "disk").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "disk" / "real")
    for _ in range(2):
        write_file(tmp_path / "link", two)
        assert (tmp_path / "link").is_symlink()
        assert os.listdir(tmp_path / "disk") == ["real"]


def test_unusable_targets_are_refused_with_the_cure(tmp_path, two):
    """A traceback after an hour of calibration helps nobody."""
    (tmp_path / "file").write_bytes(b"")
    (tmp_path / "loop").symlink_to("loop")
    for target, words in (
        (tmp_path, "it is a folder. Give another path"),
        (tmp_path / "missing" / "x", "folder does not exist: create it"),
        (tmp_path / "file" / "x", "part of the path is a file"),
        (tmp_path / "loop", "no regular file"),
        (tmp_path / "loop" / "x", "links form a loop"),
        ("/dev/null", "no regular file"),
    ):
        with (
            pytest.raises(InputError, match=words),
            CheckpointWriter(target, specs_of(two), 0),
        ):
            pass
    assert sorted(os.listdir(tmp_path)) == ["file", "loop"]


@pytest.mark.parametrize(
    ("number", "words"),
    [
        (errno.EACCES, "not writable: change the permissions"),
        (errno.EROFS, "mounted read-only"),
        (errno.EIO, "Input/output error; give another path"),
    ],
)
def test_refusal_of_the_system_is_told_with_the_cure(tmp_path, two, monkeypatch, number, words):
    """Root may write anywhere, so a folder without permission is simulated."""

    def refuse(*_args, **_keywords):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "open", refuse)
    with (
        pytest.raises(InputError, match=words),
        CheckpointWriter(tmp_path / "x", specs_of(two), 0),
    ):
        pass


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
def test_full_disk_is_told_on_entry(tmp_path, two, monkeypatch, number):
    """An hour of work must not end at the last tensor for want of space."""

    def full(_descriptor, _offset, _length):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "posix_fallocate", full)
    size = CheckpointWriter.predict_file_bytes(specs_of(two), 0)
    words = rf"does not fit on the disk: it needs {size} bytes, and \d+ are free"
    with (
        pytest.raises(InputError, match=words),
        CheckpointWriter(tmp_path / "x", specs_of(two), 0),
    ):
        pass
    assert os.listdir(tmp_path) == []


def test_interruption_while_space_is_reserved(tmp_path, two, monkeypatch):
    """Reserving can take seconds on some disks, and Ctrl-C falls into them."""

    def interrupt(_descriptor, _offset, _length):
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "posix_fallocate", interrupt)
    with pytest.raises(KeyboardInterrupt), CheckpointWriter(tmp_path / "x", specs_of(two), 0):
        pass
    assert os.listdir(tmp_path) == []


def test_file_system_without_reservation(tmp_path, two, monkeypatch):
    """Network file systems cannot reserve: there the free space is compared."""

    def unsupported(_descriptor, _offset, _length):
        raise OSError(errno.EOPNOTSUPP, os.strerror(errno.EOPNOTSUPP))

    monkeypatch.setattr(os, "posix_fallocate", unsupported)
    write_file(tmp_path / "x", two)
    assert (tmp_path / "x").read_bytes() == save(two)
    huge = [TensorSpec("w", "F32", (1 << 28, 1 << 28))]
    with pytest.raises(InputError, match="does not fit"), CheckpointWriter(tmp_path / "y", huge, 0):
        pass
    assert os.listdir(tmp_path) == ["x"]


def test_disk_that_fills_up_during_the_writes(tmp_path, two, monkeypatch):
    """Where nothing could be reserved another program can take the space."""

    def full(*_args):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def work(failing):
        with CheckpointWriter(tmp_path / "x", specs_of(two), 0) as writer:
            monkeypatch.setattr(os, failing, full)
            for name, tensor in two.items():
                writer.write(name, tensor)
            writer.commit({})

    for failing in ("pwrite", "fsync"):
        with pytest.raises(InputError, match="does not fit"):
            work(failing)
        monkeypatch.undo()
    assert os.listdir(tmp_path) == []


LIMITED = """
import resource, sys
from hswq.errors import InputError
from hswq.formats.writer import CheckpointWriter, TensorSpec
resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, 1 << 20))
try:
    with CheckpointWriter(sys.argv[1], [TensorSpec("w", "U8", (2 << 20,))], 0):
        pass
except InputError as error:
    print(error)
"""


@pytest.mark.slow
def test_limit_of_the_file_size_is_told(tmp_path):
    """The kernel's own refusal, not a simulated one, is caught and cleaned up after."""
    command = [sys.executable, "-c", LIMITED, str(tmp_path / "x")]
    result = subprocess.run(command, check=True, capture_output=True, text=True)
    assert "does not fit on the disk" in result.stdout
    assert "File too large" in result.stdout
    assert os.listdir(tmp_path) == []


KILLED = """
import os, signal, sys
from hswq.formats.writer import CheckpointWriter, TensorSpec
writer = CheckpointWriter(sys.argv[1], [TensorSpec("w", "U8", (1 << 20,))], 0)
writer.__enter__()
os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.slow
def test_remains_of_a_killed_writer_are_removed(tmp_path, two):
    """Every SIGKILL would else cost the size of an output for ever."""
    path = tmp_path / "x"
    subprocess.run([sys.executable, "-c", KILLED, str(path)], check=False)
    assert len(list(tmp_path.glob(".hswq-*.partial"))) == 1
    foreign = tmp_path / ".hswq-00000000-0123456789abcdef.partial"
    foreign.write_bytes(b"of another machine")
    with CheckpointWriter(path, specs_of(two), 0) as writer:
        beside = [it for it in tmp_path.glob(".hswq-*.partial") if it != foreign]
        assert len(beside) == 1
        # Another writer in the folder leaves the first one's file alone.
        write_file(tmp_path / "y", two)
        assert beside[0].exists()
        for name, tensor in two.items():
            writer.write(name, tensor)
        writer.commit({})
    assert sorted(os.listdir(tmp_path)) == [foreign.name, "x", "y"]


def test_writer_whose_file_is_taken_for_abandoned_makes_another(tmp_path, two, monkeypatch):
    """Another writer may lock the new file before its maker does, and remove it after that."""
    flock, removers = fcntl.flock, []

    def take_first(descriptor, operation):
        if not removers:
            remover = os.open(f"/proc/self/fd/{descriptor}", os.O_RDWR)
            removers.append((remover, os.readlink(f"/proc/self/fd/{descriptor}")))
            flock(remover, operation)
        flock(descriptor, operation)

    monkeypatch.setattr(fcntl, "flock", take_first)
    with CheckpointWriter(tmp_path / "x", specs_of(two), 0) as writer:
        ((remover, path),) = removers
        os.unlink(path)
        os.close(remover)
        for name, tensor in two.items():
            writer.write(name, tensor)
        writer.commit({})
    assert os.listdir(tmp_path) == ["x"]


def test_copy_onto_itself_leaves_nothing(tmp_path):
    """A rename among names of one file does nothing at all, so that the third name would stay."""
    source, target = tmp_path / "a", tmp_path / "b"
    source.write_bytes(b"whole")
    os.link(source, target)
    place_copy(source, target)
    place_copy(source, source)
    assert target.read_bytes() == b"whole"
    assert sorted(os.listdir(tmp_path)) == ["a", "b"]


def test_copy_under_a_second_name(tmp_path, monkeypatch):
    """Codes of a work folder take their final name where disks know no links, too."""
    source, target = tmp_path / "a", tmp_path / "b"
    source.write_bytes(b"whole")
    target.write_bytes(b"old")
    place_copy(source, target)
    assert target.read_bytes() == b"whole"
    target.unlink()

    def refuse(*_args):
        raise OSError(errno.EXDEV, os.strerror(errno.EXDEV))

    monkeypatch.setattr(os, "link", refuse)
    place_copy(source, target)
    assert target.read_bytes() == b"whole"
    with pytest.raises(InputError, match="its folder does not exist"):
        place_copy(source, tmp_path / "no" / "b")
    assert sorted(os.listdir(tmp_path)) == ["a", "b"]


@pytest.mark.parametrize("how", ["link", "copy", "text"])
def test_file_on_its_way_is_not_taken_for_abandoned(tmp_path, monkeypatch, how):
    """Another process of the run tidies up just before the file gets its name."""
    source, target = tmp_path / "a", tmp_path / "out" / "b"
    target.parent.mkdir()
    source.write_bytes(b"new")
    replace = os.replace

    def after_tidying(old, new):
        remove_abandoned(target.parent)
        replace(old, new)

    def other_disk(*_):
        raise OSError(errno.EXDEV, os.strerror(errno.EXDEV))

    monkeypatch.setattr(os, "replace", after_tidying)
    if how == "text":
        write_whole(target, b"new")
    else:
        if how == "copy":
            monkeypatch.setattr(os, "link", other_disk)
        place_copy(source, target)
    assert target.read_bytes() == b"new"
    assert list(target.parent.iterdir()) == [target]


def test_small_file_is_whole_or_not_there(tmp_path, monkeypatch):
    """A page or a plan that is half written loses the old one."""
    folder = tmp_path / "pages"
    folder.mkdir()
    target, link = folder / "page.html", tmp_path / "link"
    link.symlink_to(target)
    write_whole(link, b"old")
    assert link.is_symlink()
    assert target.read_bytes() == b"old"

    def full(descriptor):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(InputError, match=r"page\.html does not fit on the disk: it needs 3"):
            write_whole(target, b"new")
    with pytest.raises(InputError, match="its folder does not exist"):
        write_whole(tmp_path / "no" / "page.html", b"new")
    with pytest.raises(InputError, match=r"pages cannot be written"):
        write_whole(folder, b"new")
    assert target.read_bytes() == b"old"
    assert list(folder.iterdir()) == [target]
    reading, writing = os.pipe()
    with open(reading, "rb") as pipe:
        write_whole(f"/dev/fd/{writing}", b"new")
        os.close(writing)
        assert pipe.read() == b"new"
