"""The four figures of the first screen: scaling, time, goodput, training."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure as Canvas
from matplotlib.ticker import FixedLocator, FuncFormatter, MaxNLocator, NullLocator

from harness.report.columns import Array
from harness.report.curves import bins, curve, extremes, means
from harness.report.fields import clean, count, general, percent, sentence, short_time
from harness.report.figures import ONE_COUNT, OPENING, Line, evaluations_of, look, plot, short
from harness.report.goodput import Goodputs, Progress
from harness.report.runs import Run
from harness.report.scaling import Series
from harness.report.scaling_view import Modelled
from harness.report.svg import DASHES, INK, PAPER, Figure, Picture, render, series
from harness.report.timing import Timing, order, phase_name, phases_of

LINES = 6  # of a figure; the tables have the others
BARS = 12
STRETCHES = 120  # of a run, each with its own shares of time
CURVE = 1200  # points of a training curve
HEIGHT = 262.0
MARKERS = "osD^vP"


def draw_opening(
    measured: list[tuple[Series, Modelled | str]],
    timings: list[Timing],
    goodputs: list[Goodputs],
    progress: list[tuple[Run, Progress]],
    runs: list[Run],
) -> list[Figure]:
    """The figures in reading order; within ``svg.settings``. Runs that make no series have their
    throughput over samples seen in place of the first (``figures.draw_curves``)."""
    return [
        *([scaling(measured)] if measured or not runs else []),
        over_the_run(runs[0]) if _one_bar(runs, timings) else where_time_goes(timings),
        goodput(goodputs) if goodputs else progress_over_run(progress),
        training(runs),
    ]


def _one_bar(runs: list[Run], timings: list[Timing]) -> bool:
    return len(runs) == 1 and len(timings) == 1


# ---------------------------------------------------------------- throughput and efficiency


def scaling(measured: list[tuple[Series, Modelled | str]]) -> Figure:
    key, title = "scaling", "Throughput and efficiency against ranks"
    if not measured:
        return Figure(key, title, f"No drawing: {ONE_COUNT}", section=OPENING)
    shown = measured[:LINES]
    alone = len(shown) == 1

    def draw(canvas: Canvas) -> None:
        above, below = canvas.subplots(2, 1, sharex=True, height_ratios=(3, 2))
        for place, (one, model) in enumerate(shown):
            colour = series(place)
            _scaling_lines(above, below, one, model, colour, MARKERS[place], alone)
        counts = [p.ranks for one, _ in shown for p in one.points]
        for _, model in shown:
            counts += model.ranks if isinstance(model, Modelled) else []
        wide = _rank_axis(below, counts)
        if wide:
            _log2(above)  # the ideal is a straight line then, as it is without logarithms
        else:
            _zero(above)
        below.set_ylim(0, max(1.08, below.get_ylim()[1]))
        below.yaxis.set_major_locator(FixedLocator([0, 0.25, 0.5, 0.75, 1]))
        below.yaxis.set_major_formatter(FuncFormatter(lambda v, _: f"{100 * v:.0f}"))
        above.set_title("Images/s (log₂ scale)" if wide else "Images/s", loc="left")
        below.set_title("Efficiency, %", loc="left")
        _legend(canvas, above)

    return render(
        Picture(
            key, title, _scaling_caption(measured), _scaling_words(shown),
            ("series", "ranks", "images/s", "low", "high", "ideal images/s", "speed-up",
             "efficiency", "efficiency low", "efficiency high", "model images/s",
             "model low", "model high"),
            [row for one, model in measured for row in _scaling_rows(one, model)],
            draw, HEIGHT + 40 + (17 * math.ceil((len(shown) + 1) / 2)), OPENING,
        )
    )  # fmt: skip


def _scaling_lines(
    above: Axes, below: Axes, one: Series, model: Modelled | str, colour: str, marker: str,
    alone: bool,
) -> None:  # fmt: skip
    ranks = np.array([p.ranks for p in one.points], dtype=float)
    rates = np.array([p.images_per_sec for p in one.points])
    name = "measured" if alone else clean(one.short, 22)
    above.errorbar(
        ranks, rates, yerr=_bars([(p.low, p.images_per_sec, p.high) for p in one.points]),
        color=colour, marker=marker, ms=5, capsize=3, lw=1.7, label=name,
        ls="" if isinstance(model, Modelled) else "-",
    )  # fmt: skip
    upto = model.ranks[-1] if isinstance(model, Modelled) else ranks[-1]
    ends = np.array([ranks[0], upto])
    ideal = one.first.images_per_sec / one.first.ranks * ends
    above.plot(ends, ideal, color=INK, lw=1, ls=DASHES[2], label="ideal" if alone else None)
    scaled = one.scaled()
    below.errorbar(
        ranks, [s.efficiency for s in scaled],
        yerr=_bars([(s.efficiency_low, s.efficiency, s.efficiency_high) for s in scaled]),
        color=colour, marker=marker, ms=5, capsize=3, lw=1.7,
    )  # fmt: skip
    below.axhline(1.0, color=INK, lw=1, ls=DASHES[2])
    if isinstance(model, Modelled):
        above.plot(model.ranks, model.images_per_sec, color=colour, lw=1.4, ls=DASHES[1],
                   label="model" if alone else None)  # fmt: skip
        above.fill_between(model.ranks, model.low, model.high, color=colour, alpha=0.18, lw=0)
        for axes in (above, below):
            axes.axvline(model.measured_up_to, color=INK, lw=0.8, ls=DASHES[2], alpha=0.5)


def _bars(entries: list[tuple[float | None, float, float | None]]) -> Array:
    """Distances below and above; none where there is no interval."""
    return np.array(
        [
            [math.nan if low is None else max(value - low, 0.0) for low, value, _ in entries],
            [math.nan if high is None else max(high - value, 0.0) for _, value, high in entries],
        ]
    )


def _scaling_rows(one: Series, model: Modelled | str) -> list[tuple[Any, ...]]:
    by_model: dict[int, tuple[float, float, float]] = {}
    if isinstance(model, Modelled):
        found = zip(model.images_per_sec, model.low, model.high, strict=True)
        by_model = dict(zip(model.ranks, found, strict=True))
    alone = one.first.images_per_sec / one.first.ranks
    nothing = (None, None, None)
    measured = [
        (clean(one.label), s.point.ranks, s.point.images_per_sec, s.point.low, s.point.high,
         alone * s.point.ranks, s.speedup, s.efficiency, s.efficiency_low, s.efficiency_high,
         *by_model.pop(s.point.ranks, nothing))
        for s in one.scaled()
    ]  # fmt: skip
    further = [
        (clean(one.label), ranks, *nothing, alone * ranks, *nothing, None, *predicted)
        for ranks, predicted in by_model.items()
    ]
    return [*measured, *further]


def _scaling_caption(measured: list[tuple[Series, Modelled | str]]) -> str:
    first, model = measured[0]
    intervals = [p.confidence for one, _ in measured for p in one.points if p.low is not None]
    bars = (
        f" Bars: {100 * (intervals[0] or 0.95):g} % intervals over repeats."
        if intervals
        else " No intervals: no point was repeated."
    )
    dotted = f"Dotted: ideal, from {count(first.first.ranks)} rank{'s' * (first.first.ranks > 1)}."
    fitted = (
        " Dashed: the model, with its band; beyond the upright line, at "
        f"{count(model.measured_up_to)} ranks, nothing was measured."
        if isinstance(model, Modelled)
        else f" Model not fitted: {model}."
    )
    left = len(measured) - LINES
    more = f" {count(left)} more series are in the table." if left > 0 else ""
    kinds = " and ".join(sorted({one.mode for one, _ in measured}, reverse=True))
    return f"{sentence(kinds)} scaling. {dotted}{bars}{fitted}{more}"


def _scaling_words(shown: list[tuple[Series, Modelled | str]]) -> str:
    parts = []
    for one, _ in shown:
        told = ", ".join(
            f"{count(s.point.ranks)}: {general(s.point.images_per_sec)} "
            f"(efficiency {percent(s.efficiency)})"
            for s in one.scaled()[:12]
        )
        parts.append(f"{clean(one.label, 60)}, images per second by ranks: {told}.")
    return "Throughput and efficiency against ranks. " + " ".join(parts)


def _rank_axis(axes: Axes, ranks: list[int], log: bool = True) -> bool:
    """A tick for every rank count that was measured, as far as there is room; whether it is
    logarithmic, as with ``log`` it is where the counts lie far apart."""
    counts = sorted(set(ranks))
    wide = log and counts[-1] / counts[0] > 8
    if wide:
        axes.set_xscale("log", base=2)
    room = (counts[-1] - counts[0]) / 12
    if wide:
        ticks = counts[:: math.ceil(len(counts) / 9)]
    else:  # from the largest down, none closer to the next than the labels allow
        ticks = []
        for one in reversed(counts):
            if not ticks or ticks[-1] - one >= room:
                ticks.append(one)
    axes.xaxis.set_major_locator(FixedLocator(ticks))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: short(value)))
    axes.set_xlabel("Ranks (log₂ scale)" if wide else "Ranks")
    return wide


def _log2(axes: Axes) -> None:
    axes.set_yscale("log", base=2)
    low, high = (math.log2(v) for v in axes.get_ylim())
    stride = max(1, math.ceil((high - low) / 5))
    ticks = [2.0**i for i in range(math.ceil(low), math.floor(high) + 1, stride)]
    axes.yaxis.set_major_locator(FixedLocator(ticks))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.4g}"))


def _zero(axes: Axes) -> None:
    axes.set_ylim(bottom=0)
    axes.yaxis.set_major_locator(MaxNLocator(5))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: short(value)))


def _legend(canvas: Canvas, axes: Axes, columns: int = 2) -> None:
    handles, names = axes.get_legend_handles_labels()
    if names:
        canvas.legend(handles, names, loc="outside upper left", ncols=columns, columnspacing=1.4)


# ---------------------------------------------------------------- where the time goes


@dataclass(frozen=True)
class Part:
    """How a phase looks: one of Okabe and Ito's colours in light and dark, hatching where it is
    not work on samples, and a short name for the legend."""

    colour: str
    hatch: str
    name: str


_PARTS = {
    "data": Part("#e69f00", "///", "data"),
    "to_device": Part("#f0e442", "\\\\\\", "copying"),
    "forward": Part("#56b4e9", "", "forward"),
    "backward": Part("#0072b2", "", "backward"),
    "comm_exposed": Part("#cc79a7", "...", "communication"),
    "optimizer": Part("#009e73", "xxx", "optimizer"),
}


def _part(phase: str) -> Part:
    return _PARTS.get(phase) or Part("#999999", "", phase_name(phase))


def where_time_goes(timings: list[Timing]) -> Figure:
    key, title = "time", "Where the time goes"
    if not timings:
        return Figure(key, title, "No time by phase has been recorded.", section=OPENING)
    shown = timings[:BARS]
    phases = phases_of(shown)

    def draw(canvas: Canvas) -> None:
        axes = canvas.add_subplot()
        _stacked_bars(axes, shown, phases)
        _legend(canvas, axes, 3)

    left = len(timings) - BARS
    more = f" {count(left)} more are in the table." if left > 0 else ""
    caption = f"Shares of an update's time; beside each bar the time of one update.{more}"
    words = " ".join(
        f"{clean(t.label, 60)}: "
        + ", ".join(f"{phase_name(p)} {percent(t.share(p))}" for p in phases)
        + "."
        for t in shown
    )
    rows = [(clean(t.label), p, t.seconds.get(p), t.share(p)) for t in timings for p in phases]
    header = ("of", "phase", "seconds per update", "share")
    height = 150 + 26 * len(shown)
    return render(Picture(key, title, caption, f"{title}. {words}", header, rows, draw,
                          max(height, HEIGHT), OPENING))  # fmt: skip


def _stacked_bars(axes: Axes, shown: list[Timing], phases: list[str]) -> None:
    places = np.arange(len(shown))
    left = np.zeros(len(shown))
    for phase in phases:
        part = _part(phase)
        shares = np.array([timing.share(phase) for timing in shown])
        axes.barh(places, shares, 0.62, left=left, color=part.colour, hatch=part.hatch,
                  edgecolor=PAPER, lw=0.8, label=part.name)  # fmt: skip
        left += shares
    for place, timing in enumerate(shown):
        axes.text(1.01, place, short_time(timing.total), va="center", ha="left", fontsize=10)
    axes.set_yticks(places, [clean(timing.label, 18) for timing in shown])
    axes.invert_yaxis()
    axes.set_xlim(0, 1)
    axes.grid(visible=False, axis="y")
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{100 * value:.0f}"))
    axes.set_xlabel("Share of an update's time, %")


def over_the_run(run: Run) -> Figure:
    """Shares of time over samples seen, as a stack."""
    from harness.report.scaling import phase_table

    key, title = "time", "Where the time goes"
    names = run.columns.group("seconds")
    table, seen = phase_table(run)[run.timed], run.columns["samples_seen"][run.timed]
    known = ~(np.isnan(table).any(axis=1) | np.isnan(seen))
    table, seen = table[known], seen[known]
    if not len(seen) or not table.sum() > 0:
        return Figure(key, title, "No time by phase has been recorded.", section=OPENING)
    edges = bins(len(seen), STRETCHES)
    sums = np.add.reduceat(table, edges[:-1], axis=0)
    ends = seen[edges[1:] - 1]
    shares = sums / np.maximum(sums.sum(axis=1, keepdims=True), 1e-300)
    phases = order(name for name, spent in zip(names, table.sum(axis=0), strict=True) if spent)
    columns = {name: shares[:, names.index(name)] for name in phases}

    def draw(canvas: Canvas) -> None:
        axes = canvas.add_subplot()
        base = np.zeros(len(ends))
        for name in phases:
            part = _part(name)
            top = base + columns[name]
            axes.fill_between(_starts(ends), _held(base), _held(top),
                              facecolor=part.colour, hatch=part.hatch, edgecolor=PAPER,
                              lw=0.4, label=part.name)  # fmt: skip
            base = top
        axes.set_ylim(0, 1)
        axes.set_xlim(0, float(ends[-1]) or 1.0)
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{100 * value:.0f}"))
        axes.xaxis.set_major_locator(MaxNLocator(6))
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: short(value)))
        axes.set_title("Share of an update's time, %", loc="left")
        axes.set_xlabel("Samples seen")
        axes.grid(visible=False)
        _legend(canvas, axes, 3)

    whole = table.sum(axis=0) / table.sum()
    words = ", ".join(f"{phase_name(n)} {percent(float(whole[names.index(n)]))}" for n in phases)
    rows = [
        (int(end), phase, float(columns[phase][i]))
        for i, end in enumerate(ends.tolist())
        for phase in phases
    ]
    caption = f"Shares of an update's time over the run, in {count(len(ends))} stretches."
    return render(Picture(key, title, caption, f"{title}, over the whole run: {words}.",
                          ("samples seen, until", "phase", "share"), rows, draw,
                          HEIGHT + 34, OPENING))  # fmt: skip


def _held(values: Array) -> Array:
    """A staircase: each value at its stretch's begin and end."""
    return np.repeat(values, 2)


