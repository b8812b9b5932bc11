"""Does growing the batch cost accuracy? The demo's recipe against a fixed batch, over seeds.

    .venv/bin/python benchmarks/growth_accuracy.py [--seeds 5] [--ranks 2]

Three runs a seed, each on real Horovod ranks:

* grown: configs/adabatch-digits.yaml as it is;
* fixed: the same with the initial batch throughout, at a constant rate;
* fixed, decayed: the initial batch throughout, the rate multiplied by 0.7 where the other grows.
  The ratio of rate to batch then follows the same path (AdaBatch, section 2).

Prints a Markdown table of final test accuracies and updates, and the differences with a 95 %
confidence interval over seeds (Student's t, paired by seed).
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

CONFIG = Path(__file__).parents[1] / "configs" / "adabatch-digits.yaml"
RECIPES = {
    "grown": (),
    "fixed": ("batch.growth.policy=fixed",),
    "fixed, decayed": (
        "batch.growth.policy=fixed",
        "lr.decay={kind: step, every: 5ep, factor: 0.7}",
    ),
}
# 97.5 % quantiles of Student's t by degrees of freedom.
_T = {1: 12.706, 2: 4.303, 3: 3.182, 4: 2.776, 5: 2.571, 6: 2.447, 7: 2.365, 8: 2.306, 9: 2.262}


def run(recipe: str, seed: int, ranks: int, scratch: Path) -> tuple[float, int]:
    """Final test accuracy and number of updates."""
    directory = scratch / f"{recipe.replace(', ', '-')}-{seed}"
    command = [sys.executable, "-m", "harness", "run", str(CONFIG), f"seed={seed}"]
    command += [*RECIPES[recipe], "--ranks", str(ranks), "--run-dir", str(directory)]
    subprocess.run(command, check=True, capture_output=True)
    lines = (directory / "events.jsonl").read_text(encoding="utf-8").splitlines()
    end = next(event for event in map(json.loads, lines) if event["kind"] == "end")
    return float(end["accuracy"]), int(end["update"])


def interval(values: list[float]) -> str:
    half = _T[len(values) - 1] * statistics.stdev(values) / len(values) ** 0.5
    return f"{statistics.mean(values):+.2f} ± {half:.2f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=5, choices=range(2, 11))
    parser.add_argument("--ranks", type=int, default=2)
    options = parser.parse_args()
    accuracy: dict[str, list[float]] = {recipe: [] for recipe in RECIPES}
    updates = dict.fromkeys(RECIPES, 0)
    with tempfile.TemporaryDirectory() as scratch:
        for seed in range(options.seeds):
            for recipe in RECIPES:
                value, updates[recipe] = run(recipe, seed, options.ranks, Path(scratch))
                accuracy[recipe].append(100 * value)
                print(f"seed {seed}  {recipe:15s} {100 * value:.2f} %", file=sys.stderr)
    print("| recipe | updates | test accuracy by seed, % | mean, % | grown minus this, points |")
    print("|---|---|---|---|---|")
    for recipe, values in accuracy.items():
        less = [a - b for a, b in zip(accuracy["grown"], values, strict=True)]
        row = " ".join(f"{value:.2f}" for value in values)
        difference = "" if recipe == "grown" else interval(less)
        mean = f"{statistics.mean(values):.2f}"
        print(f"| {recipe} | {updates[recipe]} | {row} | {mean} | {difference} |")


if __name__ == "__main__":
    main()
