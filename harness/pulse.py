"""Signs of life of a rank: what tells a job that is slow from one that hangs.

The main thread leaves signs as it goes: it counts, and says where it is. That is all that training
pays for. A thread beside it looks now and then whether there are new ones, and tells the launching
process, by marked lines on standard output: this goes wherever ranks can be started, needs no file
system, and a rank that is stopped falls silent there. Without new signs for most of the time after
which the job counts as hanging (``launch.hang_seconds``) it writes the stacks of all threads to
``RUN_DIR/stacks/``. What follows from all ranks' signs the launching process decides
(`launch/hangs.py`).

While ranks start, and user code and libraries run that know nothing of this, a stack that changes
is a sign too. Later it would hide those who wait in a loop.

The signs are the process's, as its main thread is, and not some object's.
"""

from __future__ import annotations

import atexit
import faulthandler
import json
import os
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

from harness import environment
from harness.processes import Process, threads_of

MARK = "@harness-pulse "
MEETING = "waiting for the other ranks"
"""Where a rank is in a collective: others are the cause if it does not come back."""

_LOOKS = 8
"""Looks in the time after which a job counts as hanging."""
_LONGEST_TICK = 5.0
_DEEPEST = 64  # frames of a stack that are compared


@dataclass
class _Signs:
    """What the main thread leaves."""

    count: int = 0
    met: int = 0
    """Collectives that have come to their end: all ranks have been there."""
    place: str = "starting"
    collective: str = ""
    """The last one that was begun."""
    until: float = 0.0
    """Before this moment of the monotonic clock a silence means nothing."""
    training: bool = False
    watcher: _Watcher | None = None
    """What looks at them."""


_signs = _Signs()


def at(place: str) -> None:
    """The main thread begins something; ``place`` completes "the rank is …"."""
    _signs.place = place
    _signs.count += 1


def beat() -> None:
    """It has come a step further in that."""
    _signs.count += 1


def begins(collective: str) -> None:
    """An operation of all ranks has been handed over."""
    _signs.collective = collective


class meeting:  # noqa: N801 - a context manager, as contextlib's are named
    """Around waiting for the other ranks. A class, as it is entered several times an update."""

    def __enter__(self) -> None:
        self._before = _signs.place
        at(MEETING)

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        _signs.met += error is None
        at(self._before)


@contextmanager
def patient(seconds: float) -> Iterator[None]:
    """Around a wait that may take so long by its own rules, and ends by itself."""
    _signs.until = time.monotonic() + seconds
    try:
        yield
    finally:
        _signs.until = 0.0
        beat()


def trains(training: bool) -> None:
    """Whether the main thread is where each step leaves a sign."""
    _signs.training = training
    tell_again()


def start(folder: Path) -> None:
    """Begin to watch this process, if the launching one has asked for that.

    ``folder``: for stacks, which exists once there are some.
    """
    seconds = environment.hang_seconds()
    if seconds is not None:
        _signs.watcher = _Watcher(seconds, folder)
        tell_again()
        run = _signs.watcher.run
        threading.Thread(target=run, name="harness-pulse", daemon=True).start()


def tick_of(seconds: float) -> float:
    """Seconds between two looks where a job hangs after ``seconds``."""
    return min(seconds / _LOOKS, _LONGEST_TICK)


def tell_again() -> None:
    """Tell the launching process anew who this is, as what it was told holds no longer. At once: a
    process that comes to its end stops its threads first."""
    beat()
    if _signs.watcher is not None:
        _signs.watcher.tell(0.0)


class Silence:
    """How long there has been no sign, of a process that may itself be stopped in between."""

    def __init__(self, tick: float, now: float) -> None:
        """``tick``: seconds between two looks."""
        self._gap = max(4 * tick, 2.0)
        self._last = self._since = now

    def skipped(self, now: float, counts: bool = True) -> float:
        """Seconds since the last look that are not to be counted: this process did not look, as it
        was stopped, maybe with all others; or the caller knows why they do not count."""
        passed, self._last = now - self._last, now
        return passed if passed > self._gap or not counts else 0.0

    def look(self, sign: bool, now: float, until: float = 0.0) -> float:
        """Seconds without a sign. ``sign``: there is a new one; ``until``: see ``patient``."""
        self._since += self.skipped(now)
        if sign or now < until:
            self._since = now
        return now - self._since


