"""The figures: SVG with real text, one copy for the page and one that stands alone.

matplotlib draws with stand-in colours. In the page's copy they become CSS variables, so that light,
dark and print are the style sheet's business; in the file beside the page they become the light
palette, for slides and papers. Nothing in an SVG depends on the clock, the machine's fonts or the
user's matplotlib settings, so equal records give equal bytes.
"""

from __future__ import annotations

import io
import math
import re
import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any
from xml.etree import ElementTree

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.backends.backend_svg import FigureCanvasSVG
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

from harness.records import Record
from harness.report.curves import Curve, curve, extremes, log_spaced, means, spread, steps
from harness.report.fields import Series, clean, count, general, number, percent, pick
from harness.report.runs import Run
from harness.report.summary import Summary, distances, noise_scales

Dash = Any  # matplotlib's types of a line style differ between its releases

# Okabe and Ito's colours, safe for every common colour vision. Yellow is too pale on white; dark
# pages get the paler ones (style.css). Line styles repeat what colours say.
PALETTE = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#1b1f24")
DASHES: tuple[Dash, ...] = (
    *((0, ()), (0, (5, 1.6)), (0, (1.2, 1.4)), (0, (6, 1.6, 1.2, 1.6))),
    *((0, (8, 3)), (0, (3, 1.2, 1.2, 1.2, 1.2, 1.2)), (0, (2.5, 2.5))),
)
LEGEND_RUNS = 8  # beyond this the summary table is the legend
POINTS = 2000  # of a line of one run; all lines of a figure together get TOTAL_POINTS
TOTAL_POINTS = 12_000

_INK, _GRID = "#010203", "#040506"
_STAND_INS = {
    _INK: ("var(--ink)", "#1b1f24"),
    _GRID: ("var(--grid)", "#d5d9de"),
    **{f"#0a0b{i:02x}": (f"var(--series-{i})", colour) for i, colour in enumerate(PALETTE)},
}
_FONT = "system-ui, -apple-system, 'Segoe UI', 'Liberation Sans', Arial, sans-serif"
_SVG, _XLINK = "http://www.w3.org/2000/svg", "http://www.w3.org/1999/xlink"
_SETTINGS: Any = {
    "svg.fonttype": "none",
    "svg.hashsalt": "harness-report",
    "text.parse_math": False,
    "font.family": ["DejaVu Sans"],
    "font.size": 11.5,
    "axes.titlesize": 12,
    "axes.titlepad": 8,
    "axes.edgecolor": _INK,
    "axes.labelcolor": _INK,
    "axes.linewidth": 0.8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": _GRID,
    "grid.linewidth": 0.7,
    "text.color": _INK,
    "xtick.color": _INK,
    "ytick.color": _INK,
    "lines.linewidth": 1.7,
    "lines.solid_capstyle": "round",
    "legend.frameon": False,
    "legend.fontsize": 11,
    "legend.handlelength": 2.4,
}


@dataclass(frozen=True)
class Figure:
    """A figure of the page; without data there is a caption that says so and no drawing."""

    key: str
    title: str
    caption: str
    inline: str | None = None
    file: bytes | None = None
    section: str = "curves"


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


