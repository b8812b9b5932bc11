"""Goodput growth against fixed choices and AdaBatch on real ranks: time and rank-hours to accuracy.

    .venv/bin/python benchmarks/goodput_runs.py [--results runs/goodput] [--seeds 5] [--quick]

LeNet-5 on the digits, on one and on two Horovod ranks of this machine. First a bench, which the
policy reads; then blocks, one for each seed, in each of which every arm runs once, in random order:
fixed batches of 64, 256 and 1,024 on one and on two ranks, AdaBatch on both, goodput growth that
begins on one rank and may go on with two. What counts is the time of the updates up to the first
evaluation that reaches the target, as metrics.jsonl has it, and rank-hours; a start in the middle
of a run counts as time. Times are ratios to the fixed batch of 64 on one rank in the same block, as
the machine may do other things meanwhile.

A run that has finished is not run again. Writes goodput-runs.md, .csv and .svg of all whole blocks
to --out. 45 runs, about 15 minutes on two quiet cores; ``--quick`` is one seed and fewer arms.
"""

from __future__ import annotations

import argparse
import csv
import json
import math
import random
import statistics
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.figure import Figure

from harness.student import mean_interval

ROOT = Path(__file__).resolve().parents[1]
CONFIG = ROOT / "configs" / "adabatch-digits.yaml"
NAME = "goodput-runs"
TARGET = 0.96
EPOCHS = 20
REFERENCE = "fixed 64, 1 rank"

_COMMON = (
    "ranks.threads=1",
    f"train={{duration: {EPOCHS}ep, eval_every: 1ep, checkpoint_every: null, log_every: 5}}",
    "comm.compression=none",
)
_FIXED = ("batch.growth.policy=fixed", "lr.on_growth=1", "batch.max=null")
_ONE_RANK, _TWO_RANKS = ("ranks.start=1", "ranks.max=1"), ("ranks.start=2", "ranks.max=2")


def arms(bench: Path) -> dict[str, tuple[str, ...]]:
    """What each arm sets."""
    found: dict[str, tuple[str, ...]] = {}
    for ranks, where in (("1 rank", _ONE_RANK), ("2 ranks", _TWO_RANKS)):
        for batch in (64, 256, 1024):
            found[f"fixed {batch}, {ranks}"] = (*_FIXED, f"batch.initial={batch}", *where)
        found[f"AdaBatch, {ranks}"] = where
    growth = f"{{policy: goodput, throughput: [{bench}], limit: 4}}"
    found["goodput"] = (f"batch.growth={growth}", "lr.on_growth=1", "ranks.start=1", "ranks.max=2")
    return found


QUICK = (REFERENCE, "fixed 256, 2 ranks", "AdaBatch, 1 rank", "goodput")


@dataclass(frozen=True)
class Reached:
    """One run up to the evaluation that reached the target (or its end, if none did)."""

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


def command(*words: object) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "harness", *map(str, words)],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    if done.returncode:
        raise SystemExit(f"goodput_runs: {words}: {done.stdout[-2000:]}{done.stderr[-2000:]}")


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def finished(directory: Path) -> bool:
    events = directory / "events.jsonl"
    return events.exists() and any(one["kind"] == "end" for one in lines(events))


def run(directory: Path, seed: int, settings: Sequence[str]) -> None:
    if finished(directory):
        return
    place = ["--run-dir", directory, "--go-on"]
    command("run", CONFIG, f"seed={seed}", *_COMMON, *settings, "--hosts", "localhost:2", *place)


def read(directory: Path, seed: int, arm: str) -> Reached:
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
    table = {(one.seed, one.arm): one for one in runs if one.reached}
    found = []
    for seed in sorted({one.seed for one in runs}):
        own, base = table.get((seed, arm)), table.get((seed, REFERENCE))
        if own is not None and base is not None:
            values = [one.rank_seconds if cost else one.seconds + one.starts for one in (own, base)]
            found.append(math.log(values[0] / values[1]))
    return found


def told(logs: Sequence[float]) -> str:
    """A geometric mean with its 95 % interval."""
    if not logs:
        return "–"
    mean, low, high = mean_interval(logs)
    if low is None or high is None:
        return f"{math.exp(mean):.2f}"
    return f"{math.exp(mean):.2f} ({math.exp(low):.2f} to {math.exp(high):.2f})"


def page(runs: Sequence[Reached], names: Sequence[str], options: argparse.Namespace) -> str:
    seeds = sorted({one.seed for one in runs})
    rows = []
    for arm in names:
        own = [one for one in runs if one.arm == arm]
        hit = [one for one in own if one.reached]
        middle = [
            f"{statistics.median(values):,.0f}" if hit else "–"
            for values in ([one.epochs for one in hit], [one.updates for one in hit])
        ]
        ends = sorted({(one.last_ranks, one.last_batch) for one in hit})
        last = f"{ends[0][1]:,}" if ends and ends[0][1] == ends[-1][1] else "–"
        if ends and last == "–":
            batches = [batch for _, batch in ends]
            last = f"{min(batches):,} to {max(batches):,}"
        ranks = " or ".join(str(count) for count in sorted({count for count, _ in ends})) or "–"
        accuracy = statistics.mean(100 * one.accuracy for one in own)
        rows.append(
            f"| {arm} | {len(hit)} of {len(own)} | {' | '.join(middle)} | {last} on {ranks} "
            f"| {told(ratios(runs, arm, False))} | {told(ratios(runs, arm, True))} "
            f"| {accuracy:.2f} |"
        )
    return "\n".join([
        "# Goodput growth on real ranks",
        "",
        "LeNet-5 on scikit-learn's digits, one and two Horovod ranks with one thread each. Fixed",
        "batches, AdaBatch (64, doubled every 5 epochs, rate / batch × 0.7 each time) and growth",
        "by [goodput](../schedules.md#growth-by-goodput) from one rank; the rate follows the batch",
        f"linearly. How long to {TARGET:.0%} of the 360 test images, evaluated once an epoch, in",
        f"at most {EPOCHS} epochs?",
        "",
        f"    {options.command}",
        "",
        "**The machine was shared**: two cores that other jobs load at the same time, so seconds",
        "mean nothing by themselves. Each seed is a block in which every arm runs once, in random",
        "order; times are ratios to the fixed batch of 64 on one rank in the same block, geometric",
        f"means over {len(seeds)} blocks with 95 % intervals (Student's t of logarithms; load that",
        "changes within a block widens them). Epochs, updates and accuracy do not depend on the",
        "load.",
        "",
        "| arm | reached | epochs | updates | batch on ranks, then | time | rank-hours "
        "| accuracy at the end, % |",
        "|---|---|---|---|---|---|---|---|",
        *rows,
        "",
        f"![Time and rank-hours to {TARGET:.0%}, over those of the reference]({NAME}.svg)",
        "",
        *findings(runs, names),
        "",
        f"Every run: [{NAME}.csv]({NAME}.csv). How it is at thousands of ranks: "
        "[goodput.md](goodput.md).",
        "",
    ])  # fmt: skip


