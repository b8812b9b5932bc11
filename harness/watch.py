"""``harness watch``: a running job, from its files alone.

It reads; it takes no lock, asks no process and writes nothing, so it works wherever the directory
can be seen, and several can watch the same run.
"""

from __future__ import annotations

import math
import os
import signal
import sys
import threading
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Self

from rich.console import Console, ConsoleOptions, Group, RenderableType, RenderResult
from rich.live import Live
from rich.segment import Segment
from rich.text import Text

from harness.errors import RunDirectoryError, UsageError
from harness.watched import WIDTH, Several, Watched, find_runs, is_run
from harness.wording import counted


def watch(path: Path, once: bool, interval: float) -> int:
    """Show a run, or the runs of a directory, until it is done, or once; returns the exit code.

    Raises RunDirectoryError if there is neither, or no more; UsageError for an interval that cannot
    be; SystemExit if a signal asks for it while a terminal is drawn on.
    """
    if not (math.isfinite(interval) and 0.1 <= interval <= 3600):
        raise UsageError(f"--interval {interval:g}: must be from 0.1 to 3600 seconds")
    watched = _watched(path)
    with suppress(KeyboardInterrupt):
        if once:
            watched.refresh()
            _plain_console().print(Group(*watched.show()))
        elif _can_draw(console := Console(highlight=False)):
            _live(watched, console, interval)
        else:
            _lines(watched, interval)
    return 0


def _watched(path: Path) -> Watched | Several:
    if path.is_dir() and is_run(path):
        return Watched(path)
    if path.is_dir() and (find_runs(path) or (path / "slurm").is_dir()):
        return Several(path)
    raise RunDirectoryError(
        f"{path} holds no run and no batch jobs; give a directory that harness run or harness "
        "submit has made"
    )


def _plain_console() -> Console:
    return Console(width=WIDTH, soft_wrap=True, highlight=False, color_system=None)


def _can_draw(console: Console) -> bool:
    """Whether standard output is a terminal that can be drawn on anew."""
    known = bool(os.environ.get("TERM")) and not console.is_dumb_terminal
    return sys.stdout.isatty() and console.is_terminal and known


def _live(watched: Watched | Several, console: Console, interval: float) -> None:
    """On the terminal's other screen; what was shown last stays on the usual one."""
    live = Live(
        console=console,
        screen=True,
        auto_refresh=False,
        redirect_stdout=False,
        redirect_stderr=False,
    )
    parts: list[RenderableType] = []
    try:
        with _Signals() as signals, live:
            while not _is_gone(watched.path):
                begin = time.perf_counter()
                watched.refresh()
                parts = watched.show(console.width)
                took = time.perf_counter() - begin
                footer = f"refreshed in {1e3 * took:.1f} ms, every {interval:g} s; Ctrl-C ends this"
                live.update(_Fitted(parts, footer), refresh=True)
                if watched.over:
                    return
                for one in signals.wait(interval):
                    if one == signal.SIGTERM:
                        raise SystemExit(128 + one)
                    if one == signal.SIGTSTP:
                        live.stop()
                        os.kill(os.getpid(), signal.SIGSTOP)
                        live.start()
    finally:
        if parts:
            console.print(Group(*parts))
    raise _gone(watched.path)


class _Signals:
    """Notes signals, so that the view is left in good order: it is stopped, ended, or resized."""

    def __init__(self) -> None:
        self._asked: set[signal.Signals] = set()
        self._wake = threading.Event()

    def __enter__(self) -> Self:
        numbers = (signal.SIGWINCH, signal.SIGTSTP, signal.SIGTERM)
        asked = [one for one in numbers if signal.getsignal(one) != signal.SIG_IGN]
        self._before = {one: signal.signal(one, self._note) for one in asked}
        return self

    def __exit__(self, *error: object) -> None:
        for one, handler in self._before.items():
            signal.signal(one, handler)

    def wait(self, seconds: float) -> set[signal.Signals]:
        """Those that have come, after so long, or as soon as there is one."""
        self._wake.wait(seconds)
        self._wake.clear()
        asked, self._asked = self._asked, set()
        return asked

    def _note(self, one: int, frame: FrameType | None) -> None:
        self._asked.add(signal.Signals(one))
        self._wake.set()


@dataclass(frozen=True)
class _Fitted:
    """As many lines as the terminal has room for, from both ends, and a footer."""

    parts: list[RenderableType]
    footer: str

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        room = (options.height or console.height) - 1
        free = options.update(height=None)
        rows = console.render_lines(Group(*self.parts), free, pad=False)
        if len(rows) > room:
            last = room // 4  # the newest events
            first = max(0, room - 1 - last)
            left_out = counted(len(rows) - first - last, "more line")
            more = Text(f"… {left_out}", "dim", no_wrap=True, overflow="ellipsis")
            end = rows[len(rows) - last :]
            rows = [*rows[:first], *console.render_lines(more, free, pad=False), *end]
        for row in rows[:room]:
            yield from row
            yield Segment.line()
        yield Text(self.footer, "dim", no_wrap=True, overflow="ellipsis", end="")


def _is_gone(path: Path) -> bool:
    try:
        path.stat()
    except (FileNotFoundError, NotADirectoryError):
        return True
    except OSError:  # a file server that does not answer may do so again
        return False
    return False


def _gone(path: Path) -> RunDirectoryError:
    return RunDirectoryError(f"{path} is gone: it was moved or deleted while it was watched")


def _lines(watched: Watched | Several, interval: float) -> None:
    """All of it, and from then on a line for whatever is new."""
    console = _plain_console()
    watched.refresh()
    console.print(Group(*watched.show()))
    list(watched.news())  # has just been shown
    while not watched.over:
        sys.stdout.flush()
        time.sleep(interval)
        if _is_gone(watched.path):
            raise _gone(watched.path)
        watched.refresh()
        for text in watched.news():
            console.print(text, markup=False)
    sys.stdout.flush()
