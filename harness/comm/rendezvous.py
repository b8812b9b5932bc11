"""How the ranks of a torch.distributed job find each other.

torch.distributed needs one address that all ranks know: rank 0's store. A port that the launching
process picks may be taken by the time rank 0 listens, and on another host it cannot even be tried;
so rank 0 listens on any free port and then tells the others where. What carries that message is the
channel by which the launcher itself reaches all its ranks. It is there wherever ranks could be
started, and it has no files that an earlier run left or that a network file system shows late:

- mpirun, horovodrun --mpi, srun with PMI: an MPI broadcast;
- horovodrun --gloo: the key-value store that horovodrun keeps for just this;
- MASTER_ADDR and MASTER_PORT, from torchrun or by hand: the address is known already.
"""

from __future__ import annotations

import ipaddress
import json
import os
import socket
import time
import urllib.error
import urllib.request
from contextlib import closing
from dataclasses import dataclass
from datetime import timedelta
from typing import Protocol

import psutil
import torch.distributed as dist
from torch.distributed import TCPStore  # type: ignore[attr-defined]
from torch.distributed.distributed_c10d import Store
from torch.distributed.rendezvous import rendezvous

from harness import environment
from harness.comm import mpi
from harness.errors import LaunchError, RankFailure

LOOPBACK = "127.0.0.1"
_ONE_TRY = 3.0  # seconds to wait for an answer from one address


@dataclass(frozen=True)
class Meeting:
    """The ranks have met: all of them can reach the store."""

    store: Store
    rank: int
    size: int


class Channel(Protocol):
    """What takes rank 0's message to all ranks."""

    @property
    def rank(self) -> int: ...

    @property
    def size(self) -> int: ...

    def share(self, message: bytes) -> bytes:
        """Rank 0's message, on every rank."""


class MpiChannel:
    """A rank that never starts is mpirun's to notice: it ends the job."""

    def __init__(self) -> None:
        self._world = mpi.join_world()
        self.rank: int = self._world.Get_rank()
        self.size: int = self._world.Get_size()

    def share(self, message: bytes) -> bytes:
        return mpi.share_bytes(self._world, message)


class HorovodrunChannel:
    """horovodrun's HTTP store; there is a new one for each launch."""

    def __init__(self, address: str, port: int, patience: float) -> None:
        self._url = f"http://{address}:{port}/harness/rendezvous"
        self._patience = patience
        self.rank = environment.launched_rank()
        self.size = environment.launched_world_size() or 1

    def share(self, message: bytes) -> bytes:
        if self.rank == 0:
            self._ask(urllib.request.Request(self._url, data=message, method="PUT"))  # noqa: S310
            return message
        deadline = time.monotonic() + self._patience
        while time.monotonic() < deadline:
            answer = self._ask(urllib.request.Request(self._url))  # noqa: S310 - an http address
            if answer:
                return answer
            time.sleep(0.05)
        raise RankFailure(
            f"rank 0 has not said within {self._patience:g} s where it listens; is it still alive?"
        )

    def _ask(self, request: urllib.request.Request) -> bytes:
        try:
            with urllib.request.urlopen(request, timeout=_ONE_TRY * 10) as answer:  # noqa: S310
                content: bytes = answer.read()
                return content
        except urllib.error.HTTPError as error:
            if error.code == 404:  # nothing is there yet
                return b""
            raise RankFailure(f"horovodrun's store at {self._url} answers: {error}") from None
        except OSError as error:
            raise RankFailure(f"horovodrun's store at {self._url}: {error}") from None


def meet(patience: float) -> Meeting:
    """Join the other ranks at rank 0's store.

    ``patience``: seconds after which a rank that has not come is given up. Raises RankFailure,
    which names those that are missing, and LaunchError if there is no way to find rank 0.
    """
    if environment.has_master_address():
        return _meet_at_master(patience)
    store = environment.horovodrun_store()
    if store is not None:
        return meet_through(HorovodrunChannel(*store, patience), patience)
    if environment.started_by_mpi():
        return meet_through(MpiChannel(), patience)
    raise LaunchError(
        "comm.backend = torch cannot find rank 0: start with mpirun, horovodrun or torchrun, or "
        "set MASTER_ADDR and MASTER_PORT to where rank 0 may listen"
    )


def _remedy(error: Exception) -> str:
    if "EADDRINUSE" in str(error):
        return "; another process has this port: set another MASTER_PORT, or none"
    return ""


