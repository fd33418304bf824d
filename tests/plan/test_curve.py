"""Predicted error against size."""

from __future__ import annotations

import math

import pytest

from hswq.config import QuantizeConfig
from hswq.errors import InputError
from hswq.fast.render import render_plan
from hswq.plan import Candidate, Plan, error_curve, select_layers, thinned
from hswq.quality.plots import plot_curve


def sized(name: str, size: int, impact: float) -> Candidate:
    return Candidate(name, (), "linear", (size, 1), 1.0, impact, kept_bytes=size)


CANDIDATES = [
    sized("a", 30, 3e-3),
    sized("b", 10, 2e-3),
    sized("c", 50, 5e-4),
    sized("d", 10, 1e-5),
]


def curve(**options):
    config = QuantizeConfig(**{"sensitivity": "impact", "keep_bytes": 0.1, **options})
    layers = select_layers(CANDIDATES, config)
    size = 1000 + sum(it.numel for it in layers if not it.quantized)
    return error_curve(CANDIDATES, layers, size, config)


def test_curve_goes_through_every_budget():
    """A user chooses a size by it: each point must be a plan that can be made."""
    points = curve()
    assert [(it.kept, it.file_bytes) for it in points] == [
        (0, 1000),
        (1, 1010),
        (2, 1040),
        (3, 1090),
        (4, 1100),
    ]
    assert [it.error for it in points] == pytest.approx([5.51e-3, 3.51e-3, 5.1e-4, 1e-5, 0.0])
    assert [it.kept_bytes for it in points] == pytest.approx([0.0, 0.1, 0.4, 0.9, 1.0])
    for point in points:
        config = QuantizeConfig(sensitivity="impact", keep_bytes=min(1.0, point.kept_bytes + 1e-9))
        plan = Plan(select_layers(CANDIDATES, config), {}, 0, 0)
        assert plan.predicted_error == pytest.approx(point.error, abs=1e-12)


def test_what_options_decide_is_no_budget():
    """Kept by name it costs nothing more; quantized by name its error stays."""
    points = curve(keep=("^a$",), quantize=("^b$",))
    assert [(it.kept, it.file_bytes) for it in points] == [(0, 1030), (1, 1080), (2, 1090)]
    assert [it.error for it in points] == pytest.approx([2.51e-3, 2.01e-3, 2e-3])


# Of 8192 * 8192 weights and a few more, so that shares have many decimals.
UNEVEN = [
    sized("large", 8192 * 8192, 1e-3),
    sized("tiny", 3, 1e-5),
    sized("odd", 77_773, 4e-3),
    sized("kept", 1_234_567, 2e-4),
    sized("fp8", 7_654_321, 3e-4),
    sized("middle", 999_983, 1e-6),
    Candidate("conv", (), "conv2d", (1000, 1, 1, 1), 1.0, 1e-4, kept_bytes=1000),
]


@pytest.mark.parametrize("candidates", [UNEVEN, UNEVEN[:1] + UNEVEN[2:]], ids=["tiny", "coarse"])
def test_printed_share_gives_its_plan(candidates):
    """A user who copies a line of the table must get the plan that the line describes."""
    given = {"sensitivity": "impact", "keep": ("^kept$",), "quantize": ("^fp8$",), "conv": "16bit"}
    config = QuantizeConfig(**given, keep_bytes=0.1)
    layers = select_layers(candidates, config)
    options = {"sensitivity": "impact"}
    whole = Plan(layers, options, 1, 1, error_curve(candidates, layers, 10**8, config))
    text = render_plan(whole)
    lines = [line.split() for line in text[text.index("--keep-bytes") :].splitlines()[1:]]
    assert len(lines) == len(whole.curve) == len(candidates) - 2
    always = 2
    for (share, kept, *_), point in zip(lines, whole.curve, strict=True):
        again = select_layers(candidates, QuantizeConfig(**given, keep_bytes=float(share)))
        plan = Plan(again, {}, 0, 0)
        assert len(plan.kept) == int(kept) + always
        assert plan.predicted_error == pytest.approx(point.error, rel=1e-9, abs=1e-15)
    if candidates is not UNEVEN:
        assert max(len(share) for share, *_ in lines) <= len("0.0000")


def test_thinned_curve_begins_behind_infinite_errors():
    """Layers whose quantization gives NaN would leave no point between the ends."""
    many = [sized(f"l{i:03}", 10, 0.9**i) for i in range(300)]
    many[0] = sized("l000", 10, math.inf)
    config = QuantizeConfig(sensitivity="impact", keep_bytes=0.0)
    few = thinned(error_curve(many, select_layers(many, config), 0, config))
    assert 8 <= len(few) <= 18
    assert few[0].error == math.inf


def test_thinned_curve_keeps_its_ends():
    """Seven hundred lines would fill the terminal."""
    many = [sized(f"l{i:03}", 10, 0.9**i) for i in range(300)]
    config = QuantizeConfig(sensitivity="impact", keep_bytes=0.0)
    points = error_curve(many, select_layers(many, config), 0, config)
    few = thinned(points)
    assert len(points) == 301
    assert 8 <= len(few) <= 18
    assert (few[0], few[-1]) == (points[0], points[-1])
    assert thinned(points[:4]) == list(points[:4])


def test_plan_with_a_curve_survives_a_round_trip(tmp_path):
    """A plan that cannot be read back is lost."""
    layers = select_layers(CANDIDATES, QuantizeConfig(sensitivity="impact", keep_bytes=0.1))
    plan = Plan(layers, {}, 2000, 1010, curve())
    plan.save(tmp_path / "plan.json")
    assert Plan.load(tmp_path / "plan.json") == plan


@pytest.mark.parametrize("suffix", [".svg", ".png"])
def test_plot_is_written_the_same_twice(tmp_path, suffix):
    """A plot in a repository must not change by being drawn."""
    files = [tmp_path / f"{name}{suffix}" for name in "ab"]
    for file in files:
        plot_curve(curve(), (1010, 3.51e-3), file)
    assert files[0].stat().st_size > 1000
    assert files[0].read_bytes() == files[1].read_bytes()


@pytest.mark.parametrize("name", ["plot.jpg", "missing/plot.png"])
def test_plot_that_cannot_be_written_is_told(tmp_path, name):
    """After the search is too late."""
    with pytest.raises(InputError, match=r"\.png or \.svg"):
        plot_curve(curve(), None, tmp_path / name)
