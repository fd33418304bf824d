"""Reading: values, row ranges, shards, folders, memory."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save, save_file

from hswq.errors import FormatError, InputError
from hswq.formats.reader import Checkpoint
from tests.formats.files import entry, pack, random_tensor, raw_bytes, write


def test_reads_what_the_safetensors_package_wrote(tmp_path, tensors):
    """Any dtype, name, empty or scalar tensor read back with other bytes would show."""
    path = tmp_path / "all.safetensors"
    save_file(tensors, path, metadata={"modelspec.title": "größe", "format": "pt"})
    with Checkpoint.open(path) as checkpoint:
        assert checkpoint.metadata == {"modelspec.title": "größe", "format": "pt"}
        assert checkpoint.files == (path,)
        assert set(checkpoint.tensors) == set(tensors)
        begins = [info.begin for info in checkpoint.tensors.values()]
        assert begins == sorted(begins)
        for name, expected in tensors.items():
            info, found = checkpoint.tensors[name], checkpoint.read(name)
            assert (found.dtype, found.shape) == (expected.dtype, expected.shape)
            assert (info.torch_dtype, info.shape) == (expected.dtype, tuple(expected.shape))
            assert (info.numel, info.nbytes) == (expected.numel(), expected.nbytes)
            assert raw_bytes(found) == raw_bytes(expected)
            assert checkpoint.read_bytes(name, 0, info.nbytes) == raw_bytes(expected)


@pytest.mark.parametrize(("start", "stop"), [(0, 7), (0, 0), (7, 7), (2, 5), (None, 3), (4, None)])
def test_row_range_equals_the_slice(tmp_path, start, stop):
    """An offset computed in elements instead of bytes, or off by a row, would show."""
    tensor = random_tensor("BF16", (7, 3, 5))
    save_file({"a": random_tensor("F32", (2,)), "w": tensor}, tmp_path / "x.safetensors")
    with Checkpoint.open(tmp_path / "x.safetensors") as checkpoint:
        found = checkpoint.read("w", start, stop)
        assert found.shape == tensor[start:stop].shape
        assert raw_bytes(found) == raw_bytes(tensor[start:stop])


def test_read_returns_a_buffer_of_its_own(tmp_path):
    """Changing what was read must change neither the file nor a second read."""
    save_file({"w": torch.ones(4)}, tmp_path / "x.safetensors")
    with Checkpoint.open(tmp_path / "x.safetensors") as checkpoint:
        checkpoint.read("w").zero_()
        assert checkpoint.read("w").tolist() == [1.0] * 4


def test_wrong_requests_are_refused(tmp_path):
    """A range outside the tensor must not return a neighbour's bytes."""
    save_file({"w": torch.ones(4, 2), "s": torch.tensor(1.0)}, tmp_path / "x.safetensors")
    with Checkpoint.open(tmp_path / "x.safetensors") as checkpoint:
        for rows in ((-1, 2), (3, 2), (0, 5)):
            with pytest.raises(InputError, match="first dimension"):
                checkpoint.read("w", *rows)
        with pytest.raises(InputError, match="first dimension"):
            checkpoint.read("s", 0, 1)
        for offset, length in ((0, 33), (-1, 2), (32, 1), (4, -1)):
            with pytest.raises(InputError, match="which has 32"):
                checkpoint.read_bytes("w", offset, length)
        with pytest.raises(InputError, match="no tensor 'missing'"):
            checkpoint.read("missing")


def test_close_closes_the_descriptors(tmp_path):
    """A long run over many checkpoints would run out of descriptors."""
    save_file({"w": torch.ones(4)}, tmp_path / "x.safetensors")
    before = len(os.listdir("/proc/self/fd"))
    checkpoint = Checkpoint.open(tmp_path / "x.safetensors")
    assert len(os.listdir("/proc/self/fd")) == before
    checkpoint.read("w")
    assert len(os.listdir("/proc/self/fd")) == before + 1
    checkpoint.close()
    assert len(os.listdir("/proc/self/fd")) == before
    with pytest.raises(InputError, match="closed"):
        checkpoint.read("w")


def test_file_shortened_after_opening_is_told(tmp_path):
    """A short read must not return zeros for the missing bytes."""
    path = tmp_path / "x.safetensors"
    save_file({"w": torch.ones(100)}, path)
    with Checkpoint.open(path) as checkpoint:
        os.truncate(path, path.stat().st_size - 4)
        with pytest.raises(FormatError, match="shortened"):
            checkpoint.read("w")


def test_unreadable_files_are_told(tmp_path, monkeypatch):
    """A failing disk or a file without permission must not surface as a traceback."""
    index = make_shards(tmp_path / "unet")
    with Checkpoint.open(index) as checkpoint:

        def fail(*_args):
            raise OSError(errno.EIO, os.strerror(errno.EIO))

        monkeypatch.setattr(os, "preadv", fail)
        with pytest.raises(InputError, match=r"'a' in .*cannot be read: Input/output error"):
            checkpoint.read("a")
        monkeypatch.setattr(os, "listdir", fail)
        with pytest.raises(InputError, match="unet cannot be read: Input/output error"):
            Checkpoint.open(index.parent)
        for path in (index, checkpoint.files[0]):
            monkeypatch.setattr(type(path), "open", fail)
            with pytest.raises(InputError, match=f"{path.name} cannot be read"):
                Checkpoint.open(path)


