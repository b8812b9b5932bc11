"""What a plan costs: time, node-hours and bytes from a measured throughput, and uneven stages.

Throughput files are runs' metrics.jsonl, any JSON Lines files with some of their fields, or the
bench.json of ``harness bench``. They tell how long an update takes on the ranks and with the
micro-batch that it was measured with. From there one can go to other accumulations, as a rank's
micro-batches follow one another; not to other ranks.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from math import fsum, lcm
from pathlib import Path
from typing import Any, Literal

from harness.benchfile import NAME, read_bench
from harness.config import load_config
from harness.errors import DataError, HarnessError
from harness.files import open_regular
from harness.jsonl import read_lines
from harness.schedule.choices import nodes_of
from harness.schedule.clock import Clock, updates_by_size
from harness.schedule.plan import Plan, Stage, build_plan, decompose, ranks_for, run_end
from harness.schema import Config, GoodputGrowth

Basis = Literal["measured", "fitted", "scaled"]
"""How a time was found: ``measured`` with this very decomposition; ``fitted`` to others of the same
ranks and micro-batch; ``scaled`` in proportion to the one accumulation that was measured."""

_STRENGTH: dict[Basis, int] = {"scaled": 0, "fitted": 1, "measured": 2}


@dataclass(frozen=True)
class UpdateTimes:
    """Seconds per update as a function of accumulation, on given ranks with a given micro-batch."""

    measured: Mapping[int, float]
    """Accumulation → seconds."""
    fixed: float
    per_micro: float
    """An accumulation that was not measured takes fixed + accumulation × per_micro seconds."""
    otherwise: Basis
    """What such a time is called."""

    def at(self, accumulation: int) -> tuple[float, Basis]:
        if accumulation in self.measured:
            return self.measured[accumulation], "measured"
        return self.fixed + accumulation * self.per_micro, self.otherwise


@dataclass(frozen=True)
class Throughput:
    """What a throughput file tells."""

    times: Mapping[tuple[int, int], UpdateTimes]
    """(ranks, micro-batch) → times of an update."""
    bytes_per_update: float | None
    """Payload that each rank hands to the allreduce in an update; None if the file does not tell.
    Neither accumulation nor micro-batch changes it."""

    def seconds(
        self, ranks: int, accumulation: int, micro_batch: int
    ) -> tuple[float, Basis] | None:
        """Seconds of an update and how they were found; None if nothing was measured on that many
        ranks with that micro-batch."""
        times = self.times.get((ranks, micro_batch))
        return None if times is None else times.at(accumulation)


@dataclass(frozen=True)
class Cost:
    """What a stage or a run costs; None: not known."""

    seconds: float | None
    """Time of its updates: without evaluations, checkpoints and launches."""
    seconds_basis: Basis | None
    """How the time of a stage's full updates was found; of a sum, the weakest."""
    node_hours: float | None
    bytes_sent: int | None
    """Payload that all ranks together hand to the allreduce: the sum over ranks of what
    metrics.jsonl calls comm_bytes, which counts it on one rank too. What crosses the network
    depends on the allreduce."""
    idle_seconds: float | None
    """Part of ``seconds`` that is lost because the micro-batches do not divide evenly."""


@dataclass(frozen=True)
class PlanCost:
    stages: tuple[Cost, ...]
    """In the order of the plan's stages."""
    total: Cost
    measured: tuple[tuple[int, int], ...]
    """The (ranks, micro-batch) that the throughput file tells of."""
    fastest: PlanCost | None = None
    """The costs of ``Plan.fastest``."""

    def as_dict(self, plan: Plan) -> dict[str, Any]:
        """``plan.as_dict()`` with the costs in its stages and totals."""
        return self._into(plan.as_dict())

    def _into(self, plan: dict[str, Any]) -> dict[str, Any]:
        stages = zip(plan["stages"], self.stages, strict=True)
        priced = plan | {
            "stages": [row | asdict(cost) for row, cost in stages],
            "totals": plan["totals"] | asdict(self.total),
        }
        return (
            priced
            if self.fastest is None
            else priced | {"fastest": self.fastest._into(plan["fastest"])}
        )


