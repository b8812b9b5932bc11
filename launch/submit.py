"""Writes batch jobs, hands them to sbatch, and keeps a list of them."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import datetime
from pathlib import Path

from rich.console import Console
from rich.table import Table

from harness.config import load_config
from harness.errors import LaunchError, RunDirectoryError
from harness.files import creating, write_atomic
from harness.jsonl import now
from harness.resume import check_same_run, has_finished
from harness.rundir import RunDirectory
from harness.runlock import check_unlocked
from harness.schema import Config
from harness.yamlfile import one_line
from launch.graph import (
    Graph,
    SubmitRequest,
    build_graph,
    check_request,
    overrides_of,
    plan_of,
    resolve,
)
from launch.jobs import JobList, Submitted, ask, job_states, list_lock, read_list, write_list
from launch.slurm import (
    BatchJob,
    Place,
    idle_gpus,
    job_title,
    nodes_for,
    options_of,
    render,
    sbatch_command,
)

_NUMBER = re.compile(r"([0-9]+)(;.*)?")


def submit(request: SubmitRequest) -> int:
    """Submit what is asked for; returns the exit code.

    Everything that can be refused is refused before anything is written. Raises the errors of
    ``harness.errors``.
    """
    check_request(request)
    overrides = overrides_of(request)
    going_on = (
        RunDirectory(request.run_dir.absolute()) if request.resume and request.run_dir else None
    )
    config = resolve(request.config_path, overrides, going_on)
    plan = plan_of(config)
    directory = RunDirectory((request.run_dir or _default_directory(config, request)).absolute())
    if not _check_directory(directory, config, request):
        print(f"harness: the run in {directory.path} has finished already")
        return 0
    setup = config.slurm.setup
    if setup is not None and not Path(setup).exists():
        raise LaunchError(f"slurm.setup = {setup}: there is no such file")
    place = Place(directory.path, Path.cwd(), sys.executable)
    graph = build_graph(request, overrides, config, plan, place)
    if idle := idle_gpus(config):
        print(f"harness: warning: {idle}", file=sys.stderr)
    created = not directory.path.exists()
    with _writing(directory):
        _check_directory(directory, config, request)  # again, now that nobody else can submit here
        _write(graph)
        if request.resume and not request.dry_run:
            directory.stop_request.unlink(missing_ok=True)
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


@contextmanager
def _writing(directory: RunDirectory) -> Iterator[None]:
    """The directory, made if need be, with nobody else writing its jobs."""
    with creating(directory.path, "--run-dir"):
        (directory.path / "slurm").mkdir(parents=True, exist_ok=True)
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
