"""Horovod's collectives. Importing this module needs Horovod; nothing else in harness does."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import horovod.torch as hvd
import psutil
import torch
from horovod.common.elastic import notification_manager
from horovod.common.exceptions import HorovodInternalError
from horovod.runner.common.util import network

from harness import environment, pulse
from harness.comm.base import Handle, device_of_rank
from harness.comm.topology import gather_topology
from harness.errors import HarnessError, PeerLost
from harness.schema import Comm


class HorovodCommunicator:
    """All ranks that the launcher started, over Horovod with an MPI or Gloo controller.

    Seen to work on CPUs. A Horovod that was built with NCCL was not measured.
    """

    def __init__(self, settings: Comm | None = None, timeline: bool = False) -> None:
        """``timeline``: `start_timeline` may be called."""
        settle(settings or Comm())
        if timeline:
            os.environ[environment.TIMELINE] = "DYNAMIC"
        hvd.init()
        # Built without NCCL, Horovod has no way of its own between GPUs; ranks that share one go
        # through the host anyway.
        sharing = environment.ranks_per_gpu()
        gpus = torch.cuda.is_available() and (bool(hvd.nccl_built()) or sharing > 1)
        self.device = device_of_rank(self.local_rank, gpus, sharing)
        if gpus:
            torch.cuda.set_device(self.device)
        try:
            self.topology = gather_topology(self)
        except PeerLost:
            hvd.shutdown()  # so that an elastic run can begin its next world
            raise

    @property
    def kind(self) -> str:
        return "horovod-mpi" if hvd.mpi_enabled() else "horovod-gloo"

    @property
    def rank(self) -> int:
        return int(hvd.rank())

    @property
    def size(self) -> int:
        return int(hvd.size())

    @property
    def local_rank(self) -> int:
        return int(hvd.local_rank())

    @property
    def local_size(self) -> int:
        return int(hvd.local_size())

    def allreduce_async(self, tensor: torch.Tensor, name: str) -> Handle:
        pulse.begins(name)
        with _naming_the_cause():
            return hvd.allreduce_async_(tensor, name=name, op=hvd.Sum)

    def wait(self, handle: Handle) -> None:
        with pulse.meeting(), _naming_the_cause():
            hvd.synchronize(handle)

    def broadcast(self, tensor: torch.Tensor, name: str) -> None:
        pulse.begins(name)
        with pulse.meeting(), _naming_the_cause():
            hvd.broadcast_(tensor, root_rank=0, name=name)

    def close(self) -> None:
        hvd.shutdown()


class _Listener:
    def __init__(self, tell: Callable[[], None]) -> None:
        self._tell = tell

    def on_hosts_updated(self, timestamp: int, change: object) -> None:
        """Called by Horovod's notification service."""
        self._tell()


def listen_for_hosts(tell: Callable[[], None]) -> None:
    """Have ``tell`` called, in a thread, when the driver of Horovod Elastic sees other hosts that
    would change the world while this process is rank 0."""
    with _listening_at(environment.gloo_interface()):
        notification_manager.init()
    notification_manager.register_listener(_Listener(tell))


@contextmanager
def _listening_at(interface: str | None) -> Iterator[None]:
    """Have Horovod's service of this process listen on that interface, and not on all of them."""
    address = next(
        (
            entry.address
            for entry in psutil.net_if_addrs().get(interface or "", ())
            if entry.family == socket.AF_INET
        ),
        None,
    )
    find_port = network.find_port
    if address is not None:
        network.find_port = lambda serve: _serving(serve((address, 0)))
    try:
        yield
    finally:
        network.find_port = find_port


def _serving(server: Any) -> tuple[Any, int]:
    return server, server.server_address[1]


def start_timeline(path: Path) -> None:
    """Have Horovod write its timeline there, on rank 0, until the ranks part. All ranks call it."""
    hvd.start_timeline(str(path))


def settle(settings: Comm) -> None:
    """Put Horovod's and MPI's settings where they read them when they are initialised.

    Each rank does this for itself, so that ranks started by a plain mpirun have them too, and
    because only a rank knows the cores of its host.
    """
    os.environ.update(environment.communication_settings(settings))
    # Gradients come in buckets of our own. Horovod's fusion groups by time of arrival, which with
    # three ranks or more changes the order of summation from run to run.
    os.environ.setdefault(environment.FUSION, "0")
    # Horovod looks for work once per cycle; its default of 1 ms is longer than many an update of a
    # small network.
    os.environ.setdefault(environment.CYCLE_TIME, "0.1")
    if environment.elastic_bounds() is not None:
        # The second initialisation of a process in which both are fixed crashes (0.28.1:
        # BayesianParameter::SetValue writes to an empty vector), so that one keeps its default.
        del os.environ[environment.CYCLE_TIME]
    if environment.launched_local_size() * torch.get_num_threads() >= environment.usable_cores():
        # MPI spins while it waits, on cores that other ranks or this one's own threads need.
        os.environ.setdefault(environment.YIELD, "1")


@contextmanager
def _naming_the_cause() -> Iterator[None]:
    """Horovod's error for a collective that fails because another rank is gone, in plain words."""
    try:
        yield
    except HorovodInternalError as error:
        if "Mismatched" in str(error):
            raise HarnessError(f"the ranks do not do the same: {error}") from None
        raise PeerLost(f"another rank left in the middle of a collective: {error}") from None
