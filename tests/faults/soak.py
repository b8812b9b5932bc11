"""A long run that grows, and whose processes are killed at random: does anything pile up?

Memory, file descriptors and threads of the launching process and of the ranks are read every few
seconds; what counts is their slope over time, with an interval. A launch of the ranks has its own
level, so that only what grows within launches counts. At the end the records must be those of a run
that nobody disturbed, and so must the weights.
"""

from __future__ import annotations

import json
import math
import shutil
import signal
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from random import Random
from typing import Any

import psutil
from jobs import Job, attempts, events, identical, last_state, run_arguments, weights

from faults.scene import is_mpirun, is_rank, prepare, told, undisturbed, write_plan
from harness.jsonl import read_object, write_json
from harness.student import student_quantile

FILE = "soak.json"
SAMPLES = "samples.jsonl"
PAUSE = 0.02
"""Seconds that each training pass takes more, which leaves the machine to others."""
SETTLING = 20.0
"""Seconds of training in which a rank's memory still finds its level: they do not count."""
_EVERY = 2.0  # seconds between two looks
_BLOCKS = 20  # into which the launcher's time is cut: neighbouring looks tell the same
_LEAST = 8  # ranks, by whose differences the interval is told
_KINDS = ("rss_mib", "uss_mib", "fds", "threads")


@dataclass(frozen=True)
class Look:
    """What a process had at a time."""

    seconds: float
    """Since the soak began."""
    who: str
    """launcher, or rank."""
    pid: int
    settled: bool
    """Whether it has been at work for a while."""
    rss_mib: float
    uss_mib: float
    """Memory that it shares with nobody."""
    fds: int
    threads: int


@dataclass(frozen=True)
class Slope:
    """Growth per hour, with a 95 % interval; None: too little was seen to tell."""

    per_hour: float | None
    low: float | None
    high: float | None

    @property
    def flat(self) -> bool:
        """Whether nothing says that it grows."""
        return self.low is None or self.low <= 0


def settings(minutes: float) -> tuple[str, ...]:
    """Of a run that grows twice in the first third of the time, and has no end of its own."""
    stage = max(60, int(minutes * 60 * 20 / 6))  # updates; some 20 a second
    return (
        "model.name=planted:net",
        "data={dataset: synthetic, size: 350, image_size: 8, channels: 1, classes: 10}",
        "comm={compression: none, summation: exact}",
        "batch={initial: 12, max: 48, micro: 12, growth: {policy: geometric, "
        f"every: {stage}up}}}}",
        "ranks={start: 1, max: 2, threads: 1, restart_seconds: 0}",
        "lr.warmup=null",  # of which the end of the run is no part
        "train={duration: 100000000up, checkpoint_every: 100up, eval_every: 1000up, log_every: 20}",
        "launch.restart_pause=0",
    )


def run(
    out: Path, minutes: float, between: float, seed: int, say: Callable[[str], None] = print
) -> dict[str, Any]:
    """Run for so many minutes, or until Ctrl-C, with a fault every ``between`` seconds in the mean;
    the result."""
    shutil.rmtree(out / "soak", ignore_errors=True)
    folder = out / "soak"
    prepare(folder)
    write_plan(folder, moment=None, rank=0, update=0, pause=PAUSE)
    run_dir = folder / "run"
    words = run_arguments(run_dir, None, *settings(minutes), restarts=10**6)
    faults: list[str] = []
    begun = time.monotonic()
    with Job(run_dir, *words, "--launcher", "mpirun", cwd=folder) as job:
        over = threading.Event()
        looker = threading.Thread(target=_look_on, args=(job, out / SAMPLES, over))
        looker.start()
        try:
            with suppress(KeyboardInterrupt):  # it ends early, and is judged all the same
                _disturb(job, begun + 60 * minutes, between, Random(seed), faults, say)
            job.process.send_signal(signal.SIGTERM)
            code, output = job.finish(600)
        finally:
            over.set()
            looker.join()
    looks = load(out / SAMPLES)
    result = {
        "minutes": (time.monotonic() - begun) / 60,
        "date": time.strftime("%Y-%m-%d", time.gmtime()),
        "exit_code": code,
        "faults": {name: faults.count(name) for name in sorted(set(faults))},
        "launches": attempts(run_dir),
        "updates": last_state(run_dir)["update"],
        "repeated": sum(event["updates_repeated"] for event in events(run_dir, "resume")),
        "ranks": sorted(
            {e["ranks"] for e in [*events(run_dir, "resume"), *events(run_dir, "start")]}
        ),
        "slopes": {
            who: {kind: asdict(slope(looks, who, kind)) for kind in _KINDS}
            for who in ("launcher", "rank")
        },
        "levels": {
            who: {kind: _level(looks, who, kind) for kind in _KINDS} for who in ("launcher", "rank")
        },
        "problems": [],
    }
    if code != 75:
        result["problems"].append(f"exit code {code}: {output[-1000:]}")
    result["problems"] += _compare(folder, minutes, result["updates"], say)
    write_json(out / FILE, result)
    return result


