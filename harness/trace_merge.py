"""``harness trace``: the ranks' traces and Horovod's timeline as one file that Perfetto opens.

The file has the Chrome trace event format: a process for each rank (and each of its GPUs), one for
Horovod, times in microseconds on one clock.

Hosts' clocks differ. Before tracing, all ranks take part in some operations of which none can leave
before the last has entered, and note by their own clocks when they entered and left. So for two
ranks with offset δ = (clock of b) − (clock of a), each operation bounds it on both sides:

    entered_b − left_a ≤ δ ≤ left_b − entered_a.

The offset is taken from the middle of what all operations leave open, and half of that is how far
it may be off.
"""

from __future__ import annotations

import io
import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from harness.errors import RunDirectoryError
from harness.files import open_regular, partial_name, read_text
from harness.rundir import RunDirectory

Event = dict[str, Any]

_ROOM = 1000
"""Numbers of processes that each rank may take in the merged file, and Horovod before them."""
_PHASES_THREAD = 0
_AROUND = 10**8
"""Nanoseconds before and after the traced updates from which Horovod's timeline is taken."""
_READ = 1 << 20
_LARGEST = 1 << 32
"""Bytes of a rank's trace."""
_LONGEST = 1 << 22
"""Characters of an event of Horovod's."""
_DAMAGE = (ArithmeticError, ValueError, TypeError, LookupError, AttributeError, RecursionError)
"""What numbers and types end in that no profiler writes."""


@dataclass(frozen=True)
class RankTrace:
    """One rank's trace, without its events."""

    path: Path
    rank: int
    host: str
    pid: int
    """Its process, as torch.profiler calls it."""
    session: int
    updates: tuple[int, int]
    pings: tuple[tuple[int, int], ...]
    """When the rank entered and left each common operation, nanoseconds by its host's clock."""
    phases: tuple[tuple[str, int, int], ...]
    """Name, begin and end, by the same clock."""


@dataclass(frozen=True)
class Merged:
    """What was made."""

    path: Path
    ranks: tuple[int, ...]
    updates: tuple[int, int] | None
    clock_error_ns: int
    """How far the times of two ranks may be off from each other at most, as far as is known."""
    timelines: int
    events: int
    problems: tuple[str, ...]
    """What was left out, in words."""

    def __str__(self) -> str:
        parts = []
        if self.updates is not None:
            first, last = self.updates
            ranks = ", ".join(map(str, self.ranks[:8])) + (", …" if len(self.ranks) > 8 else "")
            parts.append(
                f"updates {first} to {last} of {'rank' if len(self.ranks) == 1 else 'ranks'} "
                f"{ranks}, clocks within {self.clock_error_ns / 1e3:,.0f} µs"
            )
        if self.timelines:
            parts.append("Horovod's timeline")
        told = " and ".join(parts)
        return f"{self.path}: {told}, {self.events:,} events; open it in https://ui.perfetto.dev"


def offset(a: Sequence[tuple[int, int]], b: Sequence[tuple[int, int]]) -> tuple[int, int]:
    """(b's clock minus a's, how far that may be off), in nanoseconds, from what each of the two
    has noted of the same operations; at least one."""
    low = max(entered - left for (_, left), (entered, _) in zip(a, b, strict=True))
    high = min(left - entered for (entered, _), (_, left) in zip(a, b, strict=True))
    # Where clocks were set while they were read, the bounds may cross.
    return (low + high) // 2, abs(high - low + 1) // 2


def merge_traces(run_dir: Path, out: Path | None = None) -> Merged:
    """Write ``out`` (default: RUN_DIR/traces/merged.json) from what a run has left.

    One rank's events are in memory at a time. Raises RunDirectoryError if there is nothing to
    merge.
    """
    run = RunDirectory(run_dir)
    problems: list[str] = []
    traces = _newest(_rank_traces(run.traces, problems), problems)
    timelines = sorted(run.traces.glob("horovod-*.json"))
    if not traces and not timelines:
        left_out = f" ({'; '.join(problems)})" if problems else ""
        raise RunDirectoryError(
            f"{run.traces} holds no traces{left_out}; run with profile.trace='{{updates: [100, "
            "103]}', or profile.timeline=true"
        )
    target = out or run.traces / "merged.json"
    if timelines and traces and traces[0].rank:
        problems.append(
            "rank 0 was not traced: Horovod's timeline is by its host's clock, and may be off"
        )
    merging = _Merging(traces, problems)
    partial = partial_name(target)
    try:
        with partial.open("x", encoding="utf-8") as file:
            merging.write(file, timelines)
        partial.replace(target)
    finally:
        partial.unlink(missing_ok=True)
    return Merged(
        target,
        tuple(trace.rank for trace in traces),
        traces[0].updates if traces else None,
        merging.clock_error,
        merging.timelines,
        merging.events,
        tuple(problems),
    )


