"""Tiny checkpoints for the tests of hswq.models."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from tests.checkpoints import write_tiny_pipeline, write_tiny_sdxl


@pytest.fixture(scope="session")
def pipeline_dir(tmp_path_factory) -> Path:
    """A pipeline folder with configurations, tokenizers, text encoders and VAE; no UNet weights."""
    return write_tiny_pipeline(tmp_path_factory.mktemp("pipeline"))


@pytest.fixture(scope="session")
def single_file(tmp_path_factory) -> Path:
    """A full checkpoint in LDM layout, float16."""
    return write_tiny_sdxl(tmp_path_factory.mktemp("single") / "model.safetensors")


@pytest.fixture(scope="session")
def unet_file(tmp_path_factory) -> Path:
    """The UNet of `single_file` alone, without prefix."""
    path = tmp_path_factory.mktemp("unet") / "unet.safetensors"
    return write_tiny_sdxl(path, unet_only=True, prefix="")


@pytest.fixture(scope="session")
def folder(tmp_path_factory) -> Path:
    """The weights of `single_file` as a diffusers pipeline folder."""
    return write_tiny_sdxl(tmp_path_factory.mktemp("folder") / "model", layout="diffusers")


@pytest.fixture
def edited(tmp_path, single_file) -> Callable[..., Path]:
    """Return a copy of `single_file` whose tensors a function has changed."""

    def write(change: Callable[[dict], None], source: Path = single_file) -> Path:
        tensors = load_file(source)
        change(tensors)
        save_file(tensors, tmp_path / "edited.safetensors")
        return tmp_path / "edited.safetensors"

    return write
