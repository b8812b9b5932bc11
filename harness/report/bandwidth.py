"""The figure of what probes found: bus bandwidth over message size."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure as Canvas
from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, NullLocator

from harness.probe_results import HOROVOD, OPERATIONS, Timing, bus_factor, shown_size
from harness.report.fields import clean, count, general
from harness.report.probes import Probe
from harness.report.svg import DASHES, Figure, Picture, render, series

KEY, TITLE = "bus-bandwidth", "Bus bandwidth over message size"
SECTION = "network"
LINES = 6  # of probes; the CSV has all
MARKERS = "osD^vP"
_TICKS = 6

Curve = tuple[str, list[Timing]]
"""A name, and timings by rising size."""


def bus_bandwidth(probes: list[Probe], section: str = SECTION) -> Figure:
    """Of one probe all operations, of several Horovod's allreduce; within ``svg.settings``."""
    alone = len(probes) == 1
    curves = _operations(probes[0]) if alone else _probes(probes)
    shown = curves[:LINES]
    if not shown:
        return Figure(KEY, TITLE, "No bandwidth between ranks was measured.", section=section)

    def draw(canvas: Canvas) -> None:
        axes = canvas.add_subplot()
        for place, (name, timings) in enumerate(shown):
            _line(axes, place, name, timings)
        _axes(axes, {timing.bytes for _, timings in shown for timing in timings})
        handles, names = axes.get_legend_handles_labels()
        canvas.legend(handles, names, loc="outside upper left", ncols=2, columnspacing=1.4)

    what = "Medians of the rounds, with a band from the lower to the upper quartile."
    whose = "" if alone else " Of each probe Horovod's allreduce of float32; the CSV has the rest."
    left = len(curves) - len(shown)
    more = f" {count(left)} more probes are in the CSV." if left else ""
    caption = (
        f"{what}{whose} Bus bandwidth: bytes of float32 a second × 2(n − 1)/n for an allreduce of "
        f"n ranks, × 1 for a broadcast (NVIDIA's nccl-tests).{more}"
    )
    words = " ".join(map(_words, shown))
    return render(
        Picture(
            KEY, TITLE, caption, f"{TITLE}. {words}",
            ("probe", "operation", "bytes", "ranks", "rounds", "bus GB/s", "lowest", "highest",
             "median seconds"),
            [row for probe in probes for row in _rows(probe)],
            draw, 262 + 17 * ((len(shown) + 1) // 2), section,
        )
    )  # fmt: skip


def _operations(probe: Probe) -> list[Curve]:
    found = [
        (operation.label, [t for t, _ in probe.timings if t.operation == operation])
        for operation in OPERATIONS
    ]
    return _drawable(found)


def _probes(probes: list[Probe]) -> list[Curve]:
    found = [
        (clean(probe.label, 26), [t for t, _ in probe.timings if t.operation == HOROVOD])
        for probe in probes
    ]
    return _drawable(found)


def _drawable(curves: Iterable[Curve]) -> list[Curve]:
    return [(name, timings) for name, timings in curves if timings and timings[0].ranks > 1]


def _gb(timing: Timing) -> tuple[float, float, float]:
    """Bus bandwidth in GB/s: of the median, of the slower and of the faster quartile."""
    factor = bus_factor(timing.operation.collective, timing.ranks) * timing.bytes / 1e9
    fast, middle, slow = timing.quartiles
    return factor / middle, factor / slow, factor / fast


def _line(axes: Axes, place: int, name: str, timings: list[Timing]) -> None:
    sizes = np.array([timing.bytes for timing in timings], dtype=float)
    middle, low, high = np.array([_gb(timing) for timing in timings]).T
    axes.plot(sizes, middle, color=series(place), ls=DASHES[place], marker=MARKERS[place], ms=4,
              label=name)  # fmt: skip
    axes.fill_between(sizes, low, high, color=series(place), alpha=0.13, lw=0)


def _axes(axes: Axes, found: set[int]) -> None:
    sizes = sorted(found)
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.xaxis.set_major_locator(FixedLocator(sizes[:: -(-len(sizes) // _TICKS)]))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: shown_size(round(value))))
    axes.xaxis.grid(False)
    axes.yaxis.set_major_locator(LogLocator(numticks=7))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.set_xlabel("Message, bytes of float32 (log scale)")
    axes.set_title("Bus bandwidth, GB/s (log scale)", loc="left")


def _words(curve: Curve) -> str:
    name, timings = curve
    first, last = timings[0], timings[-1]
    return (
        f"{name}: {general(_gb(first)[0], 3)} GB/s at {shown_size(first.bytes)}, "
        f"{general(_gb(last)[0], 3)} GB/s at {shown_size(last.bytes)}."
    )


def _rows(probe: Probe) -> list[tuple[Any, ...]]:
    return [
        (clean(probe.label), t.operation.name, t.bytes, t.ranks, len(t.seconds),
         *(_gb(t) if t.ranks > 1 else (None, None, None)), t.quartiles[1])
        for t, _ in probe.timings
    ]  # fmt: skip
