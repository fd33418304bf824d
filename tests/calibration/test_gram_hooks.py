"""Gram matrices gathered by hooks: the right rows, in bounded number and memory."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import hswq
from hswq.calibration import gather_grams, gram_groups, gram_layers
from hswq.calibration import gram as gram_module
from hswq.calibration.gram import GramLayer


def patches(layer: nn.Conv2d, x: torch.Tensor) -> torch.Tensor:
    """All patches of a convolution's input, [rows, n], by torch's own unfold."""
    padded = nn.functional.pad(x, *gram_module._padding(layer))
    unfolded = nn.functional.unfold(
        padded, layer.kernel_size, dilation=layer.dilation, stride=layer.stride
    )
    return unfolded.transpose(1, 2).reshape(-1, unfolded.shape[1])


CONVOLUTIONS = [
    {"kernel_size": 3, "padding": 1},
    {"kernel_size": 3, "padding": 1, "stride": 2},
    {"kernel_size": (3, 1), "padding": (2, 0), "dilation": (2, 1)},
    {"kernel_size": 1},
    {"kernel_size": 3, "padding": "same", "padding_mode": "reflect"},
    {"kernel_size": 5, "padding": "valid", "stride": (3, 2)},
]


@pytest.mark.parametrize("options", CONVOLUTIONS)
def test_convolution_gives_the_gram_of_its_patches(options):
    """Compensation for other inputs than the layer's makes the error larger."""
    layer = nn.Conv2d(3, 4, **options)
    x = torch.randn(2, 3, 12, 11, generator=torch.Generator().manual_seed(0))
    with torch.no_grad(), hswq.observe(layer, gram=True) as calibration:
        layer(x)
        layer(x[0])
    gram = calibration.grams[""]
    rows = torch.cat([patches(layer, x), patches(layer, x[:1])]).double()
    assert gram.rows == len(rows)
    assert torch.allclose(gram.matrix[0].double(), rows.T @ rows, rtol=1e-5, atol=1e-4)
    assert torch.allclose(gram.total, rows.sum(0), rtol=1e-6, atol=1e-5)


@pytest.mark.parametrize("options", CONVOLUTIONS)
def test_rows_of_a_convolution_are_bounded_and_among_its_patches(options, monkeypatch):
    """A large image would cost more than the sampler; rows from between patches are none."""
    monkeypatch.setattr(gram_module, "ROWS_PER_CALL", 9)
    layer = nn.Conv2d(2, 3, **options)
    x = torch.randn(1, 2, 13, 12, generator=torch.Generator().manual_seed(0))
    known = patches(layer, x).double()
    seen = set()
    for calls in range(1, 6):
        with torch.no_grad(), hswq.observe(layer, gram=True) as calibration:
            for _ in range(calls):
                layer(x)
        gram = calibration.grams[""]
        assert 0 < gram.rows <= 9 * calls
        seen.add(round(float(gram.total.sum()) / gram.rows, 6))
        if calls == 1:
            # The rows are some of the patches: a sum of a subset, found by its trace.
            squares = known.square().sum(1)
            trace = float(gram.matrix[0].double().trace())
            chosen = grid_with_sum(squares, layer(x).shape[2], trace)
            assert len(chosen) == gram.rows
    # Every call takes other rows.
    assert len(seen) > 1


def grid_with_sum(values: torch.Tensor, height: int, total: float) -> list[int]:
    """Find the regular grid of output positions whose values add up to `total`."""
    grid = torch.arange(len(values)).reshape(height, -1)
    grids = (grid[::step, ::step].flatten() for step in range(1, len(values) + 1))
    sums = ((picked.tolist(), float(values[picked].sum())) for picked in grids)
    return next((picked for picked, found in sums if abs(found - total) < 1e-5 * total), [])


def test_rows_of_a_linear_are_spread_over_the_call(monkeypatch):
    """The first tokens of a sequence are like each other."""
    monkeypatch.setattr(gram_module, "ROWS_PER_CALL", 10)
    layer = nn.Linear(4, 2)
    x = torch.zeros(1, 95, 4)
    x[0, :, 0] = torch.arange(95)
    with torch.no_grad(), hswq.observe(layer, gram=True) as calibration:
        layer(input=x)
    assert calibration.grams[""].total[0] == sum(range(0, 95, 10))
    assert calibration.grams[""].rows == 10


def test_calls_with_nan_add_nothing():
    """One overflow would make every Gram matrix useless."""
    layer = nn.Linear(3, 2)
    x = torch.ones(2, 3)
    with torch.no_grad(), hswq.observe(layer, gram=True) as calibration:
        layer(x)
        layer(x * torch.nan)
        layer(torch.ones(0, 3))
    gram = calibration.grams[""]
    assert gram.rows == 2
    assert torch.equal(gram.matrix[0], torch.full((3, 3), 2.0))
    assert gram.total.tolist() == [2.0, 2.0, 2.0]


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(8, 8) for _ in range(3))
        self.out = nn.Linear(8, 8)
        self.other = nn.Linear(8, 8)

    def forward(self, x, shared=True):
        y = self.q(x) + self.k(x) + self.v(x)
        return self.out(y) + self.other(x if shared else x + 1)


