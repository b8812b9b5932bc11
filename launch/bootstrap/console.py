"""What the user sees: one line per step with its seconds, one live line while a step runs."""

from __future__ import annotations

import shutil
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TextIO


class BootstrapError(Exception):
    """Reported as one message without a traceback; it names what is missing and what to do."""


class Step:
    """A running step. On a terminal its line is redrawn; elsewhere every 20 % makes a line."""

    def __init__(self, name: str, stream: TextIO) -> None:
        self.name = name
        self.outcome = name
        self._stream = stream
        self._live = stream.isatty()
        self._shown = 0
        self._began = time.monotonic()

    def seconds(self) -> float:
        return time.monotonic() - self._began

    def detail(self, text: str) -> None:
        if self._live:
            line = f"  {self.name} … {text}  ({self.seconds():.0f} s)"
            width = shutil.get_terminal_size().columns - 1
            self._stream.write(f"\r\033[K{line[:width]}")
            self._stream.flush()

    def percent(self, value: int | None) -> None:
        """Progress as far as it is known; a line that tells none only moves the seconds."""
        value = max(self._shown, value or 0)
        self.detail(f"{value} %")
        if not self._live and value // 20 > self._shown // 20 and value < 100:
            print(f"  {self.name}: {value} %", file=self._stream, flush=True)
        self._shown = value

    def close(self, mark: str = "") -> None:
        if self._live:
            self._stream.write("\r\033[K")
        print(f"  {mark}{self.outcome}  {self.seconds():.0f} s", file=self._stream, flush=True)


class Console:
    def __init__(self, stream: TextIO | None = None) -> None:
        self._stream = stream or sys.stdout

    def say(self, text: str) -> None:
        print(text, file=self._stream, flush=True)

    @contextmanager
    def step(self, name: str) -> Iterator[Step]:
        step = Step(name, self._stream)
        step.detail("")
        try:
            yield step
        except BaseException:
            step.close("failed: ")
            raise
        step.close()
