"""From what ``harness submit`` was asked for to jobs and the files they need. Executes nothing."""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from harness.config import dump_config, load_config
from harness.data_sizes import check_root, train_size
from harness.errors import ConfigError, LaunchError, RunDirectoryError
from harness.resume import ranks_of_late
from harness.rundir import RunDirectory
from harness.schedule.plan import Plan, build_plan
from harness.schema import Config
from harness.speedfit import settled_growth
from harness.yamlfile import one_line, parse_yaml
from launch.jobs import Point
from launch.slurm import MAX_POINTS, BatchJob, Place, chain, gather, nodes_for, render

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
    points: tuple[tuple[str, Path], ...] = ()
    """In place of a grid: run directories' names, each with a configuration of its own."""
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


def check_request(request: SubmitRequest) -> None:
    """Raise LaunchError or RunDirectoryError for what cannot be asked for together."""
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


def overrides_of(request: SubmitRequest) -> tuple[str, ...]:
    """Everything that is laid over the file. Raises LaunchError for what is no option of sbatch."""
    overrides = (*request.overrides, *_option_overrides(request.sbatch))
    if request.ranks is None or request.resume or request.probe:
        return overrides
    return (*overrides, f"ranks.start={request.ranks}", f"ranks.max={request.ranks}")


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


def resolve(path: Path, overrides: Sequence[str], run: RunDirectory | None = None) -> Config:
    """The configuration, with where the data are from any directory, and what growth by goodput is
    decided with: that of ``run``, if it goes on."""
    config = settled_growth(load_config(path, overrides), run)
    if config.data.root is None:
        return config
    root = str(Path(config.data.root).absolute())
    return config.model_copy(update={"data": config.data.model_copy(update={"root": root})})


def plan_of(config: Config) -> Plan:
    """The plan of a run. Raises ConfigError or DataError."""
    check_root(config.data)
    return build_plan(config, train_size(config.data))


def build_graph(
    request: SubmitRequest, overrides: tuple[str, ...], config: Config, plan: Plan, place: Place
) -> Graph:
    """The jobs, with every file rendered. Raises LaunchError or ConfigError."""
    if request.sweep or request.points:
        graph = _sweep(request, overrides, config, place)
    elif request.nodes is not None:
        graph = _scaling(request, overrides, config, place)
    elif request.probe:
        ranks = request.ranks or config.ranks.ceiling
        job = BatchJob("probe", "probe", ranks, nodes_for(config, ranks))
        graph = Graph("probe", config, place, [job])
    else:
        config = _always_growing(config)
        graph = Graph("run", config, place, _chain(request, config, plan, place))
    graph.files[place.own / "config.yaml"] = dump_config(config)
    for job in graph.jobs:
        graph.files[graph.script(job)] = render(config, job, place)
    return graph


def _always_growing(config: Config) -> Config:
    """A job of a chain ends where the plan says so: its own start is not what the next one's costs,
    which waits in the queue, and nodes that are allocated are there to be used."""
    if config.ranks.restart_seconds is not None:
        return config
    ranks = config.ranks.model_copy(update={"restart_seconds": 0.0})
    return config.model_copy(update={"ranks": ranks})


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
    points, files = [], {}
    for name, path, settings in _runs_of(request):
        own = resolve(path, (*overrides, *settings))
        ranks = max(row.ranks for row in plan_of(own).stages)
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


def _runs_of(request: SubmitRequest) -> list[tuple[str, Path, tuple[str, ...]]]:
    """(name of its directory, configuration, overrides) of each run of a job array."""
    if request.points:
        return [(name, path, ()) for name, path in request.points]
    axes = [_axis(text) for text in request.sweep]
    grid = list(itertools.product(*axes))
    if len(grid) > MAX_POINTS:
        raise LaunchError(
            f"--sweep: {len(grid)} points are more than the {MAX_POINTS} of one job array; leave "
            "some values out"
        )
    return [
        (
            f"{index:04d}-{re.sub(r'[^A-Za-z0-9._=+-]+', '-', ','.join(settings))[:60]}",
            request.config_path,
            settings,
        )
        for index, settings in enumerate(grid)
    ]


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
        own = resolve(request.config_path, (*overrides, *settings))
        plan_of(own)
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
