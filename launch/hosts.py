"""Which hosts there are, and how many ranks each can take."""

from __future__ import annotations

import os
import re

from harness.errors import LaunchError
from launch.spec import Host

_NAME = re.compile(r"[A-Za-z0-9]([A-Za-z0-9._-]*[A-Za-z0-9])?")


def parse_hosts(text: str) -> tuple[Host, ...]:
    """Read ``a:2,b:2``; a host without a number has one slot. Raises LaunchError."""
    hosts: list[Host] = []
    for entry in text.split(","):
        name, colon, slots = entry.strip().partition(":")
        if not _NAME.fullmatch(name) or (colon and not re.fullmatch(r"[1-9][0-9]{0,5}", slots)):
            raise LaunchError(
                f"--hosts: {entry.strip()!r} is not a host; write names with their slots, "
                "such as node1:4,node2:4"
            )
        if name in {host.name for host in hosts}:
            raise LaunchError(f"--hosts: {name} stands there twice; add up its slots instead")
        hosts.append(Host(name, int(slots) if colon else 1))
    return tuple(hosts)


def this_host() -> tuple[Host, ...]:
    """This machine, with a slot for each core that this process may use."""
    return (Host("localhost", len(os.sched_getaffinity(0))),)


def check_slots(ranks: int, hosts: tuple[Host, ...]) -> None:
    """Raise LaunchError if there are more ranks than slots."""
    slots = sum(host.slots for host in hosts)
    if ranks > slots:
        listed = ",".join(map(str, hosts))
        raise LaunchError(
            f"{ranks} ranks need {ranks} slots, but {listed} has {slots}; ask for at most {slots} "
            f"ranks, or name hosts with enough slots (--hosts {hosts[0].name}:{ranks} puts several "
            "ranks on a core)"
        )


def fill(ranks: int, hosts: tuple[Host, ...]) -> tuple[Host, ...]:
    """The hosts with just as many slots as ranks, filled in order.

    Under Gloo, horovodrun makes a world of all slots, whatever number of ranks it was asked for.
    Raises LaunchError if there are not enough slots.
    """
    check_slots(ranks, hosts)
    placed: list[Host] = []
    for host in hosts:
        here = min(host.slots, ranks - sum(earlier.slots for earlier in placed))
        if here:
            placed.append(Host(host.name, here))
    return tuple(placed)
