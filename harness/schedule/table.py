"""The plan as a table for people."""

from __future__ import annotations

from rich.console import Console
from rich.table import Table

from harness.config import Config
from harness.schedule.plan import Plan, Stage


def print_plan(config: Config, plan: Plan, console: Console | None = None) -> None:
    """Print stages, and totals in a sentence."""
    table = Table(title=f"{config.name}: {config.model.name} on {config.data.dataset}")
    for heading in ("stage", "epochs", "updates", "global batch", "ranks × accum × micro"):
        table.add_column(heading, justify="right")
    for heading in ("lr", "momentum", "idle"):
        table.add_column(heading, justify="right")
    for row in plan.stages:
        table.add_row(*_cells(row), end_section=_last_of_segment(row, plan))
    target = console or Console()
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
    if any(row.idle > 0 for row in plan.stages):
        target.print(
            "idle: share of rank-time spent waiting, because the micro-batches do not divide evenly "
            "among the ranks.",
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


def _last_of_segment(row: Stage, plan: Plan) -> bool:
    later = [other for other in plan.stages if other.stage > row.stage]
    return bool(later) and later[0].segment != row.segment
