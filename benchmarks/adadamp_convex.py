"""Do updates and samples grow with 1/ε as AdaDamp's theory says? Convex problems, simulated.

    .venv/bin/python benchmarks/adadamp_convex.py [--out docs] [--quick]

Sievert and Charles (*Resource allocation for mini-batch SGD via adaptive batch sizes*) bound what
it takes to bring F(w) − F* down to ε by SGD, by a batch that grows with 1 / (F(w) − F*), and by
gradient descent, for smooth convex and for strongly convex F. This counts it, on two least-squares
problems whose least loss is known exactly, with the growth policy of ``harness.schedule``.

Writes adadamp-convex.csv (every count), adadamp-convex.svg and, if there is an adadamp-convex.md
with the two marks, the table between them; prints the table. ``--quick`` is coarser and goes to
runs/ unless told otherwise. Two minutes on one core, quick five seconds.
"""

from __future__ import annotations

import argparse
import csv
import math
import statistics
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy.typing import NDArray

from harness.schedule.clock import Clock, step
from harness.schedule.growth import Fixed, GrowthPolicy, StageScheduler
from harness.schedule.measured import Loss
from harness.units import Duration

ROOT = Path(__file__).resolve().parents[1]
NAME = "adadamp-convex"
BEGIN, END = "<!-- table: begin -->", "<!-- table: end -->"

Vector = NDArray[np.float64]
Method = Literal["SGD", "adaptive", "gradient descent"]
Counted = Literal["updates", "samples"]
METHODS: tuple[Method, ...] = ("SGD", "adaptive", "gradient descent")
COUNTED: tuple[Counted, ...] = ("updates", "samples")

INITIAL = 32
"""Batch of SGD, and the first one of the adaptive method, in samples."""
STEP = 0.5
"""Step of the adaptive method and of gradient descent, half of 1 / L; SGD's first one. (At 1 / L
gradient descent would annul the largest curvatures at once.)"""
DIMENSIONS = 100

# 97.5 % quantiles of Student's t by degrees of freedom.
_T = {1: 12.706, 2: 4.303, 3: 3.182, 4: 2.776, 5: 2.571, 6: 2.447, 7: 2.365, 8: 2.306, 9: 2.262}


@dataclass(frozen=True)
class Case:
    """A class of problems, and how SGD's step must fall on it."""

    name: str
    curvature: Vector
    """Eigenvalues of the Hessian; the largest, L, is 1."""
    share: Vector
    """What each of these directions holds of the initial gap F(w0) − F*; sums to 1."""
    decay: Callable[[int], float]
    """SGD's step at an update."""


def smooth() -> Case:
    """Curvatures from 1e-6 up, the initial gap spread evenly over them: gradient descent leaves a
    share ∫ exp(−2 γ k λ) dλ = O(1/k), so its 1/ε is attained, as long as k ≪ 1e6.

    SGD's step falls as 1/√k (Bubeck 2015, theorem 6.3).
    """
    grid = np.arange(1, DIMENSIONS + 1) / DIMENSIONS
    curvature, share = grid**3, grid**2  # the share is the width that a curvature stands for
    return Case("smooth convex", curvature, share / share.sum(), lambda k: STEP / math.sqrt(k + 1))


def strongly_convex() -> Case:
    """Curvatures from μ = 0.1 to 1, the initial gap shared equally.

    SGD's step falls as 1/(μk) (Karimi et al. 2016, theorem 4), from ``STEP`` at the start. A
    constant step ∝ ε would add a factor of log(1/ε).
    """
    curvature = np.geomspace(0.1, 1, DIMENSIONS)
    share = np.full(DIMENSIONS, 1 / DIMENSIONS)
    return Case("strongly convex", curvature, share, lambda k: 1 / (1 / STEP + 0.1 * k))


CASES = (smooth(), strongly_convex())


