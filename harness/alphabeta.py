"""Latency and inverse bandwidth of a collective, from the times of its rounds.

A message of m bytes takes T(m) = α + β m (Hockney 1994; of an allreduce by a ring α and β hold what
its steps add up to: Thakur, Rabenseifner, Gropp 2005). Messages up to some size may go by another
protocol than longer ones, eagerly instead of by appointment, or stay in a cache, so α and β may be
two for each operation.

What is fitted are the medians of the sizes' rounds, which it takes half of the rounds to spoil, by
relative residuals: times lie decades apart. The weights are Huber's (1964), then Tukey's, which
leave out a size that was disturbed as a whole (Beaton and Tukey 1974). The intervals are a
bootstrap's over rounds (Efron 1979). Where the medians lie further from the line than their rounds'
spread explains, intervals are widened by the ratio of the two (Birge 1932).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float64]
Rounds = Mapping[int, Sequence[float]]
"""Bytes of the message -> seconds of each round."""

CONFIDENCE = 0.95
RESAMPLES = 1000
LEAST_SIZES = 3
"""Sizes of messages that a line needs: two would fit any."""
_HUBER, _TUKEY = 1.345, 4.685
"""Standard errors; each gives 95 % of least squares' efficiency where noise is normal."""
_ITERATIONS = 15
"""With each of the two."""
_WORST = 4.0
"""Standard errors that a size counts as at most, if it is further off."""
_FLOOR = 0.01
"""Relative; no median is taken to be known better."""
_STRAIGHT = 0.05
"""Relative; departures from a line that are not worth a second one."""
_CLEARLY = 6.0
"""F ratio from which two lines are clearly better than one. The break between them was searched
for, so it lies above the tabled ones, which are 4 to 5 here."""


@dataclass(frozen=True)
class Interval:
    """An estimate and the ends of its interval at ``CONFIDENCE``."""

    value: float
    low: float
    high: float

    def as_list(self) -> list[float]:
        return [self.value, self.low, self.high]


@dataclass(frozen=True)
class Piece:
    """T = α + β m over a range of sizes."""

    smallest: int
    largest: int
    """Bytes, of the messages that it was fitted to."""
    alpha: Interval
    """Seconds."""
    beta: Interval
    """Seconds per byte."""


class Range(Protocol):
    """Sizes of messages, in bytes, for which something was found."""

    @property
    def smallest(self) -> int: ...

    @property
    def largest(self) -> int: ...


def piece_at(pieces: Sequence[Range], size: float) -> int:
    """Which of one or two pieces, by rising sizes, a message is in. Where the protocol changes
    between two sizes is not known: halfway on a log scale."""
    if len(pieces) == 1:
        return 0
    return int(size > math.sqrt(pieces[0].largest * pieces[1].smallest))


@dataclass(frozen=True)
class Fit:
    """The lines of one operation."""

    pieces: tuple[Piece, ...]
    """One or two, by size."""
    misfit: float
    """How many times further from the lines the medians lie than their rounds explain; at least
    1."""
    _lines: Array
    """(1 + resamples) × pieces × 2: the estimate of (α, β) first."""

    def seconds(self, size: float) -> Array:
        """T of a message of ``size`` bytes: the estimate, then one for each resample."""
        lines = self._lines[:, piece_at(self.pieces, size), :]
        times = lines[:, 0] + lines[:, 1] * size
        return np.asarray(np.maximum(times[0] + self.misfit * (times - times[0]), 1e-12))


def resampled_medians(rounds: Rounds, seed: int = 0) -> Array:
    """(1 + RESAMPLES) × sizes: the medians, then those of resampled rounds.

    Two operations with equally many rounds of a size get the same rounds with the same seed, so
    that what disturbed both in a round does so in their ratio too.
    """
    columns = []
    for index, size in enumerate(sorted(rounds)):
        seconds = np.asarray(rounds[size], dtype=np.float64)
        chosen = np.random.default_rng([seed, index]).integers(
            len(seconds), size=(RESAMPLES, len(seconds))
        )
        middle = np.median(seconds)
        # Resamples of n rounds spread by a factor of √((n − 1)/n) too little.
        widening = math.sqrt(len(seconds) / max(len(seconds) - 1, 1))
        drawn = middle * (np.median(seconds[chosen], axis=1) / middle) ** widening
        columns.append(np.concatenate([[middle], drawn]))
    return np.stack(columns, axis=1)


def interval(draws: Array, confidence: float = CONFIDENCE) -> Interval:
    """The estimate (first) and the percentiles of the resamples (the rest)."""
    tail = (1 - confidence) / 2
    # An infinite draw stands for "never": between it and others is nothing to interpolate.
    low, high = np.quantile(draws[1:], [tail, 1 - tail], method="nearest")
    return Interval(float(draws[0]), float(min(low, draws[0])), float(max(high, draws[0])))


