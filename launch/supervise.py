"""Runs a configuration on the ranks it asks for, launch by launch, and reports how it ended."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import signal
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from datetime import datetime
from pathlib import Path
from typing import Literal

from harness import environment
from harness.config import load_config
from harness.data_sizes import check_root, train_size
from harness.errors import (
    ConfigError,
    LaunchError,
    RankFailure,
    RunDirectoryError,
    StoppedEarly,
    UsageError,
)
from harness.progress import local_display
from harness.records import RunDirectory, RunLock, check_unlocked
from harness.resume import check_same_run, has_finished, ranks_of_late, ranks_wanted
from harness.schedule.plan import build_plan
from harness.schema import Config
from launch import horovodrun, mpirun
from launch.execute import Ended, execute
from launch.hosts import check_slots, fill, parse_hosts, this_host
from launch.spec import Death, Host, LaunchSpec

ARGUMENTS: dict[str, Callable[[LaunchSpec], list[str]]] = {
    "horovodrun": horovodrun.arguments,
    "mpirun": mpirun.arguments,
}


@dataclass(frozen=True)
class RunRequest:
    """What ``harness run`` was asked for."""

    config_path: Path
    overrides: tuple[str, ...] = ()
    ranks: int | None = None
    hosts: str | None = None
    launcher: Literal["horovodrun", "mpirun"] = "horovodrun"
    run_dir: Path | None = None
    resume: bool = False
    dry_run: bool = False


def run(request: RunRequest) -> int:
    """Start the ranks, show their progress, write the report; returns the exit code.

    Everything that can be refused is refused before anything is created. Raises the errors of
    ``harness.errors``; StoppedEarly if the run stopped on request.
    """
    if request.ranks is not None:
        request = _with_ranks(request, request.ranks)
    config = load_config(request.config_path, request.overrides)
    hosts = parse_hosts(request.hosts) if request.hosts else this_host()
    check_root(config.data)
    build_plan(config, train_size(config.data))  # refuses what it can
    directory = RunDirectory(_run_directory(request, config))
    directory.check_usable(request.resume)
    # The ranks of a launch that was killed a moment ago need some seconds to die.
    check_unlocked(directory, patience=10.0 if request.resume else 0.0)
    if request.resume:
        check_same_run(config, directory)
        if has_finished(directory):
            print(f"harness: the run in {directory.path} has finished already")
            return _report(directory)
    ranks = _first_ranks(request, config, hosts, directory)
    spec = _spec(request, config, hosts, ranks, directory)
    if request.dry_run:
        argv = ARGUMENTS[request.launcher](spec)
        settings = [f"{name}={value}" for name, value in sorted(spec.environment.items())]
        print(shlex.join(["env", *settings, *argv]))
        return 0
    created = _create(directory)
    with RunLock(directory, "launch.lock"):
        directory.check_usable(request.resume)  # again, now that nobody else can start here
        return _run_segments(request, config, hosts, spec, directory, created)


def _run_segments(
    request: RunRequest,
    config: Config,
    hosts: tuple[Host, ...],
    spec: LaunchSpec,
    directory: RunDirectory,
    created: bool,
) -> int:
    """Launch after launch, as the run asks for more ranks; then the report."""
    print(
        f"harness: starting {_count(spec.ranks)} on {','.join(map(str, spec.hosts))}; "
        f"run directory {directory.path}"
    )
    directory.stop_request.unlink(missing_ok=True)
    launcher = ARGUMENTS[request.launcher]
    try:
        while _launch(spec, launcher(spec), directory) == "grow":
            if directory.stop_request.exists():
                raise StoppedEarly(
                    f"stopped on request with a checkpoint; {_how_to_go_on(directory)}"
                )
            wanted = ranks_wanted(directory)
            print(f"harness: going on with {_count(wanted)}")
            spec = _spec(replace(request, resume=True), config, hosts, wanted, directory)
    except UsageError:
        if created and not directory.holds_run:
            shutil.rmtree(directory.path, ignore_errors=True)
        raise
    return _report(directory)


def _with_ranks(request: RunRequest, ranks: int) -> RunRequest:
    """The same with ``--ranks`` in the configuration, so that the plan is of what will run."""
    if ranks < 1:
        raise LaunchError(f"--ranks {ranks}: at least 1 rank is needed")
    if request.resume:  # the run may have a larger batch by now than the one it began with
        return request
    settings = (f"ranks.start={ranks}", f"ranks.max={ranks}")
    return replace(request, overrides=(*request.overrides, *settings))


def _count(ranks: int) -> str:
    return f"{ranks} rank{'' if ranks == 1 else 's'}"


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
    check_slots(ranks if request.ranks else max(ranks, config.ranks.ceiling), hosts)
    horovods_gloo = config.comm.backend == "horovod" and config.comm.controller == "gloo"
    if horovods_gloo and config.comm.compression != "none":
        print(
            "harness: warning: fp16 over Horovod's Gloo is slower than no compression (its half "
            "arithmetic is done in software); use comm.controller=mpi or comm.compression=none",
            file=sys.stderr,
        )
    if config.comm.controller == "gloo" and request.launcher == "mpirun":
        raise ConfigError("comm.controller = gloo needs --launcher horovodrun")
    return ranks


def _run_directory(request: RunRequest, config: Config) -> Path:
    if request.run_dir is not None:
        return request.run_dir
    if request.resume:
        raise RunDirectoryError("--resume needs --run-dir: the run to go on with")
    name = re.sub(r"[^A-Za-z0-9._-]+", "-", config.name).strip("-.") or "run"
    stamp = datetime.now().strftime("%Y%m%d-%H%M%S")
    return Path("runs") / f"{name}-{stamp}"


def _create(directory: RunDirectory) -> bool:
    """Make the directory if it is not there yet; whether it was not."""
    created = not directory.path.exists()
    try:
        directory.failures.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise RunDirectoryError(
            f"{directory.path} cannot be created: {error.strerror}; choose another --run-dir"
        ) from None
    return created


def _spec(
    request: RunRequest,
    config: Config,
    hosts: tuple[Host, ...],
    ranks: int,
    directory: RunDirectory,
) -> LaunchSpec:
    command = [sys.executable, "-m", "harness", "train", str(request.config_path.resolve())]
    command += [*request.overrides, "--run-dir", str(directory.path.resolve())]
    if request.resume:
        command.append("--resume")
    placed = fill(ranks, hosts)
    return LaunchSpec(
        ranks=ranks,
        hosts=placed,
        command=tuple(command),
        environment=_variables(config, placed, ranks, directory, grow=request.ranks is None),
        controller=config.comm.controller,
        as_root=os.geteuid() == 0,
    )


def _variables(
    config: Config, hosts: tuple[Host, ...], ranks: int, directory: RunDirectory, grow: bool
) -> dict[str, str]:
    """Settings of the ranks. A key that the configuration sets beats the user's own variable.

    What follows from a host's cores each rank settles by itself: this machine may have others.
    """
    share = environment.usable_cores() // max(host.slots for host in hosts)
    threads = config.ranks.threads or os.environ.get("OMP_NUM_THREADS") or max(1, share)
    settings = {
        name: value for name, value in os.environ.items() if name.startswith(environment.FORWARDED)
    }
    settings |= environment.communication_settings(config.comm)
    settings["OMP_NUM_THREADS"] = str(threads)
    settings |= {
        environment.WORLD_SIZE: str(ranks),
        environment.FAILURE_DIR: str(directory.failures.resolve()),
        environment.PROGRESS: "relay",
        environment.GROW: "1" if grow else "0",
    }
    return settings


def _launch(spec: LaunchSpec, argv: list[str], directory: RunDirectory) -> Literal["done", "grow"]:
    """One launch to its end; raises StoppedEarly, RankFailure, or what a rank's last words say."""
    for old in directory.failures.glob("rank-*.json"):
        old.unlink(missing_ok=True)
    display = local_display()
    try:
        with directory.launch_log.open("a", encoding="utf-8") as log:
            log.write(f"$ {shlex.join(argv)}\n")
            ended = execute(argv, spec, display, log, directory.stop_request.touch)
    finally:
        display.close()
    if ended.exit_code == 0:
        return "done"
    _raise_words(directory)
    if StoppedEarly.exit_code in (ended.exit_code, ended.death and ended.death.exit_code):
        if ranks_wanted(directory) > spec.ranks:
            return "grow"
        raise StoppedEarly(f"stopped on request with a checkpoint; {_how_to_go_on(directory)}")
    raise RankFailure(_obituary(ended, directory))


