"""Where a run and its batch jobs are: from the run's records, and from Slurm where that is."""

from __future__ import annotations

import json
import shlex
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from harness.errors import LaunchError, RunDirectoryError
from harness.records import read_run
from harness.rundir import RunDirectory
from harness.standing import RunStatus, run_lines, share, standing
from harness.yamlfile import one_line
from launch.jobs import JobList, State, Submitted, job_states, read_list

UNKNOWN = "not known any more"
"""The state of a job that Slurm has forgotten: it does so some minutes after a job's end."""
_WIDTH = 200  # columns; a table that is cut to the terminal hides what it is asked for
_BAD = ("BOOT_FAIL", "DEADLINE", "FAILED", "NODE_FAIL", "OUT_OF_MEMORY", "TIMEOUT")


@dataclass(frozen=True)
class JobStatus:
    """One job, or one task of an array."""

    id: str
    name: str
    segment: int | None
    nodes: int
    ranks: int
    after: list[str]
    state: str | None
    """In Slurm's words; None if Slurm cannot be asked."""
    reason: str | None
    started: str | None
    ended: str | None
    restarts: int | None
    hint: str | None
    """What to do about a job that is stuck."""


@dataclass(frozen=True)
class Status:
    """What ``harness status`` shows of one directory."""

    path: Path
    jobs: list[JobStatus]
    run: RunStatus
    next: str
    slurm: str | None = None
    """Why Slurm could not be asked."""
    points: list[Status] = field(default_factory=list)
    history: list[dict[str, Any]] = field(default_factory=list)

    def as_dict(self) -> dict[str, Any]:
        """The form of ``harness status --json``."""
        return {
            "path": str(self.path),
            "jobs": [asdict(job) for job in self.jobs],
            "slurm": self.slurm,
            "run": asdict(self.run),
            "next": self.next,
            "history": self.history,
            "points": [point.as_dict() for point in self.points],
        }


def print_status(path: Path, as_json: bool = False) -> None:
    """Print where a run directory, or a directory of several, stands."""
    status = read_status(path)
    if as_json:
        print(json.dumps(status.as_dict(), indent=2))
        return
    console = Console(width=_WIDTH, soft_wrap=True, highlight=False)
    if status.jobs:
        console.print(_job_table(status.jobs))
    for job in status.jobs:
        if job.hint:
            print(f"job {job.id}: {job.hint}")
    if status.slurm:
        print(f"the states of jobs are not known: {status.slurm}")
    if status.points:
        console.print(_point_table(status.points))
    else:
        print(*run_lines(status.run), sep="\n")
    print(f"next: {status.next}")


def read_status(path: Path) -> Status:
    """Where a directory stands. Raises RunDirectoryError if it holds neither a run nor jobs."""
    run = RunDirectory(path)
    if not path.is_dir() or not (run.holds_run or (path / "slurm").is_dir()):
        raise RunDirectoryError(
            f"{path} holds no run and no batch jobs; give a directory that harness run or harness "
            "submit has made"
        )
    listed = read_list(path)
    states: dict[str, list[State]] | None = None
    trouble = None
    if listed.jobs:
        try:
            states = job_states([job.id for job in listed.jobs])
        except LaunchError as error:
            trouble = str(error)
    jobs = [status for job in listed.jobs for status in _job_status(job, states)]
    points = [_point(path / point.directory) for point in listed.points]
    where = _where(path)
    return Status(
        path,
        jobs,
        where,
        _next(path, listed, jobs, points, where),
        trouble,
        points,
        listed.history,
    )


def _point(path: Path) -> Status:
    where = _where(path)
    return Status(path, [], where, where.state)


# Jobs


def _job_status(job: Submitted, states: dict[str, list[State]] | None) -> Iterator[JobStatus]:
    known = None if states is None else states[job.id]
    told: list[State | None] = [*known] if known else [None]
    for state in told:
        gone = UNKNOWN if known is not None else None
        yield JobStatus(
            id=state.id if state else job.id,
            name=job.name,
            segment=job.segment,
            nodes=job.nodes,
            ranks=job.ranks,
            after=job.after,
            state=state.state if state else gone,
            reason=state.reason if state else None,
            started=state.started if state else None,
            ended=state.ended if state and state.over else None,
            restarts=state.restarts if state else None,
            hint=hint(state, job) if state and not state.over else None,
        )


