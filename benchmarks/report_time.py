"""How long a report takes: a run with a line for each update, over a number of lines.

    .venv/bin/python benchmarks/report_time.py --lines 1000000 --repeats 5

Makes a run directory in a temporary folder: metrics.jsonl with every field that the trainer writes,
events, plan, configuration. Each repeat is `python -m harness report` from its start to its end, in
a process of its own.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from harness.records import PHASES

ROOT = Path(__file__).parents[1]
DATASET = 1_281_167
STAGES = 5
CONFIG = """\
name: report-time
data: {{dataset: imagenet}}
model: {{name: resnet50}}
batch: {{initial: 256, max: 4096, micro: 32}}
lr: {{base: 0.1}}
comm: {{backend: horovod, compression: fp16, bucket_mb: 4.0}}
train: {{duration: {updates}up, log_every: 1}}
"""


def metrics_line(draw: random.Random, update: int, updates: int, seen: int) -> dict[str, Any]:
    stage = (update - 1) * STAGES // updates
    batch, done = 256 << stage, update / updates
    seconds = {phase: draw.random() * 0.05 for phase in PHASES}
    return {
        "update": update,
        "samples_seen": seen + batch,
        "epoch": (seen + batch) / DATASET,
        "stage": stage,
        "ranks": 8,
        "accumulation": 1 << stage,
        "micro_batch": 32,
        "global_batch": batch,
        "lr": 0.1 * (1 - done) ** 2,
        "momentum": 0.9,
        "loss": 0.02 + 6.9 * math.exp(-8 * done) * draw.gauss(1, 0.08),
        "images_per_sec": batch / sum(seconds.values()),
        "seconds": seconds,
        "comm_bytes": 51_114_064,
        "grad_norm": draw.random(),
        "noise_scale": 1000 * math.exp(4 * done + draw.gauss(0, 0.2)),
        "distance_from_init": 0.4 + 1.5 * math.log(update),
        "rank_seconds": {
            "busy_max": 0.3 + 0.01 * draw.random(),
            "busy_median": 0.3,
            "slowest_rank": draw.randrange(8),
            "slowest_host": f"n{draw.randrange(4)}",
            "phase": "backward",
        },
        "memory_peak_bytes": 8_123_456_789,
        "counters": None,
    }


def write_run(path: Path, updates: int) -> None:
    """A run of that many updates, with a line, and every hundredth an evaluation, for each."""
    draw = random.Random(0)  # noqa: S311
    (path / "config.yaml").write_text(CONFIG.format(updates=updates), encoding="utf-8")
    seen, events = 0, [{"kind": "start", "update": 0, "samples_seen": 0, "attempt": 1, "ranks": 8}]
    with (path / "metrics.jsonl").open("w", encoding="utf-8") as file:
        for update in range(1, updates + 1):
            line = metrics_line(draw, update, updates, seen)
            at = {"update": update, "samples_seen": seen, "time": "2026-03-02T09:00:00+00:00"}
            if line["stage"] > (update - 2) * STAGES // updates:
                cut = {k: line[k] for k in ("stage", "global_batch", "ranks", "accumulation")}
                events.append({"kind": "stage", **at, **cut, "micro_batch": 32, "reason": "grown"})
            seen = line["samples_seen"]
            if update % max(updates // 100, 1) == 0:
                accuracy = 0.76 * (1 - math.exp(-6 * update / updates))
                told = {"epoch": line["epoch"], "loss": line["loss"], "accuracy": accuracy}
                events.append({"kind": "evaluation", **at, **told, "samples_seen": seen})
            file.write(json.dumps(line, separators=(",", ":")) + "\n")
    events.append({"kind": "end", "update": updates, "samples_seen": seen})
    lines = (json.dumps(event) + "\n" for event in events)
    (path / "events.jsonl").write_text("".join(lines), encoding="utf-8")
    totals = {"samples": seen, "dataset_size": DATASET, "epochs": seen / DATASET}
    plan = {"stages": [], "segments": [], "totals": totals}
    (path / "plan.json").write_text(json.dumps(plan), encoding="utf-8")


def build(run: Path) -> tuple[float, float]:
    """Wall and processor seconds of one build, interpreter and helpers included."""
    before, begin = os.times(), time.perf_counter()
    command = [sys.executable, "-m", "harness", "report", str(run)]
    subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
    wall, after = time.perf_counter() - begin, os.times()
    spent = after.children_user + after.children_system
    return wall, spent - before.children_user - before.children_system


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--lines", type=int, nargs="+", default=[1_000_000])
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args()
    print(
        "| lines | metrics.jsonl, MB | build, s | fastest to slowest | processor, s | lines/s | "
        "page, MB |\n|---|---|---|---|---|---|---|"
    )
    for lines in options.lines:
        with tempfile.TemporaryDirectory() as folder:
            run = Path(folder)
            write_run(run, lines)
            size = (run / "metrics.jsonl").stat().st_size / 1e6
            walls, spent = zip(*(build(run) for _ in range(options.repeats)), strict=True)
            page = (run / "report" / "index.html").stat().st_size / 1e6
        middle = statistics.median(walls)
        print(
            f"| {lines:,} | {size:.0f} | {middle:.1f} | {min(walls):.1f} to {max(walls):.1f} | "
            f"{statistics.median(spent):.1f} | {lines / middle:,.0f} | {page:.2f} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
