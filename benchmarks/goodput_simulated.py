"""Goodput growth against every fixed choice and AdaBatch on clusters that are not there.

    .venv/bin/python benchmarks/goodput_simulated.py [--out docs/studies] [--seeds 10]

Time and rank-hours that 90 epochs' worth of progress on 1.28 million samples take on up to 4,096
ranks. The policy is the harness's own, driven through its ``StageScheduler`` by simulated estimates
of the noise scale; the time of an update is the step-time model, whose coefficients the policy
knows only with an error; what a sample is worth follows McCandlish et al. 2018 (equation 2.12).

In each seed are drawn: the level of the noise scale, the error of every estimate of it, and how far
each of the policy's coefficients is off. Writes goodput.csv, goodput.svg and goodput.md, whose
words follow from the figures. A minute on one core.
"""

from __future__ import annotations

import argparse
import csv
import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import matplotlib as mpl
import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from harness.scaling.goodput import MeasuredNoise, NoiseAt, Speed, recommended_growth
from harness.schedule.choices import Choice, UpdateTime, rank_counts, statistical_efficiency
from harness.schedule.clock import Clock
from harness.schedule.goodput import Goodput, Objective, Options
from harness.schedule.growth import Geometric, Observation, StageScheduler
from harness.student import ratio_text
from harness.units import Duration

ROOT = Path(__file__).resolve().parents[1]
NAME = "goodput"
SIZE, EPOCHS = 1_281_167, 90
MICRO, NODE, MOST, CAP = 32, 8, 4096, 131_072
INITIAL = MICRO * NODE
"""The first batch, and the one whose samples count as progress: a micro-batch on each rank of a
node."""
PROGRESS = float(SIZE * EPOCHS)
RESTART = 60.0
"""Seconds of a start with more ranks."""

# Medians of the noise scale in twelfths of a run's progress, in samples, as measured:
#   harness train configs/adabatch-digits.yaml batch.growth.policy=fixed lr.on_growth=1
#     ranks.start=1 comm.compression=none
# and harness.scaling.goodput.noise_over_run(windows, 64, 12).
MEASURED = (176, 67, 63, 84, 115, 84, 147, 156, 113, 238, 130, 180)
_PLACES = (np.arange(len(MEASURED)) + 0.5) / len(MEASURED) * PROGRESS
_LOGS = np.log(MEASURED)
LEVELS = {"low noise": 4.0, "high noise": 64.0}
"""What the measured scale is multiplied with for tasks on a million samples."""

# Inside a node as measured between two ranks of one host (benchmarks/README.md: 343 µs for 4 bytes,
# 6,754 µs for 16 MiB); between nodes and compute as supposed of usual machines.
FAST = UpdateTime(
    per_image=1 / 400, fixed=4e-3, jitter=0.01, gamma=2.0, gradient_bytes=1.02e8, buckets=4,
    within_latency=1.7e-4, within_seconds_per_byte=3.8e-10,
    between_latency=5e-6, between_seconds_per_byte=8e-11, ranks_per_node=NODE,
)  # fmt: skip
CLUSTERS = {
    "100 Gbit/s": FAST,
    "10 Gbit/s": replace(FAST, between_latency=5e-5, between_seconds_per_byte=8e-10),
}
_COEFFICIENTS = (
    "per_image", "fixed", "within_latency", "within_seconds_per_byte", "between_latency",
    "between_seconds_per_byte",
)  # fmt: skip