class _Watcher:
    def __init__(self, seconds: float, folder: Path) -> None:
        self._seconds, self._folder = seconds, folder
        self._tick = tick_of(seconds)
        self._main = threading.main_thread().ident
        own = Process.of(os.getpid())
        self._begun = own.begun if own else 0
        # Stacks of a process whose interpreter is held up, which a thread in C writes: an anonymous
        # file, as it has to be open by then, and is not needed but for once in a long time.
        self._dump = os.memfd_create("harness-stacks")
        self._written: Path | None = None

    def run(self) -> None:
        silence = Silence(self._tick, time.monotonic())
        atexit.register(faulthandler.cancel_dump_traceback_later)
        seen: tuple[int, int] = (-1, 0)
        told_quarters = 0
        checked, met_then = time.monotonic(), _signs.met
        while True:
            os.ftruncate(self._dump, 0)
            os.lseek(self._dump, 0, os.SEEK_SET)
            faulthandler.dump_traceback_later(0.75 * self._seconds, file=self._dump)
            time.sleep(self._tick)
            now = time.monotonic()
            signs = (_signs.count, 0 if _signs.training else self._stack())
            silent = silence.look(signs != seen, now, _signs.until)
            seen = signs
            quarters = int(4 * silent / self._seconds)
            if quarters >= 2:
                if quarters > told_quarters:
                    self.tell(silent)
                    told_quarters = quarters
                if quarters >= 3 and self._written is None:
                    self._write(silent)
                continue
            due = told_quarters > 0
            if now - checked >= self._seconds / 4:
                # Where all ranks meet, rank 0 speaks for all.
                due = due or _signs.met == met_then or environment.launched_rank() == 0
                checked, met_then = now, _signs.met
            if due:
                self.tell(silent)
                told_quarters = 0
                self._take_back()

    def tell(self, silent: float) -> None:
        """One line, in one write, that no other output of this process can break up."""
        told: dict[str, Any] = {
            "rank": environment.launched_rank(),
            "size": environment.promised_world_size() or 1,
            "host": environment.host(),
            "pid": os.getpid(),
            "begun": self._begun,
            "dump": self._dump,
            "step": environment.slurm_step(),
            "training": _signs.training,
            "silent": round(silent, 3),
            "place": _signs.place,
            "collective": _signs.collective,
        }
        with suppress(OSError):
            os.write(1, f"{MARK}{json.dumps(told)}\n".encode())

    def _stack(self) -> int:
        """Something that changes with the main thread's Python stack."""
        frame = sys._current_frames().get(self._main or 0)
        places: list[tuple[int, int]] = []
        while frame is not None and len(places) < _DEEPEST:
            places.append((id(frame.f_code), frame.f_lasti))
            frame = frame.f_back
        return hash(tuple(places))

    def _write(self, silent: float) -> None:
        path = self._folder / f"rank-{environment.launched_rank():05d}.txt"
        head = (
            f"rank {environment.launched_rank()} on {environment.host()}, pid {os.getpid()}: "
            f"{_signs.place} for {silent:.1f} s\n"
            f"last collective begun: {_signs.collective or 'none'}\n"
        )
        threads = threads_of(os.getpid())
        tail = "\n".join(["", "its threads, as the kernel has them:", *threads])
        with suppress(OSError):
            self._folder.mkdir(exist_ok=True)
            with path.open("w", encoding="utf-8") as file:
                self._written = path
                file.write(f"{head}\n")
                file.flush()
                faulthandler.dump_traceback(file)
                file.write(f"{tail}\n")

    def _take_back(self) -> None:
        """It went on."""
        if self._written is not None:
            with suppress(OSError):
                self._written.unlink()
            self._written = None
