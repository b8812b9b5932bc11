"""Where a fault is staged: a run beside a plan, what is done to it, and what came of it."""

from __future__ import annotations

import json
import re
import shutil
import signal
import socket
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field
from datetime import datetime
from pathlib import Path
from random import Random
from typing import Any

import psutil
from jobs import (
    CONFIG,
    Job,
    Where,
    events,
    harness,
    here,
    identical,
    lines,
    rank_processes,
    run_arguments,
    timeless,
    trajectory,
    weights,
)

from harness.resume import has_finished
from harness.rundir import RunDirectory

EVERY = 5
"""Updates between two checkpoints."""
SAMPLES = 350
"""Of an epoch: no multiple of any batch, so that the last updates of epochs are uneven."""
SETTINGS = (
    "model.name=planted:net",
    f"data={{dataset: synthetic, size: {SAMPLES}, image_size: 8, channels: 1, classes: 10}}",
    # Sums that do not depend on the ranks, so that weights are equal to the last bit.
    "comm={compression: none, summation: exact}",
    "batch={initial: 24, max: 96, micro: 12, growth: {policy: geometric, every: 2ep}}",
    f"train={{duration: 8ep, checkpoint_every: {EVERY}up, log_every: 1, tensorboard: false}}",
    "launch.restart_pause=0",
)
UPDATES = 62
"""Of the run that these settings make: 30 of 24 samples, 16 of 48, 16 of 96."""
PATIENCE = 900.0
"""Seconds; machines stall for longer than anything here takes."""

_TOLD = ("update", "samples_seen", "epoch", "stage", "global_batch", "lr", "momentum")
_BY_WHOM = {"ranks", "accumulation", "loss"}
"""Of events: what depends on who computed it; of a loss, the last digits."""


class Unexpected(Exception):  # noqa: N818 - what the matrix reports, no error of its own
    """The scene went otherwise than it was to, so that nothing was found out."""


@dataclass
class Finding:
    """What came of a fault, once."""

    row: str
    repeat: int
    seed: int
    what: str = ""
    """What was done to whom and when."""
    said: str = ""
    """What the harness said of it."""
    known_after: float | None = None
    """Seconds from the fault until the launching process knew of it; None: see ``known_by``."""
    known_by: str = ""
    exit_codes: list[int] = field(default_factory=list)
    """Of the command that was disturbed, and of those that went on with the run."""
    repeated: int | None = None
    """Updates that were computed again."""
    same_weights: bool | None = None
    """Equal to the undisturbed run's to the last bit; None: not the question."""
    complete: bool | None = None
    """Each update is in the records once and in order, as in the undisturbed run's."""
    broken: list[str] = field(default_factory=list)
    """Promises that were not kept."""
    skipped: str | None = None
    """Why nothing was tried."""
    seconds: float = 0.0
    time: str = ""

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


