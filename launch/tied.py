"""Executes a command that is ended (SIGTERM) when the process that started it dies.

    python tied.py PARENT COMMAND …

A launcher whose supervisor was killed would go on, and write into a run that somebody resumes. The
kernel knows of the death at once (prctl, PR_SET_PDEATHSIG), and keeps the request over exec.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys

_PR_SET_PDEATHSIG = 1


def main(parent: int, command: list[str]) -> None:
    """Replace this process by the command, unless the parent is dead by now."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
    if os.getppid() == parent:
        os.execvp(command[0], command)  # noqa: S606 - replacing this process is the point


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2:])
