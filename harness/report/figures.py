"""The curves: a quantity of metrics.jsonl or of the evaluations over samples, epochs or updates."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

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

from harness.jsonl import Record
from harness.lenient import number, pick
from harness.report.curves import Curve, curve, extremes, log_spaced, means, points, spread, steps
from harness.report.fields import clean, count, general, percent
from harness.report.runs import Run
from harness.report.summary import Summary, distances, noise_scales
from harness.report.svg import DASHES, INK, PALETTE, Dash, Figure, Picture, final, render, series

LEGEND_RUNS = 8  # beyond this the summary table is the legend
POINTS = 2000  # of a line of one run; all lines of a figure together get TOTAL_POINTS
TOTAL_POINTS = 6_000


@dataclass(frozen=True)
class Abscissa:
    """What a figure's points lie over."""

    label: str
    of: Callable[[Record, Run], float | None]
    """The place of an event."""
    log: bool = False


def _epoch(event: Record, run: Run) -> float | None:
    epoch, samples = number(event.get("epoch")), number(event.get("samples_seen"))
    size = number(pick(run.records.plan, "totals", "dataset_size"))
    return samples / size if epoch is None and samples is not None and size else epoch


SAMPLES = Abscissa("Samples seen", lambda event, run: number(event.get("samples_seen")))
EPOCHS = Abscissa("Epochs", _epoch)
LOG_UPDATES = Abscissa(
    "Updates (log₁₀ scale)", lambda event, run: number(event.get("update")), log=True
)


@dataclass(frozen=True)
class Line:
    """One curve with its looks."""

    curve: Curve
    colour: str
    dash: Dash = DASHES[0]
    label: str | None = None
    staircase: bool = False  # a value holds back to the point before it, as in a window
    marker: str | None = None
    width: float = 1.7


@dataclass(frozen=True)
class Drawing:
    """What a figure shows, before anything is drawn."""

    key: str
    title: str
    axis: str
    caption: str
    absent: str
    lines: list[Line]
    arrange: Callable[[Axes, list[Line]], None]
    show: Callable[[float | None], str] = general
    over: Abscissa = SAMPLES
    section: str = "curves"  # of the page; in others a figure without data is left out


OPENING = "opening"
"""The section of the figures on the first screen."""
ONE_COUNT = (
    "one number of ranks was measured, so there is no efficiency; "
    "harness bench CONFIG --ranks 1,2,4 measures it."
)


def draw_curves(runs: list[Run], summaries: list[Summary], scaling: bool) -> list[Figure]:
    """Every curve of the report, in reading order; within ``svg.settings``.

    ``scaling``: the first screen has throughput against ranks. Else it gets throughput over samples
    seen, first of the list.
    """
    plans = (_throughput, _accuracy, _loss, _batch, _updates, _rate, _noise, _distance)
    drawings = [plan(runs, summaries) for plan in plans] if runs else []
    if drawings and not scaling:
        first = drawings[0]
        caption, absent = (
            f"{text} Over samples: {ONE_COUNT}" for text in (first.caption, first.absent)
        )
        drawings[0] = replace(first, section=OPENING, caption=caption, absent=absent)
    return [_render(drawing, runs) for drawing in drawings]


def swatch(run: Run) -> dict[str, str]:
    """A run's line as SVG attributes, for the table of runs."""
    colour, (_, pattern) = look(run)
    dashes = " ".join(f"{1.7 * part:.1f}" for part in pattern)
    return {"stroke": final(colour), "dashes": dashes or "none"}


def look(run: Run) -> tuple[str, Dash]:
    """The stand-in colour and the dash pattern of a run."""
    place = run.number - 1
    turn = place // len(PALETTE)
    return series(place), DASHES[(place + turn) % len(DASHES)]


