"""The batch jobs of a run: the list that is kept beside it, and what Slurm says of them."""

from __future__ import annotations

import json
import os
import re
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from harness.environment import JOB_NUMBER
from harness.errors import LaunchError, RunDirectoryError
from harness.files import read_text
from harness.jsonl import now, write_json
from harness.rundir import RunDirectory
from harness.runlock import RunLock

_PATIENCE = 60.0  # seconds; a busy controller answers late
_OVER = frozenset(
    {
        "BOOT_FAIL",
        "CANCELLED",
        "COMPLETED",
        "DEADLINE",
        "FAILED",
        "NODE_FAIL",
        "OUT_OF_MEMORY",
        "PREEMPTED",
        "REVOKED",
        "TIMEOUT",
    }
)
# Variables of a job that jobs submitted from inside it must not inherit: the first of their own
# runs would take itself for a repeated one.
_KEPT = ("SLURM_CONF", "SLURM_CLUSTERS", "SLURM_JWT", "SLURM_TIME_FORMAT")


@dataclass(frozen=True)
class Submitted:
    """A job that sbatch has taken."""

    name: str
    kind: str
    id: str
    ranks: int
    nodes: int
    segment: int | None
    after: list[str]
    """Numbers of the jobs that it waits for."""
    condition: str
    """afterok or afterany."""
    options: dict[str, str | None]
    """What sbatch was told, by its long options."""
    script: str
    time: str
    """When it was submitted."""
    point: str | None = None


@dataclass(frozen=True)
class Point:
    """One run of a sweep or of a scaling series."""

    directory: str
    """Its name inside the series' directory."""
    settings: list[str]
    """Overrides in which it differs from the others."""
    ranks: int
    nodes: int


@dataclass
class JobList:
    """slurm/jobs.json of a run directory, or of a directory above several of them."""

    kind: Literal["run", "sweep", "scaling", "probe"] = "run"
    directory: str = ""
    """The working directory of the jobs."""
    jobs: list[Submitted] = field(default_factory=list)
    points: list[Point] = field(default_factory=list)
    history: list[dict[str, Any]] = field(default_factory=list)
    """How jobs ended before the run did: time, job, restarts, outcome, reason."""

    def find(self, number: str) -> Submitted | None:
        return next((job for job in self.jobs if job.id == number), None)

    def successor(self, number: str) -> Submitted | None:
        """The last job that was submitted to go on after this one."""
        return next((job for job in reversed(self.jobs) if number in job.after), None)

    def note(self, number: str, restarts: int, outcome: str, reason: str, **more: Any) -> None:
        """Add to the history."""
        self.history.append(
            {
                "time": now(),
                "job": number,
                "restarts": restarts,
                "outcome": outcome,
                "reason": reason,
                **more,
            }
        )


def list_path(run_dir: Path) -> Path:
    return run_dir / "slurm" / "jobs.json"


@contextmanager
def list_lock(run_dir: Path) -> Iterator[None]:
    """Held by a process while it changes the list. Raises RunDirectoryError if another one does not
    let go of it."""
    lock = RunLock(RunDirectory(run_dir), "slurm/jobs.lock", needed=True)
    lock.acquire(_PATIENCE)
    try:
        yield
    finally:
        lock.release()


def read_list(run_dir: Path) -> JobList:
    """The list of a directory's jobs, empty if there is none. Raises RunDirectoryError if it cannot
    be understood."""
    path = list_path(run_dir)
    try:
        found = json.loads(read_text(path))
        jobs = [Submitted(**job) for job in found.pop("jobs")]
        points = [Point(**point) for point in found.pop("points")]
        listed = JobList(jobs=jobs, points=points, **found)
        _check(listed)
        return listed
    except FileNotFoundError:
        return JobList()
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        raise RunDirectoryError(
            f"{path} cannot be read ({type(error).__name__}); without it the jobs are not known: "
            "look at squeue, then move it away"
        ) from None


def _check(listed: JobList) -> None:
    """Raise ValueError or TypeError for a list that no harness has written: what is in it ends up
    on command lines and in paths."""
    for job in listed.jobs:
        if not (isinstance(job.id, str) and JOB_NUMBER.fullmatch(job.id)):
            raise ValueError("a job's id is no number")
        if not all(
            isinstance(number, str) and JOB_NUMBER.fullmatch(number) for number in job.after
        ):
            raise ValueError("a job waits for what is no number")
        texts = (job.name, job.kind, job.condition, job.script, job.time)
        if not all(isinstance(text, str) for text in texts):
            raise TypeError("what describes a job is no text")
        _check_counts(job.ranks, job.nodes, 0 if job.segment is None else job.segment)
    for point in listed.points:
        if not isinstance(point.directory, str) or not _FOLDER.fullmatch(point.directory):
            raise ValueError("a point's directory is no name")
        if not all(isinstance(text, str) for text in point.settings):
            raise TypeError("a point's setting is no text")
        _check_counts(point.ranks, point.nodes)
    if listed.kind not in ("run", "sweep", "scaling", "probe"):
        raise ValueError("of no kind that is known")
    if not isinstance(listed.directory, str) or "\0" in listed.directory:
        raise TypeError("its directory is no text")
    if not isinstance(listed.history, list):
        raise TypeError("its history is no list")


