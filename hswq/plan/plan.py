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
from hswq.formats.writer import write_whole
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
        mse: objective J at amax, which is that of nearest codes.
        relative_mse: J over the weighted power of the weight.
        rounding: 'nearest' or 'compensated', for an FP8 layer whose codes were made by the
            calibration; None where a file's codes are rounded as it is written, to nearest.
        output_sqnr_db: of such codes, the power of the layer's output over that of its change on
            the calibration's inputs; None where no usable Gram matrix tells it.
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
    rounding: str | None = None
    output_sqnr_db: float | None = None

    @property
    def numel(self) -> int:
        """Number of weights."""
        return math.prod(self.shape)

    @property
    def sqnr_db(self) -> float | None:
        """Predicted importance-weighted signal to quantization noise ratio of nearest codes, dB."""
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
        kept_bytes: the `--keep-bytes` that keeps them by impact: their share of all weights that
            could be quantized, rounded up to few decimals.
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
            "layers": [_layer_to_dict(layer) for layer in self.layers],
            **({"curve": [_finite(vars(it)) for it in self.curve]} if self.curve else {}),
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
                LayerPlan(**_numbers({**entry, "shape": tuple(entry["shape"])}))
                for entry in data["layers"]
            )
            return cls(
                layers,
                dict(data["options"]),
                int(data["source_bytes"]),
                int(data["predicted_bytes"]),
                tuple(CurvePoint(**_numbers(entry)) for entry in data.get("curve", ())),
            )
        except (KeyError, TypeError, ValueError) as error:
            raise FormatError(f"{where} is a damaged hswq plan: {error}.") from error

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the plan as JSON, replacing `path` at once.

        Raises:
            InputError: the file cannot be written.
        """
        text = json.dumps(self.to_dict(), indent=1, allow_nan=False)
        write_whole(path, f"{text}\n".encode())

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
        # What the search found describes nearest codes alone.
        ready = any(layer.rounding is not None for layer in self.layers)
        told = "output SQNR dB" if ready else "weighted SQNR dB"
        rows = [("layer", "shape", "sensitivity", "impact", "becomes", told, "why")]
        for layer in sorted(self.layers, key=_by_falling_sensitivity):
            becomes = ("e4m3 * scale" if layer.scaled else "e4m3") if layer.quantized else "kept"
            sqnr_db = layer.output_sqnr_db if ready else layer.sqnr_db
            rows.append(
                (
                    layer.name,
                    "x".join(map(str, layer.shape)),
                    "-" if layer.sensitivity is None else f"{layer.sensitivity:.4g}",
                    "-" if layer.impact is None else f"{layer.impact:.3g}",
                    becomes if layer.rounding is None else f"{becomes}, {layer.rounding}",
                    "-" if sqnr_db is None else f"{sqnr_db:.2f}",
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


def _layer_to_dict(layer: LayerPlan) -> dict[str, Any]:
    content = _finite(vars(layer))
    # Absent where codes are rounded as the file is written, as in the files of earlier releases.
    for name in ("rounding", "output_sqnr_db"):
        if content[name] is None:
            del content[name]
    return content


def _finite(content: dict[str, Any]) -> dict[str, Any]:
    """Write infinite numbers as text, for which JSON has no numbers; `_numbers` reads it."""
    return {
        name: str(value) if value in (math.inf, -math.inf) else value
        for name, value in content.items()
    }


def _numbers(content: dict[str, Any]) -> dict[str, Any]:
    return {
        name: float(value) if value in ("inf", "-inf") else value for name, value in content.items()
    }
