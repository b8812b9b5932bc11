"""Where the time of updates went, by marks on the host clock."""

from __future__ import annotations

import time

PHASES = ("data", "forward", "backward", "comm_exposed", "optimizer", "other")


class PhaseClock:
    """Splits time into phases: each ``mark`` books the time since the last one.

    Costs two clock readings and an addition a mark; nothing is synchronised.
    """

    def __init__(self) -> None:
        self.seconds = dict.fromkeys(PHASES, 0.0)
        self._last = time.perf_counter()

    def restart(self) -> None:
        """Begin to count here: what lies before (evaluation, checkpoint) belongs to no phase."""
        self._last = time.perf_counter()

    def mark(self, phase: str) -> None:
        now = time.perf_counter()
        self.seconds[phase] += now - self._last
        self._last = now

    def take(self) -> dict[str, float]:
        """Seconds by phase since the last take, and begin anew from zero."""
        taken = self.seconds
        self.seconds = dict.fromkeys(PHASES, 0.0)
        return taken
