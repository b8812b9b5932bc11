"""What a study can say of a run: the metrics by name."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class MetricKind:
    """A number that a run's records give."""

    title: str
    better: Literal["more", "less", "neither"]
    unit: Literal["share", "count", "number", "s"] = "number"
    """share: of 1, shown in percent."""
    needs_target: bool = False
    yes_or_no: bool = False
    """1 or 0 of a run, so tables count runs."""


METRICS: dict[str, MetricKind] = {
    "accuracy": MetricKind("final test accuracy", "more", "share"),
    "best_accuracy": MetricKind("best test accuracy", "more", "share"),
    "error": MetricKind("final test error", "less", "share"),
    "test_loss": MetricKind("final test loss", "less"),
    "train_loss": MetricKind("training loss of the last epoch", "less"),
    "diverged": MetricKind("diverged", "less", "share", yes_or_no=True),
    "updates": MetricKind("updates", "less", "count"),
    "samples": MetricKind("samples", "less", "count"),
    "seconds": MetricKind("training time", "less", "s"),
    "images_per_sec": MetricKind("images/s", "more"),
    "largest_batch": MetricKind("largest batch", "neither", "count"),
    "updates_to_target": MetricKind("updates to the target", "less", "count", needs_target=True),
    "samples_to_target": MetricKind("samples to the target", "less", "count", needs_target=True),
    "epochs_to_target": MetricKind("epochs to the target", "less", needs_target=True),
    "reached": MetricKind("reached the target", "more", "share", needs_target=True, yes_or_no=True),
    "noise_scale": MetricKind("noise scale, median of the run", "neither"),
    "noise_to_target": MetricKind(
        "noise scale, median up to the target", "neither", needs_target=True
    ),
    "noise_start": MetricKind("noise scale, first tenth of the run", "neither"),
    "noise_end": MetricKind("noise scale, last tenth of the run", "neither"),
    "noise_growth": MetricKind(
        "doublings of the noise scale, from up to the target to the last tenth",
        "neither",
        needs_target=True,
    ),
    "distance": MetricKind("distance from the start", "neither"),
    "distance_exponent": MetricKind("exponent q of the distance", "neither"),
    "distance_power": MetricKind("power p of the distance", "neither"),
    "misfit_log": MetricKind("misfit of the log law", "less"),
    "misfit_power": MetricKind("misfit of the power law", "less"),
    "log_advantage": MetricKind("misfit of the power law over the log law's", "neither"),
    "ratio_spread": MetricKind("largest ‖w‖/‖∇w‖ over smallest", "neither"),
    "tuned": MetricKind("value chosen", "neither"),
}
