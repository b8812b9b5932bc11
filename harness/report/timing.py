"""Where the time of updates goes, which rank holds the others up, and what that limits.

A finding names a cause only where its share passes a threshold that stands beside it; shares are of
the time of updates as rank 0 measures it, evaluation and checkpoints excluded.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np

from harness.records import PHASES
from harness.report.fields import clean, count, general, percent, sentence
from harness.report.runs import Run
from harness.report.scaling import Point, per_update, phase_table, updates_of_windows

PHASE_NAMES = {
    "data": "waiting for data",
    "to_device": "copying to the device",
    "forward": "forward",
    "backward": "backward",
    "comm_exposed": "exposed communication",
    "optimizer": "optimizer step",
    "other": "other",
}
LARGE = 0.2
"""From this share of an update's time on, a phase other than forward and backward is named. A
choice: without it training would be a quarter faster or more."""
SLOW_RANK = 1.1
"""A rank is named that was busy this many times as long as the others' median, or longer, ..."""
SLOW_WINDOWS = 0.5
"""... as the median of the windows in which it was the slowest, if those are this share of all."""
FEWEST_WINDOWS = 3

_ADVICE = {
    "data": "More loading processes (data.workers), a longer queue (data.prefetch) or smaller "
    "images would feed the ranks faster.",
    "to_device": "Fewer and larger copies would help: a larger micro-batch.",
    "comm_exposed": "Compression (comm.compression), more accumulation or a faster link would "
    "shorten it; harness probe measures the link.",
    "optimizer": "A larger global batch makes fewer steps for the same samples; a simpler "
    "optimizer makes shorter ones.",
    "other": "It is time that no phase accounts for; a trace shows what it is.",
}


@dataclass(frozen=True)
class Timing:
    """Seconds of one update by phase, of a run, a point or a rank count."""

    label: str
    seconds: dict[str, float]
    source: str

    @property
    def total(self) -> float:
        return sum(self.seconds.values())

    def share(self, phase: str) -> float:
        return self.seconds.get(phase, 0.0) / self.total if self.total else 0.0


@dataclass(frozen=True)
class Straggler:
    """The rank that was the slowest most often, over the windows that compare ranks."""

    rank: int
    host: str | None
    phase: str | None
    windows: int
    """In which it was the slowest, ..."""
    compared: int
    """... of so many in which ranks were compared."""
    ratio: float
    """Median of busy_max / busy_median over these windows."""
    events: int
    """``straggler`` lines of events.jsonl that name it."""

    @property
    def slow(self) -> bool:
        often = self.windows >= max(FEWEST_WINDOWS, SLOW_WINDOWS * self.compared)
        return self.events > 0 or (often and self.ratio >= SLOW_RANK)

    @property
    def where(self) -> str:
        return f"rank {count(self.rank)}" + (f" on {self.host}" if self.host else "")


@dataclass(frozen=True)
class Finding:
    """A cause, in a sentence or two."""

    kind: str
    share: float
    """Of an update's time, for those that have one; sorts findings."""
    text: str


def phases_of(timings: Iterable[Timing]) -> list[str]:
    """The phases that any of them spends time in; a CPU copies nothing to a device."""
    return order(name for timing in timings for name, spent in timing.seconds.items() if spent)


def order(names: Iterable[str]) -> list[str]:
    """Phases in the order of an update; those that are not known here come last."""
    return sorted(
        dict.fromkeys(names), key=lambda n: PHASES.index(n) if n in PHASES else len(PHASES)
    )


def phase_name(phase: str) -> str:
    return PHASE_NAMES.get(phase, clean(phase, 40).replace("_", " "))


def timing_of_run(run: Run) -> Timing | None:
    """Over all windows that count for throughput."""
    chosen = run.timed
    seconds = per_update(run, phase_table(run)[chosen], updates_of_windows(run)[chosen])
    if not sum(seconds.values()):
        return None
    source = (
        "metrics.jsonl: sum of seconds.{phase} / updates, first window of each attempt left out"
    )
    return Timing(run.label, seconds, source)


