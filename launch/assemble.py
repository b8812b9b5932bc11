"""From a configuration to what is to be started: hosts, launcher, variables, command."""

from __future__ import annotations

import os
import shlex
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from harness import environment
from harness.errors import ConfigError, LaunchError
from harness.launch_schema import Launch
from harness.rundir import RunDirectory
from harness.schema import Comm, Config
from harness.yamlfile import one_line
from launch import detect, elastic, horovodrun, local, mpirun, srun
from launch.containers import container_command, container_srun_options
from launch.hosts import fill, parse_hosts, read_hostfile, slurm_hosts, this_host
from launch.preflight import is_local
from launch.spec import Host, LaunchSpec

Launcher = Literal["horovodrun", "mpirun", "srun", "local"]

MODULES = {"horovodrun": horovodrun, "mpirun": mpirun, "srun": srun, "local": local}


@dataclass(frozen=True)
class Job:
    """What stays the same over the launches of a run."""

    config: Config
    config_path: Path
    overrides: tuple[str, ...]
    directory: RunDirectory
    launcher: Launcher
    hosts: tuple[Host, ...]
    """With all their slots."""
    grow: int
    """The most ranks that the run may ask for; 0: it keeps what it has."""
    measure: float | None = None
    """Seconds of steady updates after which it stops by itself; None: it goes on to its end."""
    words: tuple[str, ...] = ()
    """What the interpreter executes instead of training."""


def find_hosts(hosts: str | None, hostfile: Path | None) -> tuple[Host, ...]:
    """The hosts that are asked for, else those of the Slurm job, else this one."""
    if hosts is not None and hostfile is not None:
        raise LaunchError("--hosts and --hostfile both say which hosts; leave one of them out")
    if hosts is not None:
        return parse_hosts(hosts)
    if hostfile is not None:
        return read_hostfile(hostfile)
    return slurm_hosts(os.environ) or this_host()


def choose_launcher(asked: Launcher | None, config: Config, hosts: tuple[Host, ...]) -> Launcher:
    """The launcher that is asked for, else the one that fits where this process runs.

    Raises ConfigError if it cannot start such ranks.
    """
    launcher = asked or config.launch.launcher or usual_launcher(config.launch, config.comm)
    if config.comm.controller == "gloo" and launcher not in ("horovodrun", "local"):
        raise ConfigError("comm.controller = gloo needs --launcher horovodrun")
    if launcher == "local":
        _check_local(config, hosts)
    if config.launch.elastic:
        elastic.check(config, launcher)
    return launcher


def usual_launcher(launch: Launch, comm: Comm) -> Launcher:
    """horovodrun; in a Slurm job srun where it can start MPI's ranks, else mpirun, which needs
    nothing but Slurm's own daemons."""
    if not detect.inside_slurm_job(os.environ) or comm.controller != "mpi":
        return "horovodrun"
    if launch.srun_mpi is None and not detect.srun_starts_mpi():
        return "mpirun"
    return "srun"


def _check_local(config: Config, hosts: tuple[Host, ...]) -> None:
    if len(hosts) > 1 or not is_local(hosts[0].name):
        raise LaunchError(
            f"--launcher local starts ranks on this host alone, not on {','.join(map(str, hosts))};"
            " use horovodrun, mpirun or srun"
        )
    if config.ranks.ceiling > 1 and config.comm.backend == "horovod":
        raise ConfigError(
            "--launcher local starts several ranks without MPI, which Horovod needs; set "
            "comm.backend=torch, or use --launcher horovodrun"
        )


def build_spec(job: Job, hosts: tuple[Host, ...], ranks: int, resume: bool) -> LaunchSpec:
    """One launch of so many ranks on these hosts."""
    config, run_dir = job.config, job.directory.path.resolve()
    placed = fill(ranks, hosts)
    spec = LaunchSpec(
        ranks=ranks,
        hosts=placed,
        command=tuple(container_command(config, _command(job, resume), run_dir)),
        environment=_variables(job, placed, ranks),
        controller=config.comm.controller,
        cores_per_rank=config.slurm.cpus_per_rank or config.ranks.threads,
        srun_options=tuple(container_srun_options(config, run_dir)),
        like_many=_like_many(job),
    )
    return completed(spec, job.launcher, config.launch)


