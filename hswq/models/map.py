"""Which rows of which checkpoint tensor feed which parameter of the denoiser: plain data.

A map is traced once (`hswq.models.trace`) and stored with the statistics, so that converting with
given statistics imports neither diffusers nor transformers.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from math import prod

from hswq.errors import FormatError
from hswq.strict_json import parse_json

SCHEMA = 1


@dataclass(frozen=True)
class ModuleSpec:
    """One nn.Linear or nn.Conv2d of the denoiser.

    Attributes:
        name: dotted module name, as `named_modules` gives it.
        kind: 'linear' or 'conv2d'.
        shape: shape of the weight, [O, I] or [O, I / groups, H, W].
        groups: groups of a convolution; 1 for a linear.
        bias: whether the module has one.
    """

    name: str
    kind: str
    shape: tuple[int, ...]
    groups: int = 1
    bias: bool = True

    @property
    def in_channels(self) -> int:
        """Channels of the module's input, over all groups."""
        return self.shape[1] * self.groups

    @property
    def numel(self) -> int:
        """Number of weights."""
        return prod(self.shape)


@dataclass(frozen=True)
class Source:
    """Rows `start` to `stop` (exclusive) of the checkpoint tensor `key`."""

    key: str
    start: int
    stop: int


@dataclass(frozen=True)
class Unit:
    """One weight tensor of the checkpoint: the unit of decision.

    Attributes:
        name: the key without the denoiser's prefix and without '.weight'.
        key: the key in the checkpoint.
        modules: the modules its rows feed, in row order; several for a fused weight.
        rows: for each of `modules`, the first row it takes and the row after its last.
        kind: 'linear' or 'conv2d'.
        shape: shape of the checkpoint tensor.
    """

    name: str
    key: str
    modules: tuple[ModuleSpec, ...]
    rows: tuple[tuple[int, int], ...]
    kind: str
    shape: tuple[int, ...]

    @property
    def numel(self) -> int:
        """Number of weights."""
        return prod(self.shape)


@dataclass(frozen=True)
class ModelMap:
    """The denoiser's modules and where each of its parameters comes from.

    Attributes:
        family: 'sdxl'.
        layout: 'ldm' or 'diffusers': how the checkpoint names its tensors.
        prefix: what the denoiser's keys start with in the checkpoint; may be empty.
        diffusers_version: version whose converter and classes the map was traced from.
        modules: every Linear and Conv2d, in `named_modules` order.
        sources: for each parameter and buffer of the denoiser's state dict, the rows it is made of.
        unmatched: the denoiser's keys that feed no parameter: markers without elements.
        shapes: shape of every checkpoint tensor that the map was traced from, by key.
    """

    family: str
    layout: str
    prefix: str
    diffusers_version: str
    modules: tuple[ModuleSpec, ...]
    sources: dict[str, tuple[Source, ...]]
    unmatched: tuple[str, ...] = ()
    shapes: dict[str, tuple[int, ...]] = field(default_factory=dict)

    def fits(self, layout: str, prefix: str, shapes: dict[str, tuple[int, ...]]) -> bool:
        """Tell whether a checkpoint of this layout and these tensor shapes has this map."""
        found = {
            key: shape
            for key, shape in shapes.items()
            if key.startswith(prefix) and key not in self.unmatched
        }
        return (layout, prefix, found) == (self.layout, self.prefix, self.shapes)

    def units(self) -> tuple[Unit, ...]:
        """Group the modules' weights by checkpoint tensor, in the order of the modules."""
        pieces: dict[str, list[tuple[Source, ModuleSpec]]] = {}
        for module in self.modules:
            for source in self.sources[f"{module.name}.weight"]:
                pieces.setdefault(source.key, []).append((source, module))
        return tuple(self._unit(key, found) for key, found in pieces.items())

    def _unit(self, key: str, found: list[tuple[Source, ModuleSpec]]) -> Unit:
        found = sorted(found, key=lambda piece: piece[0].start)
        first = found[0][1]
        return Unit(
            name=key.removeprefix(self.prefix).removesuffix(".weight"),
            key=key,
            modules=tuple(module for _, module in found),
            rows=tuple((source.start, source.stop) for source, _ in found),
            kind=first.kind,
            shape=(found[-1][0].stop, *first.shape[1:]),
        )

    def to_json(self) -> str:
        """Return the map as JSON text; equal maps give equal text."""
        content = {
            "schema": SCHEMA,
            "family": self.family,
            "layout": self.layout,
            "prefix": self.prefix,
            "diffusers_version": self.diffusers_version,
            "modules": [asdict(module) for module in self.modules],
            "sources": {
                name: [[source.key, source.start, source.stop] for source in sources]
                for name, sources in self.sources.items()
            },
            "unmatched": self.unmatched,
            "shapes": self.shapes,
        }
        return json.dumps(content, sort_keys=True, separators=(",", ":"))

    @classmethod
    def from_json(cls, text: str) -> ModelMap:
        """Read what `to_json` wrote.

        Raises:
            FormatError: the text is no model map, or one of another schema version.
        """
        try:
            content = parse_json(text, "the stored model map")
            schema = content.pop("schema")
        except (FormatError, KeyError) as error:
            raise FormatError("the stored model map is no JSON object with a schema.") from error
        if schema != SCHEMA:
            raise FormatError(
                f"the stored model map has schema {schema!r}, and this version reads {SCHEMA}: "
                "run `python -m hswq.fast calibrate` again."
            )
        try:
            modules = tuple(
                ModuleSpec(**(module | {"shape": tuple(module["shape"])}))
                for module in content.pop("modules")
            )
            sources = {
                name: tuple(Source(*source) for source in found)
                for name, found in content.pop("sources").items()
            }
            unmatched = tuple(content.pop("unmatched"))
            shapes = {key: tuple(shape) for key, shape in content.pop("shapes").items()}
            return cls(
                modules=modules, sources=sources, unmatched=unmatched, shapes=shapes, **content
            )
        except (TypeError, KeyError, AttributeError) as error:
            raise FormatError(f"the stored model map is damaged: {error}.") from error
