"""How numbers and names are told."""

from __future__ import annotations

import re
import signal


def counted(number: int, word: str) -> str:
    """Such as ``1 rank`` and ``1,024 ranks``."""
    return f"{number:,} {word}{'' if number == 1 else 's'}"


def signal_name(number: int) -> str | None:
    """Such as ``SIGKILL``; None for one without a name, as the real-time ones are."""
    try:
        return signal.Signals(number).name
    except ValueError:
        return None


def plain_name(text: str) -> str:
    """A name as file names, Slurm and a shell's comments can all have it."""
    return re.sub(r"[^A-Za-z0-9._-]+", "-", text).strip("-.") or "run"
