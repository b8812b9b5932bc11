"""A world of ranks that changes while they live, under Horovod Elastic with its Gloo controller.

Nothing of the training is kept in memory from one world to the next: the ranks leave a world at the
same update with a checkpoint, or, when one of them is lost, without, and begin the next one from
the newest checkpoint as any run does that goes on. What survives is the processes, with all that
they have imported. `docs/elastic.md` has the whole picture.

Horovod's driver, which runs in horovodrun, deals out ranks to processes that ask for a place, and
waits until all of them have asked or ended. They then meet at its key-value store before they join
Horovod, because a Horovod that waits in vain for a rank ends its process (SIGABRT).
"""

from __future__ import annotations

import http.client
import json
import os
import subprocess
import threading
import time
from contextlib import closing, suppress
from pathlib import Path

import torch

from harness import environment, pulse
from harness.comm.base import Communicator, allgather_bytes, allreduce, broadcast_bytes
from harness.comm.together import together
from harness.errors import LaunchError, PeerLost, RankFailure
from harness.files import write_atomic
from harness.jsonl import now
from harness.rundir import RunDirectory
from harness.wording import counted

_NOTICE = 10.0  # seconds in which the driver, which looks at hosts once a second, tells of new ones
_PLACE_PATIENCE = 900.0  # more than the 600 s for which the driver waits for hosts
_MEETING_PATIENCE = 60.0  # for new processes to start, import and come
_POLL = 0.05
_MAX_VAIN = 5


class Regroup(Exception):  # noqa: N818 - not an error: all ranks leave for their next world
    """All ranks raise this at the same update, after a checkpoint."""


class LeftOut(Exception):  # noqa: N818 - neither is this
    """This process has no rank in the next world."""


