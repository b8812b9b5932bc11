"""What ``harness watch`` knows of a run, or of several in a directory, and its words for it."""

from __future__ import annotations

import math
import statistics
import sys
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import compress
from pathlib import Path

from rich.console import RenderableType
from rich.table import Table
from rich.text import Text

from harness.benchfile import holds_bench
from harness.follow import Follower
from harness.jsonl import Record, read_object
from harness.lenient import number, pick
from harness.progress import shown_duration
from harness.records import PHASES
from harness.rundir import RunDirectory
from harness.standing import (
    OF_PROCESSES,
    RunStatus,
    attempt_lines,
    progress_lines,
    share,
    standing,
)
from harness.wording import counted
from harness.yamlfile import one_line

_RECENT = 20
"""Lines of metrics.jsonl over which speed and phases are told."""


_CURVE = 4096
"""Points that are kept of a curve; beyond them every other one is dropped."""


_SPARKS = 60
"""Characters of a curve."""


_NEWS = 6
"""Events that are shown."""


_PATIENCE = 60.0
"""Seconds without a line before a run is suspected to hang, at least."""


_SILENCES = 10.0
"""A silence of so many times the usual one is suspicious."""


_DEPTH = 3
"""Folders below the one given in which runs are looked for."""


_RESCAN = 10.0
"""Seconds between looks for new runs in a directory of several."""


WIDTH = 200
"""Columns where no terminal sets them."""


_ROOM_FOR_SPREAD = 60
"""Columns from which on the spread of speeds is told, and the least loss."""


_COLUMNS = {
    "run": 0, "state": 0, "progress": 0, "epoch": 100, "ranks": 70, "images/s": 70,
    "attempts": 100, "ETA": 0, "last line": 70,
}  # fmt: skip
"""Of the table of several runs, each with the width of the terminal from which on it is there."""


_LOAD = {
    "memory_peak_bytes": ("peak {:.2f} GiB", 2.0**30),
    "cpu_percent": ("{:.3g} % CPU", 1.0),
    "gpu_percent": ("{:.3g} % GPU", 1.0),
    "gpu_memory_bytes": ("{:.3g} GiB on the GPU", 2.0**30),
}
"""What most lines have no reading of: how it is told, and in which unit."""


_TOLD = frozenset(
    {*OF_PROCESSES, "stage", "merged_segment", "not_grown", "regroup", "skipped_update"}
    | {"corrupt_image", "checkpoint_rejected", "warning"}
)


_BLOCKS = "▁▂▃▄▅▆▇█"


_ASCII = "_.-=+*#@"


def is_run(path: Path) -> bool:
    """Whether a directory is a run's, also where its ranks have not begun yet; a bench is not."""
    run = RunDirectory(path)
    return (run.holds_run or run.launch_log.exists()) and not holds_bench(path)


def find_runs(path: Path) -> list[Path]:
    """The run directories in a directory and some levels of those below it, by name."""
    found: list[Path] = []
    level = [path]
    for _ in range(_DEPTH):
        below: list[Path] = []
        for folder in level:
            with suppress(OSError):
                below += [entry for entry in folder.iterdir() if entry.is_dir()]
        runs = [folder for folder in below if is_run(folder)]
        found += runs
        level = [folder for folder in below if folder not in set(runs)]
    return sorted(found)


@dataclass
class Reading:
    """The newest value of what not every line tells."""

    value: float
    since: float = 0.0
    """Seconds of training that lines have told of since."""


@dataclass
class Seen:
    """What the lines of metrics.jsonl have told so far."""

    last: Record = field(default_factory=dict)
    recent: deque[Record] = field(default_factory=lambda: deque(maxlen=_RECENT))
    readings: dict[str, Reading] = field(default_factory=dict)
    """Of memory and load, by name."""
    loss: list[tuple[float, float]] = field(default_factory=list)
    """(samples seen, loss), thinned out."""

    def add(self, lines: list[Record]) -> None:
        for line in lines:
            self.last = line
            self.recent.append(line)
            _note(self.loss, line, "loss")
            spent = _spent(line)
            for reading in self.readings.values():
                reading.since += spent
            for name in _LOAD:
                value = number(line.get(name, pick(line, "counters", name)))
                if value is not None:
                    self.readings[name] = Reading(value)


