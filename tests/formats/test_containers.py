"""The four containers: what is written for a layer, and what is read back from any tool's file."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from hswq.errors import FormatError, InputError
from hswq.formats.containers import (
    CONTAINERS,
    QuantizedLayer,
    can_quantize,
    can_scale,
    check_container,
    container_metadata,
    extra_specs,
    extra_tensors,
    marker_tensors,
)
from hswq.formats.dtypes import DTYPE_NAMES
from hswq.formats.e4m3 import decode
from hswq.formats.quantized import (
    QuantizedWeight,
    dequantize,
    detect_container,
    is_quantized,
    quantized_weights,
)
from hswq.formats.reader import Checkpoint
from hswq.formats.writer import CheckpointWriter, TensorSpec

PREFIX = "model.diffusion_model."
LINEAR, CONV = PREFIX + "middle_block.1.proj_in", PREFIX + "input_blocks.0.0"
MARKER = b'{"format":"float8_e4m3fn","full_precision_matrix_mult":true}'


def layer(base, scaled):
    kind, shape = ("linear", (3, 4)) if base == LINEAR else ("conv2d", (2, 4, 3, 3))
    return QuantizedLayer(base + ".weight", kind, shape, scaled)


def codes_of(shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    # 0x7F and 0xFF, the NaNs, are left out: no encoder of a finite weight writes them.
    return torch.randint(0, 0x7F, shape, generator=generator, dtype=torch.uint8)


def write_container(path, container, layers, scales):
    """A file of this container with 16-bit weights beside the FP8 ones."""
    kept = {PREFIX + "out.2.weight": torch.ones(2, 2, dtype=torch.bfloat16)}
    specs = [TensorSpec(layer.key, "F8_E4M3", layer.shape) for layer in layers]
    specs += [TensorSpec(k, DTYPE_NAMES[v.dtype], tuple(v.shape)) for k, v in kept.items()]
    specs += extra_specs(container, layers, PREFIX)
    metadata = container_metadata(container, layers)
    with CheckpointWriter(path, specs, len(json.dumps(metadata))) as writer:
        for name, tensor in (kept | marker_tensors(container, PREFIX)).items():
            writer.write(name, tensor)
        for layer, scale in zip(layers, scales, strict=True):
            writer.write(layer.key, codes_of(layer.shape))
            for name, tensor in extra_tensors(container, layer, scale).items():
                writer.write(name, tensor)
        writer.commit(metadata)
    return path


def save_and_open(tmp_path, tensors, metadata=None):
    save_file(tensors, tmp_path / "x.safetensors", metadata)
    return Checkpoint.open(tmp_path / "x.safetensors")


@pytest.mark.parametrize(
    ("container", "scaled", "quantized", "scalable"),
    [
        ("comfy", False, {"linear", "conv2d"}, {"linear"}),
        ("comfy", True, {"linear", "conv2d"}, {"linear"}),
        ("plain", False, {"linear", "conv2d"}, set()),
        ("legacy", True, {"linear"}, {"linear"}),
        ("hswq", False, {"linear", "conv2d"}, {"linear", "conv2d"}),
        ("hswq", True, {"linear", "conv2d"}, {"linear", "conv2d"}),
    ],
)
def test_table_of_containers(container, scaled, quantized, scalable):
    """A layer written where its reader does not look for it gives a wrong image."""
    kinds = ("linear", "conv2d", "embedding")
    check_container(container, scaled)
    assert {kind for kind in kinds if can_quantize(container, kind, scaled)} == quantized
    assert {kind for kind in kinds if can_scale(container, kind)} == scalable


@pytest.mark.parametrize(
    ("container", "scaled", "words"),
    [
        ("plain", True, "holds no scales"),
        ("legacy", False, "only scaled weights"),
        ("gguf", False, "not one of comfy, plain, legacy, hswq"),
    ],
)
def test_impossible_containers_are_refused(container, scaled, words):
    """A V2 file without its scales is noise."""
    with pytest.raises(InputError, match=words):
        check_container(container, scaled)
    with pytest.raises(InputError, match=words):
        can_quantize(container, "linear", scaled)
    with pytest.raises(InputError, match=words):
        extra_specs(container, [layer(LINEAR, scaled)], PREFIX)


def test_layers_that_the_reader_would_misread_are_refused():
    """ComfyUI ignores a scale on a convolution; older readers know no FP8 convolution at all."""
    with pytest.raises(InputError, match=r"comfy has no scales for conv2d.*input_blocks\.0\.0"):
        extra_specs("comfy", [layer(CONV, True)], PREFIX)
    with pytest.raises(InputError, match="legacy holds no FP8 conv2d"):
        extra_specs("legacy", [layer(CONV, True)], PREFIX)
    with pytest.raises(InputError, match=r"not scaled and was given the scale 0\.5"):
        extra_tensors("comfy", layer(LINEAR, False), 0.5)


@pytest.mark.parametrize("scaled", [False, True])
def test_comfy_adds_scale_marker_and_metadata_to_linears_only(scaled):
    """Key names, shapes, dtypes and the JSON are what ComfyUI pops from the state dict."""
    layers = [layer(LINEAR, scaled), layer(CONV, False)]
    assert extra_specs("comfy", layers, PREFIX) == [
        TensorSpec(LINEAR + ".weight_scale", "F32", ()),
        TensorSpec(LINEAR + ".comfy_quant", "U8", (len(MARKER),)),
    ]
    scale = 0.25 if scaled else 1.0
    tensors = extra_tensors("comfy", layers[0], scale)
    assert tensors[LINEAR + ".weight_scale"].item() == scale
    assert tensors[LINEAR + ".comfy_quant"].numpy().tobytes() == MARKER
    assert extra_tensors("comfy", layers[1], 1.0) == {}
    metadata = container_metadata("comfy", layers)
    assert metadata.keys() == {"_quantization_metadata"}
    assert json.loads(metadata["_quantization_metadata"]) == {
        "format_version": "1.0",
        "layers": {LINEAR: {"format": "float8_e4m3fn", "full_precision_matrix_mult": True}},
    }


def test_comfy_file_of_convolutions_only_has_no_layers_to_mark():
    """Metadata that name no layer would still switch ComfyUI to its quantized operations."""
    assert container_metadata("comfy", [layer(CONV, False)]) == {}


def test_plain_adds_nothing():
    """Readers of plain FP8 files stumble over keys they do not know."""
    layers = [layer(LINEAR, False), layer(CONV, False)]
    assert extra_specs("plain", layers, PREFIX) == []
    assert container_metadata("plain", layers) == {}


def test_legacy_adds_scale_and_the_weight_only_marker():
    """A marker of another size makes older ComfyUI quantize the activations with scale 1."""
    layers = [layer(LINEAR, True)]
    assert extra_specs("legacy", layers, PREFIX) == [
        TensorSpec(PREFIX + "scaled_fp8", "F8_E4M3", (2,)),
        TensorSpec(LINEAR + ".scale_weight", "F32", ()),
    ]
    assert extra_tensors("legacy", layers[0], 0.125)[LINEAR + ".scale_weight"].item() == 0.125
    assert container_metadata("legacy", layers) == {}
    assert marker_tensors("legacy", "").keys() == {"scaled_fp8"}


@pytest.mark.parametrize("scaled", [False, True])
def test_hswq_adds_a_scale_to_every_layer(scaled):
    """The seed's loader looks for L.scale of shape [1] on linears and convolutions, V1 too."""
    layers = [layer(LINEAR, scaled), layer(CONV, scaled)]
    assert extra_specs("hswq", layers, PREFIX) == [
        TensorSpec(LINEAR + ".scale", "F32", (1,)),
        TensorSpec(CONV + ".scale", "F32", (1,)),
    ]
    assert container_metadata("hswq", layers) == {}