def hint(state: State, job: Submitted) -> str | None:
    """What to do about a job that waits for something that will not come by itself."""
    reason = (state.reason or "").lower()
    if reason == "dependencyneversatisfied":
        before = ", ".join(job.after)
        return (
            f"waits for job {before}, which has not ended well: look at its output, end this one "
            f"with scancel {state.id}, and submit again with --resume"
        )
    if state.state in ("REQUEUE_HOLD", "SPECIAL_EXIT") or "requeue" in reason:
        return (
            "was queued again and is held, mostly because its node failed while it started: look "
            f"at sinfo -R, then let it go with scontrol release {state.id}"
        )
    if "held" in reason:
        who = "you" if "user" in reason else "the cluster's staff"
        return f"is held by {who}; scontrol release {state.id} lets it go"
    if reason in ("partitionnodelimit", "partitiontimelimit", "badconstraints"):
        return f"asks for what the partition never gives ({state.reason}); end it with scancel"
    return None


# The run


def _where(path: Path) -> RunStatus:
    if not RunDirectory(path).holds_run:
        return RunStatus("not started")
    records = read_run(path)
    last = records.metrics[-1] if records.metrics else {}
    return standing(last, records.events, records.plan)


def _next(
    path: Path, listed: JobList, jobs: list[JobStatus], points: list[Status], run: RunStatus
) -> str:
    """What comes next, in words."""
    waiting = [job for job in jobs if job.state == "PENDING"]
    running = [job for job in jobs if job.state in ("RUNNING", "COMPLETING", "CONFIGURING")]
    if running:
        names = ", ".join(job.id for job in running[:3]) + (" …" if len(running) > 3 else "")
        then = f", then job {waiting[0].id} on {waiting[0].ranks} ranks" if waiting else ""
        return f"job {names} runs{then}"
    if waiting:
        return f"job {waiting[0].id} is queued ({waiting[0].reason or 'no reason given'})"
    if listed.kind == "probe":
        return f"the results are in {path}"
    if points:
        done = sum(point.run.state == "done" for point in points)
        return f"nothing: {done} of {len(points)} runs are done; report: {path / 'report'}"
    if run.state == "done":
        return f"nothing; report: {path / 'report' / 'index.html'}"
    failed = [job.id for job in jobs if job.state in _BAD]
    blame = f"job {failed[0]} has failed: see its output in {path / 'slurm'}; " if failed else ""
    return blame + _by_hand(path, listed, run)


def _by_hand(path: Path, listed: JobList, run: RunStatus) -> str:
    config, directory = str(path / "slurm" / "config.yaml"), ["--run-dir", str(path)]
    if run.state == "not started" and not listed.jobs:
        return "nothing was submitted; call harness submit again without --dry-run"
    if run.state == "not started":
        return f"submit it with: {shlex.join(['harness', 'submit', config, *directory])}"
    alive = " unless it still runs elsewhere" if run.state == "running" else ""
    words = ["harness", "submit", config]
    if not listed.jobs:
        words = ["harness", "run", str(path / "config.yaml")]
    return f"go on{alive} with: {shlex.join([*words, *directory, '--resume'])}"


# What is shown


def _job_table(jobs: list[JobStatus]) -> Table:
    table = Table(box=None, pad_edge=False)
    for name in ("job", "name", "segment", "nodes", "ranks", "state", "reason", "started", "ended"):
        table.add_column(name, justify="right" if name in ("segment", "nodes", "ranks") else "left")
    table.add_column("restarts", justify="right")
    for job in jobs:
        table.add_row(
            *(
                Text("" if value is None else one_line(str(value)))
                for value in (
                    job.id,
                    job.name,
                    job.segment,
                    job.nodes,
                    job.ranks,
                    job.state or "?",
                    job.reason,
                    job.started,
                    job.ended,
                    job.restarts,
                )
            )
        )
    return table


def _point_table(points: list[Status]) -> Table:
    table = Table(box=None, pad_edge=False)
    for name in ("run", "state", "progress", "epoch", "ranks", "images/s", "attempts"):
        table.add_column(name, justify="left" if name in ("run", "state") else "right")
    for point in points:
        run = point.run
        table.add_row(
            Text(one_line(point.path.name)),
            run.state,
            share(run),
            "" if run.epoch is None else f"{run.epoch:.2f}",
            "" if run.ranks is None else str(run.ranks),
            "" if run.images_per_sec is None else f"{run.images_per_sec:,.0f}",
            str(run.attempts),
        )
    return table
