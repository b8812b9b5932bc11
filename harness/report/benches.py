"""A bench directory as the report sees it: bench.json, with whatever is there."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from harness.benchfile import FORMAT, NAME
from harness.errors import RunDirectoryError
from harness.files import read_text
from harness.jsonl import Record, read_object
from harness.lenient import listed, number, pick
from harness.records import parse_config
from harness.report.fields import clean, plural, words
from harness.report.scaling import Point, Series, series_of

POINTS = 10_000  # more is damage


@dataclass(frozen=True)
class Bench:
    """A bench's points and what is missing, in words."""

    number: int
    directory: str
    name: str
    task: str
    mode: str | None
    record: Record
    config: Record | None
    """config.yaml beside it, where there is one."""
    points: list[Point]
    series: list[Series]
    problems: list[str]

    @property
    def label(self) -> str:
        return f"bench {self.number} {self.name}"

    def get(self, *keys: str) -> Any:
        return pick(self.record, *keys)


def load_bench(path: Path, position: int) -> Bench:
    """Read bench.json; raises RunDirectoryError where it cannot be read at all."""
    file = path / NAME
    try:
        record = json.loads(read_text(file))
    except (OSError, ValueError, RecursionError) as error:
        raise RunDirectoryError(f"{file} cannot be read: {type(error).__name__}") from error
    if not isinstance(record, dict):
        raise RunDirectoryError(f"{file} holds no bench: it is not a mapping")
    given = listed(record.get("points"))[:POINTS]
    read = [_point(e, i) for i, e in enumerate(given) if isinstance(e, dict)]
    points = [point for point in read if point is not None]
    mode = words(record.get("mode"))
    name = clean(words(record.get("name")) or path.resolve().name, 80)
    task = f"{_known(record, 'model')} on {_known(record, 'dataset')}"
    return Bench(
        number=position,
        directory=str(path),
        name=name,
        task=task,
        mode=mode,
        record=record,
        config=read_object(path / "config.yaml", parse_config),
        points=points,
        series=series_of(f"bench {position} {name}", task, points, mode, f"{position}: "),
        problems=_problems(record, given, points),
    )


def _known(record: Record, key: str) -> str:
    return words(record.get(key)) or f"an unknown {key}"


def _problems(record: Record, given: list[Any], points: list[Point]) -> list[str]:
    found = []
    if record.get("status") != "complete":
        found.append("bench.json: the bench is not complete; points may be missing")
    if record.get("format") != FORMAT:
        found.append(
            f"bench.json: its format is not {FORMAT}, so parts of it may not be understood"
        )
    if len(points) < len(given):
        left_out = plural(len(given) - len(points), "point")
        found.append(f"bench.json: {left_out} without ranks and throughput, left out")
    if not points:
        found.append("bench.json has no point with a throughput")
    alone = sum(len(point.repeats) < 2 for point in points)
    if alone:
        found.append(f"bench.json: {plural(alone, 'point')} without repeats, so without interval")
    return found


def _point(entry: Record, place: int) -> Point | None:
    ranks, rate = number(entry.get("ranks")), number(entry.get("images_per_sec"))
    if ranks is None or ranks < 1 or rate is None or rate <= 0:
        return None
    rates = [
        known
        for repeat in listed(entry.get("repeats"))
        if (known := number(pick(repeat, "images_per_sec")) or 0.0) > 0
    ]
    seconds = entry.get("seconds")
    return Point(
        ranks=int(ranks),
        nodes=number(entry.get("nodes")),
        micro_batch=number(entry.get("micro_batch")),
        accumulation=number(entry.get("accumulation")),
        global_batch=number(entry.get("global_batch")),
        images_per_sec=rate,
        low=number(entry.get("images_per_sec_low")),
        high=number(entry.get("images_per_sec_high")),
        confidence=number(entry.get("confidence")),
        repeats=tuple(rates),
        seconds=known_seconds(seconds),
        mfu=number(entry.get("mfu")),
        source=f"bench.json: points[{place}]",
    )


def known_seconds(value: Any) -> dict[str, float]:
    """Seconds by phase, of those that are known and not negative."""
    if not isinstance(value, dict):
        return {}
    entries = ((clean(k, 40), number(v)) for k, v in list(value.items())[:24])
    return {name: seconds for name, seconds in entries if seconds is not None and seconds >= 0}