def price(config: Config, plan: Plan, throughput: Throughput) -> PlanCost:
    """What each stage of a plan costs, and the whole."""
    costs = tuple(_stage_cost(config, plan, row, throughput) for row in plan.stages)
    fastest = None if plan.fastest is None else price(config, plan.fastest, throughput)
    return PlanCost(costs, total_cost(costs), tuple(throughput.times), fastest)


def total_cost(costs: Sequence[Cost]) -> Cost:
    """The sum of costs; what is not known of one is not known of the sum."""
    bases: list[Basis] = [cost.seconds_basis for cost in costs if cost.seconds_basis is not None]
    weakest = min(bases, key=lambda basis: _STRENGTH[basis], default=None)
    sent = [cost.bytes_sent for cost in costs if cost.bytes_sent is not None]
    return Cost(
        seconds=_sum(cost.seconds for cost in costs),
        seconds_basis=weakest if len(bases) == len(costs) else None,
        node_hours=_sum(cost.node_hours for cost in costs),
        bytes_sent=sum(sent) if len(sent) == len(costs) else None,
        idle_seconds=_sum(cost.idle_seconds for cost in costs),
    )


def nodes(config: Config, ranks: int) -> int:
    """Nodes that so many ranks take."""
    return nodes_of(ranks, config.ranks.per_node)


def _sum(values: Iterable[float | None]) -> float | None:
    found = list(values)
    known = [value for value in found if value is not None]
    return fsum(known) if len(known) == len(found) else None


def _stage_cost(config: Config, plan: Plan, row: Stage, throughput: Throughput) -> Cost:
    timed = _stage_seconds(config, plan, row, throughput)
    seconds, basis = (None, None) if timed is None else timed
    size = throughput.bytes_per_update
    return Cost(
        seconds=seconds,
        seconds_basis=basis,
        node_hours=None if seconds is None else seconds * nodes(config, row.ranks) / 3600,
        bytes_sent=None if size is None else round(size * row.ranks * row.updates),
        idle_seconds=None if seconds is None else seconds * row.idle,
    )


def _stage_seconds(
    config: Config, plan: Plan, row: Stage, throughput: Throughput
) -> tuple[float, Basis] | None:
    """The time of a stage: short updates have fewer micro-batches and take less."""
    begin = Clock(row.start_sample, 0, plan.dataset_size)  # sizes do not depend on updates done
    sizes = updates_by_size(
        begin,
        row.global_batch,
        row.updates,
        config.batch.epoch_end,
        run_end(config, plan.dataset_size),
    )
    terms: dict[int, tuple[float, Basis]] = {}
    for size, count in sizes.items():
        pieces = decompose(size, row.micro_batch, row.ranks)
        found = throughput.seconds(pieces.ranks, pieces.accumulation, pieces.micro_batch)
        if found is None:
            return None
        terms[size] = (count * found[0], found[1])
    return fsum(seconds for seconds, _ in terms.values()), terms[max(terms)][1]


# Uneven stages


def idle_share(plan: Plan) -> float:
    """Share of the run's rank-time that ranks wait because micro-batches do not divide evenly, if a
    micro-batch always takes the same time."""
    taken = sum(row.updates * row.accumulation * row.ranks * row.micro_batch for row in plan.stages)
    return 1.0 - sum(row.updates * row.global_batch for row in plan.stages) / taken


def always_even(config: Config, plan: Plan) -> bool:
    """Whether every global batch of a plan divides evenly among its ranks; with growth from
    measurements, every batch that it may come to (False if they are too many to look at)."""
    if any(row.idle > 0 for row in _all_stages(plan)):
        return False
    batch, ranks = config.batch, _given_ranks(config, plan)
    if plan.fastest is None or len(plan.fastest.stages) == 1 or batch.max is None:
        return True
    if isinstance(batch.growth, GoodputGrowth):
        return True  # what it chooses is ranks × accumulation
    possible = range(batch.initial, batch.max + 1, batch.multiple_of)
    return len(possible) <= _MOST_BATCHES and all(
        size % (batch.micro_batch * (ranks or ranks_for(size, batch, config.ranks))) == 0
        for size in possible
    )


