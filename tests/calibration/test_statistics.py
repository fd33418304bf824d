"""Statistics: reading them, merging them, their file."""

from __future__ import annotations

import json
from fractions import Fraction

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from hswq.calibration import Calibration, LayerStatistics, is_statistics, observe
from hswq.errors import FormatError, InputError
from hswq.formats.reader import Checkpoint

SETTINGS = {"steps": 3, "guidance": 5.0}


def layer(calls=2, skipped=0, mean_y=0, mean_y2=1 << 60, abs_mean=(1 << 32, 3 << 32), **layout):
    layout = {"kind": "linear", "shape": (5, len(abs_mean)), "groups": 1} | layout
    return LayerStatistics(
        **layout,
        calls=calls,
        skipped=skipped,
        mean_y=mean_y,
        mean_y2=mean_y2,
        abs_mean=torch.tensor(abs_mean, dtype=torch.int64),
    )


def calibration(*samples, settings=SETTINGS, **modules):
    return Calibration(
        modules or {"a": layer(), "b": layer(calls=0)}, None, "f" * 64, dict(settings), samples
    )


def file_bytes(statistics, folder):
    path = folder / "statistics.safetensors"
    statistics.save(path)
    return path.read_bytes()


def test_importance_is_the_mean_per_call_rounded_once():
    """Rounding the sum or the step to float32 first would move importance by an ulp."""
    sums = ((1 << 52) + 12345, 3, 0)
    statistics = calibration(a=layer(calls=7, abs_mean=sums))
    expected = torch.tensor([value * 2.0**-32 / 7 for value in sums], dtype=torch.float32)
    importance = statistics.importance("a")
    assert importance.dtype == torch.float32
    assert torch.equal(importance, expected)


def test_importance_of_a_grouped_convolution_is_one_row_a_group():
    """Channels of group 1 must weigh the weights of group 1, not those of group 0."""
    sums = tuple(value << 32 for value in range(6))
    statistics = calibration(
        a=layer(calls=1, abs_mean=sums, kind="conv2d", shape=(4, 3, 1, 1), groups=2)
    )
    assert statistics.importance("a").tolist() == [[0.0, 1.0, 2.0], [3.0, 4.0, 5.0]]


def test_sensitivity_does_not_cancel():
    """Outputs of mean 2**20 and variance 2**-20: float64 sums would lose the variance entirely."""
    calls = 3
    mean, variance = Fraction(1 << 20), Fraction(1, 1 << 20)
    statistics = calibration(
        a=layer(
            calls=calls,
            mean_y=int(calls * mean * 2**56),
            mean_y2=int(calls * (mean**2 + variance) * 2**56),
        )
    )
    assert statistics.sensitivity("a") == 2.0**-20


