"""Starts the ranks that measure the collectives, and tells how that ended."""

from __future__ import annotations

import math
import shutil
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from harness import environment
from harness.errors import LaunchError, RankFailure, RunDirectoryError, StoppedEarly, UsageError
from harness.files import make_directory
from harness.launch_schema import Launch
from harness.probe_results import NAME, holds_probe
from harness.progress import PlainLines
from harness.rundir import RunDirectory
from harness.schema import Comm
from harness.wording import counted
from launch.assemble import (
    MODULES,
    Launcher,
    completed,
    find_hosts,
    inherited,
    usual_launcher,
)
from launch.execute import Stopper, execute
from launch.hosts import fill
from launch.outcome import judge
from launch.preflight import Needs, check_reachable, is_local, mpi_daemon
from launch.spec import Host, LaunchSpec

_LARGEST_MB = 4096  # MPI counts a message's elements in 32 bits
_LONGEST = 86400.0
_LARGEST_GRADIENT_MB = 1e6
_LAUNCH = Launch()


@dataclass(frozen=True)
class ProbeRequest:
    """What ``harness probe`` was asked for."""

    ranks: int | None = None
    """None: one for each slot."""
    hosts: str | None = None
    hostfile: Path | None = None
    launcher: Launcher | None = None
    max_mb: int = 64
    """MiB of the largest message."""
    seconds: float = 20.0
    """About how long to measure."""
    out: Path | None = None
    """None: nothing stays."""
    gradients_mb: tuple[float, ...] = ()
    """MiB of float32 gradients to advise on; none: some that are usual."""


def probe(request: ProbeRequest) -> int:
    """Start the ranks, which print what they have measured; returns the exit code.

    Raises UsageError if they cannot be started as asked, RankFailure if one has died, StoppedEarly
    if it was stopped on request.
    """
    _check(request)
    hosts = find_hosts(request.hosts, request.hostfile)
    ranks = sum(host.slots for host in hosts) if request.ranks is None else request.ranks
    placed = fill(ranks, hosts)
    launcher = request.launcher or usual_launcher(_LAUNCH, Comm())
    with _directory(request.out, placed) as directory:
        _check_reachable(launcher, placed, directory)
        spec = _spec(request, launcher, placed, ranks, directory)
        with Stopper(directory.stop_request.touch, "after this round") as stopper:
            _launch(spec, launcher, directory, stopper)
        _conclude(directory, request)
    if request.out is not None:
        print(f"harness: {request.out / NAME} and {request.out / 'probe.csv'} are written")
    return 0


def _check(request: ProbeRequest) -> None:
    if request.ranks is not None and request.ranks < 1:
        raise LaunchError(f"--ranks {request.ranks}: at least 1 rank is needed")
    if not 1 <= request.max_mb <= _LARGEST_MB:
        raise LaunchError(f"--max-mb {request.max_mb}: must be from 1 to {_LARGEST_MB} MiB")
    if not (math.isfinite(request.seconds) and 0 < request.seconds <= _LONGEST):
        raise LaunchError(f"--seconds {request.seconds:g}: must be above 0, up to {_LONGEST:g}")

    check_gradients(request.gradients_mb)


def check_gradients(gradients_mb: Sequence[float]) -> None:
    """Raise UsageError for a size that no gradient has."""
    for size in gradients_mb:
        if not (math.isfinite(size) and 0 < size <= _LARGEST_GRADIENT_MB):
            raise UsageError(
                f"--gradient-mb {size:g}: must be above 0, up to {_LARGEST_GRADIENT_MB:g} MiB"
            )


def read(path: Path, gradients_mb: Sequence[float]) -> int:
    """Print what a probe has written, and the verdict on it; returns the exit code."""
    from harness.probe_verdict import print_results

    check_gradients(gradients_mb)
    print_results(path, gradients_mb)
    return 0


def _conclude(directory: RunDirectory, request: ProbeRequest) -> None:
    from harness.probe_verdict import conclude

    conclude(directory.path, request.gradients_mb)


@contextmanager
def _directory(out: Path | None, hosts: tuple[Host, ...]) -> Iterator[RunDirectory]:
    """Where the ranks leave results and last words. What was made for nothing is removed."""
    made = out is None or not out.exists()
    path = _scratch(hosts) if out is None else _created(out)
    directory = RunDirectory(path)
    keep = out is not None
    try:
        directory.failures.mkdir(exist_ok=True)
        directory.stop_request.unlink(missing_ok=True)
        yield directory
    except UsageError:
        keep = not made
        raise
    except RankFailure:
        keep = keep or any(directory.failures.glob("*.txt"))  # the message names it
        raise
    finally:
        if not keep:
            shutil.rmtree(path, ignore_errors=True)
        elif directory.failures.is_dir() and not any(directory.failures.iterdir()):
            directory.failures.rmdir()


def _scratch(hosts: tuple[Host, ...]) -> Path:
    """A temporary directory: here if there are other hosts, which do not see this one's /tmp."""
    here = None if all(is_local(host.name) for host in hosts) else Path.cwd()
    try:
        return Path(tempfile.mkdtemp(prefix=".harness-probe-", dir=here))
    except OSError as error:
        raise RunDirectoryError(
            f"{here or tempfile.gettempdir()}: no directory can be created there: "
            f"{error.strerror}; name one that all hosts see with -o"
        ) from None


def _created(path: Path) -> Path:
    if holds_probe(path):
        raise RunDirectoryError(f"{path} already holds a probe; choose another directory (-o)")
    make_directory(path, "directory (-o)")
    return path


def _check_reachable(launcher: Launcher, hosts: tuple[Host, ...], directory: RunDirectory) -> None:
    place = directory.path.resolve()
    needs = Needs(sys.executable, place, mpi_daemon(Comm().controller), "-o", python_key=None)
    check_reachable(launcher, [host.name for host in hosts], needs, _LAUNCH.connect_timeout)


def _spec(
    request: ProbeRequest,
    launcher: Launcher,
    hosts: tuple[Host, ...],
    ranks: int,
    directory: RunDirectory,
) -> LaunchSpec:
    settings = inherited(hosts, None) | {
        environment.WORLD_SIZE: str(ranks),
        environment.FAILURE_DIR: str(directory.failures.resolve()),
        environment.LAUNCHER: launcher,
    }
    if sys.stdout.isatty():  # how wide the table may be
        settings["COLUMNS"] = str(shutil.get_terminal_size().columns)
    command = [sys.executable, "-m", "harness.probe", str(directory.path.resolve())]
    command += ["--max-mb", str(request.max_mb), "--seconds", f"{request.seconds:g}"]
    return completed(LaunchSpec(ranks, hosts, tuple(command), settings), launcher, _LAUNCH)


def _launch(
    spec: LaunchSpec, launcher: Launcher, directory: RunDirectory, stopper: Stopper
) -> None:
    argv = MODULES[launcher].arguments(spec)
    where = ",".join(map(str, spec.hosts))
    print(f"harness: measuring collectives of {counted(spec.ranks, 'rank')} on {where}", flush=True)
    ended = execute(argv, spec, launcher, directory, PlainLines(), stopper)
    if ended.exit_code == 0 and holds_probe(directory.path):
        return
    outcome = judge(ended, spec, directory)
    if outcome.kind == "refused":
        raise UsageError(outcome.message)
    if outcome.kind == "stopped" or stopper.asked:
        raise StoppedEarly("stopped on request; nothing was written")
    raise RankFailure(outcome.message)
