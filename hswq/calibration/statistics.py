"""What the hooks measured: per-layer fixed-point sums that merge by integer addition."""

from __future__ import annotations

import itertools
import json
import logging
import math
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from hswq import __version__
from hswq.calibration.calls import Call
from hswq.calibration.codes import Codes, find_codes
from hswq.calibration.gram import Gram
from hswq.calibration.impact import Impact
from hswq.config import COMPENSATION, PRESETS
from hswq.errors import FormatError, InputError
from hswq.formats.dtypes import DTYPE_NAMES
from hswq.formats.reader import Checkpoint
from hswq.formats.writer import CheckpointWriter, TensorSpec
from hswq.kernels.fixed_point import (
    ABS_MEAN_BITS,
    MEAN_HIGH_BITS,
    MEAN_LOW_BITS,
    fixed_to_fraction,
)
from hswq.models.map import ModelMap
from hswq.progress import Progress, no_progress
from hswq.strict_json import parse_any

logger = logging.getLogger(__name__)

if TYPE_CHECKING:
    from torch import Tensor, nn

    from hswq.config import CalibrationConfig

STATISTICS_VERSION = "1"

_VERSION_KEY = "hswq.statistics_version"
_MEAN_BITS = MEAN_HIGH_BITS + MEAN_LOW_BITS


@dataclass(frozen=True, eq=False)
class LayerStatistics:
    """Sums over the calls of one layer, each call with equal weight.

    The sums are integers in units of a power of two, so that any split of the calls over runs and
    any order of merging gives the same bits.

    Attributes:
        kind: 'linear' or 'conv2d'.
        shape: shape of the weight, [O, I] or [O, I / groups, H, W].
        groups: groups of a convolution, else 1.
        calls: calls counted.
        skipped: calls whose tensors held NaN, Inf or values out of range; they add nothing.
        mean_y: sum of mean(y) in units of 2**-56, a Python integer of any size.
        mean_y2: sum of mean(y^2) in units of 2**-56.
        abs_mean: sum of mean |x| per input channel in units of 2**-32, int64 [I] on the CPU.
        input_max: largest finite |x| of all calls, a float32; None where it was not looked for.
    Raises:
        InputError: a sum is outside its range or abs_mean has another shape.
    """

    kind: str
    shape: tuple[int, ...]
    groups: int
    calls: int
    skipped: int
    mean_y: int
    mean_y2: int
    abs_mean: Tensor
    input_max: float | None = None

    def __post_init__(self) -> None:
        channels = self.shape[1] * self.groups
        if list(self.abs_mean.shape) != [channels]:
            raise InputError(
                f"importance sums have shape {list(self.abs_mean.shape)}; a {self.kind} weight "
                f"{list(self.shape)} with {self.groups} groups needs [{channels}]."
            )
        # A sum of two int64 that leaves the range turns negative, so this finds overflow too.
        if self.input_max is not None and not 0.0 <= self.input_max < math.inf:
            raise InputError(
                f"the largest input is {self.input_max}: the statistics are damaged, calibrate "
                "again."
            )
        negative = min(self.calls, self.skipped, self.mean_y2) < 0 or (self.abs_mean < 0).any()
        largest = max(abs(self.mean_y), self.mean_y2) >> MEAN_LOW_BITS
        if negative or largest >= 2**63:
            raise InputError(
                "a sum is negative or outside its range: the statistics are damaged, or hold more "
                "calls of huge activations than fit."
            )

    @property
    def layout(self) -> tuple[str, tuple[int, ...], int]:
        """Kind, weight shape and groups: what must agree for two layers to be the same."""
        return self.kind, self.shape, self.groups

    def merged(self, other: LayerStatistics) -> LayerStatistics:
        """Return the sums over the calls of both."""
        return LayerStatistics(
            *self.layout,
            calls=self.calls + other.calls,
            skipped=self.skipped + other.skipped,
            mean_y=self.mean_y + other.mean_y,
            mean_y2=self.mean_y2 + other.mean_y2,
            abs_mean=self.abs_mean + other.abs_mean,
            input_max=(
                None
                if self.input_max is None or other.input_max is None
                else max(self.input_max, other.input_max)
            ),
        )


