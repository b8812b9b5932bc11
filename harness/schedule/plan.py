"""What a run will do, before it runs: stages, their decomposition over ranks, segments, totals.

A plan walks from growth to growth in closed form, so a billion samples cost what a thousand do.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from itertools import groupby
from typing import Any

from harness.errors import ConfigError
from harness.schedule.clock import Clock, Limit, advance, step, update_size, updates_until
from harness.schedule.configured import growth_policy, rate_schedule, stage_scheduler
from harness.schedule.goodput import Goodput
from harness.schedule.growth import StageScheduler
from harness.schema import Batch, Config, GoodputGrowth, Ranks


@dataclass(frozen=True)
class Decomposition:
    """A global batch as ranks × accumulation × micro-batch.

    ``accumulation`` counts the micro-batches of the busiest rank. ``idle`` is the share of
    rank-time in which a rank waits because the pieces do not divide evenly, 0 when they do.
    """

    ranks: int
    accumulation: int
    micro_batch: int
    idle: float


def decompose(global_batch: int, micro_batch: int, ranks: int) -> Decomposition:
    """Cut a global batch for a given number of ranks."""
    pieces = -(-global_batch // micro_batch)
    accumulation = -(-pieces // ranks)
    idle = 1.0 - global_batch / (accumulation * ranks * micro_batch)
    return Decomposition(ranks, accumulation, micro_batch, idle)


def ranks_for(global_batch: int, batch: Batch, ranks: Ranks) -> int:
    """Ranks that a global batch should run on: as many as keep each rank's share of the initial
    batch with ``prefer: ranks``, the initial number with ``prefer: accumulation``; with growth by
    goodput the fastest for it, once it has grown."""
    if isinstance(batch.growth, GoodputGrowth):
        return _fastest_ranks(global_batch, batch, ranks)
    if ranks.prefer == "accumulation":
        return ranks.start
    pieces = -(-global_batch // batch.micro_batch)
    initial = -(-batch.initial // batch.micro_batch)
    return min(ranks.ceiling, max(ranks.start, ranks.start * pieces // initial))


def _fastest_ranks(global_batch: int, batch: Batch, ranks: Ranks) -> int:
    policy = growth_policy(batch)
    if not isinstance(policy, Goodput) or global_batch == batch.initial:
        return ranks.start
    wanted = policy.options.fastest(global_batch).ranks
    return min(ranks.ceiling, max(ranks.start, wanted))


@dataclass(frozen=True)
class Stage:
    """A stretch of updates with one global batch. Positions in samples and epochs.

    ``asked`` is the batch that the policy asks for at the stage's end; more than ``global_batch``
    if batch.max holds it back.
    """

    stage: int
    segment: int
    start_sample: int
    end_sample: int
    start_epoch: float
    end_epoch: float
    updates: int
    global_batch: int
    ranks: int
    accumulation: int
    micro_batch: int
    idle: float
    asked: int
    lr_start: float
    lr_end: float
    lr_after_warmup: float | None
    """Rate of the first update past the warmup, if that lies inside this stage."""
    momentum: float
    momentum_end: float
    effective_lr_start: float
    """Rate / (1 − momentum)."""
    effective_lr_end: float
    reason: str


@dataclass(frozen=True)
class Plan:
    stages: tuple[Stage, ...]
    dataset_size: int
    updates_at_initial: int
    """Updates that the same samples would take at the initial global batch."""
    fastest: Plan | None = None
    """For growth that is decided from measurements: the most that it may come to. ``stages`` is
    then the least, the initial batch throughout."""

    def as_dict(self) -> dict[str, Any]:
        """The form of plan.json and of ``harness plan --json``."""
        last = self.stages[-1]
        segments = [
            {
                "segment": segment,
                "ranks": rows[0].ranks,
                "start_epoch": rows[0].start_epoch,
                "end_epoch": rows[-1].end_epoch,
                "stages": [row.stage for row in rows],
                "updates": sum(row.updates for row in rows),
            }
            for segment, group in groupby(self.stages, key=lambda row: row.segment)
            for rows in [list(group)]
        ]
        totals = {
            "dataset_size": self.dataset_size,
            "samples": last.end_sample,
            "epochs": last.end_epoch,
            "updates": sum(row.updates for row in self.stages),
            "updates_at_initial_batch": self.updates_at_initial,
        }
        plan = {
            "stages": [asdict(row) for row in self.stages],
            "segments": segments,
            "totals": totals,
        }
        return plan if self.fastest is None else plan | {"fastest": self.fastest.as_dict()}


def run_end(config: Config, dataset_size: int) -> Limit:
    """Where a run is over."""
    return Limit.multiple(config.train.duration, 1, dataset_size)


def samples_until_growth(config: Config, clock: Clock, ranks: int) -> int:
    """Samples from a point of the run until its schedule wants more than so many ranks, or ends.

    Growth that is decided from measurements is not foreseen: until the end.
    """
    end, batch = run_end(config, clock.dataset_size), config.batch
    scheduler, at = stage_scheduler(batch), clock
    more, in_updates = ranks < config.ranks.ceiling, config.train.duration.unit == "up"
    foreseen = scheduler.measured is None and (more or in_updates)
    while not end.reached(at):
        size = scheduler.decide(at).batch
        if foreseen and ranks_for(size, batch, config.ranks) > ranks:
            break
        change = scheduler.next_change(at) if foreseen else None
        stretch = min(
            updates_until(at, size, limit, batch.epoch_end)
            for limit in ((end,) if change is None else (end, change))
        )
        last = advance(at, size, stretch - 1, batch.epoch_end, end)
        at = step(last, update_size(last, size, batch.epoch_end, end))
    return at.samples - clock.samples


def build_plan(config: Config, dataset_size: int, ranks: int | None = None) -> Plan:
    """The plan of a run; with ``ranks``, on that many ranks from start to end.

    Growth that is decided from measurements has bounds instead: the plan of the slowest, with that
    of the fastest in ``fastest``. Raises ConfigError for what only the data set's size can tell.
    """
    _check_lengths(config, dataset_size)
    scheduler = stage_scheduler(config.batch)
    slowest, fastest = scheduler.bounds()
    plan = _follow(slowest, config, dataset_size, ranks)
    if scheduler.measured is not None:
        plan = replace(plan, fastest=_follow(fastest, config, dataset_size, ranks))
    _check_reached(config, plan)
    return plan


def _follow(
    scheduler: StageScheduler, config: Config, dataset_size: int, ranks: int | None
) -> Plan:
    rows: list[Stage] = []
    for row in _walk(scheduler, config, dataset_size, ranks):
        if rows and rows[-1].stage == row.stage:
            rows[-1] = replace(
                rows[-1],
                end_sample=row.end_sample,
                end_epoch=row.end_epoch,
                updates=rows[-1].updates + row.updates,
                lr_end=row.lr_end,
                lr_after_warmup=(
                    rows[-1].lr_after_warmup if row.lr_after_warmup is None else row.lr_after_warmup
                ),
                momentum_end=row.momentum_end,
                effective_lr_end=row.effective_lr_end,
                asked=row.asked,
            )
        else:
            rows.append(row)
    start = Clock(0, 0, dataset_size)
    alone = updates_until(
        start, config.batch.initial, run_end(config, dataset_size), config.batch.epoch_end
    )
    return Plan(tuple(rows), dataset_size, alone)


def _walk(
    scheduler: StageScheduler, config: Config, dataset_size: int, ranks: int | None
) -> Iterator[Stage]:
    """Stretches between the points at which another batch may be decided on."""
    batch, end = config.batch, run_end(config, dataset_size)
    rates, warmup = rate_schedule(config), config.lr.warmup
    warm = None if warmup is None else Limit.multiple(warmup.duration, 1, dataset_size)
    clock = Clock(0, 0, dataset_size)
    segment, running = -1, 0
    while not end.reached(clock):
        decision = scheduler.decide(clock)
        wanted = ranks or max(running, ranks_for(decision.batch, batch, config.ranks))
        if wanted != running:
            segment, running = segment + 1, wanted
        change = scheduler.next_change(clock)
        stretch = min(
            updates_until(clock, decision.batch, limit, batch.epoch_end)
            for limit in ((end,) if change is None else (end, change))
        )
        after_warmup = None
        if warm is not None and not warm.reached(clock):
            cold = updates_until(clock, decision.batch, warm, batch.epoch_end)
            if cold < stretch:
                place = advance(clock, decision.batch, cold, batch.epoch_end, end)
                after_warmup = rates.at(place, scheduler.decide(place)).lr
        last = advance(clock, decision.batch, stretch - 1, batch.epoch_end, end)
        after = step(last, update_size(last, decision.batch, batch.epoch_end, end))
        at_last = scheduler.decide(last)
        first_rates, last_rates = rates.at(clock, decision), rates.at(last, at_last)
        yield Stage(
            stage=decision.stage,
            segment=segment,
            start_sample=clock.samples,
            end_sample=after.samples,
            start_epoch=clock.epoch,
            end_epoch=after.epoch,
            updates=stretch,
            global_batch=decision.batch,
            **asdict(decompose(decision.batch, batch.micro_batch, running)),
            asked=at_last.asked,
            lr_start=first_rates.lr,
            lr_end=last_rates.lr,
            lr_after_warmup=after_warmup,
            momentum=first_rates.momentum,
            momentum_end=last_rates.momentum,
            effective_lr_start=first_rates.effective,
            effective_lr_end=last_rates.effective,
            reason=decision.reason,
        )
        clock = after


def _check_lengths(config: Config, dataset_size: int) -> None:
    """Refuse lengths past the run's end; epochs against samples needs the data set's size."""
    total = config.train.duration
    warmup = config.lr.warmup
    for key, length in (
        ("lr.warmup.duration", warmup and warmup.duration),
        ("lr.decay.begin", getattr(config.lr.decay, "begin", None)),
    ):
        if not length or (length.unit == "up") != (total.unit == "up"):
            continue
        if length.boundary(1, dataset_size) > total.boundary(1, dataset_size):
            raise ConfigError(f"{key} = {length} is longer than train.duration = {total}")


def _check_reached(config: Config, plan: Plan) -> None:
    """Refuse a warmup that the run does not reach the end of, where one is in updates and the other
    is not; with growth from measurements, one that it cannot reach however it grows."""
    warmup = config.lr.warmup
    if warmup is None:
        return
    ends = [
        Clock(one.stages[-1].end_sample, sum(row.updates for row in one.stages), one.dataset_size)
        for one in (plan, plan.fastest)
        if one is not None
    ]
    if not any(warmup.duration.passed(e.samples, e.updates, e.dataset_size) for e in ends):
        length = f"{ends[0].epoch:g}ep, {ends[0].updates}up"
        raise ConfigError(
            f"lr.warmup.duration = {warmup.duration} is longer than the run, which takes {length}"
        )
