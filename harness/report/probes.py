"""A probe directory as the report sees it: probe.json, with whatever is there."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from harness.errors import UsageError
from harness.files import read_text
from harness.jsonl import Record
from harness.lenient import listed, number, pick
from harness.probe_results import (
    HOROVOD,
    NAME,
    OPERATIONS,
    Operation,
    Results,
    Timing,
    in_order,
    is_count,
    read_timing,
    shown_size,
    shown_time,
)
from harness.probe_verdict import judge
from harness.report.fields import MISSING, clean, count, general, instant, plural, words

TIMINGS = 2_000  # more is damage
HOSTS = 100_000
SENTENCES = 40

Bounds = tuple[float, float, float]
"""An estimate and the ends of its 95 % interval."""


@dataclass(frozen=True)
class Line:
    """α + β m, seconds that an operation takes for m bytes, over a range of sizes."""

    operation: Operation
    smallest: int
    largest: int
    """Bytes, of the messages that it was fitted to."""
    alpha: Bounds
    """Seconds."""
    beta: Bounds
    """Seconds per byte of the float32 tensor."""
    source: str


@dataclass(frozen=True)
class Host:
    name: str
    ranks: int | None


@dataclass(frozen=True)
class Probe:
    """What a probe measured, what that means, and what is missing, in words."""

    number: int
    directory: str
    name: str
    record: Record
    ranks: int | None
    hosts: tuple[Host, ...]
    """None listed: they are not recorded."""
    timings: tuple[tuple[Timing, str], ...]
    """By size, each with its place in probe.json."""
    lines: tuple[Line, ...]
    fitted: tuple[str, ...]
    """The verdict's sentences that say what ``lines`` do ..."""
    sentences: tuple[str, ...]
    """... and the others: on fp16, on buckets."""
    left_out: tuple[tuple[str, str], ...]
    """Operations that could not be measured, and why."""
    problems: list[str]

    @property
    def label(self) -> str:
        return f"probe {self.number} {self.name}"

    @property
    def where(self) -> str:
        """Such as ``4 ranks on 2 hosts, n1 and n2``."""
        ranks = "an unknown number of ranks" if self.ranks is None else plural(self.ranks, "rank")
        if not self.hosts:
            return f"{ranks} on hosts that are not recorded"
        names = [host.name for host in self.hosts[:4]]
        left = len(self.hosts) - len(names)
        if left:
            names.append(f"{count(left)} more")
        listed = names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"
        return f"{ranks} on {plural(len(self.hosts), 'host')}, {listed}"

    @property
    def when(self) -> str | None:
        """Its beginning, UTC, to the minute; a time that cannot be read stays as it is."""
        told = self.get("provenance", "started")
        stamp = instant(told)
        return f"{stamp:%Y-%m-%d %H:%M} UTC" if stamp else words(told)

    @property
    def launcher(self) -> str | None:
        return words(self.get("provenance", "launcher"))

    def get(self, *keys: str) -> Any:
        return pick(self.record, *keys)

    def lines_of(self, operation: Operation) -> list[Line]:
        """By rising sizes."""
        found = (line for line in self.lines if line.operation == operation)
        return sorted(found, key=lambda line: line.smallest)


def load_probe(path: Path, position: int) -> Probe:
    """Read probe.json. Raises nothing: whatever cannot be read is among the problems."""
    problems: list[str] = []
    read = _record(path / NAME, problems)
    record = read or {}
    told, ranks = record.get("left_out"), record.get("ranks")
    gaps: list[str] = []
    if not is_count(ranks):
        gaps.append(f"{NAME}: how many ranks there were is not recorded")
        ranks = None
    timings = _timings(record, ranks, gaps)
    hosts = _hosts(record)
    if not hosts:
        gaps.append(f"{NAME}: its hosts are not recorded, so the scaling model cannot take it")
    lines, sentences = _verdict(record, ranks, [timing for timing, _ in timings], gaps)
    problems += gaps if read is not None else []
    return Probe(
        number=position,
        directory=str(path),
        name=clean(path.resolve().name, 80),
        record=record,
        ranks=ranks,
        hosts=hosts,
        timings=tuple(timings),
        lines=tuple(lines),
        fitted=tuple(s for s in sentences if s.startswith(_OF_FITS)),
        sentences=tuple(s for s in sentences if not s.startswith(_OF_FITS)),
        left_out=tuple(
            (clean(label, 60), clean(why))
            for label, why in list((told if isinstance(told, dict) else {}).items())[:20]
        ),
        problems=problems,
    )


