"""When and how the global batch grows.

A policy says what batch it would have at a point of the run; the ``StageScheduler`` turns that into
stages: it rounds, holds the batch below the cap, keeps it from shrinking, and counts growths. The
policies here know the whole run beforehand; those that decide from what training measures are in
``harness.schedule.measured``. All are plain objects that need neither torch nor a configuration.

Example, in a loop of one's own:

    scheduler = StageScheduler(Geometric(64, 2.0, Duration.parse("5ep")), cap=1024)
    clock = Clock(samples=0, updates=0, dataset_size=50_000)
    batch = scheduler.decide(clock).batch
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable
from dataclasses import dataclass
from decimal import ROUND_CEILING, Decimal, localcontext
from fractions import Fraction
from itertools import pairwise
from math import ceil, log2
from typing import Any, Protocol, runtime_checkable

from harness.schedule.clock import Clock, Limit
from harness.units import Duration

HUGE = 2**53  # a batch past every cap; keeps exact arithmetic small


class GrowthPolicy(Protocol):
    """The batch that a rule asks for, as a function of the clock (and of what it has measured)."""

    @property
    def initial(self) -> int:
        """Global batch at the start, in samples."""

    def asked(self, clock: Clock) -> int:
        """Global batch in samples, before rounding and cap."""

    def reason(self, clock: Clock) -> str:
        """Why it asks for that batch, for people."""

    def next_change(self, clock: Clock, low: int, high: int) -> Limit | None:
        """The first later point at which it asks for a batch of ``low`` or less, or of more than
        ``high``; None: never. ``low < asked(clock) <= high`` must hold."""


@dataclass(frozen=True)
class Observation:
    """What one update has measured; the same on all ranks."""

    samples: int
    """Global batch of the update."""
    loss: float
    """Mean training loss of its samples, at the weights before it."""
    grad_norm: float
    """L2 norm of its mean gradient."""
    noise: tuple[float, float] | None = None
    """Unbiased estimates of tr(Σ) and ‖G‖² (``measured.noise_terms``), if it gives any."""


@dataclass(frozen=True)
class LossSample:
    """The training loss that a decision needs: of this many samples, or of all if None."""

    samples: int | None


@runtime_checkable
class MeasuredPolicy(GrowthPolicy, Protocol):
    """A policy that decides, at times fixed beforehand, from what training has measured."""

    needs_noise: bool
    """Whether ``Observation.noise`` must be measured."""

    def due(self, clock: Clock) -> bool:
        """Whether a decision is due before the update that starts here."""

    def wants(self, clock: Clock) -> LossSample | None:
        """The training loss that the decision due here needs."""

    def observe(self, clock: Clock, seen: Observation) -> None:
        """Take in an update; ``clock`` is the point after it."""

    def revise(self, clock: Clock, batch: int, loss: float | None) -> int:
        """Take the decision that is due: the batch to ask for from now on. ``batch`` is the one in
        force, ``loss`` what ``wants`` asked for."""

    @property
    def ranks(self) -> int | None:
        """Ranks that it wants; None if they are to follow the batch."""

    def settle(self, asked: int, ranks: int | None = None) -> None:
        """Ask for this from now on: rank 0's decision, which all ranks follow."""

    def fastest(self, grow: Callable[[int], int], cap: int) -> GrowthPolicy:
        """The policy that asks for the most that this one might. ``grow`` rounds a batch up as the
        scheduler does."""

    def state_dict(self) -> dict[str, Any]:
        """Everything that later decisions depend on, as plain values."""

    def load_state_dict(self, state: dict[str, Any]) -> None: ...


@dataclass(frozen=True)
class Fixed:
    """One global batch for the whole run."""

    initial: int

    def asked(self, clock: Clock) -> int:
        return self.initial

    def reason(self, clock: Clock) -> str:
        return f"fixed at {self.initial}"

    def next_change(self, clock: Clock, low: int, high: int) -> Limit | None:
        return None


