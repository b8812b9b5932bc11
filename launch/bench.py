"""Measures throughput over numbers of ranks: a short launch for each repeat of each point."""

from __future__ import annotations

import math
import os
import shutil
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any, Literal

from rich.console import Console

from harness import environment
from harness.benchfile import (
    NAME,
    Bench,
    Failure,
    Repeat,
    holds_bench,
    read_bench,
    write_bench,
)
from harness.benchruns import (
    append_windows,
    bytes_per_update,
    keep_windows,
    measured,
    read_windows,
)
from harness.benchseries import Series, Shape, Wanted, overrides, series, shuffled
from harness.benchstats import point_of
from harness.benchtable import print_bench
from harness.config import dump_config, load_config
from harness.data_sizes import check_root, train_size
from harness.errors import (
    ConfigError,
    HarnessError,
    LaunchError,
    RunDirectoryError,
    StoppedEarly,
    UsageError,
)
from harness.files import make_directory, read_text, write_atomic
from harness.jsonl import read_object
from harness.progress import Status
from harness.rundir import RunDirectory
from harness.runlock import RunLock
from harness.schedule.plan import build_plan
from harness.schema import Config
from harness.wording import counted, plain_name
from launch.assemble import Job, Launcher, build_spec, choose_launcher, command_line, find_hosts
from launch.execute import Stopper, execute
from launch.hosts import check_slots, fill
from launch.outcome import Outcome, judge
from launch.preflight import Needs, check_reachable, mpi_daemon
from launch.spec import Host

_LONGEST = 86400.0
_MOST_REPEATS = 1000
_MACHINE = "machine.json"
_OVERHEAD = 5.0  # seconds that a launch takes besides what is measured, for the announcement


@dataclass(frozen=True)
class BenchRequest:
    """What ``harness bench`` was asked for."""

    config_path: Path
    ranks: tuple[int, ...]
    overrides: tuple[str, ...] = ()
    mode: Literal["weak", "strong"] | None = None
    repeats: int = 3
    micros: tuple[int, ...] = ()
    accumulations: tuple[int, ...] = ()
    batches: tuple[int, ...] = ()
    seconds: float = 5.0
    """Of steady updates in each repeat."""
    peak: float | None = None
    """FLOP/s of a rank's processor, if known."""
    hosts: str | None = None
    hostfile: Path | None = None
    launcher: Launcher | None = None
    out: Path | None = None
    dry_run: bool = False


def bench(request: BenchRequest) -> int:
    """Measure what is not measured yet, and print the tables; returns the exit code: 1 if a repeat
    has failed.

    Everything that can be refused is refused before anything is created. Raises UsageError for
    that, StoppedEarly if it was stopped on request: what was measured until then is kept.
    """
    task = _prepare(request)
    if request.dry_run:
        _print_plan(task)
        return 0
    directory = request.out or _fresh(task.config)
    _earlier(task, directory)  # refuses what is no bench, or another one
    created = make_directory(directory, "directory (-o)")
    with RunLock(RunDirectory(directory), "launch.lock", needed=True):
        # What there is now: another process may have gone on with it until a moment ago.
        earlier = _earlier(task, directory) if holds_bench(directory) else None
        try:
            _check_reachable(task, directory)
            runner = Runner(task, directory, earlier)
            with runner.stopper:
                runner.run()
        except UsageError:
            if created and earlier is None:
                shutil.rmtree(directory, ignore_errors=True)
            raise
    done = runner.bench
    print_bench(done)
    print(f"harness: {directory / NAME} is written")
    if runner.stopper.asked and done.status == "partial":
        raise StoppedEarly(f"stopped on request; the same command with -o {directory} goes on")
    return 1 if done.failures else 0


@dataclass(frozen=True)
class Task:
    """A request that has been checked."""

    request: BenchRequest
    config: Config
    series: Series
    hosts: tuple[Host, ...]
    launcher: Launcher
    threads: int
    """Of each rank, on all numbers of ranks."""
    configs: dict[Shape, Config]

    @property
    def pairs(self) -> list[tuple[str, int]]:
        names = [shape.name for shape in self.series.shapes]
        return [(name, repeat) for name in names for repeat in range(self.request.repeats)]

    @property
    def settings(self) -> dict[str, Any]:
        """How it is measured: what may not change between two attempts."""
        return {
            "launcher": self.launcher,
            "hosts": ",".join(map(str, self.hosts)),
            "threads": self.threads,
            "seconds": self.request.seconds,
            "scaling": self.series.scaling,
        }

    def placed(self, ranks: int) -> tuple[Host, ...]:
        return fill(ranks, self.hosts)


