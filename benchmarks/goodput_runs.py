"""Goodput growth against fixed choices and AdaBatch on real ranks: time and rank-hours to accuracy.

    sudo .venv/bin/python benchmarks/goodput_runs.py [--rates 0,100mbit] [--seeds 4] [--quick]

LeNet-5 on the digits, on one and on two Horovod ranks, each on a test host of its own
(tests/testbed.py; root is needed) whose link has no limit or the given rate. On each link first a
bench, which the policy reads; then blocks, one for each seed, in each of which every arm runs once,
in random order: fixed batches of 32 to 256 and AdaBatch on one and on two ranks, and goodput growth
on two ranks and from one rank, with a second where its start pays. What counts is the time of the
updates up to the first evaluation that reaches the target, as metrics.jsonl has it, and rank-hours;
a start in the middle of a run counts as time. Times are ratios to the fixed batch of 32 on one rank
in the same block.

A run that has finished is not run again. Writes goodput-runs.md, .csv and .svg of all whole blocks
to --out. ``--quick`` is one seed and four arms on one link. 96 runs and two benches: 40 minutes.
"""

from __future__ import annotations

import argparse
import csv
import math
import os
import random
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator

from harness.jsonl import read_jsonl
from harness.student import mean_interval, ratio_text

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
CONFIG = ROOT / "configs" / "adabatch-digits.yaml"
NAME = "goodput-runs"
TARGET = 0.96
EPOCHS = 16
BATCHES = (32, 64, 128, 256)
REFERENCE = "fixed 32, 1 rank"
HOSTS = "n1:1,n2:1"

_COMMON = (
    "ranks.threads=1",
    "launch.interfaces=[eth0]",
    f"train={{duration: {EPOCHS}ep, eval_every: 1ep, checkpoint_every: null, log_every: 1}}",
    "comm.compression=none",
    "lr.base=0.02",
    "batch.micro=16",
    "batch.initial=32",
    "batch.max=256",
)
_FIXED = ("batch.growth={policy: fixed}", "lr.on_growth=1", "batch.max=null")
_ADABATCH = ("batch.growth={policy: geometric, factor: 2, every: 3ep}", "lr.on_growth=0.7")
_ONE_RANK, _TWO_RANKS = ("ranks.start=1", "ranks.max=1"), ("ranks.start=2", "ranks.max=2")


def arms(bench: Path) -> dict[str, tuple[str, ...]]:
    """What each arm sets."""
    found: dict[str, tuple[str, ...]] = {}
    for ranks, where in (("1 rank", _ONE_RANK), ("2 ranks", _TWO_RANKS)):
        for batch in BATCHES:
            found[f"fixed {batch}, {ranks}"] = (*_FIXED, f"batch.initial={batch}", *where)
        found[f"AdaBatch, {ranks}"] = (*_ADABATCH, *where)
    # Past the warmup, in which the noise scale is larger than it is for long after.
    growth = f"{{policy: goodput, throughput: [{bench}], wait: 2.5ep, dwell: 0.5ep, memory: 1ep}}"
    growing = (f"batch.growth={growth}", "batch.shrink=true", "lr.on_growth=1")
    found["goodput, 2 ranks"] = (*growing, *_TWO_RANKS)
    found["goodput, from 1 rank"] = (*growing, "ranks.start=1", "ranks.max=2")
    return found


GROWN = ("goodput, 2 ranks", "goodput, from 1 rank")
QUICK = (REFERENCE, "fixed 64, 2 ranks", "AdaBatch, 2 ranks", GROWN[0])


def link_name(rate: str) -> str:
    return "no limit" if rate == "0" else rate.replace("mbit", " Mbit/s").replace("gbit", " Gbit/s")


@dataclass(frozen=True)
class Reached:
    """One run up to the evaluation that reached the target (or its end, if none did)."""

    link: str
    seed: int
    arm: str
    reached: bool
    epochs: float
    updates: int
    seconds: float
    """Of the updates."""
    starts: float
    """Seconds of starts of the ranks in the middle of the run."""
    rank_seconds: float
    """Ranks × seconds, starts with them."""
    last_batch: int
    last_ranks: int
    accuracy: float
    """At the end of the run."""


Where = Callable[[Sequence[str]], list[str]]