@dataclass(frozen=True)
class Listed:
    """Stages written out as (start, batch); ``initial`` holds until the first.

    Raises ValueError unless the starts ascend and all have one unit.
    """

    initial: int
    stages: tuple[tuple[Duration, int], ...]

    def __post_init__(self) -> None:
        starts = [start for start, _ in self.stages]
        if len({start.unit for start in starts}) > 1:
            raise ValueError("the starts of listed stages must all have one unit")
        if any(after.value <= before.value for before, after in pairwise(starts)):
            raise ValueError("the starts of listed stages must ascend")

    def asked(self, clock: Clock) -> int:
        current = self._current(clock)
        return self.initial if current < 0 else self.stages[current][1]

    def _current(self, clock: Clock) -> int:
        """Index of the stage at a point; −1 before the first."""
        return bisect_right(self.stages, False, key=lambda s: clock.passed(s[0]) == 0) - 1

    def reason(self, clock: Clock) -> str:
        current = self._current(clock)
        if current < 0:
            return f"list: {self.initial} from the start"
        start, batch = self.stages[current]
        return f"list: {batch} from {start}"

    def next_change(self, clock: Clock, low: int, high: int) -> Limit | None:
        for start, batch in self.stages[self._current(clock) + 1 :]:
            if batch <= low or batch > high:
                return Limit.multiple(start, 1, clock.dataset_size)
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
        if growths * log2(self.factor) + log2(self.initial) >= log2(HUGE):
            return HUGE
        # str() gives the decimal that the user wrote: 1.1 is 11/10 here, not its binary neighbour.
        # 100 digits hold every power whose product with the initial batch can be a whole number.
        with localcontext(prec=100):
            asked = self.initial * Decimal(str(self.factor)) ** growths
            return min(HUGE, int(asked.to_integral_value(ROUND_CEILING)))

    def reason(self, clock: Clock) -> str:
        growths = clock.passed(self.every)
        return (
            f"geometric: {self.initial} × {self.factor:g}^{growths} after {growths} × {self.every}"
        )

    def next_change(self, clock: Clock, low: int, high: int) -> Limit | None:
        growths = clock.passed(self.every)
        if self.factor == 1 or high >= HUGE:
            return None
        # A factor next to 1 may take many periods to add a sample.
        most = growths + ceil(log2(HUGE) / log2(self.factor)) + 1
        change = bisect_right(range(most), high, lo=growths, key=self._after)
        return Limit.multiple(self.every, change, clock.dataset_size)


@dataclass(frozen=True)
class Linear:
    """⌈B0 + rate · ⌊t / every⌋⌉: PadaDamp (Sievert 2020), with ``every`` one update there.

    The AdaDamp bounds suggest B ∝ epoch (Sievert and Charles, *Resource allocation for mini-batch
    SGD via adaptive batch sizes*).
    """

    initial: int
    rate: float
    every: Duration

    def asked(self, clock: Clock) -> int:
        return self._after(clock.passed(self.every))

    def _after(self, periods: int) -> int:
        return min(HUGE, ceil(self.initial + Fraction(str(self.rate)) * periods))

    def reason(self, clock: Clock) -> str:
        periods = clock.passed(self.every)
        return f"linear: {self.initial} + {self.rate:g} × {periods} after {periods} × {self.every}"

    def next_change(self, clock: Clock, low: int, high: int) -> Limit | None:
        if high >= HUGE:
            return None
        change = (high - self.initial) // Fraction(str(self.rate)) + 1
        return Limit.multiple(self.every, change, clock.dataset_size)


@dataclass(frozen=True)
class BatchDecision:
    """The global batch in force at a point, and what led to it."""

    stage: int
    batch: int
    asked: int
    """More than ``batch`` only where the cap holds it back."""
    growths: int
    """How often the batch has grown, less how often it has shrunk."""
    reason: str
    ranks: int | None = None
    """Ranks that the policy wants; None: they follow the batch."""

    @property
    def cap_factor(self) -> float:
        """What the rate is multiplied with because the batch may not grow on: max / asked.

        AdaDamp's Algorithm 1, lines 7–9 (Sievert and Charles).
        """
        return min(1.0, self.batch / self.asked)


def _own(asked: int) -> int:
    return asked


