"""Writes batch jobs, hands them to sbatch, and keeps a list of them."""

from __future__ import annotations

import itertools
import json
import os
import re
import shlex
import shutil
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Literal

from rich.console import Console
from rich.table import Table

from harness.config import dump_config, load_config
from harness.data_sizes import check_root, train_size
from harness.errors import ConfigError, LaunchError, RunDirectoryError
from harness.records import RunDirectory, check_unlocked, now, write_atomic
from harness.resume import check_same_run, has_finished, ranks_of_late
from harness.schedule.plan import Plan, build_plan
from harness.schema import Config
from harness.yamlfile import one_line, parse_yaml
from launch.jobs import (
    JobList,
    Point,
    Submitted,
    ask,
    job_states,
    list_lock,
    read_list,
    write_list,
)
from launch.slurm import (
    MAX_POINTS,
    BatchJob,
    Place,
    chain,
    gather,
    job_title,
    nodes_for,
    options_of,
    render,
    sbatch_command,
)

_NUMBER = re.compile(r"([0-9]+)(;.*)?")
OPTIONS = frozenset(
    {"help", "run-dir", "ranks", "nodes", "sweep", "limit", "probe", "dry-run", "resume"}
)
"""The harness's own; all others are sbatch's."""


@dataclass(frozen=True)
class SubmitRequest:
    """What ``harness submit`` was asked for."""

    config_path: Path
    overrides: tuple[str, ...] = ()
    sbatch: tuple[str, ...] = ()
    """Options of sbatch: --NAME, or --NAME=VALUE."""
    run_dir: Path | None = None
    ranks: int | None = None
    nodes: str | None = None
    """Node counts of a scaling series, such as 1,2,4."""
    sweep: tuple[str, ...] = ()
    """KEY=VALUE,VALUE,… each."""
    limit: int | None = None
    probe: bool = False
    dry_run: bool = False
    resume: bool = False


@dataclass(frozen=True)
class Graph:
    """Jobs that are to be submitted, and every file that they need."""

    kind: Literal["run", "sweep", "scaling", "probe"]
    config: Config
    place: Place
    jobs: list[BatchJob]
    points: list[Point] = field(default_factory=list)
    files: dict[Path, str] = field(default_factory=dict)

    def script(self, job: BatchJob) -> Path:
        return self.place.own / f"{job.name}.sbatch"


def submit(request: SubmitRequest) -> int:
    """Submit what is asked for; returns the exit code.

    Everything that can be refused is refused before anything is written. Raises the errors of
    ``harness.errors``.
    """
    _check_request(request)
    overrides = (*request.overrides, *_option_overrides(request.sbatch))
    if request.ranks is not None and not (request.resume or request.probe):
        overrides += (f"ranks.start={request.ranks}", f"ranks.max={request.ranks}")
    config = _load(request.config_path, overrides)
    plan = _plan(config)
    directory = RunDirectory((request.run_dir or _default_directory(config, request)).absolute())
    if not _check_directory(directory, config, request):
        print(f"harness: the run in {directory.path} has finished already")
        return 0
    place = Place(directory.path, Path.cwd(), sys.executable)
    graph = _graph(request, overrides, config, plan, place)
    created = not directory.path.exists()
    with _writing(directory):
        _check_directory(directory, config, request)  # again, now that nobody else can submit here
        _write(graph)
        if request.dry_run:
            _print_graph(graph, {})
            _print_commands(graph)
            return 0
        try:
            numbers = _submit_all(graph)
        except LaunchError:
            if created:
                shutil.rmtree(directory.path, ignore_errors=True)
            raise
    _print_graph(graph, numbers)
    print(f"harness: look after it with: harness status {shlex.quote(str(directory.path))}")
    return 0


def submit_successor(run_dir: Path, number: str, ranks: int) -> Submitted:
    """Submit the job that goes on with a run on so many ranks, once job ``number`` has ended well.

    Raises LaunchError, ConfigError or RunDirectoryError.
    """
    config = load_config(run_dir / "slurm" / "config.yaml")
    with list_lock(run_dir):
        jobs = read_list(run_dir)
        place = Place(run_dir.absolute(), Path(jobs.directory or os.getcwd()), sys.executable)
        job = BatchJob(f"job-{len(jobs.jobs)}", "job", ranks, nodes_for(config, ranks))
        graph = Graph("run", config, place, [job])
        write_atomic(graph.script(job), render(config, job, place).encode())
        taken = _hand_over(graph, job, [number])
        jobs.jobs.append(taken)
        write_list(run_dir, jobs)
    return taken


