"""The search against the seed's own answers, through both public doors."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

import hswq
from hswq import kernels
from hswq.compat import HSWQWeightedHistogramOptimizer
from hswq.errors import InputError
from hswq.search import Layer, search_layers
from hswq.search import amax as amax_module
from tests.conftest import Backend

GOLDEN = Path(__file__).parent.parent / "golden"
ANSWERS = json.loads((GOLDEN / "search_golden.json").read_text())
TENSORS = load_file(GOLDEN / "search_golden.safetensors")


def objective(
    weight: Tensor, importance: Tensor | None, bins: int, amax: float, scaled: bool
) -> float:
    hist, max_abs = kernels.weighted_histogram(weight, importance, bins)
    candidates = torch.tensor([amax], dtype=torch.float32)
    return float(kernels.clip_mse(hist, max_abs, candidates, scaled)[0])


@pytest.mark.parametrize("door", ["search_amax", "compat"])
@pytest.mark.parametrize("case", sorted(ANSWERS))
def test_search_agrees_with_the_golden_answers(case: str, door: str) -> None:
    """METHOD section 4's tolerances: another answer would quantize differently from the seed."""
    answer = ANSWERS[case]
    tensor = case.rsplit(".", 2)[0]
    weight, importance = TENSORS[f"{tensor}.weight"], TENSORS.get(f"{tensor}.importance")
    bins, scaled = answer["bins"], answer["scaled"]
    if door == "search_amax":
        result = hswq.search_amax(
            weight,
            importance,
            scaled=scaled,
            bins=bins,
            candidates=answer["candidates"],
            refinements=answer["refinements"],
        )
        amax, mse, max_abs = result.amax, result.mse, result.max_abs
    else:
        stats = HSWQWeightedHistogramOptimizer(
            bins, answer["candidates"], answer["refinements"], "cpu"
        ).compute_optimal_amax_with_stats(weight, importance, scaled)
        amax, mse, max_abs = stats["optimal_amax"], stats["estimated_mse"], stats["max_val"]
        assert stats["compression_ratio"] == pytest.approx(answer["compression_ratio"], rel=1e-2)
    assert max_abs == answer["max_val"]
    if scaled:
        golden = objective(weight, importance, bins, answer["optimal_amax"], True)
        assert abs(amax - answer["optimal_amax"]) <= 1e-6 * max_abs or mse <= golden * (1 + 1e-9)
    else:
        assert mse == pytest.approx(answer["estimated_mse"], rel=1e-6)
        codes = kernels.quantize_e4m3(weight, 448.0, 1.0)
        assert torch.equal(codes, TENSORS[f"{case}.fp8"])


@pytest.mark.parametrize("case", sorted(case for case in ANSWERS if ANSWERS[case]["scaled"]))
def test_bytes_agree_with_the_golden_bytes_at_the_golden_amax(case: str) -> None:
    """The V2 bytes follow from amax alone: division by float32(amax / 448), nearest even."""
    weight = TENSORS[f"{case.rsplit('.', 2)[0]}.weight"]
    amax = ANSWERS[case]["optimal_amax"]
    scale = float(torch.tensor(amax / 448.0, dtype=torch.float32))
    assert torch.equal(kernels.quantize_e4m3(weight, amax, scale), TENSORS[f"{case}.fp8"])


def test_importance_moves_the_threshold() -> None:
    """An ignored importance vector would give both calls the same answer."""
    weight = torch.randn(64, 32, generator=torch.Generator().manual_seed(0))
    weight[:, 0] *= 8
    light, heavy = torch.ones(32), torch.ones(32)
    light[0], heavy[0] = 1e-4, 1e4
    found = [hswq.search_amax(weight, it, scaled=True).amax for it in (light, heavy)]
    assert found[0] < 0.8 * found[1]


def test_all_zero_weight_has_amax_zero_and_scale_one() -> None:
    """A scale of zero would turn the layer into NaN in every loader."""
    result = hswq.search_amax(torch.zeros(4, 4), scaled=True)
    assert (result.amax, result.mse, result.scale, result.relative_mse) == (0.0, 0.0, 1.0, 0.0)


def test_scale_is_never_subnormal() -> None:
    """2^-149 / 448 is no float32: a scale of 0 would divide by zero, a subnormal one is coarse."""
    weight = torch.full((2, 2), 2.0**-149)
    result = hswq.search_amax(weight, scaled=True)
    assert result.scale == 2.0**-126
    assert not kernels.quantize_e4m3(weight, result.amax, result.scale).any()