def _meet_at_master(patience: float) -> Meeting:
    rank, size = environment.launched_rank(), environment.launched_world_size()
    if size is None:
        raise LaunchError(
            "MASTER_ADDR is set but not the number of ranks; set RANK and WORLD_SIZE too"
        )
    wait = timedelta(seconds=patience)
    try:
        url = f"env://?rank={rank}&world_size={size}"
        store, _, _ = next(rendezvous(url, timeout=wait))
    except dist.DistError as error:
        raise RankFailure(
            f"the {size} ranks have not met at MASTER_ADDR = {os.environ['MASTER_ADDR']}, "
            f"MASTER_PORT = {os.environ['MASTER_PORT']}: {_first_line(error)}{_remedy(error)}"
        ) from None
    _wait_for_all(store, rank, size, patience)
    return Meeting(store, rank, size)


def meet_through(channel: Channel, patience: float) -> Meeting:
    """Meet at a store that rank 0 opens on any free port; see ``meet``."""
    rank, size = channel.rank, channel.size
    wait = timedelta(seconds=patience)
    if rank == 0:
        store = TCPStore(LOOPBACK, 0, None, True, wait, wait_for_workers=False)
        told = {"host": environment.host(), "port": store.port, "addresses": _own_addresses()}
        channel.share(json.dumps(told).encode())
        reached = LOOPBACK
    else:
        told = json.loads(channel.share(b""))
        reached = _reachable(told["host"], told["addresses"], told["port"], patience)
        store = TCPStore(reached, told["port"], None, False, wait)
    _wait_for_all(store, rank, size, patience, reached)
    # Gloo would take the interface that the host's name resolves to, on many systems the loopback,
    # which no other host reaches. A rank on rank 0's own host came by the loopback, so what
    # decides is how the others came.
    ways = [store.get(_came(r)).decode() for r in range(size)]
    outside = [way for way in ways if not ipaddress.ip_address(way).is_loopback]
    os.environ.setdefault("GLOO_SOCKET_IFNAME", _interface_towards((outside or ways)[0]))
    return Meeting(store, rank, size)


def _wait_for_all(store: Store, rank: int, size: int, patience: float, way: str = "") -> None:
    store.set(_came(rank), way)
    try:
        store.wait([_came(r) for r in range(size)], timedelta(seconds=patience))
    except dist.DistError:
        missing = [str(r) for r in range(size) if not store.check([_came(r)])]
        raise RankFailure(
            f"{len(missing)} of {size} ranks have not come within {patience:g} s: rank "
            f"{', '.join(missing[:8])}{' …' if len(missing) > 8 else ''}"
        ) from None


def _came(rank: int) -> str:
    return f"harness/came/{rank}"


def _own_addresses() -> list[str]:
    """This host's addresses that other hosts might reach, IPv4 before IPv6."""
    found = {socket.AF_INET: [], socket.AF_INET6: []}  # type: dict[int, list[str]]
    for entries in psutil.net_if_addrs().values():
        for entry in entries:
            if entry.family in found:
                address = ipaddress.ip_address(entry.address.partition("%")[0])
                if not address.is_loopback and not address.is_link_local:
                    found[entry.family].append(str(address))
    return found[socket.AF_INET] + found[socket.AF_INET6]


def _reachable(host: str, addresses: list[str], port: int, patience: float) -> str:
    """The first of rank 0's addresses at which its store answers.

    The loopback is tried only by ranks on a host of the same name: elsewhere something else may
    listen on that port. Containers may share a name and no loopback, so the others follow.
    """
    candidates = [LOOPBACK, *addresses] if host == environment.host() else addresses
    deadline = time.monotonic() + patience
    while True:
        for address in candidates:
            try:
                with closing(socket.create_connection((address, port), timeout=_ONE_TRY)):
                    return address
            except OSError:
                continue
        if time.monotonic() > deadline:
            raise RankFailure(
                f"rank 0 on {host} listens on port {port}, but {environment.host()} reaches it at "
                f"none of {', '.join(candidates) or 'its addresses: it has none'}; is there a "
                "firewall between them?"
            )
        time.sleep(0.2)


def _interface_towards(address: str) -> str:
    """The network interface from which this host sends to an address."""
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    with closing(socket.socket(family, socket.SOCK_DGRAM)) as probe:
        probe.connect((address, 9))  # sends nothing: it only chooses the route
        own = probe.getsockname()[0]
    for name, entries in psutil.net_if_addrs().items():
        if any(entry.address.partition("%")[0] == own for entry in entries):
            return str(name)
    raise RankFailure(f"{environment.host()} has no network interface with its address {own}")


def _first_line(error: Exception) -> str:
    return str(error).partition("\n")[0]
