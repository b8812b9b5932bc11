"""What each rank of `harness doctor --ranks` executes: does everything that a run asks of machines.

    python -m harness.twoway DIR

Joins the other ranks, adds up a tensor, sends to each other rank and receives from it, compares
clocks and versions, and reads in DIR what the others have written. Says in DIR where it is before
each step, so that one that hangs or dies there is known by its host.
"""

from __future__ import annotations

import json
import os
import platform
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from harness import environment
from harness.errors import HarnessError, RankFailure
from harness.jsonl import write_json
from harness.twoway_steps import RESULT, Steps
from harness.versions import installed_version

if TYPE_CHECKING:
    from mpi4py import MPI

    from harness.comm import Communicator

VERSIONS = ("torch", "horovod", "mpi4py", "numpy")
_BYTES = 1 << 20
"""Of a message of a pair: too long to be on its way before the other side takes it."""
_PATIENCE = 20.0
"""Seconds for a message of a pair, and for a file of another host to be seen."""
_PINGS = 5


def rounds(size: int) -> Iterator[list[tuple[int, int]]]:
    """Every pair of ranks once, in rounds in which each rank has one partner at most (the circle
    method of tournaments)."""
    players = list(range(size + size % 2))
    for _ in range(len(players) - 1):
        half = len(players) // 2
        pairs = zip(players[:half], reversed(players[half:]), strict=True)
        yield [(min(pair), max(pair)) for pair in pairs if max(pair) < size]
        players = [players[0], players[-1], *players[1:-1]]


def check(folder: Path) -> None:
    """All steps, as one rank. Raises HarnessError for what is wrong."""
    rank, host = environment.launched_rank(), environment.host()
    steps = Steps(folder, rank, host)
    steps.begin("start", versions=_versions(), pid=os.getpid())
    steps.begin("torch")
    import torch

    from harness.comm import allreduce, mpi, open_communicator
    from harness.comm.base import allgather_bytes

    steps.begin("horovod")
    import horovod.torch  # noqa: F401 - whether it can be

    steps.begin("join")
    comm = open_communicator("horovod")
    steps.begin("allreduce", kind=comm.kind)
    total = allreduce(comm, torch.full((1 << 18,), float(comm.rank + 1)), "doctor.sum")
    expected = comm.size * (comm.size + 1) / 2
    if not bool((total == expected).all()):
        raise HarnessError(f"an allreduce gave {float(total[0]):g} where {expected:g} is right")
    world = mpi.running_world()
    told = [json.loads(one) for one in allgather_bytes(comm, _about(host), "doctor.about")]
    hosts = [one["host"] for one in told]
    pairs = {} if world is None or world.Get_size() != comm.size else _pairs(world, hosts, steps)
    steps.begin("directory")
    unseen = _unseen(comm, folder, hosts)
    found = json.dumps({"pairs": pairs, "unseen": unseen}).encode()
    every = [json.loads(one) for one in allgather_bytes(comm, found, "doctor.found")]
    if comm.rank == 0:
        write_json(
            folder / RESULT,
            {
                "kind": comm.kind,
                "ranks": [about | found for about, found in zip(told, every, strict=True)],
                "pairs_tried": world is not None,
            },
        )
    steps.begin("done")
    comm.close()
    mpi.leave()


def _versions() -> dict[str, str | None]:
    return {
        "python": platform.python_version(),
        "harness": installed_version(),
        **{name: installed_version(name) for name in VERSIONS},
    }


def _about(host: str) -> bytes:
    about: dict[str, Any] = {"host": host, "versions": _versions(), "mpi": None}
    try:
        from mpi4py import MPI

        about["mpi"] = MPI.Get_library_version().strip("\0\n ").splitlines()[0]
    except (ImportError, RuntimeError):
        pass
    return json.dumps(about).encode()


# Pairs


def _pairs(world: MPI.Intracomm, hosts: list[str], steps: Steps) -> dict[str, dict[str, float]]:
    """Peer's rank -> seconds of a message there and back, and how far its clock is ahead of ours,
    with the most that this can be wrong."""
    me, found = world.Get_rank(), {}
    for pairs in rounds(world.Get_size()):
        for first, second in pairs:
            if me in (first, second):
                peer = second if me == first else first
                steps.begin("pairs", peer=f"rank {peer} on {hosts[peer]}")
                found[str(peer)] = _exchange(world, peer, hosts[peer], leads=me == first)
    return found


def _exchange(world: MPI.Intracomm, peer: int, host: str, leads: bool) -> dict[str, float]:
    payload = np.full(_BYTES // 8, float(world.Get_rank()))
    arrived = np.empty_like(payload)
    begun = time.perf_counter()
    _wait(world.Isend(payload, peer), world.Irecv(arrived, peer), host)
    seconds = time.perf_counter() - begun
    if not (arrived == peer).all():
        raise RankFailure(f"what arrives from rank {peer} on {host} is not what was sent")
    best = min((_ping(world, peer, host, leads) for _ in range(_PINGS)), key=lambda ping: ping[1])
    return {"seconds": seconds, "ahead": best[0], "within": best[1]}


def _ping(world: MPI.Intracomm, peer: int, host: str, leads: bool) -> tuple[float, float]:
    """How far the peer's clock is ahead, by a message there and back, and the error's bound."""
    theirs = np.zeros(1)
    if leads:
        before = time.time()
        _send(world, peer, host)
        _wait(None, world.Irecv(theirs, peer), host)
        after = time.time()
        return float(theirs[0]) - (before + after) / 2, (after - before) / 2
    _wait(None, world.Irecv(theirs, peer), host)
    _send(world, peer, host)
    return 0.0, float("inf")


def _send(world: MPI.Intracomm, peer: int, host: str) -> None:
    _wait(world.Isend(np.array([time.time()]), peer), None, host)


def _wait(sent: MPI.Request | None, received: MPI.Request | None, host: str) -> None:
    """Raise RankFailure, by the peer's host, if a message does not come or go in time."""
    until = time.monotonic() + _PATIENCE
    waiting = {"to": sent, "from": received}
    while waiting := {way: one for way, one in waiting.items() if one and not one.Test()}:
        if time.monotonic() > until:
            ways = " and ".join(f"{way} {host}" for way in waiting)
            raise RankFailure(f"no message gets {ways} within {_PATIENCE:g} s")
        time.sleep(0)


# The directory


def _unseen(comm: Communicator, folder: Path, hosts: list[str]) -> list[int]:
    """The ranks whose file, written now, cannot be read here."""
    import torch

    from harness.comm import allreduce

    token = f"{comm.rank} on {hosts[comm.rank]}"
    (folder / f"seen-{comm.rank:05d}").write_text(token, encoding="utf-8")
    allreduce(comm, torch.zeros(1), "doctor.written")
    until = time.monotonic() + _PATIENCE / 4
    left = list(range(comm.size))
    while left:
        left = [rank for rank in left if not _reads(folder, rank, f"{rank} on {hosts[rank]}")]
        if time.monotonic() > until:
            break
        if left:
            time.sleep(0.05)
    return left


def _reads(folder: Path, rank: int, token: str) -> bool:
    try:
        return (folder / f"seen-{rank:05d}").read_text(encoding="utf-8") == token
    except OSError:
        return False


def main() -> int:
    """As one rank; returns the exit code. Errors end as one message in the failure directory."""
    folder = Path(sys.argv[1])
    try:
        check(folder)
    except Exception as error:
        from harness.last_words import leave_at_once, leave_last_words

        leave_at_once(leave_last_words(error, environment.launched_rank()))
    return 0


if __name__ == "__main__":
    sys.exit(main())
