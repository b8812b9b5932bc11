"""Where a run stands, and how updates of one global batch move it forward: closed forms, no loop.

Samples seen is the clock. An update takes ``batch`` samples, with two exceptions that every rank
knows beforehand: the run's last update takes what is left, and so does an epoch's last update under
``epoch_end: short`` (unless the batch is larger than the data set).
"""

from __future__ import annotations

from collections import Counter
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
        return self.between(None, length)

    def between(self, begin: Duration | None, end: Duration) -> float:
        """This point as a fraction of the way from ``begin`` (None: the start of the run) to
        ``end``, both counted from the start; 0.0 before it, above 1.0 past it.

        Raises ValueError if one is in updates and the other is not.
        """
        first, last = self._units(begin, end), self._units(end, end)
        here = self.updates if end.unit == "up" else self.samples
        if last <= first:
            return float(here >= last)
        return max(0.0, float((here - first) / (last - first)))

    def periods(self, begin: Duration | None, every: Duration) -> Fraction:
        """How many lengths of ``every`` lie between ``begin`` and this point, exactly; 0 before it.

        Raises ValueError if one is in updates and the other is not.
        """
        here = self.updates if every.unit == "up" else self.samples
        first, length = self._units(begin, every), self._units(every, every)
        return max(Fraction(0), (here - first) / length)

    def _units(self, length: Duration | None, beside: Duration) -> Fraction:
        """A length in updates or, exactly, in samples."""
        if length is None:
            return Fraction(0)
        if (length.unit == "up") != (beside.unit == "up"):
            raise ValueError(f"{length} and {beside} cannot be set against each other")
        return length.value * (self.dataset_size if length.unit == "ep" else 1)


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


def updates_by_size(
    clock: Clock, batch: int, updates: int, epoch_end: EpochEnd, end: Limit
) -> dict[int, int]:
    """How many of the next updates take how many samples: sizes, with how many updates have each.

    ``updates`` of one global batch, none of them past ``end``. At most four sizes: full, the end of
    the epoch that the first update lies in, the end of later epochs, and the end of the run.
    """
    if not updates:
        return {}
    n, earlier = clock.dataset_size, updates - 1  # the end cuts none of the earlier ones
    last = advance(clock, batch, earlier, epoch_end, end)
    counts = Counter({update_size(last, batch, epoch_end, end): 1})
    per_epoch = -(-n // batch)
    left = n - clock.samples % n
    finishing = -(-left // batch)
    if epoch_end == "carry" or batch > n or earlier < finishing:
        counts[batch] += earlier
    else:
        epochs, rest = divmod(earlier - finishing, per_epoch)
        counts[left - (finishing - 1) * batch] += 1
        counts[n - (per_epoch - 1) * batch] += epochs
        counts[batch] += finishing - 1 + epochs * (per_epoch - 1) + rest
    return {size: count for size, count in counts.items() if count}


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
