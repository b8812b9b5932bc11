"""What each rank of ``harness probe`` executes: how long collectives take, by the message's size.

    python -m harness.probe DIR --max-mb 64 --seconds 20

Every operation starts on all ranks at once, after a barrier, and takes as long as on the slowest of
them. The operations take turns, in another order in each round, so that what disturbs the machine
for a while disturbs them alike. Every warm-up round checks the sums too.

MPI by itself is measured twice: before Horovod is started, and in turn with it. Horovod's thread
talks to the other ranks by MPI all the time, with nothing to do too, and MPI lets one thread in at
a time.
"""

from __future__ import annotations

import argparse
import io
import itertools
import math
import random
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from harness import environment
from harness.buckets import Bucket
from harness.comm import Communicator, allreduce, mpi, open_communicator
from harness.compression import build_codec
from harness.errors import HarnessError, LaunchError, StoppedEarly
from harness.files import write_atomic
from harness.jsonl import write_json
from harness.last_words import leave_at_once, leave_last_words
from harness.probe_results import (
    GLOO,
    HOROVOD,
    HOROVOD_BROADCAST,
    HOROVOD_FP16,
    MPI_ALONE,
    MPI_BESIDE,
    NAME,
    OPERATIONS,
    Operation,
    Timing,
    as_csv,
    in_order,
    print_tables,
    shown_size,
)
from harness.provenance import collect
from harness.rundir import RunDirectory
from harness.schema import Comm
from harness.wording import counted

if TYPE_CHECKING:
    from mpi4py import MPI

WARM_UP = 2
"""Rounds that are not counted: the first agrees on buffers, the second is the first to use them."""
LEAST_ROUNDS = 5
MOST_ROUNDS = 200
_CLOSE = 0.01  # of fp16's sums, which are rounded from 2,048 ranks on


def message_sizes(max_mb: int) -> tuple[int, ...]:
    """Bytes: the powers of 4 from 4 up to ``max_mb`` MiB, and that itself."""
    largest = max_mb * 2**20
    powers = itertools.takewhile(lambda size: size < largest, (4**k for k in itertools.count(1)))
    return (*powers, largest)


def round_order(count: int, size: int, number: int) -> list[int]:
    """The order in which so many operations take their turns in a round; equal on all ranks."""
    # A seed of text does not depend on the interpreter's hash seed.
    return random.Random(f"{size}/{number}").sample(range(count), count)  # noqa: S311


def is_enough(rounds: int, seconds_left: float) -> bool:
    """Whether as many counted rounds are enough, with that much left of a size's time."""
    return rounds >= MOST_ROUNDS or (rounds >= LEAST_ROUNDS and seconds_left <= 0)


# Measuring


@dataclass(frozen=True)
class Action:
    """An operation on one tensor, ready to be timed."""

    operation: Operation
    prepare: Callable[[], object]
    """Runs before the clock does."""
    run: Callable[[], object]
    result: Tensor
    expected: float
    """What each element of ``result`` is then."""

    def check(self) -> None:
        """Raise HarnessError if the result is wrong."""
        low, high = (float(bound) for bound in self.result.aminmax())
        if not all(math.isclose(bound, self.expected, rel_tol=_CLOSE) for bound in (low, high)):
            raise HarnessError(
                f"{self.operation.label} of {shown_size(self.result.nbytes)} gave values from "
                f"{low:g} to {high:g} where all are {self.expected:g}; what carries it alters data"
            )


@dataclass(frozen=True)
class Peers:
    """All ranks, and by what they agree between two operations."""

    rank: int
    size: int
    add: Callable[[Tensor], object]
    """Replaces a float64 tensor by its sum over ranks."""
    wait: Callable[[], object]
    """A barrier."""

    def share(self, seconds: Sequence[float], verdict: int) -> tuple[list[float], int]:
        """The slowest rank's seconds of each operation, and rank 0's verdict."""
        table = torch.zeros(self.size, len(seconds) + 1, dtype=torch.float64)
        table[self.rank] = torch.tensor([*seconds, verdict], dtype=torch.float64)
        self.add(table)
        slowest: list[float] = table[:, :-1].max(dim=0).values.tolist()
        return slowest, int(table[0, -1])


def peers_by_mpi(world: MPI.Intracomm) -> Peers:
    return Peers(
        world.Get_rank(),
        world.Get_size(),
        lambda tensor: mpi.raw_allreduce(world, tensor),
        world.Barrier,
    )


def peers_of(comm: Communicator) -> Peers:
    return Peers(
        comm.rank,
        comm.size,
        lambda tensor: allreduce(comm, tensor, "probe.share"),
        lambda: allreduce(comm, torch.zeros(1), "probe.barrier"),
    )


