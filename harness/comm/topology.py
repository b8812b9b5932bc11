"""Which rank runs where, and on how much of it."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any

import torch

from harness import environment
from harness.comm import mpi
from harness.comm.base import Communicator, allgather_bytes


@dataclass(frozen=True)
class Place:
    """One rank's."""

    rank: int
    local_rank: int
    host: str
    host_cores: int
    usable_cores: int
    """Cores that this rank may run on; fewer than the host has if the launcher binds ranks."""
    threads: int
    """Threads of torch's operations."""
    device: str


@dataclass(frozen=True)
class Topology:
    """All ranks' places, in the order of ranks."""

    places: tuple[Place, ...]

    def by_host(self) -> dict[str, tuple[Place, ...]]:
        """Hosts in the order of their lowest rank."""
        hosts: dict[str, tuple[Place, ...]] = {}
        for place in self.places:
            hosts[place.host] = (*hosts.get(place.host, ()), place)
        return hosts

    def as_list(self) -> list[dict[str, Any]]:
        """A plain description of each host, its ranks' properties in the order of ``ranks``."""
        return [
            {
                "host": host,
                "cores": places[0].host_cores,
                "ranks": [place.rank for place in places],
                "local_ranks": [place.local_rank for place in places],
                "usable_cores": [place.usable_cores for place in places],
                "threads": [place.threads for place in places],
                "devices": [place.device for place in places],
            }
            for host, places in self.by_host().items()
        ]


def gather_topology(comm: Communicator, through_mpi: bool = True) -> Topology:
    """Collective: every rank gets all ranks' places.

    Through MPI where it runs, as it carries bytes of any length in one operation; otherwise (or
    without ``through_mpi``) by the communicator's own sums, with the same result.
    """
    mine = Place(
        rank=comm.rank,
        local_rank=comm.local_rank,
        host=environment.host(),
        host_cores=os.cpu_count() or 1,
        usable_cores=environment.usable_cores(),
        threads=torch.get_num_threads(),
        device=str(comm.device),
    )
    world = mpi.running_world() if through_mpi else None
    # Under torchrun, MPI may be there and have another idea of who takes part.
    if world is not None and world.Get_size() == comm.size:
        told = mpi.gather_bytes(world, _encoded(mine))
    else:
        told = allgather_bytes(comm, _encoded(mine), "topology")
    return _ordered(Place(**json.loads(text)) for text in told)


def _ordered(places: Iterable[Place]) -> Topology:
    return Topology(tuple(sorted(places, key=lambda place: place.rank)))


def _encoded(place: Place) -> bytes:
    return json.dumps(asdict(place)).encode()
