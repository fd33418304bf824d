"""Measured impact: what is replayed, what is skipped, and what comes out."""

from __future__ import annotations

import copy
import logging

import pytest
import torch
from torch import nn

import hswq
from hswq.calibration import Calibration, Call, Impact, Recorder
from hswq.calibration.calls import map_tensors
from hswq.errors import FormatError, InputError
from hswq.plan import Part, measure_impact
from hswq.plan.impact import quantized, units_of
from hswq.plan.replay import Replay

CPU = torch.device("cpu")


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.first = nn.Linear(width, 2 * width)
        self.second = nn.Linear(2 * width, width)
        self.runs = 0

    def forward(self, x, skip=None):
        self.runs += 1
        y = self.second(torch.nn.functional.gelu(self.first(x)))
        return x + y if skip is None else (x + y + skip, y)


class Denoiser(nn.Module):
    """Blocks in a list, one with a tuple and a skip connection, and a stem and a head."""

    def __init__(self, width: int = 8, in_place: bool = False, noisy: bool = False) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, width, 1)
        self.blocks = nn.ModuleList(Block(width) for _ in range(4))
        self.head = nn.Linear(width, 3)
        self.in_place, self.noisy = in_place, noisy

    def forward(self, sample, scale, return_dict=True):
        x = self.stem(sample).flatten(2).transpose(1, 2) * scale["value"]
        first = self.blocks[0](x)
        x, _ = self.blocks[1](first, skip=x)
        x = self.blocks[2](x)
        if self.in_place:
            first += 1.0
        if self.noisy:
            x = x + torch.randn_like(x)
        return (self.head(self.blocks[3](x) + first),)


def observed(module: nn.Module, calls: int = 3, record: int = 3) -> Calibration:
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad(), hswq.observe(module, record=record) as calibration:
        for _ in range(calls):
            sample = torch.randn(2, 3, 4, 4, generator=generator)
            module(sample, {"value": torch.tensor(1.5)}, return_dict=False)
    return calibration


@pytest.fixture
def module() -> Denoiser:
    torch.manual_seed(0)
    return Denoiser().eval()


def by_hand(module: nn.Module, calibration: Calibration, name: str) -> float:
    """The definition: quantize one layer in a copy, run it whole, compare."""
    changed = copy.deepcopy(module)
    layer = changed.get_submodule(name)
    codes = hswq.kernels.quantize_e4m3(layer.weight.detach(), 448.0, 1.0)
    layer.weight.data = hswq.kernels.dequantize_e4m3(codes, 1.0)
    changes = []
    for call in calibration.records:
        with torch.no_grad():
            exact, other = (call.run(it, CPU)[0].double() for it in (module, changed))
        changes.append(float((other - exact).square().sum() / exact.square().sum()))
    return sum(changes) / len(changes)


def test_impact_is_the_change_of_the_output(module):
    """A ranking by anything else keeps the wrong layers."""
    calibration = observed(module)
    before = copy.deepcopy(module.state_dict())
    impact = calibration.measure_impact(module, hswq.QuantizeConfig())
    assert len(impact.values) == 10
    for name, value in impact.values.items():
        assert value == pytest.approx(by_hand(module, calibration, name), rel=1e-9)
        assert value > 0.0
    assert impact.partial == {}
    after = module.state_dict()
    assert all(torch.equal(before[key], after[key]) for key in before)


def test_only_what_lies_behind_a_layer_runs_again(module):
    """Without this a measurement costs twice as much."""
    calibration = observed(module, record=1)
    layers = dict(module.named_modules())
    replay = Replay(module, calibration.records[0], [n for n, _ in module.named_modules()], CPU)
    for name, runs in (("stem", 4), ("blocks.2.first", 2), ("blocks.3.second", 1), ("head", 0)):
        for block in module.blocks:
            block.runs = 0
        part = Part(name, layers[name].weight.detach() * 1.01)
        with quantized(layers, [part]):
            assert replay.change([name]) > 0.0
        assert sum(block.runs for block in module.blocks) == runs, name
    assert all("forward" not in part.__dict__ for part in module.modules())
    assert not any(part._forward_hooks or part._forward_pre_hooks for part in module.modules())