def test_index_that_is_no_object_is_refused(tmp_path):
    """Any JSON may lie under that name."""
    write(tmp_path / "x.safetensors.index.json", b"[]")
    with pytest.raises(FormatError, match="no object"):
        Checkpoint.open(tmp_path)


@pytest.mark.parametrize(
    "name", ["missing.safetensors", "missing/x.safetensors", "nul\0.safetensors"]
)
def test_missing_path_says_what_is_needed(tmp_path, name):
    """A wrong path must not surface as FileNotFoundError."""
    with pytest.raises(InputError, match=r"does not exist.*give a \.safetensors file"):
        Checkpoint.open(tmp_path / name)


def test_unusable_folders_and_special_files_are_refused(tmp_path):
    """An empty folder, a choice of several, or a pipe must not be guessed at or hang."""
    with pytest.raises(InputError, match=r"holds no \.safetensors checkpoint"):
        Checkpoint.open(tmp_path)
    for name in ("a.safetensors", "b.safetensors"):
        write(tmp_path / name, save({"w": torch.ones(1)}))
    with pytest.raises(InputError, match=r"2 checkpoints \(a.safetensors, b.safetensors\)"):
        Checkpoint.open(tmp_path)
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(InputError, match="no regular file"):
        Checkpoint.open(tmp_path / "pipe")
    os.symlink("loop", tmp_path / "loop")
    with pytest.raises(InputError, match="cannot be reached"):
        Checkpoint.open(tmp_path / "loop")


def make_shards(folder: Path, variant: str = "") -> Path:
    """Two shards and their index, as transformers writes them."""
    folder.mkdir(exist_ok=True)
    stem = "diffusion_pytorch_model"
    shards = [f"{stem}-0000{number}-of-00002{variant}.safetensors" for number in (1, 2)]
    save_file(
        {"z": torch.ones(2), "b": torch.zeros(3)}, folder / shards[0], {"format": "pt", "n": "1"}
    )
    save_file({"a": torch.full((4,), 2.0)}, folder / shards[1], {"n": "2"})
    weight_map = {"a": shards[1], "b": shards[0], "z": shards[0]}
    index = folder / f"{stem}.safetensors.index{variant}.json"
    index.write_text(json.dumps({"metadata": {"total_size": 36}, "weight_map": weight_map}))
    return index


@pytest.mark.parametrize("variant", ["", ".fp16"])
@pytest.mark.parametrize("by_folder", [False, True])
def test_sharded_checkpoint_reads_as_one(tmp_path, variant, by_folder):
    """A tensor read from the wrong shard, or a shard left out, would show."""
    index = make_shards(tmp_path / "unet", variant)
    with Checkpoint.open(index.parent if by_folder else index) as checkpoint:
        assert [path.name[24:29] for path in checkpoint.files] == ["00002", "00001"]
        assert list(checkpoint.tensors) == ["a", "b", "z"]
        assert checkpoint.metadata == {"format": "pt", "n": "2"}
        assert checkpoint.read("a").tolist() == [2.0] * 4
        assert checkpoint.read("z").tolist() == [1.0] * 2


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda weights: weights.update(c=weights["a"]), "tensor 'c' is not in"),
        (lambda weights: weights.update(b=weights["a"]), "tensor 'b', which .* puts into"),
        (lambda weights: weights.pop("z"), "tensor 'z', which .* does not know"),
        (lambda weights: weights.update(a="gone.safetensors"), "gone.safetensors is missing"),
        (lambda weights: weights.update(a="../x.safetensors"), "file beside it"),
        (lambda weights: weights.update(a=3), "file beside it"),
        (lambda weights: weights.clear(), "no weight_map"),
    ],
)
def test_index_that_disagrees_with_its_shards_is_refused(tmp_path, change, words):
    """Shards of two downloads mixed up would give a model of two halves."""
    index = make_shards(tmp_path)
    content = json.loads(index.read_text())
    change(content["weight_map"])
    index.write_text(json.dumps(content))
    with pytest.raises(FormatError, match=words):
        Checkpoint.open(index)


def make_pipeline(folder: Path, component: str, name: str) -> Path:
    (folder / component).mkdir(parents=True)
    (folder / "model_index.json").write_text("{}")
    (folder / component / "config.json").write_text('{"in_channels": 4}')
    save_file({"w": torch.ones(1)}, folder / component / name)
    return folder


