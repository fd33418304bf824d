"""load_quantized and save_quantized: files of every container and of other tools, into modules."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import hswq
from hswq.errors import FormatError, InputError, PlanError
from hswq.formats.e4m3 import decode
from hswq.formats.quantized import dequantize, quantized_weights
from hswq.formats.reader import Checkpoint
from hswq.models.denoiser import load_denoiser, meta_denoiser
from hswq.models.detect import detect
from hswq.models.folders import read_json
from hswq.models.trace import trace_map
from tests.checkpoints import write_tiny_sdxl
from tests.tiny import Tiny

VARIANTS = [
    (False, "comfy"),
    (False, "plain"),
    (False, "hswq"),
    (True, "comfy"),
    (True, "legacy"),
    (True, "hswq"),
]


def raw(value: Tensor) -> Tensor:
    return value.detach().reshape(-1).view(torch.uint8)


def tiny_unet(tiny: Tiny) -> nn.Module:
    config = read_json(tiny.pipeline / "unet" / "config.json")
    assert config is not None
    return meta_denoiser(config)


def is_fp8(part: nn.Module) -> bool:
    return isinstance(part, (hswq.Linear, hswq.Conv2d))


def float_weights(module: nn.Module) -> dict[str, Tensor]:
    """Every tensor of the module's 16-bit state dict, FP8 weights as float32 values."""
    found = {name: value.float() for name, value in module.named_parameters()}
    for name, part in module.named_modules():
        if is_fp8(part):
            found[f"{name}.weight"] = part.dequantize()
    return found


def small_model(dtype: torch.dtype = torch.float16) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(4, 8, 3, padding=1, dtype=dtype),
        nn.Flatten(2),
        nn.Linear(16, 6, bias=False, dtype=dtype),
        nn.LayerNorm(6, dtype=dtype),
        nn.Linear(6, 5, dtype=dtype),
    )


def small_file(
    path: Path, changes: dict[str, Tensor | None] | None = None, prefix: str = ""
) -> Path:
    """A V2 file of `small_model` in the manner of another tool: weight_scale, one a row in one."""
    state = small_model().state_dict()
    tensors: dict[str, Tensor] = {}
    for name, value in state.items():
        if value.dim() == 1:
            tensors[name] = value
            continue
        amax = value.float().abs().amax()
        if name == "4.weight":
            amax = value.float().abs().amax(1)
        scale = amax / 448
        rows = scale.reshape(-1, *[1] * (value.dim() - 1)) if scale.dim() else scale
        tensors[name] = (value.float() / rows).to(torch.float8_e4m3fn)
        tensors[name + "_scale"] = scale
    for name, value in (changes or {}).items():
        tensors.pop(name, None)
        if value is not None:
            tensors[name] = value
    save_file({prefix + name: value for name, value in tensors.items()}, path)
    return path


@pytest.mark.parametrize(("scaled", "container"), VARIANTS)
def test_every_container_loads_as_it_was_written(
    tiny: Tiny, tmp_path: Path, scaled: bool, container: str
) -> None:
    """Each weight of the UNet is that of the file, found on an independent way: a 16-bit load."""
    path = tmp_path / "fp8.safetensors"
    hswq.quantize_checkpoint(tiny.checkpoint, path, tiny.config(scaled=scaled, container=container))
    unet = hswq.load_quantized(tiny_unet(tiny), path)
    with Checkpoint.open(path) as checkpoint:
        bases = quantized_weights(checkpoint)
        plain = {
            key: dequantize(checkpoint, key.removesuffix(".weight"))
            if key.removesuffix(".weight") in bases
            else checkpoint.read(key)
            for key in load_file(tiny.checkpoint)
        }
    save_file(plain, tmp_path / "plain.safetensors")
    config = dict(unet.config)
    with Checkpoint.open(tmp_path / "plain.safetensors") as checkpoint:
        model_map = trace_map(checkpoint, detect(checkpoint), tiny.pipeline)
        exact = load_denoiser(checkpoint, model_map, config, torch.float32, torch.device("cpu"))
    found, expected = float_weights(unet), exact.state_dict()
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(found[name], value), name
    assert sum(map(is_fp8, unet.modules())) == len(bases) > 0
    kept = [p for p in unet.modules() if isinstance(p, (nn.Linear, nn.Conv2d)) and not is_fp8(p)]
    assert kept
    assert {part.weight.dtype for part in kept} == {torch.float16}


