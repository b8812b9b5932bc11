"""Run, bench and probe directories in, one self-contained page out: ``build_report``.

fields.py        lenient access to records that may be null, absent or of the wrong type; formats
columns.py       metrics.jsonl as columns of numbers, read by several processes
layers.py        per-layer norms and trust ratios
runs.py          one run as the report sees it: columns, evaluations, attempts, what is missing
curves.py        thinning of long curves
summary.py       the numbers of a run, each with its unit and its source; the answer in sentences
scaling.py       points, series, speed-up and efficiency; benches.py  the points of a bench
scaling_view.py  what the scaling model says of a series
probes.py        what a probe found; network.py  the links that it tells the scaling model
paper.py         what a recipe's source prints, beside what was measured
goodput.py       statistical efficiency; timing.py  where the time goes, stragglers, causes
waiting.py       what exposed communication consists of: sums, and waiting for ranks
svg.py           from a picture to SVG (with the figures all that loads matplotlib)
figures.py       the curves; opening.py  the four figures of the first screen; bandwidth.py  that of
                 probes
tables.py        stage table, event list, CSV files; csvtext.py  rows as CSV
sections.py      sentences and rows of the page's sections; markdown.py  the report as Markdown
build.py         puts the parts together and writes the files (the only one that loads jinja2)
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

__all__ = ["build_report"]


def build_report(directories: Sequence[Path], out: Path | None = None) -> Path:
    """``harness.report.build.build_report``, which is loaded when it is called: it needs numpy."""
    from harness.report.build import build_report as build

    return build(directories, out)