def _raise_words(directory: RunDirectory) -> None:
    """Raise what the lowest rank that failed by itself has left behind, if any did."""
    for path in sorted(directory.failures.glob("rank-*.json")):
        try:
            note = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            continue
        if note["consequence"]:
            continue
        if note["exit_code"] == UsageError.exit_code:
            raise UsageError(note["message"])
        message = f"rank {note['rank']} on {note['host']}: {note['message']}"
        if note["traceback"]:
            trace = path.with_suffix(".txt")
            trace.write_text(note["traceback"], encoding="utf-8")
            message += f" (traceback in {trace})"
        raise RankFailure(message)


def _obituary(ended: Ended, directory: RunDirectory) -> str:
    """A message that names the rank that died, or all that is known."""
    go_on = _how_to_go_on(directory)
    if ended.death is None:
        words = "\n".join(ended.own_words.strip().splitlines()[-15:])
        return f"the launcher ended with exit code {ended.exit_code}; {go_on}\n{words}".rstrip()
    return f"{_cause(ended.death)}, and the job was ended; {go_on}"


def _how_to_go_on(directory: RunDirectory) -> str:
    words = ["harness", "run", str(directory.config), "--run-dir", str(directory.path), "--resume"]
    return f"go on with: {shlex.join(words)}"


def _cause(death: Death) -> str:
    where = f" on {death.host}" if death.host else ""
    if death.signal is not None:
        try:
            name = signal.Signals(death.signal).name
        except ValueError:
            name = "unknown"
        return f"rank {death.rank}{where} was killed by signal {death.signal} ({name})"
    return f"rank {death.rank}{where} ended with exit code {death.exit_code}"


def _report(directory: RunDirectory) -> int:
    from harness.report import build_report

    print(f"harness: done; report: {build_report([directory.path])}")
    return 0
