"""Commands of Slurm that do nothing but write down how they were called."""

from __future__ import annotations

import os
import shlex
from pathlib import Path

import pytest

_SBATCH = """#!/bin/bash
printf 'sbatch ' >> "$FAKE/calls"; printf '%q ' "$@" >> "$FAKE/calls"; echo >> "$FAKE/calls"
number=$(($(cat "$FAKE/number") + 1))
if [[ -e $FAKE/refuse-$number ]]; then echo "sbatch: error: no such partition" >&2; exit 1; fi
env > "$FAKE/env-$number"
echo "$number" > "$FAKE/number"
cat "$FAKE/before" 2>/dev/null
echo "$number"
cat "$FAKE/after" 2>/dev/null || true
"""
_SCONTROL = """#!/bin/bash
printf 'scontrol ' >> "$FAKE/calls"; printf '%q ' "$@" >> "$FAKE/calls"; echo >> "$FAKE/calls"
if [[ -e $FAKE/down ]]; then echo "scontrol: error: Unable to contact controller" >&2; exit 1; fi
if [[ $1 == requeue ]]; then
    if [[ -e $FAKE/stays ]]; then echo "scontrol: error: Job is not requeueable" >&2; exit 1; fi
    kill -TERM "$PPID"
    exit 0
fi
if ! cat "$FAKE/job-${@: -1}" 2>/dev/null; then
    echo "slurm_load_jobs error: Invalid job id specified" >&2
    exit 1
fi
"""
_SCANCEL = """#!/bin/bash
printf 'scancel ' >> "$FAKE/calls"; printf '%q ' "$@" >> "$FAKE/calls"; echo >> "$FAKE/calls"
"""


class FakeSlurm:
    """A folder on PATH with sbatch, scontrol and scancel, and what they were called with."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.folder = folder
        commands = folder / "bin"
        commands.mkdir(parents=True)
        for name, text in (("sbatch", _SBATCH), ("scontrol", _SCONTROL), ("scancel", _SCANCEL)):
            (commands / name).write_text(text)
            (commands / name).chmod(0o755)
        (folder / "number").write_text("100\n")
        monkeypatch.setenv("FAKE", str(folder))
        monkeypatch.setenv("PATH", f"{commands}{os.pathsep}{os.environ['PATH']}")

    def calls(self, command: str | None = None) -> list[list[str]]:
        """Every call so far, or those of one command, in order."""
        path = self.folder / "calls"
        lines = path.read_text().splitlines() if path.exists() else []
        found = [shlex.split(line) for line in lines]
        return [words for words in found if command in (None, words[0])]

    def job(self, number: int | str, state: str, restarts: int = 0, reason: str = "None") -> None:
        """What scontrol says of a job from now on."""
        (self.folder / f"job-{number}").write_text(
            f"JobId={number} JobName=x UserId=u(1) Priority=1 JobState={state} Reason={reason} "
            f"Dependency=(null) Requeue=1 Restarts={restarts} BatchFlag=1 ExitCode=0:0 "
            "RunTime=00:01:00 StartTime=2026-01-02T03:04:05 EndTime=Unknown NodeList=n[1-2] "
            "Comment=JobState=COMPLETED Restarts=9 \n"
        )

    def sets(self, name: str, content: str = "") -> None:
        """Make the commands behave otherwise: refuse-NUMBER, down, stays, before, after."""
        (self.folder / name).write_text(content)


def fake_slurm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FakeSlurm:
    """One for a test, which works outside a job, in a directory of its own."""
    folder = tmp_path / "work"
    folder.mkdir()
    monkeypatch.chdir(folder)
    for name in list(os.environ):
        if name.startswith("SLURM_"):
            monkeypatch.delenv(name)
    return FakeSlurm(tmp_path / "fake", monkeypatch)