def _check_request(request: SubmitRequest) -> None:
    if request.ranks is not None and request.ranks < 1:
        raise LaunchError(f"--ranks {request.ranks}: at least 1 rank is needed")
    if request.limit is not None and (request.limit < 1 or not request.sweep):
        raise LaunchError(f"--limit {request.limit} is a number of tasks from 1, with --sweep")
    asked = {
        "--sweep": bool(request.sweep),
        "--nodes": request.nodes is not None,
        "--probe": request.probe,
        "--resume": request.resume,
    }
    names = [name for name, given in asked.items() if given]
    if len(names) > 1:
        raise LaunchError(f"{' and '.join(names)} cannot be had together; submit one at a time")
    if request.nodes is not None and request.ranks is not None:
        raise LaunchError("--nodes says how many ranks there are (× ranks.per_node); omit --ranks")
    if request.resume and request.run_dir is None:
        raise RunDirectoryError("--resume needs --run-dir: the run to go on with")


def _option_overrides(words: Sequence[str]) -> Iterator[str]:
    """sbatch's options as keys of slurm.options, which checks them."""
    for word in words:
        name, equals, value = word.partition("=")
        if not re.fullmatch(r"--[a-z][a-z0-9-]*", name):
            raise LaunchError(
                f"{one_line(word)} is neither an option of the harness nor a long one of sbatch, "
                "such as --partition=debug"
            )
        text = json.dumps(value, ensure_ascii=False) if equals else "true"
        yield f"slurm.options.{name[2:]}={text}"


def _load(path: Path, overrides: Sequence[str]) -> Config:
    """The configuration, with where the data are from any directory."""
    config = load_config(path, overrides)
    if config.data.root is None:
        return config
    root = str(Path(config.data.root).absolute())
    return config.model_copy(update={"data": config.data.model_copy(update={"root": root})})


def _plan(config: Config) -> Plan:
    check_root(config.data)
    return build_plan(config, train_size(config.data))


def _default_directory(config: Config, request: SubmitRequest) -> Path:
    kind = {"-sweep": request.sweep, "-scaling": request.nodes, "-probe": request.probe}
    suffix = next((name for name, given in kind.items() if given), "")
    stamp = datetime.now().strftime("%Y%m%d-%H%M%S")
    return Path("runs") / f"{job_title(config.name)}{suffix}-{stamp}"


def _check_directory(directory: RunDirectory, config: Config, request: SubmitRequest) -> bool:
    """Raise RunDirectoryError if the directory cannot be used; whether there is anything to do."""
    directory.check_usable(request.resume)
    check_unlocked(directory)
    try:
        numbers = [job.id for job in read_list(directory.path).jobs]
        live = [
            f"{state.id} ({state.state})"
            for states in job_states(numbers).values()
            for state in states
            if not state.over
        ]
    except LaunchError as error:
        raise RunDirectoryError(
            f"{directory.path} has jobs ({', '.join(numbers)}), and whether they have ended cannot "
            f"be told: {error}"
        ) from None
    if live:
        raise RunDirectoryError(
            f"{directory.path} is in use by job {', '.join(live)}; wait, or end it with scancel, "
            "or choose another --run-dir"
        )
    if request.resume:
        check_same_run(config, directory)
        return not has_finished(directory)
    return True


def _graph(
    request: SubmitRequest, overrides: tuple[str, ...], config: Config, plan: Plan, place: Place
) -> Graph:
    if request.sweep:
        graph = _sweep(request, overrides, config, place)
    elif request.nodes is not None:
        graph = _scaling(request, overrides, config, place)
    elif request.probe:
        ranks = request.ranks or config.ranks.ceiling
        job = BatchJob("probe", "probe", ranks, nodes_for(config, ranks))
        graph = Graph("probe", config, place, [job])
    else:
        graph = Graph("run", config, place, _chain(request, config, plan, place))
    graph.files[place.own / "config.yaml"] = dump_config(config)
    for job in graph.jobs:
        graph.files[graph.script(job)] = render(config, job, place)
    return graph


