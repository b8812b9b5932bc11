"""Growth by goodput: ranks and batch that maximise throughput × statistical efficiency.

Throughput is what a formula for the time of an update says of ranks and accumulation; what the
samples of a batch are worth follows from the gradient noise scale as it is measured. Goodput is
what Qiao et al. 2021 (Pollux, equation 5) call by that name.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import groupby
from typing import Literal

from harness.schedule.choices import UpdateTime, choices, statistical_efficiency
from harness.schedule.clock import Clock
from harness.schedule.growth import GrowthPolicy
from harness.schedule.measured import FromNoise
from harness.units import Duration

Objective = Literal["time", "rank_hours"]
_HALF, _EPOCH = Duration.parse("0.5ep"), Duration.parse("1ep")
_EQUAL = 1e-12  # goodputs that are equal but for rounding


@dataclass(frozen=True)
class Option:
    """Ranks and accumulation, and how fast they are."""

    ranks: int
    accumulation: int
    batch: int
    images_per_sec: float

    def goodput(self, noise_scale: float, reference: float) -> float:
        """Images per second that would make as much progress in batches of ``reference``."""
        return self.images_per_sec * statistical_efficiency(self.batch, noise_scale, reference)


class Options:
    """What a run may choose from, with one model of speed."""

    def __init__(
        self,
        initial: int,
        micro: int,
        times: UpdateTime,
        ranks: Sequence[int],
        most: int,
        multiple_of: int = 1,
    ) -> None:
        """``most``: the largest batch. Batches are whole ranks × accumulation × ``micro``, and
        multiples of ``multiple_of``; the initial one is there on all ranks that can share it."""
        self.initial, self.micro, self.times = initial, micro, times
        pieces = -(-initial // micro)
        found = [
            self.option(count, initial) for count in ranks if count <= pieces or count == ranks[0]
        ]
        fitting = [count for count in ranks if count * micro <= most]
        grid = (
            choices(fitting, micro, most_accumulation=most // micro, largest_batch=most)
            if fitting
            else ()
        )
        found += [
            self.option(one.ranks, one.batch)
            for one in grid
            if one.batch > initial and one.batch % multiple_of == 0
        ]
        self.all = tuple(sorted(found, key=lambda one: (one.batch, one.ranks)))

    def option(self, ranks: int, batch: int) -> Option:
        """A batch on so many ranks; where it does not divide evenly, the busiest rank's time."""
        pieces = -(-batch // self.micro)
        accumulation = -(-pieces // ranks)
        seconds = self.times.seconds(ranks, accumulation, self.micro)
        return Option(ranks, accumulation, batch, batch / seconds)

    @cached_property
    def batches(self) -> tuple[int, ...]:
        return tuple(batch for batch, _ in groupby(self.all, key=lambda one: one.batch))

    def fastest(self, batch: int) -> Option:
        """The option of a batch with the most images per second; of equal ones, the fewest ranks.
        Raises ValueError for a batch that is none of ``batches``."""
        found = [one for one in self.all if one.batch == batch]
        return max(found, key=lambda one: (one.images_per_sec, -one.ranks))

    def best(
        self,
        noise_scale: float,
        objective: Objective = "time",
        efficiency: float = 0.5,
        among: Iterable[Option] | None = None,
    ) -> Option | None:
        """The option with the most goodput among these (None: all).

        With ``rank_hours``: of those whose goodput per rank is at least the share ``efficiency`` of
        the most that any option has. Of equal ones the smallest batch on the fewest ranks; None if
        there is none.
        """

        def worth(one: Option) -> float:
            return one.goodput(noise_scale, self.initial)

        found = list(self.all if among is None else among)
        if objective == "rank_hours":
            least = efficiency * max(worth(one) / one.ranks for one in self.all)
            found = [one for one in found if worth(one) / one.ranks >= least * (1 - _EQUAL)]
        if not found:
            return None
        most = max(worth(one) for one in found)
        return next(one for one in found if worth(one) >= most * (1 - _EQUAL))


class Goodput(FromNoise):
    """The ranks × accumulation with the most goodput at the noise scale that is measured.

    What it chooses depends on its model of speed, the noise scale and its own state, not on the
    ranks that it runs on: they are wanted, and the batch is the same whether they come or not. So
    it never asks for fewer ranks than before, as a run gives none back.
    """

    _SAVED = (*FromNoise._SAVED, "ranks")

    def __init__(
        self,
        initial: int,
        options: Options,
        objective: Objective = "time",
        efficiency: float = 0.5,
        hysteresis: float = 0.05,
        limit: float | None = 2.0,
        shrink: bool = False,
        memory: Duration = _HALF,
        dwell: Duration = _EPOCH,
        wait: Duration | None = None,
    ) -> None:
        """``hysteresis``: the choice stays unless another one has more goodput by this share;
        ``limit``: largest growth of the batch in one decision; ``shrink``: whether it may become
        smaller."""
        super().__init__(initial, memory, dwell, wait, limit)
        self.options, self.objective, self.efficiency = options, objective, efficiency
        self.hysteresis, self.shrink = hysteresis, shrink
        self._ranks = min(one.ranks for one in options.all)

    @property
    def ranks(self) -> int | None:
        return self._ranks

    def settle(self, asked: int, ranks: int | None = None) -> None:
        super().settle(asked)
        self._ranks = self._ranks if ranks is None else ranks

    def _wanted(self, clock: Clock, batch: int, loss: float | None) -> tuple[int, str] | None:
        scale = self.scale
        if scale is None or self._waiting(clock):
            return None if scale is None else (self._asked, "")
        here = max(batch, self._asked) if not self.shrink else self._asked
        now = self.options.option(self._ranks, here)
        best = self.options.best(scale, self.objective, self.efficiency, self._open(here))
        worth = now.goodput(scale, self.initial)
        at = f"a noise scale of {scale:.4g}"
        if best is None or best.goodput(scale, self.initial) <= worth * (1 + self.hysteresis):
            return here, f"goodput: {self._told(now, scale)} stays the choice at {at}"
        self._ranks = best.ranks
        return best.batch, (
            f"goodput: {self._told(best, scale)} at {at}, against {self._told(now, scale)} before"
        )

    def _open(self, here: int) -> Iterable[Option]:
        """The options that can be gone over to in one decision."""
        most = None if self.limit is None else self._most(here, self.limit)
        return (
            one
            for one in self.options.all
            if one.ranks >= self._ranks
            and (self.shrink or one.batch >= here)
            and (most is None or one.batch <= most)
        )

    def _told(self, one: Option, scale: float) -> str:
        share = statistical_efficiency(one.batch, scale, self.initial)
        return (
            f"{one.batch} on {one.ranks} × {one.accumulation} "
            f"({one.images_per_sec:.4g} images/s × {share:.3g})"
        )

    def fastest(self, grow: Callable[[int], int], cap: int) -> GrowthPolicy:
        batches = self.options.batches

        def reach(asked: int) -> int:
            return max(batch for batch in batches if batch <= asked)

        first, top = self._first_growth(), batches[-1]
        if self.limit is None:
            return self._steps([(first, top)] if top > self.initial else [])
        steps: list[tuple[int, int]] = []
        batch = self.initial
        while (after := reach(self._most(batch, self.limit))) > batch:
            steps.append((first + len(steps), after))
            batch = after
        return self._steps(steps)
