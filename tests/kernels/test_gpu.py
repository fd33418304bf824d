"""What only a GPU can show: nothing waits, graphs replay, large tensors, equal bits every time."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch import Tensor, nn

from hswq import kernels, observe
from hswq.calibration import Calibration
from hswq.search import Layer, search_layers

pytestmark = pytest.mark.gpu


@pytest.fixture
def device() -> torch.device:
    return torch.device("cuda", torch.cuda.current_device())


def small_model(device: torch.device) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(16, 32, 3, padding=1), nn.GroupNorm(4, 32), nn.SiLU(), nn.Conv2d(32, 16, 1)
    ).to(device, torch.float16)


def inputs(device: torch.device) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(2, 16, 24, 24, generator=generator).to(device, torch.float16)


def sums(calibration: Calibration) -> dict[str, tuple[object, ...]]:
    return {
        name: (it.calls, it.skipped, it.mean_y, it.mean_y2, it.abs_mean.tolist())
        for name, it in calibration.modules.items()
    }


def watch(module: nn.Module, x: Tensor, calls: int) -> dict[str, tuple[object, ...]]:
    with torch.no_grad(), observe(module, backend="triton") as calibration:
        for _ in range(calls):
            module(x)
    return sums(calibration)


def test_hooks_never_wait(device: torch.device) -> None:
    """One wait a layer would leave the GPU idle for most of a calibration."""
    module, x = small_model(device), inputs(device)
    watch(module, x, 1)
    with torch.no_grad(), observe(module, backend="triton"):
        module(x)
        torch.cuda.set_sync_debug_mode("error")
        try:
            module(x)
        finally:
            torch.cuda.set_sync_debug_mode("default")


def test_search_of_a_model_waits_once(device: torch.device) -> None:
    """A wait a layer is 794 for SDXL."""
    layers = [
        Layer(str(number), torch.randn(64, 32, device=device).half(), torch.rand(32), True)
        for number in range(20)
    ]
    search_layers(layers, backend="triton")
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            search_layers(layers, backend="triton")
    finally:
        torch.cuda.set_sync_debug_mode("default")
    waits = [str(each.message) for each in caught if "synchroniz" in str(each.message)]
    assert len(waits) == 1, waits


def test_replays_of_a_graph_count_as_calls(device: torch.device) -> None:
    """Each replay brings other values in the same tensors; who captures calibrates with them."""
    module, static = small_model(device), inputs(device)
    values = [static * (number + 1) for number in range(4)]
    with torch.no_grad(), observe(module, backend="triton") as expected:
        for x in (static, *values):
            module(x)
    with torch.no_grad(), observe(module, backend="triton") as calibration:
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            module(static)
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            module(static)
        for x in values:
            static.copy_(x)
            graph.replay()
    assert sums(calibration) == sums(expected)


def test_compiled_module_is_watched(device: torch.device) -> None:
    """A graph that drops the hooks leaves every layer without statistics."""
    module, x = small_model(device), inputs(device)
    with torch.no_grad(), observe(module, backend="triton") as calibration:
        compiled = torch.compile(module)
        for _ in range(3):
            compiled(x)
    assert {it.calls for it in calibration.modules.values()} == {3}


@pytest.mark.parametrize("shape", [(2, 4096, 640), (2, 320, 128, 128)], ids=str)
def test_large_reductions_give_equal_bits_every_time(
    shape: tuple[int, ...], device: torch.device
) -> None:
    """Programs finish in another order each time; that must not show."""
    x = torch.randn(shape, device=device).half()
    dim = -1 if len(shape) == 3 else -3
    found = set()
    for _ in range(20):
        total = kernels.MonitorAccumulators.zeros(x.shape[dim], device)
        for _ in range(3):
            kernels.monitor(x, x, dim, total, backend="triton")
        found.add(str([total.mean_y.tolist(), total.mean_y2.tolist(), total.abs_mean.tolist()]))
    assert len(found) == 1
    expected = kernels.MonitorAccumulators.zeros(x.shape[dim])
    for _ in range(3):
        kernels.monitor(x.cpu(), x.cpu(), dim, expected, backend="reference")
    # Steps of 2**-32; each call rounds once.
    assert (total.abs_mean.cpu() - expected.abs_mean).abs().max() <= 3


def test_more_than_2_31_elements(device: torch.device) -> None:
    """Offsets of 32 bits would wrap and round other weights, or none."""
    count = (1 << 31) + 5
    if torch.cuda.mem_get_info(device)[0] < 5 * count:
        pytest.skip("the GPU has less than 11 GB of free memory")
    w = torch.zeros(count, dtype=torch.float16, device=device)
    w[-3:] = 1.0
    codes = kernels.quantize_e4m3(w, 448.0, 1.0, backend="triton")
    assert codes[-4:].tolist() == [0x00, 0x38, 0x38, 0x38]
    assert int(codes.count_nonzero()) == 3
    assert kernels.moments(w, backend="triton").tolist() == [count, 3.0, 3.0]
    hist, max_abs = kernels.weighted_histogram(w, None, 16, backend="triton")
    assert float(max_abs) == 1.0
    assert hist[-1].item() == 3 / count


def test_two_streams_at_once_do_not_mix(device: torch.device) -> None:
    """Counters or workspaces that calls share would mix what runs side by side."""
    xs = [torch.randn(2, 2048, 640, device=device).half() * (n + 1) for n in range(2)]
    alone = []
    for x in xs:
        total = kernels.MonitorAccumulators.zeros(640, device)
        for _ in range(10):
            kernels.monitor(x, x, -1, total, backend="triton")
        alone.append(total.abs_mean.tolist())
    together = [kernels.MonitorAccumulators.zeros(640, device) for _ in xs]
    streams = [torch.cuda.Stream() for _ in xs]
    torch.cuda.synchronize()
    for _ in range(10):
        for x, total, stream in zip(xs, together, streams, strict=True):
            with torch.cuda.stream(stream):
                kernels.monitor(x, x, -1, total, backend="triton")
    torch.cuda.synchronize()
    assert [total.abs_mean.tolist() for total in together] == alone