def draw_all(runs: list[Run], summaries: list[Summary]) -> list[Figure]:
    """Every figure of the report, in reading order."""
    plans = (_accuracy, _loss, _batch, _updates, _rate, _throughput, _noise, _distance)
    drawings = [plan(runs, summaries) for plan in plans]
    with mpl.rc_context(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # glyphs that the layout font lacks: the browser's has them
        mpl.rcdefaults()
        mpl.rcParams.update(_SETTINGS)
        return [_render(drawing, runs) for drawing in drawings]


def swatch(run: Run) -> dict[str, str]:
    """A run's line as SVG attributes, for the table of runs."""
    colour, (_, pattern) = look(run)
    dashes = " ".join(f"{1.7 * part:.1f}" for part in pattern)
    return {"stroke": _STAND_INS[colour][0], "dashes": dashes or "none"}


def look(run: Run) -> tuple[str, Dash]:
    """The stand-in colour and the dash pattern of a run."""
    place = run.number - 1
    turn = place // len(PALETTE)
    return _series(place), DASHES[(place + turn) % len(DASHES)]


def _series(place: int) -> str:
    return f"#0a0b{place % len(PALETTE):02x}"


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
    return [line for line in lines if line.curve.x]


def _of_evaluations(run: Run, field: str, limit: int) -> Curve:
    seen: Series = [e.samples_seen for e in run.evaluations]
    values: Series = [getattr(e, field) for e in run.evaluations]
    return extremes(curve(seen, values), limit)


def _accuracy(runs: list[Run], summaries: list[Summary]) -> Drawing:
    lines = []
    for run in runs:
        shape = _of_evaluations(run, "accuracy", _limit(runs))
        marker = "o" if len(shape.x) <= 40 else None
        lines.append(Line(shape, *look(run), run.label, marker=marker))
    what = "Accuracy on the whole test set at each evaluation."
    return Drawing(
        "accuracy", "Test accuracy", "Test accuracy, %", what, "No evaluation has been recorded.",
        [line for line in lines if line.curve.x], _percent_axis, percent,
    )  # fmt: skip


def _loss(runs: list[Run], summaries: list[Summary]) -> Drawing:
    lines = _per_run(runs, "loss", means)
    caption = "Training loss, averaged over each logging window."
    if len(runs) == 1:
        lines = [Line(line.curve, line.colour, label="training") for line in lines]
        test = _of_evaluations(runs[0], "loss", POINTS)
        if test.x:
            marker = "o" if len(test.x) <= 40 else None
            lines.append(Line(test, _series(1), DASHES[1], "test", marker=marker))
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
        reference = Curve([0.0, max(lines[0].curve.x)], [0.0, fixed])
        label = f"batch {count(initial)} throughout"
        lines = [Line(lines[0].curve, lines[0].colour, label="this run")]
        lines.append(Line(reference, _series(1), DASHES[1], label))
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
        level = Curve([min(shape.x), max(shape.x)], [median, median])
        label = f"median {general(median)}"
        lines = [Line(shape, lines[0].colour, label="windows", width=1.3)]
        lines.append(Line(level, _series(1), DASHES[1], label))
        caption += " Dashed: the median without warm-up."
    return Drawing(
        "images-per-second", "Images per second", "Images/s", caption,
        "No throughput has been recorded.", lines, _zero_axis,
    )  # fmt: skip


def _noise(runs: list[Run], summaries: list[Summary]) -> Drawing:
    lines, alone = [], len(runs) == 1
    for run in runs:
        scales = means(noise_scales(run), _limit(runs))
        if not scales.x:
            continue
        colour, dash = look(run)
        lines.append(Line(scales, colour, dash, "noise scale" if alone else run.label))
        shape = extremes(steps(run.columns["epoch"], run.columns["global_batch"]), _limit(runs))
        batch = Line(shape, colour, dash, None, staircase=True, width=0.8)
        if alone:
            batch = Line(shape, _series(1), DASHES[1], "global batch", staircase=True)
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
        if not full.x:
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
        lines.append(Line(fit, _series(1) if alone else colour, DASHES[1], label, width=1.1))
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
        return Curve([low, high], ends)
    root = math.exp(-a / b)
    return Curve([root, high], [0.0, ends[1]]) if b > 0 else Curve([low, root], [ends[0], 0.0])


def _positive(line: Line) -> Line:
    """A line for a logarithmic axis: points at or below zero are damage and left out."""
    kept = [(x, y) for x, y in zip(line.curve.x, line.curve.y, strict=True) if y > 0]
    shape = Curve([x for x, _ in kept], [y for _, y in kept], source_points=len(kept))
    return replace(line, curve=shape)


def _render(drawing: Drawing, runs: list[Run]) -> Figure:
    lines = [line for line in drawing.lines if line.curve.x]
    if not lines:
        return Figure(drawing.key, drawing.title, drawing.absent, section=drawing.section)
    labelled = [line for line in lines if line.label] if len(lines) > 1 else []
    rows = math.ceil(len(runs) / 2) if 1 < len(runs) <= LEGEND_RUNS else 0
    canvas = Canvas(figsize=(460 / 72, (262 + 17 * rows) / 72), layout="constrained")
    FigureCanvasSVG(canvas)
    axes = canvas.add_subplot()
    for line in lines:
        _plot(axes, line)
    axes.set_title(drawing.axis, loc="left")
    _axes(axes, drawing.over)
    drawing.arrange(axes, lines)
    notes = _mark_stages(axes, runs[0], drawing.over) if len(runs) == 1 else ""
    if labelled and len(runs) <= LEGEND_RUNS:
        _legend(canvas, axes, labelled, above=len(runs) > 1)
    elif labelled:
        notes += " Lines as in the table of runs."
    out = io.BytesIO()
    canvas.savefig(out, format="svg", transparent=True, metadata={"Date": None})
    inline, file = _finish(out.getvalue(), drawing, _describe(drawing, lines))
    caption = drawing.caption + _thinning(lines) + notes
    return Figure(drawing.key, drawing.title, caption, inline, file, drawing.section)


def _plot(axes: Axes, line: Line) -> None:
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


def _mark_stages(axes: Axes, run: Run, over: Abscissa) -> str:
    """Thin lines where stages begin and triangles where attempts begin; returns what they mean."""
    begun = [over.of(e, run) for e in run.events("stage")]
    inner = sorted({s for s in begun if s and (s > 0 or not over.log)})
    again = [over.of(e, run) for e in run.events("resume")]
    resumed = sorted({s for s in again if s is not None and (s > 0 or not over.log)})
    text = ""
    if inner and len(inner) <= 24:
        for place in inner:
            axes.axvline(place, color=_INK, linewidth=0.6, linestyle=(0, (1, 3)), zorder=0.5)
        text += " Dotted lines: stages begin."
    if resumed and len(resumed) <= 100:
        axes.plot(
            resumed, [0.0] * len(resumed), transform=axes.get_xaxis_transform(), clip_on=False,
            linestyle="", marker="^", markersize=6, color=_INK,
        )  # fmt: skip
        text += " Triangles: the run was resumed."
    return text


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
        ends = f"from {drawing.show(values[0])} to {drawing.show(values[-1])}"
        extent = f"lowest {drawing.show(min(values))}, highest {drawing.show(max(values))}"
        parts.append(f"{name}{ends}; {extent}.")
    more = f" And {len(lines) - LEGEND_RUNS} more." if len(lines) > LEGEND_RUNS else ""
    over = drawing.over.label.partition(" (")[0].lower()
    return f"{drawing.title} over {over}. " + " ".join(parts) + more


def _finish(svg: bytes, drawing: Drawing, description: str) -> tuple[str, bytes]:
    """The page's copy and the stand-alone copy of what matplotlib wrote."""
    copies = []
    for themed in (True, False):
        root = ElementTree.fromstring(svg)  # noqa: S314 - our own output, not a user's
        _restyle(root, themed)
        if themed:
            _prefix_ids(root, f"{drawing.key}-")
            root.attrib.pop("width"), root.attrib.pop("height")
        _name(root, drawing, description)
        copies.append(ElementTree.tostring(root, encoding="unicode"))
    return copies[0], f'<?xml version="1.0" encoding="UTF-8"?>\n{copies[1]}\n'.encode()


def _restyle(root: ElementTree.Element, themed: bool) -> None:
    """Drop metadata and the global style rule; put in the final colours and fonts."""
    for parent in list(root.iter()):
        for child in list(parent):
            if child.tag in (f"{{{_SVG}}}metadata", f"{{{_SVG}}}style"):
                parent.remove(child)
    root.set("style", "stroke-linejoin: round; stroke-linecap: butt")
    for element in root.iter():
        for key in ("style", "fill", "stroke"):
            if key in element.attrib:
                value = re.sub(r"(font:[^;']*)'DejaVu Sans'", rf"\1{_FONT}", element.attrib[key])
                for stand_in, (variable, colour) in _STAND_INS.items():
                    value = value.replace(stand_in, variable if themed else colour)
                element.attrib[key] = value


def _prefix_ids(root: ElementTree.Element, prefix: str) -> None:
    """Make ids unique in a page that holds several figures."""
    for element in root.iter():
        for key, value in list(element.attrib.items()):
            if key == "id":
                element.attrib[key] = prefix + value
            elif key == f"{{{_XLINK}}}href" and value.startswith("#"):
                element.attrib[key] = f"#{prefix}{value[1:]}"
            elif "url(#" in value:
                element.attrib[key] = value.replace("url(#", f"url(#{prefix}")


def _name(root: ElementTree.Element, drawing: Drawing, description: str) -> None:
    root.set("role", "img")
    root.set("aria-label", description)
    title = ElementTree.Element(f"{{{_SVG}}}title")
    title.text = drawing.title
    root.insert(0, title)


ElementTree.register_namespace("", _SVG)
ElementTree.register_namespace("xlink", _XLINK)
