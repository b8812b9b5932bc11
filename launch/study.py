"""Runs the cells of a study that have not run yet, gathers all, and writes its page."""

from __future__ import annotations

import json
import os
import platform
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

from harness import environment
from harness.config import dump_config
from harness.data_sizes import check_root, train_size
from harness.errors import ConfigError, LaunchError, RunDirectoryError, StoppedEarly
from harness.files import make_directory, storing, write_atomic
from harness.jsonl import read_object
from harness.lenient import pick
from harness.report.fields import duration
from harness.rundir import RunDirectory
from harness.runlock import RunLock
from harness.schedule.plan import build_plan
from harness.study.cells import Arm, Cell, Study, alone, load_study, trial_text
from harness.study.metrics import METRICS
from harness.study.page import Results, write, write_index
from harness.study.runs import Measured, measure, state
from harness.wording import counted, signal_name
from harness.yamlfile import one_line
from launch.graph import SubmitRequest
from launch.slurm import MAX_POINTS
from launch.submit import submit

_TIED = str(Path(__file__).with_name("tied.py"))
_NOTE = "study.yaml"
# What an update and a sample take on a core of today, for a guess before anything has run.
_PER_UPDATE, _PER_SAMPLE, _PER_CELL = 3e-3, 5e-5, 0.3


@dataclass(frozen=True)
class StudyRequest:
    """What ``harness study`` was asked for."""

    study_path: Path
    quick: bool = False
    jobs: int | None = None
    """Ranks that train at a time; default: one for each core."""
    out: Path | None = None
    results: Path | None = None
    gather: bool = False
    """Run nothing."""
    submit: bool = False
    dry_run: bool = False
    sbatch: tuple[str, ...] = ()


def study(request: StudyRequest) -> int:
    """Run what is left, and write the page; returns the exit code: 1 if a run has failed.

    Raises UsageError for what can be refused beforehand, StoppedEarly if it was stopped.
    """
    _check(request)
    found = load_study(request.study_path, request.quick)
    directory = request.out or Path("runs") / f"study-{found.name}{'-quick' * request.quick}"
    if request.dry_run:
        _print_plan(found, directory / "cells", _jobs(request))
        return 0
    if request.gather:
        if not (directory / "cells").is_dir():
            raise RunDirectoryError(f"{directory} holds no cells of a study to gather")
        return _gather(found, directory, request.results)
    check_root_of(found)
    make_directory(directory / "cells", "directory (-o)")
    with RunLock(RunDirectory(directory), "launch.lock", needed=True):
        if request.submit:
            return _submit(found, directory, request.sbatch)
        write_atomic(directory / _NOTE, request.study_path.read_bytes())
        runner = Runner(directory, _jobs(request))
        with runner.listening():
            _run_all(found, runner)
    code = _gather(found, directory, request.results)
    if runner.stopped:
        raise StoppedEarly("stopped on request; the same command goes on")
    return 1 if runner.failed else code


def _submit(found: Study, directory: Path, sbatch: tuple[str, ...]) -> int:
    """Queue what can run now: one size of runs at a time, and trials before what they choose."""
    cells = directory / "cells"
    left = _left(found.trial_cells(), cells)
    finals = _left(found.final_cells(chosen_values(found, cells)), cells)
    now = left or finals
    if not now:
        print(f"harness: {found.name}: all runs are over; --gather writes the page")
        return 0
    ranks = min(cell.config.ranks.ceiling for cell in now)
    same = [cell for cell in now if cell.config.ranks.ceiling == ranks][:MAX_POINTS]
    configs = directory / "configs"
    configs.mkdir(exist_ok=True)
    points = []
    for cell in same:
        path = (configs / f"{cell.digest}.yaml").absolute()
        write_atomic(path, dump_config(cell.config).encode())
        points.append((cell.directory(cells).path.name, path))
    code = submit(SubmitRequest(points[0][1], sbatch=sbatch, run_dir=cells, points=tuple(points)))
    total = sum(found.size) - sum(_over(cell, cells) for cell in _all(found, cells))
    if total > len(same):
        print(
            f"harness: {total - len(same)} more come once these have ended: give the same command "
            "again, and with --gather at the end"
        )
    return code


def _all(found: Study, cells: Path) -> list[Cell]:
    return [*found.trial_cells(), *found.final_cells(chosen_values(found, cells))]


def _over(cell: Cell, cells: Path) -> bool:
    return state(cell.directory(cells)) in ("done", "diverged")