def _prepare(request: BenchRequest) -> Task:
    """Raise UsageError for whatever cannot be measured as asked."""
    _check(request)
    most = max(request.ranks)
    config = load_config(request.config_path, request.overrides)
    wanted = Wanted(
        request.ranks, request.mode, request.micros, request.accumulations, request.batches
    )
    found = series(config, wanted)
    hosts = find_hosts(request.hosts, request.hostfile)
    check_slots(most, hosts)
    check_root(config.data)
    size = train_size(config.data)
    threads = _threads(config, fill(most, hosts))
    configs = {}
    for shape in found.shapes:
        laid_over = (*request.overrides, *overrides(shape, threads))
        configs[shape] = load_config(request.config_path, laid_over)
        build_plan(configs[shape], size)
    launchers = {choose_launcher(request.launcher, one, hosts) for one in configs.values()}
    if most > 1 and config.comm.backend == "solo":
        raise ConfigError(f"comm.backend = solo is one process, but --ranks asks for {most}")
    return Task(request, config, found, hosts, launchers.pop(), threads, configs)


def _check(request: BenchRequest) -> None:
    if not 1 <= request.repeats <= _MOST_REPEATS:
        raise LaunchError(f"--repeats {request.repeats}: must be from 1 to {_MOST_REPEATS}")
    if not (math.isfinite(request.seconds) and 0 < request.seconds <= _LONGEST):
        raise LaunchError(f"--seconds {request.seconds:g}: must be above 0, up to {_LONGEST:g}")
    if request.peak is not None and not (math.isfinite(request.peak) and 0 < request.peak <= 1e30):
        raise LaunchError(f"--peak {request.peak:g}: must be FLOP/s of a rank, as 312e12")


def _threads(config: Config, placed: Sequence[Host]) -> int:
    """What each rank has where there are the most of them: a rank that is alone would else compute
    with all cores, and be compared with ranks that have some."""
    share = environment.usable_cores() // max(host.slots for host in placed)
    given = os.environ.get("OMP_NUM_THREADS", "")
    return config.ranks.threads or (int(given) if given.isdigit() else 0) or max(1, share)


def _fresh(config: Config) -> Path:
    return Path("runs") / f"bench-{plain_name(config.name)}-{datetime.now():%Y%m%d-%H%M%S}"


def _earlier(task: Task, directory: Path) -> Bench | None:
    """What an earlier attempt has left; raises RunDirectoryError if it was another bench."""
    if not holds_bench(directory):
        if directory.exists() and (not directory.is_dir() or any(directory.iterdir())):
            raise RunDirectoryError(
                f"{directory} holds no bench to go on with, and is not empty; choose another -o"
            )
        return None
    earlier, config = read_bench(directory), directory / "config.yaml"
    if _text(config) != dump_config(task.config):
        raise RunDirectoryError(
            f"{directory} holds a bench of another configuration ({config}); choose another -o"
        )
    now_asked = {"mode": task.series.mode, **task.settings}
    before = {"mode": earlier.mode, **earlier.settings}
    changed = [
        f"{key}: {before.get(key)} → {value}"
        for key, value in now_asked.items()
        if before.get(key) != value
    ]
    if changed:
        raise RunDirectoryError(
            f"{directory} holds a bench that is measured otherwise ({'; '.join(changed)}); "
            "choose another -o"
        )
    return earlier


def _text(path: Path) -> str | None:
    """What a file says; None if it is none, or no text."""
    try:
        return read_text(path)
    except (OSError, ValueError):
        return None


def _check_reachable(task: Task, directory: Path) -> None:
    python = task.config.launch.python or sys.executable
    needs = Needs(python, directory.resolve(), mpi_daemon(task.config.comm.controller), "-o")
    names = [host.name for host in task.placed(max(task.request.ranks))]
    check_reachable(task.launcher, names, needs, task.config.launch.connect_timeout)


def _print_plan(task: Task) -> None:
    for shape in task.series.shapes:
        print(f"# {shape}")
        job = Job(
            config=task.configs[shape],
            config_path=task.request.config_path,
            overrides=(*task.request.overrides, *overrides(shape, task.threads)),
            directory=RunDirectory((task.request.out or _fresh(task.config)) / shape.name),
            launcher=task.launcher,
            hosts=task.hosts,
            grow=0,
            measure=task.request.seconds,
        )
        spec, argv = command_line(job, build_spec(job, task.hosts, shape.ranks, resume=False))
        print(spec.as_shell_command(argv))
    print(f"# {_size(task, len(task.pairs))}")


def _size(task: Task, launches: int) -> str:
    minutes = launches * (task.request.seconds + _OVERHEAD) / 60
    word = "launch" if launches == 1 else "launches"
    return f"{launches} {word}, about {counted(max(1, round(minutes)), 'minute')} or more"


