"""Everything that a scaling series tells, from one call."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from harness.scaling.fit import Fit, fit_step_time
from harness.scaling.interval import jsonable
from harness.scaling.points import Mode, Point, check_series
from harness.scaling.predict import Knee, LeftOut, Prediction, knee, leave_out, predict
from harness.scaling.priors import UNKNOWN, KnownLink
from harness.scaling.speedup import SerialFraction, Speedup, serial_fraction, speedups
from harness.scaling.steptime import Topology, Wire


@dataclass(frozen=True)
class Study:
    """A series, measured and modelled; what could not be found is None, and ``gaps`` says why."""

    mode: Mode
    confidence: float
    speedups: tuple[Speedup, ...]
    serial: SerialFraction | None
    fit: Fit | None
    at_points: tuple[Prediction, ...]
    """What the model says of the measured points."""
    predictions: tuple[Prediction, ...]
    """Of the rank counts that were asked for."""
    knee: Knee | None
    left_out: tuple[LeftOut, ...]
    gaps: tuple[str, ...]

    def as_dict(self) -> dict[str, Any]:
        """As plain values for JSON; what is not finite is null."""
        fit = self.fit
        found: dict[str, Any] = {
            "mode": self.mode,
            "confidence": self.confidence,
            "speedups": [asdict(one) for one in self.speedups],
            "serial": None if self.serial is None else asdict(self.serial),
            "model": None,
            "at_points": [asdict(one) for one in self.at_points],
            "predictions": [asdict(one) for one in self.predictions],
            "knee": None if self.knee is None else asdict(self.knee),
            "left_out": [asdict(one) for one in self.left_out],
            "gaps": list(self.gaps),
        }
        if fit is not None:
            found["model"] = {
                "topology": fit.topology,
                "wire": asdict(fit.wire),
                "coefficients": [asdict(one) for one in fit.coefficients],
                "undetermined": list(fit.undetermined),
                "misfit": fit.misfit,
                "model_error": fit.model_error,
            }
        plain: dict[str, Any] = jsonable(found)
        return plain


def study(
    points: Sequence[Point],
    wire: Wire,
    *,
    mode: Mode = "weak",
    targets: Sequence[int] = (),
    within: KnownLink = UNKNOWN,
    between: KnownLink = UNKNOWN,
    topology: Topology = "two-level",
    ranks_per_node: int | None = None,
    most_nodes: int = 1024,
    confidence: float = 0.95,
    ensemble: int = 500,
    seed: int = 0,
) -> Study:
    """Speed-ups, serial fraction, model, knee, left-out points, predictions at ``targets`` ranks.

    Raises UsageError for what is no series of that mode (``check_series``) or makes no sense; too
    little to go on is a gap, not an error.
    """
    series = check_series(points, mode)
    measured = speedups(series, mode, confidence)
    gaps = [] if any(len(point.seconds) > 1 for point in series) else [_NO_REPEATS]
    if len(series) < 2:
        gaps.append(_ONE_COUNT)
        return Study(mode, confidence, measured, None, None, (), (), None, (), tuple(gaps))
    settings: dict[str, Any] = {"within": within, "between": between, "seed": seed}
    fit = fit_step_time(
        series,
        wire,
        mode=mode,
        topology=topology,
        ranks_per_node=ranks_per_node,
        confidence=confidence,
        ensemble=ensemble,
        **settings,
    )
    out = leave_out(fit, **settings)
    if not out:
        gaps.append(_TWO_COUNTS)
    return Study(
        mode=mode,
        confidence=confidence,
        speedups=measured,
        serial=serial_fraction(series, mode, confidence, seed),
        fit=fit,
        at_points=tuple(predict(fit, one.ranks, nodes=one.nodes) for one in series),
        predictions=tuple(predict(fit, count) for count in targets),
        knee=knee(fit, most_nodes=most_nodes),
        left_out=out,
        gaps=tuple(gaps),
    )


_NO_REPEATS = "no point was repeated, so nothing tells how far its figures may be off"
_ONE_COUNT = "one number of ranks was measured; scaling takes at least two, better three"
_TWO_COUNTS = (
    "two numbers of ranks were measured; the model could not be checked on one that was left out"
)
