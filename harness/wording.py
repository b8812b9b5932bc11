"""How numbers are told to people."""

from __future__ import annotations


def counted(number: int, word: str) -> str:
    """Such as ``1 rank`` and ``1,024 ranks``."""
    return f"{number:,} {word}{'' if number == 1 else 's'}"
