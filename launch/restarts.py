"""When to start again after a failure, after how long, and without which host. No clock, no I/O."""

from __future__ import annotations

from dataclasses import dataclass

_LONGEST_PAUSE = 60.0
_BARREN = 3
"""Launches in a row that die without a new checkpoint: a crash loop."""


@dataclass(frozen=True)
class Again:
    """Start again."""

    pause: float
    """Seconds to wait before."""
    leave_out: str | None = None
    """The host that has failed too often."""


@dataclass(frozen=True)
class GiveUp:
    reason: str


@dataclass
class Restarts:
    """Counts the failures of one run under one supervisor."""

    limit: int
    """Restarts that are allowed."""
    first_pause: float
    """Seconds; doubled with each restart in a row that brought no new checkpoint."""
    host_failures: int
    """Launches in a row that may fail on the same host before that is left out."""
    used: int = 0
    _barren: int = 0
    _in_a_row: int = 0
    _host: str | None = None

    def ended_well(self) -> None:
        """A launch has ended as it was to: what failed before is in no row with what fails next."""
        self._barren = self._in_a_row = 0
        self._host = None

    def after(self, host: str | None, progressed: bool, hosts: int) -> Again | GiveUp:
        """What to do after a launch on so many hosts has failed.

        ``host``: where, if that is known; ``progressed``: whether it left a new checkpoint.
        """
        self._barren = 0 if progressed else self._barren + 1
        self._in_a_row = self._in_a_row + 1 if host is not None and host == self._host else 1
        self._host = host
        leaves = host is not None and hosts > 1 and self._in_a_row >= self.host_failures
        if self.limit == 0:
            return GiveUp("")
        if self.used >= self.limit:
            return GiveUp(f"it has been restarted {_times(self.used)}, as often as is allowed")
        if self._barren >= _BARREN and not leaves:
            return GiveUp(f"{_BARREN} launches in a row have died without a new checkpoint")
        pause = self.first_pause * 2.0 ** min(max(0, self._barren - 1), 30)
        pause = min(pause, max(_LONGEST_PAUSE, self.first_pause))
        self.used += 1
        if leaves:
            self._barren = self._in_a_row = 0
        return Again(pause, host if leaves else None)


def _times(count: int) -> str:
    return "once" if count == 1 else f"{count} times"
