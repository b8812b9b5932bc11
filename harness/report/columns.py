"""metrics.jsonl as columns of numbers, so that a run of a million lines fits and is read quickly.

A line costs eight bytes for each number that it holds, and nothing for what is null or absent in
all lines. Nearly all of the time goes into reading JSON: lines are therefore parsed a thousand at a
time, and a long file is divided among processes (``python -m harness.report.columns``), one per
core.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from itertools import chain, pairwise
from operator import itemgetter
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

from harness.lenient import LARGEST, number
from harness.records import LONGEST_LINE, Record, open_regular, parse_line
from harness.report.fields import clean

Array = NDArray[np.float64]

COUNTS = (
    *("update", "samples_seen", "stage", "ranks", "accumulation", "micro_batch", "global_batch"),
    *("comm_bytes", "memory_peak_bytes"),
)
"""Columns of whole numbers."""
TOP = (
    *(*COUNTS, "epoch", "lr", "momentum", "loss", "images_per_sec", "grad_norm", "noise_scale"),
    "distance_from_init",
)
GROUPS = ("seconds", "rank_seconds", "counters")
"""Fields that hold numbers by name; a column of theirs is called ``seconds.data``."""
TEXTS = ("slowest_host", "phase")
"""What of a group is text; its column holds places in ``Columns.texts``."""
NAMES = 24  # of a group; more is damage
LINES = 1000  # that are parsed at once
SHARE = 48 * 2**20  # bytes of the file for which another process pays
PROCESSES = 8


@dataclass(frozen=True)
class Columns:
    """The numbers of all whole lines, in their order; NaN where a line has no number."""

    lines: int = 0
    broken: int = 0
    values: dict[str, Array] = field(default_factory=dict)
    texts: list[str] = field(default_factory=list)

    def __getitem__(self, name: str) -> Array:
        """One column; all NaN where no line has a number of that name."""
        found = self.values.get(name)
        return np.broadcast_to(np.float64(np.nan), (self.lines,)) if found is None else found

    def at(self, name: str, place: int) -> float | None:
        """A line's number; whole where the column counts something."""
        return plain(name, self[name][place]) if -self.lines <= place < self.lines else None

    def known(self, name: str) -> Array:
        """The numbers of a column, in order."""
        column = self[name]
        return column[~np.isnan(column)]

    def first(self, name: str) -> float | None:
        known = self.known(name)
        return plain(name, known[0]) if known.size else None

    def last(self, name: str) -> float | None:
        known = self.known(name)
        return plain(name, known[-1]) if known.size else None

    def largest(self, name: str) -> float | None:
        known = self.known(name)
        return plain(name, known.max()) if known.size else None

    def missing(self, name: str) -> int:
        """Lines without a number."""
        return int(np.isnan(self[name]).sum())

    def group(self, name: str) -> list[str]:
        """The names that a group has, in the order of the records."""
        return [key[len(name) + 1 :] for key in self.values if key.startswith(f"{name}.")]


def plain(name: str, value: float) -> float | None:
    """A number of a column as Python's own; None for NaN."""
    if value != value:
        return None
    return int(value) if name in COUNTS and float(value).is_integer() else float(value)


def read_columns(path: Path) -> Columns:
    """Read metrics.jsonl; a run without one has no lines. Raises OSError."""
    if not path.exists():
        return Columns()
    cuts = _cuts(path, _parts(path.stat().st_size))
    helpers = [_start(path, begin, end) for begin, end in pairwise(cuts[1:])]
    try:
        parts = [_read(path, *cuts[:2])] if len(cuts) > 1 else []
        for helper, (begin, end) in zip(helpers, pairwise(cuts[1:]), strict=True):
            parts.append(_collect(helper) or _read(path, begin, end))
    finally:
        for helper in helpers:
            helper.kill()
            helper.wait()
            if helper.stdout is not None:
                helper.stdout.close()
    return _join(parts)


