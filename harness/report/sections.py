"""What the sections of the page say: sentences, and rows of tables with where they come from."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

from harness.lenient import number
from harness.report.benches import Bench
from harness.report.fields import (
    clean,
    count,
    general,
    instant,
    percent,
    plural,
    sentence,
    words,
)
from harness.report.goodput import Goodputs
from harness.report.runs import Run
from harness.report.scaling import HALF, Series
from harness.report.scaling_view import Modelled
from harness.report.summary import Number, Summary, quantile_of
from harness.report.timing import Finding, Straggler, Timing
from harness.student import CONFIDENCE


def scaling_sentences(one: Series, model: Modelled | str, goodput: Goodputs | None) -> list[str]:
    """What a series says, the most important first."""
    scaled = one.scaled()
    last, first = scaled[-1], one.first
    interval = ""
    if last.efficiency_low is not None:
        ends = f"{percent(last.efficiency_low)} to {percent(last.efficiency_high)}"
        interval = f", {100 * CONFIDENCE:g} % interval {ends}"
    found = [
        f"{sentence(one.mode)} scaling ({one.fixed}): {count(last.point.ranks)} ranks train "
        f"{general(last.speedup, 3)} times as fast as {plural(first.ranks, 'rank')}, "
        f"{general(last.point.images_per_sec)} against {general(first.images_per_sec)} images/s; "
        f"efficiency {percent(last.efficiency)}{interval}."
    ]
    found.append(_knee_sentence(one))
    if goodput is not None:
        found.append(
            f"At a noise scale of {general(goodput.noise)} samples, goodput is largest with "
            f"{plural(goodput.best, 'rank')}"
            + (f", and its knee lies at {plural(goodput.knee, 'rank')}." if goodput.knee else ".")
        )
    if isinstance(model, Modelled):
        found += model.sentences
    return found


def _knee_sentence(one: Series) -> str:
    knee, half = one.knee(), "half" if HALF == 0.5 else percent(HALF)
    if not one.knee_is_told():
        where = (
            f"within {count(one.points[-1].ranks)} ranks" if knee is None
            else f"at {plural(knee, 'rank')} or beyond"
        )  # fmt: skip
        return (
            "The repeats differ too much to tell whether the knee of throughput, past which a rank "
            f"adds less than {half} of what one alone does, lies {where}."
        )
    if knee is not None:
        return (
            f"The knee of throughput lies at {plural(knee, 'rank')}: a further one adds less than "
            f"{half} of what one alone does."
        )
    return (
        f"Up to {count(one.points[-1].ranks)} ranks, the most measured, each further rank added at "
        f"least {half} of what one alone does."
    )


def time_sentence(timing: Timing | None, found: list[Finding]) -> list[str]:
    """The findings, or that there are none."""
    if found:
        return [finding.text for finding in found]
    if timing is None:
        return []
    working = timing.share("forward") + timing.share("backward")
    return [
        f"Of each update, {percent(working)} is forward and backward; no other phase takes a fifth "
        "or more."
    ]


@dataclass(frozen=True)
class Fault:
    """An end of the ranks that nobody asked for, and what it cost."""

    time: str | None
    what: str
    rank: float | None
    host: str | None
    update: float | None
    seconds_to_training: float | None
    updates_repeated: float | None


def faults_of(run: Run) -> list[Fault]:
    """Each fault with the resume line that follows it."""
    found = []
    events = run.records.events
    for place, event in enumerate(events):
        if event.get("kind") != "fault":
            continue
        after = next((e for e in events[place + 1 :] if e.get("kind") == "resume"), {})
        began, again = instant(event.get("time")), instant(after.get("time"))
        seconds = number(after.get("seconds_since_end"))
        if seconds is None and began and again and again >= began:
            seconds = (again - began).total_seconds()
        found.append(
            Fault(
                time=f"{began:%Y-%m-%d %H:%M:%S}" if began else words(event.get("time")),
                what=clean(event.get("reason") or "reason not recorded"),
                rank=number(event.get("rank")),
                host=words(event.get("host")),
                update=number(event.get("update")),
                seconds_to_training=seconds,
                updates_repeated=number(after.get("updates_repeated")),
            )
        )
    return found


def time_numbers(timing: Timing | None) -> Iterator[Number]:
    """Seconds of an update by phase, and their shares."""
    if timing is None:
        return
    for phase, seconds in timing.seconds.items():
        source = timing.source.replace("{phase}", phase)
        yield Number(f"seconds_per_update_{phase}", seconds, "s", source)
    total = "sum of seconds_per_update_* of all phases"
    yield Number("seconds_per_update", timing.total, "s", total)
    for phase in timing.seconds:
        rule = f"seconds_per_update_{phase} / seconds_per_update"
        yield Number(f"share_{phase}", timing.share(phase), "fraction", rule)


def communication_numbers(run: Run, numbers: Summary) -> Iterator[Number]:
    """What rank 0 sent, in all and per update."""
    sent = run.columns.known("comm_bytes")
    if not len(sent):
        return
    total = float(sent.sum())
    updates = numbers.of("updates")
    yield Number("comm_bytes", total, "bytes", "metrics.jsonl: sum of comm_bytes")
    each = total / updates if updates else None
    yield Number("comm_bytes_per_update", each, "bytes", "comm_bytes / updates")
    samples = numbers.of("samples_seen")
    ranks = numbers.of("ranks_largest")
    if samples and ranks and ranks == numbers.of("ranks_first"):
        per_image = total * ranks / samples
        yield Number(
            "comm_bytes_per_image", per_image, "bytes", "comm_bytes × ranks / samples_seen"
        )


def rank_numbers(run: Run, straggler: Straggler | None) -> Iterator[Number]:
    """How far the ranks lie apart, memory, and what the machine was doing."""
    lines = "metrics.jsonl: "
    if straggler is not None:
        yield Number("slowest_rank", straggler.rank, "rank",
                     lines + "most frequent rank_seconds.slowest_rank, or as the straggler "
                     "events say")  # fmt: skip
        yield Number("slowest_rank_windows", straggler.windows, "windows",
                     lines + "lines in which slowest_rank was the slowest")  # fmt: skip
        yield Number("compared_windows", straggler.compared, "windows",
                     lines + "lines with rank_seconds")  # fmt: skip
        yield Number("slowest_rank_ratio", straggler.ratio, "ratio",
                     lines + "median of rank_seconds.ratio (without it busy_max / busy_median) "
                     "where slowest_rank was the slowest")  # fmt: skip
        yield Number("straggler_events", straggler.events, "events",
                     "events.jsonl: lines of kind straggler with that rank")  # fmt: skip
    peak = run.columns.largest("memory_peak_bytes")
    if peak is not None:
        source = lines + "largest memory_peak_bytes"
        yield Number("memory_peak_bytes", peak, "bytes", source)
    for name in run.columns.group("counters"):
        value = quantile_of(run.columns.known(f"counters.{name}"), 0.5)
        unit = "bytes" if name.endswith("_bytes") else "%" if name.endswith("_percent") else "s"
        source = f"{lines}median of counters.{name}"
        yield Number(f"counter_{clean(name, 40)}", value, unit, source)


def bench_numbers(bench: Bench) -> list[Number]:
    """The facts of a bench that are not of a point."""
    return [
        Number(name, number(bench.get(name)), unit, f"bench.json: {name}")
        for name, unit in (
            ("parameters", "parameters"),
            ("gradient_bytes", "bytes"),
            ("flops_per_image", "FLOP"),
            ("peak_flops_per_rank", "FLOP/s"),
        )
    ]


SCALING_RULES = {
    "speedup": "images_per_sec / images_per_sec of the point with the fewest ranks",
    "efficiency": "speedup / (ranks / ranks of the point with the fewest ranks)",
    "efficiency_low": "efficiency × (1 − h), h² = the sum of the squares of both points' relative "
    "half intervals of images_per_sec",
    "efficiency_high": "efficiency × (1 + h)",
    "knee": "most ranks up to which each further rank added half or more of the first point's "
    "images_per_sec / ranks",
}


def scaling_json(one: Series, model: Modelled | str, goodput: Goodputs | None) -> dict[str, Any]:
    """A series for summary.json, each point with its source."""
    return {
        "series": one.label,
        "mode": one.mode,
        "fixed": one.fixed,
        "knee": one.knee(),
        "model": asdict(model) if isinstance(model, Modelled) else None,
        "model_not_fitted": model if isinstance(model, str) else None,
        "goodput": None
        if goodput is None
        else {
            "noise_scale": goodput.noise,
            "useful_images_per_sec": goodput.goodput,
            "knee": goodput.knee,
            "source": "images_per_sec / (1 + global_batch / noise_scale); noise_scale: median of "
            "the last tenth of the runs' noise_scale lines",
        },
        "points": [
            {
                **{k: v for k, v in asdict(s.point).items() if k != "source"},
                "speedup": s.speedup,
                "efficiency": s.efficiency,
                "efficiency_low": s.efficiency_low,
                "efficiency_high": s.efficiency_high,
                "source": s.point.source,
            }
            for s in one.scaled()
        ],
    }