_GO_ON, _ENOUGH, _STOP = 0, 1, 2


def measure(
    actions: Sequence[Action], peers: Peers, size: int, budget: float, stop: Callable[[], bool]
) -> list[Timing]:
    """Time the operations, a round after the other, for about ``budget`` seconds.

    ``stop``: whether someone wants to end it; rank 0 asks. A collective call. Raises StoppedEarly
    on all ranks, HarnessError for wrong sums.
    """
    begin = time.perf_counter()
    rounds: list[list[float]] = []
    for number in itertools.count():
        mine = [0.0] * len(actions)
        for index in round_order(len(actions), size, number):
            mine[index] = _timed(actions[index], peers)
            if number < WARM_UP:
                actions[index].check()
        counted = number + 1 - WARM_UP
        left = budget - (time.perf_counter() - begin)
        verdict = _STOP if stop() else _ENOUGH if is_enough(counted, left) else _GO_ON
        slowest, verdict = peers.share(mine, verdict)
        if verdict == _STOP:
            raise StoppedEarly("stopped on request")
        if number >= WARM_UP:
            rounds.append(slowest)
        if verdict == _ENOUGH:
            break
    return [
        Timing(action.operation, size, peers.size, tuple(seconds))
        for action, seconds in zip(actions, zip(*rounds, strict=True), strict=True)
    ]


def _timed(action: Action, peers: Peers) -> float:
    action.prepare()
    _finish(action.result)
    peers.wait()
    begin = time.perf_counter()
    action.run()
    _finish(action.result)
    return time.perf_counter() - begin


def _finish(tensor: Tensor) -> None:
    if tensor.is_cuda:
        torch.cuda.synchronize(tensor.device)


def measure_sizes(
    make: Callable[[int], Sequence[Action]],
    peers: Peers,
    sizes: Sequence[int],
    budget: float,
    stop: Callable[[], bool],
) -> Iterator[Timing]:
    """Timings of all sizes, the largest first: what takes long regardless is known before the rest
    of the time is shared out, and two ranks that begin on one core have been parted by then.

    ``make``: the operations on messages of so many bytes. ``budget``: seconds.
    """
    begin = time.perf_counter()
    for index, size in enumerate(sorted(sizes, reverse=True)):
        left = budget - (time.perf_counter() - begin)
        yield from measure(make(size), peers, size, left / (len(sizes) - index), stop)


# The operations


def mpi_action(operation: Operation, world: MPI.Intracomm, tensor: Tensor) -> Action:
    """The sum by mpi4py, in place."""
    return Action(
        operation,
        lambda: tensor.fill_(1.0),
        lambda: mpi.raw_allreduce(world, tensor),
        tensor,
        world.Get_size(),
    )


def sum_action(operation: Operation, comm: Communicator, tensor: Tensor) -> Action:
    """The sum of float32, in place."""
    name = f"probe.sum.{tensor.nbytes}"
    return Action(
        operation,
        lambda: tensor.fill_(1.0),
        lambda: allreduce(comm, tensor, name),
        tensor,
        comm.size,
    )


def broadcast_action(comm: Communicator, tensor: Tensor) -> Action:
    """Rank 0's float32 to all ranks."""
    name, own = f"probe.broadcast.{tensor.nbytes}", float(comm.rank == 0)
    return Action(
        HOROVOD_BROADCAST,
        lambda: tensor.fill_(own),
        lambda: comm.broadcast(tensor, name),
        tensor,
        1.0,
    )


