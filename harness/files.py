"""Files as a run directory needs them: replaced in one step, refused in words, never waited for."""

from __future__ import annotations

import errno
import os
import secrets
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO

from harness.errors import RunDirectoryError, StorageError


def write_all(fd: int, content: bytes, path: Path) -> None:
    """Write in one piece; where the disk takes only a part, OSError says why it takes no more."""
    written = os.write(fd, content)
    while written < len(content):
        more = os.write(fd, content[written:])
        if not more:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
        written += more


def is_file(path: Path) -> bool:
    """Whether there is such a file; False too for a name that no file can have."""
    try:
        return path.is_file()
    except (OSError, ValueError):
        return False


def open_regular(path: Path) -> IO[bytes]:
    """Open a file for reading. Raises OSError, for a pipe or a device too: who waits for somebody
    to write into it, or reads it to its end, may do so for ever."""
    if "\0" in str(path):
        raise OSError(errno.ENOENT, os.strerror(errno.ENOENT), str(path))
    file = os.fdopen(os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK), "rb")
    if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
        file.close()
        raise OSError(errno.EINVAL, "not a regular file", str(path))
    return file


_LARGEST = 1 << 28
"""Bytes of a file with one object."""

_ADVICE = {
    errno.ENOSPC: "free some space",
    errno.EDQUOT: "free some of your quota",
    errno.EFBIG: "raise the limit on the size of files (ulimit -f)",
    errno.EROFS: "have its file system mounted for writing",
    errno.EACCES: "make it writable",
    errno.EPERM: "make it writable",
    errno.ENOENT: "it was moved, removed or unmounted",
    errno.ESTALE: "it was moved, removed or unmounted",
    errno.EIO: "look after its file system",
}


def storage_error(path: Path, error: OSError) -> StorageError:
    """What has kept a run from being recorded in ``path``, and what to do about it."""
    where = error.filename if isinstance(error.filename, str) else str(path)
    advice = _ADVICE.get(error.errno or 0, "look after its file system")
    return StorageError(
        f"{where}: {error.strerror or error}; {advice}. What was written before is whole, and the "
        "run goes on from its newest checkpoint once it can write there"
    )


@contextmanager
def storing(path: Path) -> Iterator[None]:
    """Around what writes to a run directory: raises StorageError where that fails."""
    try:
        yield
    except OSError as error:
        raise storage_error(path, error) from None


@contextmanager
def creating(path: Path, instead: str) -> Iterator[None]:
    """Around what makes a directory: raises RunDirectoryError where that fails; ``instead``: what
    to choose another of."""
    try:
        yield
    except OSError as error:
        raise RunDirectoryError(
            f"{path} cannot be created: {error.strerror}; choose another {instead}"
        ) from None


def make_directory(path: Path, instead: str) -> bool:
    """Make a directory if it is not there yet; whether it was not. Of several processes that begin
    at once, one has made it. Raises as ``creating`` does."""
    with creating(path, instead):
        try:
            path.mkdir(parents=True)
        except FileExistsError:
            if not path.is_dir():
                raise
            return False
    return True


def partial_name(path: Path) -> Path:
    """Where to write what is then given the name ``path``: beside it, under a name that nobody can
    have taken before, as with a link to another file. To be opened with mode x."""
    return path.with_name(f".{path.name}.{secrets.token_hex(8)}.tmp")


def write_atomic(path: Path, content: bytes) -> None:
    """Replace a file in one step: readers see the old bytes or the new ones, also after a crash."""
    with replacing(path) as file:
        file.write(content)


@contextmanager
def replacing(path: Path) -> Iterator[IO[bytes]]:
    """A file to write that takes the place of ``path`` in one step, if nothing is raised."""
    partial = partial_name(path)
    try:
        with partial.open("xb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    finally:
        with suppress(OSError):  # as a directory that was made read-only
            partial.unlink(missing_ok=True)
    sync_directory(path.parent)


def sync_directory(path: Path) -> None:
    """Wait until the names in a directory are on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def read_text(path: Path, most: int = _LARGEST) -> str:
    """A file of UTF-8 text. Raises OSError and ValueError, as what is no regular file or has more
    than ``most`` bytes does."""
    with open_regular(path) as file:
        size = os.fstat(file.fileno()).st_size
        if size > most:
            raise OSError(errno.EFBIG, f"more than {most} bytes", str(path))
        return file.read(size).decode()