def _chain(request: SubmitRequest, config: Config, plan: Plan, place: Place) -> list[BatchJob]:
    if not request.resume:
        return chain(config, plan)
    if request.ranks is not None:
        nodes = nodes_for(config, request.ranks)
        return [BatchJob("job-0", "job", request.ranks, nodes, keep_ranks=True)]
    late = ranks_of_late(RunDirectory(place.run_dir))
    return chain(config, plan, late or config.ranks.start)


def _sweep(
    request: SubmitRequest, overrides: tuple[str, ...], config: Config, place: Place
) -> Graph:
    """A job array with a task for each point of the grid, and the job that makes the report."""
    axes = [_axis(text) for text in request.sweep]
    grid = list(itertools.product(*axes))
    if len(grid) > MAX_POINTS:
        raise LaunchError(
            f"--sweep: {len(grid)} points are more than the {MAX_POINTS} of one job array; leave "
            "some values out"
        )
    points, files = [], {}
    for index, settings in enumerate(grid):
        own = _load(request.config_path, (*overrides, *settings))
        ranks = max(row.ranks for row in _plan(own).stages)
        name = f"{index:04d}-{re.sub(r'[^A-Za-z0-9._=+-]+', '-', ','.join(settings))[:60]}"
        points.append(Point(name, list(settings), ranks, nodes_for(own, ranks)))
        files[place.run_dir / name / "slurm" / "config.yaml"] = dump_config(own)
    sizes = {(point.ranks, point.nodes): ", ".join(point.settings) for point in points}
    if len(sizes) > 1:
        told = "; ".join(f"{what} {ranks} on {nodes}" for (ranks, nodes), what in sizes.items())
        raise LaunchError(
            "--sweep: the tasks of a job array have one size, but these need other ranks and nodes "
            f"than each other: {told}; set --ranks, or use --nodes for a scaling series"
        )
    names = tuple(point.directory for point in points)
    job = BatchJob(
        "sweep", "sweep", points[0].ranks, points[0].nodes, points=names, limit=request.limit
    )
    return Graph("sweep", config, place, [job, gather([job], names)], points, files)


def _axis(text: str) -> list[str]:
    """The overrides of ``KEY=V1,V2``; the values are what YAML reads between brackets."""
    key, _, values = text.partition("=")
    found = parse_yaml(f"[{values}]", f"--sweep {one_line(text)}", lines=False).data
    if not key or not isinstance(found, list) or not found:
        raise LaunchError(
            f"--sweep {one_line(text)}: write KEY=VALUE,VALUE such as lr.base=0.1,0.2"
        )
    if key.partition(".")[0] == "slurm":
        raise LaunchError(f"--sweep {one_line(text)}: the tasks of a job array have one of these")
    return list(dict.fromkeys(f"{key}={_as_yaml(value)}" for value in found))


def _as_yaml(value: object) -> str:
    """A value as an override has it, without quotes where they are not needed."""
    if isinstance(value, str) and re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._/-]*", value):
        try:
            if parse_yaml(value, "", lines=False).data == value:
                return value
        except ConfigError:
            pass
    return json.dumps(value, ensure_ascii=False)


def _scaling(
    request: SubmitRequest, overrides: tuple[str, ...], config: Config, place: Place
) -> Graph:
    """A job for each number of nodes, and the job that makes the report."""
    per_node = config.ranks.per_node
    if per_node is None:
        raise LaunchError("--nodes needs ranks.per_node: set it to the ranks that a node takes")
    jobs, points, files = [], [], {}
    for nodes in _node_counts(request.nodes or ""):
        ranks = nodes * per_node
        settings = (f"ranks.start={ranks}", f"ranks.max={ranks}")
        own = _load(request.config_path, (*overrides, *settings))
        _plan(own)
        name = f"nodes-{nodes}"
        jobs.append(BatchJob(name, "scaling", ranks, nodes_for(own, ranks), point=name))
        points.append(Point(name, list(settings), ranks, nodes))
        files[place.run_dir / name / "slurm" / "config.yaml"] = dump_config(own)
    last = gather(jobs, [point.directory for point in points])
    return Graph("scaling", config, place, [*jobs, last], points, files)


