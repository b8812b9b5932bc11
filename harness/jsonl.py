"""JSON Lines, and single JSON objects: written so that a killed process leaves at most one partial
line, read so that a broken line costs that line alone.

A line goes out in one ``write``; a partial one is at the end, and the next attempt does not take it
over.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Iterator
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import IO, Any

from harness.errors import ConfigError
from harness.files import open_regular, read_text, write_all, write_atomic

Record = dict[str, Any]

LONGEST_LINE = 1 << 25
"""Bytes of a line; the norms of ten thousand layers take a tenth of that."""


def encode(record: Record) -> bytes:
    """One JSON line. A value that JSON cannot hold (NaN, ±inf) becomes null: missing, never 0."""
    return (json.dumps(_finite(record), separators=(",", ":"), allow_nan=False) + "\n").encode()


def _finite(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, dict):
        return {key: _finite(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(entry) for entry in value]
    return value


class JsonlWriter:
    """Appends records to a JSON Lines file, a line in one write."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o644)

    def append(self, record: Record) -> None:
        write_all(self._fd, encode(record), self._path)

    def end_line(self) -> None:
        """Make what follows a line of its own, after a writer that was killed in the middle of
        one."""
        end = os.lseek(self._fd, 0, os.SEEK_END)
        with open(self._path, "rb") as file:
            file.seek(max(0, end - 1))
            if file.read(1) not in (b"", b"\n"):
                os.write(self._fd, b"\n")

    def sync(self) -> None:
        """Wait until every line is on the disk."""
        os.fsync(self._fd)

    def close(self) -> None:
        os.close(self._fd)


def read_lines(file: IO[bytes]) -> Iterator[bytes]:
    """The lines from where a file stands. One that is too long to be a record is cut short, which
    makes a broken one of it."""
    while line := file.readline(LONGEST_LINE):
        cut = len(line) == LONGEST_LINE and not line.endswith(b"\n")
        yield line + b"\n" if cut else line
        while cut:
            line = file.readline(LONGEST_LINE)
            cut = len(line) == LONGEST_LINE and not line.endswith(b"\n")


def read_jsonl(path: Path) -> Iterator[Record | None]:
    """Records of a JSON Lines file in order; None for a line that is not a complete JSON object."""
    if not path.exists():
        return
    with open_regular(path) as file:
        for line in read_lines(file):
            yield parse_line(line)


def parse_line(line: bytes) -> Record | None:
    """The record in a line with its end; None if it is not a complete JSON object."""
    record = None
    if line.endswith(b"\n"):
        with suppress(ValueError, RecursionError):
            record = json.loads(line)
    return record if isinstance(record, dict) else None


def last_line(path: Path) -> Record | None:
    """The last whole line of a JSON Lines file that may be too long to read."""
    whole = _whole_lines(path, 2**16)
    return parse_line(whole[-1]) if whole else None


def last_records(path: Path, size: int) -> list[Record]:
    """Records at the end of a JSON Lines file, in its last ``size`` bytes; the first line in there,
    which may be half a line, is left out with all that are broken."""
    records = map(parse_line, _whole_lines(path, size))
    return [record for record in records if record is not None]


def _whole_lines(path: Path, size: int) -> list[bytes]:
    """Lines with an end among the last ``size`` bytes of a file; the first may lack its start."""
    if not path.exists():
        return []
    with open_regular(path) as file:
        file.seek(max(0, path.stat().st_size - size))
        # Not splitlines, for which a carriage return ends a line too.
        return [line + b"\n" for line in file.read().split(b"\n")[:-1]]


def spread_lines(path: Path, at_most: int) -> tuple[list[Record | None], int]:
    """At most so many (two or more) lines of a JSON Lines file, as ``read_jsonl`` gives them: the
    first, the last and others at equal distances. And how many lines there are.

    Only these are held in memory: a line may be as long as a model has layers.
    """
    if not path.exists():
        return [], 0
    with open_regular(path) as file:
        total = sum(line.endswith(b"\n") for line in read_lines(file))
    count = min(at_most, total)
    chosen = {i * (total - 1) // max(count - 1, 1) for i in range(count)}
    with open_regular(path) as file:
        lines = enumerate(read_lines(file))
        return [parse_line(line) for i, line in lines if i in chosen], total


def write_json(path: Path, value: Any) -> None:
    write_atomic(path, (json.dumps(_finite(value), indent=2, allow_nan=False) + "\n").encode())


def now() -> str:
    """The wall clock, for people who read records; nothing is computed from it."""
    return datetime.now(UTC).isoformat(timespec="milliseconds")


def read_object(
    path: Path, parse: Callable[[str], Any] = json.loads, problems: list[str] | None = None
) -> Record | None:
    """The JSON object in a file, or what else ``parse`` reads; None if it holds none or cannot be
    read, and ``problems`` then gets a line that says why."""
    problems = [] if problems is None else problems
    try:
        value = parse(read_text(path))
    except FileNotFoundError:
        problems.append(f"{path.name} is missing")
    except (OSError, ValueError, RecursionError, ConfigError) as error:
        problems.append(f"{path.name} cannot be read: {type(error).__name__}")
    else:
        if isinstance(value, dict):
            return value
        problems.append(f"{path.name} is not a mapping")
    return None