def test_scale_is_the_float32_that_was_divided_by():
    """Codes were made with float32(amax / 448): another rounding of it moves every weight."""
    scale = torch.tensor(0.7, dtype=torch.float32).div(448).item()
    (tensor,) = extra_tensors("hswq", layer(CONV, True), scale).values()
    assert tensor.item() == scale


@pytest.mark.parametrize(
    ("container", "layers", "scales"),
    [
        ("comfy", [layer(LINEAR, False), layer(CONV, False)], [1.0, 1.0]),
        ("comfy", [layer(LINEAR, True), layer(CONV, False)], [0.37, 1.0]),
        ("plain", [layer(LINEAR, False), layer(CONV, False)], [1.0, 1.0]),
        ("legacy", [layer(LINEAR, True)], [0.37]),
        ("hswq", [layer(LINEAR, False), layer(CONV, False)], [1.0, 1.0]),
        ("hswq", [layer(LINEAR, True), layer(CONV, True)], [0.37, 1e-3]),
    ],
)
def test_what_is_written_is_read_back(tmp_path, container, layers, scales):
    """Container, layers and values of our own files, codes times scale to the last bit."""
    path = write_container(tmp_path / "x.safetensors", container, layers, scales)
    loaded = load_file(path)
    with Checkpoint.open(path) as checkpoint:
        assert detect_container(checkpoint) == container
        assert is_quantized(checkpoint)
        assert quantized_weights(checkpoint).keys() == {layer.base for layer in layers}
        for layer, scale in zip(layers, scales, strict=True):
            codes = loaded[layer.key].view(torch.uint8)
            assert torch.equal(codes, codes_of(layer.shape))
            expected = decode(codes) * torch.tensor(scale, dtype=torch.float32)
            assert torch.equal(dequantize(checkpoint, layer.base), expected)
        with pytest.raises(InputError, match="no quantized weight"):
            dequantize(checkpoint, PREFIX + "out.2")
        with pytest.raises(InputError, match="no quantized weight"):
            dequantize(checkpoint, "missing")


