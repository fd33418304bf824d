"""What a file holds, read from its headers."""

from __future__ import annotations

import os
from collections import Counter
from pathlib import Path
from typing import Any

from hswq.calibration import Calibration, is_statistics
from hswq.errors import InputError
from hswq.formats.quantized import detect_container, quantized_weights
from hswq.formats.reader import Checkpoint, is_index
from hswq.models.detect import detect
from hswq.plan import Plan
from hswq.strict_json import parse_any


def inspect_path(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Describe a checkpoint, a statistics file or a plan.

    Args:
        path: checkpoint (file, sharded index, folder), statistics file, or plan JSON.
    Returns:
        JSON-ready data; 'kind' is 'checkpoint', 'statistics' or 'plan'.
    Raises:
        InputError: the path does not exist or is of no known kind.
        FormatError: the file is damaged.
    """
    target = Path(path)
    if target.suffix == ".json" and not is_index(target):
        return _describe_plan(target)
    with Checkpoint.open(target) as checkpoint:
        if is_statistics(checkpoint):
            return _describe_statistics(target)
        return _describe_checkpoint(checkpoint)


def _describe_plan(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise InputError(f"{str(path)!r} does not exist: give the path of a plan or a checkpoint.")
    plan = Plan.load(path)
    return {
        "kind": "plan",
        "path": str(path),
        "layers": len(plan.layers),
        "quantized": len(plan.quantized),
        "kept": [layer.name for layer in plan.kept],
        "source_bytes": plan.source_bytes,
        "predicted_bytes": plan.predicted_bytes,
        "options": plan.options,
    }


def _describe_statistics(path: Path) -> dict[str, Any]:
    calibration = Calibration.load(path)
    return {
        "kind": "statistics",
        "path": str(path),
        "layers": len(calibration.modules),
        "samples": len(calibration.samples),
        "uncounted": [name for name in calibration.modules if not calibration.calls(name)],
        "skipped_calls": {
            name: calibration.skipped(name)
            for name in calibration.modules
            if calibration.skipped(name)
        },
        "fingerprint": calibration.fingerprint,
        "settings": calibration.settings,
    }


def _describe_checkpoint(checkpoint: Checkpoint) -> dict[str, Any]:
    bytes_by_dtype: Counter[str] = Counter()
    tensors_by_dtype: Counter[str] = Counter()
    for info in checkpoint.tensors.values():
        bytes_by_dtype[info.dtype] += info.nbytes
        tensors_by_dtype[info.dtype] += 1
    try:
        detection = detect(checkpoint)
        family: str | None = f"{detection.family} ({detection.layout} layout)"
        prediction: str | None = detection.prediction_type
    except InputError:
        # What inspect is asked to describe need not be something that quantize accepts.
        family = prediction = None
    metadata = dict(checkpoint.metadata)
    plan = stored_plan(checkpoint)
    quantized = quantized_weights(checkpoint)
    return {
        "kind": "checkpoint",
        "path": str(checkpoint.path),
        "files": len(checkpoint.files),
        "file_bytes": sum(path.stat().st_size for path in checkpoint.files),
        "family": family,
        "prediction_type": prediction,
        "container": detect_container(checkpoint),
        "tensors": len(checkpoint.tensors),
        "dtypes": {
            dtype: {"tensors": tensors_by_dtype[dtype], "bytes": size}
            for dtype, size in sorted(bytes_by_dtype.items())
        },
        "quantized_layers": len(quantized),
        "scaled_layers": sum(weight.scale_key is not None for weight in quantized.values()),
        "kept_layers": None if plan is None else [layer.name for layer in plan.kept],
        "options": None if plan is None else plan.options,
        "metadata": {key: text for key, text in metadata.items() if not _is_bulky(key)},
    }


def stored_plan(checkpoint: Checkpoint) -> Plan | None:
    """Return the plan in a file's metadata; None where there is none.

    Raises:
        FormatError: it is damaged.
    """
    if "hswq.plan" not in checkpoint.metadata:
        return None
    where = f"'hswq.plan' in the metadata of {checkpoint.path}"
    data = parse_any(checkpoint.metadata["hswq.plan"], where, constants=True)
    return Plan.from_dict(data, where)


def _is_bulky(key: str) -> bool:
    return key in ("hswq.plan", "_quantization_metadata")