def test_layers_with_equal_inputs_share_a_gram():
    """Three times the memory and the work for q, k and v; a layer that once differs stays apart."""
    module = Attention()
    with torch.no_grad(), hswq.observe(module) as calibration:
        module(torch.randn(5, 8))
        module(torch.randn(5, 8), shared=False)
    assert calibration.shared_inputs == {"q": "q", "k": "q", "v": "q", "out": "out"}
    layers = gram_layers(module, calibration.shared_inputs)
    assert [layer.sharing for layer in layers] == [("q", "k", "v"), ("out",), ("other",)]
    with torch.no_grad(), gather_grams(module, layers) as grams:
        module(torch.randn(5, 8))
    assert grams["k"] is grams["q"]
    assert grams["out"] is not grams["q"]
    assert not any(part._forward_pre_hooks for part in module.modules())


def test_groups_fit_into_the_memory():
    """More than what was asked for ends in the system's killer, and nothing is left."""
    layers = [GramLayer(f"l{number}", (f"l{number}",), 100) for number in range(5)]
    assert layers[0].nbytes == 40_000
    for memory, sizes in ((40_000, [1] * 5), (100_000, [2, 2, 1]), (1, [1] * 5), (10**9, [5])):
        assert [len(group) for group in gram_groups(layers, memory)] == sizes


@pytest.mark.parametrize(
    ("columns", "blocks"),
    [(8192, 1), (8193, 3), (11520, 2), (23040, 3), (15360, 2), (10007, 10007)],
)
def test_wide_weights_get_equal_blocks(columns, blocks):
    """A full matrix of 23,040 columns takes 2 GB and minutes to factorize."""
    layer = GramLayer("l", ("l",), columns)
    assert layer.blocks == blocks
    assert layer.nbytes == 4 * columns * columns // blocks


def test_grouped_convolutions_have_none():
    """Their patches would be mixed."""
    module = nn.Sequential(nn.Conv2d(4, 4, 3, groups=2), nn.Conv2d(4, 4, 3))
    assert [layer.name for layer in gram_layers(module)] == ["1"]


def test_more_images_than_rows_are_thinned() -> None:
    """A batch of tiny images must not be looked at without end."""
    layer = nn.Conv2d(3, 4, 3)
    with hswq.observe(layer, gram=True) as calibration, torch.no_grad():
        layer(torch.ones(gram_module.ROWS_PER_CALL + 1, 3, 3, 3))
    (gram,) = calibration.grams.values()
    assert 0 < gram.rows <= gram_module.ROWS_PER_CALL


@pytest.mark.parametrize("layer", [nn.Linear(3, 2), nn.Conv2d(3, 2, 3, padding=1)], ids=str)
def test_guided_combinations_count_beside_the_rows(layer):
    """The sampler goes by y_u + g (y_c - y_u); halves taken the wrong way round lower no error."""
    x = torch.randn(4, 3, 6, 5, generator=torch.Generator().manual_seed(0))
    guided = x[:2] + 5.0 * (x[2:] - x[:2])
    if isinstance(layer, nn.Linear):
        x, guided = (it.movedim(1, 3) for it in (x, guided))
        parts = [it.reshape(-1, 3).double() for it in (x, guided)]
    else:
        parts = [patches(layer, it).double() for it in (x, guided)]
    with torch.no_grad(), gather_grams(layer, gram_layers(layer), guidance=5.0) as grams:
        layer(x)
        layer(x[:1])
    rows = torch.cat([parts[0], parts[0][: len(parts[0]) // 4], parts[1]])
    weights = torch.ones(len(rows), 1, dtype=torch.float64)
    weights[-len(parts[1]) :] = gram_module.GUIDED_WEIGHT
    gram = grams[""]
    assert gram.rows == pytest.approx(float(weights.sum()))
    with torch.no_grad(), hswq.observe(layer, gram=True, guidance=5.0) as calibration:
        layer(x)
        layer(x[:1])
    assert torch.equal(calibration.grams[""].matrix, gram.matrix)
    expected = (weights * rows).T @ rows
    assert torch.allclose(gram.matrix[0].double(), expected, rtol=1e-5, atol=1e-4)
    assert torch.allclose(gram.total, (weights * rows).sum(0), rtol=1e-5, atol=1e-4)


def test_guided_rows_are_bounded_too(monkeypatch):
    """Half as many, so that a call costs half as much again."""
    monkeypatch.setattr(gram_module, "ROWS_PER_CALL", 8)
    layer = nn.Linear(3, 2)
    with torch.no_grad(), gather_grams(layer, gram_layers(layer), guidance=5.0) as grams:
        layer(torch.ones(2, 64, 3))
    assert grams[""].rows == pytest.approx(8 + 4 * gram_module.GUIDED_WEIGHT)
