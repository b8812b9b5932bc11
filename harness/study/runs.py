"""What the records of one run of a study tell."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from harness.jsonl import Record, read_jsonl
from harness.lenient import listed, number, pick
from harness.records import of_trajectory
from harness.rundir import RunDirectory
from harness.study.metrics import METRICS
from harness.study.schema import Target

Array = npt.NDArray[np.float64]
State = Literal["missing", "unfinished", "diverged", "done"]

COLUMNS = (
    *("epoch", "update", "samples_seen", "loss", "noise_scale", "distance_from_init"),
    *("global_batch", "images_per_sec"),
)
"""Of metrics.jsonl."""
_FIRST_UPDATES = 10
"""Distances before are of a few steps: no law is about them."""
_LEAST_POINTS = 20


@dataclass(frozen=True)
class Measured:
    """A run by its records; a metric that they do not tell is None."""

    state: State
    metrics: dict[str, float | None] = field(default_factory=dict)
    evaluations: tuple[tuple[float, float, float, float | None, float | None], ...] = ()
    """(epoch, update, samples, accuracy, loss) each."""
    windows: Array = field(default_factory=lambda: _table([]))
    """A row for each line of metrics.jsonl; NaN: missing."""
    layers: tuple[tuple[str, float | None, float | None], ...] = ()
    """(parameter, ‖w‖, ‖∇w‖) at the first look."""

    @property
    def over(self) -> bool:
        return self.state in ("done", "diverged")


def state_of(events: Sequence[Record]) -> State:
    """By the last event of the run's trajectory."""
    last = next((e["kind"] for e in reversed(events) if of_trajectory(e)), None)
    return {None: "missing", "end": "done", "diverged": "diverged"}.get(last, "unfinished")  # type: ignore[return-value]


def state(run: RunDirectory) -> State:
    """Raises nothing: a directory that is not there holds no run."""
    return state_of(_lines(run, "events"))


def measure(run: RunDirectory, target: Target | None, tuned: Any = None) -> Measured:
    """Everything of METRICS that a run's records tell; nothing of a run that is not over."""
    events = _lines(run, "events")
    now = state_of(events)
    if now not in ("done", "diverged"):
        return Measured(now)
    windows = _windows(_lines(run, "metrics"))
    evaluations = tuple(_evaluations(events))
    layers = tuple(_layers(_lines(run, "layers")))
    found: dict[str, float | None] = dict.fromkeys(METRICS)
    found |= _results(events, evaluations, windows, now)
    found |= _to_target(evaluations, target, windows)
    found |= _noise(windows)
    found |= _distance(windows)
    early, late = found["noise_to_target"], found["noise_end"]
    found["noise_growth"] = math.log2(late / early) if early and late else None
    found["ratio_spread"] = _spread(layers)
    found["tuned"] = number(tuned)
    return Measured(now, found, evaluations, windows, layers)


def _lines(run: RunDirectory, which: Literal["events", "metrics", "layers"]) -> list[Record]:
    newest = run.newest()
    path = {"events": newest.events, "metrics": newest.metrics, "layers": newest.layers}[which]
    try:
        return [line for line in read_jsonl(path) if line is not None]
    except OSError:
        return []


def _windows(lines: list[Record]) -> Array:
    rows = [[number(line.get(name)) for name in COLUMNS] for line in lines]
    table = _table(rows)
    known: Array = table[np.isfinite(column(table, "update"))]
    return known


def _table(rows: list[list[float | None]]) -> Array:
    return np.array(rows, dtype=np.float64).reshape(len(rows), len(COLUMNS))


def column(windows: Array, name: str) -> Array:
    found: Array = windows[:, COLUMNS.index(name)]
    return found


def _evaluations(
    events: list[Record],
) -> list[tuple[float, float, float, float | None, float | None]]:
    found = []
    for event in events:
        places = [number(event.get(key)) for key in ("epoch", "update", "samples_seen")]
        if event.get("kind") == "evaluation" and None not in places:
            epoch, update, samples = (float(place or 0.0) for place in places)
            accuracy, loss = number(event.get("accuracy")), number(event.get("loss"))
            found.append((epoch, update, samples, accuracy, loss))
    return found


def _results(
    events: list[Record],
    evaluations: Sequence[tuple[float, float, float, float | None, float | None]],
    windows: Array,
    now: State,
) -> dict[str, float | None]:
    """A run that has diverged is as good as its last evaluation; what it would have taken to its
    end is not known."""
    end: Record = next((e for e in reversed(events) if e.get("kind") == "end"), {})
    known = [(a, loss) for *_, a, loss in evaluations]
    accuracies = [a for a, _ in known if a is not None]
    last_accuracy, last_loss = known[-1] if known else (None, None)
    samples, seconds = number(end.get("samples_seen")), number(end.get("seconds"))
    return {
        "accuracy": last_accuracy,
        "best_accuracy": max(accuracies, default=None),
        "error": None if last_accuracy is None else 1 - last_accuracy,
        "test_loss": last_loss,
        "train_loss": _last_epoch(windows),
        "diverged": float(now == "diverged"),
        "updates": number(end.get("update")),
        "samples": samples,
        "seconds": seconds,
        "images_per_sec": samples / seconds if samples and seconds else None,
        "largest_batch": _most(column(windows, "global_batch")),
    }


