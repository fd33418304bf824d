"""What ComfyUI asks of an FP8 file, on files of ours, without ComfyUI.

Its loader looks for keys and metadata by exact names and falls back on other behaviour in silence
where one is missing. comfy-kitchen is the package that it computes with.

Source: ComfyUI, comfy/utils.py (convert_old_quants), comfy/ops.py (_load_from_state_dict).
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

import hswq
from hswq.formats.quantized import dequantize, quantized_weights
from hswq.formats.reader import Checkpoint
from tests.tiny import Tiny

PREFIX = "model.diffusion_model."
MARKER = {"format": "float8_e4m3fn", "full_precision_matrix_mult": True}


@pytest.fixture(scope="module")
def files(tiny: Tiny, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("comfyui")
    found = {}
    for name, scaled, container in (
        ("v1", False, "comfy"),
        ("v2", True, "comfy"),
        ("legacy", True, "legacy"),
    ):
        found[name] = folder / f"{name}.safetensors"
        hswq.quantize_checkpoint(
            tiny.checkpoint, found[name], tiny.config(scaled=scaled, container=container)
        )
    return found


def fp8_bases(tensors: dict[str, Tensor], dimensions: int) -> set[str]:
    return {
        name.removesuffix(".weight")
        for name, value in tensors.items()
        if value.dtype == torch.float8_e4m3fn and value.dim() == dimensions
    }


def ends_with(tensors: dict[str, Tensor], suffix: str) -> set[str]:
    return {name.removesuffix(suffix) for name in tensors if name.endswith(suffix)}


def metadata(path: Path) -> dict[str, str]:
    with safe_open(path, "pt") as file:
        return dict(file.metadata())


@pytest.mark.parametrize("name", ["v1", "v2"])
def test_every_fp8_linear_is_marked_and_nothing_else(files: dict[str, Path], name: str) -> None:
    """One layer without a marker, and its scale is lost; one too many, and loading fails."""
    tensors = load_file(files[name])
    linears = fp8_bases(tensors, 2)
    assert len(linears) > 20
    assert all(base.startswith(PREFIX) for base in linears)
    assert ends_with(tensors, ".comfy_quant") == ends_with(tensors, ".weight_scale") == linears
    for base in linears:
        marker, scale = tensors[f"{base}.comfy_quant"], tensors[f"{base}.weight_scale"]
        assert (marker.dtype, marker.dim()) == (torch.uint8, 1)
        assert json.loads(marker.numpy().tobytes()) == MARKER
        assert (scale.dtype, scale.shape) == (torch.float32, ())
        assert (float(scale) == 1.0) == (name == "v1")


@pytest.mark.parametrize("name", ["v1", "v2"])
def test_metadata_name_the_layers_in_full(files: dict[str, Path], name: str) -> None:
    """With names without the prefix the whole UNet is cast to FP8, kept layers included."""
    tensors = load_file(files[name])
    stored = json.loads(metadata(files[name])["_quantization_metadata"])
    assert stored == {
        "format_version": "1.0",
        "layers": dict.fromkeys(fp8_bases(tensors, 2), MARKER),
    }


@pytest.mark.parametrize("name", ["v1", "v2"])
def test_convolutions_are_fp8_without_a_scale(files: dict[str, Path], name: str) -> None:
    """ComfyUI ignores a convolution's scale: only unscaled codes are right there."""
    tensors = load_file(files[name])
    convolutions = fp8_bases(tensors, 4)
    assert convolutions
    for base in convolutions:
        extra = {key for key in tensors if key.startswith(f"{base}.")}
        assert extra <= {f"{base}.weight", f"{base}.bias"}


@pytest.mark.parametrize("name", ["v1", "v2", "legacy"])
def test_kept_layers_are_as_they_were(tiny: Tiny, files: dict[str, Path], name: str) -> None:
    """The protection of sensitive layers is that they stay 16-bit, without a marker."""
    tensors, source = load_file(files[name]), load_file(tiny.checkpoint)
    kept = {key for key in source if tensors[key].dtype != torch.float8_e4m3fn}
    assert any(key.endswith(".weight") and source[key].dim() == 2 for key in kept)
    for key in kept:
        assert tensors[key].dtype == source[key].dtype
        assert torch.equal(tensors[key], source[key])


def test_legacy_file_has_the_marker_of_weight_only(files: dict[str, Path]) -> None:
    """Two elements mean: multiply in 16 bits. Any other number quantizes the activations too."""
    tensors = load_file(files["legacy"])
    marker = tensors[f"{PREFIX}scaled_fp8"]
    assert (marker.dtype, marker.numel()) == (torch.float8_e4m3fn, 2)
    linears = fp8_bases(tensors, 2)
    assert ends_with(tensors, ".scale_weight") == linears
    assert fp8_bases(tensors, 4) == set()
    for base in linears:
        scale = tensors[f"{base}.scale_weight"]
        assert (scale.dtype, scale.shape) == (torch.float32, ())
    assert "_quantization_metadata" not in metadata(files["legacy"])


@pytest.mark.parametrize("name", ["v1", "v2"])
def test_comfy_kitchen_reads_the_same_numbers(files: dict[str, Path], name: str) -> None:
    """The weights that ComfyUI computes with are those that were searched and measured."""
    from comfy_kitchen.tensor import TensorCoreFP8Layout

    tensors = load_file(files[name])
    with Checkpoint.open(files[name]) as checkpoint:
        for base in sorted(quantized_weights(checkpoint).keys() & fp8_bases(tensors, 2)):
            codes, scale = tensors[f"{base}.weight"], tensors[f"{base}.weight_scale"]
            expected = dequantize(checkpoint, base)
            exact, rounded = (
                TensorCoreFP8Layout.dequantize(
                    codes,
                    TensorCoreFP8Layout.Params(
                        scale=scale, orig_dtype=dtype, orig_shape=tuple(codes.shape)
                    ),
                )
                for dtype in (torch.float32, torch.bfloat16)
            )
            assert torch.equal(exact, expected)
            # It rounds the scale to bfloat16, and the product again.
            error = (rounded.float() - expected).abs()
            assert bool((error <= expected.abs() * 2.0**-7).all())
