"""Writing a safetensors file as a stream, tensors in any order; it appears only when complete."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import io
import os
import platform
import secrets
import shutil
import zlib
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import BinaryIO

import torch
from torch import Tensor

from hswq.errors import InputError
from hswq.formats.dtypes import DTYPES
from hswq.formats.layout import Layout, TensorSpec

__all__ = [
    "CheckpointWriter",
    "TensorSpec",
    "check_room",
    "place_copy",
    "remove_abandoned",
    "write_whole",
]

# One pwrite moves at most 2**31 - 4096 bytes on Linux.
_WRITE_BYTES = 1 << 30
_COPIED_BYTES = 32 << 20
_HASHED_BYTES = 4 << 20
# With the machine in it: where disks are shared, locks of others may not be seen.
_PARTIAL = f".hswq-{zlib.crc32(platform.node().encode()):08x}-*.partial"
_DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_CURES = {
    errno.ENOENT: "its folder does not exist: create it, or give another path",
    errno.ENOTDIR: "part of the path is a file: give another path",
    errno.EACCES: "its folder is not writable: change the permissions, or give another path",
    errno.EPERM: "its folder is not writable: change the permissions, or give another path",
    errno.EROFS: "the disk is mounted read-only: give a path on another disk",
    errno.ELOOP: "its symbolic links form a loop: remove them, or give another path",
}


def check_room(path: str | os.PathLike[str], least_bytes: int) -> None:
    """Refuse a target whose disk cannot hold a file of at least this size.

    A writer reserves its space itself; this is for work that comes long before it.

    Raises:
        InputError: less is free. A file system that does not tell its size passes.
    """
    target = Path(os.path.realpath(path))
    free = _free_bytes(target)
    if free is not None and free < least_bytes:
        raise _does_not_fit(target, f"at least {least_bytes}", free, errno.ENOSPC)


class CheckpointWriter:
    """Context manager that writes one safetensors file.

    Bytes go to a hidden file beside the target, whose space is reserved on entry; `commit` moves it
    to the target's name. Leaving without commit removes it and leaves an older target as it was.
    What a killed process left behind is removed by the next writer in the folder.

    Args:
        path: the target; a symbolic link is followed.
        specs: every tensor.
        metadata_bytes: upper bound of the metadata as JSON in UTF-8; 0 where there are none.
    Raises:
        InputError: the specs cannot be written (see Layout.of); on entry: the folder is missing or
            not writable, the target is no regular file, or the disk is too small.
    """

    def __init__(
        self, path: str | os.PathLike[str], specs: Iterable[TensorSpec], metadata_bytes: int
    ) -> None:
        self.path = Path(os.path.realpath(path))
        self._layout = Layout.of(specs, metadata_bytes)
        self._written: dict[str, int] = {}
        # It gets its name when it is made.
        self._temporary = self.path
        self._descriptor: int | None = None

    @classmethod
    def predict_file_bytes(cls, specs: Iterable[TensorSpec], metadata_bytes: int) -> int:
        """Return the size of the file that a writer with these arguments would write.

        Raises:
            InputError: the specs cannot be written.
        """
        return Layout.of(specs, metadata_bytes).file_bytes

    @property
    def file_bytes(self) -> int:
        """Size of the whole file, known before it is written."""
        return self._layout.file_bytes

    def __enter__(self) -> CheckpointWriter:
        if os.path.lexists(self.path) and not os.path.isfile(self.path):
            what = "a folder" if os.path.isdir(self.path) else "no regular file"
            raise InputError(f"{self.path} cannot be written: it is {what}. Give another path.")
        try:
            remove_abandoned(self.path.parent)
            self._descriptor, self._temporary = _create_locked(self.path.parent)
            self._reserve(self._descriptor)
        except OSError as error:
            self._discard()
            raise self._refused(error) from error
        except BaseException:
            self._discard()
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._discard()

    def write(self, name: str, data: Tensor | bytes | memoryview) -> None:
        """Write a whole tensor.

        Args:
            name: one of the specs.
            data: tensor of the spec's shape and dtype, on any device, where uint8 may stand for the
                codes of any one-byte dtype; or all its bytes.
        Raises:
            InputError: unknown name, written before, wrong dtype, shape or size, or the disk
                refuses.
        """
        spec = self._spec(name)
        if name in self._written:
            raise InputError(f"tensor {name!r} of {self.path} was already written.")
        if isinstance(data, Tensor) and tuple(data.shape) != tuple(spec.shape):
            raise InputError(
                f"tensor {name!r} of {self.path} is planned as {list(spec.shape)} and was given as "
                f"{list(data.shape)}."
            )
        view = _bytes_of(spec, data)
        if len(view) != spec.nbytes:
            raise InputError(
                f"tensor {name!r} of {self.path} takes {spec.nbytes} bytes, {len(view)} were given."
            )
        self._write_at(name, 0, view)

    def write_chunk(self, name: str, offset: int, data: Tensor | bytes | memoryview) -> None:
        """Write the next bytes of a tensor.

        Args:
            name: one of the specs.
            offset: byte in the tensor; the chunks of one tensor follow each other without holes.
            data: tensor of the spec's dtype (or uint8, as in `write`), or bytes.
        Raises:
            InputError: unknown name, not the next bytes, more than the tensor holds, wrong dtype,
                or the disk refuses.
        """
        spec = self._spec(name)
        view = _bytes_of(spec, data)
        done = self._written.get(name, 0)
        if offset != done or offset + len(view) > spec.nbytes:
            raise InputError(
                f"bytes {offset} to {offset + len(view)} of tensor {name!r} of {self.path} were "
                f"given: the next byte is {done}, the last {spec.nbytes}."
            )
        self._write_at(name, offset, view)

    def commit(
        self,
        metadata: Mapping[str, str],
        verify: Callable[[Path], None] | None = None,
        *,
        digest: bool = False,
    ) -> str:
        """Write the header and move the complete file to the target's name.

        Tensors without elements need not have been written.

        Args:
            metadata: text by key.
            verify: called with the path of the complete file before it takes the target's name; an
                error it raises leaves an older target as it was.
            digest: whether the SHA-256 of the file is wanted; it is taken while the disk syncs.
        Returns:
            The SHA-256 as 64 hexadecimal digits; empty where it is not wanted.
        Raises:
            InputError: a tensor is incomplete, the metadata are not text or larger than reserved,
                or the disk refuses.
        """
        missing = [
            spec.name
            for spec in self._layout.specs.values()
            if self._written.get(spec.name, 0) < spec.nbytes
        ]
        if missing:
            raise InputError(
                f"{len(missing)} tensors of {self.path} were not written completely: "
                f"{', '.join(missing[:10])}{' …' if len(missing) > 10 else ''}."
            )
        start = self._layout.start(metadata)
        descriptor = self._open_descriptor()
        try:
            _write_all(descriptor, memoryview(start), 0)
            with ThreadPoolExecutor(1) as pool:
                found = pool.submit(_sha256, descriptor if digest else None)
                os.fsync(descriptor)
                sha256 = found.result()
            # Somebody may have removed the folder meanwhile.
            os.stat(self._temporary)
        except OSError as error:
            raise self._refused(error) from error
        if verify is not None:
            verify(self._temporary)
        try:
            os.replace(self._temporary, self.path)
        except OSError as error:
            raise self._refused(error) from error
        self._descriptor = None
        os.close(descriptor)
        # The file is in place; some file systems cannot sync a folder.
        with contextlib.suppress(OSError):
            folder = os.open(self.path.parent, os.O_RDONLY)
            try:
                os.fsync(folder)
            finally:
                os.close(folder)
        return sha256

    def _spec(self, name: str) -> TensorSpec:
        if name not in self._layout.specs:
            raise InputError(f"tensor {name!r} is not planned for {self.path}.")
        return self._layout.specs[name]

    def _open_descriptor(self) -> int:
        if self._descriptor is None:
            raise InputError(f"{self.path} is not open: use a writer inside `with`, and once.")
        return self._descriptor

    def _write_at(self, name: str, offset: int, view: memoryview) -> None:
        try:
            _write_all(self._open_descriptor(), view, self._layout.offsets[name] + offset)
        except OSError as error:
            raise self._refused(error) from error
        self._written[name] = offset + len(view)

    def _reserve(self, descriptor: int) -> None:
        """Claim the disk space of the whole file, so that a full disk is told before the work."""
        try:
            os.posix_fallocate(descriptor, 0, self.file_bytes)
        except OSError as error:
            if error.errno in _DISK_FULL:
                raise
            # The file system cannot reserve: what is left is to look at its free space.
            free = _free_bytes(self.path)
            if free is not None and free < self.file_bytes:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)) from error
            os.ftruncate(descriptor, self.file_bytes)

    def _refused(self, error: OSError) -> InputError:
        return _refused(self.path, error, self.file_bytes)

    def _discard(self) -> None:
        """Close and remove the temporary file, unless it was committed."""
        if self._descriptor is None:
            return
        os.close(self._descriptor)
        self._descriptor = None
        self._temporary.unlink(missing_ok=True)


def place_copy(source: str | os.PathLike[str], path: str | os.PathLike[str]) -> None:
    """Give a complete file a second name, by a link where the disks allow one, else by a copy.

    Raises:
        InputError: the target cannot be written; an older one is as it was.
    """
    target = Path(os.path.realpath(path))
    try:
        remove_abandoned(target.parent)
        with open(source, "rb") as original:
            if not _place_link(original, Path(source), target):
                _place(original, target)
    except OSError as error:
        raise _refused(target, error, os.stat(source).st_size) from error


def write_whole(path: str | os.PathLike[str], data: bytes) -> None:
    """Write a small file, which takes its name when it is complete and on the disk.

    Args:
        path: the target; a symbolic link is followed. Devices and pipes are written to.
        data: all its bytes.
    Raises:
        InputError: the disk refuses; an older file is as it was.
    """
    given, target = Path(path), Path(os.path.realpath(path))
    try:
        if given.exists() and not given.is_file():
            given.write_bytes(data)
            return
        remove_abandoned(target.parent)
        _place(io.BytesIO(data), target)
    except OSError as error:
        raise _refused(target, error, len(data)) from error


def _place_link(original: BinaryIO, source: Path, target: Path) -> bool:
    """Link an open file to the target; False where the disks do not allow it."""
    # The link is the same file, whose lock says that somebody still needs that name too.
    with contextlib.suppress(OSError):
        fcntl.flock(original, fcntl.LOCK_EX | fcntl.LOCK_NB)
    temporary = _partial_path(target.parent)
    try:
        try:
            os.link(source, temporary)
        except OSError:
            return False
        os.replace(temporary, target)
    finally:
        # Where the two were already one file, moving changes nothing, and the third name stays.
        temporary.unlink(missing_ok=True)
    return True


def _place(content: BinaryIO, target: Path) -> None:
    """Write the target beside itself, sync, and move it there; nothing is left if that fails."""
    descriptor, temporary = _create_locked(target.parent)
    # Locked until it has its name.
    with open(descriptor, "wb") as file:
        try:
            shutil.copyfileobj(content, file, _COPIED_BYTES)
            file.flush()
            os.fsync(file.fileno())
            os.replace(temporary, target)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise


def remove_abandoned(folder: Path) -> None:
    """Remove the hidden files of writers that were killed: nobody holds their locks any more."""
    for path in folder.glob(_PARTIAL):
        # It may vanish or be another user's; and some file systems know no locks.
        with contextlib.suppress(OSError):
            descriptor = os.open(path, os.O_RDWR)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                path.unlink()
            finally:
                os.close(descriptor)


def _partial_path(folder: Path) -> Path:
    """Return a name beside the target that does not grow with the target's, which may be as long as
    the file system allows."""
    return folder / _PARTIAL.replace("*", secrets.token_hex(8))


def _create_locked(folder: Path) -> tuple[int, Path]:
    """Create a file whose lock says that its writer lives; return its descriptor and path."""
    while True:
        path = _partial_path(folder)
        # The umask applies, as to any new file.
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, mode=0o666)
        taken = False
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            # Another writer has taken it for abandoned before it was locked, and will remove it.
            taken = True
        except OSError:
            # Some file systems know no locks.
            pass
        if not taken and os.fstat(descriptor).st_nlink:
            return descriptor, path
        os.close(descriptor)


def _free_bytes(target: Path) -> int | None:
    """Return what is free on the disk of a file; None where the file system does not tell."""
    try:
        found = os.statvfs(target.parent)
    except OSError:
        return None
    return found.f_bavail * found.f_frsize if found.f_blocks else None


def _refused(target: Path, error: OSError, needed: int) -> InputError:
    """Return the error of a disk that refuses."""
    if error.errno in _DISK_FULL:
        return _does_not_fit(target, str(needed), _free_bytes(target), error.errno or 0)
    cure = _CURES.get(error.errno or 0, f"{error.strerror}; give another path")
    return InputError(f"{target} cannot be written: {cure}.")


def _does_not_fit(target: Path, needed: str, free: int | None, reason: int) -> InputError:
    return InputError(
        f"{target} does not fit on the disk: it needs {needed} bytes, and "
        f"{'too few' if free is None else free} are free ({os.strerror(reason)}). Free disk space "
        "or quota, or give a path on another disk."
    )


def _sha256(descriptor: int | None) -> str:
    if descriptor is None:
        return ""
    digest = hashlib.sha256()
    buffer = bytearray(_HASHED_BYTES)
    offset = 0
    while count := os.preadv(descriptor, [buffer], offset):
        digest.update(memoryview(buffer)[:count])
        offset += count
    return digest.hexdigest()


def _bytes_of(spec: TensorSpec, data: Tensor | bytes | memoryview) -> memoryview:
    if not isinstance(data, Tensor):
        return memoryview(data).cast("B")
    expected = DTYPES[spec.dtype]
    is_codes = data.dtype == torch.uint8 and expected.itemsize == 1
    if data.dtype != expected and not is_codes:
        raise InputError(
            f"tensor {spec.name!r} is planned as {spec.dtype} and was given as {data.dtype}."
        )
    flat = data.detach().cpu().contiguous().reshape(-1)
    return flat.view(torch.uint8).numpy().data


def _write_all(descriptor: int, view: memoryview, offset: int) -> None:
    done = 0
    while done < len(view):
        done += os.pwrite(descriptor, view[done : done + _WRITE_BYTES], offset + done)
