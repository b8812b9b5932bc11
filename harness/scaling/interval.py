"""A number with its interval, and what repeats tell of their own spread."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import exp, isfinite, sqrt
from typing import Any

import numpy as np
import numpy.typing as npt

from harness.errors import UsageError
from harness.student import student_quantile

Array = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Interval:
    """A value and the interval around it; ``low`` and ``high`` are None where nothing tells."""

    value: float
    low: float | None = None
    high: float | None = None

    @property
    def known(self) -> bool:
        return self.low is not None and self.high is not None

    def scaled(self, factor: float) -> Interval:
        """All three times a factor of at least 0."""
        return self.mapped(lambda value: value * factor)

    def mapped(self, function: Callable[[float], float]) -> Interval:
        """Of a monotone function of the value, rising or falling."""
        if self.low is None or self.high is None:
            return Interval(function(self.value))
        ends = sorted((function(self.low), function(self.high)))
        return Interval(function(self.value), ends[0], ends[1])

    def covers(self, value: float) -> bool | None:
        """Whether a value lies inside; None if there is no interval."""
        if self.low is None or self.high is None:
            return None
        return self.low <= value <= self.high

    def as_dict(self) -> dict[str, float | None]:
        return {"value": self.value, "low": self.low, "high": self.high}


def check_confidence(confidence: float) -> None:
    if not (isfinite(confidence) and 0.5 <= confidence <= 0.999):
        raise UsageError(f"a confidence of {confidence} makes no sense; give one from 0.5 to 0.999")


def of_draws(value: float, draws: Array, confidence: float) -> Interval:
    """The central interval of draws, which are one-dimensional, widened to hold the value."""
    finite = draws[np.isfinite(draws)]
    if finite.size < draws.size or not isfinite(value):
        return Interval(value)
    tail = (1 - confidence) / 2
    low, high = (float(end) for end in np.quantile(finite, [tail, 1 - tail]))
    return Interval(value, min(low, value), max(high, value))


@dataclass(frozen=True)
class LogMean:
    """The mean logarithm of some repeats and what is known of its error.

    Times scatter by a share of themselves, so their logarithms do by an amount; exp(mean) is the
    geometric mean.
    """

    mean: float
    count: int
    variance: float | None
    """Of one repeat; None if there is only one."""

    @classmethod
    def of(cls, values: Sequence[float]) -> LogMean:
        """Of positive values, at least one."""
        logs = np.log(np.asarray(values, dtype=np.float64))
        variance = float(logs.var(ddof=1)) if len(logs) > 1 else None
        return cls(float(logs.mean()), len(logs), variance)

    def interval(self, confidence: float) -> Interval:
        """Of the geometric mean: Student's t with count − 1 degrees of freedom."""
        if self.variance is None:
            return Interval(exp(self.mean))
        half = student_quantile(self.count - 1, confidence) * sqrt(self.variance / self.count)
        return _around(self.mean, half)

    def over(self, other: LogMean, confidence: float) -> Interval:
        """Of the quotient of this geometric mean and another's, both with errors.

        Welch's interval of a difference of means: the degrees of freedom are Satterthwaite's, as
        points with more ranks need not scatter as those with few do.
        """
        difference = self.mean - other.mean
        if self.variance is None or other.variance is None:
            return Interval(_exp(difference))
        own, others = self.variance / self.count, other.variance / other.count
        total = own + others
        if total == 0:
            return _around(difference, 0.0)
        own, others = own / total, others / total  # squares of tiny variances would underflow
        dof = 1.0 / (own**2 / (self.count - 1) + others**2 / (other.count - 1))
        return _around(difference, student_quantile(dof, confidence) * sqrt(total))


def _around(mean: float, half: float) -> Interval:
    return Interval(_exp(mean), _exp(mean - half), _exp(mean + half))


def _exp(value: float) -> float:
    """exp without overflow: intervals of two wildly different repeats have no end."""
    return exp(min(value, 700.0))


@dataclass(frozen=True)
class Spread:
    """The standard deviation of one repeat's logarithm, pooled over points."""

    sigma: float
    dof: int

    def draws(self, rng: np.random.Generator, count: int) -> Array:
        """Standard deviations that would explain this one, shape (count,): σ·√(dof / χ²), which
        makes normal draws with them draws of Student's t."""
        chi = np.maximum(rng.chisquare(self.dof, count), 1e-12)
        return np.asarray(self.sigma * np.sqrt(self.dof / chi))


def pooled(means: Sequence[LogMean]) -> Spread | None:
    """None if no point has a second repeat."""
    dof = sum(one.count - 1 for one in means)
    if dof == 0:
        return None
    squares = sum((one.count - 1) * (one.variance or 0.0) for one in means)
    return Spread(sqrt(squares / dof), dof)


def factors(errors: Array) -> Array:
    """exp(errors) without overflow, of errors of logarithms."""
    return np.asarray(np.exp(np.clip(errors, -300.0, 300.0)))


def jsonable(value: Any) -> Any:
    """A dataclass's fields as plain values; what is not finite is null."""
    if isinstance(value, float):
        return value if isfinite(value) else None
    if isinstance(value, dict):
        return {key: jsonable(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [jsonable(one) for one in value]
    return value