def test_loaded_module_takes_another_file(tiny: Tiny, tmp_path: Path) -> None:
    """Programs switch checkpoints without building the model anew."""
    found = []
    for seed in (0, 1):
        source = write_tiny_sdxl(tmp_path / f"{seed}.safetensors", seed=seed)
        path = tmp_path / f"fp8-{seed}.safetensors"
        calibration = tiny.calibration
        calibration.fingerprint = None
        config = hswq.QuantizeConfig(
            scaled=True, container="hswq", keep_ratio=0.0, pipeline=str(tiny.pipeline)
        )
        hswq.quantize_checkpoint(source, path, config, calibration)
        found.append(path)
    first, second = (hswq.load_quantized(tiny_unet(tiny), path) for path in found)
    again = hswq.load_quantized(first, found[1]).state_dict()
    for name, value in second.state_dict().items():
        assert torch.equal(raw(again[name]), raw(value)), name


def test_diffusers_layout_loads_with_its_own_names(tiny: Tiny, tmp_path: Path) -> None:
    """A folder's UNet and the single file of the same weights give the same module."""
    folder = write_tiny_sdxl(tmp_path / "folder", layout="diffusers")
    modules = []
    for source, name in ((folder, "a"), (tiny.checkpoint, "b")):
        path = tmp_path / f"{name}.safetensors"
        hswq.quantize_checkpoint(source, path, tiny.config(scaled=True, container="hswq"))
        modules.append(hswq.load_quantized(tiny_unet(tiny), path))
    first, second = (module.state_dict() for module in modules)
    assert first.keys() == second.keys()
    for name, value in first.items():
        assert torch.equal(raw(value), raw(second[name])), name


def test_loaded_unet_takes_half_the_memory(tiny: Tiny, tmp_path: Path) -> None:
    """The promise of FP8: nothing keeps a 16-bit copy of a weight."""
    path = tmp_path / "fp8.safetensors"
    config = tiny.config(scaled=True, container="hswq", keep_ratio=0.0)
    hswq.quantize_checkpoint(tiny.checkpoint, path, config)
    unet = hswq.load_quantized(tiny_unet(tiny), path)
    weights = sum(p.weight.numel() for p in unet.modules() if is_fp8(p))
    held = sum(value.nbytes for value in [*unet.parameters(), *unet.buffers()])
    others = sum(value.numel() for value in unet.parameters())
    layers = sum(map(is_fp8, unet.modules()))
    assert held == weights + 2 * others + 4 * layers


def test_files_of_other_tools_load(tmp_path: Path) -> None:
    """weight_scale on convolutions and one a row are no container of ours, but they are read."""
    path = small_file(tmp_path / "x.safetensors", prefix="model.diffusion_model.")
    model = hswq.load_quantized(small_model(torch.float32).to("meta"), path)
    assert [is_fp8(part) for part in model] == [True, False, True, False, True]
    tensors = load_file(path)
    for name in ("0", "2", "4"):
        codes = tensors[f"model.diffusion_model.{name}.weight"].view(torch.uint8)
        scale = tensors[f"model.diffusion_model.{name}.weight_scale"]
        shape = (-1, *[1] * (codes.dim() - 1)) if scale.dim() else ()
        layer = model[int(name)]
        assert torch.equal(layer.dequantize(), decode(codes) * scale.reshape(shape))
    assert model[4].scale.shape == (5,)
    # What is not FP8 comes in the file's dtype, whatever the module's was.
    assert model[3].weight.dtype == model[0].bias.dtype == torch.float16
    assert not any(parameter.requires_grad for parameter in model.parameters())


