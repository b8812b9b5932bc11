"""Which hosts there are, how many ranks each can take, and by which network they are joined."""

from __future__ import annotations

import itertools
import math
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from harness.errors import LaunchError
from harness.files import open_regular
from harness.wording import counted
from launch.spec import Host

_NAME = re.compile(r"[A-Za-z0-9]([A-Za-z0-9._-]*[A-Za-z0-9])?")
_SLOTS = re.compile(r"[1-9][0-9]{0,5}")
_INTERFACE = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.@-]{0,14}")
_MOST_NAMES = 100_000  # more than any cluster has; a short text could ask for a billion
_LARGEST = 1 << 25  # bytes of a host file, with a line for each slot of a large cluster
_LONGEST_NAME = 253  # what DNS allows


def parse_hosts(text: str) -> tuple[Host, ...]:
    """Read ``a:2,b:2``; a host without a number has one slot. Raises LaunchError."""
    hosts: dict[str, Host] = {}
    for entry in text.split(","):
        name, colon, slots = entry.strip().partition(":")
        if not _NAME.fullmatch(name) or (colon and not _SLOTS.fullmatch(slots)):
            raise LaunchError(
                f"--hosts: {entry.strip()!r} is not a host{_why_not(entry)}; write names with "
                "their slots, such as node1:4,node2:4"
            )
        if name in hosts:
            raise LaunchError(f"--hosts: {name} stands there twice; add up its slots instead")
        hosts[name] = Host(name, int(slots) if colon else 1)
    return tuple(hosts.values())


def _why_not(entry: str) -> str:
    """What is wrong with it, where people would not see that by themselves."""
    if entry.count(":") > 1 and re.fullmatch(r"\[?[0-9A-Fa-f:.]+(%\w+)?\]?(:\d+)?", entry.strip()):
        return " (launchers read the colons of an IPv6 address as slots: use its name)"
    return ""


def this_host() -> tuple[Host, ...]:
    """This machine, with a slot for each core that this process may use."""
    return (Host("localhost", len(os.sched_getaffinity(0))),)


def check_slots(ranks: int, hosts: tuple[Host, ...]) -> None:
    """Raise LaunchError if there are more ranks than slots."""
    slots = sum(host.slots for host in hosts)
    if ranks > slots:
        listed = ",".join(map(str, hosts))
        raise LaunchError(
            f"{ranks} ranks need {ranks} slots, but {listed} has {slots}; ask for at most "
            f"{counted(slots, 'rank')}, or name hosts with enough slots "
            f"(--hosts {hosts[0].name}:{ranks} puts several ranks on a core)"
        )


def fill(ranks: int, hosts: tuple[Host, ...]) -> tuple[Host, ...]:
    """The hosts with just as many slots as ranks, filled in order.

    Under Gloo, horovodrun makes a world of all slots, whatever number of ranks it was asked for.
    Raises LaunchError if there are not enough slots.
    """
    check_slots(ranks, hosts)
    placed: list[Host] = []
    left = ranks
    for host in hosts:
        if here := min(host.slots, left):
            placed.append(Host(host.name, here))
            left -= here
    return tuple(placed)


# Host files


