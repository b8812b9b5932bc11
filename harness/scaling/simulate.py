"""Clusters that are not there: the time of an update as a distribution, for thousands of nodes.

Where ``steptime`` has the expected maximum of a jitter, here each rank of each update is drawn, so
that any distribution of stragglers can be asked about, and what the slowest of them does to an
update is there as quantiles, not as a mean alone.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from math import isfinite
from typing import Literal

import numpy as np

from harness.errors import UsageError
from harness.scaling.interval import Array
from harness.scaling.points import Point
from harness.scaling.steptime import Decomposition, StepTime, together

_AT_ONCE = 2_000_000  # draws that are in memory at a time: 16 MB
_MOST_DRAWS = 4_000_000_000


@dataclass(frozen=True)
class Stragglers:
    """How ranks differ in the time of a micro-batch, as factors on it with a mean of 1.

    Raises UsageError for numbers that cannot be.
    """

    kind: Literal["normal", "lognormal", "exponential", "gamma"] = "normal"
    """Of the jitter that each rank draws anew for each micro-batch. ``normal`` is cut off at 5 % of
    the time; ``exponential`` adds to a least time; ``gamma`` has a shape of 1 / spread²."""
    spread: float = 0.0
    """Standard deviation of the jitter."""
    uneven: float = 0.0
    """Standard deviation of the nodes' own speeds, drawn once (lognormal)."""
    stalls: float = 0.0
    """Chance that a rank stalls in a micro-batch."""
    stall_factor: float = 1.0
    """How many times as long it then takes; this is on top of the mean of 1."""

    def __post_init__(self) -> None:
        bounds = {"spread": 1.0, "uneven": 1.0, "stalls": 1.0, "stall_factor": 1e6}
        for name, most in bounds.items():
            value = getattr(self, name)
            if not (isfinite(value) and 0 <= value <= most):
                raise UsageError(
                    f"stragglers with {name} = {value!r}; valid are numbers from 0 to {most:g}"
                )
        if self.kind not in _JITTER:
            raise UsageError(f"stragglers of kind {self.kind!r}; valid are {', '.join(_JITTER)}")

    def factors(self, rng: np.random.Generator, shape: tuple[int, ...]) -> Array:
        """Draws for so many micro-batches."""
        drawn = _JITTER[self.kind](rng, self.spread, shape) if self.spread else np.ones(shape)
        if self.stalls and self.stall_factor != 1:
            drawn = np.where(rng.random(shape) < self.stalls, drawn * self.stall_factor, drawn)
        return drawn


def _normal(rng: np.random.Generator, spread: float, shape: tuple[int, ...]) -> Array:
    return np.asarray(np.maximum(0.05, 1 + spread * rng.standard_normal(shape)))


def _lognormal(rng: np.random.Generator, spread: float, shape: tuple[int, ...]) -> Array:
    variance = np.log1p(spread**2)
    return np.asarray(np.exp(np.sqrt(variance) * rng.standard_normal(shape) - variance / 2))


def _exponential(rng: np.random.Generator, spread: float, shape: tuple[int, ...]) -> Array:
    return np.asarray(1 - spread + spread * rng.standard_exponential(shape))


def _gamma(rng: np.random.Generator, spread: float, shape: tuple[int, ...]) -> Array:
    spread = max(spread, 1e-6)  # the shape shall not overflow
    return np.asarray(rng.standard_gamma(spread**-2.0, shape) * spread**2)


_JITTER = {
    "normal": _normal,
    "lognormal": _lognormal,
    "exponential": _exponential,
    "gamma": _gamma,
}


@dataclass(frozen=True)
class Simulated:
    """Updates of a simulated cluster."""

    ranks: int
    nodes: int
    images_per_update: float
    accumulation: int
    seconds: Array
    """Of each update, shape (updates,)."""
    alone: float
    """Mean seconds of an update of one rank with the same images per rank, which waits for none."""

    @property
    def images_per_sec(self) -> float:
        """Over the whole time."""
        return float(self.images_per_update / self.seconds.mean())

    @property
    def efficiency(self) -> float:
        """Throughput over ranks × that of one rank."""
        return float(self.alone / self.seconds.mean())

    def quantiles(self, *shares: float) -> Array:
        """Of the time of an update, seconds."""
        return np.asarray(np.quantile(self.seconds, shares))

    def throughputs(self) -> Array:
        """Images per second of each update by itself, shape (updates,)."""
        return np.asarray(self.images_per_update / self.seconds)

    def efficiencies(self) -> Array:
        """Of each update by itself, shape (updates,)."""
        return np.asarray(self.alone / self.seconds)


