"""Policies that grow the global batch by what training measures: loss, gradient, noise scale.

Each decides at multiples of ``dwell`` and not before ``wait``; between decisions it asks for what
it asked for last. None asks for less than its initial batch. Their state is plain values, so that a
checkpoint can hold it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from fractions import Fraction
from math import ceil, exp, expm1, isfinite
from typing import Any, Literal

from harness.errors import ConfigError
from harness.schedule.clock import Clock, Limit
from harness.schedule.growth import HUGE, GrowthPolicy, Listed, LossSample, Observation
from harness.units import Duration

_MOST_STEPS = 10_000

# Defaults, as in harness.schema.
_TENTH, _HALF, _EPOCH = (Duration.parse(text) for text in ("0.1ep", "0.5ep", "1ep"))
_FIFTY, _THOUSAND = Duration.parse("50up"), Duration.parse("1000up")


def noise_terms(
    samples: int, squares: int, micro_norm2: float, norm2: float
) -> tuple[float, float] | None:
    """Unbiased estimates of tr(Σ) and ‖G‖² from one update, None if it has one micro-batch only.

    ``squares`` is the sum of the squared sizes of its micro-batches, ``micro_norm2`` the sum over
    micro-batches of ‖(1 / samples) Σ g‖², ``norm2`` the squared norm of the mean gradient. A sum
    over m samples has E‖Σ g‖² = m²‖G‖² + m tr(Σ); this solves the two equations that micro-batches
    and whole make (McCandlish et al. 2018, appendix A.1, for micro-batches of any size).
    Micro-batches do not depend on the ranks, so neither does the estimate.
    """
    if samples * samples == squares:
        return None
    whole, parts = norm2 * samples * samples, micro_norm2 * samples * samples
    mean2 = (whole - parts) / (samples * samples - squares)
    return (parts - squares * mean2) / samples, mean2


def geometric_limit(updates: Sequence[int], losses: Sequence[float]) -> float | None:
    """F* of F* + c·r^k, 0 < r < 1, through three points (k, loss), k ascending; None if there is no
    such curve: the loss does not fall, or not more slowly with each update.

    For points at equal distances this is Aitken's Δ² process. Under the PL condition AdaDamp's loss
    falls geometrically in the number of updates (Sievert and Charles).
    """
    first, second = updates[1] - updates[0], updates[2] - updates[1]
    before, after = losses[0] - losses[1], losses[1] - losses[2]
    # A fall that is a rounding error says nothing of a limit.
    if after <= 1e-9 * abs(losses[2]) or before * second <= after * first:
        return None
    low, high = -1e3 / min(first, second), 0.0  # log r; the quotient below falls as it grows
    for _ in range(100):
        log_r = (low + high) / 2
        # before / after = (1 − r^first) / (r^first · (1 − r^second)), without underflow
        if -expm1(first * log_r) * after < -expm1(second * log_r) * exp(first * log_r) * before:
            high = log_r
        else:
            low = log_r
    return losses[2] + after * exp(second * low) / expm1(second * low)


def _quotient_up(numerator: float, denominator: float) -> int:
    """⌈numerator / denominator⌉, at most HUGE; a rounding error does not add a sample."""
    if denominator * HUGE <= numerator:
        return HUGE
    return ceil(numerator / denominator * (1 - 1e-12))


class Smoothed:
    """Exponential moving average over a time, without bias towards its start (Kingma and Ba 2015,
    section 3): after the first value it is that value."""

    def __init__(self, memory: Duration) -> None:
        self._memory = memory
        self._sum = self._weight = 0.0

    def add(self, clock: Clock, samples: int, value: float) -> None:
        """Count an update of ``samples`` samples; ``clock`` is the point after it."""
        if self._memory.unit == "up":
            share = 1 / float(self._memory.value)
        else:
            share = samples / self._memory.boundary(1, clock.dataset_size)
        keep, new = exp(-share), -expm1(-share)
        self._sum = keep * self._sum + new * value
        self._weight = keep * self._weight + new

    @property
    def value(self) -> float | None:
        return self._sum / self._weight if self._weight else None

    def state_dict(self) -> list[float]:
        return [self._sum, self._weight]

    def load_state_dict(self, state: list[float]) -> None:
        self._sum, self._weight = map(float, state)


class Decider:
    """What the policies share: when they decide, and what they ask for in between."""

    needs_noise = False
    _SAVED: tuple[str, ...] = ()

    def __init__(
        self, initial: int, dwell: Duration, wait: Duration | None, limit: float | None = None
    ) -> None:
        self.initial = initial
        self.dwell, self.wait, self.limit = dwell, wait, limit
        self._asked = initial
        self._reason = f"{self.name}: {initial} until there is a measurement"
        self._decided = -1

    @property
    def name(self) -> str:
        return type(self).__name__.lower()

    @property
    def ranks(self) -> int | None:
        return None

    def asked(self, clock: Clock) -> int:
        return self._asked

    def reason(self, clock: Clock) -> str:
        return self._reason

    def next_change(self, clock: Clock, low: int, high: int) -> Limit | None:
        return None

    def due(self, clock: Clock) -> bool:
        return clock.passed(self.dwell) > self._decided

    def wants(self, clock: Clock) -> LossSample | None:
        return None

    def revise(self, clock: Clock, batch: int, loss: float | None) -> int:
        self._decided = clock.passed(self.dwell)
        wanted = self._wanted(clock, batch, loss)
        if wanted is None:
            return self._asked
        if self._waiting(clock):
            self._reason = f"{self.name}: {self._asked} until {self.wait}"
            return self._asked
        asked, self._reason = wanted
        asked = max(asked, self.initial)
        if self.limit is not None:
            most = self._most(max(batch, self._asked), self.limit)
            if asked > most:
                self._reason += f" = {asked}, limited to × {self.limit:g}"
                asked = most
        return min(HUGE, asked)

    def _wanted(self, clock: Clock, batch: int, loss: float | None) -> tuple[int, str] | None:
        """What the measurements ask for and why; None: nothing new."""
        raise NotImplementedError

    @staticmethod
    def _most(batch: int, limit: float) -> int:
        return ceil(batch * Fraction(str(limit)))

    def settle(self, asked: int, ranks: int | None = None) -> None:
        self._asked = asked

    def _waiting(self, clock: Clock) -> bool:
        return bool(self.wait) and clock.passed(self.wait or self.dwell) < 1

    def _first_growth(self) -> int:
        """Index of the first decision that may grow the batch (or an earlier one)."""
        if not self.wait or self.wait.unit != self.dwell.unit:
            return 1
        # A decision that falls due before the end of the wait may be taken at an update past it.
        return max(1, self.wait.value // self.dwell.value)

    def fastest(self, grow: Callable[[int], int], cap: int) -> GrowthPolicy:
        first = self._first_growth()
        if self.limit is None:
            return self._steps([(first, cap)])
        return self._climb(first, 1, self.limit, grow, cap)

    def _climb(
        self, first: int, period: int, factor: float, grow: Callable[[int], int], cap: int
    ) -> Listed:
        """Growth by ``factor`` at decision ``first`` and at each ``period``-th one after it."""
        steps: list[tuple[int, int]] = []
        batch = self.initial
        while batch < cap:
            # Past so many steps of a tiny factor any bound will do.
            batch = grow(self._most(batch, factor)) if len(steps) < _MOST_STEPS else cap
            steps.append((first + len(steps) * period, batch))
        return self._steps(steps)

    def _steps(self, steps: list[tuple[int, int]]) -> Listed:
        return Listed(
            self.initial,
            tuple((Duration(self.dwell.value * i, self.dwell.unit), batch) for i, batch in steps),
        )

    def state_dict(self) -> dict[str, Any]:
        state: dict[str, Any] = {
            "name": self.name,
            "asked": self._asked,
            "reason": self._reason,
            "decided": self._decided,
        }
        for key in self._SAVED:
            value = getattr(self, f"_{key}")
            state[key] = value.state_dict() if isinstance(value, Smoothed) else value
        return state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if state["name"] != self.name:
            raise ValueError(f"the state of a policy {state['name']!r}, not {self.name!r}")
        self._asked, self._reason = int(state["asked"]), str(state["reason"])
        self._decided = int(state["decided"])
        for key in self._SAVED:
            value = getattr(self, f"_{key}")
            if isinstance(value, Smoothed):
                value.load_state_dict(state[key])
            else:
                saved = state[key]
                setattr(self, f"_{key}", list(saved) if isinstance(saved, list) else saved)


class Loss(Decider):
    """⌈B0 · (F(w0) − F*) / (F(w) − F*)⌉: AdaDamp (Sievert and Charles, Algorithm 1).

    ``optimum`` is F*, if it is known; 0 is a bound below any cross-entropy; ``estimate``
    extrapolates the losses of the last three decisions (``geometric_limit``), never below 0.
    ``loss`` says what F is: ``running``, the smoothed loss of the updates, which costs nothing;
    ``sample`` and ``full``, the loss over some training samples or over all, at each decision.

    Raises ConfigError, with the first loss, if ``optimum`` is not below it.
    """

    _SAVED = ("running", "initial_loss", "last", "estimate")

    def __init__(
        self,
        initial: int,
        optimum: float | Literal["estimate"] = 0.0,
        loss: Literal["running", "sample", "full"] = "running",
        sample: int = 1000,
        memory: Duration = _TENTH,
        dwell: Duration = _EPOCH,
        wait: Duration | None = None,
        limit: float | None = None,
    ) -> None:
        """``limit``: largest growth of one decision, as a factor; with an estimated optimum 2 if
        not given, since three noisy losses may extrapolate to anything."""
        if limit is None and optimum == "estimate":
            limit = 2.0
        super().__init__(initial, dwell, wait, limit)
        self.optimum, self.loss, self.sample = optimum, loss, sample
        self._running = Smoothed(memory)
        self._initial_loss: float | None = None
        self._last: list[list[float]] = []
        """(updates, loss) of the last three decisions."""
        self._estimate = 0.0

    def wants(self, clock: Clock) -> LossSample | None:
        if self.loss == "running" or (self._decided >= 0 and self._waiting(clock)):
            return None
        return LossSample(self.sample if self.loss == "sample" else None)

    def observe(self, clock: Clock, seen: Observation) -> None:
        if self.loss != "running" or not isfinite(seen.loss):
            return
        if self._initial_loss is None:
            self._begin(seen.loss)
        self._running.add(clock, seen.samples, seen.loss)

    def _wanted(self, clock: Clock, batch: int, loss: float | None) -> tuple[int, str] | None:
        now = self._running.value if self.loss == "running" else loss
        if now is None or not isfinite(now):
            return None
        initial = self._begin(now) if self._initial_loss is None else self._initial_loss
        least = self._optimum(clock, now)
        gap, first = now - least, initial - least
        return _quotient_up(self.initial * first, gap), (
            f"loss: {self.initial} × ({initial:.4g} − {least:.4g}) / ({now:.4g} − {least:.4g})"
        )

    def _begin(self, loss: float) -> float:
        """Take F(w0), and refuse an optimum that is not below it."""
        if self.optimum != "estimate" and self.optimum >= loss:
            raise ConfigError(
                f"batch.growth.optimum = {self.optimum:g} is not below the loss at the start, "
                f"{loss:.6g}; give the least loss that can be reached, or 0"
            )
        self._initial_loss = loss
        return loss

    def _optimum(self, clock: Clock, now: float) -> float:
        if self.optimum != "estimate":
            return self.optimum
        self._last = [*self._last[-2:], [clock.updates, now]]
        if len(self._last) == 3:
            limit = geometric_limit([int(k) for k, _ in self._last], [f for _, f in self._last])
            self._estimate = self._estimate if limit is None else max(0.0, limit)
        if self._estimate >= min(now, self._initial_loss or now):  # the losses show it to be wrong
            self._estimate = 0.0
        return self._estimate


class Rolling(Decider):
    """⌈B0 · q0 / q⌉, q the rolling mean of ‖g‖² + loss_weight · loss: RadaDamp (Sievert 2020).

    q0 is the mean over ``wait``, as the published code has it, to be spared single large gradients.
    Where gradients grow in training, as they may at first, the batch stays.
    """

    _SAVED = ("norm2", "loss", "first_sum", "first_count")

    def __init__(
        self,
        initial: int,
        memory: Duration = _THOUSAND,
        loss_weight: float = 0.01,
        dwell: Duration = _EPOCH,
        wait: Duration | None = _FIFTY,
        limit: float | None = None,
    ) -> None:
        super().__init__(initial, dwell, wait, limit)
        self.loss_weight = loss_weight
        self._norm2, self._loss = Smoothed(memory), Smoothed(memory)
        self._first_sum, self._first_count = 0.0, 0

    def observe(self, clock: Clock, seen: Observation) -> None:
        norm2 = seen.grad_norm * seen.grad_norm
        if not (isfinite(norm2) and isfinite(seen.loss)):
            return
        self._norm2.add(clock, seen.samples, norm2)
        self._loss.add(clock, seen.samples, seen.loss)
        start = Clock(clock.samples - seen.samples, clock.updates - 1, clock.dataset_size)
        if self._waiting(start) or not self._first_count:
            self._first_sum += norm2 + self.loss_weight * seen.loss
            self._first_count += 1

    def _wanted(self, clock: Clock, batch: int, loss: float | None) -> tuple[int, str] | None:
        norm2, smooth = self._norm2.value, self._loss.value
        if norm2 is None or smooth is None:
            return None
        first = self._first_sum / self._first_count
        now = norm2 + self.loss_weight * smooth
        asked = _quotient_up(self.initial * first, now)
        return asked, f"rolling: {self.initial} × {first:.4g} / {now:.4g}"


class FromNoise(Decider):
    """What the policies share that follow the gradient noise scale tr(Σ) / ‖G‖².

    tr(Σ) and ‖G‖² are smoothed apart from each other and then divided, as the quotient of single
    estimates is biased (McCandlish et al. 2018, appendix A.1).
    """

    needs_noise = True
    _SAVED: tuple[str, ...] = ("trace", "norm2")

    def __init__(
        self,
        initial: int,
        memory: Duration,
        dwell: Duration,
        wait: Duration | None,
        limit: float | None,
    ) -> None:
        super().__init__(initial, dwell, wait, limit)
        self._trace, self._norm2 = Smoothed(memory), Smoothed(memory)

    def observe(self, clock: Clock, seen: Observation) -> None:
        if seen.noise is not None and all(map(isfinite, seen.noise)):
            self._trace.add(clock, seen.samples, seen.noise[0])
            self._norm2.add(clock, seen.samples, seen.noise[1])

    @property
    def scale(self) -> float | None:
        """The smoothed noise scale, in samples; None while the estimate of ‖G‖² is not positive."""
        trace, norm2 = self._trace.value, self._norm2.value
        if trace is None or norm2 is None or norm2 <= 0:
            return None
        return max(0.0, trace) / norm2


class Noise(FromNoise):
    """⌈ratio · tr(Σ) / ‖G‖²⌉, the gradient noise scale (McCandlish et al. 2018, equation 2.9)."""

    def __init__(
        self,
        initial: int,
        ratio: float = 1.0,
        hysteresis: float = 0.25,
        limit: float | None = 2.0,
        memory: Duration = _HALF,
        dwell: Duration = _EPOCH,
        wait: Duration | None = None,
    ) -> None:
        """``hysteresis``: the batch stays unless the wanted one differs by more than this share of
        it; ``limit``: largest growth, or shrinking, of one decision as a factor."""
        super().__init__(initial, memory, dwell, wait, limit)
        self.ratio, self.hysteresis = ratio, hysteresis

    def _wanted(self, clock: Clock, batch: int, loss: float | None) -> tuple[int, str] | None:
        scale = self.scale
        if scale is None:
            return None
        wanted, base = min(float(HUGE), self.ratio * scale), max(batch, self._asked)
        why = f"noise: {self.ratio:g} × a noise scale of {scale:.4g}"
        if abs(wanted - base) <= self.hysteresis * base:
            return base, f"{why}, within {self.hysteresis:g} of {base}"
        if self.limit is not None:
            wanted = max(wanted, base / self.limit)
        return ceil(wanted), why


class Plateau(Decider):
    """× factor once the mean loss between decisions has not improved ``patience`` times in a row.

    AdaBatch's published code has the rule beside its fixed schedule (Devarakonda et al. 2017).
    After a growth the count begins anew, with no best loss, as there.
    """

    _SAVED = ("sum", "samples", "best", "worse")

    def __init__(
        self,
        initial: int,
        factor: float = 2.0,
        patience: int = 3,
        threshold: float = 0.01,
        dwell: Duration = _EPOCH,
        wait: Duration | None = None,
    ) -> None:
        """``threshold``: share by which a loss must lie below the best one to count as better."""
        super().__init__(initial, dwell, wait)
        self.factor, self.patience, self.threshold = factor, patience, threshold
        self._sum, self._samples = 0.0, 0
        self._best: float | None = None
        self._worse = 0

    def observe(self, clock: Clock, seen: Observation) -> None:
        if isfinite(seen.loss):
            self._sum += seen.loss * seen.samples
            self._samples += seen.samples

    def _wanted(self, clock: Clock, batch: int, loss: float | None) -> tuple[int, str] | None:
        if not self._samples:
            return None
        mean = self._sum / self._samples
        self._sum, self._samples = 0.0, 0
        if self._waiting(clock):
            return self._asked, ""
        if self._best is None or mean < self._best - self.threshold * abs(self._best):
            self._best, self._worse = mean, 0
            return self._asked, f"plateau: {self._asked}, the loss falls ({mean:.4g})"
        self._worse += 1
        if self._worse < self.patience:
            return self._asked, (
                f"plateau: {self._asked}, loss {mean:.4g} against {self._best:.4g} at best, "
                f"{self._worse} of {self.patience}"
            )
        why = (
            f"plateau: × {self.factor:g}, no loss below {self._best:.4g} in {self.patience} × "
            f"{self.dwell}"
        )
        self._best, self._worse = None, 0
        return self._most(max(batch, self._asked), self.factor), why

    def fastest(self, grow: Callable[[int], int], cap: int) -> GrowthPolicy:
        first = self._first_growth() + self.patience
        return self._climb(first, self.patience + 1, self.factor, grow, cap)