class Membership:
    """A process's part in worlds that follow each other."""

    def __init__(self, bounds: tuple[int, int]) -> None:
        """``bounds``: the least and the most ranks."""
        self._least, self._most = bounds
        self._news = threading.Event()
        self._worlds = 0
        self._vain = 0
        self._cores = os.sched_getaffinity(0)
        self._tried: set[str] = set()
        self._hosts: set[str] = set()
        self._lost_one = False
        self.reason: str | None = None
        """Why the world before this one was left; None for a process that saw none."""
        self.lost_at: str | None = None
        """When it was left, if that was because a rank was lost."""
        from harness.comm.horovod import listen_for_hosts

        listen_for_hosts(self._news.set)

    @classmethod
    def of_this_process(cls) -> Membership | None:
        """None if no Horovod Elastic has started it."""
        bounds = environment.elastic_bounds()
        return None if bounds is None else cls(bounds)

    @property
    def changed(self) -> bool:
        """Whether this rank has been told of other hosts. The driver tells rank 0 only."""
        return self._news.is_set()

    def assemble(self) -> None:
        """Return when every rank of the world is about to join it; this one is bound to no cores.

        Raises PeerLost if one has not come in time, RankFailure if there are too few or too many.
        """
        os.sched_setaffinity(0, self._cores)
        size, rank = environment.launched_world_size() or 1, environment.launched_rank()
        if not self._least <= size <= self._most:
            raise RankFailure(
                f"horovodrun made a world of {size} ranks, but {self._least} to {self._most} were "
                "asked for"
            )
        deadline = time.monotonic() + _MEETING_PATIENCE
        _ask_store("PUT", f"/harness/{rank}", b"here")
        for other in range(size):
            while _ask_store("GET", f"/harness/{other}") is None:
                if time.monotonic() > deadline:
                    raise PeerLost(f"rank {other} has not come within {_MEETING_PATIENCE:.0f} s")
                time.sleep(_POLL)

    def settle(self, comm: Communicator, run: RunDirectory, resume: bool) -> bool:
        """Whether this world goes on with what is in the run directory. Collective: only rank 0 can
        look, and a new process knows nothing of the worlds before it."""
        self._vain = 0
        first = comm.rank == 0
        self._compare_hosts(comm)
        if first and self._lost_one:
            self._set_failures_aside()
        flags = [self._worlds > 0, first and run.newest().config.exists(), first and resume]
        begun, there, asked = allreduce(comm, torch.tensor(flags).float(), "elastic.begun").tolist()
        return bool(asked or (begun and there))

    def leaves(self, comm: Communicator, stop: bool) -> bool:
        """Collective, once some rank has wanted to leave: whether it is for another world. A
        request to stop, seen by any rank, comes first."""
        wishes = torch.tensor([float(stop), float(self.changed)])
        allreduce(comm, wishes, "elastic.leave")
        return bool(wishes[1] and not wishes[0])

    def grow(self, comm: Communicator, wanted: int) -> str | None:
        """Ask the launcher for so many ranks. Collective.

        Returns None if the hosts have changed, so that the ranks should leave this world, else why
        there will be no more of them.
        """
        found = together(comm, lambda: self._ask(comm.size, wanted) if comm.rank == 0 else None)
        told = broadcast_bytes(comm, (found or "").encode() if comm.rank == 0 else None, "growth")
        return told.decode() or None

    def rejoin(self, reason: str, lost_one: bool) -> None:
        """Take this process's place in the next world, once the driver knows of all processes of
        the last one that they have left it.

        ``lost_one``: that world came to its end because a rank was lost. Raises LeftOut if there is
        no such place, RankFailure if worlds fail again and again.
        """
        self._vain += 1
        if self._vain > _MAX_VAIN:
            raise RankFailure(f"{_MAX_VAIN} times in a row the ranks could not meet: {reason}")
        self._worlds += 1
        environment.launched_now()
        self.reason, self._lost_one = reason.partition(". ")[0], lost_one
        self.lost_at = now() if lost_one else None
        self._news.clear()  # what comes from here on is not in the place that the driver gives
        pulse.at("waiting for a place among the ranks")
        with pulse.patient(_PLACE_PATIENCE):
            answer = _ask_store("GET", f"/rank_and_size/{environment.elastic_slot()}")
        numbers = [int(word) for word in (answer or b"-1").split(b",")]
        if numbers[0] < 0:
            raise LeftOut(f"{environment.elastic_slot()} has no place in the next world")
        environment.take_place(numbers)
        pulse.tell_again()

    def _compare_hosts(self, comm: Communicator) -> None:
        """Note the hosts of this world, and which of the last one's a lost rank has cost: others
        are to be filled before them. Collective."""
        slots = allgather_bytes(comm, environment.elastic_slot().encode(), "elastic.slots")
        hosts = {slot.decode().rpartition(":")[0] for slot in slots}
        if comm.rank == 0 and self._lost_one and (gone := self._hosts - hosts):
            path = environment.discovery_dir() / "failed"
            with suppress(OSError):  # the next host is not worth the run
                failed = gone | set(path.read_text(encoding="utf-8").split())
                write_atomic(path, "".join(f"{host}\n" for host in sorted(failed)).encode())
        self._hosts = hosts

    def _set_failures_aside(self) -> None:
        """What lost ranks have said is why the last world was left, and not how the job ends."""
        folder = environment.failure_dir()
        for path in sorted(folder.glob("rank-*.json")) if folder else []:
            with suppress(OSError, ValueError, LookupError, TypeError):
                note = json.loads(path.read_text(encoding="utf-8"))
                path.rename(path.with_name(f"survived-{self._worlds}-{path.name}"))
                if not note["consequence"]:
                    self.reason = f"rank {note['rank']} on {note['host']}: {note['message']}"

    def _ask(self, size: int, wanted: int) -> str | None:
        """Rank 0's part of ``grow``."""
        folder = environment.discovery_dir()
        write_atomic(folder / "wanted", f"{wanted}\n".encode())
        hosts = _discovered(folder)
        slots = sum(int(line.rpartition(":")[2]) for line in hosts.split())
        if slots <= size:
            return f"there are slots for {counted(slots, 'rank')} only"
        if self._news.wait(_NOTICE):
            return None
        # It may have told of them before this process listened. But they may also be hosts that it
        # has ruled out after a failure, so one try is enough.
        if hosts not in self._tried:
            self._tried.add(hosts)
            return None
        return f"of {counted(slots, 'slot')} the launcher gives {size}"


def _discovered(folder: Path) -> str:
    """What the discovery script tells Horovod's driver: lines of ``HOST:SLOTS``; nothing if it
    fails, as the driver then goes by what it knows."""
    script = [str(folder / "discover.sh")]
    try:
        done = subprocess.run(script, capture_output=True, text=True, timeout=60, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return "" if done.returncode else done.stdout


def _ask_store(method: str, path: str, body: bytes | None = None) -> bytes | None:
    """One request to the driver's key-value store; None if it has nothing there. Raises PeerLost if
    it does not answer: then horovodrun has ended, or its host is gone."""
    store = environment.horovodrun_store()
    if store is None:
        raise LaunchError("launch.elastic = true needs ranks that horovodrun has started")
    try:
        with closing(http.client.HTTPConnection(*store, timeout=_PLACE_PATIENCE)) as connection:
            connection.request(method, path, body)
            response = connection.getresponse()
            content = response.read()
    except (OSError, http.client.HTTPException) as error:
        raise PeerLost(
            f"horovodrun does not answer at {store[0]}:{store[1]} ({error}); the job has ended"
        ) from None
    return content if response.status == 200 else None
