"""Being asked to stop: by a signal to any rank, or by a file in the run directory."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from types import FrameType

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR2)


class StopRequest:
    """Remembers that a stop was asked for; the ranks agree on it at the end of an update.

    A second SIGINT ends the process at once, as people expect of Ctrl-C pressed twice.
    """

    def __init__(self, *flag_files: Path) -> None:
        self._files = flag_files
        self._signalled = False

    def listen(self) -> None:
        """Install the signal handlers; main thread only."""
        for number in SIGNALS:
            signal.signal(number, self._on_signal)

    def asked(self) -> bool:
        """Whether this rank has been asked to stop."""
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