@dataclass
class Told:
    """What the lines of events.jsonl have told so far."""

    processes: list[Record] = field(default_factory=list)
    """Those from which the state follows, and the newest checkpoint's."""
    news: deque[Record] = field(default_factory=lambda: deque(maxlen=4 * _NEWS))
    count: int = 0
    """How many pieces of news there have been."""
    accuracy: list[tuple[float, float]] = field(default_factory=list)
    best: float | None = None
    checkpoint: Record | None = None

    def add(self, events: list[Record]) -> None:
        for event in events:
            kind = event.get("kind")
            if not isinstance(kind, str):
                continue
            if kind in OF_PROCESSES:
                self.processes.append(event)
            if kind == "checkpoint":
                self.checkpoint = event
            if kind in _TOLD:
                self.news.append(event)
                self.count += 1
            if kind == "evaluation":
                _note(self.accuracy, event, "accuracy")
                accuracy = number(event.get("accuracy"))
                if accuracy is not None:
                    self.best = accuracy if self.best is None else max(self.best, accuracy)


def _note(curve: list[tuple[float, float]], record: Record, name: str) -> None:
    samples, value = number(record.get("samples_seen")), number(record.get(name))
    if samples is not None and value is not None:
        curve.append((samples, value))
    if len(curve) > _CURVE:
        del curve[1:-1:2]


