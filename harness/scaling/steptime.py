"""The time of an update as a formula: T = (T_compute^γ + T_comm^γ)^{1/γ}.

    T_compute = (fixed + per_image · m) · (1 + jitter · z(n))       m images per rank, n ranks
    T_comm    = inside a node + between nodes, for k buckets with G bytes in all:
                2(w − 1)·k·α_in + 2(w − 1)/w·G·β_in                 w ranks on each node
              + 2(N − 1)·k·α_out + 2(N − 1)/N·G·β_out               N nodes

γ = 1 adds the two, γ → ∞ hides the smaller one under the larger (Qiao et al. 2021, Pollux, equation
10). The α–β terms are those of a ring, reduce-scatter and allgather, for each bucket (Thakur,
Rabenseifner and Gropp 2005; Patarasuk and Yuan 2009); two levels, as a hierarchical allreduce has
them. A flat ring (``topology="ring"``) has the one term of n ranks with the links between nodes, as
the slowest link sets its pace. z(n) is the expected maximum of n standard normal variables: all
wait for the slowest rank.

With a micro-batches per update the gradients travel during the last one only:
T = T_compute·(1 − 1/a) + ((T_compute/a)^γ + T_comm^γ)^{1/γ}.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import ceil, isfinite
from typing import Literal

import numpy as np
import numpy.typing as npt

from harness.errors import UsageError
from harness.scaling.interval import Array
from harness.scaling.points import Point

Topology = Literal["two-level", "ring"]
Values = float | Array

_HALF_WIDTH, _PIECES = 9.0, 180
# Simpson's rule over [0, 9], beyond which no maximum of 10^7 normal variables lies.


@dataclass(frozen=True)
class Wire:
    """What an update's gradients are on the wire."""

    gradient_bytes: float
    """Of one update, per rank."""
    bucket_bytes: float | None = None
    """Gradients travel in buckets of so many bytes; None: in one."""

    def __post_init__(self) -> None:
        if not (isfinite(self.gradient_bytes) and 0 <= self.gradient_bytes <= 1e18):
            raise UsageError(
                f"gradient_bytes is {self.gradient_bytes!r}; valid are numbers from 0 to 1e18"
            )
        size = self.bucket_bytes
        if size is not None and not (isfinite(size) and 1 <= size <= 1e18):
            raise UsageError(f"bucket_bytes is {size!r}; valid are numbers from 1 to 1e18, or None")

    @property
    def buckets(self) -> int:
        if self.bucket_bytes is None:
            return 1
        return max(1, min(10**9, ceil(self.gradient_bytes / self.bucket_bytes)))


@dataclass(frozen=True)
class Link:
    """α and β of a network; floats, or arrays of an ensemble."""

    latency: Values
    """Seconds that each message takes whatever its size."""
    seconds_per_byte: Values


IDEAL = Link(0.0, 0.0)


@dataclass(frozen=True)
class StepTime:
    """The coefficients of the formula; floats, or arrays that broadcast against decompositions."""

    per_image: Values
    """Seconds."""
    fixed: Values = 0.0
    """Seconds of an update that do not depend on its images."""
    jitter: Values = 0.0
    """Standard deviation of a rank's compute time between updates, as a share of it."""
    gamma: Values = 1.0
    within: Link = IDEAL
    between: Link = IDEAL
    wire: Wire = Wire(0.0)
    topology: Topology = "two-level"

    def parts(self, where: Decomposition) -> Parts:
        """The time of an update and where it goes, seconds, for each decomposition."""
        alone = self.fixed + self.per_image * where.images_per_rank
        compute = alone * (1 + self.jitter * where.slowest)
        comm = self._communication(where)
        last = compute / where.accumulation
        seconds = compute - last + together(last, comm, self.gamma)
        return Parts(
            compute=np.asarray(alone),
            straggling=np.asarray(compute - alone),
            communication=np.asarray(comm),
            exposed=np.asarray(seconds - compute),
            seconds=np.asarray(seconds),
        )

    def seconds(self, where: Decomposition) -> Array:
        """Of an update, for each decomposition."""
        return self.parts(where).seconds

    def _communication(self, where: Decomposition) -> Values:
        if self.topology == "ring":
            outside = where.nodes > 1
            link = Link(
                np.where(outside, self.between.latency, self.within.latency),
                np.where(outside, self.between.seconds_per_byte, self.within.seconds_per_byte),
            )
            return self._ring(link, where.ranks)
        inside = self._ring(self.within, where.ranks / where.nodes)
        return inside + self._ring(self.between, where.nodes)

    def _ring(self, link: Link, members: Array) -> Values:
        """Seconds of an allreduce over a ring of so many."""
        steps = 2 * (members - 1)
        messages = link.latency * (steps * self.wire.buckets)
        return messages + link.seconds_per_byte * (steps / members * self.wire.gradient_bytes)


