"""Throughput × statistical efficiency: what more ranks and larger batches are worth to training.

With the gradient noise scale φ (McCandlish et al. 2018, *An empirical model of large-batch
training*), reaching a loss with a batch of B takes S_min·(1 + φ/B) updates (equation 2.11) and
E_min·(1 + B/φ) samples (equation 2.12), S_min·φ = E_min. So from the samples at one batch follow
those at any other. Goodput is what Qiao et al. 2021 (Pollux, equation 5) call by that name.

This knows of speed only what it is asked for as a function, so it goes with a fitted model
(``speeds_of``) and with measured throughput (``measured_speeds``) alike.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from math import ceil, isfinite

import numpy as np
import numpy.typing as npt

from harness.errors import UsageError
from harness.scaling.fit import Fit
from harness.scaling.interval import Array, Interval, check_confidence, factors, of_draws
from harness.scaling.steptime import Decomposition
from harness.schedule.choices import Choice, statistical_efficiency
from harness.schedule.costs import Throughput

_NORMAL = 1.959964
"""Standard deviations of a 95 % interval."""


def samples_to_target(
    batch: float, noise_scale: float, reference: float, reference_samples: float
) -> float:
    """Samples to the loss that took ``reference_samples`` with batches of ``reference``."""
    return reference_samples / statistical_efficiency(batch, noise_scale, reference)


def updates_to_target(
    batch: float, noise_scale: float, reference: float, reference_samples: float
) -> float:
    """Updates to the loss that took ``reference_samples`` with batches of ``reference``."""
    return samples_to_target(batch, noise_scale, reference, reference_samples) / batch


@dataclass(frozen=True)
class MeasuredNoise:
    """The gradient noise scale as it was measured, in samples."""

    value: float
    low: float | None = None
    high: float | None = None
    """Of a 95 % interval."""

    def __post_init__(self) -> None:
        ends = [end for end in (self.low, self.high) if end is not None]
        if not all(isfinite(one) and 1e-12 <= one <= 1e18 for one in (self.value, *ends)):
            raise UsageError(
                f"a noise scale of {self.value!r} ({self.low!r} to {self.high!r}); valid are "
                "numbers of samples from 1e-12 to 1e18"
            )
        if ends and not (len(ends) == 2 and ends[0] <= self.value <= ends[1]):
            raise UsageError(
                f"a noise scale of {self.value:g} outside of its interval, {self.low} to "
                f"{self.high}"
            )

    def draws(self, rng: np.random.Generator, count: int) -> Array:
        """Lognormal, shape (count,); the value itself where it has no interval."""
        if self.low is None or self.high is None:
            return np.full(count, self.value)
        spread = np.log(self.high / self.low) / (2 * _NORMAL)
        return np.asarray(self.value * np.exp(spread * rng.standard_normal(count)))


@dataclass(frozen=True)
class Speed:
    """Images per second of a choice: the value, and draws of what it may be, shape (ensemble,)."""

    value: float
    draws: Array | None = None
    beyond: float = 1.0
    """Its ranks over the most that were measured; above 1 it is an extrapolation."""


Speeds = Callable[[Sequence[Choice]], list[Speed | None]]
"""Images per second of each choice; None where nothing is known of one."""


def speeds_of(fit: Fit, seed: int = 0) -> Speeds:
    """What a fitted step-time model says, with its ensemble and its own error."""

    def speeds(asked: Sequence[Choice]) -> list[Speed | None]:
        batches = np.array([one.batch for one in asked], dtype=np.float64)
        ranks = np.array([one.ranks for one in asked], dtype=np.float64)
        where = Decomposition.of(
            ranks, [one.nodes for one in asked], batches, [one.accumulation for one in asked]
        )
        values = batches / fit.model.seconds(where)
        beyond = ranks / fit.points[-1].ranks
        if fit.models is None:
            return [
                Speed(float(value), None, float(far))
                for value, far in zip(values, beyond, strict=True)
            ]
        # One error for each member and doubling: neighbours are off together.
        doublings = np.log2(np.maximum(1.0, beyond))
        draws = batches / fit.models.seconds(where)
        errors = np.random.default_rng(seed).standard_normal(len(draws))[:, None]
        draws = draws * factors(fit.model_error * doublings * errors)
        return [
            Speed(float(value), column, float(far))
            for value, column, far in zip(values, draws.T, beyond, strict=True)
        ]

    return speeds


def measured_speeds(throughput: Throughput) -> Speeds:
    """What runs' metrics tell (``harness.schedule.costs.read_throughput``): of the ranks and
    micro-batches that they had, at any accumulation; of others None."""

    def speeds(asked: Sequence[Choice]) -> list[Speed | None]:
        found = [throughput.seconds(one.ranks, one.accumulation, one.micro_batch) for one in asked]
        return [
            None if times is None else Speed(one.batch / times[0])
            for one, times in zip(asked, found, strict=True)
        ]

    return speeds


@dataclass(frozen=True)
class Goodput:
    """What a choice is worth."""

    choice: Choice
    images_per_sec: Interval
    statistical_efficiency: Interval
    goodput: Interval
    """Images per second that would make as much progress in batches of the reference size."""
    updates: Interval | None
    """To the target; None where the samples to it are not known."""
    seconds: Interval | None
    """To the target."""
    node_hours: Interval | None
    """To the target."""
    beyond: float
    """Its ranks over the most that were measured; above 1 it is an extrapolation."""


def goodputs(
    asked: Sequence[Choice],
    speeds: Speeds,
    noise: MeasuredNoise,
    reference: float,
    *,
    reference_samples: float | None = None,
    confidence: float = 0.95,
    seed: int = 0,
) -> tuple[Goodput, ...]:
    """Goodput of each choice whose speed is known, in their order.

    Args:
        reference: the batch whose samples count as 1, in samples.
        reference_samples: what the target takes with batches of that size.

    The intervals hold what is uncertain of the speed and of the noise scale; None if neither is
    known to be. Raises UsageError for a reference that cannot be.
    """
    for name, value in (("reference", reference), ("reference_samples", reference_samples)):
        if value is not None and not (isfinite(value) and 0 < value <= 1e18):
            raise UsageError(f"{name} is {value!r}; valid are numbers of samples above 0")
    known = [
        (one, speed) for one, speed in zip(asked, speeds(asked), strict=True) if speed is not None
    ]
    rng = np.random.default_rng(seed)
    counts = [len(speed.draws) for _, speed in known if speed.draws is not None]
    scales = noise.draws(rng, counts[0] if counts else 1000)
    uncertain = bool(counts) or noise.low is not None
    return tuple(
        _worth(one, speed, noise.value, scales, uncertain, reference, reference_samples, confidence)
        for one, speed in known
    )


def _worth(
    choice: Choice,
    speed: Speed,
    scale: float,
    scales: Array,
    uncertain: bool,
    reference: float,
    reference_samples: float | None,
    confidence: float,
) -> Goodput:
    shares = (scales + reference) / (scales + choice.batch)
    rates = np.full(len(scales), speed.value) if speed.draws is None else speed.draws
    share = statistical_efficiency(choice.batch, scale, reference)

    def interval(value: float, draws: Array, doubtful: bool = uncertain) -> Interval:
        return of_draws(value, draws, confidence) if doubtful else Interval(value)

    good = interval(speed.value * share, rates * shares)
    updates = seconds = None
    if reference_samples is not None:
        samples = reference_samples
        updates = interval(samples / share, samples / shares).scaled(1 / choice.batch)
        seconds = good.mapped(lambda value: samples / value)
    return Goodput(
        choice=choice,
        images_per_sec=interval(speed.value, rates, speed.draws is not None),
        statistical_efficiency=interval(share, shares),
        goodput=good,
        updates=updates,
        seconds=seconds,
        node_hours=None if seconds is None else seconds.scaled(choice.nodes / 3600),
        beyond=speed.beyond,
    )


def best(found: Sequence[Goodput], tolerance: float = 0.01) -> Goodput:
    """The choice with the most goodput; of those within ``tolerance`` of it, the one with the
    fewest nodes, ranks and the smallest batch. Raises UsageError if there is none."""
    if not found:
        raise UsageError("no choice of ranks whose speed is known")
    most = max(one.goodput.value for one in found)
    good = [one for one in found if one.goodput.value >= most * (1 - tolerance)]
    return min(good, key=lambda one: (one.choice.nodes, one.choice.ranks, one.choice.batch))


# Over a run


@dataclass(frozen=True)
class NoiseAt:
    """The noise scale from a point of a run on."""

    progress: float
    """Samples seen by then, counted in batches of the reference size; the first is 0."""
    noise: MeasuredNoise


@dataclass(frozen=True)
class Seen:
    """What a run's metrics say at one point."""

    samples: float
    """Seen by then."""
    batch: float
    """The global batch of the updates up to there."""
    noise_scale: float | None
    """None: no estimate."""


