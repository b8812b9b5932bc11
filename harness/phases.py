"""Where the time of updates goes: marks between phases, on the host's clock or on a GPU's stream.

A mark books the time since the mark before it, so the phases of a stretch add up to its length.
Nothing waits for anything while an update runs.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, Protocol

import torch

from harness.records import PHASES

WAITS = 10
"""How many of the last times in ``comm_exposed`` a clock remembers one by one."""
_HELD = 1024
"""Events that wait to be resolved before those that are complete are."""


class HostClock:
    """Phases by the host's clock; two readings and an addition a mark."""

    def __init__(self) -> None:
        self.log: list[tuple[str, float, float]] | None = None
        """While a trace is taken: (phase, begin, end) of each mark, in time.perf_counter's
        seconds."""
        self.waits: deque[float] = deque(maxlen=WAITS)
        """Seconds of the last marks of ``comm_exposed``, of which each update has one."""
        self._seconds = dict.fromkeys(PHASES, 0.0)
        self._lap = 0.0
        self._last = time.perf_counter()

    def restart(self) -> None:
        """Begin to count here: what lies before (evaluation, checkpoint) belongs to no phase."""
        self._last = time.perf_counter()

    def mark(self, phase: str) -> None:
        """Book the time since the last mark, or since `restart`."""
        now = time.perf_counter()
        self._book(phase, now - self._last)
        if self.log is not None:
            self.log.append((phase, self._last, now))
        self._last = now

    def lap(self) -> float:
        """Seconds of the host that were marked since the last lap."""
        lap, self._lap = self._lap, 0.0
        return lap

    def take(self) -> dict[str, float]:
        """Seconds by phase since the last take, and begin anew from zero."""
        taken, self._seconds = self._seconds, dict.fromkeys(PHASES, 0.0)
        return taken

    def _book(self, phase: str, seconds: float) -> None:
        self._add(phase, seconds)
        self._lap += seconds

    def _add(self, phase: str, seconds: float) -> None:
        self._seconds[phase] += seconds
        if phase == "comm_exposed":
            self.waits.append(seconds)


class Event(Protocol):
    """What is used of torch.cuda.Event."""

    def record(self) -> None: ...

    def query(self) -> bool: ...

    def synchronize(self) -> None: ...

    def elapsed_time(self, end_event: Any, /) -> float:
        """Milliseconds."""
        ...


def timing_event() -> Event:
    event: Event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
    return event


class DeviceClock(HostClock):
    """Phases by events on the GPU's current stream, resolved by `take`.

    The host only hands work to the stream; its own clock would book all of it to whatever waits
    next. A phase is what the stream spent between two events, idle or not: data that is fetched
    while the GPU still computes costs nothing, as it should. `lap` stays the host's.

    Never ran on a GPU.
    """

    def __init__(self, event: Callable[[], Event] = timing_event) -> None:
        super().__init__()
        self._event = event
        self._spare: list[Event] = []
        self._held: list[tuple[str | None, Event]] = []
        """Not resolved yet, in the order of the stream; None: the time before it counts nowhere."""
        self._record(None)

    def restart(self) -> None:
        super().restart()
        self._record(None)

    def mark(self, phase: str) -> None:
        super().mark(phase)
        self._record(phase)
        half = len(self._held) // 2
        # A stream completes its events in order, so one answer is enough, and none is waited for.
        if half >= _HELD // 2 and self._held[half][1].query():
            self._resolve(half)

    def take(self) -> dict[str, float]:
        """Waits until the stream has come to the last mark: not for use inside an update."""
        self._held[-1][1].synchronize()
        self._resolve(len(self._held) - 1)
        return super().take()

    def _book(self, phase: str, seconds: float) -> None:
        self._lap += seconds

    def _record(self, phase: str | None) -> None:
        event = self._spare.pop() if self._spare else self._event()
        event.record()
        self._held.append((phase, event))

    def _resolve(self, count: int) -> None:
        """Book the times up to the event of this index, which stays as the beginning of the
        next."""
        for index in range(count):
            before, (phase, after) = self._held[index][1], self._held[index + 1]
            if phase is not None:
                self._add(phase, before.elapsed_time(after) / 1e3)
            self._spare.append(before)
        del self._held[:count]


_COPYING: ContextVar[HostClock | None] = ContextVar("copying", default=None)


@contextmanager
def copies_marked(clock: HostClock | None) -> Iterator[None]:
    """Mark what `copying` encloses in this block: data sets know nothing of who times them."""
    token = _COPYING.set(clock)
    try:
        yield
    finally:
        _COPYING.reset(token)


@contextmanager
def copying() -> Iterator[None]:
    """Around a copy to a GPU: what came before was ``data``, this is ``to_device``."""
    clock = _COPYING.get()
    if clock is not None:
        clock.mark("data")
    yield
    if clock is not None:
        clock.mark("to_device")