def _parts(size: int) -> int:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 1
    return max(1, min(cores, PROCESSES, size // SHARE))


def _cuts(path: Path, parts: int) -> list[int]:
    """Places where lines begin, from 0 to the end of the file, that divide it about evenly."""
    with open_regular(path) as file:
        size = file.seek(0, os.SEEK_END)
        cuts = {0, size}
        for part in range(1, parts):
            file.seek(size * part // parts)
            file.readline(LONGEST_LINE)
            cuts.add(min(file.tell(), size))
    return sorted(cuts)


def _start(path: Path, begin: int, end: int) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", __name__, str(path), str(begin), str(end)]
    root = Path(__file__).resolve().parents[2]
    search = os.pathsep.join([str(root), *filter(None, [os.environ.get("PYTHONPATH")])])
    return subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        env={**os.environ, "PYTHONPATH": search},
    )


def _collect(helper: subprocess.Popen[bytes]) -> Columns | None:
    """What another process has read; None if it could not."""
    data = helper.communicate()[0]
    head, newline, body = data.partition(b"\n")
    if helper.returncode or not newline:
        return None
    told = json.loads(head)
    table = np.frombuffer(body, dtype=np.float64).reshape(len(told["names"]), told["lines"])
    values = dict(zip(told["names"], table, strict=True))
    return Columns(told["lines"], told["broken"], values, told["texts"])


def _join(parts: list[Columns]) -> Columns:
    if len(parts) == 1:
        return parts[0]
    texts = list(dict.fromkeys(chain.from_iterable(part.texts for part in parts)))
    names = dict.fromkeys(chain.from_iterable(part.values for part in parts))
    values = {}
    for name in names:
        pieces = []
        for part in parts:
            piece = part[name]
            if (
                name.rpartition(".")[2] in TEXTS
                and part.texts
                and texts[: len(part.texts)] != part.texts
            ):
                places = np.array([texts.index(text) for text in part.texts], dtype=float)
                known = ~np.isnan(piece)
                piece = piece.copy()
                piece[known] = places[piece[known].astype(int)]
            pieces.append(piece)
        values[name] = np.concatenate(pieces)
    return Columns(sum(p.lines for p in parts), sum(p.broken for p in parts), values, texts)


def _read(path: Path, begin: int, end: int) -> Columns:
    """The lines of a file from one place, where a line begins, to another."""
    gathered = _Gathered()
    with open_regular(path) as file:
        file.seek(begin)
        at = begin
        while at < end and (lines := _some_lines(file, min(LINES * 512, end - at))):
            at += sum(map(len, lines))
            gathered.add(lines if at <= end else lines[:-1])  # it may read one too many
    return gathered.columns()


def _some_lines(file: IO[bytes], size: int) -> list[bytes]:
    """Whole lines of about so many bytes. One that is too long to be a record comes in pieces, each
    of which counts as a broken line."""
    content = file.read(size)
    if content and not content.endswith(b"\n"):
        content += file.readline(LONGEST_LINE)
    *whole, rest = content.split(b"\n")
    return [line + b"\n" for line in whole] + ([rest] if rest else [])


class _Gathered:
    """Columns while they grow."""

    def __init__(self) -> None:
        self._chunks: list[tuple[int, dict[str, Array]]] = []
        self._texts: dict[str, int] = {}
        self._broken = 0

    def add(self, lines: list[bytes]) -> None:
        records = _parse(lines)
        self._broken += len(lines) - len(records)
        if records:
            found = dict(_numbers(records, "", TOP))
            for group in GROUPS:
                found |= self._group(records, group)
            self._chunks.append((len(records), found))

    def _group(self, records: list[Record], group: str) -> dict[str, Array]:
        entries = [record.get(group) for record in records]
        if not any(entries):
            return {}
        mappings: list[Record] = [e if isinstance(e, dict) else {} for e in entries]
        names = list(dict.fromkeys(chain.from_iterable(mappings)))[:NAMES]
        texts = [name for name in names if name in TEXTS]
        numbers = [name for name in names if name not in TEXTS and len(name) <= 40]
        found = dict(_numbers(mappings, f"{group}.", numbers))
        for name in texts:
            places = [self._place(entry.get(name)) for entry in mappings]
            found[f"{group}.{name}"] = np.array(places, dtype=float)
        return found

    def _place(self, value: Any) -> int | None:
        if not isinstance(value, str) or len(self._texts) > 10_000:
            return None
        return self._texts.setdefault(clean(value, 60), len(self._texts))

    def columns(self) -> Columns:
        lines = sum(count for count, _ in self._chunks)
        names = dict.fromkeys(chain.from_iterable(found for _, found in self._chunks))
        values = {}
        for name in names:
            column = np.full(lines, np.nan)
            at = 0
            for count, found in self._chunks:
                if name in found:
                    column[at : at + count] = found[name]
                at += count
            if not np.isnan(column).all():
                values[name] = column
        return Columns(lines, self._broken, values, list(self._texts))


def _parse(lines: list[bytes]) -> list[Record]:
    """The records of whole lines; broken ones are left out."""
    if all(line.startswith(b"{") and line.endswith(b"}\n") for line in lines):
        try:
            records: list[Record] = json.loads("[" + b",".join(lines).decode() + "]")
        except (ValueError, RecursionError):
            pass
        else:
            if len(records) == len(lines) and set(map(type, records)) == {dict}:
                return records
    return [record for line in lines if (record := parse_line(line)) is not None]


def _numbers(
    records: list[Record], prefix: str, names: Iterable[str]
) -> Iterator[tuple[str, Array]]:
    """Columns of the records, which usually all have the same keys."""
    wanted = [name for name in names if name in records[0]]
    table = _quick(records, wanted) if wanted and len(set(map(len, records))) == 1 else None
    if table is None:
        wanted = list(names)
        rows = [[number(record.get(name)) for name in wanted] for record in records]
        table = np.array(rows, dtype=float).reshape(len(records), len(wanted))
    for place, name in enumerate(wanted):
        yield prefix + name, table[:, place]


def _quick(records: list[Record], names: list[str]) -> Array | None:
    """A row per record; None if one has other keys, or something that is not a number."""
    try:
        rows = list(map(itemgetter(*names, names[0]), records))  # two names or more: always tuples
        if not set(map(type, chain.from_iterable(rows))) <= {int, float, type(None)}:
            return None
        table = np.array(rows, dtype=float)
    except (KeyError, OverflowError):
        return None
    table[np.abs(table) >= LARGEST] = np.nan
    return table


def _main(path: str, begin: str, end: str) -> None:
    part = _read(Path(path), int(begin), int(end))
    told = {"names": [*part.values], "lines": part.lines, "broken": part.broken}
    out = sys.stdout.buffer
    out.write(json.dumps({**told, "texts": part.texts}).encode() + b"\n")
    for column in part.values.values():
        out.write(column.tobytes())


if __name__ == "__main__":
    _main(*sys.argv[1:])