def _left(found: Sequence[Cell], cells: Path) -> list[Cell]:
    """Those that are not over."""
    return [cell for cell in found if not _over(cell, cells)]


def _check(request: StudyRequest) -> None:
    if request.jobs is not None and request.jobs < 1:
        raise LaunchError(f"--jobs {request.jobs}: at least 1 is needed")
    if request.gather and request.submit:
        raise LaunchError("--gather and --submit cannot be had together; submit first")
    if request.results is not None and not request.dry_run and not request.results.is_dir():
        raise RunDirectoryError(f"--results {request.results}: there is no such directory")


def check_root_of(found: Study) -> None:
    """Raises DataError if a cell's data are not there."""
    for cell in (*found.trial_cells()[:1], *found.final_cells({})[:1]):
        check_root(cell.config.data)


def _jobs(request: StudyRequest) -> int:
    return request.jobs or environment.usable_cores()


def _run_all(found: Study, runner: Runner) -> None:
    """The trials, then what they have chosen."""
    trials = found.trial_cells()
    left = runner.left(trials)
    finals = runner.left(found.final_cells(chosen_values(found, runner.cells)))
    if left or finals:
        total, compared = found.size
        print(
            f"harness: {found.name}: {counted(compared, 'run')} and {counted(total, 'trial')}; "
            f"{len(left) + len(finals)} to do, {runner.jobs} at a time; directory "
            f"{runner.cells.parent}",
            flush=True,
        )
    runner.run(left)
    if not runner.stopped:
        runner.run(runner.left(found.final_cells(chosen_values(found, runner.cells))))


def chosen_values(found: Study, cells: Path) -> dict[Arm, Any]:
    """The best value of what is tuned, of each arm whose trials are all over."""
    tune = found.file.tune
    if tune is None:
        return {}
    scores: dict[Arm, list[tuple[float, Any]]] = {}
    seen: dict[str, Measured] = {}
    for arm in dict.fromkeys(found.tuned_at(arm) for arm in found.arms):
        scores[arm] = []
        for value in found.trials(arm.variant):
            runs = []
            for seed in tune.seeds:
                cell = found.cell(arm, seed, value, tuning=True)
                if cell.digest not in seen:
                    seen[cell.digest] = measure(cell.directory(cells), found.target)
                runs.append(seen[cell.digest])
            if all(run.over for run in runs):
                scores[arm].append((_score(runs, tune.by), value))
    return {
        arm: max(tried, key=lambda one: one[0])[1]
        for arm, tried in scores.items()
        if tried and len(tried) == len(found.trials(arm.variant))
    }


def _score(runs: Sequence[Measured], by: str) -> float:
    """Higher is better; a run that has diverged, or lacks the metric, is worse than all others."""
    sign = -1.0 if METRICS[by].better == "less" else 1.0
    values = [run.metrics.get(by) for run in runs if run.state == "done"]
    known = [sign * value for value in values if value is not None]
    return sum(known) / len(known) if len(known) == len(runs) else -1e300