class Scene:
    """A folder with a model that follows a plan, and the runs in it."""

    def __init__(self, folder: Path, reference: Path, finding: Finding, random: Random) -> None:
        self.folder, self.reference, self.finding = folder, reference, finding
        self.random = random
        self.run_dir = folder / "run"
        self.struck_at = 0.0
        """When the fault was done, in seconds since the epoch."""
        self.output = ""
        """Everything that the commands printed."""
        shutil.rmtree(folder, ignore_errors=True)
        prepare(folder)

    # Before

    def update(self, first: int = 12, last: int = UPDATES - 8) -> int:
        """A random update, by default past some checkpoints."""
        return self.random.randint(first, last)

    def plan(self, moment: str, rank: int, update: int, **more: object) -> None:
        """What is to happen; see `planted`."""
        write_plan(self.folder, moment=moment, rank=rank, update=update, **more)

    def words(
        self, *more: str, ranks: int | None = 2, restarts: int = 3, resume: bool = False
    ) -> list[str]:
        """The command line of the run."""
        return run_arguments(
            self.run_dir, ranks, *SETTINGS, *more, resume=resume, restarts=restarts
        )

    def start(
        self,
        *more: str,
        ranks: int | None = 2,
        restarts: int = 3,
        resume: bool = False,
        words: Sequence[str] | None = None,
        where: Where = here,
    ) -> Job:
        """The run in the background."""
        chosen = words or self.words(*more, ranks=ranks, restarts=restarts, resume=resume)
        return Job(self.run_dir, *chosen, cwd=self.folder, where=where)

    # Meanwhile

    def until(self, job: Job, happened: Callable[[], object], what: str) -> None:
        """Wait for it while the run goes on; raises Unexpected."""
        wait_until(job, happened, what)

    def held(self, job: Job) -> None:
        """Wait until the rank of the plan is held at its moment."""
        self.until(job, (self.folder / "held").exists, "its moment had come")

    def strike(self, act: Callable[[], object]) -> None:
        """Do the fault, and remember when."""
        self.struck_at = time.time()
        act()

    def release(self) -> None:
        (self.folder / "go").touch()

    def signal(self, job: Job, ranks: Iterable[int], number: signal.Signals) -> None:
        """Strike ranks with a signal."""
        processes = rank_processes(self.run_dir)
        missing = [rank for rank in ranks if rank not in processes]
        if missing:
            raise Unexpected(f"ranks {missing} are not there to be struck")
        self.strike(lambda: [processes[rank].send_signal(number) for rank in ranks])

    # After

    def end(self, job: Job) -> int:
        """Wait for the run's end and remember it; returns its exit code."""
        code, output = job.finish(PATIENCE)
        self.finding.exit_codes.append(code)
        self.output += output
        return code

    def go_on(self, *more: str, ranks: int | None = 2, where: Where = here) -> int:
        """Resume the run to its end; returns the exit code."""
        words = self.words(*more, ranks=ranks, resume=True)
        done = harness(*words, cwd=self.folder, where=where, timeout=PATIENCE)
        self.finding.exit_codes.append(done.returncode)
        self.output += done.stdout + done.stderr
        return done.returncode

    def relayed(self) -> bool:
        """Whether the launching process has told its ranks of a signal."""
        return any(self.run_dir.rglob("stop-signal"))

    def judge(
        self,
        exits: Sequence[int | tuple[int, ...]],
        said: str,
        known_by: str = "fault",
        repeated: int | None = EVERY,
        same: bool = True,
    ) -> None:
        """Fill the finding in, with the promises that were not kept.

        Args:
            exits: the exit codes that were promised; a tuple: any of these.
            said: a pattern that what the harness said of the fault must hold.
            known_by: the kind of event by which the launching process knew; "end": by the end of
                the command itself; else words for the table.
            repeated: the most updates that may have been computed again; None: not the question.
            same: whether the run is to end as the undisturbed one did.
        """
        found = self.finding
        found.known_by, broken = known_by, found.broken
        found.said = self._said(said)
        if not found.said:
            broken.append(f"nothing was said like {said!r}: {self.output[-600:]!r}")
        if "Traceback" in self.output:
            broken.append("a traceback was shown")
        allowed = [code if isinstance(code, tuple) else (code,) for code in exits]
        codes = found.exit_codes
        if len(codes) != len(allowed) or any(
            code not in ok for code, ok in zip(codes, allowed, strict=True)
        ):
            broken.append(f"exit codes {codes}, not {list(exits)}")
        self._when(known_by)
        if repeated is not None:
            again = [event["updates_repeated"] for event in self.events("resume")]
            found.repeated = sum(again)
            if any(count > repeated for count in again):
                broken.append(f"{again} updates were computed again, not {repeated} at most")
        if same:
            self._compare()

    def planned_at(self) -> float:
        """When a rank has done what the plan says to itself; in seconds since the epoch."""
        try:
            return float((self.folder / "struck").read_text(encoding="ascii"))
        except FileNotFoundError:
            raise Unexpected(f"the plan's moment never came: {self.output[-600:]}") from None

    def events(self, kind: str) -> list[dict[str, Any]]:
        """What the run has recorded of a kind."""
        return events(self.run_dir, kind) if (self.run_dir / "events.jsonl").exists() else []

    def _said(self, pattern: str) -> str:
        """The shortest line of all that was said and recorded that has the pattern."""
        said = [str(event.get("reason") or "") for event in self.events("fault")]
        said += [str(event.get("reason") or "") for event in self.events("checkpoint_rejected")]
        said += [str(event.get("reason") or "") for event in self.events("skipped_update")]
        said += [line.removeprefix("harness: ") for line in self.output.splitlines()]
        fitting = [line for line in said if re.search(pattern, line)]
        said = min(fitting, key=len, default="").replace(str(self.run_dir), "RUN_DIR")
        return re.sub(rf"\bon {re.escape(socket.gethostname())}\b", "on HOST", said)

    def _when(self, known_by: str) -> None:
        if known_by == "end":
            self.finding.known_after = time.time() - self.struck_at
            return
        found = [
            datetime.fromisoformat(event["time"]).timestamp() for event in self.events(known_by)
        ]
        later = [moment for moment in found if moment > self.struck_at - 0.01]
        if later:
            self.finding.known_after = max(0.0, later[0] - self.struck_at)
        elif known_by in ("fault", "stop", "skipped_update"):
            self.finding.broken.append(f"no {known_by} was recorded")

    def check_records(self, evaluations: bool = True) -> None:
        """Compare the records with the undisturbed run's; see `record_problems`."""
        problems = record_problems(self.run_dir, self.reference, evaluations)
        self.finding.complete = not problems
        self.finding.broken += problems

    def _compare(self) -> None:
        found = self.finding
        self.check_records()
        try:
            found.same_weights = identical(weights(self.run_dir), weights(self.reference))
        except (OSError, ValueError) as error:
            found.broken.append(f"there are no weights to compare: {error}")
            return
        if not found.same_weights:
            found.broken.append("the weights differ from the undisturbed run's")


