"""Which layers stay 16-bit."""

from __future__ import annotations

import dataclasses
import json
import math

import pytest

from hswq.config import PRESETS, QuantizeConfig
from hswq.errors import OptionError, PlanError
from hswq.plan import Candidate, LayerPlan, Plan, error_curve, select_layers


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


def sized(name: str, size: int, sensitivity: float, impact: float | None = None) -> Candidate:
    return Candidate(name, (), "linear", (size, 1), sensitivity, impact, kept_bytes=size)


# Impact per weight ranks b, a, d, c; variance c, a, b, d.
SIZED = [
    sized("a", 30, 3.0, 30.0),
    sized("b", 10, 2.0, 20.0),
    sized("c", 50, 4.0, 5.0),
    sized("d", 10, 1.0, 8.0),
]


@pytest.mark.parametrize(
    ("sensitivity", "share", "names"),
    [
        ("impact", 0.0, set()),
        ("impact", 0.1, {"b"}),
        # a no longer fits, d does: the whole ranking is walked.
        ("impact", 0.2, {"b", "d"}),
        ("impact", 0.4, {"b", "a"}),
        ("impact", 1.0, {"a", "b", "c", "d"}),
        # By variance, not per weight.
        ("variance", 0.5, {"c"}),
        ("variance", 0.6, {"c", "b"}),
        ("variance", 0.3, {"a"}),
    ],
)
def test_byte_budget_takes_what_fits(sensitivity: str, share: float, names: set[str]) -> None:
    """A budget that stops at the first layer too large is left half unused."""
    config = QuantizeConfig(keep_bytes=share, sensitivity=sensitivity)
    assert kept(select_layers(SIZED, config)) == names


def test_byte_budget_is_not_spent_on_layers_that_stay_anyway() -> None:
    """--keep would else push the most sensitive layer out."""
    config = QuantizeConfig(keep_bytes=0.1, sensitivity="impact", keep=("^c$",))
    assert kept(select_layers(SIZED, config)) == {"b", "c"}
    config = QuantizeConfig(keep_bytes=0.1, sensitivity="impact", quantize=("^b$",))
    assert kept(select_layers(SIZED, config)) == {"d"}


def test_share_is_that_of_the_quantizable_weights() -> None:
    """Convolutions that the container cannot hold are no part of the model that is decided on."""
    conv = Candidate("conv", (), "conv2d", (100, 1, 1, 1), 9.0, 9.0)
    config = QuantizeConfig(keep_bytes=0.1, sensitivity="impact", conv="16bit")
    assert kept(select_layers([*SIZED, conv], config)) == {"b", "conv"}


@pytest.mark.parametrize(
    ("left", "names"), [(0, set()), (9, set()), (10, {"b"}), (25, {"b", "d"}), (40, {"b", "a"})]
)
def test_target_size_fills_the_room_that_is_left(left: int, names: set[str]) -> None:
    """What the smallest file leaves free is spent on layers, and no byte more."""
    asked = []

    def room(layers: tuple[LayerPlan, ...]) -> float:
        asked.append(kept(layers))
        return left - sum(it.numel for it in layers if not it.quantized)

    config = QuantizeConfig(target_size="1GB", sensitivity="impact")
    assert kept(select_layers(SIZED, config, room=room)) == names
    assert asked[0] == set()


def test_target_size_lays_out_few_files() -> None:
    """A file of a thousand layers laid out for each of them takes a minute."""
    many = [sized(f"l{i:04}", 10_000 + i, 1.0, 0.99**i) for i in range(1000)]
    asked = []

    def room(layers: tuple[LayerPlan, ...]) -> float:
        # A little more than the weights alone, as in files.
        sizes = [it.numel + 7 for it in layers if not it.quantized]
        asked.append(len(sizes))
        return 3_000_000 - sum(sizes)

    config = QuantizeConfig(target_size="1GB", sensitivity="variance")
    found = kept(select_layers(many, config, room=room))
    # All rank alike: by name.
    expected, left = set(), 3_000_000
    for it in many:
        if it.numel + 7 <= left:
            expected.add(it.name)
            left -= it.numel + 7
    assert found == expected
    assert len(asked) < 40


def test_target_size_ranks_by_byte() -> None:
    """A float32 weight costs three bytes to keep and a 16-bit one costs one."""
    half = Candidate("half", (), "linear", (10, 1), 1.0, 2.0, kept_bytes=10)
    single = Candidate("single", (), "linear", (10, 1), 1.0, 3.0, kept_bytes=30)

    def room(layers: tuple[LayerPlan, ...]) -> float:
        return 30.0 - sum({"half": 10, "single": 30}[name] for name in kept(layers))

    config = QuantizeConfig(target_size="1GB", sensitivity="impact")
    assert kept(select_layers([half, single], config, room=room)) == {"half"}
    # A share of the weights is a share of the weights.
    config = QuantizeConfig(keep_bytes=0.5, sensitivity="impact")
    assert kept(select_layers([half, single], config)) == {"single"}


@pytest.mark.parametrize("share", [0.29, 0.57, 0.58])
def test_share_is_what_its_decimals_say(share: float) -> None:
    """0.29 * 100 is 28.999999999999996 in floats, and the layer of 29 weights would not fit."""
    size = round(100 * share)
    layers = [sized("a", size, 1.0, 1.0), sized("b", 100 - size, 1.0, 1e-9)]
    config = QuantizeConfig(keep_bytes=share, sensitivity="impact")
    assert kept(select_layers(layers, config)) == {"a"}


def test_target_size_that_cannot_be_met_is_told() -> None:
    """The user must learn by how much."""
    config = QuantizeConfig(target_size="1kB", sensitivity="impact")
    with pytest.raises(PlanError, match=r"--target-size 1kB cannot be met.* 1,234 bytes larger"):
        select_layers(SIZED, config, room=lambda layers: -1234)
    with pytest.raises(PlanError, match="needs a file"):
        select_layers(SIZED, config)


