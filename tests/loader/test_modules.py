"""hswq.Linear and hswq.Conv2d: what they compute, and that nothing turns their codes to numbers."""

from __future__ import annotations

import copy
import io
import pickle
import warnings

import pytest
import torch
from torch import Tensor, nn

from hswq import kernels
from hswq.errors import InputError
from hswq.loader import Conv2d, Linear
from hswq.loader.modules import FP8_LEAST_ROWS, fp8_layer

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
CONVS = [
    {},
    {"stride": 2, "padding": 1},
    {"padding": "same", "dilation": 2},
    {"padding": 1, "padding_mode": "reflect"},
    {"padding": "same", "padding_mode": "circular"},
    {"groups": 2, "padding": (0, 1), "bias": False},
]


def quantized(layer: nn.Module, *, rows: bool = False, **options: object) -> Linear | Conv2d:
    """The FP8 layer of a random one, scaled by its largest weight or by those of its rows."""
    weight = layer.weight.detach()
    amax = weight.abs().flatten(1).amax(1).float() if rows else weight.abs().amax().float()
    codes = kernels.quantize_e4m3(weight, amax, amax / 448)
    return fp8_layer(layer, codes, amax / 448, layer.bias, **options)


def linear(*, inputs: int = 48, outputs: int = 40, dtype=torch.float32, **options) -> Linear:
    torch.manual_seed(0)
    return quantized(nn.Linear(inputs, outputs, dtype=dtype), **options)


def raw(value: Tensor) -> Tensor:
    return value.detach().reshape(-1).view(torch.uint8)


@pytest.mark.parametrize("rows", [False, True], ids=["tensor", "rows"])
@pytest.mark.parametrize("dtype", DTYPES)
@torch.no_grad()
def test_linear_computes_with_its_dequantized_weight(dtype, rows) -> None:
    """The weight-only path differs from a plain layer by the order of its sum alone."""
    layer = linear(dtype=dtype, rows=rows)
    x = torch.randn(3, 7, 48, dtype=dtype)
    exact = nn.functional.linear(x.double(), layer.dequantize().double(), layer.bias.double())
    assert layer(x).dtype == dtype
    tolerance = {torch.float32: 1e-6, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}[dtype]
    assert float((layer(x) - exact).norm() / exact.norm()) <= tolerance


@pytest.mark.parametrize("options", CONVS, ids=str)
@torch.no_grad()
def test_convolution_is_that_of_its_float_layer(options) -> None:
    """Strides, paddings of every kind and groups: a wrong one shifts the whole image."""
    torch.manual_seed(1)
    layer = quantized(nn.Conv2d(4, 6, 3, **options), rows=True)
    plain = layer.to_float()
    assert type(plain) is nn.Conv2d
    for x in (torch.randn(2, 4, 9, 8), torch.randn(4, 9, 8)):
        torch.testing.assert_close(layer(x), plain(x))


@pytest.mark.parametrize(
    "convert",
    [
        lambda module: module.half(),
        lambda module: module.bfloat16(),
        lambda module: module.double(),
        lambda module: module.to(torch.float16),
        lambda module: module.to("cpu", torch.bfloat16),
        lambda module: module.type(torch.float16),
    ],
    ids=["half", "bfloat16", "double", "to", "to-device", "type"],
)
def test_conversions_leave_codes_and_scales_alone(convert) -> None:
    """`.half()` on FP8 would turn codepoints into numbers: eight bits would become sixteen."""
    layer = linear(input_scale=torch.tensor(0.3))
    before = {name: value.clone() for name, value in layer.state_dict().items()}
    model = nn.Sequential(layer, nn.LayerNorm(40))
    convert(model)
    for name in ("weight", "scale", "input_scale"):
        assert layer.state_dict()[name].dtype == before[name].dtype
        assert torch.equal(raw(layer.state_dict()[name]), raw(before[name]))
    assert layer.bias.dtype == model[1].weight.dtype == layer.compute_dtype != torch.float32


def test_memory_format_leaves_codes_in_their_order() -> None:
    """Codes of channels-last strides would be copied at every call."""
    layer = quantized(nn.Conv2d(4, 6, 3))
    before = raw(layer.weight).clone()
    layer.to(memory_format=torch.channels_last)
    assert layer.weight.is_contiguous()
    assert torch.equal(raw(layer.weight), before)


def test_codes_are_no_parameter() -> None:
    """diffusers reads a model's dtype from its parameters; an FP8 one would be passed on."""
    layer = linear()
    assert [name for name, _ in layer.named_parameters()] == ["bias"]
    assert {name for name, _ in layer.named_buffers()} == {"weight", "scale"}
    assert layer.weight.dtype == torch.float8_e4m3fn
    assert sum(value.nbytes for value in layer.state_dict().values()) == 48 * 40 + 4 + 40 * 4


def test_layer_without_weights_takes_them_on_a_device() -> None:
    """Building on meta and filling later is how large models are made."""
    layer = Linear(8, 4, device="meta").to_empty(device="cpu")
    assert layer.weight.dtype == torch.float8_e4m3fn
    assert layer.weight.device.type == layer.scale.device.type == "cpu"
    source = linear(inputs=8, outputs=4)
    layer.load_state_dict(source.state_dict())
    assert torch.equal(raw(layer.weight), raw(source.weight))


