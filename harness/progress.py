"""Showing how a run goes: a live bar on a terminal, plain periodic lines elsewhere.

Under ``harness run`` rank 0 has no terminal: it prints marked lines, and the launching process,
which has one, shows them.
"""

from __future__ import annotations

import io
import json
import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import IO, Protocol, TextIO

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn
from rich.table import Column

MARK = "@harness-progress "
_ROOM_FOR_A_BAR = 120  # columns; in fewer the words need the space


@dataclass(frozen=True)
class Status:
    """Where a run stands, as people want to see it."""

    fraction: float
    epoch: float
    epochs: float
    stage: int
    global_batch: int
    ranks: int
    accumulation: int
    micro_batch: int
    loss: float
    images_per_sec: float
    eta_seconds: float
    accuracy: float | None = None
    news: bool = False
    """Worth a line of its own: an evaluation, a new stage, the end."""

    def short(self) -> str:
        """The most telling first: a narrow terminal cuts the end."""
        return (
            f"{100 * self.fraction:3.0f} %  ETA {shown_duration(self.eta_seconds)}  {self.line()}"
        )

    def line(self) -> str:
        accuracy = "" if self.accuracy is None else f"  test acc {self.accuracy:6.2%}"
        return (
            f"epoch {self.epoch:6.2f}/{self.epochs:.4g}  stage {self.stage}  "
            f"batch {self.global_batch} = {self.ranks} × {self.accumulation} × {self.micro_batch}  "
            f"loss {self.loss:.4f}{accuracy}  {self.images_per_sec:,.0f} images/s"
        )


def shown_duration(seconds: float) -> str:
    whole = round(seconds)
    if whole < 60:
        return f"{whole}s"
    if whole < 3600:
        return f"{whole // 60}m{whole % 60:02d}s"
    return f"{whole // 3600}h{whole % 3600 // 60:02d}m"


class Display(Protocol):
    """Takes a status at every update and decides what to show of it."""

    def show(self, status: Status) -> None: ...

    def say(self, text: str) -> None:
        """A line between the statuses."""

    def close(self) -> None: ...


class Silent:
    """For all ranks but one."""

    def show(self, status: Status) -> None:
        return

    def say(self, text: str) -> None:
        return

    def close(self) -> None:
        return


class PlainLines:
    """A line for each piece of news, and every ``period`` seconds between them."""

    def __init__(self, stream: IO[str] | None = None, period: float = 10.0) -> None:
        self._stream = stream or sys.stdout
        self._period = period
        self._last = time.monotonic()

    def show(self, status: Status) -> None:
        now = time.monotonic()
        if status.news or now - self._last >= self._period:
            self._last = now
            self.say(f"{status.line()}  ETA {shown_duration(status.eta_seconds)}")

    def say(self, text: str) -> None:
        print(text, file=self._stream, flush=True)

    def close(self) -> None:
        return


class LiveBar:
    """One line that is redrawn, for a terminal; news stays above it."""

    def __init__(self, console: Console | None = None) -> None:
        target = console or Console()
        self._bar = Progress(
            *([BarColumn(bar_width=16)] if target.width >= _ROOM_FOR_A_BAR else []),
            TextColumn("{task.description}", markup=False, table_column=Column(no_wrap=True)),
            console=target,
            transient=True,
        )
        self._task: TaskID | None = None

    def show(self, status: Status) -> None:
        if self._task is None:
            self._bar.start()
            self._task = self._bar.add_task("", total=1.0)
        if status.news:
            self.say(status.line())
        self._bar.update(self._task, completed=status.fraction, description=status.short())
        self._bar.refresh()

    def say(self, text: str) -> None:
        self._bar.console.print(text, markup=False, highlight=False)

    def close(self) -> None:
        self._bar.stop()


class Relay:
    """Marked lines for the launching process: all news, and five statuses a second between them."""

    def __init__(self, stream: IO[str] | None = None) -> None:
        self._stream = stream or sys.stdout
        self._last = 0.0

    def show(self, status: Status) -> None:
        now = time.monotonic()
        if status.news or now - self._last >= 0.2:
            self._last = now
            # In one write: launchers forward writes, and mix those of several ranks into a line.
            self._stream.write(f"{MARK}{json.dumps(asdict(status))}\n")
            self._stream.flush()

    def say(self, text: str) -> None:
        print(text, file=self._stream, flush=True)

    def close(self) -> None:
        return


def parse_relayed(line: str) -> Status | None:
    """The status in a line that ``Relay`` printed; None for any other line."""
    _, mark, payload = line.partition(MARK)
    if not mark:
        return None
    try:
        status = Status(**json.JSONDecoder().raw_decode(payload)[0])
        status.line()  # a rank may print what merely begins like a status
        status.short()
    except (ValueError, TypeError, RecursionError):
        return None
    return status


class Unbreakable(io.TextIOBase):
    """A stream whose reader may go away, as in ``harness run … | head``: what is printed after that
    is lost, and the run goes on."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        with self._unbroken():
            self._stream.write(text)
        return len(text)

    def flush(self) -> None:
        with self._unbroken():
            self._stream.flush()

    def isatty(self) -> bool:
        return self._stream.isatty()

    def fileno(self) -> int:
        return self._stream.fileno()

    @property
    def encoding(self) -> str:  # type: ignore[override]
        return self._stream.encoding

    @contextmanager
    def _unbroken(self) -> Iterator[None]:
        try:
            yield
        except BrokenPipeError:
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, self._stream.fileno())
            os.close(nowhere)


def local_display() -> Display:
    """What suits this process's standard output."""
    return LiveBar() if sys.stdout.isatty() else PlainLines()


class Pace:
    """Images per second of late: an average that forgets with a half-life of three seconds."""

    def __init__(self) -> None:
        self._samples = self._seconds = 0.0

    def add(self, samples: int, seconds: float) -> None:
        keep = 0.5 ** (seconds / 3.0)
        self._samples = self._samples * keep + samples
        self._seconds = self._seconds * keep + seconds

    @property
    def images_per_sec(self) -> float:
        return self._samples / self._seconds if self._seconds else 0.0
