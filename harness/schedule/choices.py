"""Ranks × accumulation that could be run, how long updates take, what their batch is worth.

The time of an update is the formula of ``harness.scaling.steptime``, which explains it and fits it,
for plain numbers: this needs no numpy, as planning does without.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from math import erfc, exp, expm1, inf, log, log1p, sqrt
from typing import Literal

from harness.errors import UsageError

_MOST_STEPS = 1 << 16


def statistical_efficiency(batch: float, noise_scale: float, reference: float) -> float:
    """Progress per sample with a batch, over that with the reference batch:
    (φ + reference) / (φ + batch), φ the gradient noise scale (McCandlish et al. 2018, equation
    2.12). All in samples; 1 at the reference, and everywhere without an end of the noise."""
    if noise_scale == inf:
        return 1.0
    return (noise_scale + reference) / (noise_scale + batch)


def nodes_of(ranks: int, per_node: int | None) -> int:
    """Nodes that so many ranks take; None: one node holds them all."""
    return -(-ranks // (per_node or ranks))


@dataclass(frozen=True)
class Choice:
    """Ranks and accumulation that could be run."""

    ranks: int
    nodes: int
    accumulation: int
    micro_batch: int

    @property
    def batch(self) -> int:
        """Samples of an update."""
        return self.ranks * self.accumulation * self.micro_batch


def choices(
    ranks: Sequence[int],
    micro_batch: int,
    *,
    most_accumulation: int = 1,
    largest_batch: int | None = None,
    ranks_per_node: int | None = None,
) -> tuple[Choice, ...]:
    """Every combination of these ranks with accumulations of 1, 2, 3, … , by rising ranks.

    Past 16 accumulations only the powers of 2 and those halfway between are taken: a batch that is
    a few percent larger is no choice of its own. Raises UsageError if there is none.
    """
    if micro_batch < 1 or any(count < 1 for count in ranks) or most_accumulation < 1:
        raise UsageError("ranks, micro-batch and accumulation are whole numbers from 1 on")
    found = tuple(
        Choice(count, nodes_of(count, ranks_per_node), step, micro_batch)
        for count in sorted(set(ranks))
        for step in _steps(most_accumulation)
        if largest_batch is None or count * step * micro_batch <= largest_batch
    )
    if not found:
        raise UsageError(
            f"no choice of ranks: {min(ranks, default=0)} ranks with micro-batches of "
            f"{micro_batch} already take more than the largest batch, {largest_batch}"
        )
    return found


def rank_counts(start: int, most: int, per_node: int | None = None) -> tuple[int, ...]:
    """Numbers of ranks worth a choice of their own: 1, 2, 3, 4, 6, 8, 12, … times ``start`` and, as
    the last, ``most``; past one node whole nodes only, ``most`` apart."""
    counts = {start * k for k in _doublings(most // start)} | {most}
    whole = {one for one in counts if not per_node or one <= per_node or one % per_node == 0}
    return tuple(sorted(whole | {start, most}))


def _steps(most: int) -> Iterator[int]:
    yield from range(1, min(most, 16) + 1)
    yield from (step for step in _doublings(most) if step > 16)


def _doublings(most: int) -> Iterator[int]:
    """1, 2, 3, 4, 6, 8, 12, …: the powers of 2 and what lies halfway between."""
    step = 1
    while step <= min(most, _MOST_STEPS):
        yield step
        if step > 1 and step + step // 2 <= min(most, _MOST_STEPS):
            yield step + step // 2
        step *= 2


@dataclass(frozen=True, kw_only=True)
class UpdateTime:
    """The coefficients of the formula, in seconds, bytes and images."""

    per_image: float
    fixed: float = 0.0
    jitter: float = 0.0
    gamma: float = 1.0
    within_latency: float = 0.0
    within_seconds_per_byte: float = 0.0
    between_latency: float = 0.0
    between_seconds_per_byte: float = 0.0
    gradient_bytes: float = 0.0
    buckets: int = 1
    topology: Literal["two-level", "ring"] = "two-level"
    ranks_per_node: int | None = None

    def seconds(self, ranks: int, accumulation: int, micro_batch: int) -> float:
        """Of an update, on nodes that are filled one after the other."""
        alone = self.fixed + self.per_image * accumulation * micro_batch
        compute = alone * (1 + self.jitter * expected_maximum(ranks))
        last = compute / accumulation
        return compute - last + _together(last, self._communication(ranks), self.gamma)

    def images_per_sec(self, ranks: int, accumulation: int, micro_batch: int) -> float:
        """Of all ranks together, each of which has the same."""
        images = ranks * accumulation * micro_batch
        return images / self.seconds(ranks, accumulation, micro_batch)

    def _communication(self, ranks: int) -> float:
        nodes = nodes_of(ranks, self.ranks_per_node)
        within = (self.within_latency, self.within_seconds_per_byte)
        between = (self.between_latency, self.between_seconds_per_byte)
        if self.topology == "ring":
            return self._ring(*(between if nodes > 1 else within), ranks)
        return self._ring(*within, ranks / nodes) + self._ring(*between, nodes)

    def _ring(self, latency: float, per_byte: float, members: float) -> float:
        steps = 2 * (members - 1)
        return latency * steps * self.buckets + per_byte * steps / members * self.gradient_bytes


def _together(first: float, second: float, gamma: float) -> float:
    """(first^γ + second^γ)^{1/γ} for values of at least 0, without overflow."""
    large, small = max(first, second), min(first, second)
    ratio = small / large if large else 0.0
    if not ratio:
        return large
    return large * exp(log1p(exp(gamma * log(ratio))) / gamma)


@cache
def expected_maximum(count: int) -> float:
    """The expected maximum of so many independent standard normal variables; 0 for one.

    E = ∫₀^∞ 1 − Φ(x)^n − (1 − Φ(x))^n dx, by Simpson's rule.
    """
    if count == 1:
        return 0.0
    total = 0.0
    for index in range(_PIECES + 1):
        above = erfc(_WIDTH * index / _PIECES / sqrt(2)) / 2
        inside = -expm1(count * log1p(-above)) - exp(count * log(above))
        total += inside * (1 if index in (0, _PIECES) else 4 if index % 2 else 2)
    return total * _WIDTH / _PIECES / 3


_WIDTH, _PIECES = 9.0, 180  # beyond 9 no maximum of 10^7 normal variables lies