class Watched:
    """One run directory."""

    def __init__(
        self,
        path: Path,
        clock: Callable[[], float] = time.time,
        ticks: Callable[[], float] = time.monotonic,
    ) -> None:
        """``clock``: seconds since the epoch, which tell at the first look how old a file is;
        ``ticks``: seconds of a clock that nobody sets, for all that we see ourselves."""
        self.path = path
        self._clock, self._ticks = clock, ticks
        run = RunDirectory(path)
        self._metrics, self._events = Follower(run.metrics), Follower(run.events)
        self._plan_path = run.plan
        self._plan: Record | None = None
        self._seen, self._told = Seen(), Told()
        self._shown: tuple[Record, int, bool] = ({}, 0, False)
        self._longest = 0.0
        """Longest silence that a line has followed while we watched, in seconds."""
        self._changed: list[float] = []
        self._age = self._seen_at = 0.0
        """How old the last line was when we saw that it was there, and when that was."""
        self.status = RunStatus("not started")

    def refresh(self) -> None:
        """Read what is new."""
        anew, lines = self._metrics.read()
        if anew:
            self._seen = Seen()
        self._seen.add(lines)
        anew, events = self._events.read()
        if anew:
            self._told = Told()
        self._told.add(events)
        if self._plan is None:
            self._plan = read_object(self._plan_path)
        told = self._told
        known = [*told.processes, *([told.checkpoint] if told.checkpoint else [])]
        self.status = standing(_sound(self._seen.last), known, self._plan)
        changed = [t for t in (self._metrics.changed, self._events.changed) if t is not None]
        if changed and changed != self._changed:
            self._longest = max(self._longest, self.silence or 0.0)
            first = not self._changed
            self._age = max(0.0, self._clock() - max(changed)) if first else 0.0
            self._seen_at = self._ticks()
        self._changed = changed

    @property
    def over(self) -> bool:
        return self.status.state == "done"

    @property
    def silence(self) -> float | None:
        """Seconds since anything was written."""
        return self._age + self._ticks() - self._seen_at if self._changed else None

    @property
    def patience(self) -> float:
        """Seconds of silence after which a running job is suspected to hang."""
        windows = [_spent(line) for line in self._seen.recent]
        return max(_PATIENCE, _SILENCES * max(windows, default=0.0), 2 * self._longest)

    @property
    def hangs(self) -> bool:
        silence = self.silence
        return self.status.state == "running" and silence is not None and silence > self.patience

    @property
    def images_per_sec(self) -> float | None:
        """Over the recent lines: their samples over the time of their updates."""
        speeds = [(speed, _spent(line)) for line in self._seen.recent if (speed := _speed(line))]
        total = sum(spent for _, spent in speeds)
        return sum(speed * spent for speed, spent in speeds) / total if total > 0 else None

    @property
    def eta(self) -> float | None:
        """Seconds of training that are left at the recent speed, evaluations left out."""
        status, speed = self.status, self.images_per_sec
        planned = _planned(self._plan)
        if self.status.state == "done" or planned is None or status.samples_seen is None:
            return None
        return max(0.0, planned - status.samples_seen) / speed if speed else None

    def show(self, width: int = WIDTH) -> list[RenderableType]:
        """The whole view, the most important first; its curves are made for so many columns."""
        style = "red" if self.hangs or self.status.state == "failed" else ""
        return [Text(self._head(), style=style), *(Text(line) for line in self._body(width))]

    def news(self) -> Iterator[str]:
        """What there is to say since the last call, in lines."""
        line, count, hung = self._shown
        told = self._told
        fresh = told.count - count if told.count >= count else 0
        yield from (_event_line(event) for event in list(told.news)[-fresh:] if fresh)
        if self.hangs and not hung:
            yield self._head()
        if self._seen.last is not line and self._seen.last:
            yield self._brief()
        self._shown = (self._seen.last, told.count, self.hangs)

    def _head(self) -> str:
        words = f"run: {self.status.state}"
        if self.silence is None:
            return words
        if self.status.state != "running":
            return f"{words}, last line {shown_duration(self.silence)} ago"
        if not self.hangs:
            return f"{words}, last line {shown_duration(self.silence)} ago"
        spent = [_spent(line) for line in self._seen.recent]
        usual = f", though one takes about {statistics.median(spent):.3g} s" if spent else ""
        return (
            f"{words}, but no line for {shown_duration(self.silence)}{usual}: it hangs, or its "
            "processes are gone"
        )

    def _brief(self) -> str:
        loss = number(self._seen.last.get("loss"))
        parts = [*progress_lines(self.status)]
        parts += [] if loss is None else [f"loss {loss:.4f}"]
        parts += [] if self.eta is None else [f"ETA {shown_duration(self.eta)}"]
        return "  ".join(parts)

    def _body(self, width: int) -> Iterator[str]:
        eta, extra = self.eta, self._spread() if width >= _ROOM_FOR_SPREAD else ""
        for line in progress_lines(self.status):
            if line.startswith("samples") and eta is not None:
                line += f", ETA {shown_duration(eta)}"
            elif line.startswith("stage") and extra:
                line += extra
            yield line
        yield from self._curves(width)
        yield from self._time()
        yield from self._stragglers()
        yield from self._resources()
        yield from attempt_lines(self.status)
        yield from (f"  {line}" for line in _event_lines(self._told.news))
        yield from self._troubles()

    def _spread(self) -> str:
        speeds = sorted(speed for line in self._seen.recent if (speed := _speed(line)) is not None)
        if len(speeds) < 4:
            return ""
        low, middle, high = statistics.quantiles(speeds, n=4, method="inclusive")
        return (
            f" (of the last {len(speeds)} lines half are between {low:,.0f} and {high:,.0f}, "
            f"median {middle:,.0f})"
        )

    def _curves(self, width: int) -> Iterator[str]:
        if self._seen.loss:
            values = [value for _, value in self._seen.loss]
            least = f", least {min(values):.4g}" if width >= _ROOM_FOR_SPREAD else ""
            words = f"  {values[0]:.4g} → {values[-1]:.4g}{least}"
            yield _curve_line("loss      ", self._seen.loss, words, width)
        if self._told.accuracy:
            last, best = self._told.accuracy[-1][1], self._told.best
            most = "" if best is None else f", best {best:.2%}"
            yield _curve_line("accuracy  ", self._told.accuracy, f"  {last:.2%}{most}", width)

    def _time(self) -> Iterator[str]:
        spent = Counter[str]()
        for line in self._seen.recent:
            seconds = line.get("seconds")
            for phase, value in (seconds if isinstance(seconds, dict) else {}).items():
                spent[phase] += max(0.0, number(value) or 0.0)  # type: ignore[assignment]
        total = sum(spent.values())
        if total > 0:
            names = [*PHASES, *sorted(set(spent) - set(PHASES))]
            shares = [
                f"{one_line(name)} {spent[name] / total:.0%}" for name in names if spent[name]
            ]
            yield f"time      {', '.join(shares)}"

    def _stragglers(self) -> Iterator[str]:
        """The rank that was slowest most often, and by how much."""
        found = [line["rank_seconds"] for line in self._seen.recent if _tells_ranks(line)]
        if not found:
            return
        rank, times = Counter(one["slowest_rank"] for one in found).most_common(1)[0]
        mine = [one for one in found if one["slowest_rank"] == rank]
        ratio = statistics.median(one["busy_max"] / one["busy_median"] for one in mine)
        host = mine[-1].get("slowest_host")
        phase = Counter(str(one.get("phase")) for one in mine).most_common(1)[0][0]
        where = f" on {one_line(host)}" if isinstance(host, str) else ""
        yield (
            f"slowest rank: {rank}{where}, in {times} of {counted(len(found), 'line')}; there busy "
            f"{ratio:.2f} × as long as the median rank, most in {one_line(phase)}"
        )

    def _resources(self) -> Iterator[str]:
        """The newest readings, those of one age together."""
        silence, by_age = self.silence or 0.0, dict[str, list[str]]()
        for name, (words, unit) in _LOAD.items():
            reading = self._seen.readings.get(name)
            if reading is not None:
                age = shown_duration(reading.since + silence)
                by_age.setdefault(age, []).append(words.format(reading.value / unit))
        if by_age:
            told = (f"{', '.join(parts)} ({age} ago)" for age, parts in by_age.items())
            yield f"memory and load: {', '.join(told)}"

    def _troubles(self) -> Iterator[str]:
        for name, follower in (("metrics.jsonl", self._metrics), ("events.jsonl", self._events)):
            if follower.changed is None:
                yield f"{name} is missing"
            elif follower.broken:
                yield f"{name}: {counted(follower.broken, 'line')} broken and left out"
            if follower.sampled:
                yield f"{name} is long: what is told of its earlier part is from some of its lines"


