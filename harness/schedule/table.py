"""The plan as tables and sentences for people."""

from __future__ import annotations

import sys
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby, pairwise, product

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from harness.schedule.configured import growth_policy
from harness.schedule.costs import (
    Basis,
    Cost,
    PlanCost,
    always_even,
    even_settings,
    idle_share,
    nodes,
    total_cost,
)
from harness.schedule.goodput import Goodput
from harness.schedule.plan import Plan, Stage
from harness.schema import Config, GoodputGrowth, Paper, Printed
from harness.wording import counted

_WIDE = 200  # columns where no terminal sets them
_UNLIMITED = 10_000
_MOST, _SHOWN = 40, 15  # of more stages or launches than 40, 15 at either end are shown
_FEW = 1 / 8  # of a batch: fewer samples than this at the end of an epoch are told of


def print_plan(
    config: Config, plan: Plan, console: Console | None = None, costs: PlanCost | None = None
) -> None:
    """Print the stages as a table, and in sentences what else there is to say.

    Growth that is decided from measurements has two tables, of its bounds.
    """
    target = console or Console(width=None if sys.stdout.isatty() else _WIDE)
    title = f"{config.name}: {config.model.name} on {config.data.dataset}"
    if config.paper is not None:
        _say(target, _recipe(config.paper))
    if plan.fastest is not None:
        _say(target, _bounds(config, plan, plan.fastest))
    for sentence in _goodput_sentences(config):
        _say(target, sentence)
    if plan.fastest is None or len(plan.fastest.stages) == 1:
        _print_stages(target, title, config, plan, costs)
    else:
        _print_stages(target, f"{title}: no growth", config, plan, costs)
        costs = None if costs is None else costs.fastest
        _print_stages(target, f"{title}: fastest growth", config, plan.fastest, costs)
    if not always_even(config, plan):
        _say(target, _how_even(config, plan))


def _say(target: Console, sentence: str) -> None:
    """Print a sentence: in one line, for programs that search; on a terminal between its edges."""
    target.print(sentence, highlight=False, markup=False, soft_wrap=not target.is_terminal)


# The table


@dataclass(frozen=True)
class _Line:
    """A line of the table: one stage, or all those that lie between the ones shown."""

    stages: tuple[Stage, ...]
    costs: tuple[Cost, ...]

    @property
    def first(self) -> Stage:
        return self.stages[0]

    @property
    def last(self) -> Stage:
        return self.stages[-1]

    @property
    def single(self) -> bool:
        return len(self.stages) == 1

    def change(self, first: str, last: str) -> str:
        """What goes from one value to another within a stage; many stages go through others."""
        return first if first == last else f"{first} → {last}" if self.single else "…"


@dataclass(frozen=True)
class _Column:
    heading: str
    cell: Callable[[_Line], str]
    spare: int = 0
    """Where the terminal is too narrow, columns above 0 are left out, the highest ones first."""
    breaks: bool = False
    """Whether its cells may be broken where it still is."""


def _print_stages(
    target: Console, title: str, config: Config, plan: Plan, costs: PlanCost | None
) -> None:
    lines = _lines(plan, costs)
    about, price = _columns(plan), [] if costs is None else _cost_columns()
    for extra, spare in product((price, []), (3, 2, 1, 0)):
        columns = [column for column in about if column.spare <= spare] + extra
        table = _table(columns, lines)
        fits = _width(target, table) <= target.width
        if fits:
            break
    if not fits:
        table = _table(columns, lines, breaks=True)
    table.title = Text(title)
    target.print(table)
    if price and not extra:
        target.print(_table([about[0], *price], lines))
    missing = [column.heading for column in about if column not in columns]
    if "momentum" in missing:
        missing.remove("momentum")
        _say(target, f"Momentum is {_momentum(lines[0])} throughout.")
    if missing:
        _say(target, f"A wider terminal has room for {' and '.join(missing)}.")
    for sentence in _sentences(config, plan, costs):
        _say(target, sentence)


