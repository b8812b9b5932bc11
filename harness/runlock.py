"""The lock of a run directory."""

from __future__ import annotations

import errno
import fcntl
import os
import socket
import stat
import time
from contextlib import suppress
from datetime import UTC, datetime
from types import TracebackType
from typing import Self

from harness.errors import RunDirectoryError
from harness.rundir import RunDirectory

_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)


class RunLock:
    """An advisory lock that one process (rank 0) holds for as long as it writes to a run directory.

    It lives in the kernel, so it goes with the process that held it, however that died. On a shared
    file system it may also go with the network: no more than an early word that a run is in use.
    """

    def __init__(self, run: RunDirectory, name: str = "lock", needed: bool = False) -> None:
        """``needed``: refuse a file system without locks; else do without, as attempts are kept
        apart by their folders."""
        self._path = run.path / name
        self._needed = needed
        self._fd: int | None = None

    def acquire(self, patience: float = 0.0) -> None:
        """Take the lock; raise RunDirectoryError with its holder after ``patience`` seconds."""
        deadline = time.monotonic() + patience
        while self._fd is None:
            fd = self._open()
            try:
                self._take(fd, deadline)
                if self._is_file_of(fd):  # its last holder may have removed the file meanwhile
                    self._sign(fd)
                    self._fd = fd
            finally:
                if self._fd != fd:
                    os.close(fd)

    def discard(self) -> None:
        """Give up a directory in which nothing has been written: remove the file, and with it the
        directory if there is nothing else in it."""
        if self._fd is not None:
            self._path.unlink(missing_ok=True)
            with suppress(OSError):
                self._path.parent.rmdir()

    def _open(self) -> int:
        # What the file says is replaced: it must not be another one, to which a link leads.
        flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK
        try:
            fd = os.open(self._path, flags, 0o644)
        except OSError as error:
            why = "it is a link" if error.errno == errno.ELOOP else error.strerror
            raise RunDirectoryError(f"{self._path}: cannot be opened: {why}") from None
        if not stat.S_ISREG(os.fstat(fd).st_mode):
            os.close(fd)
            raise RunDirectoryError(f"{self._path}: cannot be locked: it is no regular file")
        return fd

    def _take(self, fd: int, deadline: float) -> None:
        while True:
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() < deadline:
                    time.sleep(0.1)
                    continue
                holder = os.pread(fd, 1000, 0).decode(errors="replace").strip() or "another process"
                raise RunDirectoryError(
                    f"{self._path.parent} is in use by {holder}; wait for that run to end, "
                    "stop it, or choose another directory"
                ) from None
            except OSError as error:
                if error.errno in _NO_LOCKS and not self._needed:
                    break
                raise RunDirectoryError(
                    f"{self._path}: cannot be locked: {error.strerror}; choose a --run-dir on a "
                    "file system that has locks"
                ) from None

    def _is_file_of(self, fd: int) -> bool:
        try:
            return os.path.samestat(os.fstat(fd), os.stat(self._path))
        except FileNotFoundError:
            return False

    def _sign(self, fd: int) -> None:
        os.ftruncate(fd, 0)
        started = datetime.now(UTC).isoformat(timespec="seconds")
        with suppress(OSError):  # a full disk: the lock holds without a name in it
            text = f"pid {os.getpid()} on {socket.gethostname()} since {started}\n"
            os.pwrite(fd, text.encode(), 0)

    def release(self) -> None:
        if self._fd is not None:
            os.close(self._fd)
            self._fd = None

    def __enter__(self) -> Self:
        self.acquire()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        tb: TracebackType | None,
    ) -> None:
        self.release()


def check_unlocked(run: RunDirectory, patience: float = 0.0) -> None:
    """Raise RunDirectoryError if another process still holds the lock after so many seconds."""
    if (run.path / "lock").exists():
        lock = RunLock(run)
        lock.acquire(patience)
        lock.release()