def test_output_changed_in_place_is_computed_again():
    """A stored output that somebody has added to would be added to again in every run."""
    torch.manual_seed(0)
    module = Denoiser(in_place=True).eval()
    calibration = observed(module)
    impact = calibration.measure_impact(module, hswq.QuantizeConfig())
    for name in ("blocks.0.first", "blocks.2.second", "blocks.3.first", "head"):
        assert impact.values[name] == pytest.approx(by_hand(module, calibration, name), rel=1e-9)


def test_module_that_does_not_repeat_itself_is_told(caplog):
    """Its random numbers would be taken for the effect of quantization."""
    torch.manual_seed(0)
    module = Denoiser(noisy=True).eval()
    calibration = observed(module, record=1)
    with caplog.at_level(logging.WARNING):
        calibration.measure_impact(module, hswq.QuantizeConfig())
    assert "gives other outputs when a call is repeated" in caplog.text


def test_layer_that_is_never_called_changes_nothing(module):
    """An unused layer would be kept for nothing, or fail."""
    module.unused = nn.Linear(4, 4)
    calibration = observed(module)
    impact = calibration.measure_impact(module, hswq.QuantizeConfig())
    assert impact.values["unused"] == 0.0


def test_scaled_impact_is_that_of_scaled_codes(module):
    """V2 rounds other values: its errors are not V1's."""
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.mul_(1e-3)
    calibration = observed(module)
    plain = calibration.measure_impact(module, hswq.QuantizeConfig()).values
    config = hswq.QuantizeConfig(scaled=True, container="hswq")
    scaled = calibration.measure_impact(module, config).values
    assert all(scaled[name] < plain[name] for name in plain)
    # The comfy container scales no convolution.
    comfy = calibration.measure_impact(module, hswq.QuantizeConfig(scaled=True)).values
    assert comfy["stem"] == plain["stem"]
    assert comfy["head"] == scaled["head"]


def test_interrupted_measurement_is_gone_on_with(module, tmp_path):
    """Hours of a GPU would be lost."""
    calibration = observed(module)
    whole = dict(calibration.measure_impact(module, hswq.QuantizeConfig()).values)
    calibration.impact = None

    def interrupt(phase: str, done: int, total: int) -> None:
        if done == 17:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        calibration.measure_impact(module, hswq.QuantizeConfig(), progress=interrupt)
    calibration.save(tmp_path / "s.safetensors")
    loaded = Calibration.load(tmp_path / "s.safetensors")
    assert loaded.impact.values == {}
    seen = []
    loaded.measure_impact(module, hswq.QuantizeConfig(), progress=lambda *step: seen.append(step))
    assert loaded.impact.values == whole
    assert [done for _, done, _ in seen] == list(range(18, 31))
    # Other options begin anew.
    loaded.impact.values.clear()
    loaded.impact.partial["stem"] = (1.0,)
    seen.clear()
    loaded.measure_impact(
        module, hswq.QuantizeConfig(scaled=True), progress=lambda *step: seen.append(step)
    )
    assert len(seen) == 30


def test_impact_needs_recorded_calls(module):
    """The cure must be told, and NaN must not become a ranking."""
    with pytest.raises(InputError, match=r"no recorded calls.*record=4"):
        observed(module, record=0).measure_impact(module, hswq.QuantizeConfig())
    calibration = observed(module)
    module.head.weight.data.fill_(torch.nan)
    with pytest.raises(InputError, match=r"NaN, Inf or only zeros"):
        calibration.measure_impact(module, hswq.QuantizeConfig())


