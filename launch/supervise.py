"""Runs a configuration on the ranks it asks for, launch by launch, and reports how it ended."""

from __future__ import annotations

import os
import shlex
import shutil
import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, replace
from datetime import datetime
from pathlib import Path
from typing import Any

from harness import environment
from harness.attempts import (
    check_format,
    holder,
    is_ours,
    newest_launch,
    open_launch,
    retire_launches,
    show_launch,
)
from harness.config import dump_config, load_config
from harness.data_sizes import check_root, train_size
from harness.errors import (
    ConfigError,
    HarnessError,
    LaunchError,
    RankFailure,
    RunDirectoryError,
    StoppedEarly,
    StorageError,
    Superseded,
    UsageError,
)
from harness.files import make_directory, storage_error, storing, write_atomic
from harness.jsonl import JsonlWriter, now
from harness.progress import local_display
from harness.records import furthest
from harness.resume import check_same_run, has_finished, ranks_of_late, ranks_wanted
from harness.rundir import RunDirectory, newest_number, numbered
from harness.runlock import RunLock
from harness.schedule.plan import build_plan
from harness.schema import Config, GoodputGrowth
from harness.speedfit import settled_growth
from harness.wording import counted, plain_name
from launch import detect, elastic
from launch.assemble import Job, Launcher, build_spec, choose_launcher, command_line, find_hosts
from launch.execute import Stopper, execute
from launch.hosts import check_slots
from launch.outcome import Outcome, judge
from launch.preflight import Needs, check_hosts, mpi_daemon, over_ssh, told
from launch.restarts import Again, Restarts
from launch.spec import Host, LaunchSpec

_DYING = 10.0  # seconds that ranks of a launch that was killed a moment ago may take to die
_STOPPING = 120.0  # seconds that an earlier attempt may take to stop with a checkpoint
_LINGERING = 30.0  # seconds that ranks may take to end after their launcher


@dataclass(frozen=True)
class RunRequest:
    """What ``harness run`` was asked for."""

    config_path: Path
    overrides: tuple[str, ...] = ()
    ranks: int | None = None
    hosts: str | None = None
    hostfile: Path | None = None
    launcher: Launcher | None = None
    run_dir: Path | None = None
    resume: bool = False
    go_on: bool = False
    """Resume if the run directory holds a run, else start one."""
    max_restarts: int | None = None
    dry_run: bool = False


def run(request: RunRequest) -> int:
    """Start the ranks, show their progress, write the report; returns the exit code.

    Everything that can be refused is refused before anything is created. Raises the errors of
    ``harness.errors``; StoppedEarly if the run stopped on request.
    """
    if request.go_on:
        request = replace(request, resume=_holds_run(request))
    if request.ranks is not None:
        request = _with_ranks(request, request.ranks)
    config = load_config(request.config_path, request.overrides)
    hosts = find_hosts(request.hosts, request.hostfile)
    launcher = choose_launcher(request.launcher, config, hosts)
    check_root(config.data)
    directory = RunDirectory(_run_directory(request, config))
    config = settled_growth(config, directory if request.resume else None)
    build_plan(config, train_size(config.data))  # refuses what it can
    directory.check_usable(request.resume)
    _check_alone(directory, _DYING if request.resume else 0.0)
    if request.resume:
        check_format(directory)
        check_same_run(config, directory)
        if has_finished(directory):
            print(f"harness: the run in {directory.path} has finished already")
            return 0 if request.dry_run else _report(directory)
    ranks = _first_ranks(request, config, hosts, directory)
    restarts = _restarts(request, config)
    _warn(config)
    job = Job(
        config=config,
        config_path=request.config_path,
        overrides=request.overrides,
        directory=directory,
        launcher=launcher,
        hosts=hosts,
        grow=0 if request.ranks is not None else config.ranks.ceiling,
    )
    spec = build_spec(job, hosts, ranks, request.resume)
    if request.dry_run:
        spec, argv = command_line(job, spec)
        print(spec.as_shell_command(argv))
        return 0
    with _held(directory, request.resume) as directory:
        job = replace(job, directory=directory)
        with Stopper(directory.stop_relay.touch) as stopper:
            Supervisor(job, restarts, stopper, _again_words(request)).run(ranks, request.resume)
    return _report(directory)


