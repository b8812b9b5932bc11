"""Following a JSON Lines file that another process appends to: each line is read once.

A file of a million lines is not read from its start: of a long one, lines at equal distances and
the last part are. A refresh costs what has been added since the last one.

A run that resumes cuts metrics.jsonl in place, and replaces events.jsonl. Either is noticed, as
the file is another one, or shorter, or no longer has the bytes that were read last; it is then
taken up anew. Nothing is ever written.
"""

from __future__ import annotations

import os
from pathlib import Path

from harness.files import open_regular
from harness.jsonl import Record, parse_line

_WHOLE = 2**21
"""Bytes up to which a file is read from its start."""
_TAIL = 2**18
"""Bytes at the end that are read of a longer one."""
_SPREAD = 256
"""Places before that at which a line is looked at,"""
_PIECE = 2**13
"""in as many bytes."""
_MOST = 2**24
"""Bytes of one refresh."""
_ANCHOR = 256
"""Bytes that must still be there for the file to count as the same."""


class Follower:
    """What a JSON Lines file has to say, from refresh to refresh."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._identity: tuple[int, int] | None = None
        self._end = 0
        """Where the next line begins."""
        self._anchor = b""
        self.sampled = False
        """Whether some lines before the last part were skipped."""
        self.broken = 0
        """Lines that are no JSON object."""
        self.changed: float | None = None
        """When the file was written to last, in seconds since the epoch, by its server's clock."""

    def read(self) -> tuple[bool, list[Record]]:
        """Whether all that was read before is void, and the records that are new.

        A line that is still being written comes with a later call. A file that is missing or cannot
        be read has no records.
        """
        try:
            with open_regular(self._path) as file:
                return self._read(file.fileno())
        except OSError:
            anew, self._identity, self.changed = self._identity is not None, None, None
            return anew, []

    def _read(self, fd: int) -> tuple[bool, list[Record]]:
        status = os.fstat(fd)
        self.changed = status.st_mtime
        identity = (status.st_dev, status.st_ino)
        anew = identity != self._identity or status.st_size < self._end
        anew = anew or os.pread(fd, len(self._anchor), self._end - len(self._anchor)) != (
            self._anchor
        )
        early: list[Record] = []
        if anew:
            self._identity, self._end, self._anchor = identity, 0, b""
            self.broken, self.sampled = 0, status.st_size > _WHOLE
            if self.sampled:
                early = self._spread(fd, status.st_size - _TAIL)
        content = os.pread(fd, min(status.st_size - self._end, _MOST), self._end)
        # What has no line's end in so many bytes is no record; it is left behind in one piece.
        whole = content if len(content) == _MOST else content[: content.rfind(b"\n") + 1]
        whole = whole[: whole.rfind(b"\n") + 1] or whole
        self._end += len(whole)
        if whole:
            self._anchor = whole[-_ANCHOR:]
        return anew, [*early, *self._parsed(whole.split(b"\n")[:-1])]

    def _spread(self, fd: int, size: int) -> list[Record]:
        """Lines at equal distances in the first ``size`` bytes; the rest is to be read after."""
        lines = []
        for number in range(_SPREAD):
            piece = os.pread(fd, _PIECE, number * size // _SPREAD).split(b"\n")
            lines += piece[1:2] if len(piece) > 2 else []
        self._end = size + os.pread(fd, _TAIL, size).find(b"\n") + 1
        return self._parsed(lines)

    def _parsed(self, lines: list[bytes]) -> list[Record]:
        records = [parse_line(line + b"\n") for line in lines]
        found = [record for record in records if record is not None]
        self.broken += len(records) - len(found)
        return found
