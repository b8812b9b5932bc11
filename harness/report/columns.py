"""metrics.jsonl as columns of numbers, so that a run of a million lines fits and is read quickly.

A line costs eight bytes for each number that it holds, and nothing for what is null or absent in
all lines. Most of the time goes into reading JSON: lines are therefore parsed about a thousand at a
time, and a long file is divided among processes (``python -m harness.report.columns``), one per
core. orjson parses them; what it refuses (NaN, Infinity, lone surrogates) goes to Python's json,
and what that refuses goes there line by line.
"""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from array import array
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import chain, pairwise
from operator import itemgetter
from pathlib import Path
from typing import Any

import numpy as np
import orjson
from numpy.typing import NDArray

from harness.files import open_regular
from harness.jsonl import LONGEST_LINE, Record, parse_line
from harness.lenient import LARGEST, number
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
LINES = 1000  # of 512 bytes that are parsed at once
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
        while begin < end and (block := file.read(min(LINES * 512, end - begin))):
            begin += len(block)
            if begin < end:
                # Of a line that is too long to be a record each piece is a broken line.
                block += (rest := file.readline(LONGEST_LINE))
                begin += len(rest)
            gathered.add(block)
    return gathered.columns()


class _Gathered:
    """Columns while they grow."""

    def __init__(self) -> None:
        self._chunks: list[tuple[int, dict[str, Array]]] = []
        self._texts: dict[str, int] = {}
        self._broken = 0

    def add(self, block: bytes) -> None:
        records, broken = _parse(block)
        self._broken += broken
        if records:
            found = {name: _numbers(records, name) for name in TOP}
            for group in GROUPS:
                found |= self._group(records, group)
            known = {name: column for name, column in found.items() if column is not None}
            self._chunks.append((len(records), known))

    def _group(self, records: list[Record], group: str) -> dict[str, Array | None]:
        entries: list[Any] = [record.get(group) for record in records]
        if not any(entries):
            return {}
        mappings: list[Record] = entries
        if set(map(type, entries)) != {dict}:
            mappings = [entry if isinstance(entry, dict) else {} for entry in entries]
        names = list(dict.fromkeys(chain.from_iterable(mappings)))[:NAMES]
        return {
            f"{group}.{name}": self._texts_of(mappings, name)
            if name in TEXTS
            else _numbers(mappings, name)
            for name in names
            if len(name) <= 40
        }

    def _texts_of(self, mappings: list[Record], name: str) -> Array:
        found = [entry.get(name) for entry in mappings]
        if not set(map(type, found)) <= {str, type(None)}:
            found = [value if isinstance(value, str) else None for value in found]
        places = {text: self._place(text) for text in dict.fromkeys(found)}
        return np.array(array("d", [places[text] for text in found]))

    def _place(self, value: str | None) -> float:
        if value is None or len(self._texts) > 10_000:
            return math.nan
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
            column[np.abs(column) >= LARGEST] = np.nan
            if not np.isnan(column).all():
                values[name] = column
        return Columns(lines, self._broken, values, list(self._texts))


def _parse(block: bytes) -> tuple[list[Record], int]:
    """The records of lines, and how many lines are broken and left out."""
    count = block.count(b"\n")
    # As a list, if each line is an object: then all ends of lines lie between two of them.
    if block[:1] == b"{" and block[-2:] == b"}\n" and block.count(b"}\n{") == count - 1:
        text = b"[%b]" % block.replace(b"}\n{", b"},{")
        for parse in (orjson.loads, _by_json):
            try:
                records: list[Record] = parse(text)
            except (ValueError, RecursionError):
                continue
            if len(records) == count and set(map(type, records)) == {dict}:
                return records, 0
    lines = block.split(b"\n")
    lines = [*(line + b"\n" for line in lines[:-1]), *filter(None, lines[-1:])]
    whole = [record for line in lines if (record := parse_line(line)) is not None]
    return whole, len(lines) - len(whole)


def _by_json(text: bytes) -> Any:
    return json.loads(text.decode())


def _numbers(records: list[Record], name: str) -> Array | None:
    """A column of the records; None if it is null in all of them."""
    try:
        values = list(map(itemgetter(name), records))
    except KeyError:
        values = [record.get(name) for record in records]
    if values[0] is None and not any(value is not None for value in values):
        return None
    if set(map(type, values)) <= {int, float}:
        with suppress(OverflowError):
            return np.array(array("d", values))
    return np.array([number(value) for value in values], dtype=float)


def _main(path: str, begin: str, end: str) -> None:
    part = _read(Path(path), int(begin), int(end))
    told = {"names": [*part.values], "lines": part.lines, "broken": part.broken}
    out = sys.stdout.buffer
    out.write(json.dumps({**told, "texts": part.texts}).encode() + b"\n")
    for column in part.values.values():
        out.write(column.tobytes())


if __name__ == "__main__":
    _main(*sys.argv[1:])