def fit(rounds: Rounds, seed: int = 0) -> Fit:
    """Fit one line, or two where small and large messages clearly differ.

    Raises ValueError with fewer than ``LEAST_SIZES`` sizes, a size without rounds, or seconds that
    are not above 0.
    """
    if len(rounds) < LEAST_SIZES:
        raise ValueError(f"{len(rounds)} sizes of messages; at least {LEAST_SIZES} are needed")
    if not all(len(seconds) and min(seconds) > 0 for seconds in rounds.values()):
        raise ValueError("each size needs rounds, of more than 0 seconds")
    sizes = np.array(sorted(rounds), dtype=np.float64)
    medians = resampled_medians(rounds, seed)
    spread = np.maximum(np.log(medians[1:]).std(axis=0), _FLOOR)
    parts = _parts(sizes, medians[0], spread)
    lines = np.stack([_lines(sizes[p], medians[:, p], spread[p]) for p in parts], axis=1)
    estimate = np.concatenate(
        [_predicted(lines[:1, i], sizes[part])[0] for i, part in enumerate(parts)]
    )
    freedom = len(sizes) - 2 * len(parts)
    excess = _cost((medians[0] / estimate - 1) / spread) / max(freedom, 1)
    misfit = math.sqrt(max(1.0, excess))
    pieces = tuple(
        Piece(
            int(sizes[part][0]),
            int(sizes[part][-1]),
            _widened(lines[:, index, 0], misfit),
            _widened(lines[:, index, 1], misfit),
        )
        for index, part in enumerate(parts)
    )
    return Fit(pieces, misfit, lines)


def _widened(draws: Array, misfit: float) -> Interval:
    spread = np.maximum(draws[0] + misfit * (draws - draws[0]), 0.0)
    return interval(spread)


def _parts(sizes: Array, medians: Array, spread: Array) -> list[slice]:
    """All sizes, or the two ranges of them that lines of their own fit clearly better."""
    tolerant = np.hypot(spread, _STRAIGHT)

    def cost(part: slice) -> float:
        line = _lines(sizes[part], medians[None, part], tolerant[part])
        fitted = _predicted(line, sizes[part])[0]
        return _cost((medians[part] / fitted - 1) / tolerant[part])

    whole = slice(0, len(sizes))
    splits = [
        (slice(0, k), slice(k, len(sizes)))
        for k in range(LEAST_SIZES, len(sizes) - LEAST_SIZES + 1)
    ]
    if not splits:
        return [whole]
    costs = [sum(map(cost, split)) for split in splits]
    best = int(np.argmin(costs))
    # Two lines and the break between them are three numbers more than one line.
    freedom = len(sizes) - 5
    scale = max(1.0, costs[best] / freedom)
    return list(splits[best]) if (cost(whole) - costs[best]) / 3 > _CLEARLY * scale else [whole]


def _lines(sizes: Array, times: Array, spread: Array) -> Array:
    """(α, β) ≥ 0 of each row of times, by reweighted least squares: rows × 2.

    Args:
        sizes: bytes, n.
        times: seconds, rows × n.
        spread: relative standard errors of the times, n.
    """
    fitted = times
    weights = np.ones_like(times)
    lines = np.zeros((len(times), 2))
    for iteration in range(2 * _ITERATIONS):
        lines = _solved(sizes, times, weights / (fitted * spread) ** 2)
        fitted = np.maximum(_predicted(lines, sizes), times * 1e-3)
        off = np.abs((times / fitted - 1) / spread)
        scale = np.maximum(1.0, 1.4826 * np.median(off, axis=1, keepdims=True))
        if iteration < _ITERATIONS:
            weights = np.minimum(1.0, _HUBER * scale / np.maximum(off, 1e-12))
        else:
            weights = np.maximum(1 - (off / (_TUKEY * scale)) ** 2, 1e-3) ** 2
    return lines


def _solved(sizes: Array, times: Array, weights: Array) -> Array:
    """Weighted least squares of each row, with α and β not below 0."""
    weights = weights / weights.sum(axis=1, keepdims=True)
    size, time = (weights * sizes).sum(1), (weights * times).sum(1)
    off = sizes - size[:, None]
    spread = (weights * off**2).sum(1)
    # One size may have all of the weight: that tells nothing of a slope.
    told = spread > 1e-12 * float(sizes.max()) ** 2
    beta = np.where(told, (weights * off * times).sum(1) / np.where(told, spread, 1.0), 0.0)
    beta = np.maximum(beta, 0.0)
    alpha = time - beta * size
    through_zero = (weights * sizes * times).sum(1) / (weights * sizes**2).sum(1)
    beta = np.where(alpha < 0, through_zero, beta)
    return np.stack([np.maximum(alpha, 0.0), beta], axis=1)


def _predicted(lines: Array, sizes: Array) -> Array:
    """Seconds, rows × sizes."""
    return np.asarray(lines[:, :1] + lines[:, 1:] * sizes)


def _cost(off: Array) -> float:
    """Sum of squares of standardised residuals. One that is far off is a disturbance, and no reason
    for another line."""
    return float(np.minimum(off**2, _WORST**2).sum())
