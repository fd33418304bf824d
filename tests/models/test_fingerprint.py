"""Which weights, whatever file they are in."""

from __future__ import annotations

import pytest
import torch

from hswq.formats.reader import Checkpoint
from hswq.models.detect import detect
from hswq.models.fingerprint import fingerprint
from hswq.models.trace import trace_map
from tests.checkpoints import write_tiny_sdxl


def fingerprint_of(path, pipeline_dir):
    with Checkpoint.open(path) as checkpoint:
        return fingerprint(checkpoint, trace_map(checkpoint, detect(checkpoint), pipeline_dir))


def test_fingerprint_does_not_depend_on_the_layout(single_file, unet_file, folder, pipeline_dir):
    """Statistics of the folder would be refused for the single file of the same weights."""
    prints = {fingerprint_of(path, pipeline_dir) for path in (single_file, unet_file, folder)}
    assert len(prints) == 1
    assert len(prints.pop()) == 64


@pytest.mark.parametrize("options", [{"seed": 3}, {"dtype": torch.bfloat16}], ids=str)
def test_other_weights_or_dtype_have_another_fingerprint(
    tmp_path, single_file, pipeline_dir, options
):
    """Statistics of another checkpoint would be taken for this one's."""
    other = write_tiny_sdxl(tmp_path / "other.safetensors", **options)
    assert fingerprint_of(other, pipeline_dir) != fingerprint_of(single_file, pipeline_dir)


@pytest.mark.parametrize("place", [0, -1], ids=["first", "last"])
def test_one_changed_weight_is_seen(edited, single_file, pipeline_dir, place):
    """A fine-tune that moved one layer would pass for its base."""

    def change(tensors):
        weight = tensors["model.diffusion_model.out.2.weight"]
        weight.view(-1)[place] += 1

    assert fingerprint_of(edited(change), pipeline_dir) != fingerprint_of(single_file, pipeline_dir)


def test_text_encoders_do_not_count(edited, single_file, pipeline_dir):
    """Statistics describe the denoiser; another text encoder beside it would void them."""

    def change(tensors):
        tensors["conditioner.embedders.1.model.positional_embedding"] += 1

    assert fingerprint_of(edited(change), pipeline_dir) == fingerprint_of(single_file, pipeline_dir)