@dataclass(frozen=True)
class Scale:
    """How much is simulated."""

    samples: int
    """n, the size of the data set; more than the largest batch that will be asked for."""
    seeds: int
    decades: dict[str, float]
    """By case: the least ε is ten to the minus this. Each range starts at 10^−1.25."""

    def targets(self, case: Case) -> Vector:
        """ε, four per decade, falling; in units of F(w0) − F*."""
        return np.asarray(10.0 ** -np.arange(1.25, self.decades[case.name] + 0.01, 0.25))


FULL = Scale(100_000, 8, {"smooth convex": 3.0, "strongly convex": 3.25})
QUICK = Scale(25_000, 5, {"smooth convex": 2.25, "strongly convex": 2.75})


@dataclass(frozen=True)
class Problem:
    """F(w) = 1/(2n) Σ (xᵢ·w − yᵢ)², in the eigenvectors of its Hessian and seen from w*.

    Neither changes what SGD does, and F(w) − F* = ½ Σ λ e², e = w − w*, is then exact and cheap.
    """

    rows: Vector
    """x, n × d: (1/n) Σ x xᵀ is diagonal."""
    residuals: Vector
    """y − x·w*: orthogonal to the columns of ``rows``, so that w* is the minimiser."""
    curvature: Vector
    start: Vector
    """w0 − w*; F(w0) − F* = 1."""
    optimum: float
    """F*, half the variance of the residuals: gradients stay noisy at w*."""

    def gap(self, error: Vector) -> float:
        """F(w) − F*."""
        return 0.5 * float(self.curvature @ (error * error))

    def gradient(self, error: Vector, picks: NDArray[np.int64]) -> Vector:
        """The mean gradient of some samples."""
        rows = self.rows[picks]
        return ((rows @ error - self.residuals[picks]) @ rows) / len(picks)


def make_problem(case: Case, samples: int, seed: int, noise: float = 0.25) -> Problem:
    """Normal data, whitened exactly.

    ``noise``: where F(w) − F* levels off with the initial batch and a constant step, as a share of
    its start. The adaptive method keeps the noise at this share of the gap; it must be below 1.
    """
    rng = np.random.default_rng([seed, 0])
    normal = rng.standard_normal((samples, DIMENSIONS + 1))
    root = np.linalg.cholesky(normal.T @ normal / samples)
    white = normal @ np.linalg.inv(root).T
    # SGD with step γ and batch B keeps a gap of γ σ² / (4 B) · Σ λ / (1 − γ λ / 2).
    level = STEP / (4 * INITIAL) * float(np.sum(case.curvature / (1 - STEP * case.curvature / 2)))
    variance = noise / level
    return Problem(
        rows=white[:, :DIMENSIONS] * np.sqrt(case.curvature),
        residuals=white[:, DIMENSIONS] * math.sqrt(variance),
        curvature=case.curvature,
        start=np.sqrt(2 * case.share / case.curvature),
        optimum=variance / 2,
    )


@dataclass(frozen=True)
class Arrival:
    """The first point of a run with F(w) − F* ≤ ε."""

    problem: str
    method: Method
    seed: int
    epsilon: float
    updates: int
    samples: int
    gap: float
    """F(w) − F* there, in units of F(w0) − F*, as ε is."""


Reached = tuple[int, int, float]
"""Updates, samples and F(w) − F*."""


def adadamp(problem: Problem) -> Loss:
    """⌈B0 (F(w0) − F*) / (F(w) − F*)⌉ before each update, from the exact F and F*."""
    every = Duration.parse("1up")
    return Loss(INITIAL, optimum=problem.optimum, loss="full", dwell=every)


