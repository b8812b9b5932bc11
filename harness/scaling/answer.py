"""What a study found, in sentences for those who decide and need not know the words.

Each number stands with its interval, and each prediction with how far it lies beyond what was
measured.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import floor, isfinite, log10
from typing import Literal

from harness.scaling.fit import Fit
from harness.scaling.goodput import Goodput, Growth, best
from harness.scaling.interval import Interval
from harness.scaling.points import Point
from harness.scaling.predict import Knee, LeftOut, Prediction
from harness.scaling.speedup import SerialFraction, Speedup
from harness.scaling.study import Study
from harness.wording import counted

Topic = Literal[
    "measured", "time", "prediction", "knee", "check", "serial", "goodput", "growth", "caution"
]


@dataclass(frozen=True)
class Sentence:
    topic: Topic
    text: str


def answer(
    study: Study, goodputs: Sequence[Goodput] = (), growth: Growth | None = None
) -> tuple[Sentence, ...]:
    """The answer, the most important first."""
    check: list[tuple[Topic, str | None]] = [
        ("check", check_text(study.left_out) if study.left_out else None)
    ]
    missed = bool(study.left_out) and _checked(study.left_out).covered is False
    found: list[tuple[Topic, str | None]] = [
        ("measured", measured_text(study.speedups, study.confidence)),
        ("time", None if not study.at_points else time_text(study.at_points[-1])),
        *(check if missed else ()),  # before what it casts doubt on
        *(("prediction", prediction_text(one)) for one in study.predictions),
        ("knee", None if study.knee is None else knee_text(study.knee, study.fit)),
        ("goodput", goodput_text(goodputs) if goodputs else None),
        ("growth", None if growth is None else growth_text(growth)),
        ("serial", None if study.serial is None else serial_text(study.serial)),
        *(() if missed else check),
        ("caution", None if study.fit is None else caution_text(study.fit)),
        *(("caution", f"Note: {gap}.") for gap in study.gaps),
    ]
    return tuple(Sentence(topic, text) for topic, text in found if text is not None)


def measured_text(found: Sequence[Speedup], confidence: float) -> str:
    """What the largest point does, against the smallest."""
    last, first = found[-1], found[0]
    lead = (
        f"Numbers in brackets are {100 * confidence:g} % intervals. "
        if last.images_per_sec.known
        else ""
    )
    text = (
        f"{lead}With {place(last.point)} training processes {number(last.images_per_sec)} images "
        "per second"
    )
    if last is first:
        return f"{text}."
    return (
        f"{text}: {number(last.speedup)} times what {_ranks(first.point.ranks)} "
        f"{'does' if first.point.ranks == 1 else 'do'}, where "
        f"{_digits(last.point.ranks / first.point.ranks, 3)} times would be perfect; that is an "
        f"efficiency of {percent(last.efficiency)}."
    )


def time_text(found: Prediction) -> str:
    """Where the time of an update goes."""
    shares = found.shares
    return (
        f"By the model, an update with {_ranks(found.ranks)} spends {percent(shares['compute'])} "
        f"of its time computing, {percent(shares['communication'])} waiting for gradients to "
        f"travel and {percent(shares['straggling'])} waiting for the slowest rank."
    )


def prediction_text(found: Prediction) -> str:
    """What to expect of a decomposition, and how far that is from what was measured."""
    text = (
        f"With {_ranks(found.ranks)} on {counted(found.nodes, 'node')} we expect "
        f"{number(found.images_per_sec)} images per second, an efficiency of "
        f"{percent(found.efficiency)}"
    )
    if not found.notes:
        return f"{text}; this lies within what was measured."
    return f"{text}. This is a prediction, not a measurement: {'; '.join(found.notes)}."


def knee_text(found: Knee, fit: Fit | None = None) -> str:
    """Up to where more nodes are worth their price, or why that cannot be told."""
    unknown = _untold(found, fit)
    if unknown is not None:
        return f"These measurements cannot tell how many nodes are worth buying: {unknown}."
    value, low, high = found.nodes.value, found.nodes.low, found.nodes.high
    far = f" This is a prediction: {'; '.join(found.notes)}." if found.notes else ""
    if found.open:
        doubt = f", though that may end at {low:,.0f} already" if low and low < value else ""
        return (
            f"Each further node buys at least half of what the first one does up to "
            f"{found.searched:,} nodes, as far as was looked{doubt}.{far}"
        )
    between = ""
    if low is not None and high is not None:
        end = f"more than {found.searched:,}" if found.high_open else f"{high:,.0f}"
        between = f" ({low:,.0f} to {end})"
    return (
        f"Counting images per second alone, it pays to go up to {value:,.0f}{between} "
        f"{'node' if value == 1 else 'nodes'}: past that, each further node buys less than half of "
        f"what the first one does.{far}"
    )


def _untold(found: Knee, fit: Fit | None) -> str | None:
    """Why a knee is no more than what the model supposes beforehand; None if it is more."""
    if fit is not None and fit.inside_only and not fit.between_given:
        return "nothing was measured between nodes; a bench or a probe of several hosts would"
    if not found.nodes.known:
        return "without repeats nothing says how far off a prediction may be"
    if found.high_open and found.beyond > 1 and (found.nodes.low or 0) <= 1:
        return f"all from 1 to more than {found.searched:,} would agree with them"
    return None


def serial_text(found: SerialFraction) -> str:
    """The serial fraction, and whether it may be taken for one."""
    share = percent(found.overall)
    text = f"{found.law}'s law puts the part of the work that does not spread over ranks at {share}"
    if found.law == "Amdahl" and found.overall.value > 0:
        text += f", which would limit the speed-up to {number(found.overall.mapped(_limit))} times"
    alone = [interval for _, interval in found.at]
    rises = (
        len(alone) > 1
        and alone[0].high is not None
        and alone[-1].low is not None
        and alone[-1].low > alone[0].high
    )
    return (
        f"{text}; it rises with the ranks, so it is communication rather than serial work."
        if (rises)
        else f"{text}."
    )


def _limit(share: float) -> float:
    return 1 / share if share > 0 else float("inf")


def check_text(found: Sequence[LeftOut]) -> str:
    """How well the model predicted the point with the most ranks without having seen it."""
    first = _checked(found)
    inside = {
        True: "the measured value lies inside the interval",
        False: "the measured value lies outside the interval: trust the predictions less",
        None: "without repeats there is no interval to hold it against",
    }[first.covered]
    return (
        f"Checked: without the measurement on {_ranks(first.point.ranks)}, the model predicts "
        f"{number(first.predicted)} images per second there; measured were "
        f"{_digits(first.measured, 4)}, so it is {abs(100 * first.error):.1f} % too "
        f"{'high' if first.error > 0 else 'low'}; {inside}."
    )


def _checked(found: Sequence[LeftOut]) -> LeftOut:
    """The one that is told of: beyond what the fit has seen, if there is one."""
    return next((one for one in found if one.extrapolated), found[0])


def caution_text(fit: Fit) -> str:
    """What the predictions rest on."""
    ranks = ", ".join(f"{count:,}" for count in sorted({one.ranks for one in fit.points}))
    assumed = [one.name for one in fit.coefficients if one.basis == "assumed"]
    if fit.ranks_per_node == 1:  # nothing passes inside a node then
        assumed = [name for name in assumed if not name.startswith("within.")]
    names = [_NAMES[name] for name in assumed]
    given = [_NAMES[one.name] for one in fit.coefficients if one.basis == "given"]
    text = f"The predictions rest on measurements with {ranks} ranks"
    if given:
        text += f" and on a probe of the network ({_listed(given)})"
    if names:
        text += (
            f". These measurements do not tell {_listed(names)}; a wide range is assumed, "
            "which is what makes far predictions uncertain"
        )
        if any(name.startswith(("within.", "between.")) for name in assumed):
            text += ", and a probe of the network would narrow it"
    if fit.inside_only and not fit.between_given:
        text += ". Nothing was measured between nodes, so all that is said of several is assumed"
    return f"{text}."


_NAMES = {
    "per_image": "the time of an image",
    "fixed": "the fixed time of an update",
    "jitter": "how unevenly processes run",
    "gamma": "how much of the communication is hidden",
    "within.latency": "the latency inside a node",
    "within.seconds_per_byte": "the bandwidth inside a node",
    "between.latency": "the latency between nodes",
    "between.seconds_per_byte": "the bandwidth between nodes",
}


def goodput_text(found: Sequence[Goodput]) -> str:
    """Which choice trains fastest, and which costs least."""
    chosen = best(found)
    text = (
        f"Training advances fastest with {_choice(chosen)}: {number(chosen.images_per_sec)} images "
        f"per second, each worth {percent(chosen.statistical_efficiency)} of one in a small batch, "
        f"so {number(chosen.goodput)} useful images per second"
    )
    far = _far(chosen.beyond)
    if chosen.seconds is None or chosen.node_hours is None:
        return f"{text}.{far}"
    priced = [(one.node_hours.value, one) for one in found if one.node_hours is not None]
    cheapest = min(priced, key=lambda pair: pair[0])[1]
    text += (
        f"; it reaches the target in {duration(chosen.seconds)} and "
        f"{number(chosen.node_hours)} node-hours"
    )
    if cheapest.choice == chosen.choice or cheapest.seconds is None or cheapest.node_hours is None:
        return f"{text}, the fewest of all choices.{far}"
    return (
        f"{text}.{far} The cheapest way is with {_choice(cheapest)}: "
        f"{duration(cheapest.seconds)} and {number(cheapest.node_hours)} node-hours."
    )


def growth_text(found: Growth) -> str:
    """The ranks over a run, against the best that stay what they are."""
    steps = ", then ".join(
        f"{_ranks(one.choice.ranks)} (batch {one.choice.batch:,})"
        + (f" from {one.progress:,.0f} samples on" if one.progress else "")
        for one in found.steps
    )
    return (
        f"As the noise of the gradients grows, take {steps}: {duration(found.seconds)} and "
        f"{number(found.node_hours)} node-hours in all, against {duration(found.fixed_seconds)} "
        f"and {number(found.fixed_node_hours)} with {_ranks(found.fixed.ranks)} and a batch of "
        f"{found.fixed.batch:,} from start to end.{_far(found.beyond)}"
    )


def _far(beyond: float) -> str:
    """A sentence for what was not measured."""
    if beyond <= 1:
        return ""
    return f" This is a prediction for {_times(beyond)} the most ranks that were measured."


def _choice(found: Goodput) -> str:
    one = found.choice
    return f"{_ranks(one.ranks)} on {counted(one.nodes, 'node')} with a batch of {one.batch:,}"


# Numbers


def place(point: Point) -> str:
    """Such as ``8 ranks on 2 nodes``."""
    return f"{_ranks(point.ranks)} on {counted(point.nodes, 'node')}"


def _ranks(count: int) -> str:
    return counted(count, "rank")


def number(interval: Interval) -> str:
    """A value with its interval, to as many digits as the interval is worth."""
    digits = _worth(interval)
    text = _digits(interval.value, digits)
    if interval.low is None or interval.high is None:
        return text
    return f"{text} ({_digits(interval.low, digits)} to {_digits(interval.high, digits)})"


def percent(interval: Interval) -> str:
    """A share in percent."""
    shown = interval.scaled(100)
    text = f"{_percents(shown.value)} %"
    if shown.low is None or shown.high is None:
        return text
    return f"{text} ({_percents(shown.low)} to {_percents(shown.high)} %)"


def _percents(value: float) -> str:
    return f"{value:.0f}" if abs(value) >= 10 else f"{value:.2g}"


def duration(interval: Interval) -> str:
    """Seconds in the unit that suits the value."""
    for unit, seconds in (("days", 172_800.0), ("hours", 3600.0), ("minutes", 60.0)):
        if interval.value >= seconds:
            return f"{number(interval.scaled(1 / _SECONDS[unit]))} {unit}"
    return f"{number(interval)} seconds"


_SECONDS = {"days": 86_400.0, "hours": 3600.0, "minutes": 60.0}


def _worth(interval: Interval) -> int:
    """Significant digits: two of the interval's half width, from 2 to 4 of the value."""
    if interval.low is None or interval.high is None:
        return 3
    if interval.value == 0 or not isfinite(interval.value):
        return 3
    half = (interval.high - interval.low) / 2
    if not (isfinite(half) and half > 0):
        return 4
    return max(2, min(4, 2 + floor(log10(abs(interval.value))) - floor(log10(half))))


def _digits(value: float, digits: int) -> str:
    """So many significant digits, thousands with commas; no exponent where that can be read."""
    if not isfinite(value):
        return "no end" if value > 0 else "none"
    if value == 0:
        return "0"
    magnitude = floor(log10(abs(value)))
    if not -4 <= magnitude < 15:
        return f"{value:.{digits - 1}e}"
    places = digits - 1 - magnitude
    return f"{round(value, places):,.{max(0, places)}f}"


def _times(factor: float) -> str:
    return f"{_digits(factor, 2)} times"


def _listed(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"
