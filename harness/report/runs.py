"""One run as the report sees it: columns, evaluations, attempts, and what is missing, in words."""

from __future__ import annotations

import gc
from bisect import bisect_right
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from harness.errors import RunDirectoryError
from harness.records import Record, RunDirectory, RunRecords, read_run
from harness.report.fields import Series, clean, number, pick, plural, words
from harness.report.layers import LayerLog, read_layers

# The columns that the page is made of. The first group belongs in every line; the others may be
# null for good reason (not measured), which is no problem to report.
EXPECTED = ("update", "samples_seen", "global_batch", "lr", "loss", "images_per_sec")
COLUMNS = (*EXPECTED, "epoch", "stage", "ranks", "noise_scale", "distance_from_init")


@dataclass(frozen=True)
class Evaluation:
    """A line of events.jsonl of kind "evaluation"."""

    update: float | None
    samples_seen: float | None
    epoch: float | None
    loss: float | None
    accuracy: float | None
    accuracy_top5: float | None


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
    columns: dict[str, Series]
    layers: LayerLog
    evaluations: list[Evaluation]
    attempts: Attempts | None
    warm_up: frozenset[int]
    status: str
    problems: list[str]

    @property
    def label(self) -> str:
        return f"{self.number} {self.name}"

    def config(self, *keys: str) -> Any:
        return pick(self.records.config, *keys)

    def events(self, *kinds: str) -> list[Record]:
        return [event for event in self.records.events if event.get("kind") in kinds]


def load_run(path: Path, position: int) -> Run:
    """Read a run directory; raises RunDirectoryError only where there is no run to read."""
    try:
        with _collector_paused():
            records = read_run(path)
            layers = read_layers(RunDirectory(path).layers)
            columns = {
                name: [number(record.get(name)) for record in records.metrics] for name in COLUMNS
            }
    except (OSError, RecursionError) as error:
        raise RunDirectoryError(f"{path} cannot be read: {error}") from error
    evaluations = [_evaluation(e) for e in records.events if e.get("kind") == "evaluation"]
    status = _status(records)
    return Run(
        number=position,
        directory=str(path),
        name=clean(words(pick(records.config, "name")) or path.resolve().name, 80),
        records=records,
        columns=columns,
        layers=layers,
        evaluations=evaluations,
        attempts=_attempts(records.events),
        warm_up=_first_windows(columns["update"], records.events),
        status=status,
        problems=[
            *records.problems,
            *layers.problems,
            *_gaps(records.metrics, columns),
            *_event_gaps(records, evaluations),
            *_progress(records, status),
        ],
    )


@contextmanager
def _collector_paused() -> Iterator[None]:
    """Reading makes millions of objects and no garbage; the collector would only walk them."""
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()


def _evaluation(event: Record) -> Evaluation:
    return Evaluation(
        update=number(event.get("update")),
        samples_seen=number(event.get("samples_seen")),
        epoch=number(event.get("epoch")),
        loss=number(event.get("loss")),
        accuracy=number(event.get("accuracy")),
        accuracy_top5=number(event.get("accuracy_top5")),
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


def _first_windows(updates: Series, events: list[Record]) -> frozenset[int]:
    """Positions of the first window of every attempt: warm-up, left out of throughput."""
    known = sorted((update, i) for i, update in enumerate(updates) if update is not None)
    begins = [number(e.get("update")) for e in events if e.get("kind") in ("start", "resume")]
    first: set[int] = set()
    for begin in [b for b in begins if b is not None] or [float("-inf")]:
        place = bisect_right(known, begin, key=lambda pair: pair[0])
        if place < len(known):
            first.add(known[place][1])
    return frozenset(first)


def _status(records: RunRecords) -> str:
    """finished, stopped, unfinished (running or killed: the records cannot tell), or unknown."""
    phases = ("start", "resume", "stop", "end")
    last = [event["kind"] for event in records.events if event.get("kind") in phases]
    if not last:
        return "unfinished" if records.metrics else "unknown"
    return {"stop": "stopped", "end": "finished"}.get(last[-1], "unfinished")


def _gaps(metrics: list[Record], columns: dict[str, Series]) -> list[str]:
    """Which expected values the metrics lack, and which are not numbers."""
    total = len(metrics)
    if not total:
        return ["no training window has been recorded yet (metrics.jsonl)"]
    found = []
    for name in EXPECTED:
        missing = columns[name].count(None)
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


def _progress(records: RunRecords, status: str) -> list[str]:
    planned = number(pick(records.plan, "totals", "samples"))
    seen = [s for r in records.metrics[-1:] if (s := number(r.get("samples_seen"))) is not None]
    how_far = f" at {seen[-1]:,.0f} of {planned:,.0f} samples" if seen and planned else ""
    if status == "unfinished":
        return [f"the run has no end line{how_far}: it was killed, or it is still running"]
    if status == "stopped":
        return [f"the run was stopped on request{how_far}; it can be continued"]
    return []
