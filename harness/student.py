"""Student's t: how far the mean of a few repeats may be off."""

from __future__ import annotations

import math
from collections.abc import Sequence

CONFIDENCE = 0.95


def student_quantile(dof: float, confidence: float = CONFIDENCE) -> float:
    """The t of a two-sided interval with so many degrees of freedom."""
    from scipy.special import stdtrit  # a third of a second, which few commands need

    return float(stdtrit(dof, (1 + confidence) / 2))


def mean_interval(
    values: Sequence[float], confidence: float = CONFIDENCE
) -> tuple[float, float | None, float | None]:
    """(mean, low, high) of a mean's two-sided interval; None with one value."""
    mean = math.fsum(values) / len(values)
    if len(values) < 2:
        return mean, None, None
    variance = math.fsum((value - mean) ** 2 for value in values) / (len(values) - 1)
    half = student_quantile(len(values) - 1, confidence) * math.sqrt(variance / len(values))
    return mean, mean - half, mean + half


def ratio_text(logs: Sequence[float], confidence: float = CONFIDENCE) -> str:
    """The geometric mean of ratios, whose logarithms these are, such as ``1.29 (0.84 to 1.99)``."""
    mean, low, high = mean_interval(logs, confidence)
    if low is None or high is None:
        return f"{math.exp(mean):.2f}"
    return f"{math.exp(mean):.2f} ({math.exp(low):.2f} to {math.exp(high):.2f})"
