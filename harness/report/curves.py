"""Thinning of curves: a million windows become a few thousand points, and the page says how.

Two ways, by what a curve is for. ``extremes`` keeps the lowest and the highest point of each bin,
so that no jump or spike of a schedule is lost. ``means`` draws a noisy measurement as the mean of
each bin with a band from its lowest to its highest value. On a logarithmic axis of updates most
points lie at the end; there ``log_spaced`` takes them at equal distances.
"""

from __future__ import annotations

import math
import statistics
from dataclasses import dataclass
from itertools import chain, pairwise

from harness.report.fields import Series


@dataclass(frozen=True)
class Curve:
    """Points in the order of the records; ``low`` and ``high`` bound the band of bin means."""

    x: list[float]
    y: list[float]
    low: list[float] | None = None
    high: list[float] | None = None
    source_points: int = 0

    @property
    def thinned(self) -> bool:
        return len(self.x) < self.source_points


def curve(x: Series, y: Series) -> Curve:
    """The points of which both coordinates are known."""
    known = [(a, b) for a, b in zip(x, y, strict=True) if a is not None and b is not None]
    return Curve([a for a, _ in known], [b for _, b in known], source_points=len(known))


def steps(x: Series, y: Series) -> Curve:
    """A staircase, exactly: of points of equal height in a row, the first and the last."""
    full = curve(x, y)
    last = len(full.y) - 1
    keep = [
        i
        for i in range(last + 1)
        if i in (0, last) or not full.y[i - 1] == full.y[i] == full.y[i + 1]
    ]
    return Curve([full.x[i] for i in keep], [full.y[i] for i in keep], source_points=len(keep))


def extremes(full: Curve, limit: int) -> Curve:
    """At most ``limit`` points: the first, the last, and the lowest and highest of each bin."""
    size = len(full.y)
    if size <= limit:
        return full
    keep = {0, size - 1}
    for begin, end in _bins(1, size - 1, (limit - 2) // 2):
        part = range(begin, end)
        keep.add(min(part, key=full.y.__getitem__))
        keep.add(max(part, key=full.y.__getitem__))
    order = sorted(keep)
    return Curve(
        [full.x[i] for i in order], [full.y[i] for i in order], source_points=full.source_points
    )


def means(full: Curve, limit: int) -> Curve:
    """At most ``limit`` bins, each with its mean, lowest and highest value."""
    size = len(full.y)
    if size <= limit:
        return full
    bins = list(_bins(0, size, limit))
    parts = [full.y[a:b] for a, b in bins]
    return Curve(
        x=[sum(full.x[a:b]) / (b - a) for a, b in bins],
        y=[sum(part) / len(part) for part in parts],
        low=[min(part) for part in parts],
        high=[max(part) for part in parts],
        source_points=full.source_points,
    )


def log_spaced(full: Curve, limit: int) -> Curve:
    """At most ``limit`` points, x positive and ascending: the first of each stretch of log x, and
    the last. Counts as not thinned."""
    if len(full.x) <= limit:
        return full
    low, high = math.log(full.x[0]), math.log(full.x[-1])
    keep = {
        int((math.log(x) - low) / (high - low or 1.0) * (limit - 1)): i
        for i, x in reversed(list(enumerate(full.x)))
    }
    order = sorted(keep.values())
    return Curve([full.x[i] for i in order], [full.y[i] for i in order], source_points=len(order))


@dataclass(frozen=True)
class LogFit:
    """y = intercept + slope · ln x by least squares, and its R²."""

    intercept: float
    slope: float
    r2: float


def log_fit(shape: Curve) -> LogFit | None:
    """The line through a curve's points, x positive, all of equal weight; None where the points do
    not tell one: fewer than three different x, or equal y."""
    if len(set(shape.x)) < 3:
        return None
    logs = [math.log(x) for x in shape.x]
    try:
        slope, intercept = statistics.linear_regression(logs, shape.y)
        r = statistics.correlation(logs, shape.y)
    except statistics.StatisticsError:
        return None
    return LogFit(intercept, slope, min(r * r, 1.0))


def _bins(begin: int, end: int, parts: int) -> list[tuple[int, int]]:
    """Non-empty ranges of nearly equal length that cover begin..end."""
    edges = [begin + (end - begin) * i // parts for i in range(parts + 1)]
    return [(a, b) for a, b in pairwise(edges) if b > a]


def spread(curves: list[Curve]) -> tuple[float, float] | None:
    """Lowest and highest value of all points, or None if there is no point."""
    values = list(chain.from_iterable(c.y for c in curves))
    return (min(values), max(values)) if values else None