def descend(
    problem: Problem,
    policy: GrowthPolicy,
    rate: Callable[[int], float],
    targets: Sequence[float] | Vector,
    seed: int,
    most: int = 10**7,
) -> list[Reached]:
    """Where mini-batch SGD first gets to each of the falling targets, within ``most`` updates.

    Samples are drawn with replacement. Those of the loss that a policy wants are not counted: the
    theory supposes an oracle for F(w) − F*.
    """
    rng = np.random.default_rng([seed, 1])
    # The formula lets the batch shrink again where the loss rises.
    scheduler = StageScheduler(policy, shrink=True)
    error, reached = problem.start.copy(), list[Reached]()
    clock, gap = Clock(0, 0, len(problem.rows)), problem.gap(problem.start)
    while len(reached) < len(targets) and clock.updates < most:
        loss = problem.optimum + gap if scheduler.wanted(clock) else None
        batch = scheduler.decide(clock, loss).batch
        picks = rng.integers(len(problem.rows), size=batch)
        error -= rate(clock.updates) * problem.gradient(error, picks)
        clock, gap = step(clock, batch), problem.gap(error)
        while len(reached) < len(targets) and gap <= targets[len(reached)]:
            reached.append((clock.updates, clock.samples, gap))
    return reached


def descend_fully(problem: Problem, targets: Sequence[float] | Vector) -> list[Reached]:
    """The same for gradient descent: n samples an update."""
    error, reached, updates = problem.start.copy(), list[Reached](), 0
    while len(reached) < len(targets):
        error -= STEP * problem.curvature * error
        updates, gap = updates + 1, problem.gap(error)
        while len(reached) < len(targets) and gap <= targets[len(reached)]:
            reached.append((updates, updates * len(problem.rows), gap))
    return reached


def simulate(case: Case, scale: Scale) -> Iterator[Arrival]:
    """All methods on one class of problems: new data and new draws for each seed."""
    targets = scale.targets(case)
    for seed in range(scale.seeds):
        problem = make_problem(case, scale.samples, seed)
        runs: dict[Method, list[Reached]] = {
            "SGD": descend(problem, Fixed(INITIAL), case.decay, targets, seed),
            "adaptive": descend(problem, adadamp(problem), lambda _: STEP, targets, seed),
        }
        if seed == 0:  # it depends on no draw
            runs["gradient descent"] = descend_fully(problem, targets)
        for method, reached in runs.items():
            for epsilon, point in zip(targets, reached, strict=True):
                yield Arrival(case.name, method, seed, float(f"{epsilon:.6g}"), *point)


@dataclass(frozen=True)
class Bound:
    """An entry of the talk's tables."""

    text: str
    of: Callable[[Vector], Vector]
    """Its value at 1/ε, up to a factor."""

    @property
    def logarithmic(self) -> bool:
        """Whether it is a straight line in log(1/ε)."""
        return self.text.endswith("log(1/ε)")


def _log(x: Vector) -> Vector:
    return np.asarray(np.log(x))


BOUNDS: dict[tuple[str, Counted], dict[Method, Bound]] = {
    ("smooth convex", "updates"): {
        "SGD": Bound("1/ε²", lambda x: x**2),
        "adaptive": Bound("1/ε", lambda x: x),
        "gradient descent": Bound("1/ε", lambda x: x),
    },
    ("smooth convex", "samples"): {
        "SGD": Bound("1/ε²", lambda x: x**2),
        "adaptive": Bound("1/ε²", lambda x: x**2),
        "gradient descent": Bound("n/ε", lambda x: x),
    },
    ("strongly convex", "updates"): {
        "SGD": Bound("1/ε", lambda x: x),
        "adaptive": Bound("log(1/ε)", _log),
        "gradient descent": Bound("log(1/ε)", _log),
    },
    ("strongly convex", "samples"): {
        "SGD": Bound("1/ε", lambda x: x),
        "adaptive": Bound("log(1/ε)/ε", lambda x: x * np.log(x)),
        "gradient descent": Bound("n·log(1/ε)", _log),
    },
}


@dataclass(frozen=True)
class Curve:
    """What one method needs on one problem, by seed."""

    inverse: Vector
    """1/ε, ascending."""
    counts: Vector
    """Seeds × ε."""


def curve(arrivals: Iterable[Arrival], problem: str, method: Method, counted: Counted) -> Curve:
    chosen = [a for a in arrivals if (a.problem, a.method) == (problem, method)]
    inverse = np.unique([1 / a.epsilon for a in chosen])
    ordered = sorted(chosen, key=lambda a: (a.seed, -a.epsilon))
    counts = np.array([getattr(a, counted) for a in ordered], dtype=np.float64)
    return Curve(inverse, counts.reshape(-1, len(inverse)))


