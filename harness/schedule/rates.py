"""Learning rate and momentum as functions of the clock and the global batch.

    lr = base · scale(B) · warmup · on_growth^growths · decay(t) · (max / asked, past the cap)

with scale(B) = (B / base_batch)^p, p = 1 for the linear rule (Goyal et al. 2017), ½ for the
square-root rule (Krizhevsky 2014; Hoffer et al. 2017) and 0 for none.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from harness.config import Config, Decay, PolyDecay, StepDecay
from harness.errors import ConfigError
from harness.schedule.clock import Clock
from harness.schedule.growth import BatchDecision
from harness.units import Duration

_LARGEST = 3.4e38  # what the weights' float32 can hold

POWERS = {"linear": 1.0, "sqrt": 0.5, "none": 0.0}

DecayRule = Callable[[Clock], float]


@dataclass(frozen=True)
class Rates:
    lr: float
    momentum: float


@dataclass(frozen=True)
class Poly:
    """(1 − t)^power, t the fraction of the run that is done (You et al. 2017 use power 2)."""

    power: float
    total: Duration

    def __call__(self, clock: Clock) -> float:
        return float(max(0.0, 1.0 - clock.fraction(self.total)) ** self.power)


@dataclass(frozen=True)
class Step:
    """factor^⌊t / every⌋."""

    factor: float
    every: Duration

    def __call__(self, clock: Clock) -> float:
        return float(self.factor ** clock.passed(self.every))


def constant(clock: Clock) -> float:
    return 1.0


@dataclass(frozen=True)
class GradualWarmup:
    """A straight line from ``start`` to the scaled rate, update by update (Goyal et al. 2017)."""

    start: float
    duration: Duration

    def __call__(self, clock: Clock, target: float) -> float:
        done = min(1.0, clock.fraction(self.duration))
        return self.start + (target - self.start) * done if done < 1.0 else target


@dataclass(frozen=True)
class RateSchedule:
    """Rates of every update of a run; a pure function, so it has no state to save."""

    base: float
    base_batch: int
    power: float
    momentum: float
    warmup: GradualWarmup | None = None
    decay: DecayRule = constant
    on_growth: float = 1.0

    def at(self, clock: Clock, decision: BatchDecision) -> Rates:
        """Rates of the update that starts at ``clock`` with the decided global batch.

        Raises ConfigError where the rate is larger than a float can be.
        """
        try:
            lr = self._lr(clock, decision)
        except OverflowError:
            lr = float("inf")
        if not lr <= _LARGEST:
            raise ConfigError(
                f"lr: the learning rate is past 3.4e38 in stage {decision.stage}; lower lr.base "
                f"(now {self.base:g}) or lr.on_growth (now {self.on_growth:g})"
            )
        return Rates(lr, self.momentum)

    def _lr(self, clock: Clock, decision: BatchDecision) -> float:
        lr: float = self.base * (decision.batch / self.base_batch) ** self.power
        if self.warmup is not None:
            lr = self.warmup(clock, lr)
        growths = float(self.on_growth**decision.growths)
        return lr * growths * self.decay(clock) * decision.cap_factor


def rate_schedule(config: Config) -> RateSchedule:
    """The schedule that a configuration's ``lr`` and ``optimizer.momentum`` describe."""
    lr = config.lr
    warmup = None
    if lr.warmup is not None:
        start = lr.base if lr.warmup.start is None else lr.warmup.start
        warmup = GradualWarmup(start, lr.warmup.duration)
    return RateSchedule(
        base=lr.base,
        base_batch=lr.base_batch or config.batch.initial,
        power=POWERS[lr.scaling],
        momentum=config.optimizer.momentum,
        warmup=warmup,
        decay=_decay_rule(lr.decay, config.train.duration),
        on_growth=lr.on_growth,
    )


def _decay_rule(decay: Decay, total: Duration) -> DecayRule:
    if isinstance(decay, PolyDecay):
        return Poly(decay.power, total)
    if isinstance(decay, StepDecay):
        return Step(decay.factor, decay.every)
    return constant