def test_plan_by_impact(module, caplog):
    """Without a measurement every layer would stay; with one for other codes the user must know."""
    calibration = observed(module)
    config = hswq.QuantizeConfig(sensitivity="impact", keep_ratio=0.2)
    with pytest.raises(InputError, match=r"no measured impact.*--sensitivity impact"):
        hswq.make_plan(module, calibration, config)
    measure_impact(module, calibration, config)
    plan = hswq.make_plan(module, calibration, config)
    ranked = sorted(calibration.impact.values.items(), key=lambda item: -item[1])
    assert {layer.name for layer in plan.kept} == {name for name, _ in ranked[:2]}
    assert {layer.name: layer.impact for layer in plan.layers} == calibration.impact.values
    assert not caplog.records
    hswq.make_plan(module, calibration, hswq.QuantizeConfig(sensitivity="impact", scaled=True))
    assert "the ranking is a guess" in caplog.text


def test_impact_of_compensated_codes_is_that_of_the_quantized_module(module):
    """A loop of one's own has no file of codes: the Gram matrices must give the same ones."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad(), hswq.observe(module, record=2, gram=True) as calibration:
        for _ in range(4):
            sample = torch.randn(2, 3, 4, 4, generator=generator) + 0.5
            module(sample, {"value": torch.tensor(1.5)})
    config = hswq.QuantizeConfig(preset="best", keep_bytes=0.0, container="hswq")
    impact = calibration.measure_impact(module, config)
    plan = hswq.make_plan(module, calibration, config)
    layer = next(it for it in plan.layers if it.name == "blocks.1.first")
    alone = hswq.Plan((layer,), plan.options, 0, 0)
    quantized_module = hswq.quantize_module(copy.deepcopy(module), alone, calibration)
    changes = []
    for call in calibration.records:
        with torch.no_grad():
            exact, other = (call.run(it, CPU)[0].double() for it in (module, quantized_module))
        changes.append(float((other - exact).square().sum() / exact.square().sum()))
    assert impact.values[layer.name] == pytest.approx(sum(changes) / 2, rel=1e-3)
    calibration.grams.clear()
    with pytest.raises(InputError, match=r"no Gram matrices.*gram=True"):
        calibration.measure_impact(module, config)


def test_units_without_a_map_are_the_layers(module):
    """A loop of one's own has no checkpoint whose weights are fused."""
    assert len(units_of(module, observed(module))) == 10
    with pytest.raises(InputError, match=r"no nn\.Linear"):
        units_of(nn.Sequential(nn.ReLU()), Calibration())


def test_recorder_keeps_a_sample_of_all_calls():
    """Only the first calls, or every eighth, would all be of one noise level."""
    module = nn.Identity()
    recorder = Recorder(8)
    handle = recorder.attach(module)
    for number in range(1000):
        module(torch.tensor(number))
    handle.remove()
    kept = [int(call.args[0]) for call in recorder.records()]
    assert len(kept) == 8
    assert kept == sorted(set(kept))
    assert min(kept) < 300
    assert max(kept) > 700
    assert len({number % 8 for number in kept}) > 3


def test_recorded_tensors_are_copies():
    """The sampler goes on to change its latents."""
    module, recorder = nn.Identity(), Recorder(1)
    recorder.attach(module)
    tensor = torch.zeros(3)
    module(tensor)
    tensor.fill_(1.0)
    assert torch.equal(recorder.records()[0].args[0], torch.zeros(3))


def test_calls_survive_a_round_trip(module, tmp_path):
    """A list that becomes a tuple, or a tensor of another dtype, is another call."""
    calibration = observed(module)
    call = Call(
        ([torch.ones(2, dtype=torch.bfloat16)], (1, None, torch.tensor(3))),
        {"flag": True, "nested": {"a": [2.5, "x", torch.zeros(0, 3)]}},
    )
    calibration.records = (*calibration.records, call)
    calibration.save(tmp_path / "s.safetensors")
    loaded = Calibration.load(tmp_path / "s.safetensors").records
    assert len(loaded) == 4

    def described(call: Call) -> object:
        nest = (call.args, call.kwargs)
        return map_tensors(nest, lambda it: (str(it.dtype), list(it.shape), it.tolist()))

    assert [described(it) for it in loaded] == [described(it) for it in calibration.records]


