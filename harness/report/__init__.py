"""Run directories in, one self-contained page out: ``build_report``.

fields.py    lenient access to records that may be null, absent or of the wrong type; number formats
layers.py    per-layer norms and trust ratios
runs.py      one run as the report sees it: columns, evaluations, attempts, what is missing
summary.py   the numbers of the page, each with its unit and its source; the answer in sentences
curves.py    thinning of long curves
figures.py   the SVG figures (the only module that loads matplotlib)
tables.py    stage table, event list, CSV files
build.py     puts the parts together and writes the files (the only one that loads jinja2)
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

__all__ = ["build_report"]


def build_report(directories: Sequence[Path], out: Path | None = None) -> Path:
    """``harness.report.build.build_report``, which is loaded when it is called: it needs numpy."""
    from harness.report.build import build_report as build

    return build(directories, out)
