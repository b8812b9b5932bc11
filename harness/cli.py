"""The ``harness`` command: parses, calls, and turns errors into one message and an exit code."""

from __future__ import annotations

import argparse
import io
import json
import os
import sys
from collections.abc import Sequence
from contextlib import redirect_stdout
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from harness.errors import HarnessError, UsageError, told

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

T = TypeVar("T", bound="DataclassInstance")

_OVERRIDES = "settings laid over the file, such as batch.initial=128"


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit code (0 done, 1 failed, 2 bad usage, 74 run directory not
    writable, 75 stopped early, 76 superseded)."""
    options = _parse(arguments)
    if sys.stdout is None:  # closed by the caller, as in `harness plan … >&-`
        sys.stdout = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115 - as long as we live
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # a terminal or log that only knows ASCII
            stream.reconfigure(errors="replace")
    try:
        return int(options.run(options))
    except HarnessError as error:
        print(f"harness: {told(error)}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:
        # The reader of our output has gone, as in `harness plan … | head`.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except OSError as error:  # its text says what and where: disk full, no permission
        print(f"harness: {told(error)}", file=sys.stderr)
        return 1


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Parse, letting overrides stand after options too, which argparse alone does not."""
    parser = _parser()
    if "_ARGCOMPLETE" in os.environ:  # a shell asks how a line goes on
        from harness.completion import complete

        complete(parser)
    words, of_sbatch = list(sys.argv[1:] if arguments is None else arguments), list[str]()
    if words[:1] == ["submit"]:
        from launch.graph import OPTIONS
        from launch.slurm import split_words

        words, of_sbatch = split_words(words, OPTIONS)
    for word in words:
        if word.startswith("--") and word.endswith("=--"):  # which argparse takes for no value
            parser.error(f"{word}: -- is no value")
    options, rest = parser.parse_known_args(words)
    if of_sbatch:
        options.sbatch = of_sbatch
    if rest and hasattr(options, "overrides") and not any(word.startswith("-") for word in rest):
        options.overrides += rest
    elif rest:
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    return options


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="harness",
        description="Train PyTorch image models with a growing global batch, and see how far it "
        "scales.",
    )
    parser.add_argument("--version", action=_Version, nargs=0, help="print the version and stop")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)

    plan = commands.add_parser("plan", help="the stage table, before anything runs")
    _add_config(plan)
    plan.add_argument(
        "--throughput",
        type=Path,
        action="append",
        metavar="PATH",
        help="a run or bench directory, or a file like metrics.jsonl: adds time, node-hours and "
        "bytes sent; can be given several times",
    )
    plan.add_argument("--json", action="store_true", help="for programs")
    plan.set_defaults(run=_plan)

    run = commands.add_parser("run", help="start the ranks, train, report")
    _add_config(run)
    run.add_argument("--ranks", type=int, metavar="N", help="ranks from start to end")
    _add_hosts(run)
    run.add_argument("--run-dir", type=Path, metavar="DIR", help="default: runs/NAME-TIME")
    run.add_argument("--resume", action="store_true", help="go on from the newest checkpoint")
    run.add_argument(
        "--go-on", action="store_true", help="resume if there is a run in DIR, else start one"
    )
    run.add_argument(
        "--max-restarts", type=int, metavar="N", help="restarts after failures (default: 3)"
    )
    run.add_argument("--dry-run", action="store_true", help="print the command and stop")
    run.set_defaults(run=_run)

    train = commands.add_parser("train", help="what each rank executes; alone, one process")
    _add_config(train)
    train.add_argument("--run-dir", type=Path, metavar="DIR", required=True)
    train.add_argument("--resume", action="store_true", help="go on from the newest checkpoint")
    train.set_defaults(run=_train)

    _add_submit(commands)
    _add_bench(commands)
    _add_probe(commands)
    _add_study(commands)

    status = commands.add_parser("status", help="where a run and its batch jobs are")
    status.add_argument("run_dir", type=Path, metavar="RUN_DIR", help="or a directory of several")
    status.add_argument("--json", action="store_true", help="for programs")
    status.set_defaults(run=_status)

    watch = commands.add_parser("watch", help="a running job, live, from its files")
    watch.add_argument("run_dir", type=Path, metavar="RUN_DIR", help="or a directory of several")
    watch.add_argument("--once", action="store_true", help="print it once and stop")
    watch.add_argument(
        "--interval",
        type=float,
        metavar="S",
        default=1.0,
        help="seconds between looks (default: 1)",
    )
    watch.set_defaults(run=_watch)
    trace = commands.add_parser("trace", help="the ranks' traces as one file for Perfetto")
    trace.add_argument("run_dir", type=Path, metavar="RUN_DIR")
    trace.add_argument(
        "-o", "--out", type=Path, metavar="FILE", help="default: RUN_DIR/traces/merged.json"
    )
    trace.set_defaults(run=_trace)

    report = commands.add_parser("report", help="one page from runs, benches, probes")
    report.add_argument(
        "run_dirs", type=Path, nargs="+", metavar="DIR",
        help="a run, bench or probe directory, or a directory that holds such",
    )  # fmt: skip
    report.add_argument("-o", "--out", type=Path, metavar="DIR", help="default: DIR/report")
    report.set_defaults(run=_report)

    _add_first_steps(commands)

    doctor = commands.add_parser(
        "doctor", help="what this machine can run, and what to do about the rest"
    )
    _fill_doctor(doctor)

    recipes = commands.add_parser(
        "recipes",
        help="the configurations that come with the harness",
        description="List the recipes; with NAME, say where that one lies. Every command that "
        "takes a CONFIG takes a recipe's name too.",
    )
    recipes.add_argument("name", nargs="?", metavar="NAME", help="such as adabatch-digits")
    recipes.add_argument(
        "--copy", type=Path, metavar="DIR",
        help="copy it, with all that it extends, into DIR; without NAME all of them",
    )  # fmt: skip
    recipes.set_defaults(run=_recipes)
    return parser