def _node_counts(text: str) -> list[int]:
    parts = [part.strip() for part in text.split(",")]
    if not all(re.fullmatch(r"[1-9][0-9]{0,5}", part) for part in parts):
        raise LaunchError(f"--nodes {one_line(text)}: write numbers of nodes such as 1,2,4")
    counts = [int(part) for part in parts]
    if len(set(counts)) < len(counts):
        raise LaunchError(f"--nodes {text}: each number of nodes can stand there once")
    return counts


@contextmanager
def _writing(directory: RunDirectory) -> Iterator[None]:
    """The directory, made if need be, with nobody else writing its jobs."""
    try:
        (directory.path / "slurm").mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise RunDirectoryError(
            f"{directory.path} cannot be created: {error.strerror}; choose another --run-dir"
        ) from None
    with list_lock(directory.path):
        yield


def _write(graph: Graph) -> None:
    for path, content in graph.files.items():
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(path, content.encode())


def _submit_all(graph: Graph) -> dict[str, str]:
    """The number of each job by its name. If sbatch refuses one, those before it are cancelled."""
    old = read_list(graph.place.run_dir)
    jobs = JobList(graph.kind, str(graph.place.directory), [], graph.points, old.history)
    numbers: dict[str, str] = {}
    for job in graph.jobs:
        try:
            taken = _hand_over(graph, job, [numbers[name] for name in job.after])
        except LaunchError:
            with suppress(LaunchError):
                if numbers:
                    ask(["scancel", *numbers.values()])
            raise
        numbers[job.name] = taken.id
        jobs.jobs.append(taken)
        write_list(graph.place.run_dir, jobs)
    return numbers


def _hand_over(graph: Graph, job: BatchJob, after: list[str]) -> Submitted:
    script = graph.script(job)
    said = ask(sbatch_command(job, str(script), after)).strip()
    number = _NUMBER.fullmatch(said.splitlines()[-1] if said else "")
    if number is None:
        raise LaunchError(f"sbatch names no job, but says: {one_line(said, 300)}")
    return Submitted(
        name=job.name,
        kind=job.kind,
        id=number[1],
        ranks=job.ranks,
        nodes=job.nodes,
        segment=job.segment,
        after=after,
        condition=job.condition,
        options=options_of(graph.config, job, graph.place),
        script=script.name,
        time=now(),
        point=job.point,
    )


def _print_graph(graph: Graph, numbers: dict[str, str]) -> None:
    table = Table(box=None, pad_edge=False)
    columns = ["job", *(["number"] if numbers else []), "nodes", "ranks", "segment", "tasks"]
    for name in [*columns, "after"]:
        table.add_column(name, justify="left" if name in ("job", "after") else "right")
    for job in graph.jobs:
        tasks = str(len(job.points)) if job.kind == "sweep" else ""
        segment = "" if job.segment is None else str(job.segment)
        row = [job.name, *([numbers[job.name]] if numbers else [])]
        row += [str(job.nodes), str(job.ranks), segment, tasks]
        condition = "success" if job.condition == "afterok" else "end"
        row.append(f"{condition} of {', '.join(job.after)}" if job.after else "")
        table.add_row(*row)
    Console(width=200, soft_wrap=True).print(table)  # not cut to the terminal
    print(f"run directory {graph.place.run_dir}")


def _print_commands(graph: Graph) -> None:
    """What would be executed, in a form that a shell takes."""
    print("nothing was submitted; it would be done by")
    for job in graph.jobs:
        after = [f"${_variable(name)}" for name in job.after]
        words = sbatch_command(job, str(graph.script(job)), after)
        # The only words that a shell is to expand are those variables.
        shown = [word if "$" in word and after else shlex.quote(word) for word in words[:-1]]
        print(f"{_variable(job.name)}=$({' '.join([*shown, shlex.quote(words[-1])])})")


def _variable(name: str) -> str:
    return name.replace("-", "_")
