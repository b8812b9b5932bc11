"""Thinning of curves: a million windows become a few thousand points, and the page says how.

Two ways, by what a curve is for. ``extremes`` keeps the lowest and the highest point of each bin,
so that no jump or spike of a schedule is lost. ``means`` draws a noisy measurement as the mean of
each bin with a band from its lowest to its highest value. On a logarithmic axis of updates most
points lie at the end; there ``log_spaced`` takes them at equal distances.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
Places = NDArray[np.intp]
Values = Array | Sequence[float]


@dataclass(frozen=True)
class Curve:
    """Points in the order of the records; ``low`` and ``high`` bound the band of bin means."""

    x: Array
    y: Array
    low: Array | None = None
    high: Array | None = None
    source_points: int = 0

    @property
    def thinned(self) -> bool:
        return len(self.x) < self.source_points

    def __len__(self) -> int:
        return len(self.x)

    def at(self, places: Any) -> Curve:
        """The points at some places."""
        return replace(self, x=self.x[places], y=self.y[places])


def points(x: Values, y: Values) -> Curve:
    """A curve through known points, none left out."""
    return Curve(np.asarray(x, dtype=float), np.asarray(y, dtype=float), source_points=len(x))


def curve(x: Values, y: Values) -> Curve:
    """The points of which both coordinates are known (not NaN)."""
    full = points(x, y)
    known = full.at(~(np.isnan(full.x) | np.isnan(full.y)))
    return replace(known, source_points=len(known))


def steps(x: Values, y: Values) -> Curve:
    """A staircase, exactly: of points of equal height in a row, the first and the last."""
    full = curve(x, y)
    same = full.y[1:] == full.y[:-1]
    inner = np.concatenate(([False], same)) & np.concatenate((same, [False]))
    kept = full.at(~inner[: len(full)])
    return replace(kept, source_points=len(kept))


def extremes(full: Curve, limit: int) -> Curve:
    """At most ``limit`` points: the first, the last, and the lowest and highest of each bin."""
    size = len(full)
    if size <= limit:
        return full
    edges = _edges(1, size - 1, (limit - 2) // 2)
    keep = [0, size - 1]
    for begin, end in pairwise(edges.tolist()):
        part = full.y[begin:end]
        keep += [begin + int(part.argmin()), begin + int(part.argmax())]
    return full.at(np.unique(keep))


def means(full: Curve, limit: int) -> Curve:
    """At most ``limit`` bins, each with its mean, lowest and highest value."""
    size = len(full)
    if size <= limit:
        return full
    edges = _edges(0, size, limit)
    begins, lengths = edges[:-1], np.diff(edges)
    return Curve(
        x=np.add.reduceat(full.x, begins) / lengths,
        y=np.add.reduceat(full.y, begins) / lengths,
        low=np.minimum.reduceat(full.y, begins),
        high=np.maximum.reduceat(full.y, begins),
        source_points=full.source_points,
    )


def log_spaced(full: Curve, limit: int) -> Curve:
    """At most ``limit`` points, x positive and ascending: the first of each stretch of log x, and
    the last. Counts as not thinned."""
    if len(full) <= limit:
        return full
    logs = np.log(full.x)
    stretch = ((logs - logs[0]) / ((logs[-1] - logs[0]) or 1.0) * (limit - 1)).astype(int)
    firsts = np.unique(stretch, return_index=True)[1]
    firsts[-1] = len(full) - 1 if len(firsts) > 1 else firsts[-1]
    kept = full.at(firsts)
    return replace(kept, source_points=len(kept))


@dataclass(frozen=True)
class LogFit:
    """y = intercept + slope · ln x by least squares, and its R²."""

    intercept: float
    slope: float
    r2: float


def log_fit(shape: Curve) -> LogFit | None:
    """The line through a curve's points, x positive, all of equal weight; None where the points do
    not tell one: fewer than three different x, or equal y."""
    if len(np.unique(shape.x)) < 3:
        return None
    logs = np.log(shape.x)
    dx, dy = logs - logs.mean(), shape.y - shape.y.mean()
    xx, yy, xy = float(dx @ dx), float(dy @ dy), float(dx @ dy)
    if not (xx > 0 and yy > 0) or np.ptp(shape.y) == 0:
        return None
    slope = xy / xx
    r2 = min((xy / xx**0.5 / yy**0.5) ** 2, 1.0)
    return LogFit(float(shape.y.mean() - slope * logs.mean()), slope, r2)


def bins(size: int, limit: int) -> Places:
    """Where each of at most ``limit`` equal stretches of so many points begins, and the end."""
    return _edges(0, size, min(size, limit))


def _edges(begin: int, end: int, parts: int) -> Places:
    """Edges of non-empty ranges of nearly equal length that cover begin..end."""
    edges: Places = np.unique(begin + (end - begin) * np.arange(parts + 1) // max(parts, 1))
    return edges


def spread(curves: list[Curve]) -> tuple[float, float] | None:
    """Lowest and highest value of all points, or None if there is no point."""
    filled = [c.y for c in curves if len(c)]
    if not filled:
        return None
    return float(min(y.min() for y in filled)), float(max(y.max() for y in filled))
