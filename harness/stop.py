"""Being asked to stop: by a signal to any rank, or by a file in the run directory."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from pathlib import Path
from types import FrameType

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR2)


class StopRequest:
    """Remembers that a stop was asked for; the ranks agree on it at the end of an update.

    A second SIGINT ends the process at once, as people expect of Ctrl-C pressed twice.
    """

    def __init__(self, *flag_files: Path, enough: Callable[[], bool] | None = None) -> None:
        """``enough``: asked once an update, for a run that is over when it has been measured."""
        self._signalled = False
        self.look_at(*flag_files, enough=enough)

    def look_at(self, *flag_files: Path, enough: Callable[[], bool] | None = None) -> None:
        """What else asks to stop, for a process that has listened to signals before it knew."""
        self._files, self._enough = flag_files, enough

    @property
    def measured(self) -> bool:
        """Whether this run is there to be measured, so that records shall cost it nothing."""
        return self._enough is not None

    def listen(self) -> None:
        """Install the signal handlers; main thread only."""
        for number in SIGNALS:
            signal.signal(number, self._on_signal)

    def asked(self) -> bool:
        """Whether this rank has been asked to stop."""
        if self._enough is not None and self._enough():
            return True
        return self._signalled or any(os.path.exists(file) for file in self._files)

    def clear(self) -> None:
        """Forget a request in the run directory that an earlier attempt left or has obeyed."""
        for file in self._files:
            file.unlink(missing_ok=True)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if self._signalled and number == signal.SIGINT:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
        self._signalled = True