def _disturb(
    job: Job,
    end: float,
    between: float,
    random: Random,
    faults: list[str],
    say: Callable[[str], None],
) -> None:
    """Kill ranks, or what started them, until the end; raises RuntimeError if it comes too soon."""
    after, before = time.monotonic() + between, ""
    while (left := end - time.monotonic()) > 0:
        if job.process.poll() is not None:
            raise RuntimeError(f"the run ended by itself: {job.finish()}")
        time.sleep(min(0.2, left))
        # Three launches in a row without a checkpoint of their own would be a crash loop.
        newest = max(
            (path.name for path in job.run_dir.glob("checkpoints/update-*.pt")), default=""
        )
        if time.monotonic() < after or newest == before:
            continue
        after, before = time.monotonic() + random.expovariate(1 / between), newest
        below = psutil.Process(job.process.pid).children(recursive=True)
        ranks = [one for one in below if is_rank(one)]
        whom = random.choice(("a rank", "all ranks", "mpirun"))
        mpiruns = [one for one in below if is_mpirun(one)]
        chosen = {"a rank": [random.choice(ranks)] if ranks else [], "all ranks": ranks,
                  "mpirun": mpiruns}[whom]  # fmt: skip
        for process in chosen:
            with suppress(psutil.NoSuchProcess):
                process.kill()
        if chosen:
            faults.append(f"SIGKILL to {whom}")
            say(f"{(end - time.monotonic()) / 60:.1f} min left: killed {whom}")


def _look_on(job: Job, path: Path, over: threading.Event) -> None:
    """Write down what the run's processes have, until it is over."""
    begun = time.monotonic()
    launcher = psutil.Process(job.process.pid)
    launches, since = 0, time.time()
    with path.open("w", encoding="utf-8") as file:
        while not over.wait(_EVERY):
            begun_now = attempts(job.run_dir)
            if begun_now != launches:
                launches, since = begun_now, time.time()
            try:
                processes = [("launcher", launcher)]
                below = launcher.children(recursive=True)
                processes += [("rank", one) for one in below if is_rank(one)]
            except psutil.Error:
                return
            for who, process in processes:
                try:
                    trains = who == "launcher" or process.create_time() < since
                    settled = launches > 0 and trains and time.time() - since > SETTLING
                    look = _look(time.monotonic() - begun, who, process, settled)
                except (psutil.Error, OSError):
                    continue  # it has just gone
                file.write(json.dumps(asdict(look)) + "\n")
            file.flush()


def _look(seconds: float, who: str, process: psutil.Process, settled: bool) -> Look:
    with process.oneshot():
        memory = process.memory_full_info()
        return Look(
            seconds=seconds,
            who=who,
            pid=process.pid,
            settled=settled,
            rss_mib=memory.rss / 2**20,
            uss_mib=memory.uss / 2**20,
            fds=process.num_fds(),
            threads=process.num_threads(),
        )


def load(path: Path) -> list[Look]:
    return [Look(**json.loads(line)) for line in path.read_text(encoding="utf-8").splitlines()]


def slope(looks: Sequence[Look], who: str, kind: str) -> Slope:
    """By how much a kind of thing grows in an hour.

    Of ranks, each process has a level of its own and the processes are what is independent: the
    slope is that of a regression with a constant for each, its variance is clustered by process
    (Liang and Zeger 1986), its interval Student's t with one degree less than processes. The
    launcher is one process: its time is cut into blocks, and theirs are the means that count.
    """
    chosen = [look for look in looks if look.who == who and look.settled]
    if who == "launcher":
        return _of_blocks([(look.seconds, float(getattr(look, kind))) for look in chosen])
    sums = []
    for pid in {look.pid for look in chosen}:
        points = [(one.seconds, float(getattr(one, kind))) for one in chosen if one.pid == pid]
        if len(points) > 3:
            sums.append(_squares(points[:-1]))  # the last one may be of a process in its end
    total = math.fsum(sxx for sxx, _ in sums)
    if len(sums) < _LEAST:
        return Slope(None, None, None)
    found = math.fsum(sxy for _, sxy in sums) / total
    scatter = math.fsum((sxy - found * sxx) ** 2 for sxx, sxy in sums)
    error = math.sqrt(scatter * len(sums) / (len(sums) - 1)) / total
    return _hourly(found, error * student_quantile(len(sums) - 1))


