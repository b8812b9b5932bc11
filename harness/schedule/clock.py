"""Where a run stands, and how updates of one global batch move it forward: closed forms, no loop.

Samples seen is the clock. An update takes ``batch`` samples, with two exceptions that every rank
knows beforehand: the run's last update takes what is left, and so does an epoch's last update under
``epoch_end: short`` (unless the batch is larger than the data set).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from fractions import Fraction
from typing import Literal

from harness.units import Duration

EpochEnd = Literal["short", "carry"]


@dataclass(frozen=True)
class Clock:
    """A point between two updates. Immutable; ``advance`` and ``step`` return later points."""

    samples: int
    updates: int
    dataset_size: int

    @property
    def epoch(self) -> float:
        return self.samples / self.dataset_size

    def passed(self, period: Duration) -> int:
        """How many whole periods lie behind this point."""
        return period.passed(self.samples, self.updates, self.dataset_size)

    def fraction(self, length: Duration) -> float:
        """This point as a fraction of a length that began with the run; 1.0 at its end."""
        if length.unit == "up":
            return float(self.updates / length.value)
        total = length.value * (self.dataset_size if length.unit == "ep" else 1)
        return float(Fraction(self.samples) / total)


@dataclass(frozen=True)
class Limit:
    """A place on the clock, in samples or in updates: the first point at or past it counts."""

    samples: int | None = None
    updates: int | None = None

    @classmethod
    def multiple(cls, period: Duration, index: int, dataset_size: int) -> Limit:
        """The ``index``-th multiple of a period."""
        place = period.boundary(index, dataset_size)
        return cls(updates=place) if period.unit == "up" else cls(samples=place)

    def reached(self, clock: Clock) -> bool:
        return (self.samples is not None and clock.samples >= self.samples) or (
            self.updates is not None and clock.updates >= self.updates
        )


def update_size(clock: Clock, batch: int, epoch_end: EpochEnd, end: Limit) -> int:
    """Samples that the next update takes."""
    size = batch
    if epoch_end == "short" and batch <= clock.dataset_size:
        size = min(batch, clock.dataset_size - clock.samples % clock.dataset_size)
    return size if end.samples is None else min(size, end.samples - clock.samples)


def step(clock: Clock, size: int) -> Clock:
    """The point after one update of ``size`` samples."""
    return replace(clock, samples=clock.samples + size, updates=clock.updates + 1)


def advance(clock: Clock, batch: int, updates: int, epoch_end: EpochEnd, end: Limit) -> Clock:
    """The point after a number of updates of one global batch, none of them past ``end``."""
    n, s = clock.dataset_size, clock.samples
    if epoch_end == "carry" or batch > n:
        s += updates * batch
    else:
        per_epoch = -(-n // batch)
        left = n - s % n
        finishing = -(-left // batch)
        if updates < finishing:
            s += updates * batch
        else:
            epochs, rest = divmod(updates - finishing, per_epoch)
            s += left + epochs * n + rest * batch
    if end.samples is not None:
        s = min(s, end.samples)
    return replace(clock, samples=s, updates=clock.updates + updates)


def updates_until(clock: Clock, batch: int, limit: Limit, epoch_end: EpochEnd) -> int:
    """How many updates of one global batch it takes to reach a limit; 0 if it is reached."""
    if limit.reached(clock):
        return 0
    counts = []
    if limit.updates is not None:
        counts.append(limit.updates - clock.updates)
    if limit.samples is not None:
        counts.append(_updates_to_sample(clock, batch, limit.samples, epoch_end))
    return min(counts)


def _updates_to_sample(clock: Clock, batch: int, target: int, epoch_end: EpochEnd) -> int:
    n, s = clock.dataset_size, clock.samples
    if epoch_end == "carry" or batch > n:
        return -(-(target - s) // batch)
    left = n - s % n
    if target <= s + left:
        return -(-(target - s) // batch)
    epochs, rest = divmod(target - s - left, n)
    return -(-left // batch) + epochs * -(-n // batch) + -(-rest // batch)