def noise_over_run(
    windows: Sequence[Seen], reference: float, stretches: int = 8
) -> tuple[list[NoiseAt], float]:
    """The noise scale over a run from its logging windows, and the progress at its end.

    Progress counts samples by what they are worth in batches of ``reference``
    (``statistical_efficiency``), so that the run's own growth does not matter. It is cut into as
    many stretches of equal progress; each has the median of its windows' estimates and, as its
    interval, where 95 % of them lie: estimates are running means, so they do not scatter
    independently of each other, and drift within a stretch counts too. Windows without an estimate
    take the one before (at first, the one after); stretches without a window are joined to the one
    before.

    Raises UsageError if no window has an estimate or they are out of order.
    """
    if not (isfinite(reference) and reference > 0) or not 1 <= stretches <= 10_000:
        raise UsageError(f"a reference of {reference!r} samples and {stretches!r} stretches")
    estimates = [one.noise_scale for one in windows if one.noise_scale is not None]
    if not estimates:
        raise UsageError(
            "no window has a noise scale; measuring it takes updates of two micro-batches or more"
        )
    progress, seen, scale = 0.0, 0.0, estimates[0]
    held: list[tuple[float, float]] = []
    for one in windows:
        scale = scale if one.noise_scale is None else one.noise_scale
        _check_window(one, seen, scale)
        progress += (one.samples - seen) * statistical_efficiency(one.batch, scale, reference)
        seen = one.samples
        held.append((progress, scale))
    parts: dict[int, list[float]] = {}
    for end, scale in held:
        part = ceil(end / progress * stretches * (1 - 1e-12)) - 1
        parts.setdefault(min(max(part, 0), stretches - 1), []).append(scale)
    starts = [0.0, *(progress * part / stretches for part in list(parts)[1:])]
    found = [
        NoiseAt(start, MeasuredNoise(*map(float, np.quantile(scales, [0.5, 0.025, 0.975]))))
        for start, scales in zip(starts, parts.values(), strict=True)
    ]
    return found, progress