def read_hostfile(path: Path) -> tuple[Host, ...]:
    """Read a host file as Open MPI (``name slots=4``), MPICH (``name:4``) or a batch system (a line
    with a name for each slot) writes it; ``#`` begins a comment. Raises LaunchError."""
    try:
        with open_regular(path) as file:
            content = file.read(_LARGEST + 1)
    except OSError as error:
        raise LaunchError(f"--hostfile {path}: {error.strerror or error}") from None
    if len(content) > _LARGEST:
        raise LaunchError(f"--hostfile {path}: larger than {_LARGEST} bytes; this is no host file")
    text = content.decode("utf-8-sig", errors="replace")
    slots: dict[str, int] = {}
    stated = set()
    for number, line in enumerate(re.split(r"\r\n?|\n", text), start=1):
        words = re.sub(r"\s*=\s*", "=", line.partition("#")[0]).split()
        if not words:
            continue
        try:
            name, count = _host_of_line(words)
            if name in stated or (count and name in slots):
                raise ValueError(f"{name} stands there twice; add up its slots instead")
        except ValueError as error:
            raise LaunchError(
                f"{path}:{number}: {error}; a line is `name slots=4`, `name:4`, or a name alone, "
                "repeated for each slot"
            ) from None
        if count:
            stated.add(name)
        slots[name] = slots.get(name, 0) + (count or 1)
    if not slots:
        raise LaunchError(f"{path}: names no host; write one a line, such as `node1 slots=4`")
    return tuple(Host(name, count) for name, count in slots.items())


def _host_of_line(words: Sequence[str]) -> tuple[str, int | None]:
    """A host and its slots, if the line gives their number. Raises ValueError."""
    name, colon, number = words[0].partition(":")
    if not _NAME.fullmatch(name):
        raise ValueError(f"{words[0]!r} is not a host{_why_not(words[0])}")
    counts: dict[str, int] = {"slots": _count(number)} if colon else {}
    for word in words[1:]:
        key, _, value = word.partition("=")
        key = key.replace("-", "_")
        if key not in ("slots", "max_slots"):  # the others mean nothing to most launchers
            raise ValueError(f"{word!r} is not understood; valid: slots=N and max_slots=N")
        if key in counts:
            raise ValueError(f"{key} stands there twice")
        counts[key] = _count(value)
    slots, limit = counts.get("slots"), counts.get("max_slots")
    if limit and (slots or 1) > limit:
        raise ValueError(f"{name} has {counted(slots or 1, 'slot')}, but max_slots={limit}")
    return name, slots


def _count(text: str) -> int:
    if not _SLOTS.fullmatch(text):
        raise ValueError(f"{text!r} is not a number of slots from 1 to 999999")
    return int(text)


# Slurm


