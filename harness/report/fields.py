"""How values of records are written for people.

Nothing here raises on a record: what is not of the expected type is ``None``, and ``None`` is shown
as a dash. Zero is never used for "unknown".
"""

from __future__ import annotations

import math
import re
from datetime import UTC, datetime
from typing import Any

MISSING = "–"

# What XML forbids (controls, lone surrogates, non-characters), and the marks that reorder text.
_UNPRINTABLE = re.compile(
    "[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069"
    "\ud800-\udfff\ufffe\uffff]"
)


def scrub(text: str) -> str:
    """Text that HTML, XML and UTF-8 can hold: anything else becomes U+FFFD."""
    return _UNPRINTABLE.sub("\ufffd", text)


def clean(value: Any, limit: int = 300) -> str:
    """A value as one printable line of at most ``limit`` characters."""
    text = " ".join(scrub(str(value)).split())
    return text if len(text) <= limit else text[: limit - 1] + "…"


def sentence(text: str) -> str:
    """The text with a capital first letter, the others as they are."""
    return text[:1].upper() + text[1:]


def words(value: Any) -> str | None:
    """A non-empty text from a record, as one line, else None."""
    return clean(value) or None if isinstance(value, str) else None


def instant(value: Any) -> datetime | None:
    """A time stamp of a record, in UTC; without a zone it counts as UTC."""
    try:
        stamp = datetime.fromisoformat(value)
        return stamp.astimezone(UTC) if stamp.tzinfo else stamp.replace(tzinfo=UTC)
    except (TypeError, ValueError, OverflowError):
        return None


def count(value: float | None) -> str:
    """A whole number with thousands separated."""
    return MISSING if value is None else f"{value:,.0f}"


def plural(value: float | None, one: str, many: str | None = None) -> str:
    """A count with its noun: ``1 restart``, ``2 restarts``."""
    return f"{count(value)} {one if value == 1 else many or one + 's'}"


def general(value: float | None, digits: int = 4) -> str:
    """A measured value with ``digits`` significant digits, thousands separated."""
    if value is None:
        return MISSING
    if value == 0 or 1e-4 <= abs(value) < 1e9:
        whole = len(str(int(abs(value)))) if abs(value) >= 1 else 1 - _leading_zeros(value)
        text = f"{value:,.{max(digits - whole, 0)}f}"
        return text.rstrip("0").rstrip(".") if "." in text else text
    return f"{value:.{digits - 1}e}"


def _leading_zeros(value: float) -> int:
    """Zeros right after the point of a value below one: 0.05 has one."""
    return -math.floor(math.log10(abs(value))) if value else 0


def percent(value: float | None) -> str:
    """A fraction in percent with two decimals."""
    return MISSING if value is None else f"{100 * value:.2f}\N{NO-BREAK SPACE}%"


def duration(seconds: float | None) -> str:
    """A time span in the two largest units that matter."""
    if seconds is None:
        return MISSING
    if seconds < 59.95:
        return f"{seconds:.1f}\N{NO-BREAK SPACE}s"
    whole = round(seconds)
    for size, unit, small_size, small in (
        (86400, "d", 3600, "h"),
        (3600, "h", 60, "min"),
        (60, "min", 1, "s"),
    ):
        if whole >= size:
            big, rest = divmod(whole, size)
            return f"{big:,} {unit} {rest // small_size} {small}".replace(" ", "\N{NO-BREAK SPACE}")
    return f"{seconds:.1f}\N{NO-BREAK SPACE}s"


def short_time(seconds: float) -> str:
    """A short time in the unit that suits it."""
    for size, unit in ((1.0, "s"), (1e-3, "ms"), (1e-6, "µs")):
        if seconds >= size:
            return f"{general(seconds / size, 3)} {unit}"
    return f"{general(seconds, 2)} s"


_PREFIXES = ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"))
_SHORT = {"bytes": "B", "bit/s": "bit/s"}
"""Units that take a prefix, as they look behind one."""


def unit_text(value: float | None, unit: str) -> str:
    """A number of the summary as people read it."""
    if unit in _SHORT and value is not None:
        for size, prefix in _PREFIXES:
            if abs(value) >= size:
                return f"{general(value / size)} {prefix}{_SHORT[unit]}"
    if unit == "fraction":
        return percent(value)
    if unit == "s" and value is not None and value < 1:
        return f"{general(1e3 * value)} ms"
    if unit == "s":
        return duration(value)
    if unit == "%":
        return f"{general(value, 3)} %"
    return (
        general(value) if value is None or unit in ("ratio", "rank") else f"{general(value)} {unit}"
    )