@contextmanager
def _held(directory: RunDirectory, resume: bool) -> Iterator[RunDirectory]:
    """The directory, made if need be, as long as this launching process has it for itself, with a
    folder of its own.

    If no run has begun when it is let go of, it is as it was before.
    """
    created = make_directory(directory.path, "--run-dir")
    lock = RunLock(directory, "launch.lock")
    with ExitStack() as held:
        try:
            lock.acquire()
        except RunDirectoryError:
            with suppress(OSError):  # unless it is in use
                if created:
                    directory.path.rmdir()
            raise
        held.callback(lock.release)
        try:
            directory.check_usable(resume)  # again, now that nobody else can start here
            with storing(directory.path):
                directory.stop_request.unlink(missing_ok=True)
                directory = open_launch(directory)
            yield directory
        except UsageError:
            if created and not directory.holds_run:
                _remove(directory)
                lock.discard()
            raise


class Supervisor:
    """Launch after launch: more ranks where the run asks for them, again after a failure."""

    def __init__(
        self, job: Job, restarts: Restarts, stopper: Stopper, words: Sequence[str] = ()
    ) -> None:
        """``words``: what a command that goes on with the run must say again."""
        self._job, self._restarts, self._stopper = job, restarts, stopper
        self._words = words
        self._directory = job.directory
        self._before = newest_number(job.directory.attempts)
        """The newest attempt when we came; later ones are of our launches, or we are superseded."""
        self._ended_at = ""
        self._hosts = job.hosts
        """Those that have not been left out."""
        self._untold: list[dict[str, Any]] = []
        """Events from before the run's directory had records."""

    def run(self, ranks: int, resume: bool) -> None:
        """Return when the run has finished.

        Raises StoppedEarly if it has stopped on request, LaunchError if it cannot be started, and
        RankFailure if it has failed and is not to be started again.
        """
        wanted = ranks
        kept = (self._directory.launch or self._directory.path) / "launch.yaml"
        with storing(self._directory.path):
            write_atomic(kept, dump_config(self._job.config).encode())
        if isinstance(self._job.config.batch.growth, GoodputGrowth):
            # What it was settled with, so that no rank fits a model of its own.
            self._job = replace(self._job, config_path=kept, overrides=())
        while True:
            if self._stop_is_asked():
                raise StoppedEarly(f"stopped on request before a launch; {self._how_to_go_on()}")
            hosts = self._reachable(first=not resume)
            if self._stop_is_asked():
                continue
            ranks = min(wanted, sum(host.slots for host in hosts))
            job = replace(self._job, grow=self._growth_limit(hosts))
            spec = build_spec(job, hosts, ranks, resume)
            self._announce(spec, wanted, resume)
            before = _newest_checkpoint(self._directory)
            outcome = self._launch(spec)
            if outcome.kind == "done":
                self._record()
                return
            self._ended_at = environment.moment()
            resume = self._directory.newest().config.exists()
            # The user's file may change while the run goes on.
            self._job = replace(self._job, config_path=kept, overrides=())
            if outcome.kind == "grow":
                self._restarts.ended_well()
                wanted = self._grown()
            elif outcome.kind == "failed" and not self._stop_is_asked():
                self._again(outcome, progressed=_newest_checkpoint(self._directory) != before)
            else:
                self._raise(outcome)

    def _stop_is_asked(self) -> bool:
        """By a signal or by the file: this job's next attempt writes that, too."""
        files = (self._directory.stop_request, self._directory.stop_relay)
        return self._stopper.asked or any(file.exists() for file in files)

    def _reachable(self, first: bool) -> tuple[Host, ...]:
        """The hosts that answer. Before a run's first launch all must."""
        if not over_ssh(self._job.launcher):
            return self._hosts
        python = self._job.config.launch.python or sys.executable
        if first and shutil.which(python) is None and self._job.config.slurm.container is None:
            raise LaunchError(f"launch.python = {python}: there is no such program here")
        programs = mpi_daemon(self._job.config.comm.controller)
        needs = Needs(python, self._directory.path.resolve(), programs)
        patience = self._job.config.launch.connect_timeout
        troubles = check_hosts([host.name for host in self._hosts], needs, patience)
        left = tuple(host for host in self._hosts if host.name not in troubles)
        if troubles and (first or not left):
            raise LaunchError(told(troubles))
        for name, wrong in troubles.items() if not self._stop_is_asked() else ():
            self._tell("host_left_out", f"host {name} is left out: {wrong}", host=name)
        return left

    def _growth_limit(self, hosts: tuple[Host, ...]) -> int:
        """Inside a batch job the next job may have more slots than this one."""
        if detect.inside_slurm_job(os.environ):
            return self._job.grow
        return min(self._job.grow, sum(host.slots for host in hosts))

    def _announce(self, spec: LaunchSpec, wanted: int, resume: bool) -> None:
        where = ",".join(map(str, spec.hosts))
        words = "going on with" if resume else "starting"
        made_up = f" (accumulation makes up for {wanted - spec.ranks})" * (wanted > spec.ranks)
        print(
            f"harness: {words} {counted(spec.ranks, 'rank')} on {where}{made_up}; "
            f"run directory {self._directory.path}",
            flush=True,
        )

    def _launch(self, spec: LaunchSpec) -> Outcome:
        for old in self._directory.failures.glob("rank-*.json"):
            old.unlink(missing_ok=True)
        patience = self._job.config.launch.hang_seconds
        told = {
            environment.LAUNCHED_AT: environment.moment(),
            environment.ATTEMPTS_BEFORE: str(self._before),
            environment.ENDED_AT: self._ended_at,
        }
        variables = {**spec.environment, **told}
        spec, argv = command_line(self._job, replace(spec, environment=variables))
        if self._job.config.launch.elastic:
            folder = self._directory.elastic.resolve()
            elastic.write_discovery(folder, self._hosts, spec.ranks)
            show_launch(self._directory, self._directory.elastic)
        display = local_display()
        try:
            ended = execute(
                argv, spec, self._job.launcher, self._directory, display, self._stopper, patience
            )
        finally:
            display.close()
        if self._own() is not None or not newest_number(self._directory.attempts):
            with storing(self._directory.path):
                show_launch(self._directory, self._directory.failures)
                retire_launches(self._directory)
        return judge(ended, spec, self._directory)

    def _own(self) -> RunDirectory | None:
        """The directory with the newest attempt's records, if that is of a launch of ours; None if
        there is no attempt since. Raises Superseded if it is of somebody else's."""
        newest = self._directory.newest()
        if not is_ours(newest, self._before):
            raise Superseded(
                f"{self._directory.path}: this launch ends, as {holder(newest)} has taken the run "
                "over"
            )
        fresh = newest.place is not None and numbered(newest.place.name) > self._before
        return newest if fresh else None

    def _grown(self) -> int:
        """The ranks that the run goes on with; raises StoppedEarly if they are not to be had."""
        wanted, slots = ranks_wanted(self._directory), sum(host.slots for host in self._hosts)
        if self._stop_is_asked():
            raise StoppedEarly(f"stopped on request with a checkpoint; {self._how_to_go_on()}")
        if wanted > slots and detect.inside_slurm_job(os.environ):
            raise StoppedEarly(
                f"stopped with a checkpoint: the run wants {wanted} ranks, and this job has "
                f"{counted(slots, 'slot')}; {self._how_to_go_on()}"
            )
        return wanted

    def _again(self, outcome: Outcome, progressed: bool) -> None:
        """Prepare for another launch, or raise what ended this one."""
        self._await_ranks()
        told = {"rank": outcome.rank, "host": outcome.host, **outcome.facts}
        self._note("fault", outcome.message, **told)
        if outcome.final:
            self._raise(outcome)
        verdict = self._restarts.after(outcome.host, progressed, len(self._hosts))
        if not isinstance(verdict, Again):
            self._raise(outcome, verdict.reason)
            return
        print(f"harness: {outcome.message}", file=sys.stderr)
        if verdict.leave_out is not None:
            self._leave_out(verdict.leave_out)
        number, limit = self._restarts.used, self._restarts.limit
        self._tell(
            "restart",
            f"restart {number} of at most {limit} in {verdict.pause:g} s",
            restart=number,
            pause=verdict.pause,
        )
        if not self._stopper.pause(verdict.pause):
            raise StoppedEarly(f"stopped on request between two launches; {self._how_to_go_on()}")

    def _leave_out(self, name: str) -> None:
        self._hosts = tuple(host for host in self._hosts if host.name != name)
        self._tell(
            "host_left_out",
            f"host {name} is left out from now on: launches failed on it again and again",
            host=name,
        )

    def _raise(self, outcome: Outcome, reason: str = "") -> None:
        go_on = self._how_to_go_on()
        if outcome.kind == "refused":
            raise UsageError(outcome.message)
        if outcome.kind == "stopped":
            raise StoppedEarly(f"stopped on request with a checkpoint; {go_on}")
        head, newline, rest = outcome.message.partition("\n")
        why = f"; {reason}" if reason else ""
        if outcome.exit_code == Superseded.exit_code:
            raise Superseded(outcome.message)
        kind = StorageError if outcome.exit_code == StorageError.exit_code else RankFailure
        raise kind(f"{head}{why}; {go_on}{newline}{rest}")

    def _await_ranks(self) -> None:
        """Until rank 0 writes no more, which may outlive a launcher: srun gives up a node that
        Slurm has lost, and the job may have been queued again elsewhere, which asks us all to stop.
        One that stays is superseded by the next launch."""
        with suppress(RunDirectoryError):
            _await_lock(self._directory, "lock", _LINGERING)

    def _tell(self, kind: str, text: str, **fields: Any) -> None:
        print(f"harness: {text}", file=sys.stderr)
        self._note(kind, text, **fields)

    def _note(self, kind: str, reason: str, **fields: Any) -> None:
        """Append an event, once no rank writes any more; before this launch's ranks have begun, it
        is told when they have."""
        self._untold.append({"kind": kind, "time": now(), "reason": reason, **fields})
        self._record()

    def _record(self) -> None:
        """Append what is to be told to the records of our own ranks. Raises Superseded."""
        own = self._own()
        if own is None or not self._untold:
            return
        try:
            update, samples = furthest(own)
            events = JsonlWriter(own.events)
            try:
                events.end_line()
                for event in self._untold:
                    events.append({**event, "update": update, "samples_seen": samples})
                events.sync()
            finally:
                events.close()
        except OSError as error:  # the run's end has a reason of its own, or goes on without this
            said = storage_error(self._directory.path, error)
            print(f"harness: this is not in the records: {said}", file=sys.stderr)
        self._untold.clear()

    def _how_to_go_on(self) -> str:
        path = self._directory.path
        if not self._directory.newest().config.exists():
            return "no update was done"
        if detect.inside_slurm_job(os.environ):
            return "harness status says what comes next"
        words = ["harness", "run", str(self._directory.config), "--run-dir", str(path), "--resume"]
        words += self._words
        return f"go on with: {shlex.join(words)}"


