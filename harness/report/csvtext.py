"""Rows as CSV."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable
from itertools import chain
from typing import Any


def to_csv(header: Iterable[str], rows: Iterable[Iterable[Any]]) -> bytes:
    """CSV with exact floats; an empty cell is a missing value."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    lines = chain([header], rows)
    writer.writerows([_cell(value) if type(value) is str else value for value in r] for r in lines)
    return text.getvalue().encode()


def _cell(text: str) -> str:
    """Text that a spreadsheet would run as a formula gets an apostrophe in front."""
    risky = text.startswith(("\t", "\r")) or text.lstrip().startswith(("=", "+", "-", "@"))
    return f"'{text}" if risky else text