def test_sensitivity_of_a_constant_output_is_not_negative():
    """E[mean y^2] rounded down below the square must read as 0, not rank below all others."""
    third = round(Fraction(2**56, 3))
    assert calibration(a=layer(1, 0, third, third // 3)).sensitivity("a") == 0.0


@given(
    st.lists(st.floats(-100, 100, width=32), min_size=1, max_size=8),
)
def test_sensitivity_equals_the_fraction_of_the_sums(outputs):
    """One output value a call: S is the variance of the values, within the step of the sums."""
    ones = [Fraction(value) for value in outputs]
    statistics = calibration(
        a=layer(
            len(outputs),
            mean_y=sum(round(value * 2**56) for value in ones),
            mean_y2=sum(round(value**2 * 2**56) for value in ones),
        )
    )
    count = len(ones)
    exact = sum(value**2 for value in ones) / count - (sum(ones) / count) ** 2
    # Each mean is off by half a step, and mean(y) enters with factor 2 |E y| <= 200 and squared;
    # the result is rounded once.
    half_step = Fraction(1, 2**57)
    bound = (half_step * 201 + half_step**2) * (1 + Fraction(1, 2**53)) + exact / 2**53
    assert abs(Fraction(statistics.sensitivity("a")) - exact) <= bound


def test_layer_without_a_counted_call_knows_nothing():
    """Zero sums of such a layer must not read as importance 0 and sensitivity 0."""
    statistics = calibration(a=layer(0, 4, 0, 0, (0, 0)))
    assert statistics.importance("a") is None
    assert statistics.sensitivity("a") is None
    assert (statistics.calls("a"), statistics.skipped("a")) == (0, 4)


def test_unknown_layer_is_an_error_of_ours():
    """A bare KeyError would not say that the statistics belong to another model."""
    with pytest.raises(InputError, match="'c'"):
        calibration().importance("c")


parts = st.lists(
    st.builds(
        layer,
        calls=st.integers(0, 2000),
        skipped=st.integers(0, 9),
        mean_y=st.integers(-(2**100), 2**100),
        mean_y2=st.integers(0, 2**100),
        abs_mean=st.tuples(*[st.integers(0, 2**58)] * 3),
    ),
    min_size=1,
    max_size=6,
)


@given(parts, st.randoms(use_true_random=False))
def test_merge_gives_the_same_bits_for_any_split_and_order(tmp_path_factory, layers, random):
    """A resumed or divided run must write the very file that one run writes."""
    folder = tmp_path_factory.mktemp("merge")
    runs = [calibration(index, a=part) for index, part in enumerate(layers)]
    straight = runs[0]
    for run in runs[1:]:
        straight = straight.merge(run)
    while len(runs) > 1:
        first = runs.pop(random.randrange(len(runs)))
        second = runs.pop(random.randrange(len(runs)))
        runs.append(first.merge(second))
    assert file_bytes(runs[0], folder) == file_bytes(straight, folder)
    merged = runs[0].modules["a"]
    assert merged.mean_y == sum(part.mean_y for part in layers)
    assert merged.abs_mean.tolist() == [
        sum(column) for column in zip(*(part.abs_mean.tolist() for part in layers), strict=True)
    ]


@pytest.mark.parametrize(
    ("other", "words"),
    [
        (calibration(1, a=layer()), "layers"),
        (calibration(1, a=layer(), b=layer(kind="conv2d", shape=(5, 2, 1, 1))), "layers"),
        (calibration(1, settings=SETTINGS | {"steps": 4}), r"settings \(steps\)"),
        (calibration(3, 0), r"samples \[0\]"),
    ],
)
def test_merge_refuses_what_does_not_belong_together(other, words):
    """Adding sums of another model, other settings or the same sample gives wrong averages."""
    with pytest.raises(InputError, match=words):
        calibration(0).merge(other)


def test_merge_refuses_another_checkpoint():
    """Equal layer shapes do not make equal checkpoints."""
    other = calibration(1)
    other.fingerprint = "0" * 64
    with pytest.raises(InputError, match="fingerprints"):
        calibration(0).merge(other)


@pytest.mark.parametrize("overflow", [{"abs_mean": (0, 1 << 62)}, {"mean_y2": 1 << 110}])
def test_merge_finds_overflow(overflow):
    """A wrapped sum would turn the largest activations into the least important ones."""
    with pytest.raises(InputError, match="range"):
        calibration(0, a=layer(**overflow)).merge(calibration(1, a=layer(**overflow)))


def test_file_keeps_everything(tmp_path):
    """What is saved must be what is read, to the bit, in the order of the model."""
    modules = {
        "z.conv": layer(
            3,
            1,
            -(2**80) - 7,
            2**90 + 1,
            (5, 2**62, 0, 1),
            kind="conv2d",
            shape=(4, 2, 3, 3),
            groups=2,
        ),
        "a": layer(),
    }
    saved = calibration(0, 4, **modules)
    data = file_bytes(saved, tmp_path)
    loaded = Calibration.load(tmp_path / "statistics.safetensors")
    assert list(loaded.modules) == ["z.conv", "a"]
    for name, expected in modules.items():
        actual = loaded.modules[name]
        assert actual.layout == expected.layout
        assert torch.equal(actual.abs_mean, expected.abs_mean)
        for key in ("calls", "skipped", "mean_y", "mean_y2"):
            assert getattr(actual, key) == getattr(expected, key), key
    assert (loaded.settings, loaded.samples, loaded.fingerprint) == (SETTINGS, (0, 4), "f" * 64)
    assert loaded.model_map is None
    assert file_bytes(loaded, tmp_path) == data


def test_file_says_neither_when_nor_where(tmp_path):
    """Equal statistics saved at two places must be equal files."""
    (tmp_path / "elsewhere").mkdir()
    assert file_bytes(calibration(0), tmp_path) == file_bytes(
        calibration(0), tmp_path / "elsewhere"
    )


@pytest.fixture
def damage(tmp_path):
    """Save statistics, change tensors or metadata of the file, return its path."""

    def change(tensors=None, metadata=None):
        path = tmp_path / "statistics.safetensors"
        calibration(0).save(path)
        with safe_open(path, "pt") as handle:
            header = handle.metadata()
        content = load_file(path) | (tensors or {})
        header |= metadata or {}
        save_file(
            {key: value for key, value in content.items() if value is not None},
            path,
            {key: value for key, value in header.items() if value is not None},
        )
        return path

    return change


def test_checkpoint_given_as_statistics_is_refused(tmp_path):
    """The user mixed up two files: say so, not 'KeyError: calls'."""
    path = tmp_path / "model.safetensors"
    save_file({"x.weight": torch.zeros(2, 2)}, path)
    with Checkpoint.open(path) as checkpoint:
        assert not is_statistics(checkpoint)
    with pytest.raises(FormatError, match="not a statistics file"):
        Calibration.load(path)


def test_unknown_version_is_refused_with_both_numbers(damage):
    """A later file may mean something else by the same names."""
    path = damage(metadata={"hswq.statistics_version": "2"})
    with Checkpoint.open(path) as checkpoint:
        assert is_statistics(checkpoint)
    with pytest.raises(FormatError, match=r"version '2'.* version '1'"):
        Calibration.load(path)


def ints(*values):
    return torch.tensor(values, dtype=torch.int64)


@pytest.mark.parametrize(
    "tensors",
    [
        {"calls": ints(2, -1)},
        {"calls": ints(2)},
        {"calls": torch.tensor([2.0, 0.0])},
        {"skipped": None},
        {"mean_y2": ints(-1, 0, 0, 0).reshape(2, 2)},
        {"mean_y": ints(0, 0, 0, 0, 0, 0).reshape(2, 3)},
        {"abs_mean.a": ints(1, -1)},
        {"abs_mean.a": ints(1, 2, 3)},
        {"abs_mean.b": None},
    ],
)
def test_damaged_tensors_are_refused(damage, tensors):
    """Counts and sums out of range, of a wrong shape or missing must not become importances."""
    path = damage(tensors)
    with pytest.raises(FormatError, match="damaged statistics file"):
        Calibration.load(path)


@pytest.mark.parametrize(
    "metadata",
    [
        {"hswq.layers": None},
        {"hswq.layers": "["},
        {"hswq.layers": json.dumps([["a", "linear", [5], 1], ["b", "linear", [5, 2], 1]])},
        {"hswq.settings": None},
        {"hswq.samples": "7"},
        {"hswq.layers": "[" * 10**5},
        {"hswq.settings": '{"a":' * 500 + "1" + "}" * 500},
        {"hswq.samples": "[" * 500 + "]" * 500},
    ],
)
def test_damaged_metadata_is_refused(damage, metadata):
    """JSON cut off, of another shape or too deep for a parser is told as damage of the file."""
    path = damage(metadata=metadata)
    with pytest.raises(FormatError, match="damaged statistics file"):
        Calibration.load(path)


def test_damaged_model_map_is_refused_with_the_path(damage):
    """The map's own error does not know which file it was stored in."""
    path = damage(metadata={"hswq.model_map": "{"})
    with pytest.raises(FormatError, match=r"statistics\.safetensors: .*model map"):
        Calibration.load(path)


def test_fused_layers_vary_as_one_output() -> None:
    """q, k and v of one weight are kept or quantized together: their variance is that of all."""
    torch.manual_seed(0)
    fused = torch.nn.Linear(6, 12)
    parts = torch.nn.ModuleDict({"q": torch.nn.Linear(6, 4), "v": torch.nn.Linear(6, 8)})
    with torch.no_grad():
        for part, rows in ((parts["q"], slice(0, 4)), (parts["v"], slice(4, 12))):
            part.weight.copy_(fused.weight[rows] * (1.0 if rows.start == 0 else 3.0))
            part.bias.copy_(fused.bias[rows])
        fused.weight[4:] *= 3.0
        whole = torch.nn.ModuleDict({"qv": fused})
        xs = [torch.randn(5, 6) for _ in range(3)]
        with observe(parts) as apart:
            for x in xs:
                parts["q"](x), parts["v"](x)
        with observe(whole) as together:
            for x in xs:
                fused(x)
    found = apart.joint_sensitivity({"q": 4, "v": 8})
    assert found == pytest.approx(together.sensitivity("qv"), rel=1e-5)
    assert apart.joint_sensitivity({"q": 4}) == apart.sensitivity("q")
    with observe(parts) as silent:
        parts["q"](xs[0])
    assert silent.joint_sensitivity({"q": 4, "v": 8}) is None