def command(where: Where, *words: object) -> None:
    done = subprocess.run(
        where([sys.executable, "-m", "harness", *map(str, words)]),
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    if done.returncode:
        raise SystemExit(f"goodput_runs: {words}: {done.stdout[-2000:]}{done.stderr[-2000:]}")


def lines(path: Path) -> list[dict[str, Any]]:
    return [line for line in read_jsonl(path) if line]


def finished(directory: Path) -> bool:
    events = directory / "events.jsonl"
    return events.exists() and any(one["kind"] == "end" for one in lines(events))


def run(where: Where, directory: Path, seed: int, settings: Sequence[str]) -> None:
    if finished(directory):
        return
    place = ["--run-dir", directory, "--go-on"]
    command(where, "run", CONFIG, f"seed={seed}", *_COMMON, *settings, "--hosts", HOSTS, *place)


def read(directory: Path, link: str, seed: int, arm: str) -> Reached:
    events, metrics = lines(directory / "events.jsonl"), lines(directory / "metrics.jsonl")
    evaluations = [one for one in events if one["kind"] == "evaluation"]
    hits = [one for one in evaluations if one["accuracy"] >= TARGET]
    at = hits[0] if hits else evaluations[-1]
    samples, seconds, rank_seconds, last = 0, 0.0, 0.0, metrics[0]
    for line in metrics:
        if line["samples_seen"] > at["samples_seen"]:
            break
        spent = (line["samples_seen"] - samples) / line["images_per_sec"]
        samples, last = line["samples_seen"], line
        seconds += spent
        rank_seconds += spent * line["ranks"]
    again = [
        one for one in events
        if one["kind"] == "resume" and one["samples_seen"] < at["samples_seen"]
    ]  # fmt: skip
    starts = sum(one["start_seconds"] or 0.0 for one in again)
    return Reached(
        link=link,
        seed=seed,
        arm=arm,
        reached=bool(hits),
        epochs=at["epoch"],
        updates=at["update"],
        seconds=seconds,
        starts=starts,
        rank_seconds=rank_seconds
        + sum((one["start_seconds"] or 0.0) * one["ranks"] for one in again),
        last_batch=last["global_batch"],
        last_ranks=last["ranks"],
        accuracy=evaluations[-1]["accuracy"],
    )


# The page


def ratios(runs: Sequence[Reached], arm: str, cost: bool) -> list[float]:
    """log of an arm's time, or rank-time, over the reference's, of the seeds where both arrived."""
    return paired(runs, arm, REFERENCE, cost)


def paired(runs: Sequence[Reached], arm: str, other: str, cost: bool) -> list[float]:
    """The same over those of any other arm."""
    table = {(one.seed, one.arm): one for one in runs if one.reached}
    found = []
    for seed in sorted({one.seed for one in runs}):
        own, base = table.get((seed, arm)), table.get((seed, other))
        if own is not None and base is not None:
            values = [one.rank_seconds if cost else one.seconds + one.starts for one in (own, base)]
            found.append(math.log(values[0] / values[1]))
    return found


def told(logs: Sequence[float]) -> str:
    """A geometric mean with its 95 % interval."""
    return ratio_text(logs) if logs else "–"


def page(runs: Sequence[Reached], names: Sequence[str], options: argparse.Namespace) -> str:
    links = list(dict.fromkeys(one.link for one in runs))
    text = [
        "# Goodput growth on real ranks",
        "",
        "LeNet-5 on scikit-learn's digits, one and two Horovod ranks with one thread each, each on",
        "a test host of its own. Fixed batches, AdaBatch (32, doubled every 3 epochs to 256,",
        "rate / batch × 0.7 each time) and growth by",
        "[goodput](../schedules.md#growth-by-goodput), which may shrink the batch too; the rate",
        "follows the batch linearly, momentum is 0.9, and gradients travel as they are, in fp32.",
        f"How long to {TARGET:.0%} of the 360 test images, evaluated once an epoch, in at most",
        f"{EPOCHS} epochs?",
        "",
        f"    {options.command}",
        "",
        "Each seed is a block in which every arm runs once, in random order; times are ratios to",
        f"the {REFERENCE} of the same block, geometric means with 95 % intervals (Student's t of",
        "logarithms) over the seeds in which both reached the target. Evaluations do not count; a",
        "start in the middle of a run does.",
        "",
    ]
    for link in links:
        own = [one for one in runs if one.link == link]
        text += [f"## Link: {link}", "", *table(own, names), "", *findings(own, names), ""]
    return "\n".join([
        *text,
        "## Figure",
        "",
        f"![Time and rank-hours to {TARGET:.0%}, over those of the reference]({NAME}.svg)",
        "",
        f"Every run: [{NAME}.csv]({NAME}.csv). How it is at thousands of ranks: "
        "[goodput.md](goodput.md).",
        "",
    ])  # fmt: skip


def table(runs: Sequence[Reached], names: Sequence[str]) -> list[str]:
    """Of one link: a row for each arm."""
    rows = [
        "| arm | reached | epochs | updates | batch on ranks, then | time | rank-hours "
        "| accuracy at the end, % |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for arm in names:
        own = [one for one in runs if one.arm == arm]
        hit = [one for one in own if one.reached]
        middle = [
            f"{statistics.median(values):,.0f}" if hit else "–"
            for values in ([one.epochs for one in hit], [one.updates for one in hit])
        ]
        ends = sorted({(one.last_ranks, one.last_batch) for one in hit})
        batches = sorted({batch for _, batch in ends})
        last = " to ".join(f"{batch:,}" for batch in dict.fromkeys([*batches[:1], *batches[-1:]]))
        ranks = " or ".join(str(count) for count in sorted({count for count, _ in ends}))
        where = f"{last} on {ranks}" if ends else "–"
        accuracy = statistics.mean(100 * one.accuracy for one in own)
        rows.append(
            f"| {arm} | {len(hit)} of {len(own)} | {' | '.join(middle)} | {where} "
            f"| {told(ratios(runs, arm, False))} | {told(ratios(runs, arm, True))} "
            f"| {accuracy:.2f} |"
        )
    return rows


def findings(runs: Sequence[Reached], names: Sequence[str]) -> list[str]:
    """What the figures say of goodput against each other arm, in words that follow from them."""
    found = []
    for grown in (arm for arm in names if arm in GROWN):
        for cost, what in ((False, "time"), (True, "rank-hours")):
            groups: dict[str, list[str]] = {
                "less than": [], "more than": [], "not to be told apart from": [],
                "not compared, as neither or one of them reached the target, with": [],
            }  # fmt: skip
            less, more, alike, lost = groups.values()
            for arm in names:
                if arm == grown:
                    continue
                logs = paired(runs, grown, arm, cost)
                if not logs:
                    lost.append(arm)
                    continue
                _, low, high = mean_interval(logs)
                if low is None or high is None or low <= 0 <= high:
                    alike.append(arm)
                else:
                    (less if high < 0 else more).append(arm)
            parts = [f"{verb} {', '.join(group)}" for verb, group in groups.items() if group]
            found.append(f"- {grown}, {what}: {'; '.join(parts)} (paired by block, 95 %).")
    own = [one for one in runs if one.arm == GROWN[1]]
    if own:
        found.append(
            f"- From one rank, goodput went on with two in {sum(o.last_ranks == 2 for o in own)} "
            f"of {len(own)} runs; else it did not ask for them, or a start took longer than they "
            "saved."
        )
    return found


def draw(runs: Sequence[Reached], names: Sequence[str], path: Path) -> None:
    mpl.rcParams.update({"svg.fonttype": "none", "svg.hashsalt": NAME, "font.size": 9})
    links = list(dict.fromkeys(one.link for one in runs))
    figure = Figure(figsize=(7.5, 0.7 + 2.9 * len(links)), layout="constrained")
    grid = figure.subplots(len(links), 2, sharey=True, sharex="col", squeeze=False)
    for row, link in zip(grid, links, strict=True):
        own = [one for one in runs if one.link == link]
        for axes, cost, title in zip(row, (False, True), ("time", "rank-hours"), strict=True):
            for place, arm in enumerate(reversed(names)):
                logs = ratios(own, arm, cost)
                if not logs:
                    continue
                mean, low, high = mean_interval(logs)
                axes.plot([math.exp(v) for v in logs], [place] * len(logs), ".", color="#9aa0a6",
                          ms=4)  # fmt: skip
                if low is not None and high is not None:
                    axes.plot([math.exp(low), math.exp(high)], [place] * 2, color="#0072b2")
                axes.plot(
                    math.exp(mean), place, "o", color="#d55e00" if arm in GROWN else "#0072b2"
                )
            axes.set_xscale("log")
            axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            axes.xaxis.set_major_formatter("{x:g}")
            axes.xaxis.set_minor_formatter("")
            axes.axvline(1, color="#d5d9de", zorder=0)
            axes.set_title(f"{title}, link: {link}", fontsize=9)
            axes.set_yticks(range(len(names)), list(reversed(names)))
    for axes in grid[-1]:
        axes.set_xlabel(f"over {REFERENCE}")
    figure.savefig(path, metadata={"Date": None})


def measure(rate: str, results: Path, names: Sequence[str], seeds: int, quick: bool) -> None:
    """The bench and the blocks of one link; what is there already is not measured again."""
    from testbed import Testbed

    bench, settings = results / "bench", arms(results / "bench")
    repeats, seconds = ("1", "2") if quick else ("5", "3")
    limit = {} if rate == "0" else {"rate": rate}
    with tempfile.TemporaryDirectory() as folder, Testbed(2, Path(folder), **limit) as bed:

        def where(words: Sequence[str]) -> list[str]:
            return bed.on("n1", words)

        command(
            where, "bench", CONFIG, "comm.compression=none", "batch.micro=16", "batch.initial=32",
            "launch.interfaces=[eth0]", "--ranks", "1,2", "--accumulation", "1,2,8",
            "--repeats", repeats, "--seconds", seconds, "--hosts", HOSTS, "-o", bench,
        )  # fmt: skip
        for seed in range(seeds):
            order = random.Random(seed).sample(names, len(names))  # noqa: S311
            for arm in order:
                run(where, place(results, seed, arm), seed, settings[arm])
                print(f"{link_name(rate)}, seed {seed}: {arm}", file=sys.stderr, flush=True)


def place(results: Path, seed: int, arm: str) -> Path:
    return results / f"seed-{seed}" / arm.replace(", ", "-").replace(" ", "-")


def gathered(rate: str, results: Path, names: Sequence[str], seeds: int) -> list[Reached]:
    """Of the blocks that are whole."""
    blocks = [
        seed for seed in range(seeds) if all(finished(place(results, seed, arm)) for arm in names)
    ]
    return [
        read(place(results, seed, arm), link_name(rate), seed, arm)
        for seed in blocks
        for arm in names
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--results", type=Path, default=ROOT / "runs" / "goodput-runs")
    parser.add_argument("--rates", default="0,100mbit", help="of the links; 0: no limit")
    parser.add_argument("--seeds", type=int, default=4)
    parser.add_argument("--quick", action="store_true", help="one seed, four arms, to --results")
    parser.add_argument("--page-only", action="store_true", help="run nothing")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    options.command = (
        "sudo .venv/bin/python benchmarks/goodput_runs.py" + " --quick" * options.quick
    )
    os.environ.update({"OMP_NUM_THREADS": "1"})
    rates = options.rates.split(",")[-1:] if options.quick else options.rates.split(",")
    seeds = 1 if options.quick else options.seeds
    names = [arm for arm in arms(Path()) if not options.quick or arm in QUICK]
    results = options.results.resolve()
    runs = []
    for rate in rates:
        folder = results / f"link-{rate}"
        folder.mkdir(parents=True, exist_ok=True)
        if not options.page_only:
            from testbed import missing_for_testbed

            reason = missing_for_testbed()
            if reason is not None:
                raise SystemExit(f"goodput_runs: {reason}")
            measure(rate, folder, names, seeds, options.quick)
        runs += gathered(rate, folder, names, seeds)
    if not runs:
        raise SystemExit("goodput_runs: no block is whole yet")
    out = options.out or (results if options.quick else ROOT / "docs" / "studies")
    out.mkdir(parents=True, exist_ok=True)
    with (out / f"{NAME}.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(asdict(runs[0])), lineterminator="\n")
        writer.writeheader()
        for one in runs:
            row = asdict(one)
            writer.writerow({k: f"{v:.6g}" if isinstance(v, float) else v for k, v in row.items()})
    draw(runs, names, out / f"{NAME}.svg")
    text = page(runs, names, options)
    (out / f"{NAME}.md").write_text(text, encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