def findings(runs: Sequence[Reached], names: Sequence[str]) -> list[str]:
    """What the figures say of goodput against each other arm, in words that follow from them."""
    found = []
    for cost, what in ((False, "time"), (True, "rank-hours")):
        less: list[str] = []
        more: list[str] = []
        open_: list[str] = []
        own = dict(enumerate(ratios(runs, "goodput", cost)))
        for arm in names:
            if arm == "goodput":
                continue
            other = ratios(runs, arm, cost)
            if len(other) != len(own) or len(other) < 2:
                open_.append(arm)
                continue
            _, low, high = mean_interval([own[i] - value for i, value in enumerate(other)])
            (less if (high or 0) < 0 else more if (low or 0) > 0 else open_).append(arm)
        parts = [
            f"{verb} {', '.join(group)}"
            for verb, group in (
                ("less than", less), ("more than", more), ("not to be told apart from", open_)
            )
            if group
        ]  # fmt: skip
        found.append(f"- Goodput took, in {what}: {'; '.join(parts)} (paired by block, 95 %).")
    ends = {one.last_ranks for one in runs if one.arm == "goodput"}
    found.append(
        "- Goodput stayed on one rank: the second was not worth its start, or not faster, by what "
        "the bench had measured."
        if ends == {1}
        else "- Goodput went on with two ranks in "
        f"{sum(one.last_ranks == 2 for one in runs if one.arm == 'goodput')} of "
        f"{sum(one.arm == 'goodput' for one in runs)} runs."
    )
    return found


def draw(runs: Sequence[Reached], names: Sequence[str], path: Path) -> None:
    mpl.rcParams.update({"svg.fonttype": "none", "svg.hashsalt": NAME, "font.size": 9})
    figure = Figure(figsize=(7.5, 4.2), layout="constrained")
    for axes, cost, title in zip(
        figure.subplots(1, 2, sharey=True), (False, True), ("time", "rank-hours"), strict=True
    ):
        for place, arm in enumerate(reversed(names)):
            logs = ratios(runs, arm, cost)
            if not logs:
                continue
            mean, low, high = mean_interval(logs)
            axes.plot([math.exp(v) for v in logs], [place] * len(logs), ".", color="#9aa0a6", ms=4)
            if low is not None and high is not None:
                axes.plot([math.exp(low), math.exp(high)], [place] * 2, color="#0072b2")
            axes.plot(
                math.exp(mean), place, "o", color="#d55e00" if arm == "goodput" else "#0072b2"
            )
        axes.set_xscale("log")
        axes.axvline(1, color="#d5d9de", zorder=0)
        axes.set_xlabel(f"{title} over {REFERENCE}")
        axes.set_yticks(range(len(names)), list(reversed(names)))
    figure.savefig(path, metadata={"Date": None})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--results", type=Path, default=ROOT / "runs" / "goodput-runs")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--quick", action="store_true", help="one seed, four arms, to --results")
    parser.add_argument("--page-only", action="store_true", help="run nothing")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    options.command = ".venv/bin/python benchmarks/goodput_runs.py" + " --quick" * options.quick
    results = options.results.resolve()
    results.mkdir(parents=True, exist_ok=True)
    bench = results / "bench"
    settings = arms(bench)
    names = [arm for arm in settings if not options.quick or arm in QUICK]
    if not options.page_only:
        measure = ("1", "2") if options.quick else ("3", "3")
        command(
            "bench", CONFIG, "comm.compression=none", "--ranks", "1,2", "--accumulation", "2,8",
            "--repeats", measure[0], "--seconds", measure[1], "-o", bench,
        )  # fmt: skip
        for seed in range(1 if options.quick else options.seeds):
            order = random.Random(seed).sample(names, len(names))  # noqa: S311
            for arm in order:
                run(results / f"seed-{seed}" / arm.replace(", ", "-").replace(" ", "-"), seed,
                    settings[arm])  # fmt: skip
                print(f"seed {seed}: {arm}", file=sys.stderr, flush=True)
    blocks = [seed for seed in range(options.seeds) if all(
        finished(results / f"seed-{seed}" / arm.replace(", ", "-").replace(" ", "-"))
        for arm in names
    )]  # fmt: skip
    runs = [
        read(results / f"seed-{seed}" / arm.replace(", ", "-").replace(" ", "-"), seed, arm)
        for seed in blocks
        for arm in names
    ]
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
