"""A checkpoint opened for quantization: what it is, and which key feeds which module."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from hswq.calibration import Calibration
from hswq.errors import InputError
from hswq.formats.quantized import is_quantized
from hswq.formats.reader import Checkpoint
from hswq.models.detect import Detection, denoiser_prefix, detect
from hswq.models.fingerprint import fingerprint
from hswq.models.map import ModelMap

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Source:
    """An open checkpoint and what its headers say."""

    checkpoint: Checkpoint
    detection: Detection

    @property
    def source_bytes(self) -> int:
        """Size of the checkpoint's files."""
        return sum(path.stat().st_size for path in self.checkpoint.files)

    def trace(self, pipeline: str | None) -> ModelMap:
        """Trace which rows of which key feed which module (imports diffusers)."""
        from hswq.models.trace import trace_map

        folder = Path(pipeline) if pipeline is not None else self.checkpoint.pipeline_dir
        return trace_map(self.checkpoint, self.detection, folder)

    def map_from(self, calibration: Calibration, pipeline: str | None) -> ModelMap:
        """Return the map stored with the statistics where it fits this file, else a traced one."""
        stored = calibration.model_map
        shapes = {info.name: info.shape for info in self.checkpoint.tensors.values()}
        if stored is not None and stored.fits(self.detection.layout, self.detection.prefix, shapes):
            return stored
        return self.trace(pipeline)


@contextmanager
def open_source(path: str | os.PathLike[str]) -> Iterator[Source]:
    """Open a checkpoint that can be quantized.

    Raises:
        InputError: the file is already quantized or of an unknown architecture.
        FormatError: the file is damaged or no safetensors file.
    """
    with Checkpoint.open(path) as checkpoint:
        found = is_quantized(checkpoint, denoiser_prefix(checkpoint))
        if found is not None:
            raise InputError(
                f"{path} is already quantized ({found}); quantizing twice only loses quality: "
                "give the 16-bit or 32-bit checkpoint it was made from."
            )
        yield Source(checkpoint, detect(checkpoint))


def check_statistics(
    source: Source, model_map: ModelMap, calibration: Calibration, where: str
) -> None:
    """Refuse statistics that were gathered on another checkpoint.

    Raises:
        InputError: a module is missing or of another shape, or the fingerprints differ.
    """
    for module in model_map.modules:
        known = calibration.modules.get(module.name)
        if known is None or tuple(known.shape) != tuple(module.shape):
            found = "do not know it" if known is None else f"have it as {list(known.shape)}"
            raise InputError(
                f"{where} are of another model: layer {module.name!r} is {list(module.shape)} in "
                f"{source.checkpoint.path}, and the statistics {found}. "
                "Run `python -m hswq.fast calibrate` on this checkpoint."
            )
    if calibration.fingerprint is None:
        logger.warning(
            "%s carry no fingerprint: that they belong to %s could not be checked",
            where,
            source.checkpoint.path,
        )
        return
    actual = fingerprint(source.checkpoint, model_map)
    if actual != calibration.fingerprint:
        raise InputError(
            f"{where} were gathered on another checkpoint: their fingerprint is "
            f"{calibration.fingerprint[:16]}…, that of {source.checkpoint.path} is {actual[:16]}…. "
            "Run `python -m hswq.fast calibrate` on this checkpoint."
        )
