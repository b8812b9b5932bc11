"""When and how the global batch grows.

A policy says what batch it would have at a point of the run; the ``StageScheduler`` turns that into
stages: it holds the batch below the cap, never shrinks it, and counts growths. Both are plain
objects that need neither torch nor a configuration file.
"""

from __future__ import annotations

from bisect import bisect_right
from dataclasses import dataclass
from decimal import ROUND_CEILING, Decimal, localcontext
from math import ceil, log2
from typing import Any, Protocol

from harness.config import FixedGrowth, Growth
from harness.schedule.clock import Clock, Limit
from harness.units import Duration

_HUGE = 2**53  # a batch past every cap; keeps exact arithmetic small


class GrowthPolicy(Protocol):
    """The batch that a rule asks for, as a function of the clock."""

    def asked(self, clock: Clock) -> int:
        """Global batch in samples, before any cap."""

    def reason(self, clock: Clock) -> str:
        """Why it asks for that batch, for people."""

    def next_change(self, clock: Clock) -> Limit | None:
        """The first later point at which it may ask for another batch; None: never."""


@dataclass(frozen=True)
class Fixed:
    """One global batch for the whole run."""

    initial: int

    def asked(self, clock: Clock) -> int:
        return self.initial

    def reason(self, clock: Clock) -> str:
        return f"fixed at {self.initial}"

    def next_change(self, clock: Clock) -> Limit | None:
        return None


@dataclass(frozen=True)
class Geometric:
    """⌈B0 · factor^⌊t / every⌋⌉: AdaBatch (Devarakonda et al. 2017, section 2) and GeoDamp."""

    initial: int
    factor: float
    every: Duration

    def asked(self, clock: Clock) -> int:
        return self._after(clock.passed(self.every))

    def _after(self, growths: int) -> int:
        if growths * log2(self.factor) + log2(self.initial) >= log2(_HUGE):
            return _HUGE
        # str() gives the decimal that the user wrote: 1.1 is 11/10 here, not its binary neighbour.
        # 100 digits hold every power whose product with the initial batch can be a whole number.
        with localcontext(prec=100):
            asked = self.initial * Decimal(str(self.factor)) ** growths
            return min(_HUGE, int(asked.to_integral_value(ROUND_CEILING)))

    def reason(self, clock: Clock) -> str:
        growths = clock.passed(self.every)
        return (
            f"geometric: {self.initial} × {self.factor:g}^{growths} after {growths} × {self.every}"
        )

    def next_change(self, clock: Clock) -> Limit | None:
        growths, asked = clock.passed(self.every), self.asked(clock)
        if self.factor == 1 or asked >= _HUGE:
            return None
        # A factor next to 1 may take many periods to add a sample.
        most = growths + ceil(log2(_HUGE) / log2(self.factor)) + 1
        change = bisect_right(range(most), asked, lo=growths, key=self._after)
        return Limit.multiple(self.every, change, clock.dataset_size)


def growth_policy(initial: int, growth: Growth) -> GrowthPolicy:
    """The policy that a configuration's ``batch.growth`` names."""
    if isinstance(growth, FixedGrowth):
        return Fixed(initial)
    return Geometric(initial, growth.factor, growth.every)


@dataclass(frozen=True)
class BatchDecision:
    """The global batch in force at a point, and what led to it."""

    stage: int
    batch: int
    asked: int
    growths: int
    reason: str

    @property
    def cap_factor(self) -> float:
        """What the rate is multiplied with because the batch may not grow on: max / asked.

        AdaDamp's Algorithm 1, lines 7–9 (Sievert and Charles).
        """
        return min(1.0, self.batch / self.asked)


class StageScheduler:
    """Follows a policy through a run, update by update; its state goes into checkpoints."""

    def __init__(self, policy: GrowthPolicy, cap: int | None = None) -> None:
        self.policy = policy
        self._cap = cap or _HUGE
        self._batch = 0
        self._stage = -1

    def decide(self, clock: Clock) -> BatchDecision:
        """The global batch of the update that starts here; a new stage begins when it grows."""
        asked = self.policy.asked(clock)
        batch = max(self._batch, min(asked, self._cap))
        if batch != self._batch:
            self._batch = batch
            self._stage += 1
        return BatchDecision(
            stage=self._stage,
            batch=batch,
            asked=max(asked, batch),
            growths=self._stage,
            reason=self.policy.reason(clock) + (f", capped at {batch}" if asked > batch else ""),
        )

    def state_dict(self) -> dict[str, Any]:
        return {"batch": self._batch, "stage": self._stage}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._batch, self._stage = int(state["batch"]), int(state["stage"])