def _last_epoch(windows: Array) -> float | None:
    """Mean loss of the windows that end in the last epoch, weighted by their samples."""
    if not len(windows):
        return None
    epoch, loss = column(windows, "epoch"), column(windows, "loss")
    weight = np.diff(column(windows, "samples_seen"), prepend=0.0)
    chosen = (epoch > epoch[-1] - 1) & np.isfinite(loss) & (weight > 0)
    return float(np.average(loss[chosen], weights=weight[chosen])) if chosen.any() else None


def _most(values: Array) -> float | None:
    finite = values[np.isfinite(values)]
    return float(finite.max()) if len(finite) else None


def _to_target(
    evaluations: Sequence[tuple[float, float, float, float | None, float | None]],
    target: Target | None,
    windows: Array,
) -> dict[str, float | None]:
    if target is None:
        return {}
    for epoch, update, samples, accuracy, loss in evaluations:
        value = accuracy if target.of == "accuracy" else loss
        if value is None:
            continue
        if value >= target.value if target.of == "accuracy" else value <= target.value:
            before = windows[column(windows, "update") <= update]
            return {
                "updates_to_target": update,
                "samples_to_target": samples,
                "epochs_to_target": epoch,
                "reached": 1.0,
                "noise_to_target": _median(column(before, "noise_scale")),
            }
    return {"reached": 0.0}


def _median(values: Array) -> float | None:
    good = values[np.isfinite(values) & (values > 0)]
    return float(np.median(good)) if len(good) else None


def _noise(windows: Array) -> dict[str, float | None]:
    samples, noise = column(windows, "samples_seen"), column(windows, "noise_scale")
    if not len(samples):
        return {}
    share = samples / samples[-1]
    return {
        "noise_scale": _median(noise),
        "noise_start": _median(noise[share <= 0.1]),
        "noise_end": _median(noise[share > 0.9]),
    }


def _distance(windows: Array) -> dict[str, float | None]:
    update, distance = column(windows, "update"), column(windows, "distance_from_init")
    good = np.isfinite(distance) & (distance > 0) & (update >= _FIRST_UPDATES)
    if not good.any():
        return {}
    found: dict[str, float | None] = {"distance": float(distance[good][-1])}
    t, d = log_spaced(update[good], distance[good])
    if len(t) >= _LEAST_POINTS:
        exponent, misfit_log = box_cox(t, d)
        power, misfit_power = power_law(t, d)
        found |= {
            "distance_exponent": exponent,
            "distance_power": power,
            "misfit_log": misfit_log,
            "misfit_power": misfit_power,
            "log_advantage": misfit_power / misfit_log if misfit_log > 0 else None,
        }
    return found


def log_spaced(t: Array, d: Array, count: int = 60) -> tuple[Array, Array]:
    """Points whose times stand about evenly on a logarithmic scale, so that late ones, of which
    there are most, do not decide a fit by themselves."""
    marks = np.geomspace(t[0], t[-1], count)
    places = np.unique(np.searchsorted(t, marks).clip(max=len(t) - 1))
    return t[places], d[places]


def box_cox(t: Array, d: Array) -> tuple[float, float]:
    """(q, misfit at q = 0) of d = a + b (t^q − 1) / q, by least squares; q = 0 is a + b log t.

    The family holds the logarithm (q = 0), the square root of an ordinary random walk (q = 1/2) and
    a straight line (q = 1), so q says how far from the logarithm a curve is. Misfit: root mean
    square of the residuals over the range of d. q is sought from −1 to 2.
    """
    logs = np.log(t)

    def residual(q: float) -> float:
        x = logs if abs(q) < 1e-9 else np.expm1(q * logs) / q
        return _line(x, d)[2]

    grid = np.linspace(-1.0, 2.0, 61)
    best = float(grid[int(np.argmin([residual(float(q)) for q in grid]))])
    step = float(grid[1] - grid[0])
    for _ in range(20):  # golden enough: the range shrinks by half each time
        step /= 2
        best = min((best - step, best, best + step), key=residual)
    span = float(np.ptp(d)) or 1.0
    return best, residual(0.0) / span


def power_law(t: Array, d: Array) -> tuple[float, float]:
    """(p, misfit) of d = c t^p, fitted as a straight line of logarithms; misfit as of ``box_cox``,
    of d itself."""
    slope, offset, _ = _line(np.log(t), np.log(d))
    off = d - np.exp(offset + slope * np.log(t))
    return slope, float(np.sqrt(np.mean(off**2))) / (float(np.ptp(d)) or 1.0)


def _line(x: Array, y: Array) -> tuple[float, float, float]:
    """(slope, offset, root mean square residual) of the least-squares line."""
    dx, dy = x - x.mean(), y - y.mean()
    squares = float(dx @ dx)
    slope = float(dx @ dy) / squares if squares > 0 else 0.0
    off = dy - slope * dx
    return slope, float(y.mean() - slope * x.mean()), float(np.sqrt(np.mean(off**2)))


def _layers(lines: list[Record]) -> list[tuple[str, float | None, float | None]]:
    layers = listed(lines[0].get("layers")) if lines else []
    return [
        (str(pick(one, "layer")), number(pick(one, "weight_norm")), number(pick(one, "grad_norm")))
        for one in layers
    ]


def _spread(layers: Sequence[tuple[str, float | None, float | None]]) -> float | None:
    """Largest ‖w‖ / ‖∇w‖ over smallest, as of You, Gitman and Ginsburg's Table 4."""
    ratios = [w / g for _, w, g in layers if w and g]
    return max(ratios) / min(ratios) if ratios else None