def slurm_hosts(environ: Mapping[str, str]) -> tuple[Host, ...] | None:
    """The nodes of the Slurm job that this process is in, with a slot for each of its tasks, else
    for each ``--cpus-per-task`` cores; None outside a job.

    Raises LaunchError if the job's variables do not fit together.
    """
    listed = environ.get("SLURM_JOB_NODELIST")
    if not listed:
        return None
    names = expand_nodelist(listed)
    if tasks := environ.get("SLURM_TASKS_PER_NODE"):
        slots = _per_node("SLURM_TASKS_PER_NODE", tasks, len(names))
    elif cores := environ.get("SLURM_JOB_CPUS_PER_NODE"):
        share = environ.get("SLURM_CPUS_PER_TASK", "")
        each = int(share) if _SLOTS.fullmatch(share) else 1
        per_node = _per_node("SLURM_JOB_CPUS_PER_NODE", cores, len(names))
        slots = [max(1, count // each) for count in per_node]
    else:
        slots = [1] * len(names)
    return tuple(map(Host, names, slots))


def _per_node(variable: str, text: str, nodes: int) -> list[int]:
    """Read ``2(x3),1``: a number for each of so many nodes."""
    counts: list[int] = []
    for entry in text.split(","):
        found = re.fullmatch(r"([1-9][0-9]{0,5})(?:\(x([1-9][0-9]{0,5})\))?", entry)
        if not found:
            raise LaunchError(
                f"{variable}={_shortened(text)} does not read like Slurm's 2(x3),1; set --hosts"
            )
        counts += [int(found[1])] * int(found[2] or 1)
        if len(counts) > nodes:
            break
    if len(counts) != nodes:
        raise LaunchError(
            f"{variable}={_shortened(text)} does not fit the {nodes} nodes of SLURM_JOB_NODELIST; "
            "set --hosts"
        )
    return counts


def expand_nodelist(text: str) -> tuple[str, ...]:
    """The names in Slurm's short form, such as ``n[1-3,07-10],m[1-2]x[01-03],login``, in its order.

    Leading zeros are kept, as scontrol keeps them; names may go on after a range, as they may in
    some sites' configuration. Raises LaunchError for all else, and for more than 100,000 names.
    """
    names: list[str] = []
    try:
        for term in _terms(text):
            parts = [_part(part) for part in re.split(r"(\[[^\]]*\])", term) if part]
            _check_size(len(names) + math.prod(part.size for part in parts))
            if sum(part.width for part in parts) > _LONGEST_NAME:
                raise ValueError(f"it makes names of more than {_LONGEST_NAME} characters")
            names += map("".join, itertools.product(*(part.spelt for part in parts)))
        for name in names:
            if not _NAME.fullmatch(name):
                raise ValueError(f"{_shortened(name)!r} is not a host")
    except ValueError as error:
        raise LaunchError(
            f"{_shortened(text)!r} is not a list of nodes: {error}; Slurm writes such as "
            "n[1-3,07-10],login"
        ) from None
    return tuple(names)


def _terms(text: str) -> Iterator[str]:
    """Split at the commas that stand outside brackets."""
    start, inside = 0, False
    for position, character in enumerate(text):
        if character in "[]":
            if inside == (character == "["):
                raise ValueError(f"a bracket too many at character {position + 1}")
            inside = not inside
        elif character == "," and not inside:
            yield text[start:position]
            start = position + 1
    if inside:
        raise ValueError("a bracket is not closed")
    yield text[start:]


class _Part(NamedTuple):
    """A word, or ranges in brackets, not yet written out."""

    size: int
    width: int
    """Characters of the longest."""
    spelt: Iterable[str]


def _part(part: str) -> _Part:
    if not part.startswith("["):
        return _Part(1, len(part), [part])
    ranges = [_range(entry) for entry in part[1:-1].split(",")]
    return _Part(
        sum(len(numbers) for numbers, _ in ranges),
        max(max(width, len(str(numbers[-1]))) for numbers, width in ranges),
        (f"{number:0{width}}" for numbers, width in ranges for number in numbers),
    )


def _range(entry: str) -> tuple[range, int]:
    """Read ``07-10``: its numbers, and how many digits zeros fill them up to."""
    found = re.fullmatch(r"([0-9]{1,18})(?:-([0-9]{1,18}))?", entry)
    if not found:
        raise ValueError(f"{_shortened(entry)!r} is not a range")
    first, last = int(found[1]), int(found[2] or found[1])
    if last < first:
        raise ValueError(f"the range {entry} runs backwards")
    return range(first, last + 1), len(found[1])


def _check_size(names: int) -> None:
    if names > _MOST_NAMES:
        raise ValueError(f"it makes more than {_MOST_NAMES:,} names")


def _shortened(text: str) -> str:
    return text if len(text) <= 80 else f"{text[:77]}..."


# Interfaces


def interface_settings(interfaces: Sequence[str]) -> dict[str, str]:
    """The variables by which NCCL and Gloo, Horovod's and torch's, take these network interfaces.

    They hold whatever starts the ranks; what MPI takes is its launcher's. Raises LaunchError for
    what is no interface's name.
    """
    for name in interfaces:
        if not _INTERFACE.fullmatch(name):
            raise LaunchError(
                f"launch.interfaces: {name!r} is not an interface; give names as `ip link` shows "
                "them, such as eth0 or ib0"
            )
    if not interfaces:
        return {}
    listed = ",".join(interfaces)
    return {
        "GLOO_SOCKET_IFNAME": listed,
        "HOROVOD_GLOO_IFACE": interfaces[0],  # it takes one alone
        "NCCL_SOCKET_IFNAME": f"={listed}",  # without the sign, eth1 would mean eth10 too
    }
