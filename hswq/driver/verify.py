"""After writing: reopen the file and compare it with the plan and the source."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from torch import Tensor

from hswq.driver.job import Job
from hswq.errors import FormatError
from hswq.formats.reader import Checkpoint
from hswq.formats.writer import TensorSpec
from hswq.plan import Plan
from hswq.search import AmaxResult

# `spot` compares about this many FP8 layers and this many copied tensors, evenly spread.
SPOT_CHECKS = 16


def verify_output(job: Job, path: Path, plan: Plan, results: dict[str, AmaxResult]) -> None:
    """Reopen a complete file, before it takes its name, and compare it with job and source.

    Header and metadata are compared with the job, tensors with the source.

    `--verify spot` compares some tensors, `full` every one: FP8 layers are rounded anew from the
    source, all others compared byte for byte.

    Raises:
        FormatError: anything differs; the text names the tensor.
    """
    checkpoint = job.source.checkpoint
    with Checkpoint.open(path) as written:
        check_header(written, job.specs, job.metadata(plan))
        biases = job.biases()
        copied = [name for name in checkpoint.tensors if name not in {*results, *biases}]
        for key in chosen(list(results), job.config.verify):
            check_tensor(written, key, job.encode(key, checkpoint.read(key), results[key]))
        for key, bias in biases.items():
            check_tensor(written, key, bias)
        for key in chosen(copied, job.config.verify):
            check_copy(written, checkpoint, key)


def check_header(
    written: Checkpoint, specs: Iterable[TensorSpec], metadata: Mapping[str, str]
) -> None:
    """Compare the header of a file that was just written with what was planned.

    Raises:
        FormatError: a tensor or the metadata differ.
    """
    expected = {spec.name: (spec.dtype, tuple(spec.shape)) for spec in specs}
    found = {info.name: (info.dtype, tuple(info.shape)) for info in written.tensors.values()}
    for name in sorted(expected.keys() | found.keys()):
        if expected.get(name) != found.get(name):
            raise _damaged(f"{name!r} is {found.get(name)}, planned {expected.get(name)}")
    if written.metadata != metadata:
        raise _damaged("its metadata differ from the plan")


def check_copy(written: Checkpoint, source: Checkpoint, name: str) -> None:
    """Compare a tensor of a file that was just written with the source's, byte for byte.

    Raises:
        FormatError: they differ.
    """
    length = source.tensors[name].nbytes
    if written.read_bytes(name, 0, length) != source.read_bytes(name, 0, length):
        raise _damaged(f"the bytes of {name!r} differ from the source's")


def check_tensor(written: Checkpoint, name: str, expected: Tensor) -> None:
    """Compare a tensor of a file that was just written with what was to be written.

    Raises:
        FormatError: they differ in a bit.
    """
    found, wanted = (
        it.reshape(-1).view(torch.uint8) for it in (written.read(name), expected.cpu().contiguous())
    )
    if not torch.equal(found, wanted):
        raise _damaged(f"the values of {name!r} differ from what was made of the source")


def chosen(names: list[str], verify: str = "spot") -> list[str]:
    """Return the names whose tensors are compared, evenly spread."""
    step = 1 if verify == "full" else max(1, len(names) // SPOT_CHECKS)
    return names[::step]


def _damaged(what: str) -> FormatError:
    return FormatError(
        f"reading back the new file failed: {what}. The disk or memory is faulty, or the "
        "source changed meanwhile; nothing was written under the output's name: run again."
    )