_OF_FITS = tuple(f"{operation.label}: " for operation in OPERATIONS)


def _record(file: Path, problems: list[str]) -> Record | None:
    try:
        record = json.loads(read_text(file))
    except (OSError, ValueError, RecursionError) as error:
        cut = "; is it cut off?" if isinstance(error, ValueError) else ""
        problems.append(f"{NAME} cannot be read: {type(error).__name__}{cut}")
        return None
    if not isinstance(record, dict):
        problems.append(f"{NAME} holds no probe: it is not a mapping")
        return None
    return record


def _timings(record: Record, ranks: int | None, problems: list[str]) -> list[tuple[Timing, str]]:
    """Those that can be read, the first of each operation and size."""
    given = listed(record.get("timings"))[:TIMINGS]
    found: dict[tuple[Operation, int], tuple[Timing, str]] = {}
    reasons = []
    for place, entry in enumerate(given if ranks is not None else []):
        where = f"timings[{place}]"
        try:
            timing = read_timing(entry, ranks or 1, where)
        except UsageError as error:
            reasons.append(clean(error))
            continue
        if (timing.operation, timing.bytes) in found:
            reasons.append(f"{where}: its operation and size are there twice")
        else:
            found[timing.operation, timing.bytes] = (timing, f"{NAME}: {where}.seconds")
    if reasons:
        told = f"{count(len(reasons))} of {plural(len(given), 'timing')}"
        problems.append(f"{NAME}: {told} cannot be read and are left out; {reasons[0]}")
    if not found:
        problems.append(f"{NAME} has no timing that can be read")
    places = {id(timing): place for timing, place in found.values()}
    return [(one, places[id(one)]) for one in in_order(timing for timing, _ in found.values())]


def _hosts(record: Record) -> tuple[Host, ...]:
    found = []
    for entry in listed(pick(record, "provenance", "communication", "hosts"))[:HOSTS]:
        ranks = pick(entry, "ranks")
        name = clean(words(pick(entry, "host")) or "a host without a name", 60)
        found.append(Host(name, len(ranks) if isinstance(ranks, list) else None))
    return tuple(found)


# The verdict


def _verdict(
    record: Record, ranks: int | None, timings: list[Timing], problems: list[str]
) -> tuple[list[Line], list[str]]:
    """Lines and sentences as they were written down, or else worked out from the rounds."""
    written = _read_verdict(record.get("verdict"), f"{NAME}: verdict")
    if written is not None:
        return written
    if ranks is None or not timings:
        return [], []
    lack = "has no verdict" if record.get("verdict") is None else "has a verdict that is broken"
    again = judge(Results(Path(NAME), record, ranks, None, tuple(timings), {})).as_dict()
    worked_out = _read_verdict(again, f"{NAME}: worked out from timings, as harness probe --read")
    problems.append(
        f"{NAME} {lack}; what is said here was worked out again from its rounds, as harness probe "
        "--read does it"
    )
    return worked_out or ([], [])


def _read_verdict(verdict: Any, source: str) -> tuple[list[Line], list[str]] | None:
    """None if a part of it is not as it is written."""
    fits, told = pick(verdict, "fits"), pick(verdict, "sentences")
    if not isinstance(fits, dict) or not isinstance(told, list):
        return None
    lines = []
    for operation in OPERATIONS:
        pieces = pick(fits.get(operation.name, {"pieces": []}), "pieces")
        if not isinstance(pieces, list):
            return None
        for place, piece in enumerate(pieces[:2]):
            where = f"{source}.fits.{operation.name}.pieces[{place}]"
            line = _read_line(operation, piece, where)
            if line is None:
                return None
            lines.append(line)
    if not all(isinstance(sentence, str) for sentence in told):
        return None
    return lines, [clean(sentence, 600) for sentence in told[:SENTENCES]]