def _check_alone(directory: RunDirectory, patience: float) -> None:
    """Raise RunDirectoryError if another launch, or ranks of one, are still there after so many
    seconds."""
    for name in ("launch.lock", "lock"):
        _await_lock(directory, name, patience)


def _await_lock(directory: RunDirectory, name: str, patience: float) -> None:
    """Raise RunDirectoryError if somebody still has a lock after so many seconds."""
    if (directory.path / name).exists():
        lock = RunLock(directory, name)
        lock.acquire(patience)
        lock.release()


def _take_over(directory: RunDirectory) -> None:
    """Wait until no other launch is there.

    A job that Slurm has queued again may find its earlier attempt alive on a node that Slurm has
    lost sight of: that is asked to stop.
    """
    try:
        _check_alone(directory, _DYING)
    except RunDirectoryError:
        if not detect.inside_slurm_job(os.environ):
            raise
        print("harness: an earlier attempt still runs; asking it to stop", flush=True)
        for run in (directory, newest_launch(directory)):  # ranks without a launch look at its own
            run.stop_relay.touch()
        _check_alone(directory, _STOPPING)


def _restarts(request: RunRequest, config: Config) -> Restarts:
    limit = config.launch.max_restarts if request.max_restarts is None else request.max_restarts
    if limit < 0:
        raise LaunchError(f"--max-restarts {limit}: must be 0 or more")
    return Restarts(limit, config.launch.restart_pause, config.launch.host_failures)