@pytest.mark.parametrize("rows", [False, True], ids=["tensor", "rows"])
@pytest.mark.parametrize("static", [False, True], ids=["dynamic", "static"])
@torch.no_grad()
def test_copies_and_state_dicts_keep_every_bit(rows, static) -> None:
    """deepcopy, pickle and state dicts: pipelines copy and offload modules by all three."""
    layer = linear(rows=rows, input_scale=torch.tensor(0.25) if static else None)
    buffer = io.BytesIO()
    torch.save(layer.state_dict(), buffer)
    buffer.seek(0)
    loaded = Linear(48, 40)
    loaded.load_state_dict(torch.load(buffer, weights_only=True))
    x = torch.randn(5, 48)
    for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer)), loaded):
        assert other.state_dict().keys() == layer.state_dict().keys()
        for name, value in layer.state_dict().items():
            assert torch.equal(raw(other.state_dict()[name]), raw(value))
        assert torch.equal(other(x), layer(x))


def test_16_bit_state_dict_is_refused() -> None:
    """Copied into codes, 16-bit weights would be rounded without a scale and nobody would know."""
    with pytest.raises(RuntimeError, match=r"weight is torch\.float32.*load_quantized"):
        Linear(8, 4).load_state_dict(nn.Linear(8, 4).state_dict(), strict=False)


@pytest.mark.parametrize("compute", ["auto", "fp32", "bf16", "fp16", "fp8"])
def test_operators_pass_torchs_own_checks(compute) -> None:
    """A wrong schema or fake gives wrong results under torch.compile only."""
    layer, conv = linear(compute=compute), quantized(nn.Conv2d(4, 6, 3))
    x, image = torch.randn(3, 48), torch.randn(2, 4, 8, 8)
    codes = layer.weight.view(torch.uint8)
    torch.library.opcheck(
        torch.ops.hswq.scaled_linear.default, (x, codes, layer.scale, layer.bias, None, compute)
    )
    args = (image, conv.weight.view(torch.uint8), conv.scale, conv.bias, None, compute)
    geometry = ([2, 1], [1, 0], [1, 2], 1)
    torch.library.opcheck(torch.ops.hswq.scaled_conv2d.default, (*args, *geometry))


@torch.no_grad()
def test_compiled_model_is_one_graph() -> None:
    """A graph break at every layer would cost more than compilation brings."""
    model = nn.Sequential(linear(), nn.SiLU(), linear(inputs=40, outputs=8)).eval()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    x = torch.randn(3, 48)
    assert torch.equal(compiled(x), model(x))


def test_gradient_is_refused_when_it_is_asked_for() -> None:
    """Silently training around FP8 layers would look like training."""
    x = torch.randn(3, 48, requires_grad=True)
    y = linear()(x)
    with pytest.raises(InputError, match=r"no gradient.*torch\.no_grad"):
        y.sum().backward()


@torch.no_grad()
def test_few_rows_stay_weight_only() -> None:
    """Time embeddings and modulation gain nothing from FP8 activations."""
    layer = linear(compute="fp8", input_scale=torch.tensor(1e-4))
    exact = copy.deepcopy(layer)
    exact.compute = "auto"
    few, many = torch.randn(FP8_LEAST_ROWS - 1, 48), torch.randn(FP8_LEAST_ROWS, 48)
    assert torch.equal(layer(few), exact(few))
    # The static scale clips at 0.0448: what is computed with it cannot be taken for the other.
    assert float((layer(many) - exact(many)).norm() / exact(many).norm()) > 0.5


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@torch.no_grad()
def test_lora_adapters_work_on_top(dtype) -> None:
    """peft finds the layers, keeps them FP8, and makes adapters that are not."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from peft import LoraConfig, inject_adapter_in_model

    model = nn.Sequential(linear(dtype=dtype), nn.SiLU(), linear(inputs=40, outputs=8, dtype=dtype))
    before = copy.deepcopy(model)
    config = LoraConfig(r=4, lora_alpha=8, target_modules=["0", "2"], init_lora_weights=False)
    inject_adapter_in_model(config, model)
    adapted = model[0]
    assert isinstance(adapted.base_layer, Linear)
    assert adapted.base_layer.weight.dtype == torch.float8_e4m3fn
    down, up = adapted.lora_A["default"].weight, adapted.lora_B["default"].weight
    assert down.dtype == up.dtype == dtype
    x = torch.randn(FP8_LEAST_ROWS, 48, dtype=dtype)
    expected = before[0](x) + 2.0 * (x @ down.mT @ up.mT)
    torch.testing.assert_close(model[0](x), expected)
    assert not torch.equal(model(x), before(x))


@pytest.mark.parametrize("compute", ["fp16 ", "int8"])
def test_unknown_compute_is_refused(compute) -> None:
    """A typing error must not fall back to something else."""
    with pytest.raises(InputError, match="auto, fp32, bf16, fp16, fp8"):
        Linear(8, 4, compute=compute)