def completed(spec: LaunchSpec, launcher: Launcher, launch: Launch) -> LaunchSpec:
    """The same with what ``launch`` says, and with what this machine and the launcher need.

    Asks the machine which MPI it has, if ``launch`` does not say. Raises LaunchError.
    """
    here = os.getcwd()
    if launcher == "horovodrun" and spec.controller == "gloo" and shlex.quote(here) != here:
        _refuse_remote(spec, here)
    by_mpirun = launcher in ("mpirun", "horovodrun") and spec.controller == "mpi"
    mpi = launch.mpi or (detect.installed_mpi() if by_mpirun else "openmpi4")
    spec = replace(
        spec,
        interfaces=tuple(launch.interfaces),
        bind=launch.bind,
        mpi=mpi,
        mpi_prefix=None if mpi == "mpich" else detect.mpi_programs()[0],
        srun_mpi=launch.srun_mpi or (detect.available_srun_mpi() if launcher == "srun" else "pmix"),
        as_root=os.geteuid() == 0,
    )
    settings = MODULES[launcher].launcher_settings(spec)
    # What follows from the configuration beats the user's own variable; a mere default does not.
    own = {
        name: value
        for name, value in settings.items()
        if name not in os.environ or name not in {**srun.DEFAULTS, **mpirun.DEFAULTS}
    }
    return replace(spec, environment={**own, **spec.environment})


def _refuse_remote(spec: LaunchSpec, here: str) -> None:
    """horovodrun hands the working directory to other hosts' shells as it is."""
    others = [host.name for host in spec.hosts if not is_local(host.name)]
    if others:
        raise LaunchError(
            f"the working directory {one_line(here, 300)} has characters in its name that the "
            f"shells of other hosts ({', '.join(others[:4])}) read as something else, and "
            "horovodrun --gloo does not quote it; start from another directory, or set "
            "comm.controller=mpi"
        )


def command_line(job: Job, spec: LaunchSpec) -> tuple[LaunchSpec, list[str]]:
    """The launcher's words for a launch; with ``launch.elastic`` as a world of ranks that may come
    and go, up to what the run may grow to, which has other variables too."""
    if not job.config.launch.elastic:
        return spec, MODULES[job.launcher].arguments(spec)
    folder = job.directory.elastic.resolve()
    most = max(job.grow, spec.ranks)
    variables = {**spec.environment, **elastic.variables(1, most, folder)}
    del variables[environment.WORLD_SIZE]
    spec = replace(spec, environment=variables)
    return spec, elastic.arguments(spec, 1, most, folder / elastic.SCRIPT)


def _like_many(job: Job) -> bool:
    """Whether one rank runs the code of many: what they are compared with does."""
    return job.measure is not None and job.config.comm.backend == "torch"


def _command(job: Job, resume: bool) -> tuple[str, ...]:
    python = job.config.launch.python or sys.executable
    if job.words:
        return (python, *job.words)
    command = [python, "-m", "harness", "train", str(job.config_path.resolve())]
    command += [*job.overrides, "--run-dir", str(job.directory.path.resolve())]
    return (*command, "--resume") if resume else tuple(command)


def _variables(job: Job, hosts: tuple[Host, ...], ranks: int) -> dict[str, str]:
    """Settings of the ranks. A key that the configuration sets beats the user's own variable.

    What follows from a host's cores each rank settles by itself: this machine may have others.
    """
    config = job.config
    settings = inherited(hosts, config.ranks.threads)
    settings |= environment.communication_settings(config.comm)
    settings |= config.launch.environment
    # A single process without a launcher has no other ranks to look for.
    alone = job.launcher == "local" and ranks == 1 and not _like_many(job)
    settings |= {
        **({} if alone else {environment.WORLD_SIZE: str(ranks)}),
        **({} if job.measure is None else {environment.MEASURE: f"{job.measure:g}"}),
        environment.FAILURE_DIR: str(job.directory.failures.resolve()),
        environment.PROGRESS: "relay",
        environment.GROW: str(job.grow),
        environment.LAUNCHER: job.launcher,
        environment.LAUNCHED_AT: "",  # known when they are
        **hang_variable(None if job.words else config.launch.hang_seconds),
        environment.RANKS_PER_GPU: str(config.launch.ranks_per_gpu),
        environment.MPS: str(int(config.launch.mps)),
    }
    return settings


def hang_variable(seconds: float | None) -> dict[str, str]:
    """What makes ranks give signs of life; nothing where nobody looks for them."""
    return {} if seconds is None else {environment.HANG: f"{seconds:g}"}


def inherited(hosts: tuple[Host, ...], threads: int | None) -> dict[str, str]:
    """What ranks take over from this process: the user's settings of the communication, and threads
    for each rank, by default an equal share of the cores."""
    settings = {
        name: value for name, value in os.environ.items() if name.startswith(environment.FORWARDED)
    }
    share = environment.usable_cores() // max(host.slots for host in hosts)
    chosen = threads or os.environ.get("OMP_NUM_THREADS") or max(1, share)
    return {**settings, "OMP_NUM_THREADS": str(chosen)}