def simulate(
    model: StepTime,
    *,
    nodes: int,
    ranks_per_node: int,
    images_per_rank: float,
    accumulation: int = 1,
    stragglers: Stragglers = Stragglers(),
    network_spread: float = 0.0,
    updates: int = 200,
    seed: int = 0,
) -> Simulated:
    """Draw updates of a cluster.

    A rank's time is the sum over its micro-batches of what each takes; all wait for the slowest
    rank; the network comes on top as in ``steptime``, overlapped with the last micro-batch.

    Args:
        model: compute, links and overlap, plain numbers; its own ``jitter`` is not used, as
            ``stragglers`` takes its place.
        images_per_rank: in an update, over all its micro-batches.
        network_spread: standard deviation of the time of the communication, lognormal, drawn for
            each node and update; a ring takes as long as its slowest link.

    Equal seeds give equal draws. Raises UsageError for sizes that cannot be.
    """
    ranks = nodes * ranks_per_node
    _check_sizes(nodes, ranks_per_node, accumulation, updates, network_spread)
    checked = Point(ranks, nodes, images_per_rank * ranks, (1.0,), accumulation)
    rng = np.random.default_rng(seed)
    quiet = replace(model, jitter=0.0)
    parts = quiet.parts(Decomposition.of(ranks, nodes, checked.images_per_update, accumulation))
    own = np.ones(nodes)
    if stragglers.uneven:
        own = _lognormal(rng, stragglers.uneven, (nodes,))
    slowest = np.concatenate(
        list(_slowest(rng, stragglers, own, ranks_per_node, accumulation, updates))
    )
    compute = parts.compute[0] * slowest
    last = compute / accumulation
    network = parts.communication[0] * _slowest_link(rng, network_spread, nodes, updates)
    stalled = 1 + stragglers.stalls * (stragglers.stall_factor - 1)
    return Simulated(
        ranks=ranks,
        nodes=nodes,
        images_per_update=checked.images_per_update,
        accumulation=accumulation,
        seconds=np.asarray(compute - last + together(last, network, model.gamma)),
        alone=float(parts.compute[0]) * stalled,
    )


def _check_sizes(
    nodes: int, ranks_per_node: int, accumulation: int, updates: int, network_spread: float
) -> None:
    sizes = {
        "nodes": nodes,
        "ranks_per_node": ranks_per_node,
        "accumulation": accumulation,
        "updates": updates,
    }
    for name, value in sizes.items():
        if not 1 <= value <= 1_000_000:
            raise UsageError(f"{name} is {value!r}; a simulation takes 1 to 1000000")
    draws = nodes * ranks_per_node * accumulation * updates
    if draws > _MOST_DRAWS:
        raise UsageError(
            f"{nodes} × {ranks_per_node} ranks × {accumulation} micro-batches × {updates} updates "
            f"are {draws:.2g} draws; {_MOST_DRAWS:.2g} are the most: simulate fewer updates"
        )
    if not (isfinite(network_spread) and 0 <= network_spread <= 1):
        raise UsageError(f"network_spread is {network_spread!r}; valid are numbers from 0 to 1")


def _slowest(
    rng: np.random.Generator,
    stragglers: Stragglers,
    own: Array,
    width: int,
    accumulation: int,
    updates: int,
) -> Iterator[Array]:
    """The slowest rank's factor on the mean time of an update, a few updates at a time."""
    if not stragglers.spread and not stragglers.stalls:
        yield np.full(updates, own.max())
        return
    ranks = len(own) * width
    rows = max(1, min(updates, _AT_ONCE // ranks))
    for start in range(0, updates, rows):
        shape = (min(rows, updates - start), len(own), width)
        total = np.zeros(shape)
        for _ in range(accumulation):
            total += stragglers.factors(rng, shape)
        yield np.asarray((total.max(2) * own).max(1) / accumulation)


def _slowest_link(rng: np.random.Generator, spread: float, nodes: int, updates: int) -> Array:
    if not spread or nodes == 1:
        return np.ones(updates)
    rows = max(1, _AT_ONCE // nodes)
    return np.concatenate([
        _lognormal(rng, spread, (min(rows, updates - start), nodes)).max(1)
        for start in range(0, updates, rows)
    ])  # fmt: skip