@pytest.mark.parametrize("component", ["unet", "transformer"])
@pytest.mark.parametrize(
    "name", ["diffusion_pytorch_model.safetensors", "diffusion_pytorch_model.fp16.safetensors"]
)
def test_diffusers_folders_open_the_denoiser(tmp_path, component, name):
    """The pipeline's VAE or text encoder opened instead would be quantized instead."""
    pipeline = make_pipeline(tmp_path / "pipe", component, name)
    make_pipeline(tmp_path / "other", "vae", name).joinpath("vae").rename(pipeline / "vae")
    for path in (pipeline, pipeline / component, pipeline / component / name):
        with Checkpoint.open(path) as checkpoint:
            assert checkpoint.files == (pipeline / component / name,)
            assert checkpoint.config == {"in_channels": 4}
            assert checkpoint.pipeline_dir == pipeline


def test_full_precision_goes_before_a_variant(tmp_path):
    """Where both lie side by side, the fp16 file has already lost bits."""
    pipeline = make_pipeline(tmp_path / "pipe", "unet", "diffusion_pytorch_model.safetensors")
    save_file(
        {"w": torch.ones(1).half()}, pipeline / "unet/diffusion_pytorch_model.fp16.safetensors"
    )
    with Checkpoint.open(pipeline) as checkpoint:
        assert checkpoint.tensors["w"].dtype == "F32"


def test_pipeline_without_a_denoiser_is_refused(tmp_path):
    """A folder of text encoders only has nothing to quantize."""
    make_pipeline(tmp_path / "pipe", "vae", "diffusion_pytorch_model.safetensors")
    with pytest.raises(InputError, match="neither of unet, transformer"):
        Checkpoint.open(tmp_path / "pipe")


def test_single_file_has_neither_configuration_nor_pipeline(tmp_path):
    """A lone file must not borrow the configuration of something else."""
    save_file({"w": torch.ones(1)}, tmp_path / "x.safetensors")
    with Checkpoint.open(tmp_path / "x.safetensors") as checkpoint:
        assert checkpoint.config is None
        assert checkpoint.pipeline_dir is None
        (tmp_path / "config.json").write_text("[")
    with (
        Checkpoint.open(tmp_path / "x.safetensors") as checkpoint,
        pytest.raises(FormatError, match=r"config\.json is not valid JSON"),
    ):
        _ = checkpoint.config


def test_links_as_in_the_hub_cache_are_followed(tmp_path):
    """The hub's cache keeps blobs elsewhere; the configuration lies beside the link."""
    blob = tmp_path / "blobs" / "0123abcd"
    blob.parent.mkdir()
    save_file({"w": torch.ones(1)}, blob)
    snapshot = tmp_path / "snapshot"
    (snapshot / "unet").mkdir(parents=True)
    (snapshot / "model_index.json").write_text("{}")
    (snapshot / "unet/diffusion_pytorch_model.safetensors").symlink_to(blob)
    with Checkpoint.open(snapshot) as checkpoint:
        assert checkpoint.read("w").tolist() == [1.0]
        assert checkpoint.pipeline_dir == snapshot


PEAK = """
import resource, sys
from hswq.formats.reader import Checkpoint
with Checkpoint.open(sys.argv[1]) as checkpoint:
    checkpoint.read("small")
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    rows = checkpoint.read("large", 700_000, 708_192)
    after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
assert rows.shape == (8192, 1024), rows.shape
# ru_maxrss is in KiB. Half again as much is left for the allocator; a copy would take twice.
sys.exit(0 if (after - before) * 1024 < 1.5 * rows.nbytes else f"{after - before} KiB more")
"""


@pytest.fixture
def sparse_file(tmp_path):
    """File of a tensor 'large' of 3 GB, [732421, 1024] float32, that takes no disk space."""
    rows = 3_000_000_000 // 4096
    size = rows * 4096
    header = {
        "large": entry("F32", [rows, 1024], 0, size),
        "small": entry("U8", [1], size, size + 1),
    }
    path = write(tmp_path / "sparse.safetensors", pack(header))
    os.truncate(path, path.stat().st_size + size + 1)
    assert path.stat().st_blocks * 512 < 1 << 20
    return path


def test_rows_read_only_their_own_bytes(sparse_file, monkeypatch):
    """Rows taken out of the whole tensor would read 3 GB for 8 KiB."""
    moved = []
    preadv = os.preadv

    def spy(descriptor, buffers, offset):
        moved.append((offset, sum(map(len, buffers))))
        return preadv(descriptor, buffers, offset)

    monkeypatch.setattr(os, "preadv", spy)
    with Checkpoint.open(sparse_file) as checkpoint:
        begin = checkpoint.tensors["large"].begin
        assert checkpoint.read("large", 700_000, 700_002).shape == (2, 1024)
        assert checkpoint.read_bytes("large", 2_500_000_000, 5) == bytes(5)
    assert moved == [(begin + 700_000 * 4096, 8192), (begin + 2_500_000_000, 5)]


@pytest.mark.slow
def test_rows_of_a_large_tensor_take_only_their_own_memory(sparse_file):
    """Reading 32 MiB of rows must take 32 MiB, neither the tensor nor a copy of the rows."""
    subprocess.run([sys.executable, "-c", PEAK, str(sparse_file)], check=True)
