"""One run as the report sees it: columns, evaluations, attempts, and what is missing, in words."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from harness.errors import RunDirectoryError
from harness.jsonl import Record
from harness.lenient import listed, number, pick
from harness.records import RunRecords, read_run
from harness.report.columns import Array, Columns, read_columns
from harness.report.fields import clean, plural, words
from harness.report.layers import LayerLog, read_layers
from harness.rundir import RunDirectory

# What belongs in every line of metrics.jsonl. Other fields may be null for good reason (not
# measured), which is no problem to report.
EXPECTED = ("update", "samples_seen", "global_batch", "lr", "loss", "images_per_sec")


@dataclass(frozen=True)
class Evaluation:
    """A line of events.jsonl of kind "evaluation"."""

    update: float | None
    samples_seen: float | None
    epoch: float | None
    loss: float | None
    accuracy: float | None
    accuracy_top5: float | None
    metric: float | None = None
    """Of the user's own (train.metric)."""


@dataclass(frozen=True)
class Attempts:
    """How often the processes were started, and why again."""

    total: int
    restarts: int  # after an interruption that nobody asked for
    continuations: int  # after a stop on request, as when ranks are added


@dataclass(frozen=True)
class Run:
    """The records of a run with what several parts of the page need worked out once."""

    number: int
    directory: str
    name: str
    records: RunRecords
    columns: Columns
    layers: LayerLog
    evaluations: list[Evaluation]
    attempts: Attempts | None
    timed: NDArray[np.bool_]
    """Of each line whether it counts for throughput: it has one, and is not the first window of an
    attempt, which is warm-up."""
    warm_up: int
    """Windows that are warm-up."""
    status: str
    problems: list[str]

    @property
    def label(self) -> str:
        return f"{self.number} {self.name}"

    def config(self, *keys: str) -> Any:
        return pick(self.records.config, *keys)

    @property
    def starts(self) -> list[Any]:
        """What provenance.json says of communication, of the first start and of each that went on,
        in their order."""
        first = self.records.provenance
        return [pick(one, "communication") for one in (first, *listed(pick(first, "attempts")))]

    def events(self, *kinds: str) -> list[Record]:
        return [event for event in self.records.events if event.get("kind") in kinds]


def load_run(path: Path, position: int) -> Run:
    """Read a run directory; raises RunDirectoryError only where there is no run to read."""
    try:
        records = read_run(path, metrics=False)
        layers = read_layers(RunDirectory(path).layers)
        columns = _columns(RunDirectory(path).metrics, records.problems)
    except (OSError, RecursionError) as error:
        raise RunDirectoryError(f"{path} cannot be read: {error}") from error
    evaluations = [_evaluation(e) for e in records.events if e.get("kind") == "evaluation"]
    status = _status(records, columns)
    first = _first_windows(columns["update"], records.events)
    timed = columns["images_per_sec"] > 0
    timed[first] = False
    return Run(
        number=position,
        directory=str(path),
        name=clean(words(pick(records.config, "name")) or path.resolve().name, 80),
        records=records,
        columns=columns,
        layers=layers,
        evaluations=evaluations,
        attempts=_attempts(records.events),
        timed=timed,
        warm_up=len(first),
        status=status,
        problems=[
            *records.problems,
            *_metrics_problems(RunDirectory(path).metrics, columns),
            *layers.problems,
            *_gaps(columns),
            *_event_gaps(records, evaluations),
            *_progress(records, columns, status),
        ],
    )


def _columns(path: Path, problems: list[str]) -> Columns:
    try:
        return read_columns(path)
    except OSError as error:
        problems.append(f"{path.name} cannot be read: {error.strerror}")
        return Columns()


def _metrics_problems(path: Path, columns: Columns) -> list[str]:
    if not path.exists():
        return ["metrics.jsonl is missing"]
    if columns.broken:
        total = columns.lines + columns.broken
        return [f"metrics.jsonl: {columns.broken:,} of {total:,} lines are broken and left out"]
    return []


def _evaluation(event: Record) -> Evaluation:
    return Evaluation(
        update=number(event.get("update")),
        samples_seen=number(event.get("samples_seen")),
        epoch=number(event.get("epoch")),
        loss=number(event.get("loss")),
        accuracy=number(event.get("accuracy")),
        accuracy_top5=number(event.get("accuracy_top5")),
        metric=number(event.get("metric")),
    )


def _attempts(events: list[Record]) -> Attempts | None:
    total = restarts = continuations = 0
    stopped = False
    for event in events:
        if event.get("kind") in ("start", "resume"):
            if total:
                restarts += not stopped
                continuations += stopped
            total += 1
            stopped = False
        elif event.get("kind") in ("stop", "end"):
            stopped = True
    return Attempts(total, restarts, continuations) if total else None


def _first_windows(updates: Array, events: list[Record]) -> list[int]:
    """Positions of the first window of every attempt: warm-up, left out of throughput."""
    order = np.argsort(updates, kind="stable")[: int((~np.isnan(updates)).sum())]  # NaN sorts last
    begins = [number(e.get("update")) for e in events if e.get("kind") in ("start", "resume")]
    wanted = [b for b in begins if b is not None] or [-np.inf]
    places = np.searchsorted(updates[order], wanted, side="right")
    return sorted({int(order[place]) for place in places if place < len(order)})


def _status(records: RunRecords, columns: Columns) -> str:
    """finished, stopped, unfinished (running or killed: the records cannot tell), or unknown."""
    phases = ("start", "resume", "stop", "end")
    last = [event["kind"] for event in records.events if event.get("kind") in phases]
    if not last:
        return "unfinished" if columns.lines else "unknown"
    return {"stop": "stopped", "end": "finished"}.get(last[-1], "unfinished")


def _gaps(columns: Columns) -> list[str]:
    """Which expected values the metrics lack, and which are not numbers."""
    total = columns.lines
    if not total:
        return ["no training window has been recorded yet (metrics.jsonl)"]
    found = []
    for name in EXPECTED:
        missing = columns.missing(name)
        if missing:
            share = "every line" if missing == total else f"{missing:,} of {total:,} lines"
            found.append(f"metrics.jsonl: {name} is null or not a number in {share}")
    return found


def _event_gaps(records: RunRecords, evaluations: list[Evaluation]) -> list[str]:
    found = []
    if not evaluations:
        found.append("no evaluation has been recorded yet, so there is no test accuracy")
    for name in ("accuracy", "loss", "samples_seen"):
        missing = [getattr(e, name) for e in evaluations].count(None)
        if missing:
            found.append(
                f"events.jsonl: {name} is null or not a number in "
                f"{missing:,} of {plural(len(evaluations), 'evaluation')}"
            )
    if records.events and not any(e.get("kind") in ("start", "resume") for e in records.events):
        found.append("events.jsonl has no start line: attempts and restarts are not known")
    return found


def _progress(records: RunRecords, columns: Columns, status: str) -> list[str]:
    planned = number(pick(records.plan, "totals", "samples"))
    seen = columns.last("samples_seen")
    how_far = f" at {seen:,.0f} of {planned:,.0f} samples" if seen is not None and planned else ""
    if status == "unfinished":
        return [f"the run has no end line{how_far}: it was killed, or it is still running"]
    if status == "stopped":
        return [f"the run was stopped on request{how_far}; it can be continued"]
    return []