class Several:
    """The runs in a directory."""

    def __init__(
        self,
        path: Path,
        clock: Callable[[], float] = time.time,
        ticks: Callable[[], float] = time.monotonic,
    ) -> None:
        """As for ``Watched``."""
        self.path = path
        self._clock, self._ticks = clock, ticks
        self._runs: dict[Path, Watched] = {}
        self._scanned = -math.inf
        self._brief: dict[Path, str] = {}

    def refresh(self) -> None:
        if self._ticks() - self._scanned >= _RESCAN:
            self._scanned = self._ticks()
            paths = find_runs(self.path)
            made = (self._clock, self._ticks)
            self._runs = {p: self._runs.get(p) or Watched(p, *made) for p in paths}
        for run in self._runs.values():
            run.refresh()

    @property
    def over(self) -> bool:
        return bool(self._runs) and all(run.over for run in self._runs.values())

    def show(self, width: int = WIDTH) -> list[RenderableType]:
        """The table, without the columns that so narrow a terminal has no room for."""
        table = Table(box=None, pad_edge=False)
        shown = [least <= width for least in _COLUMNS.values()]
        for name in compress(_COLUMNS, shown):
            left = name in ("run", "state")
            table.add_column(
                name, justify="left" if left else "right", no_wrap=name != "run", overflow="fold"
            )
        for path, run in self._runs.items():
            cells: list[Text | str] = [Text(self._name(path)), *_cells(run)]
            table.add_row(*compress(cells, shown))
        done = sum(run.over for run in self._runs.values())
        return [table, Text(f"{done} of {counted(len(self._runs), 'run')} done")]

    def news(self) -> Iterator[str]:
        for path, run in self._runs.items():
            line = "  ".join(cell for cell in _cells(run)[:-2] if cell)
            if self._brief.get(path) != line:
                self._brief[path] = line
                yield f"{self._name(path)}  {line}"

    def _name(self, path: Path) -> str:
        return one_line(str(path.relative_to(self.path)))