@dataclass(frozen=True)
class World:
    """One seed of one cluster and task."""

    seed: int
    cluster: str
    task: str
    truth: UpdateTime
    believed: UpdateTime
    level: float

    def noise(self, progress: float) -> float:
        """The noise scale after so much progress."""
        return self.level * math.exp(float(np.interp(progress, _PLACES, _LOGS)))

    def speed(self, ranks: int, batch: int) -> float:
        """Images per second."""
        pieces = -(-batch // MICRO)
        return batch / self.truth.seconds(ranks, -(-pieces // ranks), MICRO)


@dataclass(frozen=True)
class Outcome:
    seed: int
    cluster: str
    task: str
    arm: str
    hours: float
    rank_hours: float
    samples: float
    starts: int
    last_batch: int
    last_ranks: int


def worlds(seeds: int) -> list[World]:
    found = []
    for cluster, times in CLUSTERS.items():
        for task, level in LEVELS.items():
            for seed in range(seeds):
                draw = random.Random(f"{cluster} {task} {seed}")  # noqa: S311
                off = {
                    name: getattr(times, name) * math.exp(draw.gauss(0, 0.15))
                    for name in _COEFFICIENTS
                }
                drawn = level * math.exp(draw.gauss(0, 0.3))
                found.append(World(seed, cluster, task, times, replace(times, **off), drawn))
    return found


# The arms


def fixed(world: World, ranks: int, batch: int) -> Outcome:
    steps = 120
    cost = sum(
        1 / statistical_efficiency(batch, world.noise(PROGRESS * (k + 0.5) / steps), INITIAL)
        for k in range(steps)
    )
    samples = PROGRESS * cost / steps
    hours = samples / world.speed(ranks, batch) / 3600
    return Outcome(
        world.seed, world.cluster, world.task, f"fixed {ranks:,} × {batch // ranks // MICRO}",
        hours, hours * ranks, samples, 0, batch, ranks,
    )  # fmt: skip


def every_fixed(world: World) -> list[Outcome]:
    ranks = [NODE << k for k in range(10) if NODE << k <= MOST]
    return [
        fixed(world, count, count * steps * MICRO)
        for count in ranks
        for steps in (1, 2, 4, 8, 16)
        if count * steps * MICRO <= CAP
    ]


def run(
    world: World,
    arm: str,
    scheduler: StageScheduler,
    dwell: Duration,
    ranks_of: Callable[[int, int | None], int],
) -> Outcome:
    """Follow a schedule to the end of the progress, a dwell at a time."""
    draw = random.Random(f"estimates of {world.cluster} {world.task} {world.seed}")  # noqa: S311
    shortest, ranks = dwell.boundary(1, SIZE), NODE
    progress = seconds = rank_seconds = 0.0
    samples, updates, starts = 0, 0, 0
    while progress < PROGRESS:
        stretch = max(shortest, samples // 50)
        decision = scheduler.decide(Clock(samples, updates, SIZE))
        batch, wanted = decision.batch, ranks_of(decision.batch, decision.ranks)
        scale = world.noise(progress)
        worth = statistical_efficiency(batch, scale, INITIAL)
        if wanted > ranks:
            left = (PROGRESS - progress) / worth
            saved = left / world.speed(ranks, batch) - left / world.speed(wanted, batch)
            if saved > RESTART:
                seconds, rank_seconds = seconds + RESTART, rank_seconds + RESTART * wanted
                ranks, starts = wanted, starts + 1
        taken = min(float(stretch), (PROGRESS - progress) / worth)
        spent = taken / world.speed(ranks, batch)
        seconds, rank_seconds = seconds + spent, rank_seconds + spent * ranks
        progress += taken * worth
        for _ in range(4):
            samples, updates = samples + stretch // 4, updates + max(1, stretch // 4 // batch)
            # What an estimate scatters by: more updates of larger batches tell more of ‖G‖².
            terms = (scale * math.exp(draw.gauss(0, 0.1)), math.exp(draw.gauss(0, 0.3)))
            seen = Observation(stretch // 4, 1.0, 1.0, terms)
            scheduler.observe(Clock(samples, updates, SIZE), seen)
        if progress > PROGRESS * (1 - 1e-12):
            break
    return Outcome(
        world.seed, world.cluster, world.task, arm, seconds / 3600, rank_seconds / 3600,
        float(samples), starts, batch, ranks,
    )  # fmt: skip


def adabatch(world: World, factor: float, every: int, cap: int) -> Outcome:
    """Ranks grow with the batch, a micro-batch on each."""
    policy = Geometric(INITIAL, factor, Duration.parse(f"{every}ep"))
    return run(
        world,
        f"AdaBatch × {factor:g} every {every} epochs to {cap:,}",
        StageScheduler(policy, cap),
        Duration.parse("0.5ep"),
        lambda batch, _: min(MOST, batch // MICRO),
    )


def goodput(world: World, arm: str, objective: Objective, efficiency: float = 0.5) -> Outcome:
    ranks = rank_counts(NODE, MOST, NODE)
    options = Options(INITIAL, MICRO, world.believed, ranks, CAP)
    dwell = Duration.parse("0.1ep")
    policy = Goodput(INITIAL, options, objective, efficiency, limit=4.0, dwell=dwell)
    return run(world, arm, StageScheduler(policy, CAP), dwell, lambda _, wanted: wanted or NODE)


def hindsight(world: World) -> Outcome:
    """The way through that is the fastest for one who knows all beforehand."""
    points = [
        NoiseAt(PROGRESS * k / 24, MeasuredNoise(world.noise(PROGRESS * (k + 0.5) / 24)))
        for k in range(24)
    ]
    asked = [
        Choice(count, count // NODE, steps, MICRO)
        for count in (NODE << k for k in range(10))
        for steps in (1, 2, 4, 8, 16)
        if count * steps * MICRO <= CAP
    ]

    def speeds(of: Sequence[Choice]) -> list[Speed | None]:
        return [Speed(world.speed(one.ranks, one.batch)) for one in of]

    found = recommended_growth(points, PROGRESS, asked, speeds, INITIAL, restart_seconds=RESTART)
    last = found.steps[-1].choice
    rank_hours = sum(one.seconds * one.choice.ranks for one in found.steps) / 3600
    return Outcome(
        world.seed, world.cluster, world.task, "in hindsight", found.seconds.value / 3600,
        rank_hours, math.nan, len(found.steps) - 1, last.batch, last.ranks,
    )  # fmt: skip


TIME, HALF, CHEAP = "goodput, time", "goodput, rank_hours 0.5", "goodput, rank_hours 0.8"
GOODPUT = (TIME, HALF, CHEAP)
ADABATCH = (
    *((2.0, 20, CAP), (2.0, 10, CAP), (4.0, 10, CAP), (8.0, 10, CAP)),
    *((2.0, 20, 8192), (2.0, 10, 8192), (4.0, 10, 8192), (8.0, 10, 8192)),
)


def outcomes(world: World) -> list[Outcome]:
    return [
        *every_fixed(world),
        *(adabatch(world, *settings) for settings in ADABATCH),
        goodput(world, TIME, "time"),
        goodput(world, HALF, "rank_hours", 0.5),
        goodput(world, CHEAP, "rank_hours", 0.8),
        hindsight(world),
    ]


# The page


Table = dict[tuple[str, int], Outcome]


def ratio(table: Table, arm: str, base: str, cost: bool) -> str:
    """Geometric mean over seeds of one arm's over another's, with its 95 % interval."""
    seeds = sorted({seed for _, seed in table})
    logs = [
        math.log(
            table[arm, seed].rank_hours / table[base, seed].rank_hours
            if cost
            else table[arm, seed].hours / table[base, seed].hours
        )
        for seed in seeds
    ]
    return ratio_text(logs)


def mean(table: Table, arm: str, cost: bool) -> float:
    values = [one.rank_hours if cost else one.hours for (name, _), one in table.items()
              if name == arm]  # fmt: skip
    return math.exp(math.fsum(map(math.log, values)) / len(values))


def section(found: Sequence[Outcome], cluster: str, task: str) -> list[str]:
    own = [one for one in found if (one.cluster, one.task) == (cluster, task)]
    table = {(one.arm, one.seed): one for one in own}
    arms = list(dict.fromkeys(one.arm for one in own))
    fixed_arms = [arm for arm in arms if arm.startswith("fixed")]
    soonest = min(fixed_arms, key=lambda arm: mean(table, arm, False))
    cheapest = min(fixed_arms, key=lambda arm: mean(table, arm, True))
    shown = [
        *dict.fromkeys([cheapest, soonest]),
        *(arm for arm in arms if not arm.startswith("fixed")),
    ]
    rows = []
    for arm in shown:
        last = [(one.last_batch, one.last_ranks) for one in own if one.arm == arm]
        batch, ranks = sorted(last)[len(last) // 2]
        label = arm + " (the fastest fixed)" * (arm == soonest)
        label += " (the cheapest fixed)" * (arm == cheapest)
        rows.append(
            f"| {label} | {mean(table, arm, False):,.2f} | {ratio(table, arm, soonest, False)} "
            f"| {mean(table, arm, True):,.0f} | {ratio(table, arm, cheapest, True)} "
            f"| {batch:,} on {ranks:,} |"
        )
    return [
        f"## {cluster} between nodes, {task}",
        "",
        "| arm (ranks × accumulation) | hours | over the fastest fixed | rank-hours "
        "| over the cheapest fixed | at the end |",
        "|---|---|---|---|---|---|",
        *rows,
        "",
        *(f"- {text}" for text in findings(table, arms, fixed_arms)),
        "",
    ]


def findings(table: Table, arms: Sequence[str], fixed_arms: Sequence[str]) -> list[str]:
    told = []
    schedules = [arm for arm in arms if arm.startswith("AdaBatch")]
    others = {"fixed choices": list(fixed_arms), "AdaBatch schedules": schedules}
    for arm in GOODPUT:
        time, cost = mean(table, arm, False), mean(table, arm, True)
        parts = []
        for kind, group in others.items():
            both = [(mean(table, one, False), mean(table, one, True)) for one in group]
            better = sum(time <= t and cost <= c for t, c in both)
            worse = [
                one for one, (t, c) in zip(group, both, strict=True) if t <= time and c <= cost
            ]
            faster = sum(t < time for t, _ in both)
            text = f"of {len(group)} {kind} it is better than {better} in both, {faster} are faster"
            if worse:
                text += f", {len(worse)} better in both ({', '.join(worse)})"
            parts.append(text)
        told.append(f"{arm}: {'; '.join(parts)}.")
    for kind, group in others.items():
        hours, costs = (
            sorted(mean(table, one, cost) / mean(table, TIME, cost) for one in group)
            for cost in (False, True)
        )
        told.append(
            f"The {kind} take {hours[0]:.2f} to {hours[-1]:.3g} times the hours of {TIME} (half of "
            f"them {hours[len(group) // 2]:.2f} or more) and {costs[0]:.2f} to {costs[-1]:.3g} "
            "times its rank-hours."
        )
    told.append(
        f"Against the fastest way in hindsight {TIME} takes {ratio(table, TIME, HINDSIGHT, False)} "
        "times its hours."
    )
    return told


HINDSIGHT = "in hindsight"


def summary(found: Sequence[Outcome]) -> list[str]:
    """What holds over all clusters and tasks."""
    rows: dict[str, list[float]] = {}
    for cluster in CLUSTERS:
        for task in LEVELS:
            own = [one for one in found if (one.cluster, one.task) == (cluster, task)]
            table = {(one.arm, one.seed): one for one in own}
            arms = list(dict.fromkeys(one.arm for one in own))
            hours = {arm: mean(table, arm, False) for arm in arms}
            costs = {arm: mean(table, arm, True) for arm in arms}
            fixed_arms = [arm for arm in arms if arm.startswith("fixed")]
            schedules = [arm for arm in arms if arm.startswith("AdaBatch")]
            ordered = sorted(hours[arm] for arm in fixed_arms)
            for name, value in (
                ("best", hours[TIME] / ordered[0]),
                ("middle", ordered[len(ordered) // 2] / hours[TIME]),
                ("adabatch", min(hours[arm] for arm in schedules) / hours[TIME]),
                ("half cost", costs[HALF] / min(costs[arm] for arm in fixed_arms)),
                ("half saves", costs[TIME] / costs[HALF]),
                ("half slower", hours[HALF] / hours[TIME]),
            ):
                rows.setdefault(name, []).append(value)

    def span(name: str) -> str:
        return f"{min(rows[name]):.2f} to {max(rows[name]):.2f}"

    return [
        f"- {TIME} takes {span('best')} times the hours of the fastest of the fixed choices, which",
        "  nobody knows beforehand; the middle one of them takes "
        f"{span('middle')} times the hours of",
        "  goodput.",
        f"- The fastest AdaBatch schedule takes {span('adabatch')} times its hours.",
        f"- The last ranks are dear: {HALF} costs {span('half saves')} times less",
        f"  than {TIME} and takes {span('half slower')} times as long; it costs",
        f"  {span('half cost')} times what the cheapest fixed choice does. (Its bound is 2, by",
        "  what it believes of speed and noise; and ranks are not given back.)",
    ]


def page(found: Sequence[Outcome], seeds: int) -> str:
    parts = [
        line for cluster in CLUSTERS for task in LEVELS for line in section(found, cluster, task)
    ]
    low, high = (f"{min(MEASURED) * k:,.0f} to {max(MEASURED) * k:,.0f}" for k in LEVELS.values())
    return "\n".join([
        "# Goodput growth on clusters that are not there",
        "",
        f"{EPOCHS} epochs' worth of progress on {SIZE:,} samples, counted in batches of "
        f"{INITIAL:,}, on up to {MOST:,}",
        f"ranks, {NODE} to a node. What does growth by",
        "[goodput](../schedules.md#growth-by-goodput) take against every fixed choice (ranks by",
        "doubling × accumulations of 1 to 16) and against AdaBatch, whose ranks grow with its",
        "batch?",
        "",
        "    .venv/bin/python benchmarks/goodput_simulated.py",
        "",
        "The policy is the harness's own. An update takes what the [step-time model]"
        "(../scaling.md) says: a",
        "gradient of 102 MB as of ResNet-50, 400 images/s for a rank alone, α and β inside a node",
        "as measured on one host, between nodes as supposed. A sample's worth follows the noise",
        "scale (McCandlish et al. 2018). Its shape over a run is the one measured on LeNet-5 and",
        f"the digits; its level is supposed: {low} samples (low noise) or {high} (high noise).",
        f"A start with more ranks takes {RESTART:g} s and is only taken where it pays.",
        "",
        f"Means are geometric, intervals 95 % over {seeds} seeds (Student's t of logarithms). A",
        "seed draws the level of the noise (standard deviation 30 %), an error of each estimate of",
        "it (‖G‖² 30 %, tr(Σ) 10 %, four a decision), and how far each coefficient that the policy",
        "believes is off (15 %). What this cannot show: that accuracy is the same at the end, and",
        "that rates can follow such batches.",
        "",
        "## Result",
        "",
        *summary(found),
        "",
        *parts,
        f"![Time and rank-hours of every arm]({NAME}.svg)",
        "",
        f"Every arm and seed: [{NAME}.csv]({NAME}.csv).",
        "",
    ])  # fmt: skip


def draw(found: Sequence[Outcome], path: Path) -> None:
    mpl.rcParams.update({"svg.fonttype": "none", "svg.hashsalt": NAME, "font.size": 9})
    figure = Figure(figsize=(8, 6.4), layout="constrained")
    panels = figure.subplots(2, 2).ravel()
    looks = {TIME: ("#d55e00", "o"), HALF: ("#e69f00", "s"), CHEAP: ("#cc79a7", "D"),
             HINDSIGHT: ("#1b1f24", "*")}  # fmt: skip
    places = [(cluster, task) for cluster in CLUSTERS for task in LEVELS]
    for axes, (cluster, task) in zip(panels, places, strict=True):
        own = [one for one in found if (one.cluster, one.task) == (cluster, task)]
        table = {(one.arm, one.seed): one for one in own}
        labelled = set()
        for arm in dict.fromkeys(one.arm for one in own):
            kind = arm.split()[0] if arm not in looks else arm
            colour, marker = looks.get(arm, ("#9aa0a6", ".") if kind == "fixed"
                                       else ("#0072b2", "^"))  # fmt: skip
            axes.plot(
                mean(table, arm, True), mean(table, arm, False), marker, color=colour,
                label=None if kind in labelled else kind, ms=5,
            )  # fmt: skip
            labelled.add(kind)
        axes.set(xscale="log", yscale="log", title=f"{cluster}, {task}")
        axes.set(xlabel="rank-hours", ylabel="hours")
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_major_formatter(FuncFormatter(lambda hours, _: f"{hours:g}"))
        axes.yaxis.set_minor_formatter(NullFormatter())
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside upper center", ncols=3)
    figure.savefig(path, metadata={"Date": None})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "studies")
    parser.add_argument("--seeds", type=int, default=10)
    options = parser.parse_args()
    found = [one for world in worlds(options.seeds) for one in outcomes(world)]
    out: Path = options.out
    out.mkdir(parents=True, exist_ok=True)
    with (out / f"{NAME}.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        names = list(Outcome.__dataclass_fields__)
        writer.writerow(names)
        for one in found:
            values = [getattr(one, name) for name in names]
            writer.writerow([
                ("" if math.isnan(v) else f"{v:.6g}") if isinstance(v, float) else v for v in values
            ])  # fmt: skip
    draw(found, out / f"{NAME}.svg")
    (out / f"{NAME}.md").write_text(page(found, options.seeds), encoding="utf-8")
    print(page(found, options.seeds))


if __name__ == "__main__":
    main()