def _starts(ends: Array) -> Array:
    """Begin and end of each stretch."""
    return np.repeat(np.concatenate(([0.0], ends)), 2)[1:-1]


# ---------------------------------------------------------------- goodput


NO_NOISE = (
    "No gradient noise scale has been measured, so nothing tells how much of the throughput is "
    "progress. A training run measures it where each update has two micro-batches or more."
)


def goodput(found: list[Goodputs]) -> Figure:
    shown = found[:LINES]
    alone = len(shown) == 1

    def draw(canvas: Canvas) -> None:
        axes = canvas.add_subplot()
        for place, one in enumerate(shown):
            ranks = [p.ranks for p in one.series.points]
            name = clean(one.series.short, 22)
            axes.plot(ranks, [p.images_per_sec for p in one.series.points], color=series(place),
                      ls=DASHES[1], lw=1.3, label="throughput" if alone else None)  # fmt: skip
            axes.plot(ranks, one.goodput, color=series(place), marker=MARKERS[place], ms=5,
                      label="goodput" if alone else name)  # fmt: skip
            if one.knee is not None:
                axes.axvline(one.knee, color=series(place), lw=1, ls=DASHES[2],
                             label=f"knee at {count(one.knee)}" if alone else None)  # fmt: skip
        _rank_axis(axes, [p.ranks for one in shown for p in one.series.points], log=False)
        _zero(axes)
        axes.set_title("Images/s (dashed) and useful images/s", loc="left")
        _legend(canvas, axes)

    told = []
    for one in shown:
        knee = f"knee at {count(one.knee)} ranks" if one.knee else "no knee up to the most ranks"
        values = ", ".join(
            f"{count(p.ranks)}: {general(g)}"
            for p, g in list(zip(one.series.points, one.goodput, strict=True))[:12]
        )
        told.append(f"{clean(one.series.label, 60)}, goodput by ranks: {values}; {knee}.")
    caption = (
        f"Goodput: throughput × 1/(1 + batch/noise scale), noise scale {general(shown[0].noise)} "
        "(McCandlish et al. 2018). The knee (dotted): beyond it a further rank buys less than "
        "half of what one alone does."
    )
    rows = [
        (clean(one.series.label), p.ranks, p.global_batch, one.noise, p.images_per_sec, g)
        for one in found
        for p, g in zip(one.series.points, one.goodput, strict=True)
    ]
    return render(
        Picture(
            "goodput", "Goodput and the knee", caption, "Goodput against ranks. " + " ".join(told),
            ("series", "ranks", "global batch", "noise scale", "images/s", "useful images/s"),
            rows, draw, HEIGHT + 20, OPENING,
        )
    )  # fmt: skip


