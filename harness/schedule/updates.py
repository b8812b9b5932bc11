"""The updates of a training run one after another, for a loop of one's own; imports no torch."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Self

from harness.schedule.clock import Clock, EpochEnd, Limit, step, update_size
from harness.schedule.configured import rate_schedule, stage_scheduler
from harness.schedule.growth import GrowthPolicy, Observation, StageScheduler
from harness.schedule.rates import RateSchedule
from harness.schema import Config
from harness.units import Duration


@dataclass(frozen=True)
class Update:
    """What one update takes and at which rates."""

    number: int
    """Counted from 1."""
    seen: int
    """Samples that were seen before it."""
    size: int
    """Samples that it takes: the global batch, or less at the end of an epoch or of the run."""
    stage: int
    lr: float
    momentum: float


class Updates:
    """Iterates over the updates from where the clock stands to the end of the run.

    An update counts as done once it has been handed out: ``state_dict`` in the body of the loop is
    that of the run after it, to be saved beside weights that have had their step.

    Policies that decide from measurements are told of each update by ``observe``. Those that want a
    loss measured over training samples (``loss: sample`` and ``full``) are refused.
    """

    def __init__(
        self,
        dataset_size: int,
        growth: GrowthPolicy,
        rates: RateSchedule,
        duration: str | Duration,
        max_batch: int | None = None,
        epoch_end: EpochEnd = "short",
    ) -> None:
        """``duration``: such as ``30ep``, ``200up``, ``50000sa``; ``max_batch``: cap of the batch.

        Raises ValueError for a duration that is none, or a data set without samples.
        """
        if dataset_size < 1:
            raise ValueError(f"a data set needs at least 1 sample, not {dataset_size}")
        self.clock = Clock(0, 0, dataset_size)
        self._scheduler = StageScheduler(growth, max_batch)
        self._rates, self._epoch_end = rates, epoch_end
        self._end = Limit.multiple(Duration.parse(duration), 1, dataset_size)
        self._last_size = 0

    @classmethod
    def of(
        cls, config: Config, dataset_size: int, agree: Callable[[int], int] | None = None
    ) -> Self:
        """What a configuration says. ``agree``: see `StageScheduler`."""
        made = cls(
            dataset_size,
            stage_scheduler(config.batch).policy,
            rate_schedule(config),
            config.train.duration,
            epoch_end=config.batch.epoch_end,
        )
        made._scheduler = stage_scheduler(config.batch, agree)
        return made

    def __iter__(self) -> Iterator[Update]:
        while not self._end.reached(self.clock):
            wanted = self._scheduler.wanted(self.clock)
            if wanted is not None:
                raise ValueError(
                    "this growth policy wants the loss of training samples measured, which a loop "
                    "of one's own has no way to give; use loss: running"
                )
            decision = self._scheduler.decide(self.clock)
            rates = self._rates.at(self.clock, decision)
            size = update_size(self.clock, decision.batch, self._epoch_end, self._end)
            before, self.clock = self.clock, step(self.clock, size)
            self._last_size = size
            yield Update(
                self.clock.updates, before.samples, size, decision.stage, rates.lr, rates.momentum
            )

    def observe(self, loss: float, grad_norm: float) -> None:
        """What the update at hand has measured, the same on all ranks: the mean loss over its
        samples, and the L2 norm of its gradient."""
        self._scheduler.observe(self.clock, Observation(self._last_size, loss, grad_norm))

    def state_dict(self) -> dict[str, Any]:
        """Plain numbers."""
        clock = self.clock
        return {
            "samples": clock.samples,
            "updates": clock.updates,
            "dataset_size": clock.dataset_size,
            "growth": self._scheduler.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a saved state. Raises ValueError if it is of another data set."""
        if state["dataset_size"] != self.clock.dataset_size:
            raise ValueError(
                f"the state is of {state['dataset_size']} samples, not {self.clock.dataset_size}"
            )
        self.clock = Clock(state["samples"], state["updates"], state["dataset_size"])
        self._scheduler.load_state_dict(state["growth"])