@pytest.mark.parametrize("prefix", ["", PREFIX])
def test_legacy_marker_alone_marks_a_legacy_file(tmp_path, prefix):
    """Some tools write the marker and no scale for weights whose scale is 1."""
    with save_and_open(tmp_path, marker_tensors("legacy", prefix)) as checkpoint:
        assert detect_container(checkpoint) == "legacy"


def test_words_count_what_was_found(tmp_path):
    """`quantize` refuses the file with these words."""
    layers = [layer(LINEAR, True), layer(CONV, False)]
    path = write_container(tmp_path / "x.safetensors", "comfy", layers, [0.5, 1.0])
    with Checkpoint.open(path) as checkpoint:
        assert is_quantized(checkpoint) == (
            "comfy markers on 1 layers, weight_scale on 1 layers, 2 tensors of F8_E4M3"
        )


def test_models_own_scale_keys_are_no_quantization(tmp_path):
    """Flux calls its norms' weights .scale, and SDXL holds empty marker keys: both are 16-bit."""
    tensors = {
        "double_blocks.0.img_attn.norm.query_norm.scale": torch.ones(4, dtype=torch.bfloat16),
        "a.weight": torch.ones(2, 2, dtype=torch.bfloat16),
        "a.scale": torch.ones(1),
        "position_ids": torch.arange(4).reshape(1, 4),
        "tokens": torch.ones(9, dtype=torch.uint8),
        "v_pred": torch.zeros(0),
    }
    with save_and_open(tmp_path, tensors, {"format": "pt"}) as checkpoint:
        assert is_quantized(checkpoint) is None
        assert detect_container(checkpoint) == "none"
        assert quantized_weights(checkpoint) == {}