def test_norms_and_biases_in_fp8_become_numbers(tmp_path: Path) -> None:
    """Some tools cast everything: a bias of codepoints would be added as it stands."""
    changes = {
        "3.weight": torch.full((6,), 1.5).to(torch.float8_e4m3fn),
        "4.bias": torch.full((5,), -0.25).to(torch.float8_e4m3fn),
    }
    path = small_file(tmp_path / "x.safetensors", changes)
    model = hswq.load_quantized(small_model(torch.bfloat16), path)
    assert torch.equal(model[3].weight, torch.full((6,), 1.5, dtype=torch.bfloat16))
    assert torch.equal(model[4].bias, torch.full((5,), -0.25, dtype=torch.bfloat16))


def test_input_scales_are_used_where_activations_are_fp8(tmp_path: Path) -> None:
    """A static scale that is read but not applied clips at 448 or loses small values."""
    path = small_file(tmp_path / "x.safetensors", {"4.input_scale": torch.tensor(0.125)})
    model = hswq.load_quantized(small_model(), path, compute="fp8").float()
    layer = model[4]
    assert float(layer.input_scale) == 0.125
    assert model[2].input_scale is None
    x = torch.full((64, 6), 1e4)
    with torch.no_grad():
        clipped = nn.functional.linear(torch.full((64, 6), 56.0), layer.dequantize(), layer.bias)
        torch.testing.assert_close(layer(x), clipped)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"2.weight": None, "2.weight_scale": None}, r"1 missing: 2\.weight"),
        ({"3.gamma": torch.ones(6)}, r"1 unexpected: 3\.gamma"),
        ({"3.weight": torch.ones(7)}, r"1 of another shape: 3\.weight \[7\], needed \[6\]"),
    ],
    ids=["missing", "unexpected", "mismatched"],
)
def test_file_of_another_model_is_refused(tmp_path: Path, changes, words) -> None:
    """Loading what fits and leaving the rest random gives images of noise."""
    path = small_file(tmp_path / "x.safetensors", changes)
    model = small_model()
    with pytest.raises(InputError, match=words):
        hswq.load_quantized(model, path)
    for name, value in small_model().state_dict().items():
        assert torch.equal(model.state_dict()[name], value)


@pytest.mark.parametrize(
    "changes",
    [
        {"4.weight": torch.ones(5, 6).to(torch.float8_e5m2)},
        {"2.weight": torch.ones(6, 16, dtype=torch.int8)},
    ],
    ids=["e5m2", "int8"],
)
def test_other_eight_bit_formats_are_refused(tmp_path: Path, changes) -> None:
    """Bytes of another format would be read as E4M3: other numbers, no error."""
    model = small_model()
    with pytest.raises(FormatError, match=r"not FP8 E4M3.*weight"):
        hswq.load_quantized(model, small_file(tmp_path / "x.safetensors", changes))
    assert not any(map(is_fp8, model))


@pytest.mark.parametrize(
    "scale", [torch.tensor(0.0), torch.tensor(float("nan")), torch.ones(3), torch.ones(5, 2)]
)
def test_unusable_scales_are_refused(tmp_path: Path, scale: Tensor) -> None:
    """A scale of 0 gives a layer of zeros, one of another length a crash in the middle."""
    path = small_file(tmp_path / "x.safetensors", {"4.weight_scale": scale})
    model = small_model()
    with pytest.raises(FormatError, match=r"scale '4\.weight_scale'"):
        hswq.load_quantized(model, path)
    assert not any(map(is_fp8, model))


def test_layer_itself_cannot_be_replaced(tmp_path: Path) -> None:
    """The caller would keep the old layer."""
    path = small_file(tmp_path / "x.safetensors")
    with pytest.raises(InputError, match="itself a layer"):
        hswq.load_quantized(nn.Linear(6, 5), path)


