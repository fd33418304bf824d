"""The plan: one decision a layer, saved as JSON with a schema version."""

from __future__ import annotations

import dataclasses
import json
import math
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hswq.errors import FormatError
from hswq.search import AmaxResult

PLAN_VERSION = 1


@dataclass(frozen=True)
class LayerPlan:
    """What happens to one layer and why.

    Attributes:
        name: layer name, the checkpoint key without prefix and '.weight'.
        kind: 'linear' or 'conv2d'.
        shape: shape of the weight.
        quantized: True for FP8, False where the layer keeps its 16-bit or 32-bit weight.
        scaled: True where a scale is stored and applied (V2).
        reason: why, in a few words.
        sensitivity: output variance S of the calibration; None without a counted call.
        impact: relative squared change of the denoiser's output when this layer alone is quantized;
            None where it was not measured.
        amax: threshold found by the search; None before the search and for kept layers.
        mse: objective J at amax.
        relative_mse: J over the weighted power of the weight.
    """

    name: str
    kind: str
    shape: tuple[int, ...]
    quantized: bool
    scaled: bool
    reason: str
    sensitivity: float | None = None
    impact: float | None = None
    amax: float | None = None
    mse: float | None = None
    relative_mse: float | None = None

    @property
    def numel(self) -> int:
        """Number of weights."""
        return math.prod(self.shape)

    @property
    def sqnr_db(self) -> float | None:
        """Predicted importance-weighted signal to quantization noise ratio in dB."""
        if not self.relative_mse:
            return None
        return -10.0 * math.log10(self.relative_mse)

    def with_search(self, result: AmaxResult) -> LayerPlan:
        """Return the same decision with what the search found."""
        return dataclasses.replace(
            self, amax=result.amax, mse=result.mse, relative_mse=result.relative_mse
        )


@dataclass(frozen=True)
class CurvePoint:
    """A plan that keeps the layers which rank first.

    Attributes:
        kept: how many layers the budget keeps.
        kept_bytes: their share of the weights that the budget decides on.
        file_bytes: size of the file.
        error: predicted relative squared change of the denoiser's output: the impacts of all
            quantized layers, added up as if they were independent.
    """

    kept: int
    kept_bytes: float
    file_bytes: int
    error: float


@dataclass(frozen=True)
class Plan:
    """All decisions for one model.

    Attributes:
        layers: one entry a layer, in the order of the model.
        options: the options that shaped the plan.
        source_bytes: size of what is quantized (file, or state dict of a module).
        predicted_bytes: its size after quantization.
        curve: predicted error against size for other budgets, where impact was measured; part of
            no file's metadata.
    """

    layers: tuple[LayerPlan, ...]
    options: dict[str, Any]
    source_bytes: int
    predicted_bytes: int
    curve: tuple[CurvePoint, ...] = ()

    @property
    def quantized(self) -> tuple[LayerPlan, ...]:
        """The layers that become FP8."""
        return tuple(layer for layer in self.layers if layer.quantized)

    @property
    def kept(self) -> tuple[LayerPlan, ...]:
        """The layers that stay as they are."""
        return tuple(layer for layer in self.layers if not layer.quantized)

    @property
    def predicted_error(self) -> float | None:
        """The impacts of all quantized layers, added up; None where one was not measured."""
        impacts = [layer.impact for layer in self.quantized]
        known = [impact for impact in impacts if impact is not None]
        return math.fsum(known) if len(known) == len(impacts) else None

    def to_dict(self) -> dict[str, Any]:
        """Return the plan as JSON-ready data."""
        return {
            "plan_version": PLAN_VERSION,
            "options": self.options,
            "source_bytes": self.source_bytes,
            "predicted_bytes": self.predicted_bytes,
            "layers": [dataclasses.asdict(layer) for layer in self.layers],
            **({"curve": [dataclasses.asdict(it) for it in self.curve]} if self.curve else {}),
        }

    @classmethod
    def from_dict(cls, data: Any, where: str) -> Plan:
        """Rebuild a plan from `to_dict`'s data.

        Raises:
            FormatError: data is no plan, or of another version; `where` names its origin.
        """
        if not isinstance(data, dict) or "plan_version" not in data:
            raise FormatError(f"{where} is not an hswq plan: it has no 'plan_version'.")
        if data["plan_version"] != PLAN_VERSION:
            raise FormatError(
                f"{where} has plan version {data['plan_version']!r}; this hswq reads version "
                f"{PLAN_VERSION}: make the plan again with this release."
            )
        try:
            layers = tuple(
                LayerPlan(**{**entry, "shape": tuple(entry["shape"])}) for entry in data["layers"]
            )
            return cls(
                layers,
                dict(data["options"]),
                int(data["source_bytes"]),
                int(data["predicted_bytes"]),
                tuple(CurvePoint(**entry) for entry in data.get("curve", ())),
            )
        except (KeyError, TypeError, ValueError) as error:
            raise FormatError(f"{where} is a damaged hswq plan: {error}.") from error

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the plan as JSON, replacing `path` at once."""
        target = Path(path)
        temporary = target.with_name(f".{target.name}.tmp")
        temporary.write_text(json.dumps(self.to_dict(), indent=1) + "\n", encoding="utf-8")
        os.replace(temporary, target)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Plan:
        """Read a plan that `save` wrote.

        Raises:
            FormatError: the file is not JSON, no plan, or of another version.
        """
        try:
            data = json.loads(Path(path).read_text(encoding="utf-8"))
        except (ValueError, RecursionError) as error:
            raise FormatError(f"{path} is not an hswq plan: it is not JSON ({error}).") from error
        return cls.from_dict(data, str(path))

    def table(self) -> str:
        """Return the layers as a text table, most sensitive first."""
        rows = [("layer", "shape", "sensitivity", "impact", "becomes", "SQNR dB", "why")]
        for layer in sorted(self.layers, key=_by_falling_sensitivity):
            becomes = ("e4m3 * scale" if layer.scaled else "e4m3") if layer.quantized else "kept"
            rows.append(
                (
                    layer.name,
                    "x".join(map(str, layer.shape)),
                    "-" if layer.sensitivity is None else f"{layer.sensitivity:.4g}",
                    "-" if layer.impact is None else f"{layer.impact:.3g}",
                    becomes,
                    "-" if layer.sqnr_db is None else f"{layer.sqnr_db:.2f}",
                    layer.reason,
                )
            )
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        return "\n".join(
            "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
            for row in rows
        )


def _by_falling_sensitivity(layer: LayerPlan) -> tuple[float, str]:
    known = math.inf if layer.sensitivity is None else layer.sensitivity
    return (-known, layer.name)
