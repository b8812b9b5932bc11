"""How a launch ended, from what the launcher and the ranks have left."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from types import NoneType
from typing import Any, Literal

from harness.errors import HarnessError, StoppedEarly, StorageError, Superseded, UsageError
from harness.jsonl import read_object
from harness.resume import has_finished, ranks_wanted
from harness.rundir import RunDirectory
from harness.wording import signal_name
from launch import elastic
from launch.deaths import Death, first_death, lost_host
from launch.hangs import Hang
from launch.spec import LaunchSpec

_NOTE = {
    "rank": (int,),
    "host": (str,),
    "exit_code": (int,),
    "message": (str,),
    "consequence": (bool,),
    "final": (bool,),
    "traceback": (str, NoneType),
}
"""What ``harness.last_words`` leaves. A file that lacks any of it is somebody else's."""


@dataclass(frozen=True)
class Ended:
    """The end of a launcher's process."""

    exit_code: int
    own_words: str
    """What the launcher itself printed, without the ranks' output."""
    hang: Hang | None = None
    """Why it was ended."""
    killed_for_memory: int = 0
    """Processes that the kernel has killed on this host meanwhile because memory ran out."""


@dataclass(frozen=True)
class Outcome:
    kind: Literal["done", "grow", "stopped", "refused", "failed"]
    """grow: the run wants more ranks; refused: the ranks would not start as they were asked to."""
    message: str = ""
    rank: int | None = None
    host: str | None = None
    """The host on which it failed, as the host list has it, if that is known."""
    final: bool = False
    """Whether another launch would end in the same way."""
    exit_code: int = 1
    """Of a failure: as of the error that a rank has ended with, where it is one of its own."""
    facts: dict[str, Any] = field(default_factory=dict)
    """More for the event that tells of it."""


# Of ranks whose last words could not be written either; they are in the output above.
_TOLD_BY_CODE: dict[type[HarnessError], str] = {
    StorageError: "the run directory cannot be written",
    Superseded: "another attempt has taken the run over",
}


def judge(ended: Ended, spec: LaunchSpec, directory: RunDirectory) -> Outcome:
    """The outcome of a launch of ``spec`` that has ended."""
    # The records count: Open MPI 5's mpirun has been seen to end with 0 after it had lost a host,
    # and a rank may die as it leaves a run that has finished.
    if has_finished(directory):
        return Outcome("done")
    words = min(_last_words(directory), key=lambda note: note["rank"], default=None)
    if words is not None:
        return _by_its_words(words, spec, directory)
    if ended.hang is not None:
        return _by_hang(ended.hang, spec)
    # Ranks of an elastic world may have survived the first death.
    survived = elastic.last_death(ended.own_words)
    death = survived or first_death(ended.own_words)
    if StoppedEarly.exit_code in (ended.exit_code, death and death.exit_code):
        grows = ranks_wanted(directory) > spec.ranks
        return Outcome("grow" if grows else "stopped")
    for kind, what in _TOLD_BY_CODE.items():
        if kind.exit_code in (ended.exit_code, death and death.exit_code):
            return Outcome("failed", what, final=True, exit_code=kind.exit_code)
    noticed = {note["rank"]: note["message"] for note in _notes(directory)}
    if death is not None and death.rank in noticed:
        said = f"a rank has left without a word; rank {death.rank}: {noticed[death.rank]}"
        return Outcome("failed", said)
    if survived is not None:
        host = survived.host
    else:
        host = _host_of(death, lost_host(ended.own_words), spec)
    if death is None:
        said = "\n".join(ended.own_words.strip().splitlines()[-15:])
        gone = f"host {host} was lost: " if host else ""
        early = " before the run's end" if ended.exit_code == 0 else ""
        message = f"{gone}the launcher ended with exit code {ended.exit_code}{early}\n{said}"
        return Outcome(
            "failed", message.rstrip(), host=host, final=not directory.newest().config.exists()
        )
    cause = _cause(death, host, ended.killed_for_memory)
    return Outcome("failed", f"{cause}, and the job was ended", death.rank, host)


def _last_words(directory: RunDirectory) -> Iterator[dict[str, Any]]:
    """What ranks have left that failed by themselves, not because another was gone."""
    return (note for note in _notes(directory) if not note["consequence"])


def _notes(directory: RunDirectory) -> Iterator[dict[str, Any]]:
    """What ranks have left, also of those who noticed that another was gone."""
    for path in directory.failures.glob("rank-*.json"):
        note = read_object(path)
        if note is not None and all(type(note.get(key)) in kinds for key, kinds in _NOTE.items()):
            yield note


def _by_its_words(note: dict[str, Any], spec: LaunchSpec, directory: RunDirectory) -> Outcome:
    if note["exit_code"] == UsageError.exit_code:
        return Outcome("refused", note["message"], final=True)
    message = f"rank {note['rank']} on {note['host']}: {note['message']}"
    if note["traceback"]:
        trace = directory.failures / f"rank-{note['rank']:05d}.txt"
        with suppress(OSError):  # where the disk is full it is in the rank's own note still
            trace.write_text(note["traceback"], encoding="utf-8")
        message += f" (traceback in {trace})"
    host = spec.host_of(note["rank"])
    # What keeps a run from beginning is nothing that passes by itself.
    final = note["final"] or not directory.newest().config.exists()
    own = note["exit_code"] in {kind.exit_code for kind in _TOLD_BY_CODE}
    code = note["exit_code"] if own else HarnessError.exit_code
    return Outcome("failed", message, note["rank"], host, final, code)


def _by_hang(hang: Hang, spec: LaunchSpec) -> Outcome:
    ranks = [cause.rank for cause in hang.causes]
    hosts = {spec.host_of(rank) for rank in ranks}
    rank = ranks[0] if len(ranks) == 1 else None
    host = hosts.pop() if len(hosts) == 1 else None
    return Outcome("failed", hang.message, rank, host, facts=hang.facts)


def _host_of(death: Death | None, lost: str | None, spec: LaunchSpec) -> str | None:
    names = {host.name for host in spec.hosts}
    for found in (lost, death.host if death else None):
        if found in names:
            return found
    return spec.host_of(death.rank) if death and death.rank is not None else lost


def _cause(death: Death, host: str | None, killed_for_memory: int) -> str:
    where = f" on {death.host or host}" if death.host or host else ""
    rank = "a rank" if death.rank is None else f"rank {death.rank}"
    if death.signal is not None:
        name = signal_name(death.signal) or "unknown"
        why = _memory(death, killed_for_memory)
        return f"{rank}{where} was killed by signal {death.signal} ({name}{why})"
    if death.exit_code is None:
        return f"{rank}{where} ended without a word"
    return f"{rank}{where} ended with exit code {death.exit_code}"


def _memory(death: Death, killed_for_memory: int) -> str:
    if death.out_of_memory:
        return "; Slurm says: out of memory"
    if death.signal == signal.SIGKILL and killed_for_memory:
        return "; the kernel has killed a process on this host because memory ran out"
    return ""
