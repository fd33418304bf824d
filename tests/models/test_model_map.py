"""The map as data: units, and the JSON that travels with the statistics."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from hswq.errors import FormatError
from hswq.models.map import ModelMap, ModuleSpec, Source

PREFIX = "model.diffusion_model."


def fused_map() -> ModelMap:
    """A fused qkv [24, 8], a weight whose halves are swapped, and a plain convolution."""
    modules = (
        ModuleSpec("block.to_k", "linear", (8, 8), bias=False),
        ModuleSpec("block.to_q", "linear", (8, 8), bias=False),
        ModuleSpec("block.to_v", "linear", (8, 8), bias=False),
        ModuleSpec("out.modulation", "linear", (6, 8)),
        ModuleSpec("conv", "conv2d", (4, 2, 3, 3), groups=2),
    )
    qkv, swap = f"{PREFIX}qkv.weight", f"{PREFIX}final.1.weight"
    sources = {
        "block.to_k.weight": (Source(qkv, 8, 16),),
        "block.to_q.weight": (Source(qkv, 0, 8),),
        "block.to_v.weight": (Source(qkv, 16, 24),),
        "out.modulation.weight": (Source(swap, 3, 6), Source(swap, 0, 3)),
        "out.modulation.bias": (Source(f"{PREFIX}final.1.bias", 0, 6),),
        "conv.weight": (Source(f"{PREFIX}conv.weight", 0, 4),),
        "conv.bias": (Source(f"{PREFIX}conv.bias", 0, 4),),
    }
    return ModelMap("sdxl", "ldm", PREFIX, "0.0", modules, sources, ("v_pred",))


def test_fused_weight_is_one_unit_with_its_modules_in_row_order():
    """Rows of a fused qkv would be weighted with the importance of another module's input."""
    units = fused_map().units()
    assert [unit.name for unit in units] == ["qkv", "final.1", "conv"]
    fused = units[0]
    assert fused.key == f"{PREFIX}qkv.weight"
    assert [module.name for module in fused.modules] == ["block.to_q", "block.to_k", "block.to_v"]
    assert fused.rows == ((0, 8), (8, 16), (16, 24))
    assert (fused.kind, fused.shape, fused.numel) == ("linear", (24, 8), 192)


def test_module_made_of_swapped_halves_is_one_unit_listing_both():
    """A weight whose scale and shift are swapped would lose half of its rows."""
    swapped = fused_map().units()[1]
    assert [module.name for module in swapped.modules] == ["out.modulation"] * 2
    assert swapped.rows == ((0, 3), (3, 6))
    assert swapped.shape == (6, 8)


def test_in_channels_counts_all_groups():
    """A grouped convolution's importance vector would be refused, or cut to one group."""
    conv = fused_map().modules[-1]
    assert (conv.in_channels, conv.numel) == (4, 72)


def test_json_round_trip_is_exact_and_deterministic():
    """A map stored with statistics would differ from the traced one, or from run to run."""
    original = fused_map()
    text = original.to_json()
    assert ModelMap.from_json(text) == original
    assert ModelMap.from_json(text).to_json() == text


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("nonsense", "no JSON"),
        ("[]", "no JSON"),
        ("{}", "no JSON"),
        ('{"a":' * 10**5, "no JSON"),
        (json.dumps({"schema": 2}), "schema 2"),
        (json.dumps({"schema": 1, "modules": []}), "damaged"),
        (json.dumps({"schema": 1, "modules": [{"shape": 3}]}), "damaged"),
    ],
)
def test_broken_json_is_a_format_error(text, words):
    """A damaged statistics file would end in a traceback that names no cause."""
    with pytest.raises(FormatError, match=words):
        ModelMap.from_json(text)


def test_reading_a_stored_map_loads_neither_torch_nor_diffusers():
    """Converting with given statistics would pay seconds for libraries it does not use."""
    code = (
        "import sys, hswq.models.map; "
        "print({'torch', 'diffusers', 'transformers'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