def slope(x: Vector, y: Vector) -> float:
    """The exponent p of y ∝ x^p, by least squares in logarithms."""
    return float(np.polyfit(np.log(x), np.log(y), 1)[0])


def slopes(found: Curve, last_decade: bool = False) -> list[float]:
    """One exponent a seed."""
    inside = _within(found.inverse, last_decade)
    return [slope(found.inverse[inside], row[inside]) for row in found.counts]


def _within(inverse: Vector, last_decade: bool) -> NDArray[np.bool_]:
    return np.asarray(inverse > (inverse[-1] / 10.01 if last_decade else 0))


def straightness(found: Curve) -> float:
    """R² of counts against log(1/ε), mean over seeds."""
    x = np.log(found.inverse)
    return statistics.mean(float(np.corrcoef(x, row)[0, 1] ** 2) for row in found.counts)


def interval(values: list[float]) -> str:
    """Mean and 95 % interval over seeds (Student's t); no interval where nothing is random."""
    if len(values) == 1:
        return f"{values[0]:.2f}"
    half = _T[len(values) - 1] * statistics.stdev(values) / len(values) ** 0.5
    return f"{statistics.mean(values):.2f} ± {half:.2f}"


def table(arrivals: Sequence[Arrival]) -> str:
    """Markdown: the slope of each bound beside the measured one."""
    lines = [
        "| problem, counted | method | bound | slope of the bound | measured | last decade: bound "
        "| measured | R² |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for (problem, counted), bounds in BOUNDS.items():
        for method, bound in bounds.items():
            found = curve(arrivals, problem, method, counted)
            cells = [f"{problem}, {counted}", method, bound.text]
            for last in (False, True):
                inverse = found.inverse[_within(found.inverse, last)]
                cells.append(f"{slope(inverse, bound.of(inverse)):.2f}")
                cells.append(interval(slopes(found, last)))
            cells.append(f"{straightness(found):.3f}" if bound.logarithmic else "")
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def in_window(arrivals: Sequence[Arrival]) -> float:
    """Share of arrivals in [ε/2, ε], where the talk counts."""
    return statistics.mean(a.gap >= a.epsilon / 2 for a in arrivals)


def write_csv(arrivals: Iterable[Arrival], path: Path) -> None:
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(Arrival.__dataclass_fields__)
        for a in arrivals:
            row = (a.problem, a.method, a.seed, f"{a.epsilon:.6g}", a.updates, a.samples)
            writer.writerow([*row, f"{a.gap:.6g}"])


def read_csv(path: Path) -> list[Arrival]:
    with path.open(encoding="utf-8", newline="") as file:
        return [
            Arrival(
                problem=row["problem"],
                method=next(m for m in METHODS if m == row["method"]),
                seed=int(row["seed"]),
                epsilon=float(row["epsilon"]),
                updates=int(row["updates"]),
                samples=int(row["samples"]),
                gap=float(row["gap"]),
            )
            for row in csv.DictReader(file)
        ]


# Okabe and Ito's colours, told apart with any colour vision; markers tell them apart without.
_STYLE: dict[Method, tuple[str, str]] = {
    "SGD": ("#d55e00", "o"),
    "adaptive": ("#0072b2", "s"),
    "gradient descent": ("#009e73", "^"),
}
_GUIDE: dict[str, Any] = {"linestyle": (0, (5, 3)), "linewidth": 1.0}
_SHIFT: dict[tuple[str, Counted, Method], float] = {
    ("smooth convex", "updates", "adaptive"): 1,
    ("smooth convex", "updates", "gradient descent"): -9,
    ("strongly convex", "updates", "adaptive"): 3,
    ("strongly convex", "updates", "gradient descent"): -9,
    ("smooth convex", "samples", "adaptive"): 1,
    ("smooth convex", "samples", "SGD"): -9,
}
"""How far above its last point a bound's name stands, in points, where two would overlap."""
_LOOK: Any = {
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#e3e6ea",
    "svg.hashsalt": NAME,  # the same file for the same numbers
}


def draw(arrivals: Sequence[Arrival], path: Path) -> None:
    """2 × 2: updates and samples for both classes; SVG, or what the name's ending says."""
    with mpl.rc_context(_LOOK):
        figure = Figure(figsize=(7.6, 6.4), layout="constrained")
        panels = figure.subplots(2, 2, sharex="col")
        for row, counted in enumerate(COUNTED):
            for column, case in enumerate(CASES):
                _panel(panels[row][column], arrivals, case.name, counted)
        for axes, case in zip(panels[0], CASES, strict=True):
            axes.set_title(case.name)
        for axes in panels[1]:
            axes.set_xlabel("1/ε, ε in units of F(w₀) − F*")
        handles, labels = panels[0][0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside upper center", ncols=len(labels), frameon=False)
        svg = path.suffix == ".svg"
        figure.savefig(path, dpi=150, metadata={"Date": None} if svg else None)


def _panel(axes: Axes, arrivals: Sequence[Arrival], problem: str, counted: Counted) -> None:
    """Points: geometric means over seeds; bands: from the least to the most of them."""
    for method, (colour, marker) in _STYLE.items():
        found, bound = curve(arrivals, problem, method, counted), BOUNDS[problem, counted][method]
        x, middle = found.inverse, np.exp(np.log(found.counts).mean(axis=0))
        low, high = found.counts.min(axis=0), found.counts.max(axis=0)
        axes.fill_between(x, low, high, color=colour, alpha=0.2, linewidth=0)
        axes.plot(x, middle, marker, color=colour, markersize=4.5, label=method)
        axes.plot(x, _guide(x, bound, middle), color=colour, zorder=1, **_GUIDE)
        axes.annotate(
            bound.text,
            (x[-1], middle[-1]),
            xytext=(7, _SHIFT.get((problem, counted, method), -3)),
            textcoords="offset points",
            color=colour,
        )
    axes.plot([], [], color="#57606a", label="bound, fitted", **_GUIDE)
    axes.set(xscale="log", yscale="log", ylabel=counted)


def _guide(x: Vector, bound: Bound, counts: Vector) -> Vector:
    """What fits the counts best: a multiple of the bound, or a straight line in log(1/ε)."""
    if bound.logarithmic:
        return np.asarray(np.polyval(np.polyfit(np.log(x), counts, 1), np.log(x)))
    return np.asarray(bound.of(x) * np.exp(np.mean(np.log(counts) - np.log(bound.of(x)))))


def put_table(page: Path, made: str) -> None:
    """Replace what is between the page's marks. Raises ValueError if it lacks them."""
    text = page.read_text(encoding="utf-8")
    head, begin, rest = text.partition(BEGIN)
    _, end, tail = rest.partition(END)
    if not (begin and end):
        raise ValueError(f"{page} lacks {BEGIN} or {END}")
    page.write_text(f"{head}{BEGIN}\n{made}{END}{tail}", encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, help="default: docs, with --quick runs/adadamp-convex")
    parser.add_argument("--quick", action="store_true", help="fewer seeds, a shorter range of ε")
    options = parser.parse_args()
    out: Path = options.out or ROOT / (f"runs/{NAME}" if options.quick else "docs")
    out.mkdir(parents=True, exist_ok=True)
    arrivals: list[Arrival] = []
    for case in CASES:
        arrivals += simulate(case, QUICK if options.quick else FULL)
    write_csv(arrivals, out / f"{NAME}.csv")
    draw(arrivals, out / f"{NAME}.svg")
    made, page = table(arrivals), out / f"{NAME}.md"
    if page.exists():
        put_table(page, made)
    print(made, end="")
    print(f"{in_window(arrivals):.1%} of arrivals in [ε/2, ε]", file=sys.stderr)


if __name__ == "__main__":
    main()