def progress_over_run(found: list[tuple[Run, Progress]]) -> Figure:
    """Throughput and goodput over samples seen, of runs that measured the noise scale."""
    key, title = "goodput", "Goodput and the knee"
    if not found:
        return Figure(key, title, NO_NOISE, section=OPENING)
    shown = found[:LINES]
    alone = len(shown) == 1
    lines = []
    for run, progress in shown:
        colour, dash = look(run)
        worth = means(curve(progress.samples, progress.efficiency), CURVE // len(shown))
        lines.append(Line(worth, colour, dash, run.label))

    def draw(canvas: Canvas) -> None:
        axes = canvas.add_subplot()
        for line in lines:
            plot(axes, line)
        axes.axhline(0.5, color=INK, lw=1, ls=DASHES[2])
        axes.set_ylim(0, 1)
        axes.xaxis.set_major_locator(MaxNLocator(6))
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: short(value)))
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{100 * value:.0f}"))
        axes.set_title("Goodput as a share of throughput, %", loc="left")
        axes.set_xlabel("Samples seen")
        if not alone:
            for line in lines:
                axes.plot([], [], color=line.colour, ls=line.dash, label=clean(line.label, 26))
            _legend(canvas, axes)

    caption = (
        "How much of the throughput is progress: 1/(1 + batch/noise scale), smoothed scale "
        "(McCandlish et al. 2018). Dotted: the knee, where the batch equals the noise scale and "
        "a sample is worth half of one in a small batch; below it, larger batches buy little."
    )
    told = " ".join(
        f"{run.label}: from {percent(float(p.efficiency[0]))} to "
        f"{percent(float(p.efficiency[-1]))}, lowest {percent(float(p.efficiency.min()))}."
        for run, p in shown
    )
    rows = [
        (clean(line.label or ""), int(x), y)
        for line in lines
        for x, y in zip(line.curve.x.tolist(), line.curve.y.tolist(), strict=True)
    ]
    return render(Picture(key, title, caption, f"Goodput over samples seen. {told}",
                          ("run", "samples seen", "goodput / throughput"), rows, draw,
                          HEIGHT, OPENING))  # fmt: skip