def test_infinite_impact_is_json(tmp_path) -> None:
    """`Infinity` is no JSON, and files' metadata are read by other programs."""
    layers = [sized("a", 10, 1.0, math.inf), sized("b", 10, 1.0, 1e-3)]
    config = QuantizeConfig(keep_bytes=0.0, sensitivity="impact")
    decided = select_layers(layers, config)
    plan = Plan(decided, {}, 100, 60, error_curve(layers, decided, 60, config))
    assert "Infinity" not in json.dumps(plan.to_dict())
    plan.save(tmp_path / "plan.json")
    assert Plan.load(tmp_path / "plan.json") == plan
    assert plan.predicted_error == math.inf


@pytest.mark.parametrize(
    ("limit", "names"),
    [(63.0, set()), (62.9, {"b"}), (43.0, {"b"}), (13.0, {"a", "b"}), (0.0, {"a", "b", "c", "d"})],
)
def test_max_error_keeps_as_little_as_it_can(limit: float, names: set[str]) -> None:
    """The impacts of the quantized layers add up to the limit at most."""
    config = QuantizeConfig(max_error=limit, sensitivity="impact")
    assert kept(select_layers(SIZED, config)) == names


def test_max_error_that_quantize_exceeds_is_told() -> None:
    """Keeping everything else would not help."""
    config = QuantizeConfig(max_error=4.0, sensitivity="impact", quantize=("^c$",))
    with pytest.raises(PlanError, match=r"--max-error 4 cannot be met.*impact of 5"):
        select_layers(SIZED, config)


def test_keep_ratio_ranks_by_impact_where_it_is_asked_to() -> None:
    """By layer and not by weight, as the seed counts."""
    config = QuantizeConfig(keep_ratio=0.5, sensitivity="impact")
    assert kept(select_layers(SIZED, config)) == {"a", "b"}


@pytest.mark.parametrize(
    "options",
    [
        {"keep_ratio": 0.1, "keep_bytes": 0.1},
        {"keep_bytes": 0.0, "target_size": "1GB"},
        {"target_size": "1GB", "max_error": 0.1, "sensitivity": "impact"},
    ],
)
def test_budgets_exclude_each_other(options: dict[str, object]) -> None:
    """One of two would be ignored; 0.0 is a budget too."""
    with pytest.raises(OptionError, match="exclude each other: give one budget"):
        QuantizeConfig(**options)


def test_max_error_needs_impact() -> None:
    """Variances do not add up to an error."""
    with pytest.raises(OptionError, match="add --sensitivity impact"):
        QuantizeConfig(max_error=0.1, sensitivity="variance")
    with pytest.raises(OptionError, match="add --sensitivity impact"):
        QuantizeConfig(max_error=0.1).settled({"sensitivity": "variance"})


@pytest.mark.parametrize(
    ("text", "size"),
    [("4.5GB", 4_500_000_000), ("4 GiB", 4 << 30), ("12mb", 12_000_000), ("1024", 1024)],
)
def test_sizes(text: str, size: int) -> None:
    """GB and GiB differ by 7 %."""
    assert QuantizeConfig(target_size=text).budget == ("target_size", float(size))


@pytest.mark.parametrize("text", ["", "GB", "4.5", "-1GB", "0", "4TB", "1.2.3GB", "nan"])
def test_sizes_that_are_none(text: str) -> None:
    """4.5 bytes is never what was meant."""
    with pytest.raises(OptionError, match=r"--target-size is .* 4\.5GB or 4GiB"):
        QuantizeConfig(target_size=text)


def test_presets_give_way_to_options() -> None:
    """A preset that cannot be changed in one point is of no use; one that is half set is a trap."""
    seed, best = QuantizeConfig(preset="seed"), QuantizeConfig(preset="best")
    assert (seed.sensitivity, seed.rounding) == ("variance", "nearest")
    assert seed.bias_correction is False
    assert seed.budget == ("keep_ratio", 0.10)
    assert (best.sensitivity, best.rounding, best.bias_correction) == (
        "impact",
        "compensated",
        True,
    )
    assert best.budget == ("keep_bytes", 0.05)
    assert QuantizeConfig(preset="best", rounding="nearest").bias_correction is False
    assert QuantizeConfig(preset="best", keep_ratio=0.0).budget == ("keep_ratio", 0.0)
    assert QuantizeConfig(preset="best", bias_correction=False).rounding == "compensated"
    assert dataclasses.replace(best, target_size="1GB").budget == ("target_size", 1e9)
    assert seed.settled(PRESETS["best"]) == seed
    with pytest.raises(OptionError, match="--preset is 'worst'; it must be one of seed, best"):
        QuantizeConfig(preset="worst")


def test_without_a_preset_what_was_measured_decides() -> None:
    """Repeating calibration's options for every file invites mistakes; so does guessing them."""
    config = QuantizeConfig()
    levers = ("sensitivity", "rounding", "bias_correction", "damping", "sweeps")
    for measured, budget in (("seed", ("keep_ratio", 0.10)), ("best", ("keep_bytes", 0.05))):
        settled = config.settled(PRESETS[measured])
        assert {name: getattr(settled, name) for name in levers} == {
            name: PRESETS[measured][name] for name in levers
        }
        assert settled.budget == budget
        assert settled == settled.settled(PRESETS["seed"])
    assert config.settled() == config.settled(PRESETS["best"])
    ours = QuantizeConfig(rounding="nearest", damping=0.5).settled()
    assert (ours.rounding, ours.bias_correction, ours.damping) == ("nearest", False, 0.5)
    assert ours.sensitivity == "impact"
