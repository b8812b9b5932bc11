"""What was measured: points with their repeats, as plain numbers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from math import isclose, isfinite
from typing import Literal

from harness.errors import UsageError
from harness.scaling.interval import Interval, LogMean, check_confidence
from harness.schedule.choices import nodes_of
from harness.schedule.costs import Throughput

Mode = Literal["weak", "strong"]
"""weak: each rank has the same images in an update whatever the ranks; strong: all together do."""

_MOST_RANKS = 10**7
_SHORTEST, _LONGEST = 1e-9, 1e9  # seconds of an update


@dataclass(frozen=True)
class Point:
    """One decomposition and how long its updates took.

    Raises UsageError for numbers that cannot be.
    """

    ranks: int
    nodes: int
    images_per_update: float
    """Of all ranks together."""
    seconds: tuple[float, ...]
    """Mean seconds of an update, one value for each repeat."""
    accumulation: int = 1

    def __post_init__(self) -> None:
        where = f"the point of {self.ranks!r} ranks"
        _whole(self.ranks, _MOST_RANKS, "ranks", where)
        _whole(self.nodes, self.ranks, "nodes", where)
        _whole(self.accumulation, 10**6, "accumulation", where)
        if not _is_within(self.images_per_update, 1e-6, 1e15):
            raise UsageError(
                f"{where}: images_per_update is {self.images_per_update!r}; it must be a number "
                "above 0"
            )
        if not self.seconds:
            raise UsageError(f"{where} has no repeats; it needs seconds of at least one")
        for value in self.seconds:
            if not _is_within(value, _SHORTEST, _LONGEST):
                raise UsageError(
                    f"{where}: an update of {value} seconds; valid are numbers from "
                    f"{_SHORTEST:g} to {_LONGEST:g}"
                )

    @property
    def images_per_rank(self) -> float:
        """In an update."""
        return self.images_per_update / self.ranks

    @cached_property
    def log_seconds(self) -> LogMean:
        return LogMean.of(self.seconds)

    def images_per_sec(self, confidence: float = 0.95) -> Interval:
        """Of all ranks, with the interval that the repeats give (Student's t of logarithms)."""
        check_confidence(confidence)
        seconds = self.log_seconds.interval(confidence)
        return seconds.mapped(lambda value: self.images_per_update / max(value, 1e-300))


def check_series(points: Sequence[Point], mode: Mode) -> list[Point]:
    """The points by rising ranks; raises UsageError if they are no series of that mode."""
    if not points:
        raise UsageError("no points; a scaling series needs at least one")
    series = sorted(points, key=lambda point: point.ranks)
    for before, after in pairwise(series):
        if before.ranks == after.ranks:
            raise UsageError(
                f"two points of {after.ranks} ranks; a series has one for each number of ranks, "
                "with its repeats in it"
            )
    first = series[0]
    for point in series[1:]:
        if mode == "weak":
            held, own = first.images_per_rank, point.images_per_rank
        else:
            held, own = first.images_per_update, point.images_per_update
        if not isclose(held, own, rel_tol=1e-6):
            raise UsageError(
                f"{point.ranks} ranks have {own:g} images {_PER[mode]} in an update and "
                f"{first.ranks} have {held:g}; in {mode} scaling they have the same"
            )
    return series


_PER = {"weak": "per rank", "strong": "in all"}


def points_of_runs(throughput: Throughput, ranks_per_node: int | None = None) -> list[Point]:
    """What the metrics of ordinary runs tell (``harness.schedule.costs.read_throughput``): a point
    with one repeat for each decomposition that was measured.

    ``ranks_per_node``: None if all ranks share a node. Runs have no repeats, hence no intervals.
    """
    return [
        Point(
            ranks,
            nodes_of(ranks, ranks_per_node),
            ranks * micro_batch * accumulation,
            (seconds,),
            accumulation,
        )
        for (ranks, micro_batch), times in sorted(throughput.times.items())
        for accumulation, seconds in sorted(times.measured.items())
    ]


def _whole(value: object, most: int, name: str, where: str) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value <= most:
        raise UsageError(
            f"{where}: {name} is {value!r}; it must be a whole number from 1 to {most}"
        )


def _is_within(value: object, low: float, high: float) -> bool:
    return (
        isinstance(value, int | float)
        and not isinstance(value, bool)
        and isfinite(value)
        and low <= value <= high
    )
