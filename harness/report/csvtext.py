"""Rows as CSV."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable
from typing import Any


def to_csv(header: Iterable[str], rows: Iterable[Iterable[Any]]) -> bytes:
    """CSV with exact floats; an empty cell is a missing value."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(header)
    writer.writerows([_cell(value) if type(value) is str else value for value in r] for r in rows)
    return text.getvalue().encode()


def _cell(text: str) -> str:
    """Text that a spreadsheet would run as a formula gets an apostrophe in front."""
    return f"'{text}" if text.startswith(("=", "+", "-", "@")) else text
