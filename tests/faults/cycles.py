"""Kill a run at random, go on with it, compare with the run that nobody disturbed; again and again.

A cycle is one launch that is killed: a random process, at a random moment of its work or after a
random time. After each, the newest checkpoint must equal the undisturbed run's of that update to
the last bit; at a run's end its weights and records must, and another run begins.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from random import Random
from typing import Any

import psutil
import torch
from jobs import Job, attempts, identical, run_arguments, weights

from faults.scene import (
    is_mpirun,
    is_rank,
    prepare,
    record_problems,
    undisturbed,
    write_plan,
)
from harness.checkpoint import checkpoint_name, newest_valid
from harness.errors import CheckpointError
from harness.jsonl import parse_line
from harness.resume import has_finished
from harness.rundir import RunDirectory

SETTINGS = (
    "model.name=planted:net",
    "data={dataset: synthetic, size: 350, image_size: 8, channels: 1, classes: 10}",
    "comm={compression: none, summation: exact}",
    "batch={initial: 24, max: 96, micro: 12, growth: {policy: geometric, every: 4ep}}",
    "train={duration: 16ep, checkpoint_every: 3up, log_every: 1, tensorboard: false}",
    "launch.restart_pause=0",
)
WHOLE = ("train.checkpoint_every=1up", "train.keep_checkpoints=100000")
"""Of the undisturbed run, so that every checkpoint has its like."""
FILE = "cycles.jsonl"

MOMENTS = ("update", "collective", "checkpoint", "digest", "evaluation", "start")
"""Of a rank's work, at which it ends itself."""
KINDS = {
    "one rank": (1, 1, ("--launcher", "local", "comm.backend=solo")),
    "two ranks": (2, 2, ("--launcher", "mpirun")),
    "one, then two": (1, 2, ("--launcher", "mpirun")),
    "two, by horovodrun": (2, 2, ("--launcher", "horovodrun")),
}
"""Ranks at first and in the end, and what starts them."""
_PAUSE = 0.02
"""Seconds that a training pass takes more where the moment is a random time."""
_PATIENCE = 900.0


@dataclass
class Cycle:
    """A launch that was to be killed."""

    lane: int
    run: int
    kind: str
    victim: str
    moment: str
    struck: bool = False
    """Whether it was: a launch may end before its moment comes."""
    exit_code: int | None = None
    stage: int | None = None
    """Of the batch's growth, when it was killed; None: before the first update."""
    update: int = 0
    """Up to which the records tell of training then."""
    checkpoint: int = 0
    """Update of the newest one; 0: there is none."""
    compared: bool = False
    """Whether that checkpoint was held against the undisturbed run's."""
    problems: list[str] = field(default_factory=list)
    finished: bool = False
    """Whether the run was at its end, and so compared as a whole."""
    seconds: float = 0.0