def test_call_that_cannot_be_saved_is_told(tmp_path):
    """json's own error names a class and no cure."""
    calibration = Calibration(records=(Call((nn.ReLU(),), {}),))
    with pytest.raises(InputError, match=r"recorded call cannot be saved.*calibration\.records"):
        calibration.save(tmp_path / "s.safetensors")


@pytest.mark.parametrize("text", ["", "[]", "[1, 2]", '[[{"__tensor__": 4}], {}]', "[" * 10**5])
def test_damaged_call_is_told(text):
    """A damaged statistics file must end in our error."""
    with pytest.raises(FormatError, match="recorded call is damaged"):
        Call.from_parts(text, [])


@pytest.mark.parametrize(
    "text",
    ["", "{}", '{"a":' * 10**5, '{"values": {"a": NaN}, "options": {}, "calls": 1, "partial": {}}'],
)
def test_damaged_impact_is_told(text):
    """NaN would rank anywhere."""
    with pytest.raises(FormatError, match="measured impact is damaged"):
        Impact.from_json(text)


def test_merged_statistics_hold_all_calls_and_no_impact(module):
    """An impact of half of the calls must not pass for that of all."""
    first, second = observed(module), observed(module, record=1)
    first.samples, second.samples = (1,), (0,)
    first.measure_impact(module, hswq.QuantizeConfig())
    merged = first.merge(second)
    assert merged.impact is None
    assert merged.records == (*second.records, *first.records)


def test_autocast_does_not_hide_a_changed_weight() -> None:
    """It keeps 16-bit copies of weights with a gradient: every impact was 0, and none was told."""
    layers = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 3))
    config = hswq.CalibrationConfig(preset="seed", sensitivity="impact")
    with hswq.observe(layers, record=1) as calibration, torch.no_grad():
        layers(torch.ones(2, 8))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        measure_impact(layers, calibration, config)
    assert calibration.impact is not None
    assert min(calibration.impact.values.values()) > 0.0


def test_inference_mode_is_no_obstacle(module):
    """Pipelines run in it, and what is recorded there must serve outside it, and the reverse."""
    expected = observed(module).measure_impact(module, hswq.QuantizeConfig()).values
    with torch.inference_mode():
        calibration = observed(module)
        inside = calibration.measure_impact(module, hswq.QuantizeConfig()).values
    for block in module.blocks:
        block.runs = 0
    outside = calibration.measure_impact(module, hswq.QuantizeConfig()).values
    assert expected == inside == outside
    # Nothing has to start from the beginning.
    assert sum(block.runs for block in module.blocks) < 3 * 4 * len(expected)
    with torch.inference_mode():
        born_there = Denoiser()
    with pytest.raises(InputError, match=r"Denoiser.*inference_mode.*outside"):
        calibration.measure_impact(born_there, hswq.QuantizeConfig())
    with torch.inference_mode():
        module.register_buffer("table", torch.ones(3))
    with pytest.raises(InputError, match=r"Denoiser.*inference_mode.*outside"):
        calibration.measure_impact(module, hswq.QuantizeConfig())


def test_impact_of_other_codes_is_measured_anew(module, caplog):
    """Half a measurement of other damping and half of this would rank by a mixture."""
    with torch.no_grad(), hswq.observe(module, record=1, gram=True) as calibration:
        module(torch.randn(2, 3, 4, 4), {"value": torch.tensor(1.5)})
    config = hswq.QuantizeConfig(preset="best")
    first = calibration.measure_impact(module, config)
    for other in ({"damping": 0.5}, {"bias_correction": False}, {"sweeps": 0}):
        changed = hswq.QuantizeConfig(preset="best", **other)
        hswq.make_plan(module, calibration, changed)
        assert "the ranking is a guess" in caplog.text
        caplog.clear()
        second = measure_impact(module, calibration, changed)
        assert second is not first
        assert second.values != first.values
        hswq.make_plan(module, calibration, changed)
        assert not caplog.records
