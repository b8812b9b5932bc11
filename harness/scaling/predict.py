"""What a fitted model says of decompositions: prediction, the knee, a point that was left out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import floor, log2
from typing import Any

import numpy as np

from harness.errors import UsageError
from harness.scaling.fit import Fit, fit_step_time
from harness.scaling.interval import Array, Interval, factors, of_draws
from harness.scaling.points import Point
from harness.scaling.priors import step_time
from harness.scaling.steptime import Decomposition, Parts, Wire


@dataclass(frozen=True)
class Prediction:
    """What the model expects of one decomposition."""

    ranks: int
    nodes: int
    images_per_update: float
    accumulation: int
    seconds: Interval
    """Of an update."""
    images_per_sec: Interval
    efficiency: Interval
    """Throughput per rank over that with the fewest measured ranks, by this model too."""
    shares: dict[str, Interval]
    """Of the update's time: compute, straggling, communication that shows; they add up to 1."""
    beyond: float
    """Its ranks over the most that were measured; above 1 it is an extrapolation."""
    notes: tuple[str, ...]
    """Everything about it that lies outside of what was measured; empty within."""


def predict(
    fit: Fit,
    ranks: int,
    *,
    nodes: int | None = None,
    images_per_update: float | None = None,
    accumulation: int | None = None,
    repeats: int | None = None,
    seed: int = 0,
) -> Prediction:
    """Predict an update's time on so many ranks.

    What is not given follows the measured series: nodes of its width, its images per rank (weak) or
    per update (strong), its accumulation. The interval holds the ensemble's spread and the model's
    own error, which grows with the doublings beyond the measured ranks; with ``repeats``, also the
    scatter of a measurement's mean of so many, so that it is one for that measurement. Without the
    ensemble it is None.

    Raises UsageError for a decomposition that cannot be.
    """
    images = _images(fit, ranks, images_per_update)
    steps = fit.points[0].accumulation if accumulation is None else accumulation
    nodes = -(-ranks // fit.ranks_per_node) if nodes is None else nodes
    checked = Point(ranks, nodes, images, (1.0,), steps)
    where = Decomposition.of(ranks, nodes, images, steps)
    base = _baseline(fit, checked)
    parts = fit.model.parts(where)
    seconds = float(parts.seconds[0])
    quotient = _quotient(checked, base)
    ideal = float(fit.model.seconds(Decomposition.of_points([base]))[0])
    time, speed = Interval(seconds), Interval(quotient * ideal / seconds)
    shares = {name: Interval(float(share[0])) for name, share in _shares(parts).items()}
    if fit.models is not None and fit.noise is not None:
        rng = np.random.default_rng(seed)
        errors = _error(fit, ranks) * rng.standard_normal(len(fit.noise))
        drawn = fit.models.parts(where)
        draws = drawn.seconds[:, 0] * factors(errors)
        shares = {
            name: of_draws(shares[name].value, share[:, 0], fit.confidence)
            for name, share in _shares(drawn).items()
        }
        bases = fit.models.seconds(Decomposition.of_points([base]))[:, 0]
        speed = of_draws(speed.value, quotient * bases / draws, fit.confidence)
        if repeats is not None:
            draws *= factors(fit.noise / np.sqrt(repeats) * rng.standard_normal(len(draws)))
        time = of_draws(seconds, draws, fit.confidence)
    return Prediction(
        ranks=ranks,
        nodes=nodes,
        images_per_update=images,
        accumulation=steps,
        seconds=time,
        images_per_sec=time.mapped(lambda value: images / value),
        efficiency=speed,
        shares=shares,
        beyond=ranks / fit.points[-1].ranks,
        notes=_notes(fit, checked),
    )


def _shares(parts: Parts) -> dict[str, Array]:
    return {
        "compute": parts.compute / parts.seconds,
        "straggling": parts.straggling / parts.seconds,
        "communication": parts.exposed / parts.seconds,
    }


def _images(fit: Fit, ranks: int, images_per_update: float | None) -> float:
    if images_per_update is not None:
        return images_per_update
    first = fit.points[0]
    return first.images_per_rank * ranks if fit.mode == "weak" else first.images_per_update


def _baseline(fit: Fit, point: Point) -> Point:
    """The fewest measured ranks doing what this point does."""
    first = fit.points[0]
    images = point.images_per_update
    if fit.mode == "weak":
        images = point.images_per_rank * first.ranks
    return Point(first.ranks, first.nodes, images, (1.0,), point.accumulation)


def _quotient(point: Point, base: Point) -> float:
    """Efficiency × time / the baseline's time."""
    return point.images_per_rank / base.images_per_rank


def _error(fit: Fit, ranks: int) -> float:
    """Standard deviation of the model's own error, of the logarithm of seconds."""
    return fit.model_error * max(0.0, log2(ranks / fit.points[-1].ranks))


def _notes(fit: Fit, point: Point) -> tuple[str, ...]:
    """What lies outside of the measurements."""
    notes: list[str] = []
    most, fewest = fit.points[-1].ranks, fit.points[0].ranks
    if point.ranks > most:
        notes.append(f"{point.ranks / most:.3g} times the most ranks that were measured ({most:,})")
    elif point.ranks < fewest:
        notes.append(f"fewer ranks than the fewest that were measured ({fewest:,})")
    if point.nodes > 1 and fit.inside_only:
        source = "is taken from a probe" if fit.between_given else "is assumed"
        notes.append(f"nothing was measured between nodes; their network {source}")
    width = max(one.ranks / one.nodes for one in fit.points)
    if point.ranks / point.nodes > width:
        notes.append(
            f"{point.ranks / point.nodes:.3g} ranks on a node; measured were {width:.3g} at most"
        )
    sizes = [one.images_per_rank for one in fit.points]
    if not min(sizes) / 1.001 <= point.images_per_rank <= max(sizes) * 1.001:
        notes.append(
            f"{point.images_per_rank:.4g} images per rank; measured were {min(sizes):.4g}"
            + ("" if min(sizes) == max(sizes) else f" to {max(sizes):.4g}")
        )
    steps = {one.accumulation for one in fit.points}
    if point.accumulation not in steps:
        notes.append(f"an accumulation of {point.accumulation}, which was not measured")
    return tuple(notes)


# The knee


@dataclass(frozen=True)
class Knee:
    """The number of nodes past which one more buys less than half of itself."""

    nodes: Interval
    """``high`` is ``searched`` where the interval has no end below it."""
    ranks_per_node: int
    searched: int
    """Nodes up to which was looked."""
    open: bool
    """Whether even the last of those buys at least half: the knee lies beyond."""
    high_open: bool
    """Whether the interval has no end below ``searched``."""
    beyond: float
    """The knee's ranks over the most that were measured."""
    notes: tuple[str, ...]
    """Everything about the knee that lies outside of what was measured."""


def knee(
    fit: Fit,
    *,
    ranks_per_node: int | None = None,
    images_per_update: float | None = None,
    most_nodes: int = 1024,
) -> Knee:
    """Find the knee: the last N where X(N) − X(N − 1) ≥ ½·X(1), X the throughput of N nodes.

    Half of itself is half of what one node does alone. The last such N counts, as the second node
    may buy little, with the network that it brings, and those after it more. In weak scaling each
    rank has what it has in the first measured point (or its share of ``images_per_update`` on one
    node); in strong scaling the update's images are shared out.

    Raises UsageError for a search that cannot be.
    """
    if ranks_per_node is not None and not 1 <= ranks_per_node <= 10_000:
        raise UsageError(f"{ranks_per_node} ranks per node; valid are 1 to 10000")
    if not 2 <= most_nodes <= 100_000:
        raise UsageError(f"a search up to {most_nodes} nodes; valid are 2 to 100000")
    width = ranks_per_node or fit.ranks_per_node
    nodes = np.arange(1, most_nodes + 1)
    one = _images(fit, width, images_per_update)
    images = one * nodes if fit.mode == "weak" else np.full(len(nodes), one)
    accumulation = fit.points[0].accumulation
    where = Decomposition.of(nodes * width, nodes, images, accumulation)
    value = int(_last_worth(images / fit.model.seconds(where)[None])[0])
    found, high_open = Interval(value), False
    if fit.ensemble is not None and fit.models is not None:
        draws = np.concatenate([
            _last_worth(images / _some(fit, chunk, where))
            for chunk in np.array_split(fit.ensemble, max(1, len(nodes) * len(fit.ensemble) >> 19))
        ])  # fmt: skip
        found = of_draws(value, draws, fit.confidence).mapped(lambda count: float(floor(count)))
        high_open = found.high is not None and found.high >= most_nodes
    return Knee(
        nodes=found,
        ranks_per_node=width,
        searched=most_nodes,
        open=value == most_nodes,
        high_open=high_open or value == most_nodes,
        beyond=value * width / fit.points[-1].ranks,
        notes=_notes(
            fit, Point(value * width, value, float(images[value - 1]), (1.0,), accumulation)
        ),
    )


def _some(fit: Fit, members: Array, where: Decomposition) -> Array:
    return step_time(members, fit.wire, fit.topology).seconds(where)


def _last_worth(speeds: Array) -> Array:
    """(…, nodes) throughputs from 1 node on → (…,) the last node that buys half of the first."""
    worth = np.diff(speeds, axis=-1) >= 0.5 * speeds[..., :1]
    reversed_first = np.argmax(worth[..., ::-1], axis=-1)
    last = worth.shape[-1] - reversed_first + 1
    return np.asarray(np.where(worth.any(-1), last, 1), dtype=np.float64)


# Left out

_CHECKING = 200  # members of an ensemble that only has to tell inside from outside


@dataclass(frozen=True)
class LeftOut:
    """A point that the model was fitted without, held against what it then predicts."""

    point: Point
    measured: float
    """Images per second."""
    predicted: Interval
    """Images per second, with the interval for a mean of as many repeats."""
    error: float
    """predicted / measured − 1."""
    covered: bool | None
    """Whether the interval holds the measured value."""
    extrapolated: bool
    """Whether it has more ranks than all that were left in."""


def leave_out(fit: Fit, **settings: Any) -> tuple[LeftOut, ...]:
    """Fit without each number of ranks in turn and predict it; the most ranks come first.

    Empty where leaving one out leaves fewer than two numbers of ranks. ``settings``: those of
    ``fit_step_time`` that ``fit`` was made with, but for the mode, topology and confidence.
    """
    counts = sorted({point.ranks for point in fit.points}, reverse=True)
    if len(counts) < 3:
        return ()
    settings = {
        "mode": fit.mode,
        "topology": fit.topology,
        "confidence": fit.confidence,
        "ranks_per_node": fit.ranks_per_node,
        "ensemble": _CHECKING if fit.ensemble is None else min(_CHECKING, len(fit.ensemble)),
        **settings,
    }
    return tuple(one for count in counts for one in _without(count, fit.points, fit.wire, settings))


def _without(
    ranks: int, points: Sequence[Point], wire: Wire, settings: dict[str, Any]
) -> list[LeftOut]:
    kept = [point for point in points if point.ranks != ranks]
    out = [point for point in points if point.ranks == ranks]
    fitted = fit_step_time(kept, wire, **settings)
    found = []
    for point in out:
        expected = predict(
            fitted,
            point.ranks,
            nodes=point.nodes,
            images_per_update=point.images_per_update,
            accumulation=point.accumulation,
            repeats=len(point.seconds),
        ).images_per_sec
        measured = point.images_per_sec().value
        found.append(
            LeftOut(
                point=point,
                measured=measured,
                predicted=expected,
                error=expected.value / measured - 1,
                covered=expected.covers(measured),
                extrapolated=ranks > max(one.ranks for one in kept),
            )
        )
    return found
