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

    doctor = commands.add_parser(
        "doctor", help="what this machine can run, and what to do about the rest"
    )
    doctor.add_argument("--data", type=Path, metavar="DIR", help="look for data sets' files there")
    doctor.set_defaults(run=_doctor)
    return parser


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
    submit.set_defaults(run=_submit, sbatch=[])


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
    parser.add_argument("config_path", type=Path, metavar="CONFIG", help="YAML file of the run")
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
    from harness.records import RunDirectory

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
    from harness.doctor import doctor

    print(doctor(options.data))
    return 0


if __name__ == "__main__":
    sys.exit(main())
