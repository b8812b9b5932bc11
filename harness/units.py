"""Durations that carry their unit: ``5ep`` (epochs), ``200up`` (updates), ``50000sa`` (samples)."""

from __future__ import annotations

import re
import reprlib
from dataclasses import dataclass
from decimal import Decimal, localcontext
from fractions import Fraction
from math import ceil
from typing import Literal

Unit = Literal["ep", "up", "sa"]

_FORM = re.compile(r"([0-9]{1,18}(?:\.[0-9]{1,18})?) *(ep|up|sa)")
PATTERN = r"^\s*([0-9]{1,18}(\.[0-9]{1,18})? *ep|[0-9]{1,18}(\.0{1,18})? *(up|sa))\s*$"
"""What ``Duration.parse`` takes, for editors."""
VALID = "a number and its unit: 5ep (epochs), 200up (updates) or 50000sa (samples)"


@dataclass(frozen=True)
class Duration:
    """A length of training. Epochs may be fractional and stay exact; updates and samples are whole.

    Examples: ``Duration.parse("2.5ep")``, ``Duration(Fraction(200), "up")``.
    """

    value: Fraction
    unit: Unit

    @classmethod
    def parse(cls, text: object) -> Duration:
        """Read ``5ep``, ``200up`` or ``50000sa``; raises ValueError with the valid forms."""
        if isinstance(text, Duration):
            return text
        match = _FORM.fullmatch(text.strip()) if isinstance(text, str) else None
        if match is None:
            raise ValueError(f"{reprlib.repr(text)} is not a duration; write {VALID}")
        value, unit = Fraction(match[1]), match[2]
        if unit != "ep" and value.denominator != 1:
            raise ValueError(f"{text!r}: only epochs may be fractional; write {VALID}")
        return cls(value, unit)  # type: ignore[arg-type]

    def __str__(self) -> str:
        with localcontext(prec=40):  # all digits of what ``parse`` reads
            number = Decimal(self.value.numerator) / self.value.denominator
        return f"{number:f}{self.unit}"

    def __bool__(self) -> bool:
        return self.value > 0

    def boundary(self, index: int, dataset_size: int) -> int:
        """The ``index``-th multiple of this duration, in samples (or in updates for ``up``).

        For epochs it is the first whole sample at or after ``index × value`` epochs.
        """
        if self.unit == "ep":
            return ceil(index * self.value * dataset_size)
        return index * int(self.value)

    def passed(self, samples: int, updates: int, dataset_size: int) -> int:
        """How many multiples of this duration lie at or before a point of the run."""
        if self.unit == "ep":
            return int(Fraction(samples, dataset_size) // self.value)
        return (updates if self.unit == "up" else samples) // int(self.value)