# ---------------------------------------------------------------- training


def training(runs: list[Run]) -> Figure:
    """Loss above, test accuracy below."""
    key, title = "training", "Training curves"
    limit = max(CURVE // max(len(runs), 1), 60)
    losses, accuracies = [], []
    for run in runs:
        colour, dash = look(run)
        loss = means(curve(run.columns["samples_seen"], run.columns["loss"]), limit)
        test = extremes(evaluations_of(run, "accuracy"), limit)
        marker = "o" if len(test) <= 40 else None
        losses.append(Line(loss, colour, dash, run.label))
        accuracies.append(Line(test, colour, dash, run.label, marker=marker))
    panels: list[tuple[str, list[Line], Callable[[float | None], str]]] = [
        (name, [line for line in lines if len(line.curve)], show)
        for name, lines, show in (
            ("Training loss, nats", losses, general),
            ("Test accuracy, %", accuracies, percent),
        )
    ]
    panels = [panel for panel in panels if panel[1]]
    if not panels:
        what = "No run was given" if not runs else "Neither loss nor accuracy has been recorded"
        return Figure(key, title, f"{what}: there are no training curves.", section=OPENING)

    def draw(canvas: Canvas) -> None:
        grid = canvas.subplots(len(panels), 1, sharex=True, squeeze=False)
        for axes, (name, lines, show) in zip(grid[:, 0], panels, strict=True):
            for line in lines:
                plot(axes, line)
            axes.set_title(name, loc="left")
            axes.yaxis.set_major_locator(MaxNLocator(4))
            if show is percent:
                axes.yaxis.set_major_formatter(FuncFormatter(lambda v, _: f"{100 * v:.4g}"))
            else:
                axes.set_ylim(bottom=min(0.0, axes.get_ylim()[0]))
        last = grid[-1, 0]
        last.set_xlabel("Samples seen")
        last.xaxis.set_major_locator(MaxNLocator(6))
        last.xaxis.set_major_formatter(FuncFormatter(lambda value, _: short(value)))
        if 1 < len(runs) <= LINES:
            for run in runs:
                colour, dash = look(run)
                last.plot([], [], color=colour, ls=dash, label=clean(run.label, 26))
            _legend(canvas, last)

    told = []
    for name, lines, show in panels:
        for line in lines[:LINES]:
            ends = f"from {show(float(line.curve.y[0]))} to {show(float(line.curve.y[-1]))}"
            told.append(f"{name.partition(',')[0]}, {clean(line.label, 60)}: {ends}.")
    rows = [
        (name.partition(",")[0].lower(), clean(line.label), int(x), y)
        for name, lines, _ in panels
        for line in lines
        for x, y in zip(line.curve.x.tolist(), line.curve.y.tolist(), strict=True)
    ]
    note = " Lines as in the table of runs." if len(runs) > LINES else ""
    caption = f"Loss in training and accuracy on the test set; more curves are below.{note}"
    return render(Picture(key, title, caption, f"{title}. {' '.join(told)}",
                          ("quantity", "run", "samples seen", "value"), rows, draw,
                          HEIGHT + (17 * math.ceil(len(runs) / 2) if len(runs) > 1 else 0),
                          OPENING))  # fmt: skip
