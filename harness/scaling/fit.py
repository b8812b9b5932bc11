"""Fitting the step-time model to measured points, with an ensemble that carries its uncertainty."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations
from math import isfinite, sqrt
from typing import Literal

import numpy as np
import numpy.typing as npt

from harness.errors import UsageError
from harness.scaling.interval import (
    Array,
    Interval,
    Spread,
    check_confidence,
    of_draws,
    pooled,
)
from harness.scaling.points import Mode, Point
from harness.scaling.priors import (
    NAMES,
    UNITS,
    UNKNOWN,
    KnownLink,
    Prior,
    natural,
    prior_of,
    step_time,
)
from harness.scaling.steptime import Decomposition, StepTime, Topology, Wire

Basis = Literal["measured", "partly", "given", "assumed"]
"""What tells a coefficient: ``measured``, the points; ``partly``, the points only together with
what is supposed beforehand; ``given``, a probe, to which the points add little; ``assumed``,
neither."""

_FLOOR = 1e-3  # no machine repeats an update's time to better than a thousandth
_WITHOUT_REPEATS = 0.02  # the scatter that weighs points if nothing tells of it
_OUTLIER = 2.5  # standard deviations from which on a repeat counts for less
_MIDDLE = 0.9539  # median of |x − y| of two normal variables, in standard deviations


@dataclass(frozen=True)
class Coefficient:
    """A coefficient of the fitted model."""

    name: str
    unit: str
    interval: Interval
    basis: Basis


@dataclass(frozen=True)
class Fit:
    """The step-time model as fitted to points; see ``fit_step_time``."""

    points: tuple[Point, ...]
    """By rising ranks."""
    wire: Wire
    topology: Topology
    mode: Mode
    confidence: float
    ranks_per_node: int
    """That a node takes, where a prediction does not say."""
    theta: Array
    """The parameters, shape (8,)."""
    ensemble: Array | None
    """Parameters that would explain the points as well, shape (ensemble, 8); None where no repeat
    tells how far the points may be off."""
    noise: Array | None
    """The standard deviation of a repeat's log seconds that goes with each, shape (ensemble,)."""
    model_error: float
    coefficients: tuple[Coefficient, ...]
    misfit: float
    """Root mean square of log(fitted / measured) over the points."""

    @property
    def model(self) -> StepTime:
        """The formula with the fitted coefficients."""
        return step_time(self.theta, self.wire, self.topology)

    @property
    def models(self) -> StepTime | None:
        """The formula with the ensemble's; what it gives has a leading axis (ensemble,)."""
        if self.ensemble is None:
            return None
        return step_time(self.ensemble, self.wire, self.topology)

    @property
    def undetermined(self) -> tuple[str, ...]:
        """Names of the coefficients that the points alone do not tell."""
        return tuple(one.name for one in self.coefficients if one.basis != "measured")

    @property
    def inside_only(self) -> bool:
        """Whether nothing was measured between nodes."""
        return all(point.nodes == 1 for point in self.points)

    @property
    def between_given(self) -> bool:
        """Whether a probe tells of the network between nodes."""
        given = (one.name for one in self.coefficients if one.basis == "given")
        return any(name.startswith("between.") for name in given)


