"""How numbers and names are told."""

from __future__ import annotations

import re


def counted(number: int, word: str) -> str:
    """Such as ``1 rank`` and ``1,024 ranks``."""
    return f"{number:,} {word}{'' if number == 1 else 's'}"


def plain_name(text: str) -> str:
    """A name as file names, Slurm and a shell's comments can all have it."""
    return re.sub(r"[^A-Za-z0-9._-]+", "-", text).strip("-.") or "run"