@pytest.mark.parametrize(
    ("suffix", "container"), [("weight_scale", "comfy"), ("scale_weight", "legacy")]
)
@pytest.mark.parametrize("shape", [(3,), (3, 1)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_row_scales_of_other_tools_scale_rows(tmp_path, suffix, container, shape, dtype):
    """A scale per row applied to columns, or in 16 bits, gives another weight."""
    scale = torch.tensor([0.1, 0.02, 3.0]).to(dtype)
    codes = codes_of((3, 3))
    tensors = {
        "a.weight": codes.view(torch.float8_e4m3fn),
        f"a.{suffix}": scale.reshape(shape),
    }
    with save_and_open(tmp_path, tensors) as checkpoint:
        assert detect_container(checkpoint) == container
        assert quantized_weights(checkpoint) == {
            "a": QuantizedWeight("a", "a.weight", f"a.{suffix}", True)
        }
        expected = decode(codes) * scale.float()[:, None]
        assert torch.equal(dequantize(checkpoint, "a"), expected)


@pytest.mark.parametrize("shape", [(), (1,), (1, 1)])
def test_one_scale_of_any_shape_scales_the_whole_weight(tmp_path, shape):
    """A single row with a single scale is both, and the same."""
    for rows in (1, 3):
        codes = codes_of((rows, 2, 1, 1))
        tensors = {
            "a.weight": codes.view(torch.float8_e4m3fn),
            "a.weight_scale": torch.full(shape, 0.3),
        }
        with save_and_open(tmp_path, tensors) as checkpoint:
            assert not quantized_weights(checkpoint)["a"].per_row
            assert torch.equal(dequantize(checkpoint, "a"), decode(codes) * torch.tensor(0.3))


def test_unscaled_norms_and_scalars_dequantize_as_they_are(tmp_path):
    """Naive tools cast norms and even scalars to FP8."""
    codes = codes_of((5,))
    tensors = {
        "norm.weight": codes.view(torch.float8_e4m3fn),
        "gate.weight": codes[0].clone().view(torch.float8_e4m3fn),
        "gate.weight_scale": torch.tensor(0.5),
    }
    with save_and_open(tmp_path, tensors) as checkpoint:
        assert torch.equal(dequantize(checkpoint, "norm"), decode(codes))
        assert torch.equal(dequantize(checkpoint, "gate"), decode(codes[0]) * 0.5)


@pytest.mark.parametrize(
    "scale",
    [
        torch.ones(2, 1),
        torch.ones(1, 3),
        torch.ones(3, 2),
        torch.ones(0),
        torch.tensor(float("nan")),
        torch.tensor([1.0, float("inf"), 1.0]),
        torch.ones(3, dtype=torch.uint8),
        torch.ones(3).to(torch.float8_e4m3fn),
    ],
    ids=lambda scale: f"{list(scale.shape)} {scale.dtype}",
)
def test_scales_of_other_schemes_are_refused(tmp_path, scale):
    """Block scales broadcast by accident, or powers of two read as numbers, give a wrong weight."""
    tensors = {"a.weight": codes_of((3, 4)).view(torch.float8_e4m3fn), "a.weight_scale": scale}
    with save_and_open(tmp_path, tensors) as checkpoint:
        assert is_quantized(checkpoint)
        with pytest.raises(FormatError, match=r"scale 'a\.weight_scale' .* does not fit weight"):
            dequantize(checkpoint, "a")


@pytest.mark.parametrize(
    "dtype", [torch.float8_e5m2, torch.float8_e4m3fnuz, torch.int8, torch.uint8]
)
def test_other_one_byte_weights_are_told_and_not_dequantized(tmp_path, dtype):
    """An int8 or E5M2 file taken for 16-bit would be quantized twice or copied as it is."""
    weight = torch.zeros(2, 4, dtype=torch.uint8).view(dtype)
    with save_and_open(tmp_path, {"a.weight": weight}) as checkpoint:
        assert is_quantized(checkpoint) == f"1 tensors of {DTYPE_NAMES[dtype]}"
        assert quantized_weights(checkpoint)["a"].scale_key is None
        with pytest.raises(FormatError, match="only F8_E4M3"):
            dequantize(checkpoint, "a")


@pytest.mark.parametrize(
    ("tensors", "metadata", "words"),
    [
        ({"a.qweight": torch.ones(2, 2, dtype=torch.int32)}, None, "packed weights on 1 layers"),
        ({"scaled_fp8": torch.zeros(2).to(torch.float8_e4m3fn)}, None, "1 tensors of F8_E4M3"),
        ({"a.bias": torch.zeros(2).to(torch.float8_e5m2)}, None, "1 tensors of F8_E5M2"),
        ({"a.weight": torch.zeros(2)}, {"_quantization_metadata": "{}"}, "metadata _quantization"),
    ],
)
def test_traces_of_quantization_elsewhere_are_told(tmp_path, tensors, metadata, words):
    """Packed, marked or cast files without an FP8 weight matrix are quantized all the same."""
    with save_and_open(tmp_path, tensors, metadata) as checkpoint:
        assert words in is_quantized(checkpoint)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8, torch.float8_e4m3fn])
