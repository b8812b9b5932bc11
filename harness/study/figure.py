"""A study's figure: its panels one below the other, as SVG."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure as Canvas
from matplotlib.lines import Line2D
from matplotlib.ticker import (
    FixedLocator,
    FuncFormatter,
    LogLocator,
    MaxNLocator,
    NullFormatter,
    NullLocator,
)

from harness.report.fields import clean, general
from harness.report.figures import short
from harness.report.svg import DASHES, Picture, render, series, settings
from harness.scaling.interval import Interval
from harness.study.cells import Arm, Point, Study
from harness.study.metrics import METRICS
from harness.study.runs import Array, Measured, column
from harness.study.schema import Panel
from harness.study.verdicts import Judge, Runs
from harness.yamlfile import shown

_PANEL = 190.0
_ROW = 15.0
_POINTS = 300  # of a curve
_CURVES = {
    "accuracy": "Test accuracy, %",
    "test_loss": "Test loss, nats",
    "loss": "Training loss, nats",
    "distance": "‖w − w₀‖",
    "noise_scale": "Noise scale, samples",
    "batch": "Global batch, samples",
}
_OVER = {"epoch": "Epochs", "updates": "Updates", "samples": "Samples seen"}
_WINDOW = {
    "loss": "loss",
    "distance": "distance_from_init",
    "noise_scale": "noise_scale",
    "batch": "global_batch",
}


@dataclass(frozen=True)
class _Look:
    colour: str
    dash: Any


def draw(study: Study, runs: Runs) -> bytes | None:
    """The stand-alone SVG file; None if no run is over."""
    if not runs:
        return None
    panels = study.file.figure
    looks = {
        name: _Look(series(place), DASHES[(place + place // 7) % len(DASHES)])
        for place, name in enumerate(study.file.variants)
    }
    heights = [_height(panel, study) for panel in panels]
    legend = _ROW * ((len(_legend_names(study)) + 2) // 3)

    def paint(canvas: Canvas) -> None:
        every = canvas.subplots(len(panels), 1, squeeze=False, height_ratios=heights)
        for panel, axes in zip(panels, every[:, 0], strict=True):
            _PAINTERS[panel.kind](axes, panel, study, runs, looks)
        names = _legend_names(study)
        if names:
            handles = [
                Line2D([], [], color=looks[n].colour, linestyle=looks[n].dash, marker="o", ms=3.5)
                for n in names
            ]
            labels = [clean(name, 30) for name in names]
            canvas.legend(handles, labels, loc="outside upper left", ncols=3, columnspacing=1.4)

    title = clean(study.file.title)
    with settings():
        picture = Picture(
            key=study.name,
            title=title,
            caption=title,
            description=f"{title}: {'; '.join(map(_describe, panels))}.",
            header=(),
            rows=[],
            draw=paint,
            height=sum(heights) + legend,
        )
        return render(picture).file


def _legend_names(study: Study) -> list[str]:
    """None where every panel names its variants itself."""
    if all(panel.kind == "points" for panel in study.file.figure):
        return []
    return study.variants if len(study.variants) > 1 else []


def _height(panel: Panel, study: Study) -> float:
    if panel.kind == "points":
        return 44.0 + _ROW * 1.2 * len(_chosen(panel, study)) * len(study.points)
    return _PANEL


def _describe(panel: Panel) -> str:
    if panel.kind == "curves":
        return f"{_CURVES[panel.y].lower()} over {_OVER[panel.x or 'epoch'].lower()}"
    return METRICS[panel.y].title + (f" over {panel.x}" if panel.x else "")


def _chosen(panel: Panel, study: Study) -> list[str]:
    return [name for name in panel.variants or study.variants if name in study.variants]


def _scale(metric: str) -> float:
    return 100.0 if METRICS[metric].unit == "share" else 1.0


def _ends(metric: str, interval: Interval) -> list[float]:
    """Of an interval as it is drawn: those of shares end at 0 and 100 %. Empty if there is none."""
    if interval.low is None or interval.high is None:
        return []
    ends = [interval.low, interval.high]
    if METRICS[metric].unit == "share":
        ends = [min(max(end, 0.0), 1.0) for end in ends]
    return [_scale(metric) * end for end in ends]


def _title(metric: str) -> str:
    kind = METRICS[metric]
    unit = {"share": ", %", "s": ", s"}.get(kind.unit, "")
    return kind.title[:1].upper() + kind.title[1:] + unit


def _points(axes: Axes, panel: Panel, study: Study, runs: Runs, looks: dict[str, _Look]) -> None:
    """A row for each variant, and point of the grid: single runs pale, mean and interval dark."""
    judge = Judge(study, runs)
    arms = [Arm(name, point) for name in _chosen(panel, study) for point in study.points]
    scale = _scale(panel.y)
    for row, arm in enumerate(arms):
        values = [scale * value for value in judge.values(arm, panel.y).values()]
        colour = looks[arm.variant].colour
        axes.plot(values, [row] * len(values), "o", color=colour, ms=3.5, alpha=0.35, mew=0)
        interval = judge.mean(arm, panel.y)
        if interval is not None:
            axes.plot([scale * interval.value], [row], "o", color=colour, ms=5)
        if interval is not None and (ends := _ends(panel.y, interval)):
            axes.plot(ends, [row, row], color=colour)
    axes.set_yticks(range(len(arms)), [clean(str(arm), 34) for arm in arms])
    axes.set_ylim(len(arms) - 0.4, -0.6)
    axes.yaxis.grid(False)
    if panel.log:
        _log_ticks(axes)
    else:
        axes.xaxis.set_major_locator(MaxNLocator(6))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: short(value)))
    axes.set_xlabel(_title(panel.y))


def _lines(axes: Axes, panel: Panel, study: Study, runs: Runs, looks: dict[str, _Look]) -> None:
    """A line for each variant over a key of the grid, with its interval."""
    judge = Judge(study, runs)
    along = panel.x or next(iter(study.grid))
    steps = study.grid[along]
    numeric = all(type(step) in (int, float) and step > 0 for step in steps)
    places = [float(step) for step in steps] if numeric else [float(i) for i in range(len(steps))]
    scale = _scale(panel.y)
    rests = [p for p in study.points if dict(p)[along] == steps[0]]
    for name in _chosen(panel, study):
        for turn, rest in enumerate(rests):
            look = looks[name]
            dash = look.dash if len(rests) == 1 else DASHES[turn % len(DASHES)]
            means = [judge.mean(Arm(name, _with(rest, along, s)), panel.y) for s in steps]
            known = [(x, one) for x, one in zip(places, means, strict=True) if one is not None]
            xs = [x for x, _ in known]
            ys = [scale * one.value for _, one in known]
            axes.plot(xs, ys, color=look.colour, linestyle=dash, marker="o", ms=3.5)
            for x, one in known:
                if ends := _ends(panel.y, one):
                    axes.plot([x, x], ends, color=look.colour, lw=1, alpha=0.6)
    if numeric:
        axes.set_xscale("log", base=2)
        axes.xaxis.set_minor_locator(NullLocator())
    stride = max(1, -(-len(places) // 10))
    axes.xaxis.set_major_locator(FixedLocator(places[::stride]))
    names = [clean(shown(step), 12) for step in steps][::stride]
    told = dict(zip(places[::stride], names, strict=True))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: told.get(value, "")))
    axes.set_xlabel(along)
    axes.set_ylabel(_title(panel.y))
    _log(axes, panel.log)


def _with(point: Point, key: str, value: Any) -> Point:
    return tuple((k, value if k == key else old) for k, old in point)


def _log_ticks(axes: Axes) -> None:
    """A logarithmic x with ticks even where it spans no power of ten."""
    axes.set_xscale("log")
    axes.xaxis.set_minor_formatter(NullFormatter())
    low, high = axes.get_xlim()
    axes.xaxis.set_major_locator(LogLocator(subs=(1.0,) if high / low > 100 else (1, 2, 5)))


def _log(axes: Axes, log: bool) -> None:
    if log:
        axes.set_yscale("log")
        axes.yaxis.set_minor_formatter(NullFormatter())
        low, high = axes.get_ylim()
        axes.yaxis.set_major_locator(LogLocator(subs=(1.0,) if high / low > 100 else (1, 2, 5)))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: general(value, 3)))


def _curves(axes: Axes, panel: Panel, study: Study, runs: Runs, looks: dict[str, _Look]) -> None:
    """Over training: the mean over seeds, where all of them have got to."""
    over = panel.x or "epoch"
    point = _point(panel, study)
    for name in _chosen(panel, study):
        found = [runs.get((Arm(name, point), seed)) for seed in study.seeds]
        curves = [_curve(run, panel.y, over) for run in found if run is not None]
        mean = mean_curve([one for one in curves if len(one[0]) > 1], panel.log)
        if panel.y == "batch" and curves:  # a staircase has no mean between its steps
            mean = curves[0]
        if mean is not None:
            look = looks[name]
            style = "steps-pre" if panel.y == "batch" else "default"
            axes.plot(*mean, color=look.colour, linestyle=look.dash, drawstyle=style)
    if panel.log:
        _log_ticks(axes)
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: short(value)))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: general(value, 3)))
    if panel.y in ("noise_scale", "batch"):
        axes.set_yscale("log", base=2)
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.4g}"))
    place = ", ".join(f"{key} {shown(value)}" for key, value in point)
    axes.set_xlabel(_OVER[over] + (f" ({place})" if place else ""))
    axes.set_ylabel(_CURVES[panel.y])


def _point(panel: Panel, study: Study) -> Point:
    wanted = [point for point in study.points if dict(point) == panel.at]
    return wanted[0] if wanted else study.points[0]


def _curve(run: Measured, y: str, over: str) -> tuple[Array, Array]:
    if y in ("accuracy", "test_loss"):
        place = {"epoch": 0, "updates": 1, "samples": 2}[over]
        value, scale = (3, 100.0) if y == "accuracy" else (4, 1.0)
        told = [(e[place], e[value]) for e in run.evaluations]
        pairs = np.array([(x, scale * v) for x, v in told if v is not None], dtype=float)
        pairs = pairs.reshape(len(pairs), 2)
        return pairs[:, 0], pairs[:, 1]
    name = {"epoch": "epoch", "updates": "update", "samples": "samples_seen"}[over]
    xs, ys = column(run.windows, name), column(run.windows, _WINDOW[y])
    good = np.isfinite(xs) & np.isfinite(ys)
    return xs[good], ys[good]


def mean_curve(
    curves: Sequence[tuple[Array, Array]], log: bool = False
) -> tuple[Array, Array] | None:
    """The mean of curves, each interpolated, over the part that all of them cover."""
    if not curves:
        return None
    low, high = max(float(x[0]) for x, _ in curves), min(float(x[-1]) for x, _ in curves)
    if not low < high:
        return None
    most = min(_POINTS, max(len(x) for x, _ in curves))
    places = np.geomspace(low, high, most) if log and low > 0 else np.linspace(low, high, most)
    return places, np.mean([np.interp(places, x, y) for x, y in curves], axis=0)


_PAINTERS: dict[str, Callable[[Axes, Panel, Study, Runs, dict[str, _Look]], None]] = {
    "points": _points,
    "lines": _lines,
    "curves": _curves,
}
