"""Benches that tests make up."""

from __future__ import annotations

from typing import Any

from harness.benchfile import Bench, Point, Repeat
from harness.benchstats import point_of

PHASES = ("data", "forward", "backward", "comm_exposed", "optimizer", "other")


def repeat(number: int, images_per_sec: float, batch: int) -> Repeat:
    seconds = batch / images_per_sec
    phases = dict.fromkeys(PHASES, seconds / len(PHASES))
    return Repeat(number, images_per_sec, seconds, 100, 7, phases)


def point(
    ranks: int,
    *rates: float,
    micro: int = 32,
    accumulation: int = 1,
    batch: int | None = None,
    nodes: int = 1,
) -> Point:
    """Of repeats with these images/s."""
    size = batch or ranks * micro * accumulation
    repeats = [repeat(i, rate, size) for i, rate in enumerate(rates)]
    return point_of(ranks, nodes, micro, accumulation, size, repeats, 2e6, 1e10)


def bench(*points: Point, **changes: Any) -> Bench:
    fields: dict[str, Any] = {
        "name": "made-up",
        "mode": "weak",
        "dataset": "synthetic",
        "model": "lenet5",
        "parameters": 61706,
        "gradient_bytes": 123460,
        "compression": "fp16",
        "engine": "horovod-mpi",
        "flops_per_image": 2e6,
        "peak_flops_per_rank": 1e10,
        "peak_source": "given",
        "machine": {"hardware": {"host": "here"}},
        "status": "complete",
        "points": points,
        "order": tuple((p.name, one.repeat) for p in points for one in p.repeats),
    }
    return Bench(**{**fields, **changes})
