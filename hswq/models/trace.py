"""The map checkpoint key and rows <-> module, read off diffusers' own converter.

There is no table of keys here. The converter is run on a stand-in for the checkpoint in which every
row of every tensor is its own number; where the numbers turn up is where the rows go. Renames,
prefixes, fused and split weights all fall out of it.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from importlib.metadata import version
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from hswq.errors import InputError
from hswq.formats.quantized import container_keys
from hswq.formats.reader import Checkpoint
from hswq.models.denoiser import denoiser_config, meta_denoiser
from hswq.models.families import FAMILIES
from hswq.models.family import Detection, Family
from hswq.models.map import ModelMap, ModuleSpec, Source
from hswq.models.quiet import quiet_libraries

logger = logging.getLogger(__name__)

Shape = tuple[int, ...]


@dataclass(frozen=True)
class _Trace:
    modules: tuple[ModuleSpec, ...]
    sources: dict[str, tuple[Source, ...]]
    problems: tuple[str, ...]


def trace_map(
    checkpoint: Checkpoint,
    detection: Detection,
    pipeline_dir: Path | None = None,
    denoiser: nn.Module | None = None,
) -> ModelMap:
    """Trace which rows of which checkpoint tensor feed which parameter of the denoiser.

    Every parameter and buffer must be covered with its shape, and every row of every tensor of the
    denoiser used exactly once. Results are kept in memory per layout, configuration and header.

    Args:
        checkpoint: open checkpoint; only its header is used.
        detection: what `detect` said of it.
        pipeline_dir: diffusers folder whose unet/config.json describes the denoiser; None: the
            configuration beside a diffusers component, else SDXL base's.
        denoiser: the module itself, where there is one; it brings its configuration.
    Returns:
        The map, checked.
    Raises:
        InputError: the configuration is missing or wrong, or the checkpoint does not fit it.
    """
    family = FAMILIES[detection.family]
    extra = container_keys(checkpoint)
    keys: list[tuple[str, Shape]] = []
    unmatched: list[str] = []
    for name, info in checkpoint.tensors.items():
        if not name.startswith(detection.prefix) or name in extra:
            continue
        if info.numel == 0 or name.removeprefix(detection.prefix) in family.unused:
            unmatched.append(name)
        else:
            keys.append((name, info.shape))
    if denoiser is None:
        config, where = denoiser_config(checkpoint, pipeline_dir, detection)
        text = json.dumps(config, sort_keys=True)
        trace = _trace(family.name, detection.layout, detection.prefix, text, tuple(keys))
    else:
        where = "of the module"
        trace = _trace_into(denoiser, family, detection.layout, detection.prefix, keys)
    if trace.problems:
        raise InputError(
            f"'{checkpoint.path}' does not fit the {family.title} configuration {where}: "
            f"{'; '.join(trace.problems)}. The file is damaged, or it is a model of another shape: "
            "then give the folder with its own configuration, --pipeline DIR."
        )
    logger.debug("%d layers mapped in %s", len(trace.modules), checkpoint.path)
    return ModelMap(
        family=detection.family,
        layout=detection.layout,
        prefix=detection.prefix,
        diffusers_version=version("diffusers"),
        modules=trace.modules,
        sources=trace.sources,
        unmatched=tuple(unmatched),
        shapes=dict(keys),
    )


@lru_cache(maxsize=8)
def _trace(
    family: str, layout: str, prefix: str, config_text: str, keys: tuple[tuple[str, Shape], ...]
) -> _Trace:
    denoiser = meta_denoiser(json.loads(config_text), FAMILIES[family].class_name)
    return _trace_into(denoiser, FAMILIES[family], layout, prefix, keys)


def _trace_into(
    denoiser: Any, family: Family, layout: str, prefix: str, keys: Sequence[tuple[str, Shape]]
) -> _Trace:
    shapes = dict(keys)
    expected = _expected(denoiser)
    try:
        found = (
            {name.removeprefix(prefix): (_whole(name, shape),) for name, shape in keys}
            if layout == "diffusers"
            else _convert(family, keys, prefix, dict(denoiser.config))
        )
    except KeyError as error:
        # The converter looks some keys up without asking whether they are there.
        return _Trace((), {}, (f"the key '{prefix}{error.args[0]}' is missing",))
    sources = {name: found[name] for name in expected if name in found}
    problems = [
        *_misshapen(sources, expected, shapes),
        *_uncovered(sources, shapes),
        *_listed("parameters have no key", (name for name in expected if name not in found)),
    ]
    return _Trace(_module_specs(denoiser), sources, tuple(problems))


def _expected(denoiser: nn.Module) -> dict[str, Shape]:
    """Return names and shapes of the state dict, without the scales of layers that are FP8."""
    scales = {
        f"{name}.{leaf}"
        for name, module in denoiser.named_modules()
        if getattr(getattr(module, "weight", None), "dtype", None) == torch.float8_e4m3fn
        for leaf in ("scale", "input_scale")
    }
    state = denoiser.state_dict().items()
    return {name: tuple(tensor.shape) for name, tensor in state if name not in scales}


def _module_specs(denoiser: nn.Module) -> tuple[ModuleSpec, ...]:
    return tuple(
        ModuleSpec(
            name=name,
            kind="conv2d" if isinstance(module, nn.Conv2d) else "linear",
            shape=tuple(module.weight.shape),
            groups=module.groups if isinstance(module, nn.Conv2d) else 1,
            bias=module.bias is not None,
        )
        for name, module in denoiser.named_modules()
        if isinstance(module, nn.Linear | nn.Conv2d)
    )


def _row_count(shape: Shape) -> int:
    return shape[0] if shape else 1


def _whole(key: str, shape: Shape) -> Source:
    return Source(key, 0, _row_count(shape))


def _convert(
    family: Family, keys: Sequence[tuple[str, Shape]], prefix: str, config: dict[str, Any]
) -> dict[str, tuple[Source, ...]]:
    """Run diffusers' converter on numbered rows and read off where they went.

    Raises:
        KeyError: the converter misses a key; the argument is its name without prefix.
    """
    # Neighbouring tensors leave one number out, so that a run of consecutive ones is one tensor's.
    counts = torch.tensor([_row_count(shape) + 1 for _, shape in keys])
    first_rows = torch.cumsum(counts, 0) - counts
    numbered = {
        name.removeprefix(prefix): torch.arange(first, first + count - 1)
        for (name, _), first, count in zip(keys, first_rows.tolist(), counts.tolist(), strict=True)
    }
    with quiet_libraries():
        converted = family.convert(numbered, config)
    names = [name for name, _ in keys]
    return {target: _read_off(numbers, first_rows, names) for target, numbers in converted.items()}


def _read_off(numbers: Tensor, first_rows: Tensor, names: Sequence[str]) -> tuple[Source, ...]:
    """Return the runs of rows that a converted tensor is made of, in its order.

    Args:
        numbers: int64 [rows], the number of each row.
        first_rows: int64 [tensors], number of the first row of each checkpoint tensor, rising.
        names: key of each checkpoint tensor.
    """
    breaks = (numbers.diff() != 1).nonzero().flatten() + 1
    sources = []
    for run in torch.tensor_split(numbers, breaks):
        tensor = int(torch.searchsorted(first_rows, run[0], right=True)) - 1
        start = int(run[0] - first_rows[tensor])
        sources.append(Source(names[tensor], start, start + len(run)))
    return tuple(sources)


def _misshapen(
    sources: dict[str, tuple[Source, ...]], expected: dict[str, Shape], shapes: dict[str, Shape]
) -> list[str]:
    wrong = []
    for name, parts in sources.items():
        rows = (sum(part.stop - part.start for part in parts),) if expected[name] else ()
        for part in parts:
            shape = (*rows, *shapes[part.key][1:])
            if shape != expected[name]:
                wrong.append(f"{part.key!r} gives {list(shape)}, needed {list(expected[name])}")
    return _listed("tensors have another shape", wrong)


def _uncovered(sources: dict[str, tuple[Source, ...]], shapes: dict[str, Shape]) -> list[str]:
    """Return the problem of keys whose rows are not each used exactly once."""
    used: dict[str, list[Source]] = {key: [] for key in shapes}
    for part in chain.from_iterable(sources.values()):
        used[part.key].append(part)
    wrong = []
    for key, parts in used.items():
        row = 0
        for part in sorted(parts, key=lambda part: part.start):
            row = part.stop if part.start == row else -1
        if row != _row_count(shapes[key]):
            wrong.append(repr(key))
    return _listed("keys that do not map", wrong)


def _listed(what: str, items: Iterable[str]) -> list[str]:
    found = list(items)
    if not found:
        return []
    dots = ", …" if len(found) > 10 else ""
    return [f"{len(found)} {what}: {', '.join(found[:10])}{dots}"]
