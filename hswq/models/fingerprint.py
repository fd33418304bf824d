"""Which weights a checkpoint holds, whatever file layout they are in."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator

from hswq.formats.reader import Checkpoint
from hswq.models.map import ModelMap, Source

SAMPLE_BYTES = 4096


def fingerprint(checkpoint: Checkpoint, model_map: ModelMap) -> str:
    """Hash the names, shapes, dtypes and sampled bytes of the denoiser's weights.

    SHA-256 over the Linear and Conv2d modules in order of their names; of each weight the first,
    the middle and the last 4 KiB are read. Single file, UNet-only file and diffusers folder of the
    same weights have the same fingerprint; the same weights in another dtype have another.

    Args:
        checkpoint: open checkpoint.
        model_map: the map traced for it.
    Returns:
        64 hexadecimal digits.
    Raises:
        FormatError: a file is damaged.
    """
    digest = hashlib.sha256()
    for module in sorted(model_map.modules, key=lambda module: module.name):
        sources = model_map.sources[f"{module.name}.weight"]
        info = checkpoint.tensors[sources[0].key]
        digest.update(f"{module.name} {list(module.shape)} {info.dtype}\n".encode())
        row_bytes = info.nbytes // info.shape[0]
        size = module.shape[0] * row_bytes
        length = min(SAMPLE_BYTES, size)
        for begin in (0, (size - length) // 2, size - length):
            for part in _read(checkpoint, sources, row_bytes, begin, begin + length):
                digest.update(part)
    return digest.hexdigest()


def _read(
    checkpoint: Checkpoint, sources: tuple[Source, ...], row_bytes: int, begin: int, end: int
) -> Iterator[bytes]:
    """Yield bytes `begin` to `end` of a weight whose rows lie in several checkpoint tensors."""
    position = 0
    for source in sources:
        size = (source.stop - source.start) * row_bytes
        low, high = max(begin - position, 0), min(end - position, size)
        if low < high:
            yield checkpoint.read_bytes(source.key, source.start * row_bytes + low, high - low)
        position += size
