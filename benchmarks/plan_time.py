"""How long planning takes: the command from its start, and the plan itself.

    .venv/bin/python benchmarks/plan_time.py [--repeats 15]

Prints medians, with the fastest and the slowest of the repeats, for a quiet machine.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

from harness.config import load_config
from harness.schedule.plan import build_plan

CONFIGS = Path(__file__).parents[1] / "configs"
DEMO = CONFIGS / "adabatch-digits.yaml"
IMAGENET = CONFIGS / "adabatch" / "imagenet-resnet50-adaptive-4096-x2.yaml"


def measure(what: str, action: Callable[[], object], repeats: int) -> None:
    """Print the median time of an action in milliseconds."""
    spent = []
    for _ in range(repeats):
        begin = time.perf_counter()
        action()
        spent.append(1e3 * (time.perf_counter() - begin))
    low, middle, high = min(spent), statistics.median(spent), max(spent)
    print(f"{what:<58} {middle:9.2f} ms   ({low:.2f} to {high:.2f})")


def command(*arguments: str) -> Callable[[], object]:
    words = [sys.executable, "-m", "harness", "plan", *arguments]
    return lambda: subprocess.run(words, check=True, capture_output=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=15)
    repeats = parser.parse_args().repeats
    measure("harness plan, the demo's table", command(str(DEMO)), repeats)
    measure("harness plan --json, AdaBatch on ImageNet", command(str(IMAGENET), "--json"), repeats)
    adabatch = load_config(IMAGENET)
    measure("AdaBatch, 90 epochs of ImageNet", lambda: build_plan(adabatch, 1_281_167), repeats)
    measure("the same on 1,000,000,000 samples", lambda: build_plan(adabatch, 10**9), repeats)
    growing = load_config(IMAGENET, ["batch.growth={policy: linear, rate: 64, every: 1ep}"])
    measure("a stage an epoch, 90 stages", lambda: build_plan(growing, 1_281_167), repeats)


if __name__ == "__main__":
    main()
