"""Throughput against ranks: points, the series that they form, speed-up and efficiency.

Of a bench the points are its own. Of runs, each run has one for every way in which its global
batch was cut: the median of the throughput of its windows, the first of each attempt left out. Runs
of the same task and the same cut are repeats of one point; their interval is Student's, for the
mean.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise

import numpy as np

from harness.lenient import listed, pick
from harness.report.columns import Array
from harness.report.fields import clean, count, words
from harness.report.runs import Run
from harness.report.summary import describe, quantile_of
from harness.student import CONFIDENCE, mean_interval

HALF = 0.5
"""A rank is worth its cost while it buys at least this share of what one rank alone does."""

Cut = tuple[float | None, ...]


@dataclass(frozen=True)
class Point:
    """A measured throughput, in images per second over all ranks; None: not known."""

    ranks: int
    nodes: float | None
    micro_batch: float | None
    accumulation: float | None
    global_batch: float | None
    images_per_sec: float
    low: float | None
    high: float | None
    confidence: float | None
    repeats: tuple[float, ...]
    seconds: dict[str, float]
    """Per update, by phase."""
    mfu: float | None
    source: str

    @property
    def seconds_per_update(self) -> float | None:
        return self.global_batch / self.images_per_sec if self.global_batch else None

    @property
    def half_width(self) -> float | None:
        """Of the interval, in images per second."""
        return None if self.low is None or self.high is None else (self.high - self.low) / 2


@dataclass(frozen=True)
class Scaled:
    """A point beside the first of its series, the one of the fewest ranks."""

    point: Point
    speedup: float
    """images_per_sec / that of the first point."""
    efficiency: float
    """Speed-up / (ranks / ranks of the first point)."""
    efficiency_low: float | None
    efficiency_high: float | None


@dataclass(frozen=True)
class Series:
    """Points of different rank counts that differ in nothing else: weak scaling with a fixed batch
    per rank, strong scaling with a fixed global batch."""

    label: str
    task: str
    mode: str
    fixed: str
    """What is the same in all points."""
    short: str
    """A name for legends."""
    points: list[Point] = field(default_factory=list)

    @property
    def first(self) -> Point:
        return self.points[0]

    def scaled(self) -> list[Scaled]:
        return [_scaled(point, self.first) for point in self.points]

    def knee(self) -> int | None:
        """That of the throughput, as ``knee_of`` has it."""
        return knee_of(self.points, [point.images_per_sec for point in self.points])

    def knee_is_told(self) -> bool:
        """Whether each step up to the knee adds more or less than half of a rank's speed by more
        than its interval is wide. Steps between points without intervals are taken as they are."""
        found = self.knee()
        alone = self.first.images_per_sec / self.first.ranks
        for before, after in pairwise(self.points):
            if before.half_width is not None and after.half_width is not None:
                gain = after.images_per_sec - before.images_per_sec
                enough = HALF * alone * (after.ranks - before.ranks)
                if abs(gain - enough) < math.hypot(before.half_width, after.half_width):
                    return False
            if before.ranks == found:
                break
        return True


def knee_of(points: Sequence[Point], speeds: Sequence[float]) -> int | None:
    """The most ranks up to which every further one bought half of a rank's speed or more; None if
    it lies beyond what was measured. ``speeds``: of the points, by ascending ranks."""
    alone = speeds[0] / points[0].ranks
    for (before, slow), (after, fast) in pairwise(zip(points, speeds, strict=True)):
        if fast - slow < HALF * alone * (after.ranks - before.ranks):
            return before.ranks
    return None


def _scaled(point: Point, first: Point) -> Scaled:
    speedup = point.images_per_sec / first.images_per_sec
    efficiency = speedup * first.ranks / point.ranks
    low = high = None
    if point is not first and point.half_width is not None and first.half_width is not None:
        # Independent points: relative half widths of a quotient add up in squares.
        half = math.hypot(
            point.half_width / point.images_per_sec, first.half_width / first.images_per_sec
        )
        low, high = efficiency * max(1 - half, 0), efficiency * (1 + half)
    return Scaled(point, speedup, efficiency, low, high)


def series_of(
    label: str, task: str, points: list[Point], mode: str | None = None, lead: str = ""
) -> list[Series]:
    """The series of two rank counts or more among the points: weak, strong, or both of a grid.

    ``lead``: what tells the series' short names from those of others.
    """
    kinds = [
        *(_grouped("weak", points, _per_rank) if mode != "strong" else ()),
        *(_grouped("strong", points, _global_batch) if mode != "weak" else ()),
    ]
    return [
        Series(
            label=f"{label}, {fixed}" if len(kinds) > 1 else label,
            task=task,
            mode=kind,
            fixed=fixed,
            short=f"{lead}{fixed}",
            points=found,
        )
        for kind, fixed, found in kinds
    ]


def _per_rank(point: Point) -> str | None:
    if point.micro_batch is None or point.accumulation is None:
        return None
    times = f"{count(point.accumulation)} × " if point.accumulation > 1 else ""
    return f"{times}{count(point.micro_batch)} per rank"


def _global_batch(point: Point) -> str | None:
    return None if point.global_batch is None else f"batch {count(point.global_batch)}"


def _grouped(
    mode: str, points: list[Point], key: Callable[[Point], str | None]
) -> list[tuple[str, str, list[Point]]]:
    """(mode, what is fixed, points by ascending ranks) of each group with two rank counts."""
    groups: dict[str, dict[int, Point]] = {}
    for point in points:
        fixed = key(point)
        if fixed is not None:
            groups.setdefault(fixed, {}).setdefault(point.ranks, point)
    return [
        (mode, fixed, [group[ranks] for ranks in sorted(group)])
        for fixed, group in groups.items()
        if len(group) > 1
    ]


def series_of_runs(runs: Iterable[Run]) -> list[Series]:
    """The series of the runs of each setting; equal cuts of several runs are repeats."""
    settings: dict[tuple[str, str], dict[Cut, list[Point]]] = {}
    for run in runs:
        points = settings.setdefault((describe(run), _setting(run)), {})
        for cut, point in _points(run):
            points.setdefault(cut, []).append(point)
    return [
        one
        for (task, setting), cuts in settings.items()
        for one in series_of(f"runs of {setting}", task, [*map(_together, cuts.values())])
    ]


def _setting(run: Run) -> str:
    """What must be equal for throughputs to be compared."""
    keys = (("train", "precision"), ("comm", "backend"), ("comm", "compression"))
    told = [words(run.config(*key)) for key in (*keys, ("optimizer", "name"))]
    return ", ".join([describe(run), *(clean(text, 40) for text in told if text)])


def _points(run: Run) -> list[tuple[Cut, Point]]:
    names = ("ranks", "accumulation", "micro_batch", "global_batch")
    table = np.stack([run.columns[name] for name in names], axis=1)[run.timed]
    rates = run.columns["images_per_sec"][run.timed]
    phases = phase_table(run)[run.timed]
    updates = updates_of_windows(run)[run.timed]
    known = ~np.isnan(table).any(axis=1) & (table[:, 0] >= 1)
    table, rates, phases, updates = table[known], rates[known], phases[known], updates[known]
    if not len(table):
        return []
    # Cuts change seldom: only the first window of each stretch takes part in the sorting.
    begins = np.concatenate(([True], (table[1:] != table[:-1]).any(axis=1)))
    cuts, of_stretch = np.unique(table[begins], axis=0, return_inverse=True)
    inverse = of_stretch.ravel()[np.cumsum(begins) - 1]
    found: list[tuple[Cut, Point]] = []
    for place, cut in enumerate(cuts.tolist()[:1000]):
        chosen = inverse == place
        ranks, accumulation, micro, batch = map(int, cut)
        rate = quantile_of(rates[chosen], 0.5) or 0.0
        where = f"run {run.number}: metrics.jsonl, median of images_per_sec at {ranks} ranks and "
        point = Point(
            ranks=ranks, nodes=_nodes(run, ranks), micro_batch=micro, accumulation=accumulation,
            global_batch=batch, images_per_sec=rate, low=None, high=None, confidence=None,
            repeats=(rate,), seconds=per_update(run, phases[chosen], updates[chosen]), mfu=None,
            source=f"{where}global batch {batch}, first window of each attempt left out",
        )  # fmt: skip
        found.append(((ranks, accumulation, micro, batch), point))
    return found


def _nodes(run: Run, ranks: int) -> int | None:
    """Hosts of the run's starts with so many ranks, if all of them had equally many."""
    told = [listed(pick(one, "hosts")) for one in run.starts if pick(one, "ranks") == ranks]
    counts = {len(hosts) for hosts in told}
    return counts.pop() if len(counts) == 1 and 1 <= min(counts) <= ranks else None