def _add_first_steps(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    init = commands.add_parser(
        "init",
        help="write a first configuration, from four questions and a measurement",
        description="Ask what is not given (or take defaults with --yes), measure the micro-batch "
        "that fits and the speed that it has, and write a commented YAML file that runs.",
    )
    _fill_init(init)

    config = commands.add_parser(
        "config", help="the resolved configuration, and where each value comes from"
    )
    _add_config(config)
    config.add_argument("--json", action="store_true", help="for programs")
    config.set_defaults(run=_config)

    schema = commands.add_parser("schema", help="the JSON Schema of configurations, for editors")
    schema.add_argument("-o", "--out", type=Path, metavar="FILE", help="default: print it")
    schema.set_defaults(run=_schema)

    completion = commands.add_parser(
        "completion", help="what makes a shell complete this command's words"
    )
    completion.add_argument("shell", choices=("bash", "zsh", "fish"))
    completion.set_defaults(run=_completion)


def _fill_init(init: argparse.ArgumentParser) -> None:
    init.add_argument("out", type=Path, nargs="?", metavar="FILE", help="default: DATA-MODEL.yaml")
    init.add_argument("--data", metavar="NAME|DIR", help="a data set, or where its files are")
    init.add_argument("--root", type=Path, metavar="DIR", help="where they are, if --data is NAME")
    init.add_argument("--model", metavar="NAME", help="its name")
    init.add_argument("--ranks", type=int, metavar="N", help="processes that train together")
    init.add_argument("--duration", metavar="20ep|2h", help="length: epochs, updates or a time")
    init.add_argument("--yes", action="store_true", help="defaults for what is not given")
    init.add_argument("--force", action="store_true", help="replace a file that is there")
    init.add_argument(
        "--no-measure", dest="measure", action="store_false", help="guess the micro-batch"
    )
    init.add_argument(
        "--seconds", type=float, metavar="S", default=10.0, help="to measure for (default: 10)"
    )
    init.set_defaults(run=_init)


def _fill_doctor(doctor: argparse.ArgumentParser) -> None:
    doctor.add_argument("--data", type=Path, metavar="DIR", help="look for data sets' files there")
    doctor.add_argument(
        "--run-dir",
        type=Path,
        metavar="DIR",
        default=Path("runs"),
        help="where runs are to be written (default: runs)",
    )
    doctor.add_argument(
        "--ranks", type=int, metavar="N", help="start so many, and let all of them meet"
    )
    _add_hosts(doctor, ("horovodrun", "mpirun", "srun"))
    doctor.add_argument(
        "--timeout",
        type=float,
        metavar="S",
        default=120.0,
        help="seconds for the ranks (default: 120)",
    )
    doctor.add_argument(
        "--quick", action="store_true", help="import nothing to see whether it loads"
    )
    doctor.add_argument("--json", action="store_true", help="for programs")
    doctor.set_defaults(run=_doctor)


class _Version(argparse.Action):
    """Looked up only when it is asked for, from the one place that has it: pyproject.toml."""

    def __call__(self, parser: argparse.ArgumentParser, *_: object) -> None:
        from harness.versions import PACKAGE, installed_version

        print(f"{PACKAGE} {installed_version() or 'of a checkout that is not installed'}")
        parser.exit()


def _config_file(text: str) -> Path:
    """A file, or the recipe of that name where there is no such file."""
    path = Path(text)
    if path.suffix or os.path.exists(path):
        return path
    from harness.recipes import recipes

    return recipes().get(text, path)


def _add_submit(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    submit = commands.add_parser(
        "submit",
        help="queue the run on a Slurm cluster",
        description="Queue a run on a Slurm cluster: a job for each number of ranks that its plan "
        "has, each after the one before. All options that are not listed here are sbatch's, in "
        "their long form: --partition=debug, --time 30.",
        allow_abbrev=False,
    )
    _add_config(submit)
    submit.add_argument("--run-dir", type=Path, metavar="DIR", help="default: runs/NAME-TIME")
    submit.add_argument("--ranks", type=int, metavar="N", help="ranks from start to end")
    submit.add_argument(
        "--nodes", metavar="1,2,4", help="a scaling series: a run on each number of nodes"
    )
    submit.add_argument(
        "--sweep",
        action="append",
        default=[],
        metavar="KEY=V1,V2",
        help="a run for each value, as a job array; several make a grid",
    )
    submit.add_argument("--limit", type=int, metavar="N", help="runs of a sweep at one time")
    submit.add_argument("--probe", action="store_true", help="measure collectives, train nothing")
    submit.add_argument("--resume", action="store_true", help="go on with the run in DIR")
    submit.add_argument("--dry-run", action="store_true", help="write the scripts and stop")
    submit.set_defaults(run=_submit, sbatch=[], points=())


def _add_bench(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    bench = commands.add_parser(
        "bench",
        help="throughput over numbers of ranks",
        description="Measure throughput: each point is a short run of its own, repeated in random "
        "order. With the same -o it goes on where it was stopped.",
    )
    _add_config(bench)
    bench.add_argument(
        "--ranks", type=_counts, required=True, metavar="1,2,4", help="numbers of ranks"
    )
    bench.add_argument(
        "--mode",
        choices=("weak", "strong"),
        help="keep images per rank (weak, the default) or the global batch (strong)",
    )
    bench.add_argument("--repeats", type=int, metavar="N", default=3, help="of a point; default: 3")
    bench.add_argument(
        "--micro",
        dest="micros",
        type=_counts,
        metavar="16,32",
        default=(),
        help="micro-batches, for a grid",
    )
    bench.add_argument(
        "--accumulation",
        dest="accumulations",
        type=_counts,
        metavar="1,2",
        default=(),
        help="micro-batches of a rank in an update, for a grid",
    )
    bench.add_argument(
        "--batches",
        type=_counts,
        metavar="64,128",
        default=(),
        help="global batches of strong scaling, for a grid",
    )
    bench.add_argument(
        "--seconds",
        type=float,
        metavar="S",
        default=5.0,
        help="of steady updates in a repeat (default: 5)",
    )
    bench.add_argument(
        "--peak", type=float, metavar="FLOPS", help="a rank's peak FLOP/s; default: measured"
    )
    _add_hosts(bench)
    bench.add_argument(
        "-o", "--out", type=Path, metavar="DIR", help="default: runs/bench-NAME-TIME"
    )
    bench.add_argument("--dry-run", action="store_true", help="print the commands and stop")
    bench.set_defaults(run=_bench)


def _add_study(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    study = commands.add_parser(
        "study",
        help="a grid of runs, its figure, table and findings",
        description="Run what a study's file asks for and has not run yet, and write its page. "
        "With the same -o it goes on where it was stopped or killed.",
    )
    study.add_argument("study_path", type=Path, metavar="STUDY", help="YAML file of the study")
    study.add_argument("--quick", action="store_true", help="with less, as the file says")
    study.add_argument(
        "--jobs", type=int, metavar="N", help="ranks that train at a time (default: the cores)"
    )
    study.add_argument(
        "-o", "--out", type=Path, metavar="DIR", help="its runs; default: runs/study-NAME"
    )
    study.add_argument(
        "--results", type=Path, metavar="DIR", help="NAME.md, .csv, .svg go there; default: -o"
    )
    study.add_argument("--gather", action="store_true", help="run nothing, write what there is")
    study.add_argument("--submit", action="store_true", help="run it as Slurm job arrays")
    study.add_argument(
        "--sbatch",
        action="append",
        default=[],
        metavar="OPTION",
        help="with --submit, an option of sbatch such as --sbatch=--time=30",
    )
    study.add_argument("--dry-run", action="store_true", help="print the cells and stop")
    study.set_defaults(run=_study)


def _counts(text: str) -> tuple[int, ...]:
    """Different whole numbers in ascending order, from ``1,2,4``."""
    words = [word.strip() for word in text.split(",")]
    if not all(word.isascii() and word.isdigit() and 0 < int(word) < 2**53 for word in words):
        raise argparse.ArgumentTypeError(f"{text!r}: write whole numbers from 1 on, such as 1,2,4")
    return tuple(sorted(set(map(int, words))))


def _add_probe(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    probe = commands.add_parser("probe", help="latency and bandwidth of the collectives")
    probe.add_argument("--ranks", type=int, metavar="N", help="default: one for each slot")
    _add_hosts(probe, ("horovodrun", "mpirun", "srun"))
    probe.add_argument(
        "--max-mb", type=int, metavar="MIB", default=64, help="the largest message (default: 64)"
    )
    probe.add_argument(
        "--seconds", type=float, metavar="S", default=20.0, help="about how long (default: 20)"
    )
    probe.add_argument(
        "-o", "--out", type=Path, metavar="DIR", help="write probe.json and probe.csv there"
    )
    probe.add_argument(
        "--gradient-mb",
        dest="gradients_mb",
        type=float,
        action="append",
        default=[],
        metavar="MIB",
        help="advise on a gradient of this size; can be given several times",
    )
    probe.add_argument(
        "--read", type=Path, metavar="DIR", help="measure nothing, print what -o DIR has written"
    )
    probe.set_defaults(run=_probe)


def _add_hosts(
    parser: argparse.ArgumentParser,
    launchers: Sequence[str] = ("horovodrun", "mpirun", "srun", "local"),
) -> None:
    parser.add_argument(
        "--hosts", metavar="A:2,B:2", help="hosts and their slots; default: this one"
    )
    parser.add_argument("--hostfile", type=Path, metavar="FILE", help="hosts as MPI has them")
    parser.add_argument(
        "--launcher",
        choices=launchers,
        help="what starts the ranks; default: srun in a Slurm job, else horovodrun",
    )


def _add_config(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "config_path", type=_config_file, metavar="CONFIG", help="YAML file of the run, or a recipe"
    )
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help=_OVERRIDES)


# Each command imports what it needs itself: planning must not wait for torch.


def _plan(options: argparse.Namespace) -> int:
    from harness.config import load_config
    from harness.data_sizes import train_size
    from harness.schedule.plan import build_plan

    config = load_config(options.config_path, options.overrides)
    if config.batch.growth.policy == "goodput":
        from harness.speedfit import settled_growth, told_otherwise

        config = settled_growth(config)
        for difference in told_otherwise(config):
            print(f"harness: {difference}", file=sys.stderr)
    plan = build_plan(config, train_size(config.data))
    costs = None
    if options.throughput is not None:
        from harness.schedule.costs import measured_otherwise, price, read_throughput

        costs = price(config, plan, read_throughput(*options.throughput))
        for path in options.throughput:
            if differences := measured_otherwise(config, path):
                print(
                    f"harness: {path} was measured with {', '.join(differences)}: its times and "
                    "bytes may not be this plan's",
                    file=sys.stderr,
                )
    if options.json:
        print(json.dumps(plan.as_dict() if costs is None else costs.as_dict(plan), indent=2))
    else:
        from harness.schedule.table import print_plan

        print_plan(config, plan, costs=costs)
    return 0


def _init(options: argparse.Namespace) -> int:
    from harness.first_config import InitRequest, init, terminal

    return init(_request(InitRequest, options), terminal())


def _config(options: argparse.Namespace) -> int:
    from harness.config import resolve
    from harness.origins import as_json, as_yaml, origins

    found = origins(resolve(options.config_path, options.overrides))
    print(as_json(found) if options.json else as_yaml(found))
    return 0


def _schema(options: argparse.Namespace) -> int:
    from harness.json_schema import as_text, header

    if options.out is None:
        print(as_text(), end="")
        return 0
    from harness.files import write_atomic

    write_atomic(options.out, as_text().encode())
    print(f"{options.out} is written; a YAML file names it in its first line:")
    print(header(options.out))
    return 0


def _completion(options: argparse.Namespace) -> int:
    from harness.completion import script

    print(script(options.shell))
    return 0


def _request(kind: type[T], options: argparse.Namespace) -> T:
    """What a command was asked for: each field is the option of its name."""
    given = {field.name: getattr(options, field.name) for field in fields(kind)}
    return kind(**{n: tuple(v) if isinstance(v, list) else v for n, v in given.items()})


def _run(options: argparse.Namespace) -> int:
    from harness.progress import Unbreakable
    from launch.supervise import RunRequest, run

    with redirect_stdout(Unbreakable(sys.stdout)):
        return run(_request(RunRequest, options))


def _submit(options: argparse.Namespace) -> int:
    from launch.graph import SubmitRequest
    from launch.submit import submit

    return submit(_request(SubmitRequest, options))


def _bench(options: argparse.Namespace) -> int:
    from harness.progress import Unbreakable
    from launch.bench import BenchRequest, bench

    with redirect_stdout(Unbreakable(sys.stdout)):
        return bench(_request(BenchRequest, options))


def _study(options: argparse.Namespace) -> int:
    from harness.progress import Unbreakable
    from launch.study import StudyRequest, study

    with redirect_stdout(Unbreakable(sys.stdout)):
        return study(_request(StudyRequest, options))


def _probe(options: argparse.Namespace) -> int:
    from launch.probe import ProbeRequest, probe, read

    if options.read is not None:
        names = ("ranks", "hosts", "hostfile", "launcher", "out")
        if given := [f"--{name}" for name in names if getattr(options, name) is not None]:
            raise UsageError(f"--read measures nothing; leave out {', '.join(given)}")
        return read(options.read, options.gradients_mb)
    return probe(_request(ProbeRequest, options))


def _status(options: argparse.Namespace) -> int:
    from launch.status import print_status

    print_status(options.run_dir, options.json)
    return 0


def _watch(options: argparse.Namespace) -> int:
    from harness.watch import watch

    return watch(options.run_dir, options.once, options.interval)


def _train(options: argparse.Namespace) -> int:
    from harness.stop import StopRequest

    stop = StopRequest()
    stop.listen()  # before the imports, which take seconds
    from harness import pulse
    from harness.rundir import RunDirectory

    pulse.start(RunDirectory(options.run_dir).stacks)
    from harness.worker import train

    return train(options.config_path, options.overrides, options.run_dir, options.resume, stop)


def _report(options: argparse.Namespace) -> int:
    from harness.report import build_report

    print(build_report(options.run_dirs, options.out))
    return 0


def _trace(options: argparse.Namespace) -> int:
    from harness.trace_merge import merge_traces

    merged = merge_traces(options.run_dir, options.out)
    for problem in merged.problems:
        print(f"harness: {problem}", file=sys.stderr)
    print(merged)
    return 0


def _doctor(options: argparse.Namespace) -> int:
    from launch.doctor import DoctorRequest, doctor

    return doctor(_request(DoctorRequest, options))


def _recipes(options: argparse.Namespace) -> int:
    from harness import recipes

    if options.copy is not None:
        print("\n".join(map(str, recipes.copy(options.name, options.copy))))
    else:
        print(recipes.listing() if options.name is None else recipes.find(options.name))
    return 0


if __name__ == "__main__":
    sys.exit(main())