def _again_words(request: RunRequest) -> list[str]:
    """How the ranks were to be started, in the words of the command line."""
    settings = {
        "--hosts": request.hosts,
        "--hostfile": request.hostfile,
        "--launcher": request.launcher,
        "--max-restarts": request.max_restarts,
    }
    return [
        str(word) for name, value in settings.items() if value is not None for word in (name, value)
    ]


def _newest_checkpoint(directory: RunDirectory) -> str:
    folder = directory.newest().checkpoints
    return max((path.name for path in folder.glob("update-*.pt")), default="")


def _holds_run(request: RunRequest) -> bool:
    if request.resume:
        raise LaunchError("--resume and --go-on: leave one of them out")
    if request.run_dir is None:
        raise RunDirectoryError("--go-on needs --run-dir: where the run is, or is to be")
    directory = RunDirectory(request.run_dir)
    if directory.stop_request.exists():
        raise StoppedEarly(
            f"{directory.stop_request} asks this run to stay stopped; remove that file to go on"
        )
    _take_over(directory)  # which may have begun the run
    return directory.newest().config.exists()


def _with_ranks(request: RunRequest, ranks: int) -> RunRequest:
    """The same with ``--ranks`` in the configuration, so that the plan is of what will run."""
    if ranks < 1:
        raise LaunchError(f"--ranks {ranks}: at least 1 rank is needed")
    if request.resume:  # the run may have a larger batch by now than the one it began with
        return request
    settings = (f"ranks.start={ranks}", f"ranks.max={ranks}")
    return replace(request, overrides=(*request.overrides, *settings))


