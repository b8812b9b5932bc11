"""What the scaling model says of a measured series, as the figures need it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from harness.errors import UsageError
from harness.lenient import number, pick
from harness.report import scaling
from harness.report.fields import words
from harness.report.network import Network
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
    sentences: list[str]
    coefficients: list[dict[str, Any]]
    """``harness.scaling.fit.Coefficient`` as plain values."""


def wire_of(gradient_bytes: float | None, comm: Any) -> Wire | str:
    """What a rank sends in an update, or why that is not known, in words after "not fitted: ".

    ``comm``: that section of the configuration, as far as there is one; without ``bucket_mb`` all
    counts as one bucket.
    """
    if gradient_bytes is None:
        return "how many bytes an update sends is not recorded"
    size = number(pick(comm, "bucket_mb"))
    if size is not None and pick(comm, "autotune") is not True:
        halved = (words(pick(comm, "compression")) or "").startswith("fp16")
        doubled = pick(comm, "summation") == "exact"
        size *= 2**20 * (0.5 if halved else 2 if doubled else 1)  # comm.bucket_mb is of float32
    else:
        size = None
    try:
        return Wire(gradient_bytes, size)
    except UsageError as error:
        return str(error)


def model_of(series: scaling.Series, wire: Wire | str, network: Network) -> Modelled | str:
    """The model of a series, or why there is none, in words after "not fitted: "."""
    counts = len(series.points)
    if counts < FEWEST:
        return f"a model takes {FEWEST} rank counts or more, and {counts} were measured"
    if isinstance(wire, str):
        return wire
    most = series.points[-1].ranks
    try:
        found = study(
            [_point(point) for point in series.points],
            wire,
            mode="strong" if series.mode == "strong" else "weak",
            targets=[most * factor for factor in _FURTHER],
            within=network.within,
            between=network.between,
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
    told = [one.text for one in answer(found) if one.topic in _TOLD]
    if speeds[-1].known:
        told.insert(0, f"Numbers in brackets are {100 * found.confidence:g} % intervals.")
    return Modelled(
        ranks=[one.ranks for one in shown],
        images_per_sec=[speed.value for speed in speeds],
        low=[speed.value if speed.low is None else speed.low for speed in speeds],
        high=[speed.value if speed.high is None else speed.high for speed in speeds],
        measured_up_to=most,
        sentences=told,
        coefficients=found.as_dict()["model"]["coefficients"],
    )
