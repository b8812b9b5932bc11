"""How much of the throughput is progress: the statistical efficiency of a batch.

McCandlish et al. 2018 (An Empirical Model of Large-Batch Training, sections 2.2 and 2.3): with the
noise scale N, a batch of B needs 1 + B/N times the samples that a small one needs for the same
progress. A sample of it is thus worth 1 / (1 + B/N) of one in a small batch, and goodput is
throughput times that.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from harness.report.columns import Array
from harness.report.runs import Run
from harness.report.scaling import Series, knee_of


def statistical_efficiency(batch: Array | float, noise: Array | float) -> Array:
    """1 / (1 + B/N), the worth of a sample; ``batch`` and ``noise`` in samples, above 0."""
    return np.asarray(1.0 / (1.0 + np.asarray(batch) / np.asarray(noise)), dtype=float)


@dataclass(frozen=True)
class Progress:
    """Windows of a run in which throughput, batch and noise scale are known."""

    samples: Array
    throughput: Array
    goodput: Array
    efficiency: Array


def progress_of(run: Run) -> Progress | None:
    """None where no window has a noise scale."""
    columns = run.columns
    batch, noise = columns["global_batch"], columns["noise_scale"]
    seen = columns["samples_seen"]
    known = run.timed & (batch > 0) & (noise > 0) & ~np.isnan(seen)
    if not known.any():
        return None
    efficiency = statistical_efficiency(batch[known], noise[known])
    rates = columns["images_per_sec"][known]
    return Progress(seen[known], rates, rates * efficiency, efficiency)


@dataclass(frozen=True)
class Goodputs:
    """Goodput of a series' points at one noise scale."""

    noise: float
    series: Series
    goodput: list[float]
    knee: int | None
    """Of goodput, as ``knee_of`` has it."""

    @property
    def best(self) -> int:
        """The rank count of the largest goodput."""
        return self.series.points[int(np.argmax(self.goodput))].ranks


def goodputs_of(series: Series, noise: float) -> Goodputs | None:
    """None where a point's global batch is not known."""
    batches = [point.global_batch for point in series.points]
    if not all(batches):
        return None
    worth = statistical_efficiency(np.array(batches, dtype=float), noise).tolist()
    goodput = [p.images_per_sec * w for p, w in zip(series.points, worth, strict=True)]
    return Goodputs(noise, series, goodput, knee_of(series.points, goodput))
