"""Which layers stay 16-bit."""

from __future__ import annotations

import pytest

from hswq.config import QuantizeConfig
from hswq.errors import OptionError, PlanError
from hswq.plan import Candidate, LayerPlan, Plan, select_layers


def layer(name: str, sensitivity: float | None, kind: str = "linear") -> Candidate:
    shape = (8, 4) if kind == "linear" else (8, 4, 3, 3)
    return Candidate(name, (f"module.{name}",), kind, shape, sensitivity)


LAYERS = [layer(f"l{i}", float(i)) for i in range(10)]


def kept(layers: tuple[LayerPlan, ...]) -> set[str]:
    return {it.name for it in layers if not it.quantized}


@pytest.mark.parametrize(
    ("ratio", "names"),
    [
        (None, {"l9"}),
        (0.0, set()),
        (0.19, {"l9"}),
        (0.2, {"l9", "l8"}),
        (1.0, {it.name for it in LAYERS}),
    ],
)
def test_keep_ratio_keeps_the_floor_of_the_share(ratio: float | None, names: set[str]) -> None:
    """int(N * ratio) layers of largest variance stay; 0.0 is a budget and not 'unset'."""
    assert kept(select_layers(LAYERS, QuantizeConfig(keep_ratio=ratio))) == names


def test_ties_are_broken_by_name() -> None:
    """Equal sensitivities must not depend on the order of the model."""
    layers = [layer("b", 1.0), layer("c", 1.0), layer("a", 1.0)]
    for order in (layers, layers[::-1]):
        assert kept(select_layers(order, QuantizeConfig(keep_ratio=0.34))) == {"a"}


def test_unknown_sensitivity_is_kept_besides_the_budget() -> None:
    """A layer that calibration never saw is not quantized blindly and uses up no budget."""
    layers = [layer("seen_low", 1.0), layer("seen_high", 2.0), layer("unseen", None)]
    plans = select_layers(layers, QuantizeConfig(keep_ratio=0.34))
    assert kept(plans) == {"unseen", "seen_high"}
    assert "no counted call" in plans[2].reason


def test_keep_and_quantize_overrule_the_ranking_and_keep_wins() -> None:
    """A user's pattern stands above the measurement; protecting beats quantizing."""
    config = QuantizeConfig(keep_ratio=0.1, keep=("^l0$", "l9"), quantize=("l[89]",))
    assert kept(select_layers(LAYERS, config)) == {"l0", "l9"}


def test_preset_keeps_besides_the_budget_and_can_be_overruled() -> None:
    """A preset is what peers leave alone: a start, not a rule."""
    config = QuantizeConfig(keep_ratio=0.1, keep_preset="peers", quantize=("^l1$",))
    plans = select_layers(LAYERS, config, (r"^module\.l[12]$", "no such layer"))
    assert kept(plans) == {"l9", "l2"}
    assert plans[2].reason == "--keep-preset peers"


def test_patterns_match_module_names_too() -> None:
    """Users know diffusers' names as well as the checkpoint's."""
    assert "l3" in kept(select_layers(LAYERS, QuantizeConfig(keep=(r"module\.l3",))))


def test_pattern_that_matches_nothing_is_an_error() -> None:
    """A misspelt pattern would otherwise protect nothing and say nothing."""
    with pytest.raises(PlanError, match=r"--keep 'nothing' matches no layer.*'l0'"):
        select_layers(LAYERS, QuantizeConfig(keep=("nothing",)))


def test_convolutions_follow_container_and_option() -> None:
    """comfy scales Linear only, legacy holds no FP8 convolution, --conv 16bit keeps them all."""
    layers = [layer("fc", 1.0), layer("conv", 0.5, "conv2d")]

    def decide(**options: object) -> dict[str, tuple[bool, bool]]:
        config = QuantizeConfig(keep_ratio=0.0, **options)  # type: ignore[arg-type]
        return {it.name: (it.quantized, it.scaled) for it in select_layers(layers, config)}

    assert decide(scaled=True) == {"fc": (True, True), "conv": (True, False)}
    assert decide(scaled=True, container="hswq") == {"fc": (True, True), "conv": (True, True)}
    assert decide(scaled=True, container="legacy") == {"fc": (True, True), "conv": (False, False)}
    assert decide(conv="16bit") == {"fc": (True, False), "conv": (False, False)}
    assert decide(container="plain") == {"fc": (True, False), "conv": (True, False)}


def test_quantize_pattern_for_what_the_container_cannot_hold_is_refused() -> None:
    """Asked to quantize a layer it cannot, the tool must not quietly keep it."""
    layers = [layer("conv", 0.5, "conv2d")]
    with pytest.raises(PlanError, match="container legacy holds no FP8 conv2d"):
        select_layers(layers, QuantizeConfig(scaled=True, container="legacy", quantize=("conv",)))


@pytest.mark.parametrize(
    "options",
    [
        {"keep_ratio": 1.5},
        {"keep_ratio": -0.1},
        {"keep_ratio": float("nan")},
        {"samples": 0},
        {"bins": 1},
        {"container": "zip"},
        {"scaled": True, "container": "plain"},
        {"container": "legacy"},
        {"keep": ("(",)},
        {"keep": "out"},
        {"stats": "a", "save_stats": "b"},
        {"embeddings": "a", "calib_file": "b"},
    ],
)
def test_options_out_of_range_are_refused(options: dict[str, object]) -> None:
    """A wrong option is told before any work, naming the flag."""
    with pytest.raises(OptionError, match="--"):
        QuantizeConfig(**options)  # type: ignore[arg-type]


def test_plan_survives_saving(tmp_path) -> None:
    """What was planned is read back; an unknown version is refused with both numbers."""
    plan = Plan(select_layers(LAYERS, QuantizeConfig()), {"scaled": False}, 100, 60)
    path = tmp_path / "plan.json"
    plan.save(path)
    assert Plan.load(path) == plan
    path.write_text(path.read_text().replace('"plan_version": 1', '"plan_version": 9'))
    with pytest.raises(ValueError, match=r"version 9.*reads version 1"):
        Plan.load(path)
