"""What repeats of a measurement tell: where warm-up ends, and how sure a mean is. Plain numbers.

Warm-up is cut by MSER (White 1997, *An effective truncation heuristic for bias reduction in
simulation output*): of all places to cut, that after which the mean of what is left is known best.
It is applied to the windows' ranks instead of their times, so that one window that something
interrupted weighs no more than any other slow one: with times it would pull the cut past itself.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from math import fsum

from harness.benchfile import Point, Repeat
from harness.student import CONFIDENCE, mean_interval

LEAST_STEADY = 10
"""Windows that must follow the warm-up for a repeat to be enough."""
_PATIENCE = 4.0  # times the seconds that were asked for: then a repeat that never settles is over
_MOST_BATCHES = 1000  # more are put together, so that looking takes milliseconds


@dataclass(frozen=True)
class Warmup:
    """Where the steady part of a series begins."""

    windows: int
    """How many at the front are left out."""
    settled: bool
    """False: the series was still changing when half of it had passed."""


def find_warmup(seconds: Sequence[float]) -> Warmup:
    """The warm-up of a series of windows' times: the d up to half of them that minimises

        Σ_{i>d} (r_i − r̄_d)² / (n − d)²,    r_i the rank of window i, r̄_d the mean after d

    (White 1997, there with the times themselves). Of more than 1,000 windows, equal
    numbers of neighbours are put together first.
    """
    size = -(-len(seconds) // _MOST_BATCHES)
    batches = [fsum(seconds[i : i + size]) for i in range(0, len(seconds) - size + 1, size)]
    ranks, count = _ranks(batches), len(batches)
    best, cut = math.inf, 0
    total = squares = 0.0
    for d in range(count - 1, -1, -1):
        # Around the middle of all ranks, so that what is subtracted below is of like size.
        rank = ranks[d] - (count - 1) / 2
        total, squares = total + rank, squares + rank * rank
        left = count - d
        if d <= count // 2:
            statistic = max(0.0, squares - total * total / left) / left**2
            if statistic <= best * (1 + 1e-12):
                best, cut = min(best, statistic), d
    return Warmup(cut * size, cut < count // 2 or count < 2)


def _ranks(values: Sequence[float]) -> list[float]:
    """Each value's place in ascending order, from 0; equal ones share the mean of theirs."""
    order = sorted(range(len(values)), key=values.__getitem__)
    ranks = [0.0] * len(values)
    begin = 0
    while begin < len(order):
        end = begin
        while end < len(order) and values[order[end]] == values[order[begin]]:
            end += 1
        for place in order[begin:end]:
            ranks[place] = (begin + end - 1) / 2
        begin = end
    return ranks


class Enough:
    """Tells, update by update, whether a repeat has been measured for long enough.

    It has when that many seconds of steady windows, and LEAST_STEADY of these, lie behind it; or
    four times as many seconds, if it does not settle. Looks rarely: a look takes as long as a small
    update.
    """

    def __init__(self, seconds: float, clock: Callable[[], float] = time.perf_counter) -> None:
        self._seconds, self._clock = seconds, clock
        self._times: list[float] = []
        self._next = 0.0

    def __call__(self) -> bool:
        """Call once an update, always at the same place in it."""
        now = self._clock()
        self._times.append(now)
        spent = now - self._times[0]
        if len(self._times) <= LEAST_STEADY or spent < max(self._seconds, self._next):
            return False
        windows = [after - before for before, after in pairwise(self._times)]
        warmup = find_warmup(windows)
        steady = now - self._times[warmup.windows]
        many = len(windows) - warmup.windows >= LEAST_STEADY
        if warmup.settled and many and steady >= self._seconds:
            return True
        self._next = spent + max(self._seconds - steady, 0.1 * self._seconds)
        return len(windows) >= 2 * LEAST_STEADY and spent >= _PATIENCE * self._seconds


def point_of(
    ranks: int,
    nodes: int,
    micro_batch: int,
    accumulation: int,
    global_batch: int,
    repeats: Sequence[Repeat],
    flops_per_image: float | None,
    peak_flops_per_rank: float | None,
) -> Point:
    """A point from its repeats, of which there is at least one."""
    mean, low, high = mean_interval([one.images_per_sec for one in repeats])
    mfu = None
    if flops_per_image is not None and peak_flops_per_rank is not None:
        mfu = mean * flops_per_image / (ranks * peak_flops_per_rank)
    return Point(
        ranks=ranks,
        nodes=nodes,
        micro_batch=micro_batch,
        accumulation=accumulation,
        global_batch=global_batch,
        repeats=tuple(sorted(repeats, key=lambda one: one.repeat)),
        confidence=CONFIDENCE,
        images_per_sec=mean,
        images_per_sec_low=low,
        images_per_sec_high=high,
        seconds_per_update=fsum(one.seconds_per_update for one in repeats) / len(repeats),
        seconds=_mean_seconds([one.seconds for one in repeats]),
        mfu=mfu,
    )


def _mean_seconds(rows: Sequence[Mapping[str, float]]) -> dict[str, float]:
    return {name: fsum(row.get(name, 0.0) for row in rows) / len(rows) for name in rows[0]}
