"""What the scaling model says of a measured series, as the figures need it."""

from __future__ import annotations

from dataclasses import dataclass

from harness.errors import UsageError
from harness.report import scaling
from harness.scaling.answer import Topic, answer
from harness.scaling.points import Point
from harness.scaling.predict import Prediction
from harness.scaling.steptime import Wire
from harness.scaling.study import Study, study

FEWEST = 3
"""Rank counts that a fit with a point left out takes."""
_FURTHER = (2, 4)
"""Multiples of the most measured ranks that are predicted."""
_TOLD: tuple[Topic, ...] = ("prediction", "knee", "check", "caution")


@dataclass(frozen=True)
class Modelled:
    """Throughput by the model, images per second over all ranks, at ascending rank counts."""

    ranks: list[int]
    images_per_sec: list[float]
    low: list[float]
    high: list[float]
    measured_up_to: int
    """Ranks; what lies beyond is an extrapolation."""
    knee: int | None
    """Ranks of the last node that buys half of the first; None if it lies beyond 1,024 nodes."""
    sentences: list[str]


def model_of(series: scaling.Series, gradient_bytes: float | None) -> Modelled | str:
    """The model of a series, or why there is none, in words after "not fitted: ".

    ``gradient_bytes``: what a rank sends in an update.
    """
    counts = len(series.points)
    if counts < FEWEST:
        return f"a model takes {FEWEST} rank counts or more, and {counts} were measured"
    if gradient_bytes is None:
        return "how many bytes an update sends is not recorded"
    most = series.points[-1].ranks
    try:
        found = study(
            [_point(point) for point in series.points],
            Wire(gradient_bytes),
            mode="strong" if series.mode == "strong" else "weak",
            targets=[most * factor for factor in _FURTHER],
        )
    except UsageError as error:
        return str(error)
    return _modelled(found, most)


def _point(point: scaling.Point) -> Point:
    """Raises UsageError for what cannot be one."""
    batch = point.global_batch
    if batch is None:
        raise UsageError(f"the global batch on {point.ranks} ranks is not recorded")
    return Point(
        point.ranks,
        int(point.nodes or 1),
        batch,
        tuple(batch / speed for speed in point.repeats or (point.images_per_sec,)),
        int(point.accumulation or 1),
    )


def _modelled(found: Study, most: int) -> Modelled:
    shown: tuple[Prediction, ...] = (*found.at_points, *found.predictions)
    speeds = [one.images_per_sec for one in shown]
    knee = found.knee
    return Modelled(
        ranks=[one.ranks for one in shown],
        images_per_sec=[speed.value for speed in speeds],
        low=[speed.value if speed.low is None else speed.low for speed in speeds],
        high=[speed.value if speed.high is None else speed.high for speed in speeds],
        measured_up_to=most,
        knee=None if knee is None or knee.open else int(knee.nodes.value) * knee.ranks_per_node,
        sentences=[one.text for one in answer(found) if one.topic in _TOLD],
    )