def _lines(plan: Plan, costs: PlanCost | None) -> list[_Line]:
    stages = plan.stages
    cuts = list(range(len(stages) + 1))
    if len(stages) > _MOST:
        del cuts[_SHOWN + 1 : -_SHOWN - 1]
    return [
        _Line(stages[begin:end], () if costs is None else costs.stages[begin:end])
        for begin, end in pairwise(cuts)
    ]


def _table(columns: Sequence[_Column], lines: Sequence[_Line], breaks: bool = False) -> Table:
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 0, 0, 1), pad_edge=False)
    for column in columns:
        table.add_column(column.heading, justify="right", no_wrap=not (breaks and column.breaks))
    for line, after in zip(lines, [*lines[1:], None], strict=True):
        table.add_row(
            *(column.cell(line) for column in columns),
            end_section=after is not None and after.first.segment != line.last.segment,
        )
    return table


def _width(target: Console, table: Table) -> int:
    options = target.options.update(max_width=_UNLIMITED)
    return target.measure(table, options=options).maximum


def _columns(plan: Plan) -> list[_Column]:
    stages = plan.stages
    momenta = {f"{value:.5g}" for row in stages for value in (row.momentum, row.momentum_end)}
    one_momentum = len(momenta) == 1
    columns = [
        _Column("stage", _stage),
        _Column("segment", _segment, spare=1),
        _Column("epochs", _epochs, breaks=True),
        _Column("samples", _samples, spare=3),
        _Column("updates", _updates),
        _Column("batch", _batch, breaks=True),
        _Column("ranks × accum\n× micro", _decomposition),
        _Column("lr", _rate, breaks=True),
        _Column("momentum", _momentum, spare=2 if one_momentum else 0, breaks=True),
        _Column("lr/(1−m)", _effective, spare=2),
        _Column("idle", _idle),
    ]
    left_out = {
        "segment": stages[-1].segment == 0,
        "lr/(1−m)": one_momentum,
        "idle": all(row.idle == 0 for row in stages),
    }
    return [column for column in columns if not left_out.get(column.heading)]


def _stage(line: _Line) -> str:
    return str(line.first.stage) if line.single else "⋮"


def _segment(line: _Line) -> str:
    return _span([row.segment for row in line.stages])


def _epochs(line: _Line) -> str:
    return f"{_short(line.first.start_epoch, 2)} – {_short(line.last.end_epoch, 2)}"


def _samples(line: _Line) -> str:
    return f"{line.last.end_sample - line.first.start_sample:,}"


def _updates(line: _Line) -> str:
    return f"{sum(row.updates for row in line.stages):,}"


def _batch(line: _Line) -> str:
    return _span([row.global_batch for row in line.stages])


def _decomposition(line: _Line) -> str:
    row = line.first
    return f"{row.ranks} × {row.accumulation} × {row.micro_batch}" if line.single else "…"


def _rate(line: _Line) -> str:
    rates = (line.first.lr_start, line.first.lr_after_warmup, line.last.lr_end)
    start, warm, end = (None if rate is None else f"{rate:.5g}" for rate in rates)
    if warm is None or warm in (start, end) or not line.single:
        return line.change(str(start), str(end))
    return f"{start} → {warm} → {end}"


def _momentum(line: _Line) -> str:
    return line.change(f"{line.first.momentum:.5g}", f"{line.last.momentum_end:.5g}")


def _effective(line: _Line) -> str:
    first, last = line.first.effective_lr_start, line.last.effective_lr_end
    return line.change(f"{first:.4g}", f"{last:.4g}")


def _idle(line: _Line) -> str:
    most = max(row.idle for row in line.stages)
    return f"{'' if line.single else '≤ '}{most:.1%}" if most > 0 else "–"


def _cost_columns() -> list[_Column]:
    return [_Column("time", _time), _Column("node-h", _node_hours), _Column("sent", _sent)]


def _time(line: _Line) -> str:
    cost = total_cost(line.costs)
    if cost.seconds is None:
        return "?"
    return _about(cost.seconds, cost.seconds_basis)


def _about(seconds: float, basis: Basis | None) -> str:
    return f"{'' if basis == 'measured' else '≈ '}{duration(seconds)}"