@dataclass
class Results:
    """What has been measured so far."""

    repeats: dict[str, dict[int, Repeat]] = field(default_factory=dict)
    failures: dict[tuple[str, int], str] = field(default_factory=dict)
    machine: dict[str, Any] = field(default_factory=dict)
    """The provenance of the launch with the most ranks."""
    bytes: int | None = None
    ranks: int = 0
    """Of that launch."""

    @property
    def finished(self) -> set[tuple[str, int]]:
        return {(name, number) for name, found in self.repeats.items() for number in found}


class Runner:
    """Goes through the repeats in their order, and writes down each one when it is measured."""

    def __init__(self, task: Task, directory: Path, earlier: Bench | None) -> None:
        self._task, self._directory = task, directory
        self.stopper = Stopper(self.stop, "after this update")
        self._shapes = {shape.name: shape for shape in task.series.shapes}
        self._results = _results(earlier)
        self._others = [p for p in earlier.points if p.name not in self._shapes] if earlier else []
        self._current: RunDirectory | None = None
        self._display = _Display()
        order = earlier.order if earlier else ()
        self._seed = earlier.seed if earlier else task.config.seed
        fresh = [pair for pair in task.pairs if pair not in order]
        self._order = (*order, *shuffled(fresh, self._seed))

    def stop(self) -> None:
        """Ask the ranks that run to stop."""
        if self._current is not None:
            self._current.stop_relay.touch()

    def run(self) -> None:
        """Measure until all is measured, has failed, or a stop is asked for."""
        task = self._task
        write_atomic(self._directory / "config.yaml", dump_config(task.config).encode())
        keep_windows(self._directory, self._results.finished)
        pairs = [
            pair
            for pair in self._order
            if pair[0] in self._shapes and pair not in self._results.finished
        ]
        self._write()
        if pairs:
            print(f"harness: {_size(task, len(pairs))}; bench directory {self._directory}")
            self._measure_machine()
        for index, (name, repeat) in enumerate(pairs, start=1):
            if self.stopper.asked:
                break
            said = self._measure(self._shapes[name], repeat)
            if said is not None:
                self._write()
                number = f"[{index:{len(str(len(pairs)))}}/{len(pairs)}]"
                shape = self._shapes[name]
                print(f"{number} {shape}, repeat {repeat}: {said}", flush=True)

    @property
    def bench(self) -> Bench:
        """What bench.json is to hold now."""
        config, results, task = self._task.config, self._results, self._task
        machine = self._machine()
        peak, source = machine.get("peak_flops_per_rank"), machine.get("peak_source")
        if task.request.peak is not None:
            peak, source = task.request.peak, "given (--peak)"
        flops = machine.get("flops_per_image")
        points = [
            point_of(
                shape.ranks,
                len(task.placed(shape.ranks)),
                shape.micro_batch,
                shape.accumulation,
                shape.global_batch,
                list(results.repeats[shape.name].values()),
                flops,
                peak,
            )
            for shape in task.series.shapes
            if results.repeats.get(shape.name)
        ]
        points = sorted([*points, *self._others], key=lambda p: (p.ranks, p.global_batch, p.name))
        left = set(self._order) - results.finished
        communication = results.machine.get("communication", {})
        return Bench(
            name=config.name,
            mode=task.series.mode,
            dataset=config.data.dataset,
            model=config.model.name,
            parameters=machine.get("parameters"),
            gradient_bytes=results.bytes,
            compression="autotune" if config.comm.autotune else config.comm.compression,
            engine=communication.get("kind", config.comm.backend),
            flops_per_image=flops,
            peak_flops_per_rank=peak,
            peak_source=source,
            machine=results.machine,
            status="partial" if left else "complete",
            points=tuple(points),
            failures=tuple(Failure(*pair, why) for pair, why in sorted(results.failures.items())),
            seed=self._seed,
            order=self._order,
            settings={**task.settings, "series": task.series.names()},
        )

    def _write(self) -> None:
        write_bench(self._directory, self.bench)

    def _machine(self) -> dict[str, Any]:
        return read_object(self._directory / _MACHINE) or {}

    def _measure_machine(self) -> None:
        """Count the model's FLOPs and measure the peak, on the most ranks."""
        if self._machine():
            return
        shape = max(self._task.series.shapes, key=lambda one: one.ranks)
        directory = RunDirectory(self._directory.resolve() / "machine")
        shutil.rmtree(directory.path, ignore_errors=True)
        words = (
            "-m",
            "harness.benchmachine",
            str(directory.config),
            str(self._directory.resolve()),
        )
        outcome = self._launch(shape, directory, words)
        if outcome.kind == "refused":  # so would be all others
            raise UsageError(outcome.message)
        if self._machine():
            problem = self._machine().get("flops_problem")
        elif self.stopper.asked:
            return
        else:
            problem = outcome.message or "the ranks ended without a word"
        if problem:
            print(f"harness: warning: no utilisation is shown: {problem}", file=sys.stderr)

    def _measure(self, shape: Shape, number: int) -> str | None:
        """Measure one repeat; what to say of it, None if it was stopped in the middle."""
        path = self._directory.resolve() / "points" / shape.name / f"repeat-{number}"
        shutil.rmtree(path, ignore_errors=True)  # half of one, or one that has failed
        directory, pair = RunDirectory(path), (shape.name, number)
        self._results.failures.pop(pair, None)
        outcome = self._launch(shape, directory)
        if self.stopper.asked:
            shutil.rmtree(path, ignore_errors=True)
            return None
        try:
            if outcome.kind != "stopped":
                raise HarnessError(outcome.message or "the run ended before it was measured")
            return self._book(shape, number, directory)
        except HarnessError as error:
            self._results.failures[pair] = str(error)
            return f"failed: {error}"

    def _book(self, shape: Shape, number: int, directory: RunDirectory) -> str:
        windows = read_windows(directory)
        repeat, warmup = measured(number, windows)
        # Nobody goes on with this run.
        shutil.rmtree(directory.newest().checkpoints, ignore_errors=True)
        if directory.checkpoints.is_symlink():
            directory.checkpoints.unlink()
        if shape.ranks >= self._results.ranks:
            self._results.ranks = shape.ranks
            self._results.bytes = bytes_per_update(windows)
            self._results.machine = _machine_of(read_object(directory.provenance) or {})
        append_windows(self._directory, shape.name, number, windows, warmup.windows)
        self._results.repeats.setdefault(shape.name, {})[number] = repeat
        unsettled = "" if warmup.settled else ", not settled"
        return (
            f"{repeat.images_per_sec:,.4g} images/s ({counted(repeat.windows, 'update')}, "
            f"{repeat.warmup_windows} of them warm-up{unsettled})"
        )

    def _launch(
        self, shape: Shape, directory: RunDirectory, words: tuple[str, ...] = ()
    ) -> Outcome:
        """One launch on the ranks of a point: a run, or what ``words`` say."""
        task = self._task
        directory.failures.mkdir(parents=True)
        config = directory.path / "config.yaml" if words else directory.path.parent / "config.yaml"
        write_atomic(config, dump_config(task.configs[shape]).encode())
        job = Job(
            config=task.configs[shape],
            config_path=config,
            overrides=(),
            directory=directory,
            launcher=task.launcher,
            hosts=task.hosts,
            grow=0,
            measure=task.request.seconds,
            words=words,
        )
        spec, argv = command_line(job, build_spec(job, task.hosts, shape.ranks, resume=False))
        patience = None if words else task.configs[shape].launch.hang_seconds
        self._current = directory
        if self.stopper.asked:  # between the last look and now
            self.stop()
        try:
            ended = execute(
                argv, spec, task.launcher, directory, self._display, self.stopper, patience
            )
        finally:
            self._current = None
            self._display.clear()
        return judge(ended, spec, directory)


