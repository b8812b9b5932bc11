"""What is supposed of the step-time model's coefficients before anything is measured.

Few rank counts cannot tell latency, bandwidth, jitter and overlap apart: all make an update longer
with more ranks. So each coefficient has a prior, wide enough to let any measurement speak; where
the measurements say nothing, the interval of a prediction is as wide as the prior makes it. All are
relative to the time of an update with the fewest ranks, so units do not matter.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import isfinite, log

import numpy as np

from harness.errors import UsageError
from harness.scaling.interval import Array
from harness.scaling.points import Point
from harness.scaling.steptime import Link, StepTime, Topology, Wire

NAMES = (
    "per_image",
    "fixed",
    "jitter",
    "overlap",
    "within.latency",
    "within.seconds_per_byte",
    "between.latency",
    "between.seconds_per_byte",
)
"""Of the coefficients, in the order of a parameter vector. All but ``overlap`` are there as their
logarithm; ``overlap`` is log(h/(1 − h)) of h = 1/γ, 0 < h < 1."""

UNITS = ("s", "s", "share", "γ", "s", "s/byte", "s", "s/byte")

_REACH = 4.0
"""Bounds of a fit, in standard deviations of the prior."""


@dataclass(frozen=True)
class KnownLink:
    """What a probe says of a network; None: nothing."""

    latency: float | None = None
    """α: seconds of a message, whatever its size."""
    seconds_per_byte: float | None = None
    """β: 1 / bandwidth."""
    factor: float = 1.5
    """How far off it may be: one standard deviation, as a factor. A probe has the network for
    itself; a run shares it with the loaders and its own compute."""

    def __post_init__(self) -> None:
        for name in ("latency", "seconds_per_byte"):
            value = getattr(self, name)
            if value is not None and not (isfinite(value) and 1e-15 <= value <= 1e3):
                raise UsageError(
                    f"a link with {name} = {value!r}; valid are seconds from 1e-15 to 1000"
                )
        if not (isfinite(self.factor) and 1.001 <= self.factor <= 1000):
            raise UsageError(
                f"a link known within a factor of {self.factor!r}; valid are 1.001 to 1000"
            )


UNKNOWN = KnownLink()


@dataclass(frozen=True)
class Prior:
    """Independent normal distributions of the parameters (``NAMES``), and bounds."""

    centre: Array
    deviation: Array
    given: tuple[bool, ...]
    """Which come from a probe."""

    @property
    def low(self) -> Array:
        return self.centre - _REACH * self.deviation

    @property
    def high(self) -> Array:
        return self.centre + _REACH * self.deviation


def prior_of(points: Sequence[Point], wire: Wire, within: KnownLink, between: KnownLink) -> Prior:
    """The prior that goes with these points; they are sorted by ranks."""
    first = points[0]
    scale = first.log_seconds.mean  # log of an update's seconds
    shortest = min(point.log_seconds.mean for point in points)
    rows = [
        (scale - log(first.images_per_rank), 3.0, False),
        (shortest + log(0.03), 1.5, False),
        (log(0.02), 1.0, False),
        (0.0, 1.5, False),
        *_link_rows(within, wire, scale, 0.001, 0.03),
        *_link_rows(between, wire, scale, 0.003, 0.1),
    ]
    centre, deviation, given = zip(*rows, strict=True)
    return Prior(np.array(centre), np.array(deviation), given)


def _link_rows(
    link: KnownLink, wire: Wire, scale: float, latency: float, transfer: float
) -> list[tuple[float, float, bool]]:
    """(centre, deviation, given) of α and β. Not given: of an update's time, a message to all
    buckets takes the share ``latency``, the transfer of all bytes once ``transfer``."""
    rows = [
        (scale + log(latency / wire.buckets), 2.0, False),
        (scale + log(transfer / max(1.0, wire.gradient_bytes)), 2.5, False),
    ]
    for index, value in enumerate((link.latency, link.seconds_per_byte)):
        if value is not None:
            rows[index] = (log(value), log(link.factor), True)
    return rows


def step_time(theta: Array, wire: Wire, topology: Topology) -> StepTime:
    """The formula with parameters of shape (8,), or of (ensemble, 8) to go with decompositions of
    shape (decompositions,)."""
    columns = np.moveaxis(theta, -1, 0)[..., None]
    with np.errstate(under="ignore"):
        values = np.exp(columns)
    return StepTime(
        per_image=values[0],
        fixed=values[1],
        jitter=values[2],
        gamma=1 + np.exp(-columns[3]),
        within=Link(values[4], values[5]),
        between=Link(values[6], values[7]),
        wire=wire,
        topology=topology,
    )


def natural(theta: Array) -> Array:
    """Parameters as coefficients, in ``UNITS``; the last axis is that of ``NAMES``."""
    values = np.exp(theta)
    values[..., 3] = 1 + np.exp(-theta[..., 3])
    return values
