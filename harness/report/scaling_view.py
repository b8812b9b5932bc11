"""What the scaling model says of a measured series, as the figures need it."""

from __future__ import annotations

from dataclasses import dataclass

from harness.report.scaling import Series

FEWEST = 3
"""Rank counts that a fit with a point left out takes."""


@dataclass(frozen=True)
class Modelled:
    """Throughput by the model, images per second over all ranks, at ascending rank counts."""

    ranks: list[int]
    images_per_sec: list[float]
    low: list[float]
    high: list[float]
    knee: int | None
    sentences: list[str]


def model_of(series: Series, gradient_bytes: float | None) -> Modelled | str:
    """The model of a series, or why there is none, in words after "not fitted: ".

    ``gradient_bytes``: what a rank sends in an update.
    """
    counts = len(series.points)
    if counts < FEWEST:
        return f"a model takes {FEWEST} rank counts or more, and {counts} were measured"
    if gradient_bytes is None:
        return "how many bytes an update sends is not recorded"
    return "measured points only; the step-time model is not part of this version"