def _check_counts(*values: object) -> None:
    if not all(type(value) is int and 0 <= value < 2**53 for value in values):
        raise ValueError("a number of ranks or nodes is none")


_FOLDER = re.compile(r"(?!\.\.?$)[^/\0]+")
"""A name in a directory, which leads nowhere else."""


def write_list(run_dir: Path, jobs: JobList) -> None:
    write_json(list_path(run_dir), asdict(jobs))


@dataclass(frozen=True)
class State:
    """What Slurm says of a job, or of one task of an array."""

    id: str
    """Number of the job, or ARRAY_TASK."""
    state: str
    reason: str | None
    nodes: str | None
    """The names of its nodes."""
    started: str | None
    """In the cluster's local time, as are all times here."""
    ended: str | None
    restarts: int
    exit_code: str | None

    @property
    def over(self) -> bool:
        return self.state in _OVER


def ask(words: Sequence[str]) -> str:
    """What a command of Slurm prints. Raises LaunchError with its own words if it fails."""
    environment = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith("SLURM_") or name in _KEPT
    }
    try:
        done = subprocess.run(
            words,
            env=environment,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=_PATIENCE,
            check=False,
        )
    except FileNotFoundError:
        raise LaunchError(
            f"{words[0]} is not on PATH; call this on a login node of a cluster that has Slurm, "
            "or look at the scripts with harness submit --dry-run"
        ) from None
    except subprocess.TimeoutExpired:
        raise LaunchError(f"{words[0]} has not answered for {_PATIENCE:.0f} s") from None
    if done.returncode:
        said = done.stderr.strip() or done.stdout.strip() or f"exit code {done.returncode}"
        raise LaunchError(f"{words[0]}: {said.removeprefix(f'{words[0]}: ')}")
    return done.stdout


def job_states(numbers: Sequence[str]) -> dict[str, list[State]]:
    """What Slurm says of these jobs; an array has a state for each task that has started, and one
    for the others. A job that it does not know any more has none.

    Raises LaunchError if Slurm cannot be asked.
    """
    found: dict[str, list[State]] = {}
    for number in numbers:
        try:
            said = ask(["scontrol", "-o", "show", "job", number])
        except LaunchError as error:
            if "nvalid job id" not in str(error):
                raise
            said = ""
        found[number] = sorted(parse_jobs(said), key=lambda state: (len(state.id), state.id))
    return found


def parse_jobs(text: str) -> Iterator[State]:
    """The lines of ``scontrol -o show job``."""
    for line in text.splitlines():
        fields = _fields(line)
        number, state = fields.get("JobId"), fields.get("JobState")
        if number is None or state is None:
            continue
        array, task = fields.get("ArrayJobId"), fields.get("ArrayTaskId")
        yield State(
            id=number if array is None or task is None else f"{array}_{task}",
            state=state.split(",")[0],
            reason=fields.get("Reason"),
            nodes=fields.get("NodeList"),
            started=fields.get("StartTime"),
            ended=fields.get("EndTime"),
            restarts=restart_count(fields.get("Restarts", "")),
            exit_code=fields.get("ExitCode"),
        )


def restart_count(text: str) -> int:
    """How often a job was queued again, as Slurm tells it; 0 where it tells nothing."""
    return int(text) if re.fullmatch("[0-9]{1,9}", text) else 0


_FIELD = re.compile(
    r"(?:^| )(JobId|ArrayJobId|ArrayTaskId|JobState|Reason|NodeList|StartTime|EndTime|Restarts"
    r"|ExitCode)=(\S*)"
)
_NOTHING = frozenset({"", "None", "(null)", "Unknown", "N/A"})


def _fields(line: str) -> dict[str, str]:
    """The first of each: what a user has written (a comment, say) comes after them."""
    fields: dict[str, str] = {}
    for name, value in _FIELD.findall(line):
        fields.setdefault(name, value)
    return {name: value for name, value in fields.items() if value not in _NOTHING}