@dataclass(eq=False)
class Calibration:
    """Statistics of every Linear and Conv2d of a denoiser, and what they were measured on.

    Attributes:
        modules: statistics by module name, in the order of the model.
        model_map: traced map from the checkpoint to the modules, where a checkpoint was calibrated.
        fingerprint: hash of that checkpoint's weights.
        settings: steps, latent, guidance, seed, hash of the prompts and the like; JSON values.
        samples: indices of the samples that were run.
        overflowed: those of them that ended in NaN or Inf.
        records: some calls of the denoiser, for measuring impact.
        impact: what quantizing each layer alone changes, where that was measured.
        shared_inputs: for Linears that got the inputs of one layer in every call, which.
        grams: Gram matrices of the layers' inputs, where they were gathered; not saved.
        codes: file of the layers' compensated codes, where there is one; not saved.
    """

    modules: dict[str, LayerStatistics] = field(default_factory=dict)
    model_map: ModelMap | None = None
    fingerprint: str | None = None
    settings: dict[str, Any] = field(default_factory=dict)
    samples: tuple[int, ...] = ()
    overflowed: tuple[int, ...] = ()
    records: tuple[Call, ...] = ()
    impact: Impact | None = None
    shared_inputs: dict[str, str] = field(default_factory=dict)
    grams: dict[str, Gram] = field(default_factory=dict)
    codes: Path | None = None

    def measured(self, codes: bool = True) -> dict[str, Any]:
        """Return what was measured: the levers of a plan that makes use of all of it.

        Args:
            codes: whether compensated codes are of interest; without, their file is not opened.
        Raises:
            FormatError: the file of codes is damaged.
        """
        found = dict(PRESETS["seed"])
        if self.impact is not None and self.impact.values:
            found["sensitivity"] = "impact"
        if codes and self.codes is not None and self.codes.is_file():
            with Codes(self.codes) as file:
                given = {name: file.options.get(name) for name in COMPENSATION}
                if (file.fingerprint, file.settings) == (self.fingerprint, self.run_settings()):
                    found |= {"rounding": "compensated", **given}
                else:
                    logger.warning("%s belongs to another calibration and is not used", self.codes)
        elif codes and self.grams:
            found |= {"rounding": "compensated", "bias_correction": True}
        return found

    def run_settings(self) -> dict[str, Any]:
        """Return what tells one calibration of a checkpoint from another, as JSON has it."""
        content = {**self.settings, "samples": self.samples}
        found: dict[str, Any] = json.loads(json.dumps(content))
        return found

    def calls(self, name: str) -> int:
        """Return how many calls of the layer were counted."""
        return self._layer(name).calls

    def skipped(self, name: str) -> int:
        """Return how many calls of the layer held NaN, Inf or values out of range."""
        return self._layer(name).skipped

    def importance(self, name: str) -> Tensor | None:
        """Return the mean over calls of mean |x| per input channel.

        I_c = abs_mean_c * 2**-32 / calls, computed in float64 and rounded to float32.

        Returns:
            float32 [I], or [G, I / G] for a convolution of G > 1 groups; None without a counted
            call.
        """
        layer = self._layer(name)
        if layer.calls == 0:
            return None
        mean = (layer.abs_mean.double() * 2.0**-ABS_MEAN_BITS / layer.calls).float()
        return mean if layer.groups == 1 else mean.reshape(layer.groups, -1)

    def sensitivity(self, name: str) -> float | None:
        """Return S = E[mean y^2] - (E[mean y])^2, or None without a counted call.

        The sums are exact integers and the difference is taken as a fraction, rounded once, so
        nothing cancels. Means rounded to the fixed-point step can leave a constant output
        slightly below 0; S is 0 there.
        """
        return self.joint_sensitivity({name: 1})

    def joint_sensitivity(self, rows: Mapping[str, int]) -> float | None:
        """Return S of the outputs of several layers taken as one, a fused weight's parts.

        E[mean y] and E[mean y^2] are the means over the layers, weighted by their rows.

        Args:
            rows: number of outputs of each layer, by name.
        Returns:
            None if one of them has no counted call.
        """
        if any(self._layer(name).calls == 0 for name in rows):
            return None
        means = [Fraction(0), Fraction(0)]
        for name, count in rows.items():
            layer = self._layer(name)
            weight = Fraction(count, sum(rows.values()) * layer.calls)
            for place, total in enumerate((layer.mean_y, layer.mean_y2)):
                means[place] += fixed_to_fraction(total, _MEAN_BITS) * weight
        mean, mean_square = means
        return max(0.0, float(mean_square - mean**2))

    def input_max(self, name: str) -> float | None:
        """Return the largest finite |x| of the layer; None where it was not looked for."""
        return self._layer(name).input_max

    def measured_impact(self, names: Iterable[str]) -> float | None:
        """Return the impact of several layers, a unit's; None where it was not measured."""
        if self.impact is None:
            return None
        values = [self.impact.values.get(name) for name in names]
        known = [value for value in values if value is not None]
        return sum(known) if len(known) == len(values) else None

    def measure_impact(
        self, module: nn.Module, config: CalibrationConfig, *, progress: Progress = no_progress
    ) -> Impact:
        """Replay the recorded calls with one unit quantized at a time.

        See `hswq.plan.impact.measure_impact`.
        """
        from hswq.plan.impact import measure_impact

        return measure_impact(module, self, config, progress=progress)

    def merge(self, other: Calibration) -> Calibration:
        """Return the statistics of both runs; the same bits in either order.

        Recorded calls are put together in the order of the samples; a measured impact, which
        belongs to the calls of one of them, is dropped.

        Raises:
            InputError: layers, settings, checkpoint or map differ, a sample is in both, or a sum
                leaves its range.
        """
        keys = self.settings.keys() | other.settings.keys()
        differing = sorted(k for k in keys if self.settings.get(k) != other.settings.get(k))
        for what, ours, theirs in (
            ("layers", self._layouts(), other._layouts()),
            (f"settings ({', '.join(differing)})", self.settings, other.settings),
            ("checkpoint fingerprints", self.fingerprint, other.fingerprint),
            ("model maps", self.model_map, other.model_map),
        ):
            if ours != theirs:
                raise InputError(
                    f"statistics cannot be merged: their {what} differ. Only runs of one "
                    "checkpoint with equal settings can be: calibrate again with equal ones."
                )
        twice = sorted(set(self.samples) & set(other.samples))
        if twice:
            raise InputError(
                f"statistics cannot be merged: samples {twice[:10]} are in both, and each may "
                "count once. Calibrate disjoint samples."
            )
        first, second = sorted((self, other), key=lambda part: part.samples)
        return Calibration(
            {name: layer.merged(other.modules[name]) for name, layer in self.modules.items()},
            self.model_map,
            self.fingerprint,
            dict(self.settings),
            tuple(sorted(self.samples + other.samples)),
            tuple(sorted(self.overflowed + other.overflowed)),
            records=first.records + second.records,
            shared_inputs={
                name: owner
                for name, owner in self.shared_inputs.items()
                if other.shared_inputs.get(name) == owner
            },
        )

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write a safetensors file, atomically; equal statistics write equal files.

        Tensors, all int64: 'calls' and 'skipped' [L], 'mean_y' and 'mean_y2' [L, 2] (units of
        2**-8, rest in units of 2**-56), and 'abs_mean.NAME' [I] for every layer. Where the largest
        inputs were looked for in all layers, 'input_max' [L], the bits of their float32. Recorded
        calls: 'call.N.K', the tensors of call N in their own dtypes, its structure in the metadata.

        Raises:
            InputError: the file cannot be written.
        """
        layers = self.modules.values()
        tensors = {
            "calls": _integers(layer.calls for layer in layers),
            "skipped": _integers(layer.skipped for layer in layers),
            "mean_y": split_pairs(layer.mean_y for layer in layers),
            "mean_y2": split_pairs(layer.mean_y2 for layer in layers),
        }
        largest = [layer.input_max for layer in layers if layer.input_max is not None]
        if len(largest) == len(self.modules):
            exact = torch.tensor(largest, dtype=torch.float32, device="cpu")
            tensors["input_max"] = exact.view(torch.int32).long()
        tensors |= {f"abs_mean.{name}": layer.abs_mean for name, layer in self.modules.items()}
        metadata = {
            _VERSION_KEY: STATISTICS_VERSION,
            "hswq.version": __version__,
            "hswq.layers": json.dumps([(name, *rest) for name, rest in self._layouts()]),
            "hswq.settings": json.dumps(self.settings, sort_keys=True),
            "hswq.samples": json.dumps(self.samples),
        }
        if self.model_map is not None:
            metadata["hswq.model_map"] = self.model_map.to_json()
        if self.fingerprint is not None:
            metadata["hswq.fingerprint"] = self.fingerprint
        if self.impact is not None:
            metadata["hswq.impact"] = self.impact.to_json()
        if self.overflowed:
            metadata["hswq.overflowed"] = json.dumps(self.overflowed)
        if self.shared_inputs:
            metadata["hswq.shared_inputs"] = json.dumps(self.shared_inputs, sort_keys=True)
        structures = []
        for number, call in enumerate(self.records):
            structure, parts = call.to_parts()
            structures.append(structure)
            tensors |= {f"call.{number}.{place}": part for place, part in enumerate(parts)}
        if structures:
            metadata["hswq.calls"] = json.dumps(structures)
        specs = [
            TensorSpec(key, DTYPE_NAMES[tensor.dtype], tuple(tensor.shape))
            for key, tensor in tensors.items()
        ]
        with CheckpointWriter(path, specs, len(json.dumps(metadata))) as writer:
            for key, tensor in tensors.items():
                writer.write(key, tensor)
            writer.commit(metadata)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Calibration:
        """Read a statistics file; compensated codes are looked for beside it.

        Raises:
            InputError: the file cannot be read.
            FormatError: it is no statistics file, of another version, or damaged.
        """
        with Checkpoint.open(path) as checkpoint:
            if not is_statistics(checkpoint):
                raise FormatError(
                    f"{path} is not a statistics file of hswq: its header has no "
                    f"{_VERSION_KEY!r}. Make one with `python -m hswq.fast calibrate`."
                )
            version = checkpoint.metadata[_VERSION_KEY]
            if version != STATISTICS_VERSION:
                raise FormatError(
                    f"{path} has statistics version {version!r}, this hswq reads version "
                    f"{STATISTICS_VERSION!r}: calibrate again, or use the hswq that wrote it."
                )
            try:
                found = cls._read(checkpoint)
                found.codes = find_codes(path)
                return found
            except FormatError as error:
                raise FormatError(f"{path}: {error}") from error
            except (LookupError, TypeError, ValueError) as error:
                raise FormatError(
                    f"{path} is a damaged statistics file ({error}): calibrate again."
                ) from error

    @classmethod
    def _read(cls, checkpoint: Checkpoint) -> Calibration:
        metadata = checkpoint.metadata
        floating = [
            key
            for key, info in checkpoint.tensors.items()
            if info.dtype != "I64" and not key.startswith("call.")
        ]
        if floating:
            raise TypeError(f"tensor {floating[0]!r} is not I64")
        layouts = _stored(metadata["hswq.layers"])
        largest: list[float] | list[None] = [None] * len(layouts)
        if "input_max" in checkpoint.tensors:
            bits = checkpoint.read("input_max").to(torch.int32)
            largest = bits.view(torch.float32).tolist()
        columns = zip(
            layouts,
            checkpoint.read("calls").tolist(),
            checkpoint.read("skipped").tolist(),
            join_pairs(checkpoint.read("mean_y")),
            join_pairs(checkpoint.read("mean_y2")),
            largest,
            strict=True,
        )
        modules = {}
        for (name, kind, shape, groups), calls, skipped, mean_y, mean_y2, input_max in columns:
            modules[name] = LayerStatistics(
                *(kind, tuple(shape), groups),
                *(calls, skipped, mean_y, mean_y2),
                checkpoint.read(f"abs_mean.{name}"),
                input_max,
            )
        stored_map, impact = metadata.get("hswq.model_map"), metadata.get("hswq.impact")
        structures = _stored(metadata.get("hswq.calls", "[]"))
        return cls(
            modules,
            None if stored_map is None else ModelMap.from_json(stored_map),
            metadata.get("hswq.fingerprint"),
            _stored(metadata["hswq.settings"]),
            tuple(_stored(metadata["hswq.samples"])),
            tuple(_stored(metadata.get("hswq.overflowed", "[]"))),
            tuple(
                Call.from_parts(text, _call_tensors(checkpoint, number))
                for number, text in enumerate(structures)
            ),
            None if impact is None else Impact.from_json(impact),
            dict(_stored(metadata.get("hswq.shared_inputs", "{}"))),
        )

    def _layer(self, name: str) -> LayerStatistics:
        if name not in self.modules:
            raise InputError(
                f"the statistics hold no layer {name!r} ({len(self.modules)} others): they were "
                "made for another model, or the `observe` block has not ended."
            )
        return self.modules[name]

    def _layouts(self) -> list[tuple[str, tuple[str, tuple[int, ...], int]]]:
        return [(name, layer.layout) for name, layer in self.modules.items()]


def _stored(text: str) -> Any:
    try:
        return parse_any(text, "a text of its metadata", constants=True)
    except FormatError as error:
        raise ValueError(str(error).rstrip(".")) from error


def _call_tensors(checkpoint: Checkpoint, number: int) -> list[Tensor]:
    keys = (f"call.{number}.{place}" for place in itertools.count())
    known = itertools.takewhile(lambda key: key in checkpoint.tensors, keys)
    return [checkpoint.read(key) for key in known]


def is_statistics(checkpoint: Checkpoint) -> bool:
    """Tell whether a safetensors file is a statistics file, of any version."""
    return _VERSION_KEY in checkpoint.metadata


def _integers(values: Iterable[Any]) -> Tensor:
    return torch.tensor(list(values), dtype=torch.int64, device="cpu")


def split_pairs(sums: Iterable[int]) -> Tensor:
    """Write sums in units of 2**-56 as int64 [L, 2]: units of 2**-8 and the rest in 2**-56."""
    low = (1 << MEAN_LOW_BITS) - 1
    return _integers((value >> MEAN_LOW_BITS, value & low) for value in sums)


def join_pairs(pairs: Tensor) -> list[int]:
    """Return int64 [L, 2] as sums in units of 2**-56; a low part may exceed one unit of 2**-8."""
    return [(high << MEAN_LOW_BITS) + low for high, low in pairs.tolist()]