def test_flushed_subnormals_change_no_ordinary_weight(backend: Backend) -> None:
    """Programs that call torch.set_flush_denormal write the same files, float16's own included."""
    weight = torch.randn(64, 96, generator=torch.Generator().manual_seed(0)) * 2.0**-14
    weight = weight.half().to(backend.device)
    assert (weight.abs() < torch.finfo(torch.float16).smallest_normal).any()

    def everything() -> list[object]:
        importance = weight[0].float().abs()
        found = hswq.search_amax(weight, importance, scaled=True, backend=backend.name)
        codes = kernels.quantize_e4m3(weight, found.amax, found.scale, backend=backend.name)
        values = kernels.dequantize_e4m3(codes, found.scale, backend=backend.name)
        return [found, codes.tolist(), values.tolist()]

    expected = everything()
    try:
        assert torch.set_flush_denormal(True)
        found = everything()
    finally:
        torch.set_flush_denormal(False)
    assert found == expected


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_non_finite_weight_is_refused_by_name(bad: float) -> None:
    """A single NaN would poison amax and with it the whole layer."""
    weight = torch.ones(4, 4, dtype=torch.float16)
    weight[1, 2] = bad
    with pytest.raises(InputError, match=r"layer 'x' \[4, 4\] holds NaN or Inf"):
        hswq.search_amax(weight, scaled=False, name="layer 'x'")


def test_empty_weight_and_wrong_importance_are_refused() -> None:
    """The seed pads or cuts importance silently; here both are errors."""
    with pytest.raises(InputError, match="empty"):
        hswq.search_amax(torch.empty(0, 4), scaled=True)
    for length in (3, 5):
        with pytest.raises(InputError, match=f"{length}"):
            HSWQWeightedHistogramOptimizer().compute_optimal_amax(
                torch.ones(2, 4), torch.ones(length)
            )


def test_layers_together_give_what_each_gives_alone(backend: Backend) -> None:
    """A model is searched in one go: a neighbour's histogram or mode would move its threshold."""
    generator = torch.Generator().manual_seed(0)
    layers = []
    for number, (shape, dtype) in enumerate(
        [((8, 6), torch.float16), ((4, 6, 3, 3), torch.bfloat16), ((5, 7), torch.float32)] * 2
    ):
        weight = (torch.randn(shape, generator=generator) * 0.02).to(backend.device, dtype)
        importance = None if number == 1 else torch.rand(shape[1], generator=generator)
        layers.append(Layer(f"layer {number}", weight, importance, scaled=number % 3 > 0))
    layers.append(Layer("zero", torch.zeros(3, 3, device=backend.device), None, True))
    settings = {"bins": 128, "candidates": 20, "refinements": 1, "backend": backend.name}
    alone = [
        hswq.search_amax(layer.weight, layer.importance, scaled=layer.scaled, **settings)
        for layer in layers
    ]
    assert search_layers(layers, **settings) == alone
    assert len({result.amax for result in alone}) == len(layers)


def test_batches_of_layers_give_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    """A million bins for every layer of a model at once would be gigabytes."""
    generator = torch.Generator().manual_seed(0)
    layers = [
        Layer(str(number), torch.randn(4, 4, generator=generator), None, number % 2 == 0)
        for number in range(5)
    ]
    together = search_layers(layers, bins=64)
    monkeypatch.setattr(amax_module, "_BATCH_BYTES", 64 * 8 * 2)
    sizes = []
    search = kernels.search_amax

    def counted(hists: Tensor, *arguments: Any, **options: Any) -> tuple[Tensor, Tensor]:
        sizes.append(len(hists))
        return search(hists, *arguments, **options)

    monkeypatch.setattr(kernels, "search_amax", counted)
    assert search_layers(layers, bins=64) == together
    assert sizes == [1, 1, 1, 1, 1]


def test_bad_layer_among_others_is_named() -> None:
    """A damaged tensor is one of hundreds."""
    layers = [
        Layer("good", torch.ones(2, 2), None, True),
        Layer("bad", torch.tensor([[1.0, torch.nan]]), None, True),
    ]
    with pytest.raises(InputError, match=r"bad \[1, 2\] holds NaN or Inf"):
        search_layers(layers)
    assert search_layers([]) == []
