"""Access to records that may be damaged: what is absent, null or no such thing is ``None``."""

from __future__ import annotations

from typing import Any

LARGEST = 1e100
"""Beyond it a value is damage, not a measurement, and no axis can hold it."""


def number(value: Any) -> float | None:
    """A finite number, else None. Text and booleans are not numbers."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    return value if -LARGEST < value < LARGEST else None  # also false for NaN


def pick(record: Any, *keys: str) -> Any:
    """The value under nested keys, or None as soon as one of them is not there."""
    for key in keys:
        if not isinstance(record, dict):
            return None
        record = record.get(key)
    return record


def listed(value: Any) -> list[Any]:
    """A list as it is; of anything else none."""
    return value if isinstance(value, list) else []