def _limit(runs: list[Run]) -> int:
    return max(min(POINTS, TOTAL_POINTS // len(runs)), 100)


def _per_run(
    runs: list[Run], column: str, thin: Callable[[Curve, int], Curve], staircase: bool = False
) -> list[Line]:
    """A line per run of one column of metrics.jsonl over samples seen."""
    lines = []
    make = steps if staircase else curve
    for run in runs:
        colour, dash = look(run)
        shape = thin(make(run.columns["samples_seen"], run.columns[column]), _limit(runs))
        lines.append(Line(shape, colour, dash, run.label, staircase))
    return [line for line in lines if len(line.curve)]


def evaluations_of(run: Run, field: str) -> Curve:
    """A field of the evaluations over samples seen."""
    told = [(e.samples_seen, getattr(e, field)) for e in run.evaluations]
    table = np.array(told, dtype=float).reshape(len(told), 2)
    return curve(table[:, 0], table[:, 1])


def _accuracy(runs: list[Run], summaries: list[Summary]) -> Drawing:
    lines = []
    for run in runs:
        shape = extremes(evaluations_of(run, "accuracy"), _limit(runs))
        marker = "o" if len(shape.x) <= 40 else None
        lines.append(Line(shape, *look(run), run.label, marker=marker))
    what = "Accuracy on the whole test set at each evaluation."
    return Drawing(
        "accuracy", "Test accuracy", "Test accuracy, %", what, "No evaluation has been recorded.",
        [line for line in lines if len(line.curve)], _percent_axis, percent,
    )  # fmt: skip


def _loss(runs: list[Run], summaries: list[Summary]) -> Drawing:
    lines = _per_run(runs, "loss", means)
    caption = "Training loss, averaged over each logging window."
    if len(runs) == 1:
        lines = [Line(line.curve, line.colour, label="training") for line in lines]
        test = extremes(evaluations_of(runs[0], "loss"), POINTS)
        if len(test):
            marker = "o" if len(test.x) <= 40 else None
            lines.append(Line(test, series(1), DASHES[1], "test", marker=marker))
            caption = "Loss in training (logging windows) and on the test set (evaluations)."
    return Drawing(
        "loss", "Loss", "Loss, nats", caption, "No loss has been recorded.", lines, _loss_axis
    )


def _batch(runs: list[Run], summaries: list[Summary]) -> Drawing:
    return Drawing(
        "global-batch", "Global batch", "Global batch, samples (log₂ scale)",
        "Samples per update over all ranks and accumulation steps.",
        "No global batch has been recorded.",
        [_positive(line) for line in _per_run(runs, "global_batch", extremes, staircase=True)],
        _log2_axis, count,
    )  # fmt: skip


def _updates(runs: list[Run], summaries: list[Summary]) -> Drawing:
    lines = _per_run(runs, "update", extremes)
    caption = "Optimizer updates made so far."
    initial, fixed = (summaries[0].of(n) for n in ("initial_batch", "updates_at_initial_batch"))
    if len(runs) == 1 and lines and fixed:
        reference = points([0.0, lines[0].curve.x.max()], [0.0, fixed])
        label = f"batch {count(initial)} throughout"
        lines = [Line(lines[0].curve, lines[0].colour, label="this run")]
        lines.append(Line(reference, series(1), DASHES[1], label))
        caption += " Dashed: what the initial batch would have needed for the same samples."
    return Drawing(
        "updates", "Updates", "Updates so far", caption, "No update has been recorded.",
        lines, _zero_axis, count,
    )  # fmt: skip


def _rate(runs: list[Run], summaries: list[Summary]) -> Drawing:
    return Drawing(
        "learning-rate", "Learning rate", "Learning rate",
        "Learning rate at the end of each logging window.",
        "No learning rate has been recorded.",
        _per_run(runs, "lr", extremes), _zero_axis,
    )  # fmt: skip


def _throughput(runs: list[Run], summaries: list[Summary]) -> Drawing:
    lines = _per_run(runs, "images_per_sec", means)
    median = summaries[0].of("images_per_sec_median")
    caption = "Images per second of all ranks in each logging window, warm-up included."
    if len(runs) == 1 and lines and median is not None:
        shape = lines[0].curve
        level = points([shape.x.min(), shape.x.max()], [median, median])
        label = f"median {general(median)}"
        lines = [Line(shape, lines[0].colour, label="windows", width=1.3)]
        lines.append(Line(level, series(1), DASHES[1], label))
        caption += " Dashed: the median without warm-up."
    return Drawing(
        "images-per-second", "Images per second", "Images/s", caption,
        "No throughput has been recorded.", lines, _zero_axis,
    )  # fmt: skip


def _noise(runs: list[Run], summaries: list[Summary]) -> Drawing:
    lines, alone = [], len(runs) == 1
    for run in runs:
        scales = means(noise_scales(run), _limit(runs))
        if not len(scales):
            continue
        colour, dash = look(run)
        lines.append(Line(scales, colour, dash, "noise scale" if alone else run.label))
        shape = extremes(steps(run.columns["epoch"], run.columns["global_batch"]), _limit(runs))
        batch = Line(shape, colour, dash, None, staircase=True, width=0.8)
        if alone:
            batch = Line(shape, series(1), DASHES[1], "global batch", staircase=True)
        lines.append(_positive(batch))
    return Drawing(
        "noise-scale", "Gradient noise scale", "Samples (log₂ scale)",
        "The gradient noise scale tr(Σ)/‖G‖², smoothed, beside the global batch"
        f"{'' if alone else ' (thin)'}. While the batch is well below the scale, a larger one "
        "saves updates almost in proportion; well above it, hardly any (McCandlish et al. 2018).",
        "No noise scale has been measured.", lines, _log2_axis,
        over=EPOCHS, section="statistics",
    )  # fmt: skip


def _distance(runs: list[Run], summaries: list[Summary]) -> Drawing:
    lines, fits, alone = [], [], len(runs) == 1
    caption = "L2 distance of the weights from the initial ones at the end of each logging window."
    for run, summary in zip(runs, summaries, strict=True):
        full = distances(run)
        if not len(full):
            continue
        shape = log_spaced(full, _limit(runs))
        if len(shape.x) < len(full.x):
            caption = f"{caption.partition(' Points')[0]} Points are drawn evenly over log t."
        colour, dash = look(run)
        marker = "o" if len(shape.x) <= 40 else None
        lines.append(Line(shape, colour, dash, "measured" if alone else run.label, marker=marker))
        a, b, r2 = (summary.of(f"distance_log_{name}") for name in ("intercept", "slope", "r2"))
        if a is None or b is None or r2 is None:
            continue
        label = f"a + b ln t, R² {r2:.4f}" if alone else None
        fit = _fitted(a, b, full.x[0], full.x[-1])
        lines.append(Line(fit, series(1) if alone else colour, DASHES[1], label, width=1.1))
        name = "" if alone else f"run {run.number}: "
        formula = f"{'−' * (a < 0)}{general(abs(a))} {'−' if b < 0 else '+'} {general(abs(b))} ln t"
        fits.append(f"{name}{formula}, R² = {r2:.4f}")
    if fits:
        more = f"; and {len(fits) - LEGEND_RUNS} more" if len(fits) > LEGEND_RUNS else ""
        caption += (
            f" {'Dashed' if alone else 'Thin'}: least squares over all windows, "
            f"{'; '.join(fits[:LEGEND_RUNS])}{more}. "
            "A straight line here is ultra-slow diffusion (Hoffer et al. 2017)."
        )
    return Drawing(
        "distance-from-init", "Distance from the initial weights", "‖w − w₀‖", caption,
        "No distance has been measured.", lines, _zero_axis,
        over=LOG_UPDATES, section="statistics",
    )  # fmt: skip


def _fitted(a: float, b: float, low: float, high: float) -> Curve:
    """a + b · ln t from ``low`` to ``high``, as far as it is a distance: not below zero."""
    ends = [a + b * math.log(t) for t in (low, high)]
    if min(ends) >= 0 or max(ends) <= 0:
        return points([low, high], ends)
    root = math.exp(-a / b)
    return points([root, high], [0.0, ends[1]]) if b > 0 else points([low, root], [ends[0], 0.0])


def _positive(line: Line) -> Line:
    """A line for a logarithmic axis: points at or below zero are damage and left out."""
    kept = line.curve.at(line.curve.y > 0)
    return replace(line, curve=replace(kept, source_points=len(kept)))


def _render(drawing: Drawing, runs: list[Run]) -> Figure:
    lines = [line for line in drawing.lines if len(line.curve)]
    if not lines:
        return Figure(drawing.key, drawing.title, drawing.absent, section=drawing.section)
    labelled = [line for line in lines if line.label] if len(lines) > 1 else []
    rows = math.ceil(len(runs) / 2) if 1 < len(runs) <= LEGEND_RUNS else 0
    marks = _marks(runs[0], drawing.over) if len(runs) == 1 else Marks()

    def draw(canvas: Canvas) -> None:
        axes = canvas.add_subplot()
        for line in lines:
            plot(axes, line)
        axes.set_title(drawing.axis, loc="left")
        _axes(axes, drawing.over)
        drawing.arrange(axes, lines)
        marks.draw(axes)
        if labelled and len(runs) <= LEGEND_RUNS:
            _legend(canvas, axes, labelled, above=len(runs) > 1)

    notes = marks.note
    if labelled and len(runs) > LEGEND_RUNS:
        notes += " Lines as in the table of runs."
    return render(
        Picture(
            key=drawing.key,
            title=drawing.title,
            caption=drawing.caption + _thinning(lines) + notes,
            description=_describe(drawing, lines),
            header=("line", drawing.over.label.lower(), drawing.axis.lower(), "lowest", "highest"),
            rows=[row for line in lines for row in _rows(line)],
            draw=draw,
            height=240 + 17 * rows,
            section=drawing.section,
        )
    )


def _rows(line: Line) -> list[tuple[str | float | None, ...]]:
    shape = line.curve
    bounds = [[None] * len(shape) if b is None else b.tolist() for b in (shape.low, shape.high)]
    name = clean(line.label or "")
    columns = (shape.x.tolist(), shape.y.tolist(), *bounds)
    return [(name, _whole(x), *rest) for x, *rest in zip(*columns, strict=True)]


def _whole(x: float) -> float:
    return int(x) if x.is_integer() else x


def plot(axes: Axes, line: Line) -> None:
    shape = line.curve
    axes.plot(
        shape.x,
        shape.y,
        color=line.colour,
        linestyle=line.dash,
        linewidth=line.width,
        drawstyle="steps-pre" if line.staircase else "default",
        marker=line.marker or ("o" if len(shape.x) == 1 else ""),
        markersize=3.5,
    )
    if shape.low is not None and shape.high is not None:
        axes.fill_between(shape.x, shape.low, shape.high, color=line.colour, alpha=0.2, lw=0)


def _legend(canvas: Canvas, axes: Axes, lines: list[Line], above: bool) -> None:
    """Names of runs in rows above the title; the two lines of a single run beside it."""
    handles = [
        Line2D([], [], color=line.colour, linestyle=line.dash, marker=line.marker or "", ms=3.5)
        for line in lines
    ]
    names = [clean(line.label, 26) for line in lines]
    if above:
        canvas.legend(handles, names, loc="outside upper left", ncols=2, columnspacing=1.4)
    else:
        axes.legend(
            handles, names, loc="lower right", bbox_to_anchor=(1, 1), ncols=2,
            borderaxespad=0.2, borderpad=0.2, columnspacing=1.2,
        )  # fmt: skip


@dataclass(frozen=True)
class Marks:
    """Where stages begin and where attempts resume, and what the marks mean."""

    stages: tuple[float, ...] = ()
    resumed: tuple[float, ...] = ()

    @property
    def note(self) -> str:
        text = " Dotted lines: stages begin." if self.stages else ""
        return text + (" Triangles: the run was resumed." if self.resumed else "")

    def draw(self, axes: Axes) -> None:
        for place in self.stages:
            axes.axvline(place, color=INK, linewidth=0.6, linestyle=(0, (1, 3)), zorder=0.5)
        axes.plot(
            self.resumed, [0.0] * len(self.resumed), transform=axes.get_xaxis_transform(),
            clip_on=False, linestyle="", marker="^", markersize=6, color=INK,
        )  # fmt: skip


def _marks(run: Run, over: Abscissa) -> Marks:
    """As far as they are few enough to be told apart."""
    begun = [over.of(e, run) for e in run.events("stage")]
    stages = sorted({s for s in begun if s and (s > 0 or not over.log)})
    again = [over.of(e, run) for e in run.events("resume")]
    resumed = sorted({s for s in again if s is not None and (s > 0 or not over.log)})
    return Marks(
        tuple(stages) if len(stages) <= 24 else (), tuple(resumed) if len(resumed) <= 100 else ()
    )


def _thinning(lines: list[Line]) -> str:
    most = max((line.curve for line in lines if line.curve.thinned), default=None,
               key=lambda c: c.source_points)  # fmt: skip
    if most is None:
        return ""
    if most.low is not None:
        return (
            f" Drawn as the mean of {count(len(most.x))} equal groups of the "
            f"{count(most.source_points)} windows; the band spans their lowest to highest value."
        )
    return (
        f" Drawn with {count(len(most.x))} of {count(most.source_points)} points: "
        "the lowest and highest of each stretch."
    )


def _axes(axes: Axes, over: Abscissa) -> None:
    axes.set_xlabel(over.label)
    axes.margins(x=0.02)
    if over.log:
        axes.set_xscale("log")
        axes.xaxis.set_minor_formatter(NullFormatter())
        low, high = axes.get_xlim()
        axes.xaxis.set_major_locator(LogLocator(subs=(1.0,) if high / low > 100 else (1, 2, 5)))
    else:
        axes.xaxis.set_major_locator(MaxNLocator(6))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: short(value)))
    axes.xaxis.grid(False)
    axes.yaxis.set_major_locator(MaxNLocator(5))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: short(value)))