def fit_step_time(
    points: Sequence[Point],
    wire: Wire,
    *,
    mode: Mode = "weak",
    within: KnownLink = UNKNOWN,
    between: KnownLink = UNKNOWN,
    topology: Topology = "two-level",
    ranks_per_node: int | None = None,
    noise: float | None = None,
    model_error: float = 0.02,
    confidence: float = 0.95,
    ensemble: int = 500,
    seed: int = 0,
) -> Fit:
    """Fit the model of ``harness.scaling.steptime`` to points of two or more numbers of ranks.

    Bounded least squares of log seconds with a soft-L1 loss, so that a single bad repeat does not
    pull the curve, from several starts (scipy). Priors (``harness.scaling.priors``) stand in for
    what the points cannot tell; ``Fit.coefficients`` says which those are.

    The ensemble is a bootstrap: for each member the repeats' means are drawn anew with the spread
    pooled over points (itself drawn, so that few repeats make wide intervals: Student's t), and so
    are the priors' centres; then the model is fitted again. For a linear model this draws from the
    posterior distribution exactly (Bardsley et al. 2014, randomize-then-optimize). Drawing repeats
    with replacement instead would make three of them scatter √(2/3) of what they do.

    Args:
        mode: what predictions hold fixed, images per rank (weak) or per update (strong).
        within, between: the networks inside and between nodes, as far as a probe knows them.
        ranks_per_node: that nodes take; None: the most that a point had.
        noise: standard deviation of a repeat's log seconds, if it is known otherwise; used where
            no point has a second repeat.
        model_error: what the formula itself may be off, as a share of the time, for each doubling
            of the ranks beyond those measured. Grows to what the points show, if they fit badly.
        ensemble: members; 40 at least.

    Raises UsageError for fewer than two numbers of ranks, or arguments that make no sense.
    """
    check_confidence(confidence)
    series = _checked(points, noise, model_error, ensemble, ranks_per_node)
    prior = prior_of(series, wire, within, between)
    spread = pooled([point.log_seconds for point in series])
    if spread is None and noise is not None:
        spread = Spread(noise, 1000)
    problem = _Problem.of(series, wire, topology, prior, spread)
    theta, weights = problem.solve()
    misfit = problem.misfit(theta, weights)
    rng = np.random.default_rng(seed)
    members = sigmas = None
    if spread is not None:
        sigmas = np.maximum(spread.draws(rng, ensemble), _FLOOR)
        sigmas *= max(1.0, problem.lack_of_fit(theta, weights))
        members = problem.resample(theta, weights, sigmas, rng)
    return Fit(
        points=tuple(series),
        wire=wire,
        topology=topology,
        mode=mode,
        confidence=confidence,
        ranks_per_node=ranks_per_node or max(-(-one.ranks // one.nodes) for one in series),
        theta=theta,
        ensemble=members,
        noise=sigmas,
        model_error=max(model_error, misfit),
        coefficients=_coefficients(theta, members, problem, weights, confidence),
        misfit=misfit,
    )


def _checked(
    points: Sequence[Point],
    noise: float | None,
    model_error: float,
    ensemble: int,
    ranks_per_node: int | None,
) -> list[Point]:
    counts = {point.ranks for point in points}
    if len(counts) < 2:
        raise UsageError(
            "a step-time model needs points of two numbers of ranks at least, better three; "
            + (f"all have {counts.pop()}" if counts else "there are none")
        )
    for name, value in (("noise", noise), ("model_error", model_error)):
        if value is not None and not (isfinite(value) and 0 <= value <= 1):
            raise UsageError(f"{name} is {value!r}; valid are shares from 0 to 1")
    if not 40 <= ensemble <= 100_000:
        raise UsageError(f"an ensemble of {ensemble}; valid are 40 to 100000")
    if ranks_per_node is not None and ranks_per_node < 1:
        raise UsageError(f"{ranks_per_node} ranks per node; there is at least 1")
    return sorted(points, key=lambda point: (point.ranks, point.nodes, point.images_per_update))


@dataclass(frozen=True)
class _Problem:
    """Least squares of log seconds together with the prior."""

    where: Decomposition
    wire: Wire
    topology: Topology
    prior: Prior
    logs: Array
    """Log seconds of each repeat, shape (repeats,)."""
    owner: npt.NDArray[np.intp]
    """The point of each repeat, shape (repeats,)."""
    sigma: float
    """Standard deviation of a repeat."""
    robust: float
    """The same without regard to outliers."""

    @classmethod
    def of(
        cls,
        points: Sequence[Point],
        wire: Wire,
        topology: Topology,
        prior: Prior,
        spread: Spread | None,
    ) -> _Problem:
        sigma = max(_FLOOR, _WITHOUT_REPEATS if spread is None else spread.sigma)
        logs = [np.log(point.seconds) for point in points]
        pairs = [abs(a - b) for values in logs for a, b in combinations(values, 2)]
        return cls(
            where=Decomposition.of_points(points),
            wire=wire,
            topology=topology,
            prior=prior,
            logs=np.concatenate(logs),
            owner=np.repeat(np.arange(len(points)), [len(values) for values in logs]),
            sigma=sigma,
            robust=max(_FLOOR, float(np.median(pairs)) / _MIDDLE) if pairs else sigma,
        )

    def log_seconds(self, theta: Array) -> Array:
        """Of the points, shape (…, points)."""
        return np.asarray(np.log(step_time(theta, self.wire, self.topology).seconds(self.where)))

    def solve(self) -> tuple[Array, Array]:
        """The best parameters of several starts, and what each repeat counts."""
        from scipy.optimize import least_squares

        deviation, centre = self.prior.deviation, self.prior.centre
        count = len(self.logs)

        def residuals(theta: Array) -> Array:
            misses = (self.log_seconds(theta)[self.owner] - self.logs) / self.robust
            return np.concatenate([misses, (theta - centre) / deviation])

        def slopes(theta: Array) -> Array:
            own = self._slopes(theta[None])[0][self.owner] / self.robust
            return np.concatenate([own, np.diag(1 / deviation)])

        def loss(squares: Array) -> Array:
            """Soft L1 of the repeats, beyond ``_OUTLIER``; of the prior, squares."""
            rho = np.stack([squares, np.ones_like(squares), np.zeros_like(squares)])
            inner = 1 + squares[:count] / _OUTLIER**2
            rho[0, :count] = 2 * _OUTLIER**2 * (np.sqrt(inner) - 1)
            rho[1, :count] = inner**-0.5
            rho[2, :count] = -(inner**-1.5) / (2 * _OUTLIER**2)
            return rho

        found = [
            least_squares(
                residuals,
                centre + start,
                jac=slopes,
                bounds=(self.prior.low, self.prior.high),
                loss=loss,
                x_scale=deviation,
                max_nfev=200,
            )
            for start in _STARTS * deviation
        ]
        best = min(found, key=lambda one: float(one.cost))
        misses = (self.log_seconds(best.x)[self.owner] - self.logs) / self.robust
        return np.asarray(best.x), 1 / np.sqrt(1 + (misses / _OUTLIER) ** 2)

    def means(self, weights: Array) -> tuple[Array, Array]:
        """Weighted means of the points' log seconds, and how many repeats each is worth."""
        total = np.bincount(self.owner, weights)
        squares = np.bincount(self.owner, weights**2)
        return np.bincount(self.owner, weights * self.logs) / total, total**2 / squares

    def misfit(self, theta: Array, weights: Array) -> float:
        return float(np.sqrt(np.mean((self.log_seconds(theta) - self.means(weights)[0]) ** 2)))

    def lack_of_fit(self, theta: Array, weights: Array) -> float:
        """How much further the points lie from the curve than their repeats explain, as a factor
        (Birge's ratio); 1 where there are too few points to tell."""
        means, counts = self.means(weights)
        misses = (self.log_seconds(theta) - means) * np.sqrt(counts) / self.sigma
        told = self.information(theta, weights)
        both = told + np.diag(self.prior.deviation**-2.0)
        free = len(means) - float(np.trace(np.linalg.solve(both, told)))
        return 1.0 if free < 0.5 else sqrt(float((misses**2).sum()) / free)

    def information(self, theta: Array, weights: Array) -> Array:
        """Fisher's information of the points alone, shape (8, 8)."""
        slopes = self._slopes(theta[None])[0] * np.sqrt(self.means(weights)[1])[:, None]
        return np.asarray(slopes.T @ slopes / self.sigma**2)

    def _slopes(self, theta: Array) -> Array:
        """Derivatives of log seconds, (ensemble, 8) → (ensemble, points, 8)."""
        size, count = theta.shape
        shifts = np.concatenate([np.eye(count), -np.eye(count)]) * 1e-5
        values = self.log_seconds((theta[:, None] + shifts).reshape(-1, count))
        table = values.reshape(size, 2, count, -1)
        return np.asarray(np.moveaxis(table[:, 0] - table[:, 1], 1, 2) / 2e-5)

    def resample(
        self, theta: Array, weights: Array, sigmas: Array, rng: np.random.Generator
    ) -> Array:
        """Fits to points and priors that are drawn anew, shape (len(sigmas), 8)."""
        means, counts = self.means(weights)
        errors = sigmas[:, None] / np.sqrt(counts)
        drawn = means + errors * rng.standard_normal(errors.shape)
        shape = (len(sigmas), len(theta))
        centres = self.prior.centre + self.prior.deviation * rng.standard_normal(shape)
        near = self._descend(np.broadcast_to(theta, shape), drawn, errors, centres)
        far = self._descend(centres, drawn, errors, centres)
        return np.where((far[1] < near[1])[:, None], far[0], near[0])

    def _descend(
        self, start: Array, means: Array, errors: Array, centres: Array
    ) -> tuple[Array, Array]:
        """Levenberg and Marquardt's method for the whole ensemble at once: parameters and costs.
        Members that have arrived are left out of further steps."""
        weight = self.prior.deviation**-2.0
        theta = np.clip(start, self.prior.low, self.prior.high)
        damping = np.full(len(theta), 1e-2)
        costs = self._costs(theta, means, errors, centres)
        going = np.arange(len(theta))
        for _ in range(_MOST_STEPS):
            here, data = theta[going], (means[going], errors[going])
            slopes = self._slopes(here) / data[1][:, :, None]
            misses = (self.log_seconds(here) - data[0]) / data[1]
            curve = np.einsum("epi,epj->eij", slopes, slopes) + np.diag(weight)
            slope = np.einsum("epi,ep->ei", slopes, misses) + (here - centres[going]) * weight
            damped = curve * (1 + damping[going, None, None] * np.eye(len(weight)))
            moved = here - np.linalg.solve(damped, slope[:, :, None])[:, :, 0]
            moved = np.clip(moved, self.prior.low, self.prior.high)
            new = self._costs(moved, *data, centres[going])
            gain = costs[going] - new
            better = gain > 0
            theta[going[better]] = moved[better]
            costs[going[better]] = new[better]
            damping[going] *= np.where(better, 0.2, 5.0)
            arrived = (better & (gain < 1e-3)) | (damping[going] > 1e3)
            going = going[~arrived]
            if not going.size:
                break
        return theta, costs

    def _costs(self, theta: Array, means: Array, errors: Array, centres: Array) -> Array:
        """(ensemble,) sums of squares in standard deviations."""
        misses = (self.log_seconds(theta) - means) / errors
        return np.asarray(
            (misses**2).sum(1) + (((theta - centres) / self.prior.deviation) ** 2).sum(1)
        )


_MOST_STEPS = 40

# In standard deviations of the prior: its centre; little and much overlap; a fast network and a
# slow one; latency and jitter to blame.
_STARTS: Array = np.array(
    [
        [0.0] * 8,
        [0, 0, 0, 2.0, 0, 0, 0, 0],
        [0, 0, 0, -2.0, 0, 1.0, 0, 1.0],
        [0, 0, -1.0, 0, -1.0, -1.5, -1.0, -1.5],
        [0, 0, 0, 0, 1.0, 1.5, 1.0, 1.5],
        [-0.5, 1.0, 1.5, 0, 1.5, -1.0, 1.5, -1.0],
    ]
)


def _coefficients(
    theta: Array, members: Array | None, problem: _Problem, weights: Array, confidence: float
) -> tuple[Coefficient, ...]:
    values = natural(theta)
    draws = None if members is None else natural(members)
    informed = problem.information(theta, weights) + np.diag(problem.prior.deviation**-2.0)
    left = np.sqrt(np.diag(np.linalg.inv(informed))) if members is None else members.std(0, ddof=1)
    return tuple(
        Coefficient(
            name=name if name != "overlap" else "gamma",
            unit=UNITS[index],
            interval=Interval(float(values[index]))
            if draws is None
            else of_draws(float(values[index]), draws[:, index], confidence),
            basis=_basis(float(left[index]), problem.prior, index),
        )
        for index, name in enumerate(NAMES)
    )


def _basis(left: float, prior: Prior, index: int) -> Basis:
    """``left``: the standard deviation of a parameter, of which the points took the rest."""
    if left < 0.15:  # known to within 15 %
        return "measured" if left < prior.deviation[index] / 2 else "given"
    if left < 0.75 * prior.deviation[index]:
        return "partly"
    return "given" if prior.given[index] else "assumed"