def even_settings(config: Config, plan: Plan) -> list[str]:
    """Overrides that make an uneven plan even: of the batches and of the micro-batch, as far as
    there are any close to what is set. Each is tried before it is named."""
    if len(_all_stages(plan)) > _MOST_STAGES:
        return []
    found: list[str] = []
    for candidates in (_even_batches(config, plan), _even_micros(config, plan)):
        for settings in candidates:
            if _makes_even(config, plan, settings):
                found.append(" ".join(f"batch.{key}={value}" for key, value in settings.items()))
                break
    return found


# More would take longer to try than a plan may take.
_MOST_STAGES = 300
_MOST_BATCHES = 20_000
_MOST_MICROS = 2048


def _all_stages(plan: Plan) -> tuple[Stage, ...]:
    return plan.stages if plan.fastest is None else plan.stages + plan.fastest.stages


def _given_ranks(config: Config, plan: Plan) -> int | None:
    """The ranks that a plan was asked for, if they are not those of the configuration."""
    ranks = plan.stages[0].ranks
    return None if ranks == config.ranks.start else ranks


def _even_batches(config: Config, plan: Plan) -> Iterator[dict[str, int]]:
    batch, ranks = config.batch, {row.ranks for row in _all_stages(plan)}
    for shared in sorted({min(ranks), max(ranks), lcm(*ranks)}):
        unit = lcm(batch.multiple_of, shared * batch.micro_batch)
        initial = max(1, (batch.initial + unit // 2) // unit) * unit
        if 2 * initial > 3 * batch.initial:
            return
        changed = {} if initial == batch.initial else {"initial": initial}
        if batch.max is not None:
            most = max(initial, batch.max // unit * unit)
            changed |= {} if most == batch.max else {"max": most}
        if changed:
            yield changed
        yield changed | {"multiple_of": unit}


def _even_micros(config: Config, plan: Plan) -> Iterator[dict[str, int]]:
    micro, ranks = config.batch.micro_batch, plan.stages[0].ranks
    low, high = max(-(-micro // 2), micro - _MOST_MICROS), min(2 * micro, micro + _MOST_MICROS)
    near = [
        size
        for size in range(low, high + 1)
        if config.batch.initial % (ranks * size) == 0 and size != micro
    ]
    for size in sorted(near, key=lambda size: abs(size - micro))[:3]:
        yield {"micro": size}


def _makes_even(config: Config, plan: Plan, settings: dict[str, int]) -> bool:
    raw = config.model_dump()
    raw["batch"] |= settings
    try:
        changed = Config.model_validate(raw)
        planned = build_plan(changed, plan.dataset_size, _given_ranks(config, plan))
    except (ValueError, HarnessError):  # what else is set forbids it
        return False
    return always_even(changed, planned)


# Reading what was measured


_NEEDED = ("ranks", "accumulation", "micro_batch", "global_batch", "images_per_sec")
_FORM = (
    f"a line is a JSON object with {', '.join(_NEEDED)} and, for the bytes, update and comm_bytes, "
    "as in a run's metrics.jsonl"
)


@dataclass(frozen=True)
class _Window:
    """What a line tells of its updates."""

    ranks: int
    micro_batch: int
    accumulation: int
    """Micro-batches of the busiest rank in a full update."""
    mean_accumulation: float
    """The mean over its updates, short ones among them."""
    seconds: float
    """The mean time of an update."""


def read_throughput(*paths: Path) -> Throughput:
    """Read throughput files, the metrics.jsonl of run directories, or the bench.json of benches, as
    one.

    Raises DataError, with the file and the line, for what is not in that form or tells nothing.
    """
    groups: dict[tuple[int, int], list[_Window]] = {}
    sent: list[tuple[int, float]] = []
    for path in paths:
        file = _file(path)
        windows, payloads = _read_points(file) if file.name == NAME else _read(file)
        sent += payloads
        for window in windows:
            groups.setdefault((window.ranks, window.micro_batch), []).append(window)
    sizes = [size for ranks, size in sent if ranks > 1] or [size for _, size in sent]
    return Throughput(
        {key: _update_times(group) for key, group in groups.items()},
        _median(sizes) if sizes else None,
    )


def measured_otherwise(config: Config, path: Path) -> list[str]:
    """How the run that a throughput file belongs to differs in what its times and bytes depend on,
    as ``key value (this plan: value)``; nothing if the file belongs to no run."""
    file = _file(path).with_name("config.yaml")
    if not os.path.isfile(file):
        return []
    measured = load_config(file)
    values = (
        ("model.name", config.model.name, measured.model.name),
        ("data.dataset", config.data.dataset, measured.data.dataset),
        ("optimizer.name", config.optimizer.name, measured.optimizer.name),
        ("comm.compression", config.comm.compression, measured.comm.compression),
        ("comm.summation", config.comm.summation, measured.comm.summation),
    )
    return [f"{key} {there} (this plan: {here})" for key, here, there in values if here != there]


def _file(path: Path) -> Path:
    if not os.path.isdir(path):  # Path.is_dir may raise
        return path
    return path / (NAME if os.path.isfile(path / NAME) else "metrics.jsonl")


def _read_points(file: Path) -> tuple[list[_Window], list[tuple[int, float]]]:
    """The same of a bench, whose points have no warm-up: a window for each point."""
    bench = read_bench(file)
    if not bench.points:
        raise DataError(f"{file}: no point has been measured yet")
    windows = [
        _Window(p.ranks, p.micro_batch, p.accumulation, p.accumulation, p.seconds_per_update)
        for p in bench.points
    ]
    size = bench.gradient_bytes
    return windows, [] if size is None else [(p.ranks, size) for p in bench.points]


def _read(file: Path) -> tuple[list[_Window], list[tuple[int, float]]]:
    """A file's windows, and (ranks, bytes per update) of those that tell."""
    if os.path.exists(file) and not os.path.isfile(file):
        raise DataError(f"{file}: not a regular file; give a run directory or its metrics.jsonl")
    windows: list[_Window] = []
    sent: list[tuple[int, float]] = []
    before: dict[str, Any] = {}
    for place, record in _records(file):
        fields = _checked(record, place)
        updates, samples = _progress(before, fields)
        if all(fields[name] is not None for name in _NEEDED):
            windows.append(_window(fields, updates, samples))
            if updates and fields["comm_bytes"] is not None:
                sent.append((fields["ranks"], fields["comm_bytes"] / updates))
        before = fields
    if not windows:
        raise DataError(f"{file}: no line tells a throughput; {_FORM}")
    return _without_warm_up(windows), sent


def _records(file: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """The objects of a JSON Lines file, each with its place. A last line that a killed run could
    not finish is left out."""
    try:
        with open_regular(file) as opened:
            for number, line in enumerate(read_lines(opened), start=1):
                place = f"{file}:{number}"
                try:
                    record = json.loads(line, parse_constant=_refuse)
                except (ValueError, RecursionError):
                    if number > 1 and not line.endswith(b"\n"):
                        return
                    raise DataError(f"{place}: not JSON; {_FORM}") from None
                if not isinstance(record, dict):
                    raise DataError(f"{place}: not a JSON object; {_FORM}")
                yield place, record
    except OSError as error:
        raise DataError(
            f"{file}: cannot be read: {error.strerror}; give a run directory or a file in which "
            f"{_FORM}"
        ) from None


def _refuse(name: str) -> None:
    raise ValueError(f"{name} is no JSON")


def _checked(record: dict[str, Any], place: str) -> dict[str, Any]:
    """The fields that count, None where they are null; raises DataError for any other value that
    makes no sense, or if one that is needed is not there."""
    missing = [name for name in _NEEDED if name not in record]
    if missing:
        raise DataError(f"{place}: no {', '.join(missing)}; {_FORM}")
    fields: dict[str, Any] = {}
    for name in (*_NEEDED, "update", "samples_seen", "comm_bytes"):
        value = fields[name] = record.get(name)
        if value is None:
            continue
        if name == "images_per_sec":
            valid, fits = "a number from 1e-9 to 1e15", _is_number(value) and 1e-9 <= value <= 1e15
        else:
            least = 0 if name in ("update", "samples_seen", "comm_bytes") else 1
            valid = f"a whole number from {least} to 2^62"
            fits = isinstance(value, int) and _is_number(value) and least <= value <= 2**62
        if not fits:
            raise DataError(f"{place}: {name} must be {valid}, or null, not {_shown(value)}")
    return fields


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _shown(value: object) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 40 else f"{text[:40]}…"


def _progress(before: dict[str, Any], fields: dict[str, Any]) -> tuple[int | None, int | None]:
    """Updates and samples since the line before; None for what cannot be known. Where one of them
    falls, another run's lines begin."""
    steps: list[int | None] = []
    for name in ("update", "samples_seen"):
        last, now = before.get(name), fields[name]
        steps.append(None if last is None or now is None else now - last)
    if any(step is not None and step <= 0 for step in steps):
        return None, None
    return steps[0], steps[1]


def _window(fields: dict[str, Any], updates: int | None, samples: int | None) -> _Window:
    """A line's updates. Where one of them was the short one at an epoch's end, it is known by the
    samples it took; where that cannot be told, all count as full."""
    batch, full, rate = fields["global_batch"], fields["accumulation"], fields["images_per_sec"]
    mean, seconds = float(full), batch / rate
    if updates and samples:
        size = samples - (updates - 1) * batch
        if 0 < size < batch:
            short = decompose(size, fields["micro_batch"], fields["ranks"]).accumulation
            mean, seconds = ((updates - 1) * full + short) / updates, samples / rate / updates
    return _Window(fields["ranks"], fields["micro_batch"], full, mean, seconds)


def _without_warm_up(windows: list[_Window]) -> list[_Window]:
    """Without the first window, unless nothing else tells of its decomposition."""
    first, *others = windows
    known = {(window.ranks, window.micro_batch, window.accumulation) for window in others}
    return others if (first.ranks, first.micro_batch, first.accumulation) in known else windows


def _update_times(windows: Sequence[_Window]) -> UpdateTimes:
    """The times of an update on the same ranks with the same micro-batch."""
    by_full: dict[int, dict[float, list[float]]] = {}
    for window in windows:
        means = by_full.setdefault(window.accumulation, {})
        means.setdefault(window.mean_accumulation, []).append(window.seconds)
    points = [
        (mean, _median(seconds)) for means in by_full.values() for mean, seconds in means.items()
    ]
    # Without short updates the means are the accumulations; with them those of two may be the same.
    line = len(by_full) > 1 and len({mean for mean, _ in points}) > 1
    fixed, per_micro = _fit(points) if line else (0.0, 1.0)
    measured: dict[int, float] = {}
    for full, means in by_full.items():
        # Windows with a short update among them are brought to full ones along the fitted line,
        # and serve only where there are no others.
        measured[full] = _median(means[full]) if full in means else _median([
            seconds * (fixed + full * per_micro) / (fixed + mean * per_micro)
            for mean, group in means.items()
            for seconds in group
        ])  # fmt: skip
    if line:
        return UpdateTimes(measured, fixed, per_micro, "fitted")
    share = _median([seconds / full for full, seconds in measured.items()])
    return UpdateTimes(measured, 0.0, share, "scaled")


def _fit(points: Sequence[tuple[float, float]]) -> tuple[float, float]:
    """(fixed, per_micro), both at least 0, with the least squares of time − fixed − accumulation ×
    per_micro over points (accumulation, time) with at least two accumulations."""
    count = len(points)
    mean_a, mean_t = fsum(a for a, _ in points) / count, fsum(t for _, t in points) / count
    spread = fsum((a - mean_a) ** 2 for a, _ in points)
    slope = fsum((a - mean_a) * (t - mean_t) for a, t in points) / spread
    if slope <= 0:
        return mean_t, 0.0
    if mean_t < slope * mean_a:
        return 0.0, fsum(a * t for a, t in points) / fsum(a * a for a, _ in points)
    return mean_t - slope * mean_a, slope


def _median(values: Sequence[float]) -> float:
    ordered = sorted(values)
    middle = len(ordered) // 2
    return ordered[middle] if len(ordered) % 2 else (ordered[middle - 1] + ordered[middle]) / 2
