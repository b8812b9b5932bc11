"""Batch jobs as text: which jobs a run needs, their options, their scripts. Executes nothing."""

from __future__ import annotations

import re
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import jinja2

from harness.errors import LaunchError
from harness.launch_schema import Slurm
from harness.schedule.plan import Plan
from harness.schema import Config
from harness.wording import counted, plain_name
from harness.yamlfile import one_line
from launch import elastic
from launch.containers import check_container

TEMPLATES = Path(__file__).resolve().parents[1] / "slurm"
"""Beside this package, in a checkout as in an installation."""

Kind = Literal["job", "sweep", "scaling", "probe", "gather"]

# Options that take no value, or one after a '=' only.
_ALONE = frozenset(
    {
        "contiguous",
        "exclusive",
        "get-user-env",
        "hold",
        "ignore-pbs",
        "nice",
        "no-kill",
        "overcommit",
        "oversubscribe",
        "propagate",
        "quiet",
        "reboot",
        "spread-job",
        "use-min-nodes",
        "verbose",
        # refused by name, with what settles them
        "help",
        "no-requeue",
        "requeue",
        "test-only",
        "usage",
        "version",
    }
)
_REPORT_TIME = "30:00"
MAX_POINTS = 1000
"""Of a sweep: the indices of a job array end at 1000 unless the cluster's MaxArraySize is set."""


@dataclass(frozen=True)
class Place:
    """Where jobs run, and what runs them. Both paths are absolute."""

    run_dir: Path
    """The run directory; of a sweep or a scaling series, the directory above those."""
    directory: Path
    """The working directory of the jobs."""
    python: str
    """The interpreter that has the harness."""

    @property
    def own(self) -> Path:
        """Scripts, their output and the list of jobs."""
        return self.run_dir / "slurm"


@dataclass(frozen=True)
class BatchJob:
    """One job that is to be submitted."""

    name: str
    """Unique in its graph; its script has this name."""
    kind: Kind
    ranks: int
    nodes: int
    segment: int | None = None
    """Of the plan, for a member of a chain."""
    after: tuple[str, ...] = ()
    """Names of jobs that must have ended before."""
    keep_ranks: bool = False
    """Whether the run has these ranks from here to its end, whatever it had before."""
    point: str | None = None
    """The run directory of a member of a scaling series, inside the series' directory."""
    points: tuple[str, ...] = ()
    """The run directories of a sweep's tasks; for a gather job, of all runs."""
    limit: int | None = None
    """Tasks of a sweep that may run at one time."""

    @property
    def condition(self) -> str:
        """A chain goes on after success only; a report is made of what there is."""
        return "afterany" if self.kind == "gather" else "afterok"


def job_title(name: str) -> str:
    """A name that is not too long for what Slurm shows."""
    return plain_name(name)[:60]


def sbatch_quote(value: str) -> str:
    """A value as a #SBATCH line has it, where a backslash escapes inside all quotes.

    Text that needs no quotes stays as it is.
    """
    if re.fullmatch(r"[A-Za-z0-9_@%+=:,./-]+", value):
        return value
    escaped = value.replace("\\", "\\\\").replace('"', '\\"')
    return f'"{escaped}"'


def split_words(words: Sequence[str], own: frozenset[str]) -> tuple[list[str], list[str]]:
    """Words of ``harness submit`` and options of sbatch, each of these as ``--NAME`` or
    ``--NAME=VALUE``. ``own``: long options of the harness, without dashes."""
    mine: list[str] = []
    theirs: list[str] = []
    rest = list(words)
    while rest:
        word = rest.pop(0)
        name, equals, _ = word.removeprefix("--").partition("=")
        if word in ("-h", "-") or not word.startswith("-") or (word[:2] == "--" and name in own):
            mine.append(word)
        elif word.startswith("--") and not equals and name not in _ALONE and _is_value(rest):
            theirs.append(f"{word}={rest.pop(0)}")
        else:
            theirs.append(word)
    return mine, theirs


def _is_value(rest: list[str]) -> bool:
    return bool(rest) and not rest[0].startswith("--")