def _node_hours(line: _Line) -> str:
    hours = total_cost(line.costs).node_hours
    return "?" if hours is None else _hours(hours)


def _sent(line: _Line) -> str:
    sent = total_cost(line.costs).bytes_sent
    return "?" if sent is None else data_size(sent)


def _span(values: Sequence[int]) -> str:
    low, high = min(values), max(values)
    return f"{low:,}" if low == high else f"{low:,} – {high:,}"


def _short(epoch: float, places: int = 3) -> str:
    return f"{epoch:.{places}f}".rstrip("0").rstrip(".")


# Units for people


def duration(seconds: float) -> str:
    """A time as people say it: ``430 ms``, ``12.5 s``, ``3 min 12 s``, ``1 h 12 min``, ``2 d``."""
    if seconds < 0.9995:
        return f"{seconds * 1000:.3g} ms"
    if seconds < 59.95:
        return f"{seconds:.3g} s"
    for unit, smaller, size in (("min", "s", 60), ("h", "min", 3600), ("d", "h", 86400)):
        step = {"s": 1, "min": 60, "h": 3600}[smaller]
        whole, rest = divmod(round(seconds / step), size // step)
        if unit == "d" or whole < {"min": 60, "h": 24}[unit]:
            break
    return f"{whole:,} {unit} {rest} {smaller}" if rest else f"{whole:,} {unit}"


def data_size(count: float) -> str:
    """Bytes as people say them, in powers of 1,000: ``3.4 GB``."""
    units = iter(("B", "kB", "MB", "GB", "TB", "PB"))
    unit = next(units)
    while count >= 999.5 and unit != "PB":
        count, unit = count / 1000, next(units)
    return f"{count:.3g} {unit}" if count < 999.5 else f"{count:,.0f} {unit}"


def _hours(hours: float) -> str:
    if hours < 0.0005:
        return "< 0.001"
    return (
        f"{hours:.3f}" if hours < 0.0995 else f"{hours:.3g}" if hours < 999.5 else f"{hours:,.0f}"
    )


# The sentences


def _recipe(paper: Paper) -> str:
    printed = "; ".join(map(_printed, paper.printed))
    return f"Recipe: {paper.source}, {paper.place}" + (
        f"; printed there: {printed}." if printed else "."
    )


def _printed(result: Printed) -> str:
    text = result.metric
    if result.value is not None:
        text += f" {result.value:g}"
    if result.below is not None:
        text += f" below {result.below:g}"
    return text if result.note is None else f"{text} ({result.note})"


def _bounds(config: Config, plan: Plan, fastest: Plan) -> str:
    most, least = (sum(row.updates for row in bound.stages) for bound in (plan, fastest))
    text = f"Growth is decided while it trains (policy {config.batch.growth.policy})"
    if len(fastest.stages) == 1:
        return f"{text}, but nothing that could grow the batch is decided within the run."
    first = fastest.stages[0]
    return (
        f"{text}: between {counted(most, 'update')}, where the batch never grows, and {least:,}, "
        f"where it grows as fast as it may. The first growth may come at epoch "
        f"{_short(first.end_epoch)}, after {counted(first.updates, 'update')}."
    )


def _goodput_sentences(config: Config) -> Iterator[str]:
    """What growth by goodput would choose at which noise scale, before one is known."""
    policy, growth = growth_policy(config.batch), config.batch.growth
    if not isinstance(policy, Goodput) or not isinstance(growth, GoodputGrowth):
        return
    options, start = policy.options, config.ranks.start
    seen: dict[tuple[int, int], str] = {}
    for scale in (policy.initial * 2.0**power for power in range(-2, 21)):
        one = options.best(scale, policy.objective, policy.efficiency)
        if one is not None and (one.batch, one.ranks) not in seen:
            seen[one.batch, one.ranks] = (
                f"{one.batch:,} = {one.ranks} × {one.accumulation} × {options.micro} from "
                f"{scale:,.4g}"
            )
    yield (
        f"By throughput × statistical efficiency ({_OBJECTIVES[growth.objective]}) the choice "
        f"would be, by the noise scale in samples: {_some(list(seen.values()))}."
    )
    model, most = growth.model, max(one.ranks for one in options.all)
    if model is not None and model.measured_ranks is not None and model.measured_ranks < most:
        yield (
            f"Speed is measured on up to {counted(model.measured_ranks, 'rank')}; what it says of "
            f"up to {most:,} is the model's word."
        )
    larger = min((size for size in options.batches if size > policy.initial), default=None)
    if larger is None:
        yield "No larger batch can be chosen: none of ranks × accumulation × micro is in bounds."
    elif policy.limit is not None and larger > policy.initial * policy.limit:
        yield (
            f"The batch stays: the smallest larger choice, {larger:,}, is more than "
            f"batch.growth.limit = {policy.limit:g} times {policy.initial:,}."
        )
    first = options.fastest(policy.initial)
    if first.ranks != start and first.ranks <= config.ranks.ceiling:
        gain = first.images_per_sec / options.option(start, policy.initial).images_per_sec
        yield (
            f"A batch of {policy.initial:,} would be {gain:.2f} times as fast on "
            f"{counted(first.ranks, 'rank')} as on {start}: ranks.start={first.ranks}."
        )


_OBJECTIVES = {"time": "the least time", "rank_hours": "bounded rank-hours"}


def _some(told: list[str]) -> str:
    if len(told) <= 8:
        return ", ".join(told)
    return ", ".join([*told[:4], "…", *told[-3:]])


def _sentences(config: Config, plan: Plan, costs: PlanCost | None) -> Iterator[str]:
    if len(plan.stages) > _MOST:
        ends = f"{_SHOWN} – {len(plan.stages) - _SHOWN - 1}"
        yield f"⋮ {len(plan.stages) - 2 * _SHOWN:,} stages, {ends}: --json shows them all."
    yield _totals(config, plan)
    if costs is not None:
        yield from _expenses(config, plan, costs)
    yield from _segments(config, plan)
    last = plan.stages[-1]
    if last.asked > last.global_batch:
        yield (
            f"Stage {last.stage} stays at batch.max = {last.global_batch:,} where the policy asks "
            f"for more, up to {last.asked:,}: the rate is multiplied by max/asked instead."
        )
    uneven = [row.stage for row in plan.stages if row.idle > 0]
    if uneven:
        yield _unevenness(plan, uneven, costs)
    yield from _remainders(config, plan)


def _totals(config: Config, plan: Plan) -> str:
    updates = sum(row.updates for row in plan.stages)
    text = f"{plan.stages[-1].end_sample:,} samples in {counted(updates, 'update')}"
    if updates == plan.updates_at_initial:
        return f"{text}."
    return (
        f"{text}; a global batch of {config.batch.initial:,} throughout would take "
        f"{plan.updates_at_initial:,} ({plan.updates_at_initial / updates:.1f} ×)."
    )


def _expenses(config: Config, plan: Plan, costs: PlanCost) -> Iterator[str]:
    total = costs.total
    if total.seconds is not None and total.node_hours is not None:
        yield (
            f"{_about(total.seconds, total.seconds_basis)} and {_hours(total.node_hours)} "
            "node-hours for the updates; evaluations, checkpoints and launches come on top."
        )
    if total.bytes_sent is not None:
        yield f"{data_size(total.bytes_sent)} sent: what all ranks together hand to the allreduce."
    for basis, how in (
        ("fitted", "fitted to other accumulations of the same ranks and micro-batch"),
        ("scaled", "scaled from another accumulation of the same ranks and micro-batch"),
    ):
        if found := [
            row.stage
            for row, cost in zip(plan.stages, costs.stages, strict=True)
            if cost.seconds_basis == basis
        ]:
            yield f"≈ {_stages(found)}: {how}."
    unknown = [
        row for row, cost in zip(plan.stages, costs.stages, strict=True) if cost.seconds is None
    ]
    if unknown:
        yield (
            f"? {_stages([row.stage for row in unknown])}: nothing was measured with "
            f"{_kinds({(row.ranks, row.micro_batch) for row in unknown})}, only with "
            f"{_kinds(costs.measured)}."
        )


def _kinds(kinds: Collection[tuple[int, int]]) -> str:
    said = [f"{counted(ranks, 'rank')} × micro-batch {micro}" for ranks, micro in sorted(kinds)]
    return ", ".join(said[:5]) + (f" and {len(said) - 5} more" if len(said) > 5 else "")


def _segments(config: Config, plan: Plan) -> Iterator[str]:
    """The launches, if there is more than one."""
    segments = [list(rows) for _, rows in groupby(plan.stages, key=lambda row: row.segment)]
    if len(segments) == 1:
        return
    for index, rows in enumerate(segments):
        if len(segments) > _MOST and _SHOWN <= index < len(segments) - _SHOWN:
            if index == _SHOWN:
                yield f"⋮ {len(segments) - 2 * _SHOWN:,} more segments"
            continue
        first, last = rows[0], rows[-1]
        places = counted(first.ranks, "rank")
        if config.ranks.per_node is not None:
            places += f", {counted(nodes(config, first.ranks), 'node')}"
        yield (
            f"segment {first.segment}: epochs {_short(first.start_epoch)} – "
            f"{_short(last.end_epoch)} on {places} "
            f"({_stages([row.stage for row in rows]).lower()})"
        )


def _remainders(config: Config, plan: Plan) -> Iterator[str]:
    """Few samples at the end of an epoch get the rate of a whole batch, far too much for an average
    over so few: with 1 of 718 in each epoch nothing trains (docs/studies/lars.md)."""
    if config.batch.epoch_end == "carry":
        return
    size = plan.dataset_size
    found = {
        row.stage: (size % row.global_batch, row.global_batch)
        for row in plan.stages
        if row.end_epoch - row.start_epoch >= 1
        and 0 < size % row.global_batch <= _FEW * row.global_batch < size
    }
    if found:
        left, batch = next(iter(found.values()))
        yield (
            f"{_stages(list(found))}: the last update of an epoch has only {left:,} of "
            f"{counted(batch, 'sample')}, at the rate of a whole batch. batch.epoch_end=carry "
            f"fills it from the next epoch; a batch of {-(-size // (size // batch)):,} shares the "
            "epoch evenly."
        )


def _unevenness(plan: Plan, uneven: list[int], costs: PlanCost | None) -> str:
    lost = None if costs is None else costs.total.idle_seconds
    spent = "" if lost is None else f" ({duration(lost)})"
    return (
        f"{_stages(uneven)}: the micro-batches do not divide evenly among the ranks. "
        f"{idle_share(plan):.1%} of the run's rank-time{spent} is spent waiting; idle is a stage's "
        "share."
    )


def _how_even(config: Config, plan: Plan) -> str:
    settings = even_settings(config, plan)
    text = ""
    if plan.fastest is not None and len(plan.fastest.stages) > 1:
        text = "Batches between the bounds may not divide evenly among the ranks. "
    if settings:
        return f"{text}Even would be: {', or '.join(settings)}."
    units = sorted({row.ranks * row.micro_batch for row in (plan.fastest or plan).stages})
    said = ", ".join(f"{unit:,}" for unit in units[:5]) + (", …" if len(units) > 5 else "")
    return f"{text}Even are batches that ranks × micro-batch divides: multiples of {said}."


def _stages(stages: Sequence[int]) -> str:
    """``Stage 3`` or ``Stages 0 – 3, 5``; a count where that would be long."""
    if len(stages) == 1:
        return f"Stage {stages[0]}"
    runs: list[list[int]] = []
    for stage in stages:
        if runs and stage == runs[-1][-1] + 1:
            runs[-1].append(stage)
        else:
            runs.append([stage])
    if len(runs) > 6:
        return f"{len(stages):,} stages from {stages[0]} to {stages[-1]}"
    return f"Stages {', '.join(_ends(run) for run in runs)}"


def _ends(run: list[int]) -> str:
    return str(run[0]) if len(run) == 1 else f"{run[0]} – {run[-1]}"