def short(value: float) -> str:
    """A tick label: 1500000 as 1.5M."""
    for size, unit in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if size <= abs(value) < 1e15:
            return f"{value / size:.4g}{unit}"
    return f"{value:.4g}"


def _percent_axis(axes: Axes, lines: list[Line]) -> None:
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{100 * value:.4g}"))


def _zero_axis(axes: Axes, lines: list[Line]) -> None:
    lowest, highest = spread([line.curve for line in lines]) or (0.0, 1.0)
    if lowest >= 0 and highest > 0:
        axes.set_ylim(bottom=0)


def _loss_axis(axes: Axes, lines: list[Line]) -> None:
    """Logarithmic when one scale cannot show both the start and the end."""
    lowest, highest = spread([line.curve for line in lines]) or (0.0, 1.0)
    if lowest > 0 and highest / lowest > 50:
        axes.set_yscale("log")
        wide = highest / lowest > 1e4
        axes.yaxis.set_major_locator(LogLocator(subs=(1.0,) if wide else (1.0, 3.0)))
        axes.yaxis.set_minor_locator(NullLocator())
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axes.set_title("Loss, nats (log scale)", loc="left")
    else:
        _zero_axis(axes, lines)


def _log2_axis(axes: Axes, lines: list[Line]) -> None:
    lowest, highest = spread([line.curve for line in lines]) or (1.0, 2.0)
    low, high = math.floor(math.log2(lowest)), math.ceil(math.log2(highest))
    high = max(high, low + 1)
    stride = max(1, math.ceil((high - low) / 8))
    axes.set_yscale("log", base=2)
    axes.set_ylim(2.0 ** (low - 0.3), 2.0 ** (high + 0.3))
    axes.yaxis.set_major_locator(FixedLocator([2.0**i for i in range(low, high + 1, stride)]))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.4g}"))


def _describe(drawing: Drawing, lines: list[Line]) -> str:
    """A figure in words, for those who hear the page."""
    parts = []
    for line in lines[:LEGEND_RUNS]:
        values = line.curve.y
        name = f"{clean(line.label, 60)}: " if line.label and len(lines) > 1 else ""
        first, last, low, high = (
            drawing.show(float(v)) for v in (values[0], values[-1], values.min(), values.max())
        )
        parts.append(f"{name}from {first} to {last}; lowest {low}, highest {high}.")
    more = f" And {len(lines) - LEGEND_RUNS} more." if len(lines) > LEGEND_RUNS else ""
    over = drawing.over.label.partition(" (")[0].lower()
    return f"{drawing.title} over {over}. " + " ".join(parts) + more
