"""What is measured beside training: phases, the spread over ranks, counters, traces."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch

from harness.comm.base import Communicator, allreduce
from harness.counters import Counters, memory_peak
from harness.phases import WAITS, DeviceClock, HostClock
from harness.records import PHASES
from harness.schema import Profile
from harness.spread import RankTime, Stragglers, least_wait, slowest
from harness.tracing import Tracer

_BUSY = tuple(phase for phase in PHASES if phase != "comm_exposed")

_UPDATES = WAITS
"""Updates between two gatherings at least, so that they stay cheap where each line has one update:
between ranks of one host a gathering takes some tenths of a millisecond."""


@dataclass(frozen=True)
class Facts:
    """What a line of metrics.jsonl gets from the profiler."""

    fields: dict[str, Any]
    straggler: dict[str, Any] | None = None
    """An event's fields, where a rank has been slow for a while."""


class Profiler:
    """One rank's; the ranks make the same calls. Nothing of it reaches the training's numbers."""

    def __init__(self, settings: Profile, comm: Communicator, folder: Path) -> None:
        """``folder``: for traces."""
        self._comm = comm
        self.clock = DeviceClock() if comm.device.type == "cuda" else HostClock()
        self._hosts = [place.host for place in comm.topology.places]
        self._counters = Counters(comm.device) if settings.enabled and comm.rank == 0 else None
        self._enabled = settings.enabled
        self._stragglers = Stragglers()
        self._tracer = settings.trace and Tracer(settings.trace, comm, self.clock, folder)
        self._forget()

    def begin(self, update: int) -> None:
        """An update begins; what the loop did since the last one is its ``other``."""
        self.clock.mark("other")
        if self._tracer:
            self._tracer.before(update)

    def end(self, update: int) -> bool:
        """It is over; whether a trace is."""
        self._updates += 1
        return bool(self._tracer and self._tracer.after(update))

    def worked(self, samples: int) -> None:
        """A micro-batch of this rank, and the samples in it."""
        self._samples += samples
        self._micro_batches += 1

    @contextmanager
    def outside(self) -> Iterator[None]:
        """Around what is no part of any update: evaluation, checkpoints."""
        self.clock.mark("other")
        yield
        self.clock.restart()

    def take(self) -> dict[str, float]:
        """Seconds by phase since the last take. Not for use inside an update."""
        taken = self.clock.take()
        for phase in _BUSY:
            self._busy[phase] += taken[phase]
        return taken

    def facts(self) -> Facts:
        """For the line of the updates up to here; after `take`. Collective.

        ``rank_seconds`` covers the updates since it was last told; it and ``memory_peak_bytes`` are
        null in lines that follow too soon.
        """
        fields: dict[str, Any] = dict.fromkeys(("rank_seconds", "memory_peak_bytes", "counters"))
        straggler = None
        if self._enabled and self._updates >= _UPDATES:
            ranks, waits, fields["memory_peak_bytes"] = self._gather()
            if len(ranks) > 1:
                fields["rank_seconds"], straggler = self._compare(ranks)
                fields["rank_seconds"]["wait_least"] = least_wait(waits)
            self._forget()
        if self._counters is not None:
            fields["counters"] = self._counters.read()
        return Facts(fields, straggler)

    def close(self) -> None:
        """Write what there is of a trace."""
        if self._tracer:
            self._tracer.close()

    def _gather(self) -> tuple[list[RankTime], list[list[float]], int]:
        """All ranks' times, how long each waited in each of the last updates, and the largest of
        their memory peaks; each rank writes its own row of a table of zeros, and the tables add
        up."""
        waits = list(self.clock.waits)
        waits = [math.nan] * (WAITS - len(waits)) + waits  # as many on all ranks
        own = [*self._busy.values(), *waits, self._samples, self._micro_batches]
        own.append(memory_peak(self._comm.device))
        table = torch.zeros(self._comm.size, len(own), dtype=torch.float64)
        table[self._comm.rank] = torch.tensor(own, dtype=torch.float64)
        self.clock.mark("other")
        rows = allreduce(self._comm, table, "profile").tolist()
        self.clock.mark("comm_exposed")  # who comes first waits
        ranks = [
            RankTime(dict(zip(_BUSY, row, strict=False)), int(row[-3]), int(row[-2]))
            for row in rows
        ]
        each = [row[len(_BUSY) : len(_BUSY) + WAITS] for row in rows]
        return ranks, each, int(max(row[-1] for row in rows))

    def _compare(self, ranks: Sequence[RankTime]) -> tuple[dict[str, Any], dict[str, Any] | None]:
        worst = slowest(ranks)
        spread = {
            "busy_max": ranks[worst.rank].busy,
            "busy_median": median(rank.busy for rank in ranks),
            "slowest_rank": worst.rank,
            "slowest_host": self._hosts[worst.rank],
            "phase": worst.phase,
            "ratio": worst.ratio or None,
            "updates": self._updates,
        }
        straggler = self._stragglers.observe(worst, len(ranks), self._updates)
        if straggler is None:
            return spread, None
        return spread, {"host": self._hosts[straggler.rank], **asdict(straggler)}

    def _forget(self) -> None:
        """Begin to count for the next gathering."""
        self._busy = dict.fromkeys(_BUSY, 0.0)
        self._samples = self._micro_batches = self._updates = 0
