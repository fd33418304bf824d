"""The layers that benchmarks take for SDXL's."""

from __future__ import annotations

import torch

from benchmarks.cases import LAYERS, WEIGHTS, Pool, linear_shapes, sdxl_layers


def test_layers_are_sdxls() -> None:
    """Figures for 'SDXL' would be those of another network."""
    layers = sdxl_layers()
    assert (len(layers), sum(layer.numel for layer in layers)) == (LAYERS, WEIGHTS)
    assert layers[0] == ("conv_in", "conv2d", (320, 4, 3, 3))


def test_linear_shapes_are_those_of_the_transformer_blocks() -> None:
    """The ratio over SDXL's products would weigh its shapes wrongly."""
    shapes = linear_shapes()
    # 10 layers of two levels and the middle: 2 and 10 blocks at 640 and 1280 channels.
    assert shapes[(5120, 640)] == 10
    assert shapes[(10240, 1280)] == shapes[(1280, 5120)] == 60
    assert shapes[(1280, 2048)] == 120
    assert sum(shapes.values()) == 70 * 10 + 2 * 11


def test_pool_gives_other_memory_each_time() -> None:
    """A weight that lies in a cache would flatter what is timed second."""
    pool = Pool(torch.arange(30, dtype=torch.float16), numel=100)
    first, second, third = pool.take((4, 10)), pool.take((4, 10)), pool.take((4, 10))
    assert second.data_ptr() == first.data_ptr() + first.nbytes
    assert third.data_ptr() == first.data_ptr()
    assert second.flatten()[:3].tolist() == [10, 11, 12]
