"""Measured impact of the layers, as plain data."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, field
from typing import Any

from hswq.errors import FormatError
from hswq.strict_json import parse_json


@dataclass(eq=False)
class Impact:
    """What quantizing each layer alone changes in the denoiser's output.

    Attributes:
        values: by layer name, the mean over calls of sum (y_q - y)^2 / sum y^2. That of a fused
            weight is divided among its layers by size, so that theirs add up to it. Empty before
            the measurement is complete.
        options: what the measurement depends on: rounding, scaled and the like.
        calls: recorded calls that were, or are to be, replayed.
        partial: of an interrupted measurement, the change in each call so far, by the first layer
            of a unit.
    """

    values: dict[str, float]
    options: dict[str, Any]
    calls: int
    partial: dict[str, tuple[float, ...]] = field(default_factory=dict)

    def to_json(self) -> str:
        """Return the measurement as JSON text."""
        content = {
            "values": self.values,
            "options": self.options,
            "calls": self.calls,
            "partial": self.partial,
        }
        return json.dumps(content, sort_keys=True)

    @classmethod
    def from_json(cls, text: str) -> Impact:
        """Read what `to_json` wrote.

        Raises:
            FormatError: the text is damaged.
        """
        try:
            content = parse_json(text, "it", constants=True)
            values = {str(name): float(value) for name, value in content["values"].items()}
            partial = {
                str(name): tuple(map(float, changes))
                for name, changes in content["partial"].items()
            }
            found = cls(values, dict(content["options"]), int(content["calls"]), partial)
        except (FormatError, ValueError, TypeError, LookupError, AttributeError) as error:
            raise FormatError(f"the measured impact is damaged: {error}.") from error
        if any(math.isnan(value) or value < 0.0 for value in values.values()):
            raise FormatError("the measured impact is damaged: a value is negative or NaN.")
        return found