def _read_line(operation: Operation, piece: Any, source: str) -> Line | None:
    smallest, largest = pick(piece, "smallest_bytes"), pick(piece, "largest_bytes")
    alpha, beta = (_bounds(pick(piece, n)) for n in ("alpha_seconds", "beta_seconds_per_byte"))
    if not is_count(smallest) or not is_count(largest) or alpha is None or beta is None:
        return None
    return Line(operation, smallest, largest, alpha, beta, source)


def _bounds(value: Any) -> Bounds | None:
    if not isinstance(value, list) or len(value) != 3:
        return None
    known = [bound for one in value if (bound := number(one)) is not None and bound >= 0]
    if len(known) < 3 or not known[1] <= known[2]:
        return None
    return float(known[0]), float(known[1]), float(known[2])


# For summary.json

PROBE_RULES = {
    "alpha_seconds, beta_seconds_per_byte": "of the whole collective: a message of m bytes of "
    "float32 takes α + β m; [estimate, low, high] at 95 %",
    "median_seconds, lower_quartile_seconds, upper_quartile_seconds": "of the rounds in seconds",
    "algorithm_bandwidth": "bytes / median_seconds, in bytes a second",
    "bus_bandwidth": "algorithm_bandwidth × 2(n − 1)/n for an allreduce of n ranks, × 1 for a "
    "broadcast (nccl-tests); null for one rank",
}


def probe_json(probe: Probe) -> dict[str, Any]:
    """A probe for summary.json, each value with its source."""
    return {
        "probe": probe.number,
        "name": probe.name,
        "directory": clean(probe.directory),
        "ranks": probe.ranks,
        "hosts": [{"host": host.name, "ranks": host.ranks} for host in probe.hosts],
        "started": words(probe.get("provenance", "started")),
        "launcher": probe.launcher,
        "problems": [clean(problem) for problem in probe.problems],
        "sentences": [*probe.fitted, *probe.sentences],
        "left_out": dict(probe.left_out),
        "lines": [
            {
                "operation": line.operation.name,
                "smallest_bytes": line.smallest,
                "largest_bytes": line.largest,
                "alpha_seconds": list(line.alpha),
                "beta_seconds_per_byte": list(line.beta),
                "source": line.source,
            }
            for line in probe.lines
        ],
        "timings": [
            {
                "operation": timing.operation.name,
                "bytes": timing.bytes,
                "rounds": len(timing.seconds),
                "median_seconds": timing.quartiles[1],
                "lower_quartile_seconds": timing.quartiles[0],
                "upper_quartile_seconds": timing.quartiles[2],
                "algorithm_bandwidth": timing.algorithm_bandwidth,
                "bus_bandwidth": timing.bus_bandwidth,
                "source": source,
            }
            for timing, source in probe.timings
        ],
    }


# Words


def headline(probe: Probe) -> str:
    """The most important of a probe in a paragraph."""
    when = f", {probe.when}" if probe.when else ""
    lead = f"Network by {probe.label} ({probe.where}{when})."
    of_horovod = [s for s in probe.fitted if s.startswith(f"{HOROVOD.label}: ")]
    return " ".join([lead, *of_horovod, *probe.sentences[:2]])


LINE_COLUMNS = ("Operation", "Messages", "α", "95 %", "β, s/GB", "95 %", "GB/s, 1/β", "Bus GB/s")


def line_rows(probe: Probe) -> list[tuple[str, ...]]:
    """``LINE_COLUMNS`` of each line; the bus bandwidth is that of its largest message."""
    bus = {(t.operation, t.bytes): t.bus_bandwidth for t, _ in probe.timings}
    rows: list[tuple[str, ...]] = []
    for line in probe.lines:
        beta = [general(1e9 * value, 3) for value in line.beta]
        widest = bus.get((line.operation, line.largest))
        rows.append(
            (
                line.operation.label,
                f"{shown_size(line.smallest)} to {shown_size(line.largest)}",
                seconds_text(line.alpha[0]),
                f"{seconds_text(line.alpha[1])} to {seconds_text(line.alpha[2])}",
                beta[0],
                f"{beta[1]} to {beta[2]}",
                general(1e-9 / line.beta[0], 3) if line.beta[0] > 1e-90 else MISSING,
                MISSING if widest is None else general(widest / 1e9, 3),
            )
        )
    return rows


def seconds_text(seconds: float) -> str:
    """A short time in the unit that suits it."""
    return shown_time([seconds]) if seconds else "0 s"