def test_only_the_denoiser_is_looked_at(tmp_path, dtype):
    """A lookup table, a thumbnail or an FP8 text encoder does not make the denoiser quantized."""
    codes = torch.zeros(4, 4, dtype=torch.uint8).view(dtype)
    tensors = {
        "conditioner.embedders.0.weight": codes,
        "conditioner.embedders.0.comfy_quant": torch.zeros(4, dtype=torch.uint8),
        "thumbnail": codes.clone(),
        "first_stage_model.a.qweight": codes.clone(),
        PREFIX + "a.weight": torch.ones(2, 2, dtype=torch.float16),
    }
    with save_and_open(tmp_path, tensors) as checkpoint:
        assert is_quantized(checkpoint, PREFIX) is None
        assert is_quantized(checkpoint, "")


@pytest.mark.parametrize(
    ("name", "dtype", "words"),
    [
        ("a.weight", torch.int8, "1 tensors of I8"),
        ("a.weight", torch.uint8, "1 tensors of U8"),
        # quanto, torchao
        ("a.weight._data", torch.int8, "1 tensors of I8"),
        ("a.weight_qdata", torch.int8, "1 tensors of I8"),
        ("a.weight", torch.float8_e5m2, "1 tensors of F8_E5M2"),
        ("a.qweight", torch.int32, "packed weights on 1 layers"),
        ("a.weight_packed", torch.int32, "packed weights on 1 layers"),
        ("a.comfy_quant", torch.uint8, "comfy markers on 1 layers"),
        ("scaled_fp8", torch.float8_e4m3fn, "1 tensors of F8_E4M3"),
    ],
)
def test_quantized_layers_of_the_denoiser_are_told(tmp_path, name, dtype, words):
    """Beside 16-bit text encoders too: most of these files are whole checkpoints."""
    tensors = {
        "conditioner.embedders.0.weight": torch.ones(2, 2, dtype=torch.float16),
        PREFIX + name: torch.zeros(2, 16, dtype=torch.uint8).view(dtype),
    }
    with save_and_open(tmp_path, tensors) as checkpoint:
        assert is_quantized(checkpoint, PREFIX) == words


def test_byte_matrix_that_is_no_weight_is_no_quantization(tmp_path):
    """Whether an unknown tensor may be in a denoiser is for the map to say, with its name."""
    with save_and_open(tmp_path, {"grid": torch.zeros(4, 4, dtype=torch.uint8)}) as checkpoint:
        assert is_quantized(checkpoint) is None


def test_containers_are_those_of_the_options():
    """An option that the formats do not know would fail after calibration."""
    from hswq.config import QuantizeConfig

    (field,) = (f for f in QuantizeConfig.__dataclass_fields__.values() if f.name == "container")
    assert field.metadata["choices"] == CONTAINERS