def _squares(points: Sequence[tuple[float, float]]) -> tuple[float, float]:
    """Σ(t − t̄)² and Σ(t − t̄)(y − ȳ)."""
    middle = math.fsum(t for t, _ in points) / len(points)
    mean = math.fsum(y for _, y in points) / len(points)
    return (
        math.fsum((t - middle) ** 2 for t, _ in points),
        math.fsum((t - middle) * (y - mean) for t, y in points),
    )


def _of_blocks(points: Sequence[tuple[float, float]]) -> Slope:
    size = len(points) // _BLOCKS
    if size == 0:
        return Slope(None, None, None)
    blocks = [points[i * size : (i + 1) * size] for i in range(_BLOCKS)]
    means = [
        (math.fsum(t for t, _ in block) / size, math.fsum(y for _, y in block) / size)
        for block in blocks
    ]
    sxx, sxy = _squares(means)
    found = sxy / sxx
    middle = math.fsum(t for t, _ in means) / _BLOCKS
    mean = math.fsum(y for _, y in means) / _BLOCKS
    rest = math.fsum((y - mean - found * (t - middle)) ** 2 for t, y in means)
    error = math.sqrt(rest / (_BLOCKS - 2) / sxx)
    return _hourly(found, error * student_quantile(_BLOCKS - 2))


def _hourly(found: float, half: float) -> Slope:
    return Slope(3600 * found, 3600 * (found - half), 3600 * (found + half))


def _level(looks: Sequence[Look], who: str, kind: str) -> list[float] | None:
    """Lowest and highest value, but for the last of each process, which may be in its end."""
    last = {look.pid: look for look in looks if look.who == who}
    values = [
        float(getattr(look, kind))
        for look in looks
        if look.who == who and look.settled and look is not last[look.pid]
    ]
    return [min(values), max(values)] if values else None


def _compare(folder: Path, minutes: float, updates: int, say: Callable[[str], None]) -> list[str]:
    """What is wrong with the records and weights, held against a run that nobody disturbs."""
    say(f"the same {updates} updates undisturbed, to compare")
    shutil.rmtree(folder.with_name("undisturbed-soak"), ignore_errors=True)
    reference = undisturbed(
        folder.with_name("undisturbed-soak"), (*settings(minutes), f"train.duration={updates}up")
    )
    ours, theirs = told(folder / "run"), told(reference)
    problems = []
    # A run that stops keeps its unfinished line for when it goes on; one that ends writes it.
    if theirs[: len(ours)] != ours or len(theirs) > len(ours) + 1:
        problems.append("metrics.jsonl differs from that of a run that nobody disturbed")
    if not identical(weights(folder / "run"), weights(reference)):
        problems.append("the final weights differ from those of a run that nobody disturbed")
    return problems


def table(result: dict[str, Any]) -> str:
    """Markdown: levels and slopes."""
    names = {
        "rss_mib": "resident memory, MiB",
        "uss_mib": "memory of its own, MiB",
        "fds": "file descriptors",
        "threads": "threads",
    }
    lines = ["| what | of | lowest to highest | growth in an hour (95 %) |", "|---|---|---|---|"]
    for kind, name in names.items():
        for who, shown_who in (("launcher", "`harness run`"), ("rank", "a rank")):
            level, found = result["levels"][who][kind], result["slopes"][who][kind]
            shown = "" if level is None else f"{level[0]:.1f} to {level[1]:.1f}"
            if found["per_hour"] is None:
                growth = "too short to tell"
            else:
                growth = f"{found['per_hour']:+.2f} ({found['low']:+.2f} to {found['high']:+.2f})"
            lines.append(f"| {name} | {shown_who} | {shown} | {growth} |")
    return "\n".join(lines)


def sentence(result: dict[str, Any]) -> str:
    """What was seen, in words."""
    faults = ", ".join(f"{count} × {name}" for name, count in result["faults"].items())
    problems = "; ".join(result["problems"]) or (
        "records complete, and the final weights those of an undisturbed run to the last bit"
    )
    ranks = " and ".join(map(str, result["ranks"]))
    return (
        f"{result['minutes']:.0f} minutes, {result['updates']:,} updates in {result['launches']} "
        f"launches on {ranks} ranks; {faults}; {result['repeated']:,} updates computed again; "
        f"{problems}."
    )


def read(out: Path) -> dict[str, Any] | None:
    """The last result; None: there is none."""
    return read_object(out / FILE)