def _cells(run: Watched) -> list[str]:
    status, speed = run.status, run.images_per_sec
    return [
        "hangs?" if run.hangs else status.state,
        share(status),
        "" if status.epoch is None else f"{status.epoch:.2f}",
        "" if status.ranks is None else str(status.ranks),
        "" if speed is None else f"{speed:,.0f}",
        str(status.attempts),
        "" if run.eta is None else shown_duration(run.eta),
        "" if run.silence is None else f"{shown_duration(run.silence)} ago",
    ]


def sparkline(curve: Sequence[tuple[float, float]], width: int = _SPARKS) -> str:
    """Means of (place, value) points over equal parts of the places, lowest to highest; a part
    without a point looks like the one before."""
    blocks = _BLOCKS if _can_print(_BLOCKS) else _ASCII
    width = min(width, len(curve))
    first, last = min(place for place, _ in curve), max(place for place, _ in curve)
    bins: list[list[float]] = [[] for _ in range(width)]
    for place, value in curve:
        where = (place - first) / (last - first) if last > first else 0.0
        bins[min(int(where * width), width - 1)].append(value)
    means: list[float] = []
    for values in bins:
        means.append(statistics.fmean(values) if values else means[-1])  # the first has a point
    low, high = min(means), max(means)
    top = len(blocks) - 1
    return "".join(blocks[round(top * _between(low, mean, high))] for mean in means)


def _between(low: float, value: float, high: float) -> float:
    return (value - low) / (high - low) if high > low else 0.5


def _curve_line(name: str, curve: Sequence[tuple[float, float]], words: str, width: int) -> str:
    """A curve between its name and words, on one line unless that leaves nothing of it."""
    room = width - len(name) - len(words)
    return f"{name}{sparkline(curve, max(1, min(_SPARKS, room)))}{words}"


def _can_print(text: str) -> bool:
    try:
        text.encode(getattr(sys.stdout, "encoding", None) or "ascii")
    except UnicodeEncodeError:
        return False
    return True


def _event_lines(events: Sequence[Record]) -> list[str]:
    """The last events; equal ones in a row are one line."""
    lines: list[tuple[str, str, int]] = []
    for event in events:
        kind = str(event["kind"])
        if lines and lines[-1][0] == kind == "skipped_update":
            lines[-1] = (kind, _event_line(event), lines[-1][2] + 1)
        else:
            lines.append((kind, _event_line(event), 1))
    return [text if times == 1 else f"{text} (× {times})" for _, text, times in lines[-_NEWS:]]


def _event_line(event: Record) -> str:
    """Time, kind, and what it is about."""
    stamp, reason = event.get("time"), event.get("reason")
    parts = [one_line(stamp[:19])] if isinstance(stamp, str) else []
    parts.append(str(event["kind"]))
    about = [one_line(reason, 200)] if isinstance(reason, str) else []
    for name, word in (("stage", "stage {}"), ("global_batch", "batch {}")):
        if isinstance(event.get(name), int):
            about.append(word.format(event[name]))
    if isinstance(event.get("ranks"), int):
        about.append(counted(event["ranks"], "rank"))
    return " ".join(parts) + (f": {', '.join(about)}" if about else "")


def _planned(plan: Record | None) -> float | None:
    """Samples of the whole run, if they are known beforehand."""
    totals = [pick(part, "totals", "samples") for part in (plan, pick(plan, "fastest"))]
    # A run of a number of updates whose batches training decides has bounds only.
    return number(totals[0]) if totals[1] in (None, totals[0]) else None


def _sound(line: Record) -> Record:
    """Without numbers that cannot be shown."""
    return {
        name: value
        for name, value in line.items()
        if not isinstance(value, int | float) or number(value) is not None
    }


def _speed(line: Record) -> float | None:
    return number(line.get("images_per_sec"))


def _spent(line: Record) -> float:
    """Seconds of a line's updates."""
    seconds = line.get("seconds")
    values = seconds.values() if isinstance(seconds, dict) else ()
    return sum(max(0.0, number(value) or 0.0) for value in values)


def _tells_ranks(line: Record) -> bool:
    ranks = line.get("rank_seconds")
    if not isinstance(ranks, dict) or not isinstance(ranks.get("slowest_rank"), int):
        return False
    low, high = number(ranks.get("busy_median")), number(ranks.get("busy_max"))
    return low is not None and high is not None and low > 0