def timing_of_point(label: str, point: Point) -> Timing | None:
    if not sum(point.seconds.values()):
        return None
    return Timing(label, point.seconds, f"{point.source}, seconds")


def straggler_of(run: Run) -> Straggler | None:
    """None where no window compares ranks and no event names one."""
    columns = run.columns
    ranks = columns["rank_seconds.slowest_rank"]
    with np.errstate(divide="ignore", invalid="ignore"):
        ratios = columns["rank_seconds.busy_max"] / columns["rank_seconds.busy_median"]
    compared = ~np.isnan(ranks) & np.isfinite(ratios)
    named = [event.get("rank") for event in run.events("straggler")]
    told = [rank for rank in named if isinstance(rank, int) and not isinstance(rank, bool)]
    if not compared.any():
        return _told(run, max(told, key=told.count), told) if told else None
    values, counts = np.unique(ranks[compared], return_counts=True)
    rank = max(told, key=told.count) if told else int(values[counts.argmax()])
    own = compared & (ranks == rank)
    if not own.any():
        return _told(run, rank, told)
    return Straggler(
        rank=rank,
        host=_most(run, "rank_seconds.slowest_host", own),
        phase=_most(run, "rank_seconds.phase", own),
        windows=int(own.sum()),
        compared=int(compared.sum()),
        ratio=float(np.median(ratios[own])),
        events=told.count(rank),
    )


def _told(run: Run, rank: int, told: list[int]) -> Straggler:
    """A straggler that is known from its event alone."""
    event = next(e for e in run.events("straggler") if e.get("rank") == rank)
    ratio = event.get("ratio")
    return Straggler(
        rank=rank,
        host=clean(event["host"], 60) if isinstance(event.get("host"), str) else None,
        phase=clean(event["phase"], 40) if isinstance(event.get("phase"), str) else None,
        windows=0,
        compared=0,
        ratio=float(ratio) if isinstance(ratio, int | float) else 1.0,
        events=told.count(rank),
    )


def _most(run: Run, name: str, chosen: np.ndarray[tuple[int], np.dtype[np.bool_]]) -> str | None:
    """The text that a column has most often in some lines."""
    places = run.columns[name][chosen]
    known = places[~np.isnan(places)].astype(int)
    return run.columns.texts[int(np.bincount(known).argmax())] if known.size else None


def findings(timing: Timing | None, straggler: Straggler | None) -> list[Finding]:
    """What takes more of the time than it should, the largest first."""
    found = list(_phases(timing, straggler)) if timing else []
    found.sort(key=lambda finding: -finding.share)
    if straggler is not None and straggler.slow:
        found.insert(0, _slow(straggler))
    return found


def _slow(straggler: Straggler) -> Finding:
    where = sentence(straggler.where)
    phase = f", most of it in {phase_name(straggler.phase)}" if straggler.phase else ""
    often = (
        f" in {count(straggler.windows)} of {count(straggler.compared)} comparisons"
        if straggler.compared
        else ""
    )
    text = (
        f"{where} is slower than the others: it was the slowest{often}, busy "
        f"{general(straggler.ratio, 3)} times as long as the median rank{phase}. "
        "Every update waits for it."
    )
    return Finding("straggler", 0.0, text)


def _phases(timing: Timing, straggler: Straggler | None) -> Iterator[Finding]:
    for phase in timing.seconds:
        share = timing.share(phase)
        if phase in ("forward", "backward") or share < LARGE:
            continue
        largest = share == max(map(timing.share, timing.seconds))
        lead = f"{sentence(phase_name(phase))} takes {percent(share)} of each update"
        text = f"{lead}, more than anything else." if largest else f"{lead}."
        if phase == "comm_exposed" and straggler is not None and straggler.slow:
            text += f" Part of it is waiting for {straggler.where}."
        faster = 1 / (1 - share) if share < 1 else None
        if faster is not None:
            text += f" Without it, training would be {general(faster, 3)} times as fast at most."
        yield Finding(phase, share, f"{text} {_ADVICE.get(phase, '')}".strip())
