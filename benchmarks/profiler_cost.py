"""What the profiler costs: updates with it against the same updates without.

Two ways. Within one run it is switched on and off from line to line of metrics.jsonl, in random
order within each pair of neighbours, so that both see the same machine at nearly the same time: the
median of the pairs' ratios and its 95 % interval by order statistics, which needs no assumption on
how times are spread. And, with ``--runs``, whole runs with ``profile.enabled`` true and false in
pairs: the mean of the ratios and Student's interval, as wide as the machine is busy.

And the processor time of its parts by themselves, which depends little on how busy the machine is:
a mark between two phases (those are made either way: throughput is measured by them), what a line
takes without its collective, and a reading of the counters.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import nn

from harness.comm import SoloCommunicator
from harness.counters import Counters
from harness.models import build_model
from harness.phases import HostClock
from harness.profiler import Facts, Profiler
from harness.schema import Profile

CONFIG = Path(__file__).resolve().parents[1] / "configs" / "adabatch-digits.yaml"
# Two-sided 95 % points of Student's t, by degrees of freedom.
_T = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.16)
_BEGINNING = 10
"""Lines of each run that are left out."""


def switched_on() -> list[bool]:
    """For each line, whether the profiler is on in it; the same on all ranks."""
    choice = random.Random(7)  # noqa: S311 - any order will do
    return [on for _ in range(50_000) for on in choice.sample([True, False], 2)]


def switching(name: str, num_classes: int, shape: tuple[int, int, int]) -> nn.Module:
    """A model of the harness's own, and a profiler that is on in some lines only.

    What a line gathers comes after its time is taken, and so counts in the next one's.
    """
    plan, told = iter(switched_on()), Profiler.facts

    def facts(self: Profiler) -> Facts:
        if not hasattr(self, "switched_off"):
            self.switched_off = self._counters
        self._enabled = next(plan)
        self._counters = self.switched_off if self._enabled else None
        found = told(self)
        self._forget()
        return found

    Profiler.facts = facts
    return build_model(name, num_classes, shape, 0, {}, False)


def lines_of_a_run(options: argparse.Namespace, *settings: str) -> list[dict[str, Any]]:
    with tempfile.TemporaryDirectory() as folder:
        words = [
            *(sys.executable, "-m", "harness", "run", str(CONFIG), *settings),
            *("batch={initial: 64, micro: 32}", "batch.growth.policy=fixed", "lr.warmup=null"),
            f"train={{duration: {options.updates}up, eval_every: null, checkpoint_every: null}}",
            *(
                "ranks.threads=1",
                "--ranks",
                str(options.ranks),
                "--hosts",
                f"localhost:{options.ranks}",
            ),
            *("--run-dir", f"{folder}/run", "--max-restarts", "0"),
        ]
        subprocess.run(words, check=True, capture_output=True, cwd=Path(__file__).parent)
        return [
            json.loads(x) for x in (Path(folder) / "run/metrics.jsonl").read_text().splitlines()
        ]


def per_update(lines: list[dict[str, Any]]) -> list[float]:
    """Seconds, of each line but the first."""
    return [
        sum(line["seconds"].values()) / (line["update"] - before["update"])
        for before, line in pairwise(lines)
    ]


def within_a_run(options: argparse.Namespace) -> None:
    model = f"model={{name: profiler_cost:switching, options: {{name: {options.model}}}}}"
    lines = lines_of_a_run(options, model)
    # A line's time has in it what the line before has gathered.
    on = [line["memory_peak_bytes"] is not None for line in lines[:-1]]
    took = per_update(lines)
    ratios = sorted(
        took[i] / took[j] - 1
        for first in range(_BEGINNING, len(took) - 1, 2)
        for i, j in [(first, first + 1) if on[first] else (first + 1, first)]
        if on[first] != on[first + 1]
    )
    count = len(ratios)
    # The median lies between these of its order statistics (normal approximation of the binomial).
    reach = 1.96 * math.sqrt(count) / 2
    low, high = (ratios[max(0, min(count - 1, round(count / 2 + s * reach)))] for s in (-1, 1))
    update = statistics.median(took)
    print(
        f"{options.model}, {options.ranks} ranks, {update * 1e3:.2f} ms an update, lines of "
        f"10: on against off {statistics.median(ratios):+.2%} (95 %: {low:+.2%} to {high:+.2%}, "
        f"{count} pairs of lines)"
    )


def between_runs(options: argparse.Namespace) -> None:
    choice = random.Random(7)  # noqa: S311
    ratios = []
    for _ in range(options.runs):
        took = {}
        for enabled in choice.sample([True, False], 2):
            switch = f"profile.enabled={str(enabled).lower()}"
            lines = lines_of_a_run(options, f"model.name={options.model}", switch)
            took[enabled] = statistics.median(per_update(lines)[_BEGINNING:])
        ratios.append(took[True] / took[False] - 1)
    half = _T[options.runs - 2] * statistics.stdev(ratios) / math.sqrt(options.runs)
    print(
        f"{options.model}: runs with it against runs without {statistics.mean(ratios):+.2%} ± "
        f"{half:.2%} (95 %, {options.runs} pairs of runs)"
    )


def processor_seconds(call: Callable[[], object], rounds: int) -> float:
    """Of one call, on average."""
    begin = time.thread_time()
    for _ in range(rounds):
        call()
    return (time.thread_time() - begin) / rounds


def parts() -> None:
    clock, counters = HostClock(), Counters(torch.device("cpu"))
    profiler = Profiler(Profile(), SoloCommunicator(), Path())

    def line() -> None:
        profiler.take()
        for update in range(10):
            profiler.end(update)
        profiler.facts()

    def reading() -> None:
        counters._read_at = -math.inf  # as if the last one were long ago
        counters.read()

    mark = processor_seconds(lambda: clock.mark("forward"), 100_000)
    print(
        f"processor time: a mark {mark * 1e9:.0f} ns (7 an update), a line without its collective "
        f"{processor_seconds(line, 2000) * 1e6:.0f} µs, a reading of the counters, at most one a "
        f"second, {processor_seconds(reading, 500) * 1e6:.0f} µs"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", default="lenet5")
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--updates", type=int, default=4000)
    parser.add_argument("--runs", type=int, default=0, choices=(0, *range(2, len(_T) + 2)))
    options = parser.parse_args()
    parts()
    within_a_run(options)
    if options.runs:
        between_runs(options)


if __name__ == "__main__":
    main()
