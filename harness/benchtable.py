"""A bench as tables for people: throughput with its interval, speed-up, efficiency, utilisation."""

from __future__ import annotations

import sys
from collections.abc import Callable
from itertools import groupby

from rich import box
from rich.console import Console
from rich.table import Table

from harness.benchfile import Bench, Point
from harness.wording import counted

_WIDE = 200  # columns where no terminal sets them


def print_bench(bench: Bench, console: Console | None = None) -> None:
    """Print what was measured: a line for each point; of strong scaling over several batches, the
    tables of batch × ranks that You, Gitman and Ginsburg (2017) print as Tables 8 to 11, too."""
    target = console or Console(width=None if sys.stdout.isatty() else _WIDE)
    what = f"{bench.model} on {bench.dataset}, {bench.engine}, compression {bench.compression}"
    _say(target, f"{bench.name}: {what}")
    if bench.points:
        target.print(_points(bench))
    if bench.flops_per_image is not None:
        _say(target, _flops(bench))
    for by, heading in _grids(bench):
        _say(target, heading)
        target.print(by)
    for line in _remarks(bench):
        _say(target, line)


def _say(target: Console, sentence: str) -> None:
    target.print(sentence, highlight=False, markup=False, soft_wrap=True)


def _points(bench: Bench) -> Table:
    table = _table("ranks", "nodes", "batch = ranks × acc × micro", "images/s", "speed-up")
    for heading in ("efficiency", "ms/update", "exposed comm", "MFU", "repeats"):
        table.add_column(heading, justify="right")
    for points in scaling_series(bench):
        base = points[0]
        for point in points:
            gain = point.images_per_sec / base.images_per_sec
            pieces = f"{point.ranks} × {point.accumulation} × {point.micro_batch}"
            table.add_row(
                str(point.ranks),
                str(point.nodes),
                f"{point.global_batch:,} = {pieces}",
                _rate(point),
                f"{gain:.2f}",
                f"{gain * base.ranks / point.ranks:.0%}",
                f"{1e3 * point.seconds_per_update:,.1f}",
                _share(point),
                "-" if point.mfu is None else f"{point.mfu:.1%}",
                str(len(point.repeats)),
                end_section=point is points[-1],
            )
    return table


def _table(*headings: str) -> Table:
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 0, 0, 1), pad_edge=False)
    for heading in headings:
        table.add_column(heading, justify="right")
    return table


def _rate(point: Point) -> str:
    shown = _number(point.images_per_sec)
    if point.images_per_sec_high is None:
        return shown
    return f"{shown} ± {_number(point.images_per_sec_high - point.images_per_sec)}"


def _number(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def _share(point: Point) -> str:
    exposed = point.seconds.get("comm_exposed")
    return "-" if exposed is None else f"{exposed / point.seconds_per_update:.0%}"


def scaling_series(bench: Bench) -> list[list[Point]]:
    """The points in series over ranks, each in ascending order, as they were asked for; where that
    is not known, those with the same global batch (strong), or micro-batch and accumulation.

    A point may stand in several series.
    """
    by_name = {point.name: point for point in bench.points}
    asked = bench.settings.get("series")
    listed = asked if isinstance(asked, list) else []
    found = [[by_name[name] for name in names if name in by_name] for names in listed]
    rest = [p for p in bench.points if not any(p in points for points in found)]

    def key(point: Point) -> tuple[int, int]:
        if is_strong(bench):
            return point.global_batch, 0
        return point.micro_batch, point.accumulation

    found += [list(group) for _, group in groupby(sorted(rest, key=key), key=key)]
    return [sorted(points, key=lambda p: p.ranks) for points in found if points]


def is_strong(bench: Bench) -> bool:
    """Whether a series keeps its global batch."""
    return bench.mode == "strong" or bench.settings.get("scaling") == "strong"


def _flops(bench: Bench) -> str:
    text = f"{_scaled(bench.flops_per_image or 0.0, 'FLOP')} an image, forward and backward"
    if bench.peak_flops_per_rank is None:
        return text
    peak = _scaled(bench.peak_flops_per_rank, "FLOP/s")
    return f"{text}; peak of a rank {peak} ({bench.peak_source})"


def _scaled(value: float, unit: str) -> str:
    for factor, prefix in ((1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M")):
        if value >= factor:
            return f"{value / factor:.3g} {prefix}{unit}"
    return f"{value:.3g} {unit}"


def _grids(bench: Bench) -> list[tuple[Table, str]]:
    """Speed, and speed-ups over the smallest batch and over the fewest ranks."""
    batches = sorted({point.global_batch for point in bench.points})
    ranks = sorted({point.ranks for point in bench.points})
    if not is_strong(bench) or len(batches) < 2 or len(ranks) < 2:
        return []
    best: dict[tuple[int, int], Point] = {}
    for point in bench.points:
        place = (point.global_batch, point.ranks)
        if place not in best or point.images_per_sec > best[place].images_per_sec:
            best[place] = point

    def matrix(cell: Callable[[Point], str]) -> Table:
        table = _table("batch", *(counted(n, "rank") for n in ranks))
        for batch in batches:
            row = [best.get((batch, n)) for n in ranks]
            table.add_row(f"{batch:,}", *("-" if p is None else cell(p) for p in row))
        return table

    def over(base: Callable[[Point], tuple[int, int]]) -> Callable[[Point], str]:
        def cell(point: Point) -> str:
            other = best.get(base(point))
            return "-" if other is None else f"{point.images_per_sec / other.images_per_sec:.2f}"

        return cell

    fewest, smallest, several = ranks[0], batches[0], len(best) < len(bench.points)
    return [
        (matrix(_rate), "images/s" + ", of several micro-batches the best" * several),
        (matrix(over(lambda p: (smallest, p.ranks))), f"speed-up over a batch of {smallest:,}"),
        (
            matrix(over(lambda p: (p.global_batch, fewest))),
            f"speed-up over {counted(fewest, 'rank')}",
        ),
    ]


def _remarks(bench: Bench) -> list[str]:
    repeats = [(point.name, one) for point in bench.points for one in point.repeats]
    lines = [
        f"{name}, repeat {one.repeat} had not settled when half of it had passed"
        for name, one in repeats
        if not one.settled
    ]
    lines += [f"{one.point}, repeat {one.repeat} failed: {one.reason}" for one in bench.failures]
    if bench.points and any(len(point.repeats) > 1 for point in bench.points):
        confidence = bench.points[0].confidence
        lines.append(f"± is a {confidence:.0%} interval of the mean over repeats (Student's t)")
    if bench.status == "partial":
        left = len(bench.order) - len(repeats)
        lines.append(f"partial: {left} of {len(bench.order)} repeats are not measured")
    return lines
