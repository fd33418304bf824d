"""Dual Monitor hooks: what they measure, what they share, what they leave behind."""

from __future__ import annotations

import gc
import logging
import math
import weakref
from fractions import Fraction

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from hswq import kernels
from hswq.calibration import observe, observer
from hswq.errors import BackendError, InputError

# Half a step of the fixed-point sums, METHOD section 2.
HALF_STEP_ABS_MEAN = Fraction(1, 2**33)
HALF_STEP_MEAN = Fraction(1, 2**57)


def draw(*shape, seed=0, scale=1.0, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(*shape, generator=generator) * scale + 0.3 * scale).to(dtype)


def exact_mean(values):
    """Mean and mean magnitude of a tensor as fractions: no rounding at all."""
    flat = [Fraction(value) for value in values.double().flatten().tolist()]
    return sum(flat) / len(flat), sum(map(abs, flat)) / len(flat)


def check_importance(importance, inputs, dim, groups=1):
    """Compare with exact means.

    A float64 mean of n terms is off by at most n + 4 times 2**-53 relative, the fixed-point sum
    by half a step a call, and the result is rounded to float32.
    """
    columns = [torch.movedim(x, dim, 0).reshape(x.shape[dim], -1) for x in inputs]
    channels = columns[0].shape[0]
    assert list(importance.shape) == ([channels] if groups == 1 else [groups, channels // groups])
    summing = Fraction(max(x.shape[1] for x in columns) + 4, 2**53)
    for channel, actual in enumerate(importance.flatten().tolist()):
        exact = sum(exact_mean(x[channel])[1] for x in columns) / len(columns)
        error = exact * summing + HALF_STEP_ABS_MEAN
        bound = error + (exact + error) / 2**24
        assert abs(Fraction(actual) - exact) <= bound


def check_sensitivity(sensitivity, outputs):
    """Compare with the exact variance, S = E[mean y^2] - m^2.

    Each of the two sums is off by its float64 rounding and half a step; an error e of m changes
    m^2 by at most (2 |m| + e) e; the result is rounded once.
    """
    means = [exact_mean(y) for y in outputs]
    count = len(outputs)
    mean = sum(mean for mean, _ in means) / count
    spread = sum(magnitude for _, magnitude in means) / count
    square = sum(exact_mean(y.double() ** 2)[0] for y in outputs) / count
    exact = square - mean**2
    summing = Fraction(max(y.numel() for y in outputs) + 4, 2**53)
    error = summing * spread + HALF_STEP_MEAN
    bound = summing * square + HALF_STEP_MEAN + (2 * abs(mean) + error) * error
    assert abs(Fraction(sensitivity) - exact) <= bound + (exact + bound) / 2**53


LAYERS = {
    "conv": (lambda: nn.Conv2d(5, 7, 3, padding=1), [(2, 5, 9, 7), (1, 5, 4, 4)], -3, 1),
    "conv, no batch": (lambda: nn.Conv2d(3, 2, 1), [(3, 5, 4)], -3, 1),
    "conv, grouped": (lambda: nn.Conv2d(6, 4, 3, groups=2), [(2, 6, 5, 5)], -3, 2),
    "conv, depthwise": (lambda: nn.Conv2d(4, 8, 3, groups=4), [(1, 4, 5, 3)], -3, 4),
    "linear, vector": (lambda: nn.Linear(6, 3), [(6,)], -1, 1),
    "linear, [B, C]": (lambda: nn.Linear(6, 3, bias=False), [(5, 6), (1, 6)], -1, 1),
    "linear, [B, T, C]": (lambda: nn.Linear(6, 3), [(2, 7, 6), (3, 1, 6)], -1, 1),
    # Rank 4 is a convolution's rank, yet the channels are last.
    "linear, [B, H, W, C]": (lambda: nn.Linear(6, 3), [(2, 4, 5, 6)], -1, 1),
}


@pytest.mark.parametrize("case", LAYERS)
def test_layer_statistics_equal_exact_arithmetic(case):
    """The channel axis, the groups or the weight of a call is wrong if this fails."""
    make, shapes, dim, groups = LAYERS[case]
    torch.manual_seed(1)
    layer = make()
    inputs = [draw(*shape, seed=n, scale=10.0**n) for n, shape in enumerate(shapes)]
    with torch.no_grad(), observe(layer) as calibration:
        outputs = [layer(x) for x in inputs]
    statistics = calibration.modules[""]
    assert statistics.layout == (
        "conv2d" if isinstance(layer, nn.Conv2d) else "linear",
        tuple(layer.weight.shape),
        groups,
    )
    assert (statistics.calls, statistics.skipped) == (len(inputs), 0)
    check_importance(calibration.importance(""), inputs, dim, groups)
    check_sensitivity(calibration.sensitivity(""), outputs)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_sixteen_bit_activations_are_summed_wider(dtype):
    """Inputs of mean 60,000 overflow a float16 sum, and lose their small channels in bfloat16."""
    layer = nn.Linear(4, 2).to(dtype)
    with torch.no_grad():
        layer.weight.mul_(2.0**-6)
    x = draw(64, 4, dtype=torch.float32).abs()
    x = (x / x.amax() * torch.tensor([6e4, 1.0, 1e-3, 0.0])).to(dtype)
    with torch.no_grad(), observe(layer) as calibration:
        y = layer(x)
    check_importance(calibration.importance(""), [x], -1)
    check_sensitivity(calibration.sensitivity(""), [y])


def test_keyword_input_is_seen():
    """A hook that looks at positional arguments alone would miss `layer(input=x)`."""
    layer, x = nn.Linear(3, 2), draw(4, 3)
    with observe(layer) as calibration:
        layer(input=x)
    check_importance(calibration.importance(""), [x], -1)


class Attention(nn.Module):
    """q, k and v on one input, with something in between."""

    def __init__(self, between=lambda x: x):
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(4, 3) for _ in range(3))
        self.between = between

    def forward(self, x):
        return self.q(x) + self.k(x) + self.v(self.between(x))


@pytest.fixture
def reductions(monkeypatch):
    """Record for every monitored call whether the input was reduced anew."""
    calls = []
    monitor = kernels.monitor

    def count(*args, abs_mean=None, **kwargs):
        calls.append(abs_mean is None)
        return monitor(*args, abs_mean=abs_mean, **kwargs)

    monkeypatch.setattr(kernels, "monitor", count)
    return calls


def test_shared_input_is_reduced_once(reductions):
    """q, k and v would cost three passes over one tensor, in every block and step."""
    module, x = Attention(), draw(5, 4)
    with torch.no_grad(), observe(module) as calibration:
        module(x)
        module(draw(5, 4, seed=1))
    assert reductions == [True, False, False] * 2
    for name in "qkv":
        check_importance(calibration.importance(name), [x, draw(5, 4, seed=1)], -1)


def test_change_in_place_is_noticed(reductions):
    """v would be given the importance of q's input though the tensor was scaled in between."""
    module, x = Attention(between=lambda x: x.mul_(3)), draw(5, 4)
    before = x.clone()
    with torch.no_grad(), observe(module) as calibration:
        module(x)
    assert reductions == [True, False, True]
    check_importance(calibration.importance("k"), [before], -1)
    check_importance(calibration.importance("v"), [x], -1)


def test_change_through_a_view_is_noticed():
    """A view shares memory and version counter with its base."""
    module, x = Attention(between=lambda x: (x[1:].zero_(), x)[1]), draw(5, 4)
    with torch.no_grad(), observe(module) as calibration:
        module(x)
    check_importance(calibration.importance("v"), [x], -1)


def test_address_that_comes_back_is_not_the_same_tensor(reductions):
    """A freed tensor's address (and id, and version 0) returns with other values in it."""
    memory = np.ones((5, 4), dtype=np.float32)
    module = Attention()
    with torch.no_grad(), observe(module) as calibration:
        first = torch.from_numpy(memory)
        address = first.data_ptr()
        module.q(first)
        del first
        memory[:] = 7.0
        second = torch.from_numpy(memory)
        assert (second.data_ptr(), second._version) == (address, 0)
        module.k(second)
    assert reductions == [True, True]
    assert calibration.importance("q").tolist() == [1.0] * 4
    assert calibration.importance("k").tolist() == [7.0] * 4


def test_one_tensor_with_two_channel_axes_is_reduced_for_each():
    """A Linear and a Conv2d on the same tensor have their channels on different axes."""
    module = nn.ModuleDict({"linear": nn.Linear(3, 2), "conv": nn.Conv2d(3, 2, 1)})
    x = draw(2, 3, 3, 3)
    with torch.no_grad(), observe(module) as calibration:
        module["linear"](x)
        module["conv"](x)
        module["linear"](x)
    check_importance(calibration.importance("linear"), [x, x], -1)
    check_importance(calibration.importance("conv"), [x], -3)


def test_activations_and_graph_are_not_kept_alive():
    """Holding inputs, outputs or their graph would fill the GPU within one forward."""
    module, x = Attention(), draw(5, 4).requires_grad_()
    hidden = x * 2
    graph = nn.Identity()
    with observe(module):
        y = module(hidden)
        # A node of the graph takes no weak reference, but what it holds does.
        y.grad_fn.metadata["held"] = graph
        watched = [weakref.ref(hidden), weakref.ref(y), weakref.ref(graph)]
        del hidden, y, graph
        gc.collect()
        assert [reference() for reference in watched] == [None] * 3


def test_gradients_are_untouched():
    """Watching must not change what a caller's own training loop computes."""
    module, x = Attention(), draw(5, 4)
    module(x).sum().backward()
    expected = module.q.weight.grad.clone()
    module.zero_grad()
    with observe(module):
        module(x).sum().backward()
    assert torch.equal(module.q.weight.grad, expected)


@pytest.mark.parametrize("changes", [False, True])
def test_inference_mode_counts_every_change(changes):
    """Inference tensors have no version counter: each layer reduces its own, and no sum is one.

    The run goes on outside of inference mode, where sums made inside could not be added to.
    """
    module = Attention(between=(lambda x: x.mul_(3)) if changes else (lambda x: x))
    with observe(module) as calibration:
        with torch.inference_mode():
            inside = draw(5, 4)
            module(inside)
        with torch.no_grad():
            outside = draw(5, 4)
            module(outside)
    assert torch.equal(inside, outside)
    check_importance(calibration.importance("q"), [draw(5, 4)] * 2, -1)
    check_importance(calibration.importance("v"), [outside] * 2, -1)


def test_autocast_does_not_narrow_the_sums():
    """Under autocast the output is bfloat16; its moments must still be exact to float64."""
    layer, x = nn.Linear(6, 3), draw(50, 6, scale=100.0)
    with (
        torch.no_grad(),
        observe(layer) as calibration,
        torch.autocast("cpu", dtype=torch.bfloat16),
    ):
        y = layer(x)
    assert y.dtype == torch.bfloat16
    check_importance(calibration.importance(""), [x], -1)
    check_sensitivity(calibration.sensitivity(""), [y])


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("where", ["input", "weight"])
def test_call_with_nan_or_inf_is_skipped_and_named(caplog, value, where):
    """One overflowing step must not poison the averages of the others, nor pass in silence."""
    module, good, bad = Attention(), draw(5, 4), draw(5, 4, seed=2)
    with torch.no_grad(), observe(module) as calibration:
        y = module.q(good)
        if where == "input":
            bad[3, 1] = value
        else:
            module.q.bias[1] = value
        module.q(bad)
        module.v(torch.full((1, 4), value))
    assert (calibration.calls("q"), calibration.skipped("q")) == (1, 1)
    assert (calibration.calls("v"), calibration.skipped("v")) == (0, 1)
    check_importance(calibration.importance("q"), [good], -1)
    check_sensitivity(calibration.sensitivity("q"), [y])
    assert calibration.sensitivity("v") is None
    warnings = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert len(warnings) == 3
    assert warnings[0].startswith("1 of 3 layers were never called")
    assert warnings[0].endswith(": k")
    assert "not counted: q" in warnings[1]
    assert "every call" in warnings[2]
    assert warnings[2].endswith(": v")


def test_warning_names_ten_layers_and_counts_the_rest(caplog):
    """794 names in one line would hide everything else in the log."""
    module = nn.ModuleList(nn.Linear(1, 1) for _ in range(12))
    with observe(module):
        pass
    (record,) = caplog.records
    assert record.getMessage().endswith(": 0, 1, 2, 3, 4, 5, 6, 7, 8, 9 and 2 more")


def test_shared_module_counts_each_call_under_its_first_name(caplog):
    """A module under two names is one layer with one weight: two calls, not two layers."""
    layer = nn.Linear(4, 4)
    module = nn.ModuleDict({"first": layer, "second": layer})
    x = draw(2, 4)
    with caplog.at_level(logging.WARNING), torch.no_grad(), observe(module) as calibration:
        module["first"](x)
        module["second"](module["first"](x))
    assert list(calibration.modules) == ["first"]
    assert calibration.calls("first") == 3
    assert not caplog.records


def test_only_linear_and_conv2d_and_their_subclasses_are_watched():
    """Statistics of layers that are never quantized would only cost time and file size."""

    class Special(nn.Linear):
        pass

    module = nn.ModuleDict(
        {
            "special": Special(2, 2),
            "embedding": nn.Embedding(2, 2),
            "norm": nn.LayerNorm(2),
            "up": nn.ConvTranspose2d(2, 2, 1),
            "conv1d": nn.Conv1d(2, 2, 1),
            "conv": nn.Conv2d(2, 2, 1),
        }
    )
    with observe(module) as calibration:
        pass
    assert list(calibration.modules) == ["special", "conv"]


def hooks_of(module):
    return sum(len(layer._forward_hooks) for layer in module.modules())


def test_hooks_are_removed_after_success_and_after_an_error():
    """A forgotten hook slows every later forward and keeps the sums alive."""
    module = Attention()
    with torch.no_grad(), observe(module):
        module(draw(5, 4))
        # One a layer and one of the whole module.
        assert hooks_of(module) == 4
    assert hooks_of(module) == 0
    with pytest.raises(KeyboardInterrupt), observe(module) as calibration:
        raise KeyboardInterrupt
    assert hooks_of(module) == 0
    assert calibration.modules == {}


def test_hooks_added_by_others_stay():
    """Only our own hooks may go."""
    module = Attention()
    module.q.register_forward_hook(lambda *_: None)
    with observe(module):
        pass
    assert hooks_of(module) == 1


class ReturnsPair(nn.Linear):
    def forward(self, input):
        return super().forward(input), None


class TakesList(nn.Linear):
    def forward(self, input):
        return super().forward(input[0])


@pytest.mark.parametrize(
    ("layer", "argument", "words"),
    [
        (ReturnsPair(4, 3), draw(2, 4), "output of layer '0' .*tuple"),
        (TakesList(4, 3), [draw(2, 4)], "input of layer '0' .*list"),
    ],
)
def test_layer_without_plain_tensors_is_named(layer, argument, words):
    """A quantized or wrapped Linear that answers tuples must not fail inside a kernel."""
    module = nn.Sequential(layer)
    with pytest.raises(InputError, match=words), observe(module):
        module(argument)
    assert hooks_of(module) == 0


def test_layer_that_the_kernels_refuse_is_named():
    """The kernels know dtypes, not names: among 794 layers the name is what helps."""
    module = nn.Sequential(nn.Linear(4, 3).double())
    with pytest.raises(InputError, match=r"layer '0' .*float64"), observe(module):
        module(draw(2, 4).double())


def test_module_without_layers_is_refused():
    """Passing the pipeline's wrong part would otherwise give empty statistics."""
    with pytest.raises(InputError, match="LayerNorm has no"), observe(nn.LayerNorm(3)):
        pass


def test_named_backend_reaches_the_kernels():
    """`backend` must not be dropped: an unknown one has to raise."""
    layer = nn.Linear(4, 3)
    with pytest.raises(BackendError), observe(layer, backend="nonsense"):
        layer(draw(2, 4))


def sums(calibration):
    return {
        name: (s.calls, s.skipped, s.mean_y, s.mean_y2, s.abs_mean.tolist())
        for name, s in calibration.modules.items()
    }


def test_runs_merge_to_the_bits_of_one_run():
    """Calls split over several runs, in any order, must add up to the same integers."""
    module = Attention()
    inputs = [draw(n + 1, 4, seed=n, scale=3.0**n) for n in range(5)]

    def run(indices):
        with torch.no_grad(), observe(module) as calibration:
            for n in indices:
                module(inputs[n])
        return calibration

    whole = sums(run(range(5)))
    assert whole["q"][0] == 5
    assert sums(run([3, 1]).merge(run([4, 0, 2]))) == whole
    assert sums(run([2]).merge(run([0, 1]).merge(run([4, 3])))) == whole


def test_full_accumulators_are_followed_by_others(monkeypatch):
    """int64 holds 2**11 calls of the largest importance; the sums of more must be the same."""
    module = Attention()

    def run():
        with torch.no_grad(), observe(module) as calibration:
            for n in range(5):
                module(draw(3, 4, seed=n))
        return sums(calibration)

    expected = run()
    monkeypatch.setattr(observer, "CALLS_PER_ACCUMULATOR", 2)
    assert run() == expected


def watch_many_calls(layer, x, calls):
    with torch.no_grad(), observe(layer):
        for _ in range(calls):
            layer(x)


def test_largest_importance_of_many_calls_does_not_wrap():
    """2,500 calls of |x| = 2**20, the largest that counts, exceed int64: refused, not wrapped."""
    with pytest.raises(InputError, match="range"):
        watch_many_calls(nn.Linear(1, 1), torch.full((1, 1), 2.0**20), 2500)


class CountReads(TorchDispatchMode):
    """Count the operations that bring a value from the device to the host."""

    READS = (
        torch.ops.aten._local_scalar_dense.default,
        torch.ops.aten.nonzero.default,
        torch.ops.aten.equal.default,
    )

    def __init__(self):
        super().__init__()
        self.reads = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.reads += func in self.READS
        return func(*args, **(kwargs or {}))


def test_hook_never_waits_for_the_device():
    """`.item()` or a branch on a value inside a hook would stall the GPU at every layer."""
    module = Attention()
    with torch.no_grad(), observe(module, backend="reference"), CountReads() as mode:
        module(draw(2, 4))
        assert mode.reads == 0
        draw(1).item()
    assert mode.reads == 1


def statistics_of(module, *modules_to_run):
    """Return what the layers of a module saw while others, which share them, ran."""
    torch._dynamo.reset()
    with torch.no_grad(), observe(module) as calibration:
        for run in modules_to_run:
            run(draw(2, 4))
    return {
        name: (it.calls, it.mean_y, it.mean_y2, it.abs_mean.tolist())
        for name, it in calibration.modules.items()
    }


@pytest.mark.parametrize("compiler", ["eager", "aot_eager"])
def test_compiled_module_gives_the_same_statistics(compiler):
    """Traced, the hooks would break the compiler or count the first call alone."""
    module = Attention()
    compiled = torch.compile(module, backend=compiler)
    assert statistics_of(module, *[compiled] * 3) == statistics_of(module, *[module] * 3)


def test_input_is_reduced_once_in_each_forward(monkeypatch):
    """A captured forward that leans on an earlier one would replay that one's importance."""
    module, x = Attention(), draw(2, 4)
    known = []
    monitor = kernels.monitor

    def counted(*arguments, abs_mean, **options):
        known.append(abs_mean is not None)
        return monitor(*arguments, abs_mean=abs_mean, **options)

    monkeypatch.setattr(kernels, "monitor", counted)
    with torch.no_grad(), observe(module):
        module(x)
        module(x)
    assert known == [False, True, True] * 2
