"""Do the intervals of the scaling model hold what they promise? Simulated campaigns, known truth.

    .venv/bin/python benchmarks/scaling_coverage.py [--campaigns 200] [--repeats 4] [--noise 0.02]
        [--model-error 0.02]

Each campaign draws a machine, measures it on a few rank counts with noise, fits the model, and asks
whether the 95 % intervals hold the truth. Three families of machines:

prior      drawn from what the model supposes beforehand: coverage must be near nominal everywhere
typical    a narrower range of machines: the intervals have no right to miss more often
simulated  clusters of ``harness.scaling.simulate`` with exponential stragglers, uneven nodes and a
           network that varies, none of which the fitted formula knows exactly

``--model-error 0`` leaves out the margin for what the formula itself may be off. About eight
minutes on one core for 200 campaigns of each.
"""

from __future__ import annotations

import argparse
import statistics
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from harness.scaling.fit import fit_step_time
from harness.scaling.points import Point
from harness.scaling.predict import predict
from harness.scaling.priors import UNKNOWN, prior_of, step_time
from harness.scaling.simulate import Stragglers, simulate
from harness.scaling.speedup import speedups
from harness.scaling.steptime import Decomposition, Link, StepTime, Wire

WIRE = Wire(40e6, 4e6)
IMAGES = 32  # per rank


Machine = Callable[[int], float]
"""Ranks, each on a node of its own → true seconds of an update."""


def of_prior(rng: np.random.Generator) -> Machine:
    prior = prior_of([Point(1, 1, IMAGES, (0.1,))], WIRE, UNKNOWN, UNKNOWN)
    theta = prior.centre + prior.deviation * rng.standard_normal(len(prior.centre))
    theta[0] = np.log(0.1 / IMAGES)
    return _formula(step_time(np.clip(theta, prior.low, prior.high), WIRE, "two-level"))


def typical(rng: np.random.Generator) -> Machine:
    compute = 10 ** rng.uniform(-3, -1)
    latency, transfer = 10 ** rng.uniform(-3.5, -2), 10 ** rng.uniform(-1.3, 0.5)
    model = StepTime(
        per_image=0.95 * compute / IMAGES,
        fixed=0.05 * compute,
        jitter=10 ** rng.uniform(-2.3, -1.2),
        gamma=1 / rng.uniform(0.1, 1),
        between=Link(latency * compute / WIRE.buckets, transfer * compute / WIRE.gradient_bytes),
        wire=WIRE,
    )
    return _formula(model)


def simulated(rng: np.random.Generator) -> Machine:
    transfer = 10 ** rng.uniform(-1.3, 0.3)
    model = StepTime(
        per_image=3e-3,
        fixed=5e-3,
        gamma=rng.uniform(1, 5),
        between=Link(10 ** rng.uniform(-5.5, -4), transfer * 0.1 / WIRE.gradient_bytes),
        wire=WIRE,
    )
    stragglers = Stragglers("exponential", spread=rng.uniform(0, 0.05), uneven=rng.uniform(0, 0.02))
    spread, seed = rng.uniform(0, 0.1), int(rng.integers(1 << 30))

    def seconds(ranks: int) -> float:
        # The same nodes' speeds at each number of ranks: a seed draws them in the same order.
        run = simulate(
            model,
            nodes=ranks,
            ranks_per_node=1,
            images_per_rank=IMAGES,
            stragglers=stragglers,
            network_spread=spread,
            updates=2000,
            seed=seed,
        )
        return float(run.seconds.mean())

    return seconds


def _formula(model: StepTime) -> Machine:
    return lambda ranks: float(model.seconds(Decomposition.of(ranks, ranks, IMAGES * ranks))[0])


FAMILIES = {"prior": of_prior, "typical": typical, "simulated": simulated}


@dataclass(frozen=True)
class Result:
    """What campaigns found at one number of ranks."""

    covered: float
    """Share of intervals of the model that hold the true seconds."""
    measured: float
    """Share of intervals for a measurement that hold a new one."""
    error: tuple[float, float]
    """Median and 95 % quantile of |predicted / true − 1|."""
    width: float
    """Median of high / low."""


def campaigns(
    family: str,
    count: int,
    ranks: Sequence[int],
    targets: Sequence[int],
    repeats: int = 4,
    noise: float = 0.02,
    ensemble: int = 400,
    seed: int = 1,
    model_error: float = 0.02,
) -> tuple[dict[int, Result], float]:
    """Results by target, and the coverage of the measured efficiencies' intervals."""
    rows: dict[int, list[tuple[bool, bool, float, float]]] = defaultdict(list)
    held: list[bool] = []
    for index in range(count):
        rng = np.random.default_rng([seed, index])
        truth = FAMILIES[family](rng)
        times = {n: truth(n) for n in (*ranks, *targets)}

        def measure(n: int, times: dict[int, float], rng: np.random.Generator) -> Point:
            scatter = np.exp(noise * rng.standard_normal(repeats))
            return Point(n, n, IMAGES * n, tuple(float(one) for one in times[n] * scatter))

        points = [measure(n, times, rng) for n in ranks]
        fit = fit_step_time(points, WIRE, ensemble=ensemble, seed=index, model_error=model_error)
        for n in targets:
            expected = predict(fit, n).seconds
            new = np.exp(measure(n, times, rng).log_seconds.mean)
            again = predict(fit, n, repeats=repeats, seed=index).seconds
            if expected.low is None or expected.high is None:
                raise SystemExit("no interval; give --repeats of 2 or more")
            rows[n].append(
                (
                    bool(expected.covers(times[n])),
                    bool(again.covers(new)),
                    abs(expected.value / times[n] - 1),
                    expected.high / expected.low,
                )
            )
        first = times[ranks[0]]
        held += [
            bool(one.efficiency.covers(first / times[one.point.ranks]))
            for one in speedups(points, "weak")[1:]
        ]
    return {n: _result(found) for n, found in rows.items()}, statistics.mean(held)


def _result(found: Sequence[tuple[bool, bool, float, float]]) -> Result:
    covered, measured, errors, widths = zip(*found, strict=True)
    return Result(
        covered=statistics.mean(covered),
        measured=statistics.mean(measured),
        error=(float(np.median(errors)), float(np.quantile(errors, 0.95))),
        width=float(np.median(widths)),
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--campaigns", type=int, default=200)
    parser.add_argument("--repeats", type=int, default=4)
    parser.add_argument("--noise", type=float, default=0.02)
    parser.add_argument("--model-error", type=float, default=0.02)
    options = parser.parse_args()
    print("| machines | fitted on | ranks | interval holds the truth, % | a new measurement, % | "
          "error, median, % | error, 95 % of campaigns below, % | high / low |")  # fmt: skip
    print("|---|---|---|---|---|---|---|---|")
    held: list[float] = []
    for family in FAMILIES:
        for ranks, targets in (((1, 2, 3), (4, 8, 64)), ((1, 2, 4, 8), (16, 128))):
            found, efficiency = campaigns(
                family,
                options.campaigns,
                ranks,
                targets,
                options.repeats,
                options.noise,
                model_error=options.model_error,
            )
            held.append(efficiency)
            for n, one in found.items():
                print(
                    f"| {family} | {', '.join(map(str, ranks))} | {n} | {100 * one.covered:.1f} | "
                    f"{100 * one.measured:.1f} | {100 * one.error[0]:.1f} | "
                    f"{100 * one.error[1]:.1f} | {one.width:.2f} |",
                    flush=True,
                )
    print(f"\nEfficiency from the measurements alone: {100 * statistics.mean(held):.1f} %")


if __name__ == "__main__":
    main()