def phase_table(run: Run) -> Array:
    """Seconds by window and phase."""
    names = run.columns.group("seconds")
    columns = [run.columns[f"seconds.{name}"] for name in names]
    return np.stack(columns, axis=1) if columns else np.zeros((run.columns.lines, 0))


def updates_of_windows(run: Run) -> Array:
    """How many updates each window holds; NaN where that is not known."""
    return np.diff(run.columns["update"], prepend=0.0)


def per_update(run: Run, phases: Array, updates: Array) -> dict[str, float]:
    """Seconds of an update by phase, over windows of which all is known."""
    counted = (updates > 0) & ~np.isnan(phases).any(axis=1)
    total = float(updates[counted].sum())
    if not total:
        return {}
    sums = phases[counted].sum(axis=0).tolist()
    names = run.columns.group("seconds")
    return {clean(n, 40): s / total for n, s in zip(names, sums, strict=True) if s >= 0}


def _together(points: list[Point]) -> Point:
    """Repeats of a point as one."""
    rates = tuple(point.images_per_sec for point in points)
    if len(points) == 1:
        return points[0]
    mean, low, high = mean_interval(rates)
    return replace(
        points[0],
        nodes=points[0].nodes if len({point.nodes for point in points}) == 1 else None,
        images_per_sec=mean,
        low=None if low is None else max(low, 0.0),
        high=high,
        confidence=CONFIDENCE,
        repeats=rates,
        source="mean of " + "; ".join(point.source for point in points),
    )