class _Merging:
    """One file in the making."""

    def __init__(self, traces: Sequence[RankTrace], problems: list[str]) -> None:
        self._traces, self._problems = traces, problems
        self._offsets = {
            trace.rank: offset(traces[0].pings, trace.pings) if trace is not traces[0] else (0, 0)
            for trace in traces
        }
        self.clock_error = max((error for _, error in self._offsets.values()), default=0)
        self._span = _span(traces, {rank: shift for rank, (shift, _) in self._offsets.items()})
        self._begin = self._span[0] - _AROUND if self._span else None
        """Where the merged file's time begins, in nanoseconds by the first rank's clock."""
        self.events = self.timelines = 0

    def write(self, file: IO[str], timelines: Iterable[Path]) -> None:
        file.write('{"displayTimeUnit": "ms", "traceEvents": [\n')
        for trace in self._traces:
            self._put(file, self._of_rank(trace), trace.path)
        for path in timelines:
            self._put(file, self._of_horovod(path), path)
        file.write("\n]}\n")

    def _put(self, file: IO[str], events: Iterable[Event], source: Path) -> None:
        try:
            for event in events:
                text = json.dumps(event, separators=(",", ":"), allow_nan=False)
                file.write(f",\n{text}" if self.events else text)
                self.events += 1
        except _DAMAGE as error:
            told = f"{source.name} is damaged ({type(error).__name__}); the rest of it is left out"
            self._problems.append(told)

    def _of_rank(self, trace: RankTrace) -> Iterator[Event]:
        shift = self._offsets[trace.rank][0]
        name = f"rank {trace.rank} on {trace.host}"
        first = (trace.rank + 1) * _ROOM
        yield from _named("process", first, 0, name, first)
        yield from _named("thread", first, _PHASES_THREAD, "phases of the update", -1)
        for phase, begin, end in trace.phases:
            yield {
                "ph": "X",
                "cat": "phase",
                "name": phase,
                "pid": first,
                "tid": _PHASES_THREAD,
                "ts": self._micros(begin - shift),
                "dur": (end - begin) / 1e3,
            }
        yield from self._of_torch(trace, first, name, shift)

    def _of_torch(self, trace: RankTrace, first: int, name: str, shift: int) -> Iterator[Event]:
        """What torch.profiler has written; its own processes are numbers (this one's, GPUs'), and
        words for what it tells of itself, which is left out."""
        content = _object(trace.path, self._problems)
        base, events = content.get("baseTimeNanoseconds", 0), content.get("traceEvents")
        if not isinstance(base, int) or not isinstance(events, list):
            self._problems.append(f"{trace.path.name} is no trace of torch.profiler's; left out")
            return
        labels: dict[int, str] = {}
        numbers = {trace.pid: first}
        for event in (event for event in events if isinstance(event, dict)):
            pid, ts = event.get("pid"), event.get("ts")
            if not isinstance(pid, int):
                continue
            if event.get("name") == "process_labels":
                labels[pid] = str(_arguments(event).get("labels", ""))
            elif event.get("ph") != "M" and isinstance(ts, int | float):
                number = numbers.setdefault(pid, first + len(numbers))
                moved = {**event, "pid": number, "ts": self._micros(base - shift, ts)}
                if "id" in event and isinstance(event["id"], int):
                    moved["id"] = event["id"] + (trace.rank << 32)  # arrows are by number
                yield moved
            elif event.get("name") in ("thread_name", "thread_sort_index"):
                number = numbers.setdefault(pid, first + len(numbers))
                yield {**event, "pid": number, "ts": 0}
        for pid, number in numbers.items():
            if number != first:
                label = f"{name}, {labels.get(pid, pid)}"
                yield from _named("process", number, 0, label, number)

    def _of_horovod(self, path: Path) -> Iterator[Event]:
        """Each tensor is a process to Horovod; here it is a thread of one process. Begin and end
        become one event, so that what is cut off at either side leaves none without the other."""
        started, process, tensors = None, 1 + self.timelines, dict[int, str]()
        open_: dict[int, list[Event]] = {}
        shown: set[int] = set()
        for event in _horovod_events(path):
            pid, kind, arguments = event.get("pid"), event.get("ph"), _arguments(event)
            if not isinstance(pid, int):
                continue
            if kind in ("B", "E") and not isinstance(event.get("ts"), int):
                continue
            if event.get("name") == "process_name":
                begun_at = arguments.get("start_time_since_epoch_in_micros")
                if isinstance(begun_at, int):
                    started = begun_at
                    self._begin = started * 1000 if self._begin is None else self._begin
                tensors[pid] = arguments.get("name", "")
            elif kind == "B":
                open_.setdefault(pid, []).append(event)
            elif kind == "E" and open_.get(pid) and started is not None:
                begun = open_[pid].pop()
                begin, end = ((started + one["ts"]) * 1000 for one in (begun, event))
                if not self._near(begin, end):
                    continue
                if pid not in shown:
                    if not shown:
                        name = "Horovod, seen by rank 0"
                        yield from _named("process", process, 0, name, process)
                    shown.add(pid)
                    yield from _named("thread", process, pid, tensors.get(pid, str(pid)), pid)
                yield {
                    "ph": "X",
                    "cat": "horovod",
                    "name": begun.get("name", ""),
                    "pid": process,
                    "tid": pid,
                    "ts": self._micros(begin),
                    "dur": (end - begin) / 1e3,
                    "args": arguments,
                }
        if started is None:
            self._problems.append(f"{path.name} is no timeline of Horovod's; left out")
        elif shown:
            self.timelines += 1

    def _near(self, begin: int, end: int) -> bool:
        first, last = self._span or (begin, end)
        return begin >= first - _AROUND and end <= last + _AROUND

    def _micros(self, nanos: int, micros: float = 0.0) -> float:
        """On the merged file's clock; large numbers are subtracted before they become floats."""
        return (nanos - (self._begin or 0)) / 1e3 + micros


