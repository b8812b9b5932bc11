"""The report as Markdown: sentences and tables, for a pull request, an issue or a terminal."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Protocol

from harness.report import sections
from harness.report.fields import (
    clean,
    count,
    duration,
    general,
    percent,
    scrub,
    sentence,
    unit_text,
)
from harness.report.probes import LINE_COLUMNS
from harness.report.timing import phase_name, phases_of

if TYPE_CHECKING:
    from harness.report.build import Report, RunView

ROWS = 200  # of a table; the CSV files have all
_SPECIAL = re.compile(r"([\\`*_{}\[\]<>#|~&$])")


class Titled(Protocol):
    """What is used of a figure."""

    @property
    def key(self) -> str: ...
    @property
    def title(self) -> str: ...
    @property
    def caption(self) -> str: ...
    @property
    def file(self) -> bytes | None: ...


def text_of(value: object) -> str:
    """Any text as one line that Markdown shows as it is."""
    return _SPECIAL.sub(r"\\\1", " ".join(scrub(str(value)).split()))


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    shown = [*rows]
    lines = [header, ["---"] * len(header), *([text_of(c) for c in row] for row in shown[:ROWS])]
    cut = f"\n\n{count(len(shown) - ROWS)} more rows are left out." if len(shown) > ROWS else ""
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + cut


def markdown(report: Report, figures: Sequence[Titled]) -> bytes:
    """The page's sentences and most important tables, and links to its figures' SVG files."""
    parts = [f"# {text_of(report.title)}"]
    problems = [f"{of or 'The run'}: {p}" for of, found in report.trouble for p in found]
    if problems:
        parts += ["## Missing or incomplete", _bullets(problems)]
    parts += ["## Result", *map(text_of, report.paragraphs)]
    if report.causes:
        parts.append(_bullets(report.causes))
    for figure in figures:
        if figure.file:
            drawn = f"![{text_of(figure.title)}]({figure.key}.svg)"
            parts += [drawn, f"**{text_of(figure.title)}.** {text_of(figure.caption)}"]
    if report.scalings:
        parts += ["## Scaling", _scaling(report)]
        parts += [text_of(given.text) for one in report.scalings for given in one.network.given]
    if report.probes:
        parts += ["## Network", *_network(report)]
    if report.timings:
        parts += ["## Time of an update", _time(report)]
    if report.views:
        parts += ["## Runs", _runs(report)]
    printed = [view for view in report.views if view.paper_rows]
    if printed:
        parts += ["## In the paper", *_paper(printed)]
    faults = [(view, fault) for view in report.views for fault in sections.faults_of(view.run)]
    if faults:
        rows = [
            (
                view.run.label, fault.time or "–", fault.what,
                duration(fault.seconds_to_training), count(fault.updates_repeated),
            )
            for view, fault in faults
        ]  # fmt: skip
        header = ("Run", "Time, UTC", "What", "Until training again", "Updates repeated")
        parts += ["## Faults", table(header, rows)]
    parts.append("Every number with its source: summary.json.")
    return ("\n\n".join(parts) + "\n").encode()


def _bullets(lines: Iterable[str]) -> str:
    return "\n".join(f"- {text_of(line)}" for line in lines)


def _scaling(report: Report) -> str:
    rows = [
        (
            clean(one.series.label),
            count(s.point.ranks),
            count(s.point.global_batch),
            general(s.point.images_per_sec),
            "–" if s.point.low is None else f"{general(s.point.low)} to {general(s.point.high)}",
            general(s.speedup),
            percent(s.efficiency),
            percent(s.point.mfu),
        )
        for one in report.scalings
        for s in one.series.scaled()
    ]
    header = ("Series", "Ranks", "Global batch", "Images/s", "Interval", "Speed-up", "Efficiency",
              "MFU")  # fmt: skip
    return table(header, rows)


def _network(report: Report) -> Iterable[str]:
    for one in report.probes:
        when = f", {one.probe.when}" if one.probe.when else ""
        yield text_of(f"{sentence(one.probe.label)}: {one.probe.where}{when}.")
        if one.unused:
            yield text_of(f"The scaling model has nothing from it: {one.unused}.")
        if one.probe.sentences:
            yield _bullets(one.probe.sentences)
        if one.lines:
            yield table(LINE_COLUMNS, one.lines)


def _paper(views: Iterable[RunView]) -> Iterable[str]:
    for view in views:
        yield text_of(f"Run {view.run.label}: {view.paper or 'the recipe names no source.'}")
        rows = [
            (row.metric, row.printed, general(row.here), row.note or "", row.how)
            for row in view.paper_rows
        ]
        yield table(("Metric", "Printed", "Here", "Note", "How"), rows)


def _time(report: Report) -> str:
    phases = phases_of(report.timings)
    rows = [
        (
            timing.label,
            unit_text(timing.total, "s"),
            *(percent(timing.share(phase)) for phase in phases),
        )
        for timing in report.timings
    ]
    return table(("Of", "One update", *map(phase_name, phases)), rows)


def _runs(report: Report) -> str:
    rows = [
        (
            view.run.label,
            view.run.status,
            percent(view.numbers.of("final_test_accuracy")),
            count(view.numbers.of("updates")),
            general(view.numbers.of("images_per_sec_median")),
            count(view.numbers.of("ranks_largest")),
            duration(view.numbers.of("wall_seconds")),
        )
        for view in report.views
    ]
    header = ("Run", "State", "Final accuracy", "Updates", "Images/s, median", "Ranks", "Wall time")
    return table(header, rows)
