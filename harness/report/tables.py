"""The stage table, the list of events, flattened mappings, and the CSV files.

A stage that was reached is described by what was measured (events.jsonl, metrics.jsonl); one that
was not, by what is planned (plan.json). The two are never mixed in one row, except that the planned
number of updates stands beside the number done.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import astuple, dataclass, fields
from itertools import chain, islice, pairwise, repeat
from typing import Any

import numpy as np
from numpy.typing import NDArray

from harness.jsonl import Record
from harness.lenient import listed, number, pick
from harness.records import PHASES
from harness.redact import HIDDEN, is_secret, redacted, redacted_words
from harness.report.columns import COUNTS, GROUPS, TEXTS, Columns, plain
from harness.report.csvtext import to_csv
from harness.report.fields import (
    clean,
    count,
    duration,
    instant,
    percent,
    plural,
    words,
)
from harness.report.layers import Layer, LayerLog, Snapshot
from harness.report.runs import Evaluation, Run
from harness.report.summary import quantile_of

# metrics.csv holds at most this many lines; of a longer run every k-th, and the page says so.
METRICS_ROWS = 20_000
METRICS_COLUMNS = (
    *("update", "samples_seen", "epoch", "stage", "ranks", "accumulation", "micro_batch"),
    *("global_batch", "lr", "momentum", "loss", "images_per_sec", "comm_bytes", "grad_norm"),
    *("noise_scale", "distance_from_init"),
)
Places = NDArray[np.intp]
_NOWHERE: Places = np.zeros(0, dtype=np.intp)


@dataclass(frozen=True)
class Stage:
    """A row of the stage table."""

    stage: float
    reached: bool
    segment: float | None
    start_epoch: float | None
    end_epoch: float | None
    start_samples: float | None
    global_batch: float | None
    ranks: float | None
    accumulation: float | None
    micro_batch: float | None
    lr_first: float | None
    lr_last: float | None
    momentum: float | None
    updates_planned: float | None
    updates_done: float | None
    images_per_sec_median: float | None
    reason: str | None


def stage_rows(run: Run) -> list[Stage]:
    """One row per stage that is planned or was reached, in order."""
    # Growth that is decided from measurements has bounds (``fastest``), not planned stages.
    bounded = pick(run.records.plan, "fastest") is not None
    planned = {} if bounded else _by_stage(_mappings(pick(run.records.plan, "stages")))
    begun = _by_stage(run.events("stage"))
    windows = _windows_by_stage(run)
    reached = sorted(begun.keys() | windows.keys())
    following = dict(pairwise(reached))
    rows = [
        _reached(
            run,
            stage,
            begun.get(stage, []),
            windows.get(stage, _NOWHERE),
            planned.get(stage, [{}])[-1],
            begun.get(following.get(stage, math.nan), []),
        )
        for stage in reached
    ]
    ahead = planned.keys() - begun.keys() - windows.keys()
    rows += [_planned(stage, planned[stage][-1]) for stage in ahead]
    return sorted(rows, key=lambda row: row.stage)


def _mappings(value: Any) -> list[Record]:
    return [entry for entry in listed(value) if isinstance(entry, dict)]


def _by_stage(records: list[Record]) -> dict[float, list[Record]]:
    groups: dict[float, list[Record]] = {}
    for record in records:
        stage = number(record.get("stage"))
        if stage is not None:
            groups.setdefault(stage, []).append(record)
    return groups


def _windows_by_stage(run: Run) -> dict[float, Places]:
    """Positions of the lines of each stage, in order."""
    stages = run.columns["stage"]
    order = np.argsort(stages, kind="stable")[: int((~np.isnan(stages)).sum())]
    values, begins = np.unique(stages[order], return_index=True)
    parts = np.split(order, begins[1:]) if len(values) else []
    return {plain("stage", v) or 0: part for v, part in zip(values, parts, strict=True)}


def _planned(stage: Any, plan: Record) -> Stage:
    def get(name: str) -> float | None:
        return number(plan.get(name))

    return Stage(
        stage=stage,
        reached=False,
        segment=get("segment"),
        start_epoch=get("start_epoch"),
        end_epoch=get("end_epoch"),
        start_samples=None,
        global_batch=get("global_batch"),
        ranks=get("ranks"),
        accumulation=get("accumulation"),
        micro_batch=get("micro_batch"),
        lr_first=get("lr_start"),
        lr_last=get("lr_end"),
        momentum=get("momentum"),
        updates_planned=get("updates"),
        updates_done=None,
        images_per_sec_median=None,
        reason=None,
    )


def _reached(
    run: Run,
    stage: Any,
    events: list[Record],
    windows: Places,
    plan: Record,
    next_events: list[Record],
) -> Stage:
    """What the event of its begin and the windows of a stage say; ranks as they last were."""
    first, last = (events[0], events[-1]) if events else ({}, {})

    def line(name: str, place: int) -> float | None:
        return run.columns.at(name, int(windows[place])) if len(windows) else None

    def measured(name: str) -> float | None:
        value = line(name, -1)
        return number(last.get(name)) if value is None else value

    begin = number(first.get("epoch")) if events else _epoch_before(run, windows)
    following = number(pick(next_events[0], "epoch")) if next_events else None
    return Stage(
        stage=stage,
        reached=True,
        segment=number(plan.get("segment")),
        start_epoch=begin,
        end_epoch=following if following is not None else line("epoch", -1),
        start_samples=number(first.get("samples_seen")),
        global_batch=measured("global_batch"),
        ranks=measured("ranks"),
        accumulation=measured("accumulation"),
        micro_batch=measured("micro_batch"),
        lr_first=number(first["lr"]) if "lr" in first else line("lr", 0),
        lr_last=line("lr", -1),
        momentum=line("momentum", -1),
        updates_planned=number(plan.get("updates")),
        updates_done=_updates_done(run, windows),
        images_per_sec_median=_median_rate(run, windows),
        reason=words(first.get("reason")),
    )


def _epoch_before(run: Run, windows: Places) -> float | None:
    """The epoch of the window before a stage whose begin was not recorded."""
    first = int(windows[0]) if len(windows) else 0
    return run.columns.at("epoch", first - 1) if first else None


def _updates_done(run: Run, windows: Places) -> float | None:
    """Updates from the last window before the stage to its last window."""
    if not len(windows):
        return None
    begin = run.columns.at("update", int(windows[0]) - 1) if windows[0] else 0
    end = run.columns.at("update", int(windows[-1]))
    return end - begin if end is not None and begin is not None else None


def _median_rate(run: Run, windows: Places) -> float | None:
    return quantile_of(run.columns["images_per_sec"][windows[run.timed[windows]]], 0.5)


@dataclass(frozen=True)
class EventRow:
    """A line of the list of events; ``tone`` marks what went wrong."""

    time: str | None
    update: float | None
    samples_seen: float | None
    tone: str
    what: str


_ORDINARY = frozenset(
    {
        "start",
        "resume",
        "stage",
        "decision",
        "merged_segment",
        "not_grown",
        "regroup",
        "autotune",
        "stop",
        "end",
    }
)
"""Kinds of events that are no trouble."""


def event_rows(run: Run) -> list[EventRow]:
    """All events except evaluations and checkpoints, which are many and as they should be."""
    rows = []
    first = True
    for event in run.records.events:
        kind = event.get("kind")
        if kind in ("evaluation", "checkpoint"):
            continue
        trouble = str(kind) not in _ORDINARY
        tone = "trouble" if trouble or (kind == "start" and not first) else "plain"
        first = first and kind not in ("start", "resume")
        rows.append(
            EventRow(
                time=_moment(event.get("time")),
                update=number(event.get("update")),
                samples_seen=number(event.get("samples_seen")),
                tone=tone,
                what=_TELL.get(str(kind), _tell_other)(event),
            )
        )
    return rows


def _moment(value: Any) -> str | None:
    """A time stamp to the second in UTC; one that cannot be read stays as it is."""
    stamp = instant(value)
    return f"{stamp:%Y-%m-%d %H:%M:%S}" if stamp else words(value)


def _get(event: Record, key: str) -> str:
    value = event.get(key)
    return count(number(value)) if not isinstance(value, str) else clean(value)


def _tell_start(event: Record) -> str:
    ranks = plural(number(event.get("ranks")), "rank")
    return f"Attempt {_get(event, 'attempt')} started on {ranks}"


def _tell_resume(event: Record) -> str:
    ranks = plural(number(event.get("ranks")), "rank")
    where = words(event.get("checkpoint")) or "the beginning (no checkpoint)"
    again = number(event.get("updates_repeated"))
    repeats = f"; {plural(again, 'update')} to be repeated" if again else ""
    return f"Attempt {_get(event, 'attempt')} resumed on {ranks} from {where}{repeats}"


def _tell_stage(event: Record) -> str:
    cut = " × ".join(_get(event, key) for key in ("ranks", "accumulation", "micro_batch"))
    reason = words(event.get("reason"))
    because = f": {reason}" if reason else " (reason not recorded)"
    return (
        f"Stage {_get(event, 'stage')}, global batch {_get(event, 'global_batch')} ({cut}){because}"
    )


def _tell_decision(event: Record) -> str:
    because = words(event.get("reason")) or "reason not recorded"
    return f"Growth decision, global batch {_get(event, 'global_batch')}: {because}"


def _tell_rejected(event: Record) -> str:
    return f"Checkpoint {_get(event, 'file')} rejected: {_get(event, 'reason')}"


def _tell_skipped(event: Record) -> str:
    return f"Update skipped: {_get(event, 'reason')}"


def _tell_corrupt(event: Record) -> str:
    which = "Test" if event.get("split") == "test" else "Training"
    return f"{which} image left out: {_get(event, 'reason')}"


def _tell_fault(event: Record) -> str:
    return f"Failed: {_get(event, 'reason')}"


def _tell_reason(event: Record) -> str:
    reason = _get(event, "reason")
    return f"{reason[:1].upper()}{reason[1:]}"


def _tell_merged(event: Record) -> str:
    return f"Ranks did not grow: {_get(event, 'reason')}"


def _tell_regroup(event: Record) -> str:
    return f"The ranks form another world: {_get(event, 'reason')}"


def _tell_stop(event: Record) -> str:
    return f"Stopped: {_get(event, 'reason')}"


def _tell_end(event: Record) -> str:
    accuracy, seconds = number(event.get("accuracy")), number(event.get("seconds"))
    return f"Finished; test accuracy {percent(accuracy)}; attempt took {duration(seconds)}"


def _tell_other(event: Record) -> str:
    """An event of a kind that is not known here: its fields as they are."""
    shown = ("kind", "time", "update", "samples_seen")
    rest = "; ".join(f"{k}: {v}" for k, v in event.items() if k not in shown)
    kind = event.get("kind", "an event without a kind")
    return clean(f"{kind}: {rest}" if rest else kind)


_TELL: dict[str, Callable[[Record], str]] = {
    "start": _tell_start,
    "resume": _tell_resume,
    "stage": _tell_stage,
    "decision": _tell_decision,
    "checkpoint_rejected": _tell_rejected,
    "skipped_update": _tell_skipped,
    "corrupt_image": _tell_corrupt,
    "fault": _tell_fault,
    "restart": _tell_reason,
    "host_left_out": _tell_reason,
    "merged_segment": _tell_merged,
    "not_grown": _tell_merged,
    "regroup": _tell_regroup,
    "stop": _tell_stop,
    "end": _tell_end,
}


def flatten(value: Any, limit: int) -> list[tuple[str, str]]:
    """The leaves of a nested mapping as (dotted name, text), the first ``limit`` of them."""
    return list(islice(_leaves(value, "", 0), limit))


def _leaves(value: Any, name: str, depth: int) -> Iterator[tuple[str, str]]:
    nested = depth < 12  # deeper is a YAML alias that holds itself
    if isinstance(value, Mapping) and value and nested:
        for key, entry in value.items():
            shown = HIDDEN if entry and is_secret(str(key)) else entry
            yield from _leaves(
                shown, f"{name}.{clean(key, 60)}" if name else clean(key, 60), depth + 1
            )
    elif isinstance(value, list | tuple) and value and nested:
        if all(isinstance(entry, str | int | float | None) for entry in value):
            between = " " if name.endswith(("command", "argv")) else ", "
            words = redacted_words(map(str, islice(value, 100)))
            yield name, clean(between.join(clean(word, 100) for word in words))
        else:
            for place, entry in enumerate(value):
                yield from _leaves(entry, f"{name}[{place}]", depth + 1)
    elif isinstance(value, Mapping | list | tuple):
        yield name, "…" if value else "empty"
    else:
        yield name, "not recorded" if value is None else clean(redacted(str(value)[:2000]))


def metrics_step(run: Run) -> int:
    """Of how many lines of metrics.jsonl metrics.csv holds one."""
    return -(-run.columns.lines // METRICS_ROWS) or 1


def metrics_csv(runs: Sequence[Run]) -> bytes:
    """The lines of metrics.jsonl; what they hold by name (``seconds`` of each phase, …) in a column
    of its own."""
    groups = {
        f"{group}.{name}": f"{group}_{name}"
        for group in GROUPS
        for name in dict.fromkeys(
            chain(
                PHASES if group == "seconds" else (),
                *(run.columns.group(group) for run in runs),
            )
        )
    }
    optional = [n for n in ("memory_peak_bytes",) if any(run.columns.known(n).size for run in runs)]
    names = (*METRICS_COLUMNS, *optional, *groups)
    rows = chain.from_iterable(_metrics_rows(run, names) for run in runs)
    return to_csv(("run", *METRICS_COLUMNS, *optional, *map(clean, groups.values())), rows)


def _metrics_rows(run: Run, names: Iterable[str]) -> Iterator[tuple[Any, ...]]:
    step = metrics_step(run)
    columns = [_cells(run.columns, name, step) for name in names]
    return zip(repeat(run.number, len(columns[0])), *columns, strict=True)


def _cells(columns: Columns, name: str, step: int) -> list[Any]:
    values = columns[name][::step]
    if name.rpartition(".")[2] in TEXTS:
        return [None if math.isnan(v) else columns.texts[int(v)] for v in values.tolist()]
    if name in COUNTS:
        return [plain(name, value) for value in values.tolist()]
    return [None if value != value else value for value in values.tolist()]


def evaluations_csv(runs: Iterable[Run]) -> bytes:
    header = ("run", *(field.name for field in fields(Evaluation)))
    return to_csv(header, ((run.number, *astuple(e)) for run in runs for e in run.evaluations))


def stages_csv(stages: Iterable[tuple[Run, list[Stage]]]) -> bytes:
    header = ("run", *(field.name for field in fields(Stage)))
    return to_csv(header, ((run.number, *astuple(row)) for run, rows in stages for row in rows))


def layers_step(log: LayerLog) -> int:
    """Of how many lines of layers.jsonl layers.csv holds about one."""
    return -(-log.lines // len(log.snapshots)) if log.snapshots else 1


def layers_csv(runs: Iterable[Run]) -> bytes | None:
    """A line per layer and logged update; None if no run has any."""
    rows = [
        (run.number, snapshot.update, snapshot.samples_seen, snapshot.epoch, *astuple(layer))
        for run in runs
        for snapshot in run.layers.snapshots
        for layer in snapshot.layers
    ]
    where = (field.name for field in fields(Snapshot) if field.name != "layers")
    what = (field.name for field in fields(Layer))
    return to_csv(("run", *where, *what), rows) if rows else None
