"""Traces of chosen updates by torch.profiler, one of each rank, with what sets their clocks right.

    traces/rank-0003.json         what torch.profiler writes: the Chrome trace event format
    traces/rank-0003.about.json   rank, host, the phases of the updates, readings of the clock
    traces/horovod-0001.json      Horovod's timeline, a file for each start of the ranks

``harness trace RUN_DIR`` makes one file of them (`harness.trace_merge`).
"""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path

import torch

from harness import environment
from harness.comm.base import Communicator, allreduce
from harness.jsonl import write_json
from harness.phases import HostClock
from harness.schema import Trace

_PINGS = 10


class Tracer:
    """Traces the updates that a configuration asks for. Its methods are collective.

    What starting, stopping and writing takes belongs to no phase. Ranks that are not traced wait
    meanwhile, so that no update waits for those that are.
    """

    def __init__(self, settings: Trace, comm: Communicator, clock: HostClock, folder: Path) -> None:
        self._settings, self._comm, self._clock, self._folder = settings, comm, clock, folder
        self._traces = settings.ranks == "all" or comm.rank in settings.ranks
        self._profile: torch.profiler.profile | None = None
        self._pings: list[tuple[int, int]] = []
        self._session = 0
        self._running = False

    def before(self, update: int) -> None:
        """Start where this update is the first to trace; after a resume perhaps not the first of
        those asked for."""
        first, last = self._settings.updates
        if self._running or not first <= update <= last:
            return
        self._clock.mark("other")
        if self._traces:
            self._profile = _profile(self._comm.device)
            self._profile.start()
        self._session = self._agree(time.time_ns())
        self._pings = [self._ping() for _ in range(_PINGS)]
        self._clock.log = []
        self._running = True
        self._clock.restart()

    def after(self, update: int) -> bool:
        """Stop and write where this update was the last one to trace; whether it was."""
        if not self._running or update < self._settings.updates[1]:
            return False
        self._clock.mark("other")
        self._finish()
        allreduce(self._comm, torch.zeros(1), "trace.end")
        self._clock.restart()
        return True

    def close(self) -> None:
        """Write what there is of a trace that the run's end cuts short. Not collective."""
        if self._running:
            self._finish()

    def _finish(self) -> None:
        self._running = False
        log, self._clock.log = self._clock.log or [], None
        if self._profile is None:
            return
        profile, self._profile = self._profile, None
        profile.stop()
        stem = f"rank-{self._comm.rank:04d}"
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            profile.export_chrome_trace(str(self._folder / f"{stem}.json"))
            write_json(self._folder / f"{stem}.about.json", self._about(log))
        except OSError as error:  # a full disk is no reason to end the training
            print(f"harness: {self._folder / stem}: no trace: {error.strerror}", file=sys.stderr)

    def _about(self, log: list[tuple[str, float, float]]) -> dict[str, object]:
        ahead = time.time_ns() - time.perf_counter_ns()
        return {
            "format": 1,
            "session": self._session,
            "rank": self._comm.rank,
            "host": environment.host(),
            "device": str(self._comm.device),
            "pid": os.getpid(),
            "updates": list(self._settings.updates),
            "pings": self._pings,
            "phases": [
                [phase, round(begin * 1e9) + ahead, round(end * 1e9) + ahead]
                for phase, begin, end in log
            ],
        }

    def _agree(self, number: int) -> int:
        agreed = torch.tensor([number], dtype=torch.int64)
        self._comm.broadcast(agreed, "trace.session")
        return int(agreed)

    def _ping(self) -> tuple[int, int]:
        """When, by this host's clock in nanoseconds since the epoch, this rank entered an operation
        of all ranks and left it: no rank leaves before the last one has entered."""
        entered = time.time_ns()
        allreduce(self._comm, torch.zeros(1), "trace.ping")
        return entered, time.time_ns()


def next_timeline(folder: Path) -> Path:
    """Where Horovod's timeline of this start of the ranks goes."""
    folder.mkdir(parents=True, exist_ok=True)
    return folder / f"horovod-{len(list(folder.glob('horovod-*.json'))) + 1:04d}.json"


def _profile(device: torch.device) -> torch.profiler.profile:
    # Else Kineto prints a line at each start and stop, whatever its level of messages.
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")
    activities = [torch.profiler.ProfilerActivity.CPU]
    if device.type == "cuda":
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    return torch.profiler.profile(activities=activities)
