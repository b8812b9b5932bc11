"""How a launch ended, from what the launcher and the ranks have left."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from dataclasses import dataclass
from types import NoneType
from typing import Any, Literal

from harness.errors import StoppedEarly, UsageError
from harness.records import RunDirectory, read_object
from harness.resume import has_finished, ranks_wanted
from launch import elastic
from launch.deaths import Death, first_death, lost_host
from launch.spec import LaunchSpec

_NOTE = {
    "rank": (int,),
    "host": (str,),
    "exit_code": (int,),
    "message": (str,),
    "consequence": (bool,),
    "traceback": (str, NoneType),
}
"""What ``harness.last_words`` leaves. A file that lacks any of it is somebody else's."""


@dataclass(frozen=True)
class Ended:
    """The end of a launcher's process."""

    exit_code: int
    own_words: str
    """What the launcher itself printed, without the ranks' output."""


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


def judge(ended: Ended, spec: LaunchSpec, directory: RunDirectory) -> Outcome:
    """The outcome of a launch of ``spec`` that has ended."""
    # The records count: Open MPI 5's mpirun has been seen to end with 0 after it had lost a host,
    # and a rank may die as it leaves a run that has finished.
    if has_finished(directory):
        return Outcome("done")
    words = min(_last_words(directory), key=lambda note: note["rank"], default=None)
    if words is not None:
        return _by_its_words(words, spec, directory)
    # Ranks of an elastic world may have survived the first death.
    survived = elastic.last_death(ended.own_words)
    death = survived or first_death(ended.own_words)
    if StoppedEarly.exit_code in (ended.exit_code, death and death.exit_code):
        grows = ranks_wanted(directory) > spec.ranks
        return Outcome("grow" if grows else "stopped")
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
        return Outcome("failed", message.rstrip(), host=host, final=not directory.config.exists())
    return Outcome("failed", f"{_cause(death, host)}, and the job was ended", death.rank, host)


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
        trace.write_text(note["traceback"], encoding="utf-8")
        message += f" (traceback in {trace})"
    host = spec.host_of(note["rank"])
    # What keeps a run from beginning is nothing that passes by itself.
    final = note.get("final", False) or not directory.config.exists()
    return Outcome("failed", message, note["rank"], host, final)


def _host_of(death: Death | None, lost: str | None, spec: LaunchSpec) -> str | None:
    names = {host.name for host in spec.hosts}
    for found in (lost, death.host if death else None):
        if found in names:
            return found
    return spec.host_of(death.rank) if death and death.rank is not None else lost


def _cause(death: Death, host: str | None) -> str:
    where = f" on {death.host or host}" if death.host or host else ""
    rank = "a rank" if death.rank is None else f"rank {death.rank}"
    if death.signal is not None:
        try:
            name = signal.Signals(death.signal).name
        except ValueError:
            name = "unknown"
        return f"{rank}{where} was killed by signal {death.signal} ({name})"
    if death.exit_code is None:
        return f"{rank}{where} ended without a word"
    return f"{rank}{where} ended with exit code {death.exit_code}"
