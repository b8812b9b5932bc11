"""The plan as a table for people."""

from __future__ import annotations

import sys
from itertools import zip_longest

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from harness.config import Config
from harness.schedule.plan import Plan, Stage

_WIDE = 200  # columns where no terminal sets them


def print_plan(config: Config, plan: Plan, console: Console | None = None) -> None:
    """Print stages, and totals in a sentence."""
    idles = any(row.idle > 0 for row in plan.stages)
    title = Text(f"{config.name}: {config.model.name} on {config.data.dataset}")
    table = Table(title=title, box=box.SIMPLE_HEAD)
    headings = ["stage", "epochs", "updates", "batch", "ranks × accum\n× micro", "lr", "momentum"]
    for heading in [*headings, "idle"] if idles else headings:
        table.add_column(heading, justify="right", no_wrap=True)
    for row, after in zip_longest(plan.stages, plan.stages[1:]):
        last_of_segment = after is not None and after.segment != row.segment
        table.add_row(*_cells(row)[: len(table.columns)], end_section=last_of_segment)
    target = console or Console(width=None if sys.stdout.isatty() else _WIDE)
    target.print(table)
    totals = plan.as_dict()["totals"]
    ratio = totals["updates_at_initial_batch"] / totals["updates"]
    target.print(
        f"{totals['samples']:,} samples in {totals['updates']:,} updates; a global batch of "
        f"{config.batch.initial} throughout would take {totals['updates_at_initial_batch']:,} "
        f"({ratio:.1f} ×).",
        highlight=False,
        soft_wrap=True,
    )
    last = plan.stages[-1]
    if last.asked > last.global_batch:
        target.print(
            f"Stage {last.stage} stays at batch.max = {last.global_batch:,} where the policy asks "
            f"for more, up to {last.asked:,}: the rate is multiplied by max/asked instead.",
            highlight=False,
            soft_wrap=True,
        )
    if idles:
        target.print(
            "idle: share of rank-time spent waiting, because the micro-batches do not divide evenly"
            " among the ranks.",
            highlight=False,
            soft_wrap=True,
        )


def _cells(row: Stage) -> list[str]:
    same_rate = f"{row.lr_start:.5g}" == f"{row.lr_end:.5g}"
    return [
        str(row.stage),
        f"{row.start_epoch:g} – {row.end_epoch:g}",
        f"{row.updates:,}",
        f"{row.global_batch:,}",
        f"{row.ranks} × {row.accumulation} × {row.micro_batch}",
        f"{row.lr_start:.5g}" if same_rate else f"{row.lr_start:.5g} → {row.lr_end:.5g}",
        f"{row.momentum:g}",
        f"{row.idle:.1%}" if row.idle > 0 else "–",
    ]
