"""Where the time of updates goes, which rank holds the others up, and what that limits.

A finding names a cause only where its share passes a threshold that stands beside it; shares are of
the time of updates as rank 0 measures it, evaluation and checkpoints excluded.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np

from harness.records import PHASES
from harness.report.fields import clean, count, general, percent, sentence, short_time, unit_text
from harness.report.runs import Run
from harness.report.scaling import Point, per_update, phase_table, updates_of_windows
from harness.report.waiting import Exchange
from harness.spread import CHANCE, chance_of

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
"""... as the median of the windows in which it was the slowest, if those are this share of all, and
more than lot would give it."""
FEWEST_WINDOWS = 3
BUSY = 90
"""From so many percent on, processors may be what sums wait for."""

_ADVICE = {
    "data": "More loading processes (data.workers), a longer queue (data.prefetch) or smaller "
    "images would feed the ranks faster.",
    "to_device": "Fewer and larger copies would help: a larger micro-batch.",
    "comm_exposed": "Compression (comm.compression), more accumulation or a faster link would "
    "shorten it; harness probe measures what the link can do.",
    "sums": "Compression (comm.compression) or more accumulation would shorten it, and so would "
    "cores that the ranks need not share.",
    "alone": "With one rank nothing travels: it is what the engine takes for its rounds "
    "(comm.backend: solo has none).",
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
    ranks: int | None = None
    """None: several numbers of them, or not known."""

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
    ranks: int
    """Of the run, two at least."""
    ratio: float
    """Median over these windows of how many times as long as the others it was busy."""
    events: int
    """``straggler`` lines of events.jsonl that name it."""

    @property
    def slow(self) -> bool:
        if self.events or self.ratio < SLOW_RANK:
            return self.events > 0
        often = self.windows >= max(FEWEST_WINDOWS, SLOW_WINDOWS * self.compared)
        return often and chance_of(self.windows, self.compared, self.ranks) <= CHANCE

    @property
    def suspect(self) -> bool:
        """Whether it may be slow, but there are too few comparisons to tell."""
        few = chance_of(self.compared, self.compared, self.ranks) > CHANCE
        return few and not self.slow and self.ratio >= SLOW_RANK

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
    return Timing(run.label, seconds, source, 1 if run.columns.largest("ranks") == 1 else None)


def timing_of_point(label: str, point: Point) -> Timing | None:
    if not sum(point.seconds.values()):
        return None
    return Timing(label, point.seconds, f"{point.source}, seconds", point.ranks)


def straggler_of(run: Run) -> Straggler | None:
    """None where no window compares ranks and no event names one."""
    columns = run.columns
    ranks = columns["rank_seconds.slowest_rank"]
    with np.errstate(divide="ignore", invalid="ignore"):
        ratios = columns["rank_seconds.busy_max"] / columns["rank_seconds.busy_median"]
    if "rank_seconds.ratio" in columns.values:  # for equal work; null where that cannot be told
        ratios = np.where(
            np.isnan(columns["rank_seconds.ratio"]), 1.0, columns["rank_seconds.ratio"]
        )
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
        ranks=max(2, int(columns.largest("ranks") or 0), int(ranks[compared].max()) + 1),
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
        ranks=2,
        ratio=float(ratio) if isinstance(ratio, int | float) else 1.0,
        events=told.count(rank),
    )


def _most(run: Run, name: str, chosen: np.ndarray[tuple[int], np.dtype[np.bool_]]) -> str | None:
    """The text that a column has most often in some lines."""
    places = run.columns[name][chosen]
    known = places[~np.isnan(places)].astype(int)
    return run.columns.texts[int(np.bincount(known).argmax())] if known.size else None


def findings(
    timing: Timing | None, straggler: Straggler | None, exchange: Exchange | None
) -> list[Finding]:
    """What takes more of the time than it should, the largest first; a slow rank before all else,
    as others may wait for it."""
    slow = straggler if straggler is not None and straggler.slow else None
    found = [*_phases(timing), *_communication(timing, straggler, exchange)] if timing else []
    found.sort(key=lambda finding: -finding.share)
    return [*([_slow(slow, exchange)] if slow else []), *found]


def _slow(straggler: Straggler, exchange: Exchange | None) -> Finding:
    where = sentence(straggler.where)
    phase = f", most of it in {phase_name(straggler.phase)}" if straggler.phase else ""
    often = (
        f" in {count(straggler.windows)} of {count(straggler.compared)} comparisons"
        if straggler.compared
        else ""
    )
    waits = exchange.waiting_share if exchange is not None else 0.0
    told = f": the median rank spends {percent(waits)} of its time so" if waits >= LARGE else ""
    text = (
        f"{where} is slower than the others: it was the slowest{often}, busy "
        f"{general(straggler.ratio, 3)} times as long as the others{phase}. "
        f"Every update waits for it{told}."
    )
    return Finding("straggler", waits, text)


def _phases(timing: Timing) -> Iterator[Finding]:
    for phase in timing.seconds:
        share = timing.share(phase)
        if phase in ("forward", "backward", "comm_exposed") or share < LARGE:
            continue
        lead = _lead(phase, share, timing)
        yield Finding(phase, share, f"{lead} {_gain(share)}{_ADVICE.get(phase, '')}".strip())


def _lead(phase: str, share: float, timing: Timing) -> str:
    lead = f"{sentence(phase_name(phase))} takes {percent(share)} of each update"
    largest = share == max(map(timing.share, timing.seconds))
    return f"{lead}, more than anything else." if largest else f"{lead}."


def _gain(share: float) -> str:
    if share >= 1:
        return ""
    return f"Without it, training would be {general(1 / (1 - share), 3)} times as fast at most. "


def _communication(
    timing: Timing, straggler: Straggler | None, exchange: Exchange | None
) -> Iterator[Finding]:
    """Exposed communication, by what it is: the sums themselves, or waiting for ranks. None for a
    part that a slow rank explains."""
    slow = straggler if straggler is not None and straggler.slow else None
    share = timing.share("comm_exposed")
    lead = _lead("comm_exposed", share, timing)
    sums = exchange.sums_share if exchange is not None else 0.0
    waits = exchange.waiting_share if exchange is not None else 0.0
    if exchange is not None and sums >= LARGE:
        kind, advice = ("sums", "sums") if exchange.hosts == 1 else ("link", "comm_exposed")
        text = f"{lead} {_sums(slow, exchange)} {_gain(sums)}{_ADVICE[advice]}"
        yield Finding(kind, sums, text)
    if exchange is not None and slow is None and waits >= LARGE:
        yield Finding("uneven", waits, _uneven(straggler, exchange))
    if share < LARGE or max(sums, waits) >= LARGE:
        return
    if exchange is not None and slow is None:
        text = (
            f"{lead} {percent(sums)} of the update are the sums over ranks themselves, "
            f"{percent(waits)} waiting for ranks that come later, on the median rank."
        )
        yield Finding("comm_exposed", share, text)
    elif exchange is None and slow is not None:
        text = f"{lead} Part of it is waiting for {slow.where}."
        yield Finding("comm_exposed", share, text)
    elif exchange is None:
        advice = _ADVICE["alone" if timing.ranks == 1 else "comm_exposed"]
        yield Finding("comm_exposed", share, f"{lead} {_gain(share)}{advice}")


def _sums(slow: Straggler | None, exchange: Exchange) -> str:
    """That the sums take it, how fast they go, and what else there is."""
    place = {None: "", 1: " between ranks of one host"}.get(exchange.hosts, " between hosts")
    text = (
        f"The sums over ranks take it{'' if slow else ', not a slow rank'}: "
        f"{short_time(exchange.sums)} of each update pass even on the rank that comes last, which "
        "waits for no other."
    )
    if exchange.bandwidth is not None:
        low, high = (unit_text(value, "bit/s") for value in exchange.bandwidth)
        text += (
            f" A rank's {unit_text(exchange.sent, 'bytes')} per update go at {low} to {high}{place}"
            " (bus bandwidth; the less, the more of backward they overlap)."
        )
    if exchange.processors is not None and exchange.processors >= BUSY:
        text += (
            f" The processors of rank 0's host were {general(exchange.processors, 3)} % busy, "
            "which may be a part of it."
        )
    return text


def _uneven(straggler: Straggler | None, exchange: Exchange) -> str:
    """Waiting that no slow rank explains."""
    text = (
        f"Waiting for ranks that come later takes {percent(exchange.waiting_share)} of the median "
        "rank's time, and no rank was found to be slower than the others for as much work"
    )
    if exchange.uneven is not None:
        pieces, ranks = map(count, exchange.uneven)
        return (
            f"{text}: {pieces} micro-batches do not divide evenly among {ranks} ranks. A batch of "
            "a multiple of batch.micro × ranks would."
        )
    text += (
        ". Cores that ranks share, with each other or with other programs, look like this; so does "
        "work that differs from sample to sample."
    )
    if straggler is not None and straggler.suspect:
        text += (
            f" So may {straggler.where}: {count(straggler.compared)} comparisons are too few to "
            "tell a slow rank from chance."
        )
    return text