def prepare(folder: Path) -> None:
    """Make a folder with the model for the runs in it."""
    folder.mkdir(parents=True)
    shutil.copy(Path(__file__).with_name("planted.py"), folder)


def undisturbed(folder: Path, settings: Sequence[str] = SETTINGS) -> Path:
    """The run that nobody disturbs, as one process; made if it is not there."""
    run_dir = folder / "run"
    if not has_finished(RunDirectory(run_dir)):
        shutil.rmtree(folder, ignore_errors=True)
        prepare(folder)
        words = ("train", str(CONFIG), *settings, "ranks.threads=1", "--run-dir", str(run_dir))
        done = harness(*words, cwd=folder, timeout=3600)
        if done.returncode:
            raise Unexpected(f"the undisturbed run failed: {done.stdout}{done.stderr}")
    return run_dir


def write_plan(folder: Path, **plan: object) -> None:
    """Lay a new plan, which nobody has carried out yet."""
    for name in ("held", "go", "struck"):
        (folder / name).unlink(missing_ok=True)
    for entered in folder.glob("entered-*"):
        entered.unlink()
    part = folder / "plan.part"
    part.write_text(json.dumps(plan), encoding="utf-8")
    part.replace(folder / "plan.json")


def wait_until(job: Job, happened: Callable[[], object], what: str) -> None:
    """Wait for it while a run goes on; raises Unexpected if it ends before, or takes too long."""
    deadline = time.monotonic() + PATIENCE
    while not happened():
        if job.process.poll() is not None:
            _, output = job.finish()
            raise Unexpected(f"the run ended before {what}: {output[-1500:]}")
        if time.monotonic() > deadline:
            raise Unexpected(f"not {what} after {PATIENCE:g} s")
        time.sleep(0.005)


def is_rank(process: psutil.Process) -> bool:
    """Whether it is a rank of a run on this host."""
    try:
        words = process.cmdline()
    except psutil.Error:
        return False
    return words[1:4] == ["-m", "harness", "train"] and "python" in words[0]


def is_mpirun(process: psutil.Process) -> bool:
    """Whether it is what starts ranks; wheels of Open MPI give it a name of their own."""
    try:
        return bool(process.name().startswith(("mpirun", "orterun", "prterun", "mpiexec")))
    except psutil.Error:
        return False


def record_problems(run_dir: Path, reference: Path, evaluations: bool = True) -> list[str]:
    """How a run's records differ from an undisturbed run's, but for times and for who did it.

    ``evaluations``: also in what was evaluated, of a run that is to have the same weights.
    """
    try:
        ours, theirs = told(run_dir), told(reference)
        happened, expected = _happened(run_dir), _happened(reference)
    except (OSError, ValueError) as error:
        return [f"records cannot be read: {error}"]
    problems = []
    if [line[0] for line in ours] != [line[0] for line in theirs]:
        problems.append("metrics.jsonl does not have each update once and in order")
    elif ours != theirs:
        problems.append("metrics.jsonl tells of another trajectory")
    if evaluations and happened != expected:
        problems.append("events.jsonl tells of another trajectory")
    return problems


def told(run_dir: Path) -> list[list[Any]]:
    """What each line of metrics.jsonl says of the trajectory, the update first."""
    return [[line[key] for key in _TOLD] for line in lines(run_dir / "metrics.jsonl")]


def _happened(run_dir: Path) -> list[dict[str, Any]]:
    """The trajectory's events; checkpoints are left out, as a stop has one of its own."""
    return [
        {key: value for key, value in timeless(event).items() if key not in _BY_WHOM}
        for event in trajectory(run_dir)
        if event["kind"] != "checkpoint"
    ]