def _first_ranks(
    request: RunRequest, config: Config, hosts: tuple[Host, ...], directory: RunDirectory
) -> int:
    """Ranks of the first launch: as asked for, else as the run had or wanted last, else as
    configured."""
    ranks = request.ranks
    if ranks is None:
        ranks = ranks_of_late(directory) if request.resume else 0
        ranks = ranks or config.ranks.start
    if config.comm.backend == "solo" and ranks > 1:
        raise ConfigError(
            f"comm.backend = solo is one process, but {ranks} ranks are asked for; "
            "use comm.backend=horovod"
        )
    slots = sum(host.slots for host in hosts)
    if request.ranks is None and detect.inside_slurm_job(os.environ):
        # The next job may have more slots than this one: growth past them is none of its business.
        if request.resume and ranks > slots:
            raise StoppedEarly(
                f"the run wants {ranks} ranks, and this job has {counted(slots, 'slot')}"
            )
        check_slots(ranks, hosts)
    else:
        check_slots(ranks if request.ranks else max(ranks, config.ranks.ceiling), hosts)
    return ranks


def _warn(config: Config) -> None:
    horovods_gloo = config.comm.backend == "horovod" and config.comm.controller == "gloo"
    if horovods_gloo and config.comm.compression != "none":
        print(
            "harness: warning: fp16 over Horovod's Gloo is slower than no compression (its half "
            "arithmetic is done in software); use comm.controller=mpi or comm.compression=none",
            file=sys.stderr,
        )


def _run_directory(request: RunRequest, config: Config) -> Path:
    if request.run_dir is not None:
        return request.run_dir
    if request.resume:
        raise RunDirectoryError("--resume needs --run-dir: the run to go on with")
    return Path("runs") / f"{plain_name(config.name)}-{datetime.now():%Y%m%d-%H%M%S}"


def _remove(directory: RunDirectory) -> None:
    """Remove what a launch without a run has made; what is not ours stays."""
    if directory.launch is not None:
        shutil.rmtree(directory.launch, ignore_errors=True)
    for name in (directory.path / "failures", directory.path / "elastic"):
        with suppress(OSError):
            if name.is_symlink() and not name.exists():
                name.unlink()
    for file in (directory.launch_log, directory.path / "lock"):
        with suppress(OSError):
            file.unlink(missing_ok=True)
    for folder in (directory.launches, directory.attempts):
        with suppress(OSError):
            folder.rmdir()


def _report(directory: RunDirectory) -> int:
    from harness.report import build_report

    try:
        page = build_report([directory.path])
    except UsageError as error:  # too late for that: the run has been done
        raise HarnessError(f"the run has finished, but not its report: {error}") from None
    print(f"harness: done; report: {page}")
    return 0
