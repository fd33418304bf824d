"""Compensated codes of every layer, kept beside the statistics: plans and files only choose."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

import torch

from hswq.errors import FormatError
from hswq.formats.reader import Checkpoint
from hswq.formats.writer import CheckpointWriter, TensorSpec
from hswq.strict_json import parse_json

if TYPE_CHECKING:
    from torch import Tensor

CODES_VERSION = "1"

_VERSION_KEY = "hswq.codes_version"
_WEIGHT, _SCALE, _BIAS = ".weight", ".scale", ".bias"
_SUFFIX = ".codes.safetensors"
_LONGEST_FLOAT = 2.2250738585072014e-308


@dataclass(frozen=True)
class UnitCodes:
    """How one weight was rounded.

    Attributes:
        amax: threshold of the search, as for its further figures.
        mse: see hswq.AmaxResult.
        max_abs: see hswq.AmaxResult.
        power: see hswq.AmaxResult.
        scaled: whether the codes are of the weight divided by a scale.
        compensated: False where nearest codes were better.
        error: E[(y_q - y)^2] on the calibration's inputs, added up over the outputs.
        nearest_error: the same of nearest codes.
        signal: E[y^2], or the variance where the bias is corrected.
    """

    amax: float
    mse: float
    max_abs: float
    power: float
    scaled: bool
    compensated: bool
    error: float
    nearest_error: float
    signal: float


def codes_path(statistics: str | os.PathLike[str]) -> Path:
    """Return where the codes belong: beside the statistics file, where a link to it leads."""
    return Path(os.path.realpath(statistics)).with_suffix(_SUFFIX)


def find_codes(statistics: str | os.PathLike[str]) -> Path | None:
    """Return the codes of a statistics file; None where there are none.

    Where hubs keep files under other names, both are found by links that lie side by side.
    """
    places = codes_path(statistics), Path(statistics).with_suffix(_SUFFIX)
    return next((path for path in places if path.is_file()), None)


class Codes:
    """An open file of codes; weights are read when they are asked for.

    Attributes:
        path: of the file.
        fingerprint: of the checkpoint whose weights were rounded.
        settings: of the calibration.
        options: how the weights were rounded.
        units: what was done, by the checkpoint's key of the weight.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        """Open a file that a `CodesWriter` wrote.

        Raises:
            InputError: the file cannot be read.
            FormatError: it is no file of codes, of another version, or damaged.
        """
        self.path = Path(path)
        self._file = Checkpoint.open(path)
        metadata = self._file.metadata
        try:
            version = metadata.get(_VERSION_KEY)
            if version != CODES_VERSION:
                found = "no file of codes" if version is None else f"of codes version {version!r}"
                raise FormatError(
                    f"{path} is {found}; this hswq reads version {CODES_VERSION!r}: make the codes "
                    "with `calibrate --rounding compensated`."
                )
            self.fingerprint = metadata["hswq.fingerprint"]
            stored = {
                key: parse_json(metadata[f"hswq.{key}"], f"'hswq.{key}' of {path}", constants=True)
                for key in ("settings", "options", "units")
            }
            self.settings: dict[str, Any] = stored["settings"]
            # Files from before there were sweeps do not tell of them.
            self.options: dict[str, Any] = {"sweeps": 0, **stored["options"]}
            self.units = {key: UnitCodes(**entry) for key, entry in stored["units"].items()}
        except (LookupError, TypeError, ValueError) as error:
            self._file.close()
            raise FormatError(f"{path} is a damaged file of codes ({error}).") from error
        except FormatError:
            self._file.close()
            raise

    def __enter__(self) -> Codes:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._file.close()

    def read(self, key: str, start: int | None = None, stop: int | None = None) -> Tensor:
        """Return the codes of a weight or of some of its rows, uint8."""
        return self._file.read(key, start, stop).view(torch.uint8)

    def scale(self, key: str) -> float:
        """Return the scale of a weight; 1 where it is not scaled."""
        return float(self._file.read(key.removesuffix(_WEIGHT) + _SCALE))

    def bias(self, key: str) -> Tensor | None:
        """Return the corrected bias of a weight, float32 [O]; None where it stays."""
        name = key.removesuffix(_WEIGHT) + _BIAS
        return self._file.read(name) if name in self._file.tensors else None


class CodesWriter:
    """Writes a file of codes unit by unit, in any order; it takes its name when it is complete.

    Args:
        path: the file.
        shapes: of every weight, by key.
        biases: keys of the weights whose biases will be corrected.
        fingerprint: of the checkpoint.
        settings: of the calibration.
        options: how the weights are rounded.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        shapes: Mapping[str, tuple[int, ...]],
        biases: Iterable[str],
        fingerprint: str,
        settings: Mapping[str, Any],
        options: Mapping[str, Any],
    ) -> None:
        self._units: dict[str, UnitCodes] = {}
        self._fixed = {
            _VERSION_KEY: CODES_VERSION,
            "hswq.fingerprint": fingerprint,
            "hswq.settings": json.dumps(settings, sort_keys=True),
            "hswq.options": json.dumps(options, sort_keys=True),
        }
        specs = []
        for key, shape in shapes.items():
            specs.append(TensorSpec(key, "F8_E4M3", shape))
            specs.append(TensorSpec(key.removesuffix(_WEIGHT) + _SCALE, "F32", ()))
        for key in biases:
            name = key.removesuffix(_WEIGHT) + _BIAS
            specs.append(TensorSpec(name, "F32", (shapes[key][0],)))
        floats = dict.fromkeys(
            ("amax", "mse", "max_abs", "power", "error", "nearest_error", "signal"), _LONGEST_FLOAT
        )
        longest = UnitCodes(**floats, scaled=False, compensated=False)
        room = len(json.dumps(self._metadata(dict.fromkeys(shapes, longest))).encode())
        self._writer = CheckpointWriter(path, specs, room)

    def __enter__(self) -> CodesWriter:
        self._writer.__enter__()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._writer.__exit__(kind, error, traceback)

    def write(
        self, key: str, codes: Tensor, scale: float, bias: Tensor | None, unit: UnitCodes
    ) -> None:
        """Write one weight's codes, its scale and, where it is corrected, its bias."""
        base = key.removesuffix(_WEIGHT)
        self._writer.write(key, codes.contiguous())
        self._writer.write(base + _SCALE, torch.tensor(scale, dtype=torch.float32))
        if bias is not None:
            self._writer.write(base + _BIAS, bias.float().contiguous())
        self._units[key] = unit

    def commit(self) -> None:
        """Complete the file."""
        self._writer.commit(self._metadata(self._units))

    def _metadata(self, units: Mapping[str, UnitCodes]) -> dict[str, str]:
        content = {key: asdict(units[key]) for key in sorted(units)}
        return {**self._fixed, "hswq.units": json.dumps(content)}