def nodes_for(config: Config, ranks: int) -> int:
    """Nodes that so many ranks need. Raises LaunchError if the configuration does not say."""
    per_node, gpus = config.ranks.per_node, config.slurm.gpus_per_node
    if gpus is not None:
        room = int(gpus.rpartition(":")[2]) * config.launch.ranks_per_gpu
        if per_node is None and ranks > room:
            raise LaunchError(
                f"{ranks} ranks need more than one node of slurm.gpus_per_node = {gpus} with "
                f"launch.ranks_per_gpu = {config.launch.ranks_per_gpu}; set ranks.per_node={room}"
            )
        if per_node is not None and min(per_node, ranks) > room:
            raise LaunchError(
                f"ranks.per_node = {per_node} is more than slurm.gpus_per_node = {gpus} with "
                f"launch.ranks_per_gpu = {config.launch.ranks_per_gpu} gives room for; set "
                f"ranks.per_node={room} or a larger launch.ranks_per_gpu"
            )
    return -(-ranks // per_node) if per_node else 1


def idle_gpus(config: Config) -> str | None:
    """What to tell of GPUs that jobs ask for and no rank computes on; None if there are none."""
    gpus, per_node = config.slurm.gpus_per_node, config.ranks.per_node
    if gpus is None:
        return None
    ranks = min(per_node or config.ranks.ceiling, config.ranks.ceiling)
    room, used = int(gpus.rpartition(":")[2]), -(-ranks // config.launch.ranks_per_gpu)
    if used >= room:
        return None
    return (
        f"slurm.gpus_per_node = {gpus}, but {counted(ranks, 'rank')} on a node with "
        f"launch.ranks_per_gpu = {config.launch.ranks_per_gpu} keep {used} of them busy; "
        "the others stay idle"
    )


def chain(config: Config, plan: Plan, first: int | None = None) -> list[BatchJob]:
    """The jobs of a run, one for each segment; of growth that is decided from measurements, the
    first. With ``first``, of a run that goes on with so many ranks."""
    nodes_for(config, config.ranks.ceiling)  # what measurements may ask for later
    segments = [(row["segment"], row["ranks"]) for row in plan.as_dict()["segments"]]
    if plan.fastest is not None:
        segments = [(0, config.ranks.start)]
    if first is not None:
        at = max((number for number, ranks in segments if ranks <= first), default=0)
        segments = [(at, first), *((n, ranks) for n, ranks in segments if ranks > first)]
    jobs: list[BatchJob] = []
    for position, (segment, ranks) in enumerate(segments):
        after = (jobs[-1].name,) if jobs else ()
        jobs.append(
            BatchJob(
                f"job-{position}", "job", ranks, nodes_for(config, ranks), segment, after=after
            )
        )
    return jobs


def gather(jobs: Sequence[BatchJob], points: Sequence[str]) -> BatchJob:
    """The job that makes one report of all runs, once they have ended."""
    after = tuple(job.name for job in jobs)
    return BatchJob("gather", "gather", 1, 1, after=after, points=tuple(points))


def check_jobs(config: Config, place: Place) -> None:
    """Raise LaunchError for what can be in a configuration, but not in a script."""
    for what, text in (
        ("the run directory", str(place.run_dir)),
        ("the working directory", str(place.directory)),
        ("the interpreter", place.python),
    ):
        if not text.isprintable():
            raise LaunchError(
                f"{what} {one_line(text, 300)} has characters that do not print; rename it"
            )
    if "\\" in str(place.run_dir):
        raise LaunchError(
            f"{place.run_dir}: sbatch reads a backslash in the name of a job's output as another "
            "thing; choose another --run-dir"
        )
    for module in config.slurm.modules:
        if module.startswith("-"):
            raise LaunchError(f"slurm.modules: {module} is an option, not a module")
    if config.launch.launcher == "local" and nodes_for(config, config.ranks.ceiling) > 1:
        raise LaunchError("launch.launcher = local is one node; use srun, mpirun or horovodrun")
    _check_launch(config)
    limit = limit_seconds(config.slurm.options.get("time") or config.slurm.time or "0")
    if limit is not None and limit <= config.slurm.warning:
        raise LaunchError(
            f"a time limit of {limit} s leaves nothing before the warning, which comes "
            f"{config.slurm.warning} s earlier; set a larger slurm.time, or less slurm.warning"
        )
    check_container(config, place.run_dir)


def _check_launch(config: Config) -> None:
    """What the ranks' launcher would refuse inside the job."""
    launcher = config.launch.launcher
    if config.comm.controller == "gloo" and launcher in ("mpirun", "srun"):
        raise LaunchError(
            "comm.controller = gloo needs launch.launcher=horovodrun, which reaches the nodes of a "
            "job over ssh; or use comm.controller=mpi"
        )
    if config.launch.elastic:
        # Without MPI it is horovodrun that starts ranks in a job.
        elastic.check(config, launcher or "horovodrun")


def _shorter(time: str | None, other: str) -> str | None:
    """The shorter of two time limits; None: what the cluster has."""
    seconds, most = limit_seconds(time or "0"), limit_seconds(other)
    return other if seconds is not None and most is not None and seconds > most else time


def limit_seconds(text: str) -> int | None:
    """A time limit as sbatch reads it: minutes, M:S, H:M:S, D-H, D-H:M or D-H:M:S; None for no
    limit, and for what only sbatch understands."""
    if not re.fullmatch(r"[0-9]+(-[0-9]+)?(:[0-9]+){0,2}", text):
        return None
    days, dash, rest = text.rpartition("-")
    parts = [int(part) for part in rest.split(":")]
    if not dash and len(parts) < 3:  # minutes come first
        parts.insert(0, 0)
    hours, minutes, seconds = (*parts, 0, 0)[:3]
    return ((int(days or 0) * 24 + hours) * 60 + minutes) * 60 + seconds or None


def options_of(config: Config, job: BatchJob, place: Place) -> dict[str, str | None]:
    """sbatch's long options of a job, in the order of its script; None: without a value."""
    slurm = config.slurm
    numbered = "%A_%a" if job.kind == "sweep" else "%j"
    folder = str(place.own).replace("%", "%%")
    options: dict[str, str | None] = {
        "job-name": f"{job_title(config.name)}-{job.name}",
        "chdir": str(place.directory),
        "output": f"{folder}/%x-{numbered}.out",
        "open-mode": "append",
    }
    if job.kind == "sweep":
        limit = f"%{job.limit}" if job.limit else ""
        options["array"] = f"0-{len(job.points) - 1}{limit}"
    options |= {"nodes": str(job.nodes), "ntasks": str(job.ranks)}
    if job.kind != "gather":
        options |= _size(config, job)
    named = {
        "account": slurm.account,
        "partition": slurm.partition,
        "qos": slurm.qos,
        "constraint": None if job.kind == "gather" else slurm.constraint,
        "reservation": slurm.reservation,
        "time": _shorter(slurm.time, _REPORT_TIME) if job.kind == "gather" else slurm.time,
    }
    options |= {name: value for name, value in named.items() if value is not None}
    options |= _end(slurm, job)
    return options | slurm.options


def _size(config: Config, job: BatchJob) -> dict[str, str | None]:
    """What each node gives to the ranks."""
    per_node = min(config.ranks.per_node or job.ranks, job.ranks)
    cores = config.slurm.cpus_per_rank or config.ranks.threads
    options: dict[str, str | None] = {"ntasks-per-node": str(per_node)}
    for name, value in (
        ("cpus-per-task", cores),
        ("gpus-per-node", config.slurm.gpus_per_node),
        ("mem", config.slurm.memory),
    ):
        if value is not None:
            options[name] = str(value)
    return options | ({"exclusive": None} if config.slurm.exclusive else {})


def _end(slurm: Slurm, job: BatchJob) -> dict[str, str | None]:
    """How a job is warned, and who is told of its end."""
    options: dict[str, str | None] = {}
    trains = job.kind not in ("gather", "probe")
    if trains:
        options["signal"] = f"B:{slurm.signal}@{slurm.warning}"
    options["requeue" if slurm.requeue and trains else "no-requeue"] = None
    if slurm.mail_user is not None:
        options["mail-user"] = slurm.mail_user
        options["mail-type"] = ",".join(slurm.mail_type) or "END,FAIL"
    return options


def render(config: Config, job: BatchJob, place: Place) -> str:
    """A job's script. Raises LaunchError for what cannot stand in one."""
    check_jobs(config, place)
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATES),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        comment_start_string="<#",  # {# is bash's
        comment_end_string="#>",
        autoescape=False,  # noqa: S701 - shell text, quoted by its own filters
    )
    environment.filters |= {"quote": shlex.quote, "sbatch": sbatch_quote, "counted": counted}
    setup = config.slurm.setup
    text = environment.get_template(f"{job.kind}.sbatch.j2").render(
        job=job,
        title=job_title(config.name),
        options=options_of(config, job, place),
        base=str(place.run_dir),
        run_dir=str(place.run_dir / job.point if job.point else place.run_dir),
        python=place.python,
        modules=config.slurm.modules,
        setup=setup and str(place.directory / Path(setup).expanduser()),
        settings=[f"{name}={value}" for name, value in config.launch.environment.items()],
        launcher=_launcher(config),
        signal=config.slurm.signal,
    )
    return text.rstrip() + "\n"


def _launcher(config: Config) -> str | None:
    """What a job must start its ranks with; None: what fits the node that it runs on."""
    container = config.slurm.container
    needs_srun = container is not None and container.runtime == "pyxis"
    return "srun" if needs_srun else config.launch.launcher


def sbatch_command(job: BatchJob, script: str, after: Sequence[str]) -> list[str]:
    """The command that submits a job's script; ``after``: numbers of the jobs before it."""
    words = ["sbatch", "--parsable"]
    if after:
        words.append(f"--dependency={job.condition}:{':'.join(after)}")
        if job.condition == "afterok":  # else it would wait for ever after a failure
            words.append("--kill-on-invalid-dep=yes")
    return [*words, script]
