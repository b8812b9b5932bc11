"""Learning rate and momentum as functions of the clock and the global batch.

    scaled = base · scale(B) · on_growth, at most lr.max
    lr     = warmup(scaled) · decay(t) · (max / asked, past the cap), at least lr.min

with scale(B) = (B / base_batch)^p, p = 1 for the linear rule (Goyal et al. 2017), ½ for the
square-root rule (Krizhevsky 2014; Hoffer et al. 2017) and 0 for none; B counts up to max_batch.

AdaBatch pairs a growth β with a decay of the rate (Devarakonda et al. 2017, section 2). It is the
ratio rate / batch that falls: with the linear rule, ``on_growth`` is that fall, and the rate itself
is multiplied by β · on_growth. So ``on_growth: 0.1`` makes 0.2, 0.4 and 0.8 of the growths 2, 4, 8.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from math import cos, pi

from harness.errors import ConfigError
from harness.schedule.clock import Clock
from harness.schedule.growth import BatchDecision
from harness.units import Duration

_LARGEST = 3.4e38  # what the weights' float32 can hold

POWERS = {"linear": 1.0, "sqrt": 0.5, "none": 0.0}

DecayRule = Callable[[Clock], float]
"""Share of the way from the end rate to the undecayed rate that is left, 1 at first."""


@dataclass(frozen=True)
class Rates:
    lr: float
    momentum: float

    @property
    def effective(self) -> float:
        """η / (1 − m): what a gradient moves the weights by in all (Smith et al. 2018)."""
        return self.lr / (1.0 - self.momentum)


@dataclass(frozen=True)
class Poly:
    """(1 − t)^power, t the fraction of the run that is done (You et al. 2017 use power 2)."""

    power: float
    total: Duration
    begin: Duration | None = None

    def __call__(self, clock: Clock) -> float:
        return float(max(0.0, 1.0 - clock.between(self.begin, self.total)) ** self.power)


@dataclass(frozen=True)
class Cosine:
    """(1 + cos πt) / 2 (Loshchilov and Hutter 2017, equation 5, one cycle)."""

    total: Duration
    begin: Duration | None = None

    def __call__(self, clock: Clock) -> float:
        return 0.5 * (1.0 + cos(pi * min(1.0, clock.between(self.begin, self.total))))


@dataclass(frozen=True)
class Step:
    """factor^⌊t / every⌋."""

    factor: float
    every: Duration
    begin: Duration | None = None

    def __call__(self, clock: Clock) -> float:
        if self.begin is None:
            return float(self.factor ** clock.passed(self.every))
        return float(self.factor ** int(clock.periods(self.begin, self.every)))


@dataclass(frozen=True)
class Exponential:
    """factor^(t / every), continuously."""

    factor: float
    every: Duration
    begin: Duration | None = None

    def __call__(self, clock: Clock) -> float:
        return float(self.factor ** float(clock.periods(self.begin, self.every)))


@dataclass(frozen=True)
class Multistep:
    """× factor at each of some times (Goyal et al. 2017: 0.1 at epochs 30, 60 and 80)."""

    factor: float
    at: tuple[Duration, ...]

    def __call__(self, clock: Clock) -> float:
        return float(self.factor ** sum(clock.passed(time) > 0 for time in self.at))


def constant(clock: Clock) -> float:
    return 1.0


@dataclass(frozen=True)
class GradualWarmup:
    """A straight line from ``start`` to the scaled rate, update by update (Goyal et al. 2017).

    ``per_epoch``: the rate stays for an epoch at a time, for epoch i of k
    (k + 1 − i)/k · start + (i − 1)/k · scaled (Signer and Barbier, section II); ``duration`` is
    then a whole number of epochs.
    """

    start: float
    duration: Duration
    per_epoch: bool = False

    def __call__(self, clock: Clock, target: float) -> float:
        done = clock.fraction(self.duration)
        if self.per_epoch:
            done = (clock.samples // clock.dataset_size) / float(self.duration.value)
        return self.start + (target - self.start) * done if done < 1.0 else target

    def over(self, clock: Clock) -> bool:
        return clock.fraction(self.duration) >= 1.0


@dataclass(frozen=True)
class ConstantWarmup:
    """``rate`` for a while, then at once the scaled rate (Goyal et al. 2017, section 2.2)."""

    rate: float
    duration: Duration

    def __call__(self, clock: Clock, target: float) -> float:
        return target if self.over(clock) else self.rate

    def over(self, clock: Clock) -> bool:
        return clock.fraction(self.duration) >= 1.0


@dataclass(frozen=True)
class RateSchedule:
    """Rates of every update of a run; a pure function, so it has no state to save."""

    base: float
    base_batch: int
    power: float
    momentum: float
    max_batch: int | None = None
    """The scaling rule follows the global batch up to here."""
    least: float = 0.0
    most: float | None = None
    """Of the scaled rate."""
    warmup: GradualWarmup | ConstantWarmup | None = None
    decay_in_warmup: bool = True
    decay: DecayRule = constant
    end: float = 0.0
    """Rate that ``decay`` leads to."""
    on_growth: tuple[float, ...] = (1.0,)
    """Factors of the first, second, … growth; the last one again for all that follow."""
    scale_momentum: bool = False
    """Smith and Le's rule: what the limits keep from the rate goes to 1 / (1 − momentum)."""
    max_momentum: float = 0.9999

    def at(self, clock: Clock, decision: BatchDecision) -> Rates:
        """Rates of the update that starts at ``clock`` with the decided global batch.

        Raises ConfigError where the rate is larger than a float can be.
        """
        try:
            scaled, wanted = self._scaled(decision)
            lr = max(self.least, self._timed(clock, scaled) * decision.cap_factor)
        except OverflowError:
            lr = scaled = wanted = float("inf")
        if not lr <= _LARGEST:
            raise ConfigError(
                f"lr: the learning rate is past 3.4e38 in stage {decision.stage}; lower lr.base "
                f"(now {self.base:g}) or lr.on_growth (now {self.on_growth[-1]:g})"
            )
        return Rates(lr, self._momentum(scaled, wanted))

    def _scaled(self, decision: BatchDecision) -> tuple[float, float]:
        """The scaled rate within the limits, and what it would be without them."""
        growth = self._on_growth(decision.growths)
        follow = min(decision.batch, self.max_batch or decision.batch)
        scaled = self.base * (follow / self.base_batch) ** self.power * growth
        wanted = self.base * (decision.batch / self.base_batch) ** self.power * growth
        return (scaled if self.most is None else min(scaled, self.most)), wanted

    def _on_growth(self, growths: int) -> float:
        product = 1.0
        for factor in self.on_growth[: max(0, growths)]:
            product *= factor
        return float(product * self.on_growth[-1] ** max(0, growths - len(self.on_growth)))

    def _timed(self, clock: Clock, scaled: float) -> float:
        warming = self.warmup is not None and not self.warmup.over(clock)
        rate = scaled if self.warmup is None else self.warmup(clock, scaled)
        if warming and not self.decay_in_warmup:
            return rate
        left = self.decay(clock)
        return rate * left if self.end == 0 else self.end + (rate - self.end) * left

    def _momentum(self, scaled: float, wanted: float) -> float:
        """m with 1 / (1 − m) = wanted / scaled · 1 / (1 − momentum), where the limits bite."""
        if not self.scale_momentum or wanted <= scaled or scaled == 0:
            return self.momentum
        return min(self.max_momentum, 1.0 - (1.0 - self.momentum) * scaled / wanted)
