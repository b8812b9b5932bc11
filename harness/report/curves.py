"""Thinning of curves: a million windows become a few thousand points, and the page says how.

Two ways, by what a curve is for. ``extremes`` keeps the lowest and the highest point of each bin,
so that no jump or spike of a schedule is lost. ``means`` draws a noisy measurement as the mean of
each bin with a band from its lowest to its highest value.
"""

from __future__ import annotations

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


def _bins(begin: int, end: int, parts: int) -> list[tuple[int, int]]:
    """Non-empty ranges of nearly equal length that cover begin..end."""
    edges = [begin + (end - begin) * i // parts for i in range(parts + 1)]
    return [(a, b) for a, b in pairwise(edges) if b > a]


def spread(curves: list[Curve]) -> tuple[float, float] | None:
    """Lowest and highest value of all points, or None if there is no point."""
    values = list(chain.from_iterable(c.y for c in curves))
    return (min(values), max(values)) if values else None