def fp16_action(comm: Communicator, size: int) -> Action:
    """The sum of a gradient of ``size`` bytes, as one bucket with ``comm.compression = fp16``:
    scaled and cast, summed up, cast back."""
    gradient = torch.ones(size // 4, device=comm.device)
    bucket = Bucket(0, ["probe"], [nn.Parameter(gradient)], torch.zeros_like(gradient))
    codec = build_codec(bucket, "fp16", "float")
    codec.learn(comm.size * math.sqrt(gradient.numel()), finite=True)  # else float32 goes first

    def run() -> None:
        allreduce(comm, codec.pack([gradient], [0], held=False), f"probe.fp16.{size}")
        codec.unpack()

    return Action(HOROVOD_FP16, lambda: None, run, bucket.flat, comm.size)


# A rank from start to end


@dataclass
class Probe:
    """What one rank of a probe knows."""

    directory: RunDirectory
    sizes: tuple[int, ...]
    seconds: float
    """About how long to measure, all together."""
    timings: list[Timing] = field(default_factory=list)
    left_out: dict[str, str] = field(default_factory=dict)
    """Label of an operation that cannot be measured here -> why."""

    def run(self) -> None:
        """Measure all that can be measured here, and write it down on rank 0."""
        torch.set_num_threads(
            max(1, environment.usable_cores() // environment.launched_local_size())
        )
        world = self._join_mpi()
        share = self.seconds / len(OPERATIONS)
        if world is not None:
            self._measure_mpi(world, share)
        comm = open_communicator("horovod")
        if comm.kind == "solo":
            raise LaunchError("no launcher has started this rank; call harness probe, which does")
        gloo = self._open_gloo()
        self._measure_engines(comm, gloo, self.seconds - (share if world is not None else 0))
        if comm.rank == 0:
            self._write(comm)
        comm.close()
        if gloo is not None:
            gloo.close()
        mpi.leave()

    def _stopped(self) -> bool:
        return self.directory.stop_request.exists()

    def _join_mpi(self) -> MPI.Intracomm | None:
        """Start MPI before Horovod does, with the settings that Horovod's ranks have."""
        if not environment.started_by_mpi():
            self.left_out[MPI_ALONE.label] = "the ranks were not started by MPI"
            return None
        try:
            from harness.comm.horovod import settle

            settle(Comm())
            return mpi.join_world()
        except ImportError:  # opening the communicator says so, and what to do
            return None
        except LaunchError:
            self.left_out[MPI_ALONE.label] = "mpi4py cannot be imported"
            return None

    def _measure_mpi(self, world: MPI.Intracomm, budget: float) -> None:
        def make(size: int) -> list[Action]:
            return [mpi_action(MPI_ALONE, world, torch.empty(size // 4))]

        self.timings += measure_sizes(make, peers_by_mpi(world), self.sizes, budget, self._stopped)

    def _open_gloo(self) -> Communicator | None:
        """torch.distributed beside Horovod, where the ranks can find each other for it."""
        from harness.comm.torch_dist import TorchCommunicator

        try:
            return TorchCommunicator()
        except LaunchError:
            self.left_out[GLOO.label] = "its ranks cannot find each other under this launcher"
            return None

    def _measure_engines(
        self, comm: Communicator, gloo: Communicator | None, budget: float
    ) -> None:
        world = mpi.running_world()
        if world is not None and world.Get_size() != comm.size:  # of another launcher's
            world = None

        def make(size: int) -> list[Action]:
            # One piece of memory for all that work in place, so that caches favour none.
            tensor = torch.empty(size // 4, device=comm.device)
            on_host = tensor.cpu()
            actions = [sum_action(HOROVOD, comm, tensor), broadcast_action(comm, tensor)]
            actions.append(fp16_action(comm, size))
            if world is not None:
                actions.append(mpi_action(MPI_BESIDE, world, on_host))
            if gloo is not None:
                actions.append(sum_action(GLOO, gloo, on_host))
            return actions

        peers = peers_by_mpi(world) if world is not None else peers_of(comm)
        self.timings += measure_sizes(make, peers, self.sizes, budget, self._stopped)

    def _write(self, comm: Communicator) -> None:
        path = self.directory.path
        timings = in_order(self.timings)
        write_atomic(path / "probe.csv", as_csv(timings).encode())
        write_json(
            path / NAME,
            {
                "provenance": collect(comm),
                "mpi": _mpi_library(),
                "ranks": comm.size,
                "warm_up_rounds": WARM_UP,
                "left_out": self.left_out,
                "timings": [timing.as_dict() for timing in timings],
            },
        )
        hosts = len(comm.topology.by_host())
        print_tables(
            f"{counted(comm.size, 'rank')} on {counted(hosts, 'host')}, {comm.kind}",
            timings,
            self.left_out,
        )


def _mpi_library() -> str | None:
    """What MPI says of itself, if it runs."""
    if mpi.running_world() is None:
        return None
    from mpi4py import MPI

    return MPI.Get_library_version().strip("\0\n ")


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure as one rank; returns the exit code. Errors end as one message."""
    parser = argparse.ArgumentParser(prog="python -m harness.probe", description=__doc__)
    parser.add_argument("directory", type=Path, metavar="DIR")
    parser.add_argument("--max-mb", type=int, required=True)
    parser.add_argument("--seconds", type=float, required=True)
    options = parser.parse_args(arguments)
    if isinstance(sys.stdout, io.TextIOWrapper):  # a launcher's pipe that only knows ASCII
        sys.stdout.reconfigure(errors="replace")
    sizes = message_sizes(options.max_mb)
    try:
        Probe(RunDirectory(options.directory), sizes, options.seconds).run()
    except StoppedEarly as stopped:
        leave_at_once(stopped.exit_code)
    except Exception as error:
        leave_at_once(leave_last_words(error, environment.launched_rank()))
    return 0


if __name__ == "__main__":
    sys.exit(main())