class Lane:
    """Runs one after another, each killed until it is through."""

    def __init__(self, number: int, out: Path, seed: int, tally: Tally) -> None:
        self._number, self._out, self._tally = number, out, tally
        self._random = Random(f"{seed} {number} {tally.done}")
        self._run = 0

    def work(self) -> None:
        """Until there are enough cycles."""
        while self._tally.wants_more():
            self._run += 1
            self._whole_run()

    def _whole_run(self) -> None:
        kind = self._random.choice(list(KINDS))
        folder = self._out / f"lane-{self._number}"
        shutil.rmtree(folder, ignore_errors=True)
        prepare(folder)
        broken = False
        while self._tally.wants_more() and not broken:
            cycle = self._cycle(folder, kind)
            broken = bool(cycle.problems)
            self._tally.add(cycle)
            if cycle.finished:
                break
        if broken:
            folder.rename(self._out / f"broken-{self._number}-{time.time_ns()}")

    def _cycle(self, folder: Path, kind: str) -> Cycle:
        random, run_dir = self._random, folder / "run"
        victim, moment = self._fate(kind)
        cycle = Cycle(self._number, self._run, kind, victim, moment)
        begun = time.monotonic()
        plan: dict[str, Any] = {"moment": None, "rank": 0, "update": 0, "pause": _PAUSE}
        if moment in MOMENTS:
            rank = int(victim.removeprefix("rank "))
            first = 0 if moment == "start" else 1
            update = first and random.randint(1, 8)
            times = random.randint(1, 12) if moment == "checkpoint" else 1
            plan = {"moment": moment, "rank": rank, "update": update, "times": times, "kill": True}
        write_plan(folder, **plan)
        start, most, words = KINDS[kind]
        ranks = f"ranks={{start: {start}, max: {most}, threads: 1, restart_seconds: 0}}"
        arguments = run_arguments(run_dir, None, *SETTINGS, ranks, *words)
        with Job(run_dir, *arguments, "--go-on", cwd=folder) as job:
            if moment == "time":
                cycle.struck = _kill_some_time(job, victim, random)
            code, output = job.finish(_PATIENCE)
        cycle.exit_code = code
        cycle.struck |= (folder / "struck").exists()
        cycle.problems += _ended_well(cycle, output)
        self._look(run_dir, cycle)
        cycle.seconds = time.monotonic() - begun
        return cycle

    def _fate(self, kind: str) -> tuple[str, str]:
        """Who is to die, and when."""
        alone = kind == "one rank"
        if self._random.random() < 0.35:
            others = () if alone else ("rank 1", "all ranks", "its mpirun")
            return self._random.choice(("rank 0", "harness run", *others)), "time"
        victim = "rank 0" if alone or self._random.random() < 0.6 else "rank 1"
        moments = MOMENTS if victim == "rank 0" else ("update", "collective", "evaluation", "start")
        return victim, self._random.choice(moments)

    def _look(self, run_dir: Path, cycle: Cycle) -> None:
        """Hold what there is against the run that nobody disturbed."""
        reference = self._out / "undisturbed-cycles" / "run"
        last = _last_record(run_dir / "metrics.jsonl")
        if last is not None:
            cycle.stage, cycle.update = last["stage"], last["update"]
        try:
            found = newest_valid(run_dir / "checkpoints", lambda path, why: None)
        except CheckpointError as error:
            found = None
            cycle.problems.append(str(error))
        if found is not None:
            cycle.checkpoint, cycle.compared = found.update, True
            whole = reference / "checkpoints" / checkpoint_name(found.update)
            ours = torch.load(found.path, weights_only=True)
            theirs = torch.load(whole, weights_only=True)
            for key in ("model", "optimizer", "growth", "samples_seen", "update"):
                if not identical(ours[key], theirs[key]):
                    cycle.problems.append(f"{key} of update {found.update} differs")
        if has_finished(RunDirectory(run_dir)):
            cycle.finished = True
            cycle.problems += record_problems(run_dir, reference)
            if not identical(weights(run_dir), weights(reference)):
                cycle.problems.append("the final weights differ")


def _ended_well(cycle: Cycle, output: str) -> list[str]:
    """What is wrong with how a launch ended."""
    problems = ["a traceback was shown"] if "Traceback" in output else []
    allowed = {0, 1} | ({-9} if cycle.victim == "harness run" else set())
    if cycle.exit_code not in allowed or (cycle.exit_code == 1 and not cycle.struck):
        problems.append(f"exit code {cycle.exit_code}: {output[-800:]}")
    return problems


def _kill_some_time(job: Job, victim: str, random: Random) -> bool:
    """Kill somebody in a launch's start, or as it trains; whether there was anybody."""
    if random.random() < 0.5:
        _wait(job, random.uniform(0.1, 4.0))
    else:
        while job.process.poll() is None and attempts(job.run_dir) == job.attempts_before:
            time.sleep(0.01)
        _wait(job, random.uniform(0.0, 1.5))
    if job.process.poll() is not None:
        return False
    launcher = psutil.Process(job.process.pid)
    below = launcher.children(recursive=True)
    ranks = [one for one in below if is_rank(one)]
    chosen = {
        "harness run": [launcher],
        "all ranks": ranks,
        "rank 0": ranks[:1],
        "rank 1": ranks[1:2],
        "its mpirun": [one for one in below if is_mpirun(one)],
    }[victim]
    for process in chosen:
        with suppress(psutil.NoSuchProcess):
            process.kill()
    if victim == "harness run":
        psutil.wait_procs(below, timeout=_PATIENCE)
    return bool(chosen)


