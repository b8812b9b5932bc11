"""How ranks differ in the time that they are busy, and which of them holds the others up.

Ranks wait for each other in each update, so all take the same time for it; what tells them apart is
the time outside that waiting. Pure arithmetic on numbers that all ranks have gathered.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import fmean, median

SLOW = 1.1
"""A rank counts as slow if it is busy for more than so many times as long as the others. A choice:
all ranks lose at most the part above 1, and for less than a tenth few would change a host."""
CHANCE = 0.01
"""What lot alone would do with this chance at most is not put down to it. A choice."""


@dataclass(frozen=True)
class RankTime:
    """What one rank did in a stretch of updates."""

    seconds: dict[str, float]
    """By phase, without ``comm_exposed``."""
    samples: int
    micro_batches: int

    @property
    def busy(self) -> float:
        return sum(self.seconds.values())


@dataclass(frozen=True)
class Slowest:
    """The rank that was busy for longest."""

    rank: int
    phase: str
    """Where it exceeds the other ranks' median by most."""
    ratio: float
    """How many times as long as the other ranks' median it takes, for as much work; see
    `slowest`."""
    seconds: float
    """By how much its busy time exceeds the other ranks' median."""


def slowest(ranks: Sequence[RankTime]) -> Slowest:
    """Of two ranks or more.

    Ranks may have unequal shares of an update, as 3 micro-batches on 2 ranks. ``ratio`` is the
    least of three: of busy times, of busy times per sample, and per micro-batch; so a rank that
    merely has more to do, or smaller pieces, is not called slow.
    """
    rank = max(range(len(ranks)), key=lambda r: ranks[r].busy)
    own, others = ranks[rank], [*ranks[:rank], *ranks[rank + 1 :]]
    lost = {
        phase: seconds - median(other.seconds[phase] for other in others)
        for phase, seconds in own.seconds.items()
    }
    works: tuple[Callable[[RankTime], float], ...] = (
        lambda one: 1.0,
        lambda one: one.samples,
        lambda one: one.micro_batches,
    )
    return Slowest(
        rank,
        max(lost, key=lambda phase: lost[phase]),
        min(_ratio(own, others, work) for work in works),
        own.busy - median(other.busy for other in others),
    )


def _ratio(own: RankTime, others: Sequence[RankTime], work: Callable[[RankTime], float]) -> float:
    """Busy time for each piece of work against the others' median; 0 if that cannot be told."""
    usual = [other.busy / work(other) for other in others if work(other)]
    if not (usual and work(own) and median(usual)):
        return 0.0
    return own.busy / work(own) / median(usual)


def lines_needed(ranks: int) -> int:
    """Lines in a row in which the same rank must be slow to be called a straggler: at least 3, and
    so many that if the slowest rank were drawn by lot each time, it would be the same one that
    often with a chance of at most 1 %: ranks^(1 − lines) ≤ 0.01."""
    return max(3, 1 + math.ceil(-math.log(CHANCE) / math.log(ranks)))


def chance_of(times: int, lines: int, ranks: int) -> float:
    """At most so large is the chance that some rank is the slowest in ``times`` of ``lines`` lines
    or more, if each line's were drawn by lot from two ranks or more: ranks × the upper tail of the
    binomial distribution. For ``times`` = ``lines`` that is ``lines_needed``'s ranks^(1 − lines).
    """
    share = 1 / ranks
    term = math.exp(
        math.lgamma(lines + 1)
        - math.lgamma(times + 1)
        - math.lgamma(lines - times + 1)
        + times * math.log(share)
        + (lines - times) * math.log1p(-share)
    )
    tail = 0.0
    for count in range(times, lines + 1):
        tail += term
        term *= (lines - count) / (count + 1) * share / (1 - share)
        if term < 1e-9 * tail and count > share * lines:
            break
    return min(1.0, ranks * tail)


def least_wait(waits: Sequence[Sequence[float]]) -> float | None:
    """Seconds of an update that pass in ``comm_exposed`` on whichever rank waits least in it, which
    is the one that comes last: it waits for nobody, only for the sums.

    Args:
        waits: of each rank, those of the same updates; NaN where one is not known.

    Returns:
        The mean over the updates; None if none is known on all ranks.
    """
    known = [each for each in zip(*waits, strict=True) if not any(map(math.isnan, each))]
    return fmean(map(min, known)) if known else None


@dataclass(frozen=True)
class Straggler:
    """A rank that has been slow for a while; the numbers are means over that while."""

    rank: int
    phase: str
    """Where it loses most."""
    ratio: float
    seconds_per_update: float
    """What every update loses by it."""
    updates: int
    """How many it has been slow for."""


class Stragglers:
    """Looks for a rank that is the slowest, and slow, in line after line."""

    def __init__(self) -> None:
        self._seen: list[tuple[Slowest, int]] = []
        """Of the rank that is slow at present: each line, and its number of updates."""

    def observe(self, one: Slowest, ranks: int, updates: int) -> Straggler | None:
        """Take notice of a line; a straggler, once for each time that there is one."""
        if self._seen and self._seen[-1][0].rank != one.rank:
            self._seen = []
        if one.ratio <= SLOW:
            self._seen = []
            return None
        self._seen.append((one, updates))
        return self._straggler() if len(self._seen) == lines_needed(ranks) else None

    def _straggler(self) -> Straggler:
        updates = sum(count for _, count in self._seen)
        lost: dict[str, float] = {}
        for one, _ in self._seen:
            lost[one.phase] = lost.get(one.phase, 0.0) + one.seconds
        return Straggler(
            rank=self._seen[-1][0].rank,
            phase=max(lost, key=lambda phase: lost[phase]),
            ratio=sum(one.ratio * count for one, count in self._seen) / updates,
            seconds_per_update=sum(one.seconds for one, _ in self._seen) / updates,
            updates=updates,
        )