@pytest.mark.parametrize("rows", [False, True], ids=["tensor", "rows"])
def test_saved_module_loads_with_every_bit(tmp_path: Path, rows: bool) -> None:
    """save_quantized writes what load_quantized reads."""
    changes = None if rows else {"4.weight_scale": torch.tensor(0.5)}
    changes = {**(changes or {}), "4.input_scale": torch.tensor(0.125)}
    model = hswq.load_quantized(small_model(), small_file(tmp_path / "a.safetensors", changes))
    hswq.save_quantized(model, tmp_path / "b.safetensors")
    again = hswq.load_quantized(small_model().to("meta"), tmp_path / "b.safetensors")
    assert again.state_dict().keys() == model.state_dict().keys()
    for name, value in model.state_dict().items():
        assert torch.equal(raw(again.state_dict()[name]), raw(value)), name


def test_containers_that_cannot_hold_a_module_are_refused(tmp_path: Path) -> None:
    """ComfyUI would ignore the scale of a convolution."""
    model = hswq.load_quantized(small_model(), small_file(tmp_path / "a.safetensors"))
    with pytest.raises(InputError, match="comfy has no scales for conv2d"):
        hswq.save_quantized(model, tmp_path / "b.safetensors", "comfy")
    assert not (tmp_path / "b.safetensors").exists()
    with pytest.raises(InputError, match="no FP8 layer"):
        hswq.save_quantized(small_model(), tmp_path / "b.safetensors")


def test_linear_module_saved_for_comfyui_has_its_markers(tmp_path: Path) -> None:
    """The same modules serve ComfyUI where no convolution is scaled."""
    model = nn.Sequential(nn.Linear(6, 4), nn.SiLU(), nn.Linear(4, 3))
    with hswq.observe(model) as calibration:
        model(torch.randn(5, 6))
    plan = hswq.make_plan(model, calibration, hswq.QuantizeConfig(scaled=True, keep_ratio=0.0))
    hswq.save_quantized(hswq.quantize_module(model, plan), tmp_path / "x.safetensors", "comfy")
    tensors = load_file(tmp_path / "x.safetensors")
    marker = json.loads(bytes(tensors["0.comfy_quant"].tolist()))
    assert marker == {"format": "float8_e4m3fn", "full_precision_matrix_mult": True}
    assert tensors["2.weight_scale"].shape == ()


@pytest.mark.parametrize("scaled", [False, True], ids=["v1", "v2"])
def test_module_quantized_in_memory_equals_the_file(
    tiny: Tiny, tmp_path: Path, scaled: bool
) -> None:
    """quantize_module and quantize_checkpoint are one method: equal weights give equal bytes."""
    config = tiny.config(scaled=scaled, container="hswq")
    path = tmp_path / "fp8.safetensors"
    hswq.quantize_checkpoint(tiny.checkpoint, path, config)
    from_file = hswq.load_quantized(tiny_unet(tiny), path)
    with Checkpoint.open(tiny.checkpoint) as checkpoint:
        model_map = trace_map(checkpoint, detect(checkpoint), tiny.pipeline)
        plain = dict(from_file.config)
        plain.pop("quantization_config")
        unet = load_denoiser(checkpoint, model_map, plain, torch.float16, torch.device("cpu"))
    in_memory = hswq.quantize_module(unet, hswq.make_plan(unet, tiny.calibration, config))
    expected = from_file.state_dict()
    assert in_memory.state_dict().keys() == expected.keys()
    for name, value in in_memory.state_dict().items():
        assert torch.equal(raw(value), raw(expected[name])), name


def test_plan_of_another_module_is_refused() -> None:
    """Half a module would be quantized before the name that is missing."""
    model = small_model(torch.float32)
    with hswq.observe(model) as calibration:
        model(torch.randn(2, 4, 4, 4))
    plan = hswq.make_plan(model, calibration, hswq.QuantizeConfig(keep_ratio=0.0))
    other = nn.Sequential(*list(small_model(torch.float32))[:4])
    with pytest.raises(PlanError, match="'4'"):
        hswq.quantize_module(other, plan)
    assert not any(map(is_fp8, other))
