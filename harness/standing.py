"""Where a run stands, by its records, in the words of ``harness status`` and ``harness watch``."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

from harness.jsonl import Record
from harness.lenient import number
from harness.yamlfile import one_line

STARTS = ("start", "resume")
CUT_OFF = ("fault", "restart", "host_left_out")
"""Events of the launching process: the ranks have ended, and not by themselves."""
OF_PROCESSES = (*STARTS, "stop", "end", *CUT_OFF)
"""Events from which the state follows."""


@dataclass(frozen=True)
class Why:
    """An end of the ranks before the run's end."""

    time: str | None
    kind: str
    reason: str


@dataclass(frozen=True)
class RunStatus:
    """Where a run is, by its records. None: they do not say."""

    state: str
    """not started, stopped or running, done."""
    samples_seen: int | None = None
    samples_planned: int | None = None
    epoch: float | None = None
    stage: int | None = None
    global_batch: int | None = None
    ranks: int | None = None
    accumulation: int | None = None
    micro_batch: int | None = None
    images_per_sec: float | None = None
    checkpoint: str | None = None
    """The newest one."""
    attempts: int = 0
    updates_repeated: int | None = None
    """Done again after restarts, since the checkpoint was older than the end."""
    ends: list[Why] = field(default_factory=list)


def standing(last: Record, events: list[Record], plan: Record | None) -> RunStatus:
    """Where a run is.

    Args:
        last: the last line of metrics.jsonl, or nothing.
        events: lines of events.jsonl in order, at least those in ``OF_PROCESSES`` and the newest
            checkpoint's.
        plan: plan.json.
    """
    starts = _of(events, *STARTS)
    repeated = [_whole(event, "updates_repeated") for event in starts]
    known = [count for count in repeated if count is not None]
    totals = (plan or {}).get("totals")
    return RunStatus(
        state=state_of(events),
        samples_seen=_whole(last, "samples_seen"),
        samples_planned=_whole(totals if isinstance(totals, dict) else {}, "samples"),
        epoch=number(last.get("epoch")),
        stage=_whole(last, "stage"),
        global_batch=_whole(last, "global_batch"),
        ranks=_whole(last, "ranks") or _whole(starts[-1] if starts else {}, "ranks"),
        accumulation=_whole(last, "accumulation"),
        micro_batch=_whole(last, "micro_batch"),
        images_per_sec=number(last.get("images_per_sec")),
        checkpoint=_text(_of(events, "checkpoint"), "file"),
        attempts=len(starts),
        updates_repeated=sum(known) if known else None,
        ends=[
            Why(
                None if event.get("time") is None else one_line(str(event["time"])),
                str(event["kind"]),
                one_line(str(event.get("reason", "")), 200),
            )
            for event in _of(events, "stop", *CUT_OFF)
        ],
    )


def state_of(events: list[Record]) -> str:
    """By the last line that tells of the processes or of the run's end."""
    told = _of(events, *OF_PROCESSES)
    kind = told[-1]["kind"] if told else None
    words = {"end": "done", "stop": "stopped", "start": "running", "resume": "running"}
    return words.get(str(kind), "failed") if kind else "not started"


def _of(events: list[Record], *kinds: str) -> list[Record]:
    return [event for event in events if event.get("kind") in kinds]


def _whole(record: Record, name: str) -> int | None:
    value = record.get(name)
    return value if type(value) is int and abs(value) < 2**62 else None  # more is damage


def _text(events: list[Record], name: str) -> str | None:
    value = events[-1].get(name) if events else None
    return one_line(value) if isinstance(value, str) else None


# In words


def share(run: RunStatus) -> str:
    if run.samples_seen is None or not run.samples_planned:
        return ""
    return f"{run.samples_seen / run.samples_planned:.0%}"


def run_lines(run: RunStatus) -> Iterator[str]:
    yield f"run: {run.state}"
    yield from progress_lines(run)
    yield from attempt_lines(run)
    for why in run.ends[-10:]:
        yield f"  {why.time or ''} {why.kind}: {why.reason}".rstrip(": ")


def progress_lines(run: RunStatus) -> Iterator[str]:
    """How far it is, and how it goes on from there."""
    if run.samples_seen is not None:
        planned = f" of {run.samples_planned:,} ({share(run)})" if run.samples_planned else ""
        epoch = "" if run.epoch is None else f", epoch {run.epoch:.2f}"
        yield f"samples seen: {run.samples_seen:,}{planned}{epoch}"
    if run.global_batch is not None:
        parts = (run.ranks, run.accumulation, run.micro_batch)
        cut = "" if None in parts else f" = {' × '.join(map(str, parts))}"
        speed = "" if run.images_per_sec is None else f", {run.images_per_sec:,.0f} images/s"
        yield f"stage {run.stage}: batch {run.global_batch}{cut}{speed}"


def attempt_lines(run: RunStatus) -> Iterator[str]:
    """The newest checkpoint, and how often the ranks were started."""
    if run.checkpoint is not None:
        yield f"newest checkpoint: {run.checkpoint}"
    if run.attempts:
        repeated = run.updates_repeated
        again = "" if repeated is None else f", updates repeated: {repeated}"
        yield f"attempts: {run.attempts}{again}"