def _results(earlier: Bench | None) -> Results:
    if earlier is None:
        return Results()
    return Results(
        repeats={p.name: {one.repeat: one for one in p.repeats} for p in earlier.points},
        machine=dict(earlier.machine),
        bytes=earlier.gradient_bytes,
        ranks=max((point.ranks for point in earlier.points), default=0),
    )


def _machine_of(provenance: dict[str, Any]) -> dict[str, Any]:
    """Without what belongs to a single launch."""
    return {k: v for k, v in provenance.items() if k not in ("started", "command", "attempts")}


class _Display:
    """Shows the latest status on a terminal, and each thing that the ranks say once."""

    def __init__(self) -> None:
        self._console = Console()
        self._live = self._console.status("") if self._console.is_terminal else None
        self._said: set[str] = set()

    def show(self, status: Status) -> None:
        if self._live is not None:
            self._live.start()
            batch = f"{status.ranks} × {status.accumulation} × {status.micro_batch}"
            self._live.update(f"{batch}: {status.images_per_sec:,.0f} images/s")

    def say(self, text: str) -> None:
        if text.startswith("harness: ") and text not in self._said:
            self._said.add(text)
            # Not print: it would write into the line that is redrawn.
            self._console.print(text, markup=False, highlight=False, soft_wrap=True)

    def clear(self) -> None:
        """Between two launches."""
        if self._live is not None:
            self._live.stop()

    def close(self) -> None:
        self.clear()