class StageScheduler:
    """Follows a policy through a run, update by update; its state goes into checkpoints.

    Per update: ``wanted`` (a training loss that must be measured first, if any), ``decide``, and,
    for policies that measure, ``observe`` afterwards.
    """

    def __init__(
        self,
        policy: GrowthPolicy,
        cap: int | None = None,
        multiple_of: int = 1,
        shrink: bool = False,
    ) -> None:
        """``cap``: the largest batch; ``multiple_of``: what is asked for is rounded up to a
        multiple of this; ``shrink``: whether the batch may become smaller.

        Raises ValueError if the initial batch or the cap is no such multiple.
        """
        for name, value in (("the initial batch", policy.initial), ("the cap", cap or multiple_of)):
            if value % multiple_of:
                raise ValueError(f"{name}, {value}, is not a multiple of {multiple_of}")
        self.policy = policy
        self.measured = policy if isinstance(policy, MeasuredPolicy) else None
        """The policy, if it decides from measurements."""
        self._cap = cap or HUGE - HUGE % multiple_of
        self._multiple = multiple_of
        self._shrink = shrink
        self.agree: Callable[[int], int] = _own
        """Turns what this rank would ask for into what all ranks ask for. Called for decisions from
        measurements only, at the same points on all ranks."""
        self._batch = 0
        self._stage = -1
        self._growths = 0

    def due(self, clock: Clock) -> bool:
        """Whether ``decide`` takes a decision from measurements here."""
        return self.measured is not None and self.measured.due(clock)

    def wanted(self, clock: Clock) -> LossSample | None:
        """The training loss that ``decide`` needs at this point."""
        if self.measured is None or not self.measured.due(clock):
            return None
        return self.measured.wants(clock)

    def decide(self, clock: Clock, loss: float | None = None) -> BatchDecision:
        """The global batch of the update that starts here; a new stage begins when it changes.

        ``loss`` is what ``wanted`` asked for. Asked again at the same point, it says the same.
        """
        if self.measured is not None and self.measured.due(clock):
            asked = self.measured.revise(clock, self._batch or self.policy.initial, loss)
            ranks = self.measured.ranks
            self.measured.settle(self.agree(asked), None if ranks is None else self.agree(ranks))
        asked = self.policy.asked(clock)
        batch = min(self._rounded(asked), self._cap)
        if not self._shrink:
            batch = max(self._batch, batch)
        if batch != self._batch:
            if self._batch:
                self._growths += 1 if batch > self._batch else -1
            self._batch = batch
            self._stage += 1
        return BatchDecision(
            stage=self._stage,
            batch=batch,
            asked=max(asked, batch),
            growths=self._growths,
            reason=self.policy.reason(clock) + self._remark(asked, batch),
            ranks=None if self.measured is None else self.measured.ranks,
        )

    def observe(self, clock: Clock, seen: Observation) -> None:
        """Tell the policy what an update has measured; ``clock`` is the point after it."""
        if self.measured is not None:
            self.measured.observe(clock, seen)

    def next_change(self, clock: Clock) -> Limit | None:
        """The first later point at which another batch may be decided on; None: never.

        Past the cap there is none: only the rate follows what the policy asks for. Policies that
        measure do not know, and say None.
        """
        if self.measured is not None:
            return None
        asked = self.policy.asked(clock)
        capped, falls = asked > self._cap, self._shrink and not isinstance(self.policy, Fixed)
        if capped and not falls:
            return None
        high = HUGE if capped else self._rounded(asked)
        low = (self._cap if capped else high - self._multiple) if falls else 0
        if not self._shrink:
            high = max(high, self._batch)
        return self.policy.next_change(clock, low, high)

    def bounds(self) -> tuple[StageScheduler, StageScheduler]:
        """The slowest and the fastest growth that a policy which measures may come to, as
        schedulers that know the whole run; for other policies twice the same."""
        slowest: GrowthPolicy = self.policy
        fastest: GrowthPolicy = self.policy
        if self.measured is not None:
            slowest = Fixed(self.policy.initial)
            fastest = self.measured.fastest(lambda b: min(self._rounded(b), self._cap), self._cap)
        first, second = (
            StageScheduler(policy, self._cap, self._multiple, self._shrink)
            for policy in (slowest, fastest)
        )
        return first, second

    def state_dict(self) -> dict[str, Any]:
        state: dict[str, Any] = {
            "batch": self._batch,
            "stage": self._stage,
            "growths": self._growths,
        }
        if self.measured is not None:
            state["policy"] = self.measured.state_dict()
        return state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a saved state. Raises KeyError or ValueError if it is another policy's."""
        if self.measured is None and "policy" in state:
            raise ValueError("the state is of a policy that measures, but this one does not")
        self._batch, self._stage = int(state["batch"]), int(state["stage"])
        self._growths = int(state["growths"])
        if self.measured is not None:
            self.measured.load_state_dict(state["policy"])

    def _rounded(self, asked: int) -> int:
        return -(-asked // self._multiple) * self._multiple

    def _remark(self, asked: int, batch: int) -> str:
        if asked > batch:
            return f", capped at {batch}"
        if self._rounded(asked) < batch:
            return f", kept at {batch}: it does not shrink"
        return f", rounded up to {batch}" if asked < batch else ""