def _check_window(window: Seen, seen: float, scale: float) -> None:
    MeasuredNoise(scale)
    if not (seen < window.samples <= 1e18 and 0 < window.batch <= 1e18):
        raise UsageError(
            f"a window at {window.samples!r} samples with a batch of {window.batch!r}, after one "
            f"at {seen:g}; samples rise from window to window and a batch has some"
        )


@dataclass(frozen=True)
class Step:
    """A stretch of a run with one choice."""

    progress: float
    """Where it begins, as ``NoiseAt`` counts."""
    choice: Choice
    noise_scale: float
    """Where it begins."""
    seconds: float
    """That it takes, without the restart before it."""


@dataclass(frozen=True)
class Growth:
    """Which ranks to take when."""

    steps: tuple[Step, ...]
    seconds: Interval
    """With restarts."""
    node_hours: Interval
    fixed: Choice
    """The best single choice for the whole run."""
    fixed_seconds: Interval
    fixed_node_hours: Interval
    beyond: float
    """The most ranks of its steps over the most that were measured."""


def recommended_growth(
    noise: Sequence[NoiseAt],
    end: float,
    asked: Sequence[Choice],
    speeds: Speeds,
    reference: float,
    *,
    restart_seconds: float = 0.0,
    node_hour_cost: float = 0.0,
    confidence: float = 0.95,
    seed: int = 0,
) -> Growth:
    """The ranks and accumulation for each stretch of a run that bring it to its end soonest.

    Between two points of ``noise`` the scale is the first one's. Accumulation may change freely, at
    each of them; a change of ranks takes ``restart_seconds``, in which the larger number of nodes
    is held. ``node_hour_cost``: seconds of waiting that a node-hour is worth; 0 asks for the least
    time whatever it costs. Dynamic programming over the stretches finds the least sum.

    The choices are the best by the values; the intervals of their seconds and node-hours hold what
    is uncertain of the speeds and of the noise scale.

    Raises UsageError for points out of order or without a choice whose speed is known.
    """
    points = _stretches(noise, end)
    check_confidence(confidence)
    known = [
        (one, speed) for one, speed in zip(asked, speeds(asked), strict=True) if speed is not None
    ]
    if not known:
        raise UsageError("no choice of ranks whose speed is known")
    table = _Table.of(points, [one for one, _ in known], reference)
    seconds = table.seconds(
        np.array([[one.noise.value] for one in noise]),
        np.array([speed.value for _, speed in known]),
    )
    price = 1 + table.nodes * node_hour_cost / 3600
    switch = table.changed * restart_seconds * (1 + table.held * node_hour_cost / 3600)
    path = _cheapest(seconds * price, switch)
    single = [int(np.argmin((seconds * price).sum(0)))] * len(path)

    def totals(chosen: list[int]) -> tuple[Interval, Interval]:
        """Seconds and node-hours of a way through."""
        return _totals(table, chosen, seconds, noise, known, restart_seconds, confidence, seed)

    taken = seconds[np.arange(len(path)), path]
    return Growth(
        _merged(noise, [known[index][0] for index in path], taken),
        *totals(path),
        known[single[0]][0],
        *totals(single),
        max(known[index][1].beyond for index in path),
    )