def _span(traces: Sequence[RankTrace], shifts: dict[int, int]) -> tuple[int, int] | None:
    """Begin and end of the traced updates, by the first rank's clock."""
    times = [
        time - shifts[trace.rank]
        for trace in traces
        for time in (
            *(ping[0] for ping in trace.pings),
            *(end for _, _, end in trace.phases),
        )
    ]
    return (min(times), max(times)) if times else None


def _rank_traces(folder: Path, problems: list[str]) -> Iterator[RankTrace]:
    for path in sorted(folder.glob("rank-*.about.json")):
        about = _object(path, problems)
        trace = path.with_name(path.name.replace(".about.json", ".json"))
        if not about:
            continue
        if not trace.exists():
            problems.append(f"{trace.name} is missing")
            continue
        try:
            yield RankTrace(
                trace,
                int(about["rank"]),
                str(about["host"]),
                int(about["pid"]),
                int(about["session"]),
                (int(about["updates"][0]), int(about["updates"][1])),
                tuple((int(entered), int(left)) for entered, left in about["pings"]),
                tuple((str(name), int(begin), int(end)) for name, begin, end in about["phases"]),
            )
        except _DAMAGE:
            problems.append(f"{path.name} is not what this version writes; left out")


def _newest(traces: Iterable[RankTrace], problems: list[str]) -> list[RankTrace]:
    """Those that were taken together last, by rank: an earlier attempt may have left others."""
    found = sorted(traces, key=lambda trace: trace.rank)
    session = max((trace.session for trace in found), default=0)
    together = [trace for trace in found if trace.session == session]
    if len({len(trace.pings) for trace in together}) > 1 or any(not t.pings for t in together):
        raise RunDirectoryError(f"{together[0].path.parent}: the ranks' clocks cannot be compared")
    problems += [
        f"{trace.path.name} is of an earlier attempt; left out"
        for trace in found
        if trace not in together
    ]
    return together


def _object(path: Path, problems: list[str]) -> dict[str, Any]:
    """A JSON object from a file; empty, with a word on why, if there is none."""
    try:
        # Names may have raw control characters in them; NaN is none of JSON's numbers.
        value = json.loads(read_text(path, _LARGEST), strict=False, parse_constant=lambda _: None)
    except (OSError, ValueError, RecursionError) as error:
        problems.append(f"{path.name} cannot be read ({type(error).__name__}); left out")
        return {}
    if not isinstance(value, dict):
        problems.append(f"{path.name} is no JSON object; left out")
        return {}
    return value


def _arguments(event: Event) -> dict[str, Any]:
    arguments = event.get("args")
    return arguments if isinstance(arguments, dict) else {}


def _horovod_events(path: Path) -> Iterator[Event]:
    """The objects of an array, which has no end if Horovod was not shut down, and may be long."""
    decoder = json.JSONDecoder(strict=False, parse_constant=lambda _: None)
    text = ""
    with io.TextIOWrapper(open_regular(path), encoding="utf-8", errors="replace") as file:
        while chunk := file.read(_READ):
            text += chunk
            place = 0
            while (place := text.find("{", place)) >= 0:
                try:
                    event, place = decoder.raw_decode(text, place)
                except ValueError:  # its end is not read yet
                    if len(text) - place > _LONGEST:  # or never comes
                        raise
                    break
                yield event
            text = text[place:] if place >= 0 else ""


def _named(what: str, pid: int, tid: int, name: str, order: int) -> Iterator[Event]:
    """A process's name, or a thread's, and its place among the others."""
    for kind, arguments in (("name", {"name": name}), ("sort_index", {"sort_index": order})):
        head = {"ph": "M", "name": f"{what}_{kind}", "pid": pid, "tid": tid, "ts": 0}
        yield {**head, "args": arguments}
