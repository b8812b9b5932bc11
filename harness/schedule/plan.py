"""What a run will do, before it runs: stages, their decomposition over ranks, segments, totals.

A plan walks from growth to growth in closed form, so a billion samples cost what a thousand do.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from itertools import groupby
from typing import Any

from harness.config import Batch, Config, Ranks
from harness.errors import ConfigError
from harness.schedule.clock import Clock, Limit, advance, step, update_size, updates_until
from harness.schedule.growth import BatchDecision, StageScheduler, growth_policy
from harness.schedule.rates import rate_schedule


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
    batch with ``prefer: ranks``, the initial number with ``prefer: accumulation``."""
    if ranks.prefer == "accumulation":
        return ranks.start
    pieces = -(-global_batch // batch.micro_batch)
    initial = -(-batch.initial // batch.micro_batch)
    return min(ranks.ceiling, max(ranks.start, ranks.start * pieces // initial))


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
    momentum: float
    reason: str


@dataclass(frozen=True)
class Plan:
    stages: tuple[Stage, ...]
    dataset_size: int
    updates_at_initial: int
    """Updates that the same samples would take at the initial global batch."""

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
        return {
            "stages": [asdict(row) for row in self.stages],
            "segments": segments,
            "totals": totals,
        }


def run_end(config: Config, dataset_size: int) -> Limit:
    """Where a run is over."""
    return Limit.multiple(config.train.duration, 1, dataset_size)


def build_plan(config: Config, dataset_size: int, ranks: int | None = None) -> Plan:
    """The plan of a run; with ``ranks``, on that many ranks from start to end.

    Raises ConfigError for what only the data set's size can tell.
    """
    _check_lengths(config, dataset_size)
    rows: list[Stage] = []
    for row in _walk(config, dataset_size, ranks):
        if rows and rows[-1].stage == row.stage:
            rows[-1] = replace(
                rows[-1],
                end_sample=row.end_sample,
                end_epoch=row.end_epoch,
                updates=rows[-1].updates + row.updates,
                lr_end=row.lr_end,
                asked=row.asked,
            )
        else:
            rows.append(row)
    start = Clock(0, 0, dataset_size)
    alone = updates_until(
        start, config.batch.initial, run_end(config, dataset_size), config.batch.epoch_end
    )
    return Plan(tuple(rows), dataset_size, alone)


def _walk(config: Config, dataset_size: int, ranks: int | None) -> Iterator[Stage]:
    """Stretches between the points at which the policy may ask for another batch."""
    batch, end = config.batch, run_end(config, dataset_size)
    scheduler = StageScheduler(growth_policy(batch.initial, batch.growth), batch.max)
    rates = rate_schedule(config)
    clock = Clock(0, 0, dataset_size)
    segment, running = -1, 0
    while not end.reached(clock):
        decision = scheduler.decide(clock)
        wanted = ranks or max(running, ranks_for(decision.batch, batch, config.ranks))
        if wanted != running:
            segment, running = segment + 1, wanted
        stretch = _updates_in_stretch(scheduler, clock, decision, config, end)
        last = advance(clock, decision.batch, stretch - 1, batch.epoch_end, end)
        after = step(last, update_size(last, decision.batch, batch.epoch_end, end))
        pieces = decompose(decision.batch, batch.micro_batch, running)
        first_rates = rates.at(clock, decision)
        at_last = scheduler.decide(last)
        yield Stage(
            stage=decision.stage,
            segment=segment,
            start_sample=clock.samples,
            end_sample=after.samples,
            start_epoch=clock.epoch,
            end_epoch=after.epoch,
            updates=stretch,
            global_batch=decision.batch,
            **asdict(pieces),
            asked=at_last.asked,
            lr_start=first_rates.lr,
            lr_end=rates.at(last, at_last).lr,
            momentum=first_rates.momentum,
            reason=decision.reason,
        )
        clock = after


def _updates_in_stretch(
    scheduler: StageScheduler, clock: Clock, decision: BatchDecision, config: Config, end: Limit
) -> int:
    # Past the cap only the rate follows what the policy asks for: one stretch to the end.
    capped = decision.asked > decision.batch
    change = None if capped else scheduler.policy.next_change(clock)
    limits = [end] if change is None else [end, change]
    return min(
        updates_until(clock, decision.batch, limit, config.batch.epoch_end) for limit in limits
    )


def _check_lengths(config: Config, dataset_size: int) -> None:
    """Refuse a warmup longer than the run; epochs against samples needs the data set's size."""
    warmup, total = config.lr.warmup, config.train.duration
    if warmup is None or (warmup.duration.unit == "up") != (total.unit == "up"):
        return
    if warmup.duration.boundary(1, dataset_size) > total.boundary(1, dataset_size):
        raise ConfigError(
            f"lr.warmup.duration = {warmup.duration} is longer than train.duration = {total}"
        )