@dataclass(frozen=True)
class _Table:
    """Stretches of a run × choices."""

    lengths: Array
    """Of the stretches, shape (stretches, 1)."""
    batch: Array
    nodes: Array
    changed: npt.NDArray[np.bool_]
    """Whether the ranks change from one choice to another, shape (choices, choices)."""
    held: Array
    """Nodes that a restart between them holds."""
    reference: float

    @classmethod
    def of(
        cls, points: Sequence[tuple[float, float]], asked: Sequence[Choice], reference: float
    ) -> _Table:
        nodes = np.array([one.nodes for one in asked], dtype=np.float64)
        ranks = np.array([one.ranks for one in asked])
        return cls(
            lengths=np.array([[stop - start] for start, stop in points]),
            batch=np.array([one.batch for one in asked], dtype=np.float64),
            nodes=nodes,
            changed=ranks[:, None] != ranks,
            held=np.maximum(nodes[:, None], nodes),
            reference=reference,
        )

    def seconds(self, scales: Array, speeds: Array) -> Array:
        """Of each stretch with each choice; scales (…, stretches, 1), speeds (…, choices)."""
        work = self.lengths * (scales + self.batch) / (scales + self.reference)
        return np.asarray(work / speeds)


def _totals(
    table: _Table,
    path: list[int],
    seconds: Array,
    noise: Sequence[NoiseAt],
    known: Sequence[tuple[Choice, Speed]],
    restart_seconds: float,
    confidence: float,
    seed: int,
) -> tuple[Interval, Interval]:
    """Seconds and node-hours of one choice for each stretch, restarts with them."""
    rows = np.arange(len(path))
    restarts = [(a, b) for a, b in pairwise(path) if table.changed[a, b]]
    pause = restart_seconds * len(restarts)
    held = sum(restart_seconds * float(table.held[a, b]) for a, b in restarts)
    nodes = table.nodes[path]
    taken = seconds[rows, path]
    time = Interval(float(taken.sum()) + pause)
    hours = Interval((float((taken * nodes).sum()) + held) / 3600)
    draws = [speed.draws for _, speed in known]
    if draws[0] is None and all(one.noise.low is None for one in noise):
        return time, hours
    count = 1000 if draws[0] is None else len(draws[0])
    rng = np.random.default_rng(seed)
    scales = np.stack([one.noise.draws(rng, count) for one in noise], axis=1)
    rates = [known[index][1] for index in path]
    speeds = np.stack(
        [np.full(count, one.value) if one.draws is None else one.draws for one in rates], axis=1
    )
    batch, lengths = table.batch[path], table.lengths[:, 0]
    drawn = lengths * (scales + batch) / (scales + table.reference) / speeds
    return (
        of_draws(time.value, drawn.sum(1) + pause, confidence),
        of_draws(hours.value, ((drawn * nodes).sum(1) + held) / 3600, confidence),
    )


def _stretches(noise: Sequence[NoiseAt], end: float) -> list[tuple[float, float]]:
    """(start, stop) of each."""
    starts = [one.progress for one in noise]
    rising = all(a < b for a, b in pairwise([*starts, end]))
    if not starts or starts[0] != 0 or not rising or not isfinite(end):
        raise UsageError(
            "the noise scale over a run needs points at rising progress, the first at 0 and all "
            f"before its end, {end:g}; there are {starts[:8]}"
        )
    return list(pairwise([*starts, end]))


def _cheapest(costs: Array, switch: Array) -> list[int]:
    """The cheapest way through (stretches, choices) with the cost of going from one to another."""
    total, came = costs[0], []
    for row in costs[1:]:
        through = total[:, None] + switch
        came.append(through.argmin(0))
        total = through.min(0) + row
    path = [int(total.argmin())]
    for origin in reversed(came):
        path.append(int(origin[path[-1]]))
    return path[::-1]


def _merged(noise: Sequence[NoiseAt], chosen: Sequence[Choice], seconds: Array) -> tuple[Step, ...]:
    steps: list[Step] = []
    for at, choice, taken in zip(noise, chosen, seconds, strict=True):
        step = Step(at.progress, choice, at.noise.value, float(taken))
        if steps and steps[-1].choice == choice:
            step = replace(steps[-1], seconds=steps.pop().seconds + step.seconds)
        steps.append(step)
    return tuple(steps)