@dataclass(frozen=True)
class Parts:
    """Seconds of an update; the first two and ``exposed`` add up to ``seconds``."""

    compute: Array
    """Of a rank that is neither slow nor fast."""
    straggling: Array
    """Waiting for the slowest rank."""
    communication: Array
    """Of which part is hidden under compute."""
    exposed: Array
    """What communication adds to the update."""
    seconds: Array


@dataclass(frozen=True)
class Decomposition:
    """How updates are spread; arrays of shape (decompositions,)."""

    ranks: Array
    nodes: Array
    images_per_update: Array
    accumulation: Array
    slowest: Array
    """z(ranks)."""

    @classmethod
    def of(
        cls,
        ranks: npt.ArrayLike,
        nodes: npt.ArrayLike,
        images_per_update: npt.ArrayLike,
        accumulation: npt.ArrayLike = 1,
    ) -> Decomposition:
        columns = (ranks, nodes, images_per_update, accumulation)
        table = np.broadcast_arrays(
            *(np.atleast_1d(np.asarray(column, dtype=np.float64)) for column in columns)
        )
        return cls(table[0], table[1], table[2], table[3], expected_maximum(table[0]))

    @classmethod
    def of_points(cls, points: Sequence[Point]) -> Decomposition:
        return cls.of(
            [point.ranks for point in points],
            [point.nodes for point in points],
            [point.images_per_update for point in points],
            [point.accumulation for point in points],
        )

    @property
    def images_per_rank(self) -> Array:
        return np.asarray(self.images_per_update / self.ranks)


def together(first: Values, second: Values, gamma: Values) -> Values:
    """(first^γ + second^γ)^{1/γ} for values of at least 0, without overflow."""
    large, small = np.maximum(first, second), np.minimum(first, second)
    with np.errstate(divide="ignore", invalid="ignore", under="ignore"):
        ratio = np.where(large > 0, small / large, 0.0)
        # γ = ∞ leaves the larger; log1p keeps what a small ratio adds.
        added = np.where(np.isinf(gamma), 0.0, np.log1p(ratio**gamma) / gamma)
        return np.asarray(large * np.exp(added))


def expected_maximum(count: npt.ArrayLike) -> Array:
    """The expected maximum of so many independent standard normal variables; 0 for one.

    E = ∫₀^∞ 1 − Φ(x)^n − (1 − Φ(x))^n dx, by Simpson's rule.
    """
    counts = np.atleast_1d(np.asarray(count, dtype=np.float64))
    unique, places = np.unique(counts, return_inverse=True)
    values = np.empty_like(unique)
    for start in range(0, len(unique), 1024):  # a table of 1024 × 181 at a time
        n = unique[start : start + 1024, None]
        with np.errstate(under="ignore"):
            values[start : start + 1024] = (
                -np.expm1(n * _LOG_BELOW) - np.exp(n * _LOG_ABOVE)
            ) @ _SIMPSON
    values[unique == 1] = 0.0  # but for rounding
    return np.asarray(values[places].reshape(counts.shape))


def _tables() -> tuple[Array, Array, Array]:
    """log Φ(x), log(1 − Φ(x)) and the weights of Simpson's rule."""
    from math import erfc, log, log1p, sqrt

    step = _HALF_WIDTH / _PIECES
    above = [erfc(step * i / sqrt(2)) / 2 for i in range(_PIECES + 1)]
    weights = [1.0, *([4.0, 2.0] * (_PIECES // 2))]
    weights[-1] = 1.0
    return (
        np.array([log1p(-share) for share in above]),
        np.array([log(share) for share in above]),
        np.array(weights) * step / 3,
    )


_LOG_BELOW, _LOG_ABOVE, _SIMPSON = _tables()