class Runner:
    """Trains cells, some at a time; what is stopped or killed goes on in the next call."""

    def __init__(self, directory: Path, jobs: int) -> None:
        self.cells = directory / "cells"
        self._configs = directory / "configs"
        self.jobs = jobs
        self.stopped = False
        self.failed: dict[str, str] = {}
        self._lock = threading.Lock()
        self._children: set[subprocess.Popen[str]] = set()
        self._done = self._total = 0
        self._began = 0.0

    def left(self, cells: Sequence[Cell]) -> list[Cell]:
        """Those that are not over."""
        return _left(cells, self.cells)

    def run(self, cells: Sequence[Cell]) -> None:
        """Train cells to their ends; one that fails is noted, and the others go on."""
        self._configs.mkdir(exist_ok=True)
        with storing(self._configs):
            for cell in cells:
                write_atomic(self._config(cell), dump_config(cell.config).encode())
        self._done, self._total, self._began = 0, len(cells), time.monotonic()
        solo = deque(cell for cell in cells if alone(cell.config))
        launched = [cell for cell in cells if not alone(cell.config)]
        self._beside(self.jobs, solo, self._worker)
        for ranks in sorted({cell.config.ranks.ceiling for cell in launched}):
            same = deque(cell for cell in launched if cell.config.ranks.ceiling == ranks)
            self._beside(max(1, self.jobs // ranks), same, self._launcher)

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Ctrl-C and SIGTERM stop all runs with checkpoints."""
        signals = (signal.SIGINT, signal.SIGTERM)
        before = {number: signal.signal(number, self._on_signal) for number in signals}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
            self._stop()

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if not self.stopped:
            print("harness: stopping the runs with checkpoints", file=sys.stderr, flush=True)
        self.stopped = True
        self._stop()

    def _stop(self) -> None:
        for child in list(self._children):
            with suppress(ProcessLookupError):
                child.send_signal(signal.SIGTERM)

    def _beside(self, count: int, cells: deque[Cell], work: Any) -> None:
        """Work on the cells in several threads, each with a process of its own."""
        threads = [
            threading.Thread(target=work, args=(cells,), daemon=True)
            for _ in range(min(count, len(cells)))
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            while thread.is_alive():  # in pieces, so that signals are handled
                thread.join(0.2)

    def _next(self, cells: deque[Cell]) -> Cell | None:
        with self._lock:
            return cells.popleft() if cells and not self.stopped else None

    def _config(self, cell: Cell) -> Path:
        return (self._configs / f"{cell.digest}.yaml").resolve()

    def _worker(self, cells: deque[Cell]) -> None:
        """A process that trains one cell after another; a new one where it has died."""
        child: subprocess.Popen[str] | None = None
        while (cell := self._next(cells)) is not None:
            if child is not None and child.poll() is not None:
                self._dismiss(child)
                child = None
            if child is None:
                child = self._start([sys.executable, "-m", "harness.cells"], piped=True)
            run = cell.directory(self.cells).path.resolve()
            answer = _ask(child, {"config": str(self._config(cell)), "run_dir": str(run)})
            if answer is None:
                child.wait()
                answer = {
                    "code": child.returncode,
                    "said": f"its process ended: {_ending(child.returncode)}",
                }
            self._ended(cell, answer)
        if child is not None:
            self._dismiss(child)

    def _dismiss(self, child: subprocess.Popen[str]) -> None:
        """Let a worker end, which it does when there is nothing more to read."""
        for pipe in (child.stdin, child.stdout):
            with suppress(OSError):
                if pipe is not None:
                    pipe.close()
        child.wait()
        self._children.discard(child)

    def _launcher(self, cells: deque[Cell]) -> None:
        """``harness run`` for each cell."""
        while (cell := self._next(cells)) is not None:
            run = cell.directory(self.cells).path.resolve()
            words = ["run", str(self._config(cell)), "--run-dir", str(run), "--go-on"]
            child = self._start([sys.executable, "-m", "harness", *words], piped=False)
            text, _ = child.communicate()
            said = [one for one in (text or "").splitlines() if one.startswith("harness: ")]
            self._children.discard(child)
            self._ended(
                cell,
                {
                    "code": child.returncode,
                    "said": said[-1].removeprefix("harness: ") if said else "",
                },
            )

    def _start(self, command: list[str], piped: bool) -> subprocess.Popen[str]:
        threads = {} if os.environ.get("OMP_NUM_THREADS") else {"OMP_NUM_THREADS": "1"}
        child = subprocess.Popen(
            [sys.executable, "-I", _TIED, str(os.getpid()), *command],
            env={**os.environ, **threads},
            stdin=subprocess.PIPE if piped else subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=None if piped else subprocess.STDOUT,
            text=True,
            errors="replace",
            start_new_session=True,  # Ctrl-C reaches us alone
        )
        self._children.add(child)
        if self.stopped:  # between the last look and now
            child.send_signal(signal.SIGTERM)
        return child

    def _ended(self, cell: Cell, answer: Mapping[str, Any]) -> None:
        run = cell.directory(self.cells)
        now = state(run)
        with self._lock:
            self._done += 1
            if now in ("done", "diverged"):
                self.failed.pop(cell.name, None)
                self._forget_checkpoints(run)
            elif self.stopped:
                return
            else:
                self.failed[cell.name] = one_line(str(answer.get("said") or "no word"), 300)
            self._tell(cell, run, now)

    def _forget_checkpoints(self, run: RunDirectory) -> None:
        """Nobody goes on with a run that is over."""
        shutil.rmtree(run.newest().checkpoints, ignore_errors=True)
        for name in (run.checkpoints, run.path / "tensorboard"):
            if name.is_symlink():
                name.unlink(missing_ok=True)

    def _tell(self, cell: Cell, run: RunDirectory, now: str) -> None:
        seconds = time.monotonic() - self._began
        rest = seconds / self._done * (self._total - self._done)
        told = f"failed: {self.failed[cell.name]}" if cell.name in self.failed else now
        result = measure(run, None)
        accuracy = result.metrics.get("accuracy")
        words = "" if accuracy is None else f", accuracy {accuracy:.2%}"
        trial = "" if cell.trial is None else f", {trial_text(cell.trial)}"
        trial += " (trial)" * cell.tuning
        print(
            f"[{self._done}/{self._total}] {cell.arm}{trial}, seed {cell.seed}: {told}{words}; "
            f"about {duration(rest)} to go",
            flush=True,
        )


def _ending(code: int) -> str:
    """Of a process, in words."""
    if code >= 0:
        return f"exit code {code}"
    return signal_name(-code) or f"signal {-code}"


def _ask(child: subprocess.Popen[str], request: dict[str, str]) -> dict[str, Any] | None:
    """The answer of a worker; None if it has died."""
    assert child.stdin is not None  # noqa: S101 - they are pipes, for the type checker
    assert child.stdout is not None  # noqa: S101
    try:
        child.stdin.write(json.dumps(request) + "\n")
        child.stdin.flush()
        answer = json.loads(child.stdout.readline())
    except (OSError, ValueError):
        return None
    return answer if isinstance(answer, dict) else None


def _gather(found: Study, directory: Path, out: Path | None) -> int:
    """Write what there is, and print the findings; 1 if runs are missing."""
    results = collect(found, directory / "cells")
    if not results.runs:
        print(f"harness: {found.name}: no run is over yet")
        return 1
    paths = write(results, out or directory)
    if out is not None:
        write_index(out)
    for number, one in enumerate(results.judge().all(), start=1):
        print(f"{number}. {one.rule}: {one.verdict}")
        for line in one.lines:
            print(f"   {line.what + ': ' if line.what else ''}{line.text}")
    for path in paths:
        print(f"harness: {path} is written")
    return 0 if results.complete else 1


def collect(found: Study, cells: Path) -> Results:
    """The results of all cells that are over."""
    chosen = chosen_values(found, cells)
    results = Results(found, chosen)
    for cell in found.trial_cells():
        run = measure(cell.directory(cells), found.target, cell.trial)
        if run.over:
            results.trials.append((cell, run))
    known: dict[str, Measured] = {}
    for arm in found.arms:
        if found.trials(arm.variant) and found.tuned_at(arm) not in chosen:
            continue
        for seed in found.seeds:
            value = chosen.get(found.tuned_at(arm))
            cell = found.cell(arm, seed, value)
            if cell.digest not in known:
                known[cell.digest] = measure(cell.directory(cells), found.target, value)
            if known[cell.digest].over:
                results.runs[(arm, seed)] = known[cell.digest]
                results.machine = results.machine or _machine(cell.directory(cells))
    return results


def _machine(run: RunDirectory) -> str:
    """The processor and the versions that a run was made with."""
    told = read_object(run.newest().provenance) or {}
    name, torch = pick(told, "hardware", "processor"), pick(told, "versions", "torch")
    return f"{name or platform.machine()}" + (f", PyTorch {torch}" if torch else "")


def _print_plan(found: Study, cells: Path, jobs: int) -> None:
    """The cells, and about how long they take."""
    trials = found.trial_cells()
    first = chosen_values(found, cells) or {
        found.tuned_at(arm): found.trials(arm.variant)[0]
        for arm in found.arms
        if found.trials(arm.variant)
    }
    finals = found.final_cells(first)
    seconds = left = 0.0
    for cell in (*trials, *finals):
        now = state(cell.directory(cells))
        try:
            totals = build_plan(cell.config, train_size(cell.config.data)).as_dict()["totals"]
        except ConfigError as error:
            raise ConfigError(f"{found.path}: {cell.arm}: {error}") from None
        guess = _PER_CELL + _PER_UPDATE * totals["updates"] + _PER_SAMPLE * totals["samples"]
        seconds += guess
        left += 0.0 if now in ("done", "diverged") else guess
        kind = "trial" if cell.tuning else "run"
        value = "" if cell.trial is None or not cell.tuning else f", {trial_text(cell.trial)}"
        print(
            f"{kind}  {cell.arm}{value}, seed {cell.seed}: {totals['updates']:,} updates, "
            f"{totals['samples']:,} samples; {now}"
        )
    print(
        f"{counted(len(finals), 'run')} and {counted(len(trials), 'trial')}, {jobs} at a time: "
        f"about {duration(seconds / jobs)} with LeNet-5 on today's cores, a guess; "
        f"{duration(left / jobs)} are left"
    )