def _wait(job: Job, seconds: float) -> None:
    """That long, or until the job has ended."""
    with suppress(subprocess.TimeoutExpired):
        job.process.wait(seconds)


def _last_record(path: Path) -> dict[str, Any] | None:
    if not path.exists():
        return None
    records = [parse_line(line) for line in path.read_bytes().splitlines(keepends=True)]
    return next((record for record in reversed(records) if record is not None), None)


class Tally:
    """Cycles of all lanes, in a file that grows as they come."""

    def __init__(self, path: Path, wanted: int, say: Callable[[str], None]) -> None:
        self._path, self._wanted, self._say = path, wanted, say
        self._lock = threading.Lock()
        self.cycles = load(path)
        self.done = sum(cycle.struck for cycle in self.cycles)

    def wants_more(self) -> bool:
        return self.done < self._wanted

    def add(self, cycle: Cycle) -> None:
        with self._lock:
            self.cycles.append(cycle)
            self.done += cycle.struck
            with self._path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(asdict(cycle)) + "\n")
            if cycle.problems:
                self._say(f"BROKEN: {cycle}")
            if cycle.struck and self.done % 10 == 0:
                self._say(f"{self.done} of {self._wanted} cycles")


def load(path: Path) -> list[Cycle]:
    """Cycles that were made before."""
    if not path.exists():
        return []
    return [Cycle(**json.loads(line)) for line in path.read_text(encoding="utf-8").splitlines()]


def run(
    out: Path, count: int, lanes: int, seed: int, say: Callable[[str], None] = print
) -> list[Cycle]:
    """Make cycles until ``out`` has so many of them; returns all."""
    out.mkdir(parents=True, exist_ok=True)
    undisturbed(out / "undisturbed-cycles", (*SETTINGS, *WHOLE))
    os.environ["OMP_NUM_THREADS"] = "1"
    tally = Tally(out / FILE, count, say)
    with ThreadPoolExecutor(lanes) as pool:
        for lane in [pool.submit(Lane(n, out, seed, tally).work) for n in range(lanes)]:
            lane.result()
    return tally.cycles


def table(cycles: Sequence[Cycle]) -> str:
    """Markdown: what was killed when, and what came of it."""
    struck = [cycle for cycle in cycles if cycle.struck]
    words = {
        "update": "as an update begins",
        "collective": "as it is about to enter an allreduce",
        "checkpoint": "in the middle of a checkpoint",
        "digest": "between a checkpoint's digest and its name",
        "evaluation": "in an evaluation",
        "start": "as it builds its model",
        "time": "after a random time",
    }
    counts = Counter((cycle.moment, cycle.victim) for cycle in struck)
    victims = sorted({cycle.victim for cycle in struck})
    lines = [
        f"| killed | {' | '.join(victims)} |",
        f"|---|{'---|' * len(victims)}",
    ]
    for moment, told in words.items():
        row = [counts[moment, victim] or "" for victim in victims]
        if any(row):
            lines.append(f"| {told} | {' | '.join(map(str, row))} |")
    return "\n".join(lines)


def sentence(cycles: Sequence[Cycle]) -> str:
    """What was seen, in words."""
    struck = [cycle for cycle in cycles if cycle.struck]
    stages = Counter(cycle.stage for cycle in struck)
    told = ", ".join(
        f"{stages[stage]} {'before the first update' if stage is None else f'in stage {stage}'}"
        for stage in sorted(stages, key=lambda stage: -1 if stage is None else stage)
    )
    compared = sum(cycle.compared for cycle in cycles)
    finished = sum(cycle.finished for cycle in cycles)
    diverged = sum(bool(cycle.problems) for cycle in cycles)
    seconds = sum(cycle.seconds for cycle in struck) / max(len(struck), 1)
    return (
        f"{len(struck)} launches killed ({told}); {compared} newest checkpoints and {finished} "
        f"finished runs held against the undisturbed run; {diverged} differed or ended wrongly. "
        f"A cycle took {seconds:.1f} s in the mean."
    )
