"""What a repeat's run directory tells: its windows, its throughput, what carried it."""

from __future__ import annotations

import csv
import io
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from math import fsum
from pathlib import Path
from statistics import median

from harness.benchfile import WINDOWS, Repeat
from harness.benchstats import Warmup, find_warmup
from harness.errors import HarnessError
from harness.files import open_regular, write_atomic
from harness.jsonl import read_jsonl
from harness.rundir import RunDirectory

_LEAST_WINDOWS = 2
COLUMNS = ("point", "repeat", "window", "updates", "images", "seconds", "warmup")


@dataclass(frozen=True)
class Window:
    """A line of metrics.jsonl."""

    updates: int
    images: int
    """Of all ranks."""
    phases: Mapping[str, float]
    """Seconds on rank 0, which cover all of its time."""
    bytes_sent: int | None

    @property
    def seconds(self) -> float:
        return fsum(self.phases.values())


def read_windows(run: RunDirectory) -> list[Window]:
    """The windows of a run that was never resumed.

    Raises HarnessError if there are too few, or a line is broken.
    """
    windows: list[Window] = []
    updates = samples = 0
    for number, line in enumerate(read_jsonl(run.metrics), start=1):
        try:
            if line is None:
                raise TypeError
            window = Window(
                line["update"] - updates,
                line["samples_seen"] - samples,
                {str(name): float(spent) for name, spent in line["seconds"].items()},
                line.get("comm_bytes"),
            )
            updates, samples = line["update"], line["samples_seen"]
        except (KeyError, TypeError, ValueError, AttributeError):
            raise HarnessError(f"{run.metrics}:{number}: not a line that training writes") from None
        if window.seconds > 0:
            windows.append(window)
    if len(windows) < _LEAST_WINDOWS:
        raise HarnessError(
            f"{run.metrics}: {len(windows)} updates were recorded, which tell no throughput"
        )
    return windows


def measured(number: int, windows: Sequence[Window]) -> tuple[Repeat, Warmup]:
    """A repeat from all its windows."""
    warmup = find_warmup([window.seconds for window in windows])
    steady = windows[warmup.windows :]
    seconds, updates = fsum(w.seconds for w in steady), sum(w.updates for w in steady)
    repeat = Repeat(
        repeat=number,
        images_per_sec=sum(w.images for w in steady) / seconds,
        seconds_per_update=seconds / updates,
        windows=len(windows),
        warmup_windows=warmup.windows,
        seconds={
            phase: fsum(w.phases.get(phase, 0.0) for w in steady) / updates
            for phase in steady[0].phases
        },
        settled=warmup.settled,
    )
    return repeat, warmup


def bytes_per_update(windows: Sequence[Window]) -> int | None:
    """Median of the payload that a rank hands to the allreduce in an update."""
    sent = [w.bytes_sent / w.updates for w in windows if w.bytes_sent is not None]
    return round(median(sent)) if sent else None


# windows.csv


def keep_windows(directory: Path, finished: Collection[tuple[str, int]]) -> None:
    """Begin windows.csv, or cut out of it what does not belong to these repeats."""
    path = directory / WINDOWS
    rows: list[list[str]] = []
    if path.exists():
        with open_regular(path) as file:
            text = file.read().decode(errors="replace")
        rows = [line.split(",") for line in text.split("\n")][1:]
    wanted = {(point, str(repeat)) for point, repeat in finished}
    kept = [row for row in rows if len(row) == len(COLUMNS) and (row[0], row[1]) in wanted]
    write_atomic(path, _csv([COLUMNS, *kept]))


def append_windows(
    directory: Path, point: str, repeat: int, windows: Sequence[Window], warmup: int
) -> None:
    """Add a repeat's windows."""
    rows = [
        (point, repeat, number, w.updates, w.images, f"{w.seconds:.9g}", int(number < warmup))
        for number, w in enumerate(windows)
    ]
    with (directory / WINDOWS).open("ab") as file:
        file.write(_csv(rows))


def _csv(rows: Sequence[Sequence[object]]) -> bytes:
    text = io.StringIO(newline="")
    csv.writer(text, lineterminator="\n").writerows(rows)
    return text.getvalue().encode()
