"""Speed-up, efficiency and serial fractions, straight from the measurements: no model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import exp, isfinite
from typing import Literal

import numpy as np

from harness.errors import UsageError
from harness.scaling.interval import (
    Array,
    Interval,
    check_confidence,
    of_draws,
    pooled,
)
from harness.scaling.points import Mode, Point, check_series

_DRAWS = 4000


@dataclass(frozen=True)
class Speedup:
    """A point against the baseline, the point with the fewest ranks."""

    point: Point
    baseline_ranks: int
    images_per_sec: Interval
    speedup: Interval
    """Throughput over the baseline's: in strong scaling, its time over this one's."""
    efficiency: Interval
    """speedup × baseline_ranks / ranks. The baseline's is 1 by definition."""


def speedups(points: Sequence[Point], mode: Mode, confidence: float = 0.95) -> tuple[Speedup, ...]:
    """Speed-up and efficiency of each point of a series, by rising ranks.

    The interval is that of a quotient of two means (``LogMean.over``): the baseline's own scatter
    is in it. It is None where the point or the baseline has one repeat.

    Raises UsageError if the points are no such series (``check_series``).
    """
    check_confidence(confidence)
    series = check_series(points, mode)
    return tuple(_speedup(point, series[0], confidence) for point in series)


def _speedup(point: Point, baseline: Point, confidence: float) -> Speedup:
    if point is baseline:
        ratio = Interval(1.0, 1.0, 1.0)
    else:
        times = baseline.log_seconds.over(point.log_seconds, confidence)
        ratio = times.scaled(point.images_per_update / baseline.images_per_update)
    return Speedup(
        point=point,
        baseline_ranks=baseline.ranks,
        images_per_sec=point.images_per_sec(confidence),
        speedup=ratio,
        efficiency=ratio.scaled(baseline.ranks / point.ranks),
    )


@dataclass(frozen=True)
class SerialFraction:
    """The share of the work that does not spread over ranks."""

    law: Literal["Amdahl", "Gustafson"]
    overall: Interval
    """Over all points; below 0 where the speed-up is more than linear."""
    at: tuple[tuple[int, Interval], ...]
    """(ranks, fraction) of each point by itself, against the baseline (for Amdahl, Karp and Flatt's
    metric). If it rises with the ranks, then what is lost is not serial work but communication,
    and the law flatters what lies beyond the measurements."""


def serial_fraction(
    points: Sequence[Point], mode: Mode, confidence: float = 0.95, seed: int = 0
) -> SerialFraction:
    """Amdahl's serial fraction of a strong series, or Gustafson's of a weak one.

    Amdahl (1967): T(n) = T(1)·(f + (1 − f)/n), f a share of the time on one rank. Gustafson (1988):
    X(n) = X(1)·(f + (1 − f)·n), f a share of the time on n ranks. Both are straight lines, in 1/n
    and in n, with f = intercept / (intercept + slope), fitted with relative weights; neither needs
    the point of one rank. The interval is a parametric bootstrap of the repeats' means with the
    pooled spread; None without repeats.

    Raises UsageError for fewer than two points or what is no such series.
    """
    check_confidence(confidence)
    series = check_series(points, mode)
    if len(series) < 2:
        raise UsageError(
            "a serial fraction needs points of at least two numbers of ranks; there is one"
        )
    ranks = np.array([point.ranks for point in series], dtype=np.float64)
    times = np.array([point.log_seconds.mean for point in series])
    x, logs = (1 / ranks, times) if mode == "strong" else (ranks, np.log(ranks) - times)
    logs -= logs.mean()  # what cancels in the quotient shall not overflow
    value = float(_intercept_share(logs[None], x)[0])
    spread = pooled([point.log_seconds for point in series])
    if spread is None:
        overall = Interval(value)
    else:
        rng = np.random.default_rng(seed)
        counts = np.array([len(point.seconds) for point in series])
        errors = rng.standard_normal((_DRAWS, len(series))) / np.sqrt(counts)
        noisy = logs + errors * spread.draws(rng, _DRAWS)[:, None]
        overall = of_draws(value, _intercept_share(noisy, x), confidence)
    return SerialFraction(
        law="Amdahl" if mode == "strong" else "Gustafson",
        overall=overall,
        at=tuple(
            (point.ranks, alone)
            for point in series[1:]
            if isfinite((alone := _alone(point, series[0], mode, confidence)).value)
        ),
    )


def _intercept_share(logs: Array, x: Array) -> Array:
    """a / (a + b) of exp(logs) ≈ a + b·x, least squares of relative errors; logs (draws, points),
    x (points,) → (draws,)."""
    with np.errstate(all="ignore"):
        weight = np.exp(-2 * logs)
        y = np.exp(logs)
        total = weight.sum(1)
        mean_x, mean_y = (weight * x).sum(1) / total, (weight * y).sum(1) / total
        around = x - mean_x[:, None]
        slope = (weight * around * y).sum(1) / (weight * around**2).sum(1)
        intercept = mean_y - slope * mean_x
        return np.asarray(intercept / (intercept + slope))


def _alone(point: Point, baseline: Point, mode: Mode, confidence: float) -> Interval:
    """The fraction through two points: the law solved for f, with n and m ranks and q the quotient
    of their times (Amdahl) or throughputs (Gustafson): y(n) = q·y(m)."""
    quotient = point.log_seconds.over(baseline.log_seconds, confidence)
    n, m = float(point.ranks), float(baseline.ranks)
    if mode == "strong":
        return quotient.mapped(lambda q: _line(q, 1 / n, 1 / m))
    images = point.images_per_update / baseline.images_per_update
    return quotient.mapped(lambda q: _line(images / max(q, exp(-700)), n, m))


def _line(q: float, x: float, x0: float) -> float:
    """f of f + (1 − f)·x = q·(f + (1 − f)·x0), which rises with q for x < x0 and falls for x > x0
    as long as f stays below 1 / (1 − x0)."""
    below = (1 - x) - q * (1 - x0)
    return (q * x0 - x) / below if below else float("nan")
