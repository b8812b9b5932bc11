"""What a run tells of itself: which records belong to a checkpoint, and how all are read back."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from harness.errors import RunDirectoryError
from harness.files import open_regular, replacing, write_atomic
from harness.jsonl import LONGEST_LINE, Record, encode, last_line, read_jsonl, read_object
from harness.rundir import RunDirectory
from harness.yamlfile import parse_yaml

PHASES = ("data", "to_device", "forward", "backward", "comm_exposed", "optimizer", "other")
"""The keys of ``seconds`` in metrics.jsonl. ``data``: waiting for samples, and making them
(augmentation); ``to_device``: handing them to the GPU; ``comm_exposed``: waiting for the other
ranks; ``other``: what the rest of the loop takes."""


# Events that belong to the trajectory: a resumed run writes them again, so those past the
# checkpoint are cut. All others (start, restart, fault, stop) tell what happened to the processes
# and stay.
TRAJECTORY_EVENTS = frozenset(
    {
        "stage",
        "decision",
        "evaluation",
        "checkpoint",
        "skipped_update",
        "corrupt_image",
        "diverged",
        "end",
    }
)


def of_trajectory(event: Record) -> bool:
    """Whether an event belongs to the trajectory."""
    kind = event.get("kind")
    return isinstance(kind, str) and kind in TRAJECTORY_EVENTS


def furthest(run: RunDirectory) -> tuple[int, int]:
    """(updates, samples) up to which the records tell of training; at most a logging window less
    than what was done."""
    run = run if run.place else run.newest()
    updates = samples = 0
    for record in (*read_jsonl(run.events), last_line(run.metrics)):
        update, seen = (record or {}).get("update"), (record or {}).get("samples_seen")
        if isinstance(update, int) and isinstance(seen, int) and update > updates:
            updates, samples = update, seen
    return updates, samples


@dataclass(frozen=True)
class Position:
    """How much of the records belongs to a checkpoint: lines of metrics, trajectory events, lines
    of layers."""

    metrics: int = 0
    events: int = 0
    layers: int = 0


def rewind(run: RunDirectory, position: Position, into: RunDirectory | None = None) -> int:
    """Leave out what was recorded after a checkpoint, so that the resumed run writes it anew, once.

    ``into``: where the records go on; by default they stay where they are. Either way the files are
    fresh ones: a writer that still has the old ones open writes into those.

    Returns how many lines of metrics are missing from before the checkpoint: 0 unless someone took
    them away, since lines are on the disk before a checkpoint counts.
    """
    into = into or run
    missing = position.metrics - _keep_lines(run.metrics, into.metrics, position.metrics)
    _keep_lines(run.layers, into.layers, position.layers)
    seen = 0
    kept = []
    for record in read_jsonl(run.events):
        if record is None:
            continue
        if of_trajectory(record):
            seen += 1
            if seen > position.events:
                continue
        kept.append(encode(record))
    if run.events.exists():
        write_atomic(into.events, b"".join(kept))
    return missing


def _keep_lines(source: Path, target: Path, count: int) -> int:
    """Copy the first ``count`` lines of a file, which may be long; it is there in one step.

    Returns how many of them there are.
    """
    if not source.exists():
        return 0
    with open_regular(source) as file, replacing(target) as copy:
        kept = 0
        while kept < count and (line := file.readline(LONGEST_LINE)):
            if not line.endswith(b"\n") and len(line) < LONGEST_LINE:
                break
            copy.write(line)
            kept += line.endswith(b"\n")
    return kept


@dataclass(frozen=True)
class RunRecords:
    """What a run directory tells. ``problems`` says what is missing or broken, in words."""

    path: Path
    config: Record | None
    provenance: Record | None
    plan: Record | None
    metrics: list[Record]
    events: list[Record]
    problems: list[str] = field(default_factory=list)


def read_run(path: Path, metrics: bool = True) -> RunRecords:
    """Read a run directory with whatever is there; raises RunDirectoryError if it is no run.

    ``metrics``: read metrics.jsonl, which may have a million lines."""
    run = RunDirectory(path).newest()
    if not path.is_dir():
        raise RunDirectoryError(f"{path} is not a directory; give a run directory (…/runs/NAME)")
    if not run.holds_run:
        raise RunDirectoryError(
            f"{path} holds no run: none of config.yaml, metrics.jsonl, events.jsonl, checkpoints/"
        )
    problems: list[str] = []
    return RunRecords(
        path=path,
        config=read_object(run.config, parse_config, problems),
        provenance=read_object(run.provenance, json.loads, problems),
        plan=read_object(run.plan, json.loads, problems),
        metrics=_read_lines(run.metrics, problems) if metrics else [],
        events=_read_lines(run.events, problems),
        problems=problems,
    )


def parse_config(text: str) -> Any:
    """What a configuration's text holds, for ``read_object``. Raises ConfigError."""
    return parse_yaml(text, "config.yaml").data


def _read_lines(path: Path, problems: list[str]) -> list[Record]:
    if not path.exists():
        problems.append(f"{path.name} is missing")
    try:
        records = list(read_jsonl(path))
    except OSError as error:
        problems.append(f"{path.name} cannot be read: {error.strerror}")
        return []
    broken = sum(record is None for record in records)
    if broken:
        problems.append(f"{path.name}: {broken} of {len(records)} lines are broken and left out")
    return [record for record in records if record is not None]
